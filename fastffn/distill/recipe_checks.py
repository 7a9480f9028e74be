"""Whether the parts of a recipe fit together. What a part can know alone, its dataclass checks."""

from collections.abc import Mapping, Sequence

from fastffn.data.catalogue import TASKS
from fastffn.distill.recipe_fields import RecipeError, choice
from fastffn.distill.recipe_parts import UNSET, DataSpec, ModelSpec, Stage, model_path


def check(
    models: Mapping[str, ModelSpec], data: Mapping[str, DataSpec], stages: Sequence[Stage]
) -> None:
    """Refuses what cannot be run; stages that are not enabled need no more than known names.

    Raises:
        RecipeError: the first thing that is wrong, with its path.
    """
    for name, spec in data.items():
        if isinstance(spec.task, str) and spec.task not in (*TASKS, UNSET):
            raise RecipeError(("data", name, "task"), f"is {spec.task}: {choice(spec.task, TASKS)}")
    names = [stage.name for stage in stages]
    for name in names:
        if names.count(name) > 1:
            raise RecipeError(("stages", name), "is there twice: rename one")
    if not any(stage.enabled for stage in stages):
        raise RecipeError(("stages",), "are all switched off: set enabled: true in one")
    _check_parents(models)
    trained: set[str] = set()
    for stage in stages:
        path = ("stages", stage.name)
        _check_names(stage, path, models, data)
        if stage.enabled:
            _check_losses(stage, path, data[stage.data])
            _check_teacher(stage, path, models, trained, stages)
            _check_students(stage, path, models)
            trained |= set(stage.student)


def _check_parents(models: Mapping[str, ModelSpec]) -> None:
    for name, spec in models.items():
        chain = [name]
        while spec.parent is not None:
            path = (*model_path(chain[-1]), *spec.parent_key)
            if spec.parent not in models:
                raise RecipeError(path, f"is {spec.parent}: {choice(spec.parent, models)}")
            chain.append(spec.parent)
            if spec.parent in chain[:-1]:
                raise RecipeError(path, f"makes a circle: {' from '.join(chain)}")
            spec = models[spec.parent]


def _check_names(stage: Stage, path: tuple, models: Mapping, data: Mapping) -> None:
    for name in stage.student:
        if name not in models:
            raise RecipeError((*path, "student"), f"is {name}: {choice(name, models)}")
    if stage.teacher is not None and stage.teacher not in models:
        said = f"is {stage.teacher}: {choice(stage.teacher, models)}"
        raise RecipeError((*path, "teacher"), said)
    if stage.data not in data:
        raise RecipeError((*path, "data"), f"is {stage.data}: {choice(stage.data, data)}")


def _check_losses(stage: Stage, path: tuple, data: DataSpec) -> None:
    for name, loss in stage.losses.items():
        if loss.options.needs_teacher and stage.teacher is None:
            raise RecipeError(
                (*path, "teacher"), f"is null, and the loss {name} needs one: name it"
            )
        if loss.options.needs_labels and data.task is None:
            said = f"needs a task, and {stage.data} is text: name data with a task"
            raise RecipeError((*path, "losses", name), said)


def _check_teacher(
    stage: Stage,
    path: tuple,
    models: Mapping[str, ModelSpec],
    trained: set[str],
    stages: Sequence[Stage],
) -> None:
    if stage.teacher is None:
        if stage.replacing is not None:
            raise RecipeError((*path, "teacher"), "is null, and replacing needs one: name it")
        return
    at = (*path, "teacher")
    if not stage.needs_teacher:
        raise RecipeError(at, "is not used by the losses: give null, or a loss that compares")
    if stage.teacher in stage.student:
        raise RecipeError(at, f"is {stage.teacher}, which the stage trains: name another model")
    if stage.teacher in trained:
        return
    loaded = models[stage.teacher].load is not None  # a later stage may train it on
    before = stages[: stages.index(stage)] if loaded else stages
    trains = [other.name for other in before if stage.teacher in other.student]
    if trains or not loaded:
        remedy = "name another teacher"
        if trains:
            remedy = f"enable stage {trains[0]}, or put it first, or name another teacher"
        said = f"is {stage.teacher}, which no enabled stage before has trained: {remedy}"
        raise RecipeError(at, said)


def _check_students(stage: Stage, path: tuple, models: Mapping[str, ModelSpec]) -> None:
    at = (*path, "student")
    for name in stage.student:
        if models[name].dtype != "float32":
            said = f"is {models[name].dtype}: what is trained is float32; see precision"
            raise RecipeError((*model_path(name), "dtype"), said)
    specs = [models[name] for name in stage.student]
    if stage.subnetworks is not None and any(s.supernet is None and s.load is None for s in specs):
        said = "needs a student that is a supernet: give it supernet, or leave this out"
        raise RecipeError((*path, "subnetworks"), said)
    if stage.replacing is None:
        return
    if len(stage.student) > 1:
        raise RecipeError(at, "has several models: one alone can replace a teacher's layers")
    student = models[stage.student[0]]
    if student.layers_of != stage.teacher:
        said = f"must be made of its teacher's layers to replace them: layers_of: {stage.teacher}"
        raise RecipeError(at, said)
