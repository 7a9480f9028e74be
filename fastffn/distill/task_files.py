"""A task of one's own in a YAML file, which recipes and `fastffn evaluate` name by its path.

    kind: classification
    texts: [text]
    label: label
    train: train.csv          # paths begin where the file lies
    validation: dev.csv

A recipe keeps what stands there rather than the path: a run says what it was trained on, and is not
resumed on something else.
"""

import dataclasses
from pathlib import Path
from typing import Any

from fastffn.distill import recipe_yaml
from fastffn.distill.recipe_parts import DataSpec
from fastffn.errors import UserError


def is_task_file(task: object) -> bool:
    """Whether a task's name is the path of a file."""
    return isinstance(task, str) and task.endswith((".yaml", ".yml"))


def read(path: str | Path) -> tuple[dict[str, Any], Path]:
    """The description of a task, named after its file unless it has a name, and the file's folder.

    Raises:
        UserError: no such file, or it is no mapping.
    """
    path = Path(path)
    try:
        values, _ = recipe_yaml.parse_file(path)
    except OSError as error:
        raise UserError(f"task {path} cannot be read: {error.strerror}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is no task: it has keys such as kind, texts, label, validation")
    return {"name": path.stem, **values}, path.parent


def resolved(spec: DataSpec) -> DataSpec:
    """The same data, with a task's description in place of its file."""
    if not is_task_file(spec.task):
        return spec
    task, folder = read(spec.task)
    return dataclasses.replace(spec, task=task, dir=spec.dir or str(folder))
