"""The supernets of a search: which stage uses which, where they lie, and how they are trained."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastffn.distill import engine as distillation_engine
from fastffn.distill.recipe import Recipe
from fastffn.distill.subnetworks import kept_layers
from fastffn.distill.teacher import locate
from fastffn.rundir import atomic_directory
from fastffn.search.evaluation import SUPERNET, distillation
from fastffn.search.recipe import SearchRecipe, SearchStage
from fastffn.search.space import Candidate, Space

Progress = Callable[[str, float, float, str], None]


class Supernets:
    """Those of one search.

    Args:
        space: of the search.
        depth: number of the supernet's layers; candidates may have fewer.
        directory: of the search; supernets lie in supernets/<stage>/student.
    """

    def __init__(
        self, recipe: SearchRecipe, space: Space, depth: int, directory: Path, progress: Progress
    ):
        self.recipe, self.space, self.progress = recipe, space, progress
        self.layers = kept_layers(space.num_layers, depth)
        self._place = directory.resolve() / "supernets"
        self._titles: dict[str, str] = {}

    def name(self, stage: SearchStage, study: str) -> None:
        """Says which study a stage has: one that was begun again trains a supernet of its own."""
        self._titles[stage.name] = study.removeprefix(f"{self.recipe.name}.")

    def title(self, stage: str) -> str:
        """What a stage is called in directories: with how often it was begun."""
        return self._titles.get(stage, stage)

    def trained_for(self, stage: SearchStage) -> str | None:
        """The last stage until this one for which a supernet was trained."""
        until = self.recipe.search[: self.recipe.search.index(stage) + 1]
        return next((before.name for before in reversed(until) if before.supernet), None)

    def folder(self, stage: SearchStage) -> Path | None:
        """Where the supernet lies that a stage uses; None: it is made as the recipe says."""
        trained = self.trained_for(stage)
        if trained is None:
            load = self.recipe.distil.models[SUPERNET].load
            return None if load is None else locate(load, SUPERNET)[0]
        return self._place / self.title(trained) / "student"

    def train(self, stage: SearchStage, winner: Candidate | None) -> dict[str, Any]:
        """Runs the stage's distillation of the supernet; resumes an interrupted one."""
        folder = self._place / self.title(stage.name)
        before = source = None
        if winner is not None:
            before = self.folder(self.recipe.search[self.recipe.search.index(stage) - 1])
        if before is not None:
            source = folder.with_name(f"{folder.name}-start")
            if not source.exists():
                with_functions(before, winner, self.layers, source)
        recipe = self._with_ratios(distillation(self.recipe, stage.supernet, source))
        report = distillation_engine.run(recipe, folder, progress=self.progress)
        if source is not None:
            shutil.rmtree(source)
        return {"seconds": sum(each["seconds"] for each in report["stages"].values())}

    def _with_ratios(self, recipe: Recipe) -> Recipe:
        """Sub-networks learn at the widths that candidates will have."""
        ratios = sorted({ratio for rules in self.space.rules for ratio in rules.ratios})
        stages = [
            dataclasses.replace(stage, ratios=tuple(map(str, ratios)))
            if stage.subnetworks and not stage.ratios
            else stage
            for stage in recipe.stages
        ]
        return dataclasses.replace(recipe, stages=tuple(stages))


def with_functions(before: Path, winner: Candidate, layers: Sequence[int], folder: Path) -> None:
    """Makes a copy of a supernet with the winner's genes: it trains their functions.

    Args:
        before: the supernet's folder.
        layers: those of its layers that candidates have.
    """
    with atomic_directory(folder) as made:
        shutil.copytree(before, made, dirs_exist_ok=True)
        config = json.loads((made / "config.json").read_text(encoding="utf-8"))
        for layer, text in zip(layers, winner.texts, strict=True):
            config["genes"][layer] = text
        (made / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
