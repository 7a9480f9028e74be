"""Whether the parts of a search recipe fit together, before anything is loaded.

What a part can know alone, its dataclass checks; models, data and distillation stages among
themselves, `fastffn.distill.recipe_checks`. What only the models know (how wide a loaded supernet
is, whether the space has members) is checked where they are loaded.
"""

import dataclasses
import glob
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.catalogue import TASKS
from ..distill.recipe_fields import RecipeError, choice
from ..errors import UserError
from ..evaluate.metrics import OF_KIND
from .merit import check_objectives
from .proposals import described
from .space import Space

if TYPE_CHECKING:
    from ..distill.recipe import DataSpec, ModelSpec, Recipe, Stage
    from .recipe import SearchStage

_STUDENTS = ("supernet", "candidate")
_SOME_WIDTH = 768  # stands for a hidden size that only the model knows


def metrics(task: object) -> tuple[str, ...]:
    """The metrics that a task of a recipe's data has, its first one first; () if it is unknown."""
    if isinstance(task, Mapping):
        given = task.get("metrics")
        given = [given] if isinstance(given, str) else given
        return tuple(given or OF_KIND.get(task.get("kind", "classification"), ())[:1])
    return TASKS[task].metrics if isinstance(task, str) and task in TASKS else ()


def check(distil: "Recipe", space: Mapping[str, Any], search: Sequence["SearchStage"]) -> None:
    """Refuses what cannot be run.

    Raises:
        RecipeError: the first thing that is wrong, with its path.
    """
    supernet = distil.models.get("supernet")
    if supernet is None or (supernet.supernet is None and supernet.load is None):
        raise RecipeError(
            ("models", "supernet"),
            "is no supernet: give it supernet: {max_stack: ..., max_width: ...}, or load: the "
            "directory of one",
        )
    _check_space(space, supernet)
    _check_students(distil.stages)
    if not search:
        raise RecipeError(("search",), "is empty: give at least one stage")
    stages = {stage.name: stage for stage in distil.stages}
    trained = supernet.load is not None
    for index, stage in enumerate(search):
        path = ("search", stage.name)
        if [other.name for other in search].count(stage.name) > 1:
            raise RecipeError(path, "is there twice: rename one")
        if stage.freeze is not None and index == 0:
            said = f"is {stage.freeze}, of a winner, and the first stage has none: leave it out"
            raise RecipeError((*path, "freeze"), said)
        for key, student in (("supernet", "supernet"), ("train", "candidate")):
            _check_named(getattr(stage, key), stages, student, (*path, key))
        trained = trained or bool(stage.supernet)
        if not stage.train and not trained:
            said = "is empty, and nothing has trained the supernet before: name stages in one of"
            raise RecipeError((*path, "train"), f"{said} train and supernet")
        _check_score(stage, distil, stages, (*path, "score"))
        _check_methods(stage, path)
    _check_used(stages, search)
    _check_held_out(distil, stages, search)


def _check_held_out(
    distil: "Recipe", stages: Mapping[str, "Stage"], search: Sequence["SearchStage"]
) -> None:
    """Rows that judge are those of one name: under another they would be trained on."""
    rows: dict[str, int] = {}
    supernet: set[str] = set()  # data that have trained it so far
    for stage in search:
        name = stage.score.data or stages[stage.score.stage].data
        at = ("search", stage.name, "score")
        if rows.setdefault(name, stage.score.rows) != stage.score.rows:
            said = f"is {stage.score.rows}, and another stage holds out {rows[name]} of {name}"
            raise RecipeError((*at, "rows"), f"{said}: give the same, or the data another name")
        supernet |= {stages[each].data for each in stage.supernet}
        for other in sorted(supernet | {stages[each].data for each in stage.train}):
            if other != name and _same_source(distil.data[name], distil.data[other]):
                said = f"holds out rows of {name}, which {other} has too: train on {name}"
                raise RecipeError(at, said)


def _same_source(one: "DataSpec", other: "DataSpec") -> bool:
    """Whether both read the same files, however these are written, or the same task."""
    return bool(_sources(one) & _sources(other))


def _sources(spec: "DataSpec") -> set[str]:
    folder = Path(spec.dir or "")
    patterns = list(spec.text or ())
    if isinstance(spec.task, Mapping):
        patterns = [str(folder / str(spec.task[key])) for key in ("train",) if key in spec.task]
    elif spec.task is not None:
        return {f"task {spec.task}"}
    found = (glob.glob(pattern, recursive=True) or [pattern] for pattern in patterns)
    return {str(Path(path).resolve()) for paths in found for path in paths}


def _check_space(values: Mapping[str, Any], supernet: "ModelSpec") -> None:
    """Checks the values as far as the recipe says what the supernet is like."""
    known = [field.name for field in dataclasses.fields(Space)]
    for key in values:
        if key not in known:
            raise RecipeError(("space", key), f"is unknown: {choice(key, known)}")
    options = dict(supernet.supernet or {})
    if isinstance(options.get("layers"), list):
        options["layers"] = len(options["layers"])
    options = {name: value for name, value in options.items() if isinstance(value, int)}
    layers = options.get("num_hidden_layers", options.get("layers"))
    layers = values.get("num_layers", layers)
    if layers is None:
        return
    hidden = values.get("hidden_size", options.get("hidden_size"))
    size = {"num_layers": layers, "base": values.get("base", options.get("ffn_base", 1))}
    size["hidden_size"] = _SOME_WIDTH if hidden is None else hidden
    space = Space.from_dict({**values, **size})
    if hidden is None:
        options.pop("max_width", None)
    if supernet.supernet is not None:
        check_fits(space, options)


def check_fits(space: Space, size: Mapping[str, Any]) -> None:
    """Refuses a space with what a supernet does not hold.

    Args:
        size: of the supernet: max_stack, max_width, gated; a limit that is absent is not checked.

    Raises:
        RecipeError: the first stack, ratio or gate that does not fit, with its path.
    """
    size = {"gated": False, **size}
    for layer, rules in enumerate(space.rules):
        stack, ratio = max(rules.stacks), max(rules.ratios)
        width = int(ratio * space.base * space.hidden_size)
        for key, said, name, needed in (
            ("stacks", f"goes to {stack}", "max_stack", stack),
            ("ratios", f"goes to {ratio}, {width} columns", "max_width", width),
            ("gated", "is true", "gated", rules.gated),
        ):
            if name not in size or needed <= size[name]:
                continue
            own = ("layers", str(layer)) if key in space.layers.get(layer, {}) else ()
            has = f"the supernet's {name} is {_yaml(size[name])}: change this, or that to"
            raise RecipeError(("space", *own, key), f"{said}, and {has} {_yaml(needed)}")


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _check_students(stages: Sequence["Stage"]) -> None:
    for stage in stages:
        path = ("stages", stage.name)
        if not stage.enabled:
            said = "is false: the stages of the search say which run; leave this out"
            raise RecipeError((*path, "enabled"), said)
        if len(stage.student) != 1 or stage.student[0] not in _STUDENTS:
            said = f"is {', '.join(stage.student)}: a search trains {' or '.join(_STUDENTS)}"
            raise RecipeError((*path, "student"), said)


def _check_named(
    names: Sequence[str], stages: Mapping[str, "Stage"], student: str, path: tuple
) -> None:
    for name in names:
        if name not in stages:
            raise RecipeError(path, f"names {name}: {choice(name, stages)}")
        if stages[name].student != (student,):
            said = f"names {name}, whose student is {stages[name].student[0]}: it must be {student}"
            raise RecipeError(path, said)


def _check_score(
    stage: "SearchStage", distil: "Recipe", stages: Mapping[str, "Stage"], path: tuple
) -> None:
    score = stage.score
    if score.metric == "loss":
        at, name = (*path, "stage"), score.stage
        if name not in stages:
            raise RecipeError(at, f"is {name}: {choice(name, stages)}")
        _check_rows(distil.data[stages[name].data].task, at)
        return
    at = (*path, "data")
    if score.data not in distil.data:
        raise RecipeError(at, f"is {score.data}: {choice(score.data, distil.data)}")
    task = distil.data[score.data].task
    if task is None:
        said = f"is {score.data}, which is text: name data with a task, or give stage for its loss"
        raise RecipeError(at, said)
    _check_rows(task, at)
    known = metrics(task)
    if score.metric not in known:
        said = f"is {score.metric}, which the task has not: {choice(score.metric, known)}"
        raise RecipeError((*path, "metric"), said)


def _check_rows(task: object, path: tuple) -> None:
    """Refuses questions: windows of one context overlap, so that none can be held out."""
    known = TASKS.get(task) if isinstance(task, str) else None
    kind = task.get("kind") if isinstance(task, Mapping) else known and known.kind
    if kind == "qa":
        said = "is a task of questions, of which no rows can be held out: name other data"
        raise RecipeError(path, said)


def _check_methods(stage: "SearchStage", path: tuple) -> None:
    try:
        check_objectives(stage.objectives)
    except UserError as error:
        raise RecipeError((*path, "objectives"), f": {error}") from None
    try:
        described(stage.proposals)
    except UserError as error:
        raise RecipeError((*path, "proposals"), f": {error}") from None


def _check_used(stages: Mapping[str, "Stage"], search: Sequence["SearchStage"]) -> None:
    used = {name for stage in search for name in (*stage.supernet, *stage.train)}
    used |= {stage.score.stage for stage in search}
    for name in stages:
        if name not in used:
            said = "is used by no stage of the search: name it in supernet or train of one, or "
            raise RecipeError(("stages", name), f"{said}remove it")
