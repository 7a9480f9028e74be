"""Runs a search recipe: its stages one after the other, resumable at any moment.

    report = run("small", out="runs/small", overrides=["teacher=DIR", "data.general.text=a.txt"])

The run directory:

    recipe.yaml            the recipe as resolved, which can be run again
    state.json             what is finished
    search.sqlite3         the studies, one for each stage, unless `storage` names a database
    supernets/coarse/      the run that trained the supernet, for the stage of that name
    work/                  caches of teachers' outputs; removed at the end
    genes.yaml, config.json, student.yaml     the winner: genes, model, a recipe to distil it
    pictures/, report.json

The same call on a directory that holds an unfinished search goes on where that one was; candidates
that are judged stay judged. More trials may be asked for at any time, of a finished search too.
Other processes, on this machine or others, join by `worker.run` on the same database: this one
judges candidates as they do, and alone trains supernets and goes from stage to stage.
"""

import dataclasses
import importlib.util
import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastffn.distill import engine as distillation_engine
from fastffn.distill.preparation import prepare
from fastffn.errors import UserError
from fastffn.files import write_text_atomic
from fastffn.memory import freed_memory_kept
from fastffn.rundir import RunDirectory
from fastffn.search import compare as comparing
from fastffn.search import export, pictures, show
from fastffn.search.beginning import (
    check_loaded,
    check_members,
    check_size,
    check_stages,
    check_storage,
    completed,
    options,
)
from fastffn.search.coarse_to_fine import StageJudge, coarse_to_fine
from fastffn.search.evaluation import (
    SUPERNET,
    distillation,
    evaluation,
    fingerprint,
)
from fastffn.search.head import Head
from fastffn.search.latency import measure
from fastffn.search.ledger import verdict
from fastffn.search.recipe import SearchRecipe, SearchStage, read
from fastffn.search.space import ANY, Candidate, Space
from fastffn.search.storage import Storage
from fastffn.search.study import Study
from fastffn.search.supernets import Supernets

Progress = Callable[[str, float, float, str], None]

_CONTENTS = ("supernets", "search.sqlite3", "search.sqlite3-lock", "pictures", "recipe.yaml")
_CONTENTS += ("report.json", "genes.yaml", "config.json", "student.yaml", "compare.json")
_BEGUN = "candidates"  # the phase that is finished when the first candidate is judged
_SHOWN = 3  # of differing options
_SEEDS = 4  # plain candidates that are judged first


def run(
    recipe: SearchRecipe | str | Path,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    storage: str | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Runs what is not finished yet and returns the report.

    Args:
        recipe: a `SearchRecipe`, the path of one, or the name of a shipped one.
        out: the run directory; None: runs/<name of the recipe>.
        overrides: texts "key.sub=value", see `recipe.read`.
        storage: URL of a database for the candidates; None: a file in the run directory.
        fresh: start over where `out` holds another or a finished search.
        progress: called as progress(phase, done, total, text).

    Returns:
        The report as plain data, which report.json holds too (see `show`).

    Raises:
        UserError: bad input, before anything is trained; no candidate with a quality.
        KeyboardInterrupt: passed on; the same call resumes.
    """
    recipe = _read(recipe, overrides)
    out = Path(out or Path("runs") / recipe.name)
    progress = progress or (lambda phase, done, total, text: None)
    check_storage(storage)
    directory = RunDirectory(out, options(recipe, storage), fresh, _CONTENTS, ("space",))
    retry = False
    if directory.finished:
        done = directory.kept("trials")
        same_time = recipe.minutes == directory.kept("minutes")
        retry = any(stage.get("given_up") for stage in directory.report["stages"])
        enough = all(stage.trials <= done[stage.name] for stage in recipe.search)
        if enough and same_time and not retry:
            progress("report", 1, 1, f"finished before: {out} (--fresh starts over)")
            return directory.report
        directory.reopen()
    with freed_memory_kept():
        search = _Search(recipe, directory, storage, progress)
        write_text_atomic(out / "recipe.yaml", recipe.to_yaml())
        search.begin(fresh)
        with search.head.alive():
            coarse_to_fine(
                search.space,
                search,
                search.storage,
                recipe.search,
                search.seeds(),
                recipe.seed,
                recipe.name,
                search.tell,
                retry,
            )
            report = search.report()
            directory.keep("minutes", recipe.minutes)
            directory.keep("trials", {stage.name: stage.trials for stage in recipe.search})
            write_text_atomic(out / "report.json", json.dumps(report, indent=1) + "\n")
            if importlib.util.find_spec("matplotlib"):
                pictures.draw(report, out / show.PICTURES)
            search.head.note(finished=True)
    directory.finish(report)
    return report


def compare(
    recipe: SearchRecipe | str | Path,
    out: str | Path | None,
    methods: Sequence[str],
    seeds: Sequence[int],
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compares methods of proposing on equal budgets: those of the recipe's first search stage.

    The supernet is that of the run directory, where a search has trained it or this call does; what
    is judged stays in compare.json there, so that an interrupted comparison goes on.

    Returns:
        See `fastffn.search.compare.compare`.

    Raises:
        UserError: as `run`, an unknown method, or a seed that is negative.
    """
    recipe = _read(recipe, overrides)
    out = Path(out or Path("runs") / recipe.name)
    progress = progress or (lambda phase, done, total, text: None)
    stage = recipe.search[0]
    directory = RunDirectory(out, options(recipe, None), False, _CONTENTS, ("space",))
    kept = out / "compare.json"
    judged = json.loads(kept.read_text()) if kept.exists() else {}
    total = len(methods) * len(seeds) * stage.trials
    done = 0

    def tell(method: str, seed: int, record: Mapping[str, Any], count: int, of: int) -> None:
        nonlocal done
        done += 1
        write_text_atomic(kept, json.dumps(judged))
        progress("compare", done, total, f"{method}, seed {seed}: {verdict(record)}")

    with freed_memory_kept():
        search = _Search(recipe, directory, None, progress)
        evaluate = search.evaluation(stage, None)
        directory.phase(_BEGUN, dict)
        return comparing.compare(
            search.space,
            evaluate,
            methods,
            stage.trials,
            seeds,
            tell,
            stage.objectives,
            stage.random,
            judged,
        )


class _Search(StageJudge):
    """A search on its way: its space, its storage, and how each stage judges."""

    def __init__(
        self, recipe: SearchRecipe, directory: RunDirectory, storage: str | None, progress: Progress
    ):
        self.recipe, self.directory, self.progress = recipe, directory, progress
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.end = None if recipe.minutes is None else time.monotonic() + 60 * recipe.minutes
        self.ends: dict[str, float] = {}  # of stages, where time is limited
        self.space, self.config = self._begun()
        layers = self.config["num_hidden_layers"]
        self.supernets = Supernets(recipe, self.space, layers, directory.path, progress)
        self.place = storage or str(directory.path)
        self.storage = Storage(self.place)
        self._records: list[dict[str, Any]] = []
        self._started = (time.monotonic(), 0)
        self._used: dict[str, list[str | None]] = {}  # supernets: folder, fingerprint
        self._functions: dict[str, list[str] | None] = {}  # that a stage trains a supernet with

    def begin(self, fresh: bool) -> None:
        """Lets workers know of the search; `fresh` forgets another of its name before.

        Raises:
            UserError: the database has a search of this name with other options.
        """
        if fresh:
            self.storage.remove(self.recipe.name)
        self.head = Head(self.storage, self.recipe.name)
        ours = options(self.recipe, None)
        theirs = self.storage.notes(self.recipe.name).get("options", ours)
        if differing := sorted(k for k in {*ours, *theirs} if ours.get(k) != theirs.get(k)):
            changes = ", ".join(
                f"{key} was {theirs.get(key)}, is {ours.get(key)}" for key in differing[:_SHOWN]
            )
            raise UserError(
                f"{self.storage.place} holds a search called {self.recipe.name} with other options "
                f"({changes}): give this one another name=..., or start over with --fresh"
            )
        begun = self.storage.notes(self.recipe.name).get("begun")
        self.head.note(
            begun=begun or uuid.uuid4().hex,
            options=ours,
            finished=False,
            stages=[stage.name for stage in self.recipe.search],
            recipe=self.recipe.to_mapping(),
        )

    def seeds(self) -> list[Candidate]:
        """What is judged first: the recipe's, else the largest plain ones."""
        given = self.recipe.seeds
        if given is None:
            return self.space.plain()[:_SEEDS]
        return [self.space.candidate(genes) for genes in given]

    # -- stages

    def comparable(self, stage: SearchStage, other: SearchStage) -> bool:
        def way(of: SearchStage) -> tuple:
            return of.train, of.rungs, of.score, self.supernets.trained_for(of)

        return way(stage) == way(other)

    def open(self, stage: SearchStage, study: Study, winner: Candidate | None):
        self.supernets.name(stage, study.name)
        evaluate = self.evaluation(stage, winner)
        made = fingerprint(evaluate.made)
        if study.notes.get("fingerprint", made) != made:
            raise UserError(
                f"{study.name} in {self.storage.place} was judged with other models or data: "
                "restore them, take another name for the search, or start over with --fresh"
            )
        study.note("fingerprint", made)
        folder = self.supernets.folder(stage)
        here = self.directory.path.resolve()
        if folder is not None and folder.is_relative_to(here):
            folder = folder.relative_to(here)
        self._used[stage.name] = [folder and str(folder), made]
        self.head.note(supernets=self._used, directory=str(here))
        self.directory.phase(_BEGUN, dict)  # from now on other options are refused
        study.note("open", True)
        self._records = [r for r in study.candidates() if not r["inherited"]]
        self._started = time.monotonic(), study.counts()["settled"]
        if self.end is not None:
            stages = self.recipe.search[self.recipe.search.index(stage) :]
            share = stage.trials / sum(later.trials for later in stages)
            now = time.monotonic()
            self.ends[stage.name] = now + share * max(0.0, self.end - now)
        return evaluate

    def close(self, stage: SearchStage, study: Study) -> None:
        self.supernets.name(stage, study.name)
        counts = study.counts()
        if study.notes.get("open"):
            if counts["settled"] < stage.trials and self.enough(stage):
                study.note("ended", [stage.trials, self.recipe.minutes])
            study.note("open", False)
        self.progress(stage.name, stage.trials, stage.trials, f"{counts['finished']} judged")

    def enough(self, stage: SearchStage) -> bool:
        return stage.name in self.ends and time.monotonic() > self.ends[stage.name]

    def ended(self, stage: SearchStage, study: Study) -> bool:
        return study.notes.get("ended") == [stage.trials, self.recipe.minutes]

    def basis(self, stage: SearchStage, winner: Candidate | None) -> list[str] | None:
        """The functions that the stage's supernet was trained with, if a winner brought them."""
        if stage.supernet:
            functions = winner and [str(gene.expr) for gene in winner.genes]
            self._functions[stage.name] = functions
        return self._functions.get(self.supernets.trained_for(stage))

    def tell(self, stage: str, record: dict[str, Any], done: int, total: int) -> None:
        """Shows what a stage has found so far."""
        if record["quality"] is not None:
            self._records.append(record)
        objectives = next(s.objectives for s in self.recipe.search if s.name == stage)
        started, before = self._started
        said = show.status(self._records, objectives, done, total, started, before)
        self.progress(stage, done, total, said)

    def evaluation(self, stage: SearchStage, winner: Candidate | None):
        """What judges a stage's candidates; trains the supernet first, if the stage says so."""
        if stage.supernet:
            name = f"supernet {self.supernets.title(stage.name)}"
            self.directory.phase(name, lambda: self.supernets.train(stage, winner))
        folder, work = self.supernets.folder(stage), self.directory.work
        return evaluation(self.recipe, stage, folder, work, self.device, self.progress)

    # -- the beginning and the end

    def _begun(self) -> tuple[Space, dict[str, Any]]:
        """The space, and the supernet's configuration; everything that the recipe names is read and
        checked when it is run for the first time."""

        def begin() -> dict[str, Any]:
            check_loaded(self.recipe.distil.models[SUPERNET].load)
            every = [stage.name for stage in self.recipe.distil.stages]
            made = prepare(distillation(self.recipe, every), self.progress)
            supernet = made.models[SUPERNET].base_model
            values = completed(self.recipe.space, supernet)
            space = Space.from_dict(values)
            check_size(space, supernet.config)
            if space.table is None and (space.latency != ANY or self._wants_latency()):
                table = measure(
                    space,
                    model=supernet,
                    progress=lambda done, total: self.progress("latency", done, total, ""),
                )
                space = Space.from_dict(values | {"table": table.to_dict()})
            check_members(space, self.recipe)
            check_stages(self.recipe, space, made, self.directory.work)
            return {"space": space.to_dict(), "config": supernet.config.to_dict()}

        kept = self.directory.phase("space", begin)
        return Space.from_dict(kept["space"]), kept["config"]

    def _wants_latency(self) -> bool:
        return any("latency" in stage.objectives for stage in self.recipe.search)

    def report(self) -> dict[str, Any]:
        """Of the finished search; writes the winner's files."""
        found = show.collect(self.storage, self.recipe.name)
        for stage, said in zip(self.recipe.search, found["stages"], strict=True):
            score = self.recipe.to_mapping()["search"][self.recipe.search.index(stage)]["score"]
            folder = self.supernets.folder(stage)
            said |= {"score": score, "supernet": folder and str(folder)}
        found["supernet"] = found["stages"][-1]["supernet"]
        found["space"] = self.space.to_dict()
        found["seconds"] = round(sum(self.directory.seconds().values()) + found["seconds"], 1)
        found["machine"] = distillation_engine.device_name(self.device)
        found["versions"] = distillation_engine.versions(("optuna", "scikit-learn"))
        trained = {name for stage in self.recipe.search for name in (*stage.supernet, *stage.train)}
        distil = self.recipe.distil  # without what only scores
        stages = tuple(stage for stage in distil.stages if stage.name in trained)
        distil = dataclasses.replace(distil, stages=stages or distil.stages)
        export.export(found, self.directory.path, self.config, distil)
        return found


def _read(recipe: SearchRecipe | str | Path, overrides: Sequence[str]) -> SearchRecipe:
    if not isinstance(recipe, SearchRecipe):
        return read(recipe, overrides)
    if overrides:
        raise UserError("overrides are for recipes that are read: change the SearchRecipe instead")
    return recipe
