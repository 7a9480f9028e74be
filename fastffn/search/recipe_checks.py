"""Whether the parts of a search recipe fit together, before anything is loaded.

What a part can know alone, its dataclass checks; models, data and distillation stages among
themselves, `fastffn.distill.recipe_checks`. What only the models know (how wide a loaded supernet
is, whether the space has members) is checked where they are loaded.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..data.catalogue import TASKS
from ..distill.recipe_fields import RecipeError, choice
from ..errors import UserError
from ..evaluate.metrics import OF_KIND
from .merit import check_objectives
from .proposals import METHODS
from .space import Space

if TYPE_CHECKING:
    from ..distill.recipe import Recipe, Stage
    from .recipe import Score, SearchStage

_STUDENTS = ("supernet", "candidate")


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
    _check_space(space)
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
        _check_score(stage.score, distil, stages, (*path, "score"))
        _check_methods(stage, path)
    _check_used(stages, search)


def _check_space(space: Mapping[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(Space)]
    for key in space:
        if key not in known:
            raise RecipeError(("space", key), f"is unknown: {choice(key, known)}")


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
    score: "Score", distil: "Recipe", stages: Mapping[str, "Stage"], path: tuple
) -> None:
    if score.metric == "loss":
        if score.stage not in stages:
            raise RecipeError((*path, "stage"), f"is {score.stage}: {choice(score.stage, stages)}")
        return
    if score.data not in distil.data:
        raise RecipeError((*path, "data"), f"is {score.data}: {choice(score.data, distil.data)}")
    spec = distil.data[score.data]
    if spec.task is None:
        said = f"is {score.data}, which is text: name data with a task, or give stage for its loss"
        raise RecipeError((*path, "data"), said)
    known = metrics(spec.task)
    if score.metric not in known:
        said = f"is {score.metric}, which the task has not: {choice(score.metric, known)}"
        raise RecipeError((*path, "metric"), said)


def _check_methods(stage: "SearchStage", path: tuple) -> None:
    try:
        check_objectives(stage.objectives)
    except UserError as error:
        raise RecipeError((*path, "objectives"), f": {error}") from None
    method, at = stage.proposals, (*path, "proposals")
    if not isinstance(method, str):
        if "method" not in method:
            raise RecipeError(at, f"has no method: give one of {', '.join(METHODS)}")
        method, at = method["method"], (*at, "method")
    if method not in METHODS:
        raise RecipeError(at, f"is {method}: {choice(method, METHODS)}")


def _check_used(stages: Mapping[str, "Stage"], search: Sequence["SearchStage"]) -> None:
    used = {name for stage in search for name in (*stage.supernet, *stage.train)}
    used |= {stage.score.stage for stage in search}
    for name in stages:
        if name not in used:
            said = "is used by no stage of the search: name it in supernet or train of one, or "
            raise RecipeError(("stages", name), f"{said}remove it")
