"""Search recipes: a supernet, a space of genes, and the stages in which the space is searched.

    recipe = read("small", ["teacher=DIR", "data.general.text=wiki.txt.gz", "space.params=3M"])

A search recipe is a distillation recipe (`fastffn.distill.recipe`: models, data, stages) with two
keys more. Its stages are not run one after another: the stages of the search name them.

    models: {supernet: <model>}      what is searched in: {supernet: {...}} or {load: DIR}
    space: {...}                     keys of `Space`, or the path of a YAML file with them
    search: [{name: ..., trials: ..., score: {...}, ...}, ...]      `SearchStage`
    seeds: [[<gene>, ...], ...]      what is judged first; or a file that a search has exported
    minutes: null                    for all of the search

The model `candidate`, a sub-network of the supernet with the supernet's weights, is added here:
students of distillation stages are `supernet` and `candidate`. Files, lines in errors, `???` and
overrides ("search.coarse.trials=20", "space.params=15M") are as in a distillation recipe.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..distill import recipe_overrides, recipe_yaml
from ..distill.recipe import (
    Recipe,
    built,
    check_set,
    parsed,
    placed,
    plain,
    with_names,
)
from ..distill.recipe import (
    locate as locate_among,
)
from ..distill.recipe_fields import RecipeError, build
from ..distill.recipe_parts import UNSET
from ..errors import UserError
from . import recipe_checks
from .export import read_genes

__all__ = ["Score", "SearchRecipe", "SearchStage", "locate", "read", "shipped"]

SUPERNET, CANDIDATE = "supernet", "candidate"  # the models that stages train
_CANDIDATE = {"efficientbert": {"from": SUPERNET}}
_FOLDER = Path(__file__).with_name("recipes")
_NAMED = ("stages", "search")  # keys whose lists go by name
_OWN = ("space", "search", "seeds", "minutes")


@dataclass(frozen=True)
class Score:
    """What candidates are judged by, on rows of the training data that no stage trains on.

    Attributes:
        metric: one of the task's metrics, or "loss": minus the weighted loss of a stage, which
            needs no labels. In a recipe: the task's first, or "loss" where a stage is named.
        data: name of the data with the task; None for the loss, whose stage has data.
        stage: of the loss: name of the distillation stage whose losses are meant.
        rows: how many are held out.
    """

    metric: str
    data: str | None = None
    stage: str | None = None
    rows: int = 1000

    def __post_init__(self):
        if self.rows < 1:
            raise UserError(f"rows {self.rows} is not positive")
        if self.metric == "loss" and (self.stage is None or self.data is not None):
            raise UserError("metric loss is that of a stage, on its data: give stage, and no data")
        if self.metric != "loss" and (self.data is None or self.stage is not None):
            raise UserError(f"metric {self.metric} is of a task: give data, and no stage")


@dataclass(frozen=True)
class SearchStage:
    """One stage of the search.

    Attributes:
        name: unique in the recipe.
        trials: different candidates that are judged, by whichever process.
        score: what they are judged by.
        random: how many of the first are drawn by chance.
        freeze: what of the winner so far is kept: None nothing, "functions" (stacks and ratios are
            searched), "shapes" (functions are).
        proposals: whence candidates come: a method of `search.proposals`, or {"method": name} with
            its options.
        objectives: see `search.merit`; "quality" is first.
        batch: how many are proposed at once.
        supernet: names of the distillation stages that train the supernet before; in later stages
            of the search with the winner's functions.
        train: names of those that each candidate goes through, from the supernet's weights; none:
            it is judged with the supernet's weights (one-shot).
        rungs: parts of the last of `train`, rising to 1, after each of which it is judged, and
            goes on if it is among the best 1/reduction of those that came as far.
        reduction: see rungs.
    """

    name: str
    trials: int
    score: Score
    random: int = 0
    freeze: Literal["functions", "shapes"] | None = None
    proposals: str | dict[str, Any] = "evolution"
    objectives: tuple[str, ...] = ("quality",)
    batch: int = 1
    supernet: tuple[str, ...] = ()
    train: tuple[str, ...] = ()
    rungs: tuple[float, ...] = (1.0,)
    reduction: int = 3

    def __post_init__(self):
        for name in ("trials", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)} is not positive")
        if not 0 <= self.random <= self.trials:
            raise UserError(f"random {self.random} is not from 0 to the {self.trials} trials")
        if self.reduction < 2:
            raise UserError(f"reduction {self.reduction}: of a rung the best half go on at most")
        rungs = self.rungs
        if not rungs or rungs[0] <= 0 or rungs[-1] != 1 or list(rungs) != sorted(set(rungs)):
            said = ", ".join(f"{rung:g}" for rung in rungs)
            raise UserError(f"rungs [{said}] do not rise from above 0 to 1, such as [0.25, 0.5, 1]")
        if len(rungs) > 1 and not self.train:
            raise UserError("rungs are parts of the last stage of train, and train is empty")
        for name in (SUPERNET, "train"):
            stages = getattr(self, name)
            if len(set(stages)) < len(stages):
                raise UserError(f"{name} names a stage twice: {', '.join(stages)}")


@dataclass(frozen=True)
class SearchRecipe:
    """All of a search; checked when it is made.

    Attributes:
        distil: models (supernet and candidate among them), data and stages, and name,
            description, seed, precision and checkpoint_seconds.
        space: values of `Space` as YAML has them; what is left out and a supernet has
            (hidden_size, num_layers, base) is the supernet's.
        search: the stages, in order.
        seeds: candidates that are judged first, a list of genes each, one per layer; None: plain
            ones, the largest. In a recipe also the path of a genes.yaml.
        minutes: of wall time, for everything; stages then end early. None: no limit.

    Raises:
        UserError: names that do not exist, or parts that do not fit together.
    """

    distil: Recipe
    space: dict[str, Any]
    search: tuple[SearchStage, ...]
    seeds: tuple[tuple[str, ...], ...] | None = None
    minutes: float | None = None

    def __post_init__(self):
        if self.minutes is not None and self.minutes <= 0:
            raise UserError(f"minutes {self.minutes:g} is not positive")
        recipe_checks.check(self.distil, self.space, self.search)

    @property
    def name(self) -> str:
        return self.distil.name

    @property
    def description(self) -> str:
        return self.distil.description

    @property
    def seed(self) -> int:
        return self.distil.seed

    @classmethod
    def from_mapping(
        cls, mapping: Mapping[str, Any], overrides: Sequence[str] = ()
    ) -> "SearchRecipe":
        """The recipe that plain values describe as a file would; there are no lines to name."""
        return _recipe(mapping, recipe_yaml.Places("recipe"), overrides, "recipe")

    def to_mapping(self) -> dict[str, Any]:
        """Plain values with defaults written out; `from_mapping` gives an equal recipe."""
        values = self.distil.to_mapping()
        models = {name: spec for name, spec in values["models"].items() if name != CANDIDATE}
        search = [plain(stage) for stage in self.search]
        return values | {
            "models": models,
            "space": plain(self.space),
            "search": search,
            "seeds": plain(self.seeds),
            "minutes": self.minutes,
        }

    def to_yaml(self) -> str:
        """The text of a file that, when read, gives an equal recipe."""
        return recipe_yaml.dump(self.to_mapping())


def shipped() -> dict[str, Path]:
    """The search recipes of this package: name -> file."""
    return {path.stem: path for path in sorted(_FOLDER.glob("*.yaml"), key=lambda path: path.stem)}


def locate(path_or_name: str | Path) -> Path:
    """The file of a recipe; a file of one's own comes before a shipped recipe of its name."""
    return locate_among(path_or_name, shipped())


def read(path_or_name: str | Path, overrides: Sequence[str] = ()) -> SearchRecipe:
    """Reads a recipe and checks it; nothing is loaded.

    Args:
        path_or_name: path of a YAML file, or the name of a shipped recipe.
        overrides: as of `fastffn.distill.recipe.read`; stages of the search go by their names
            too: "search.coarse.trials=20". "space=FILE" replaces the whole space.

    Raises:
        UserError: one line: the file's line or the override, the key, the remedy.
    """
    path = locate(path_or_name)
    return _recipe(*parsed(path), overrides, path.stem)


# -- from values ---------------------------------------------------------------------------------


def _recipe(
    values: Any, places: recipe_yaml.Places, overrides: Iterable[str], name: str
) -> SearchRecipe:
    with placed(places):
        values = with_names(values, places, _NAMED)
        _read_space(values, places)
        for text in overrides:
            recipe_overrides.apply(values, places, text, _NAMED)
            _read_space(values, places)
        _read_seeds(values)
        _add_candidate(values)
        _complete_scores(values)
        # The supernet is there to be searched in, whether a stage trains it or not.
        check_set(values, models={CANDIDATE, SUPERNET}, data=_scored(values))
        return _built(values, name)


def _read_space(values: dict[str, Any], places: recipe_yaml.Places) -> None:
    """Puts the space of a file in the place of the file's path."""
    path = values.get("space")
    if not isinstance(path, str) or path == UNSET:
        return
    try:
        space, lines = parsed(Path(path), "space")
    except UserError as error:
        raise RecipeError(("space",), f": {error}") from None
    values["space"] = {} if space is None else space
    places.include(("space",), lines)


def _read_seeds(values: dict[str, Any]) -> None:
    """Puts the genes of a file in the place of the file's path."""
    path = values.get("seeds")
    if not isinstance(path, str) or path == UNSET:
        return
    try:
        values["seeds"] = [[str(gene) for gene in read_genes(path)]]
    except UserError as error:
        raise RecipeError(("seeds",), f": {error}") from None


def _add_candidate(values: dict[str, Any]) -> None:
    models = values.get("models")
    if not isinstance(models, Mapping) or models.get(SUPERNET) is None:
        said = "has no supernet: give models.supernet, which is searched in"
        raise RecipeError(("models",), said)
    if CANDIDATE in models:
        said = f"is made from {SUPERNET} by the search: leave it out"
        raise RecipeError(("models", CANDIDATE), said)
    values["models"] = {**models, CANDIDATE: _CANDIDATE}


def _scores(values: dict[str, Any]) -> list[dict[str, Any]]:
    """The scores of the stages that have one; values may still be of any type."""
    stages = [stage for stage in values["search"].values() if isinstance(stage, Mapping)]
    return [stage["score"] for stage in stages if isinstance(stage.get("score"), dict)]


def _scored(values: dict[str, Any]) -> set[str]:
    named = {score.get("data") for score in _scores(values) if isinstance(score.get("data"), str)}
    return named - {UNSET}


def _complete_scores(values: dict[str, Any]) -> None:
    """Gives scores without a metric that of their task, or the loss."""
    for score in _scores(values):
        if score.get("metric") is not None:
            continue
        data = values.get("data")
        spec = data.get(score.get("data")) if isinstance(data, Mapping) else None
        task = spec.get("task") if isinstance(spec, Mapping) else None
        known = recipe_checks.metrics(task)
        if score.get("stage") is not None:
            score["metric"] = "loss"
        elif known:
            score["metric"] = known[0]


def _built(values: dict[str, Any], name: str) -> SearchRecipe:
    own = {key: values[key] for key in _OWN if key in values}
    distil = {key: item for key, item in values.items() if key not in own}
    distil = built(distil, name, also=_OWN)
    if own.get("space") is None:
        raise RecipeError(("space",), "is missing: give a mapping, or the path of a YAML file")
    search = tuple(
        _stage(stage, ("search", key))
        for key, stage in own.pop("search").items()
        if stage is not None
    )
    return build(SearchRecipe, own, (), distil=distil, search=search)


def _stage(values: Any, path: tuple) -> SearchStage:
    if not isinstance(values, Mapping):
        raise RecipeError(path, f"is {values!r}: expected a mapping, keys with values")
    if values.get("name") != path[-1]:
        raise RecipeError((*path, "name"), f"is {values.get('name')!r}: a stage keeps its name")
    return build(SearchStage, values, path)
