"""Recipes: which models are distilled into which, on what data, by which losses, stage by stage.

    recipe = read("minilm", ["teacher=DIR", "data.text.text=wiki.txt.gz"])    or a file's path

A recipe is a YAML file, and here plain frozen dataclasses: checked as a whole before anything is
loaded, and written back by `Recipe.to_yaml`. The shipped ones are in recipes/. What is wrong is
said in one line that names the file's line, or the override, and the key.

    teacher: <model>   student: <model>   models: {<name>: <model>}         recipe_parts.ModelSpec
    data: {<name>: <data>}                                                  recipe_parts.DataSpec
    stages: [{name: ..., student: ..., data: ..., losses: {...}, ...}]      recipe_parts.Stage
    a loss: {kind: <term, default: its name>, weight: 1, <options>}         terms.TERMS

Shorthands: text for a model is `{load: text}`, a number for a loss its weight, a lone value for a
list a list of one. `???` stands for what the user must give, if an enabled stage uses it. Paths are
relative to the working directory.
"""

import contextlib
import copy
import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastffn.distill import recipe_checks, recipe_overrides, recipe_yaml, task_files
from fastffn.distill.recipe_fields import RecipeError, build, choice, dotted
from fastffn.distill.recipe_parts import (
    TOP_MODELS,
    UNSET,
    DataSpec,
    Loss,
    ModelSpec,
    Stage,
    model_name,
    model_path,
)
from fastffn.distill.replacing import Schedule
from fastffn.distill.terms import TERMS
from fastffn.errors import UserError

__all__ = ["DataSpec", "Loss", "ModelSpec", "Recipe", "Schedule", "Stage", "read", "shipped"]

_FOLDER = Path(__file__).with_name("recipes")
_NAME = re.compile(r"[A-Za-z0-9_-]+")  # without dots: names are parts of an override's key
_GIVE = {"load": "DIR", "text": "FILE", "task": "TASK", "dir": "DIR"}


@dataclass(frozen=True)
class Recipe:
    """All of a run; checked when it is made.

    Attributes:
        name: what it is called.
        stages: in order, those that are not enabled too.
        models: by name, "teacher" and "student" among them if the recipe has them.
        data: by name.
        description: what it does, whence its numbers are, what the papers leave open.
        seed: of everything that is drawn by chance.
        precision: of the training; bf16 and fp16 are mixed precision.
        checkpoint_seconds: about so often a state is saved from which the run can be resumed.

    Raises:
        UserError: names that do not exist, or parts that do not fit together.
    """

    name: str
    stages: tuple[Stage, ...]
    models: dict[str, ModelSpec]
    data: dict[str, DataSpec]
    description: str = ""
    seed: int = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    checkpoint_seconds: float = 60.0

    def __post_init__(self):
        if not _NAME.fullmatch(self.name):
            raise UserError(f"name {self.name!r}: use letters, digits, - and _ alone")
        if self.seed < 0:
            raise UserError(f"seed {self.seed} is negative")
        if self.checkpoint_seconds <= 0:
            raise UserError(f"checkpoint_seconds {self.checkpoint_seconds:g} is not positive")
        recipe_checks.check(self.models, self.data, self.stages)

    @property
    def enabled(self) -> tuple[Stage, ...]:
        """The stages that run, in order."""
        return tuple(stage for stage in self.stages if stage.enabled)

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> "Recipe":
        """The recipe that plain values describe as a file would; there are no lines to name."""
        return _recipe(mapping, recipe_yaml.Places("recipe"), (), "recipe")

    def to_mapping(self) -> dict[str, Any]:
        """Plain values with defaults written out; `from_mapping` gives an equal recipe."""
        models = {name: plain(spec) for name, spec in self.models.items()}
        values = {name: getattr(self, name) for name in ("name", "description", "seed")}
        values |= {"precision": self.precision, "checkpoint_seconds": self.checkpoint_seconds}
        values |= {name: models.pop(name) for name in TOP_MODELS if name in models}
        values |= {"models": models} if models else {}
        values["data"] = {name: plain(spec) for name, spec in self.data.items()}
        values["stages"] = [_stage_values(stage) for stage in self.stages]
        return values

    def to_yaml(self) -> str:
        """The text of a file that, when read, gives an equal recipe."""
        return recipe_yaml.dump(self.to_mapping())


def shipped() -> dict[str, Path]:
    """The recipes of this package: name -> file."""
    return {path.stem: path for path in sorted(_FOLDER.glob("*.yaml"))}


def read(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe and checks it; nothing is loaded.

    Args:
        path_or_name: path of a YAML file, or the name of a shipped recipe.
        overrides: texts "key.sub=value"; the value is YAML. Stages go by their names:
            "stages.gd.losses.hidden.weight=2". "teacher=DIR" sets `teacher.load`, a number for a
            loss its weight, null for a loss leaves it out; steps replace epochs and the reverse.

    Raises:
        UserError: one line: the file's line or the override, the key, the remedy.
    """
    path = locate(path_or_name)
    return _recipe(*parsed(path), overrides, path.stem)


def locate(path_or_name: str | Path, known: Mapping[str, Path] | None = None) -> Path:
    """The file of a recipe; a file of one's own comes before a shipped recipe of its name.

    `known` are the shipped recipes, name -> file; None: those of this package.
    """
    path, known = Path(path_or_name), shipped() if known is None else known
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise UserError(f"recipe {path} does not exist: give the path of a YAML file, or a name")
    if str(path_or_name) not in known:
        raise UserError(
            f"recipe {path_or_name} is unknown: {choice(path_or_name, known)}; for a file of your "
            "own give its path"
        )
    return known[str(path_or_name)]


# -- from values: what a recipe of another kind is read by too (fastffn.search.recipe) ------------


def parsed(path: Path, what: str = "recipe") -> tuple[Any, recipe_yaml.Places]:
    """The values of a file and their places.

    Raises:
        UserError: a file that cannot be read, or is no YAML.
    """
    try:
        return recipe_yaml.parse_file(path)
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read: {error.strerror}") from None


@contextlib.contextmanager
def placed(places: recipe_yaml.Places) -> Iterator[None]:
    """Within the block a RecipeError becomes the UserError that says where its value stands."""
    try:
        yield
    except RecipeError as error:
        raise UserError(f"{places.of(error.path)}: {error}") from None


def _recipe(values: Any, places: recipe_yaml.Places, overrides: Iterable[str], name: str) -> Recipe:
    with placed(places):
        values = with_names(values, places)
        for text in overrides:
            recipe_overrides.apply(values, places, text)
        check_set(values)
        return built(values, name)


def with_names(
    values: Any, places: recipe_yaml.Places, keys: Sequence[str] = ("stages",)
) -> dict[str, Any]:
    """A copy in which lists of stages are mappings by name, as paths and overrides want them."""
    if not isinstance(values, Mapping):
        raise RecipeError((), f"is no mapping: a recipe has keys such as teacher and {keys[-1]}")
    values = copy.deepcopy(dict(values))
    return values | {key: _by_name(values.get(key), key, places) for key in keys}


def _by_name(listed: Any, key: str, places: recipe_yaml.Places) -> dict[str, Any]:
    if not isinstance(listed, list | tuple) or not listed:
        are = "are" if key.endswith("s") else "is"
        raise RecipeError((key,), f"{are} missing: give a list of at least one")
    stages: dict[str, Any] = {}
    for index, stage in enumerate(listed):
        name = stage.get("name") if isinstance(stage, Mapping) else None
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise RecipeError((key, index), "needs a name of letters, digits, - and _")
        if name in stages:
            raise RecipeError((key, index), f"has the name {name} that another stage has")
        places.move((key, index), (key, name))
        stages[name] = dict(stage)
    return stages


def check_set(values: dict[str, Any], models: Iterable[str] = (), data: Iterable[str] = ()) -> None:
    """Refuses `???`, except in models and data that no enabled stage uses.

    `models` and `data` are names of those that something else than a stage uses.
    """
    models, data = _used(values, {*models}, {*data})
    used = {*map(model_path, models), *(("data", name) for name in data)}
    unset: list[tuple] = []

    def walk(value: Any, path: tuple) -> None:
        is_part = model_name(path) or (len(path) == 2 and path[0] == "data")
        if is_part and path not in used:
            return
        if isinstance(value, Mapping):
            for key, item in value.items():
                walk(item, (*path, key))
        elif value == UNSET:
            last = model_name(path) is not None  # a bare text: what to load
            unset.append((*path, "load") if last else path)

    walk(values, ())
    if unset:
        give = " ".join(f"{dotted(path)}={_GIVE.get(path[-1], 'VALUE')}" for path in unset)
        raise RecipeError(unset[0], f"{_and(unset[1:])} not set: give {give}".strip())


def _and(more: list[tuple]) -> str:
    """` is`, or `, b and c are`: what follows the first of several."""
    if not more:
        return "is"
    *middle, last = map(dotted, more)
    return f"{''.join(f', {name}' for name in middle)} and {last} are"


def _used(values: dict[str, Any], models: set[str], data: set[str]) -> tuple[set[str], set[str]]:
    """These and the models and data that enabled stages use, with the models that they are made
    from; values may still be of any type."""
    for stage in values["stages"].values():
        if isinstance(stage, Mapping) and stage.get("enabled") is not False:
            students = stage.get("student", "student")
            listed = students if isinstance(students, list) else [students]
            models |= {name for name in (*listed, stage.get("teacher", "teacher")) if _text(name)}
            data |= {name for name in (stage.get("data"),) if _text(name)}
    specs = _all_models(values)
    waiting = list(models)
    while waiting:
        spec = specs.get(waiting.pop())
        if isinstance(spec, Mapping):
            options = [spec.get("efficientbert"), spec.get("supernet")]
            parents = [spec.get("layers_of"), spec.get("like")]
            parents += [item.get("from") for item in options if isinstance(item, Mapping)]
            new = {name for name in parents if _text(name)} - models
            models |= new
            waiting += new
    return models, data


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _all_models(values: dict[str, Any]) -> dict[str, Any]:
    """All models' values by name, those without a value left out."""
    more = values.get("models") or {}
    if not isinstance(more, Mapping):
        raise RecipeError(("models",), f"is {more!r}: expected a mapping, names with models")
    for name in more:
        if name in TOP_MODELS:
            raise RecipeError(("models", name), f"has a key of its own: {name}")
    found = {name: values.get(name) for name in TOP_MODELS} | dict(more)
    return {name: spec for name, spec in found.items() if spec is not None}


def built(values: dict[str, Any], name: str, also: Iterable[str] = ()) -> Recipe:
    """The recipe of values whose stages are a mapping by name.

    `name` is for those without one, `also` are keys besides, for what an error says is known.
    """
    keys = [field.name for field in dataclasses.fields(Recipe)]
    for key in values:
        if key not in (*keys, *TOP_MODELS):
            raise RecipeError((key,), f"is unknown: {choice(key, (*TOP_MODELS, *keys, *also))}")
    models = {}
    for key, spec in _all_models(values).items():
        path = _named(key, model_path(key))
        models[key] = build(ModelSpec, {"load": spec} if _text(spec) else spec, path)
    listed = values.get("data")
    if not isinstance(listed, Mapping):
        raise RecipeError(("data",), "is missing: give a mapping, names with what to train on")
    data = {
        key: task_files.resolved(build(DataSpec, spec, _named(key, ("data", key))))
        for key, spec in listed.items()
        if spec is not None
    }
    stages = tuple(
        _stage(stage, ("stages", key), "teacher" in models)
        for key, stage in values["stages"].items()
        if stage is not None
    )
    rest = {key: item for key, item in values.items() if key in keys}
    rest = {"name": re.sub(r"[^A-Za-z0-9_-]+", "-", name)} | rest
    for key in ("models", "data", "stages"):
        rest.pop(key, None)
    return build(Recipe, rest, (), models=models, data=data, stages=stages)


def _named(name: str, path: tuple) -> tuple:
    if not _NAME.fullmatch(name):
        raise RecipeError(path, "is no name: use letters, digits, - and _ alone")
    return path


def _stage(values: dict[str, Any], path: tuple, has_teacher: bool) -> Stage:
    if not isinstance(values, Mapping):
        raise RecipeError(path, f"is {values!r}: expected a mapping, keys with values")
    values = {"name": path[-1]} | dict(values)
    if values["name"] != path[-1]:
        raise RecipeError((*path, "name"), f"is {values['name']!r}: a stage keeps its name")
    listed = values.pop("losses", None) or {}
    if not isinstance(listed, Mapping):
        raise RecipeError((*path, "losses"), f"is {listed!r}: expected a mapping, names to options")
    losses = {
        key: _loss(key, _named(key, (*path, "losses", key)), loss)
        for key, loss in listed.items()
        if loss is not None
    }
    stage = build(Stage, values, path, losses=losses)
    if "teacher" not in values and has_teacher and stage.needs_teacher:
        stage = dataclasses.replace(stage, teacher="teacher")
    return stage


def _loss(name: str, path: tuple, values: Any) -> Loss:
    if isinstance(values, int | float) and not isinstance(values, bool):
        values = {"weight": values}
    if not isinstance(values, Mapping):
        raise RecipeError(path, f"is {values!r}: expected options or a number, the weight")
    options = dict(values)
    kind = options.pop("kind", name)
    if not isinstance(kind, str) or kind not in TERMS:
        at = (*path, "kind") if "kind" in values else path
        what = f"is {kind!r}: " if "kind" in values else "is unknown: "
        raise RecipeError(at, f"{what}{choice(kind, TERMS)}")
    own = {key: options.pop(key) for key in ("weight",) if key in options}
    term = build(TERMS[kind], options, path, also=("kind", "weight"))
    return build(Loss, own, path, kind=kind, options=term)


# -- to values -----------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """Plain values; of a dataclass those fields that are not None."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {name: plain(item) for name, item in fields.items() if item is not None}
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def _stage_values(stage: Stage) -> dict[str, Any]:
    head = {"name": stage.name, "teacher": stage.teacher, "student": list(stage.student)}
    head |= {"data": stage.data, "losses": {}}
    for name, loss in stage.losses.items():
        options = plain(loss.options)
        head["losses"][name] = {"kind": loss.kind, "weight": loss.weight} | options
    return head | {key: item for key, item in plain(stage).items() if key not in head}
