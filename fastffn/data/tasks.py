"""Supervised data: a known task by name or the user's own by a mapping, from files or the hub.

    data = load_task("mrpc", "/data/glue")         # or below FASTFFN_DATA, or from the hub
    data.task.labels                               # ("not_equivalent", "equivalent")
    data.splits["train"].first, .second, .labels   # lists of equal length

Everything that training would stumble over is checked here, before any model is loaded: an empty
split, a label that is missing, unknown or out of range, a column that is not there. Files are read
without the library `datasets`, which a machine for training may lack; it serves the hub alone.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fastffn.data.catalogue import TASKS, Layout, Part, Task
from fastffn.data.hub import hub_split
from fastffn.data.qa import QaExamples, read_squad, squad_examples
from fastffn.data.tables import column_names, read_table
from fastffn.errors import UserError

__all__ = ["TASKS", "Examples", "QaExamples", "Task", "TaskData", "load_task"]


@dataclass(frozen=True)
class Examples:
    """Labelled sentences or pairs; lists of equal length.

    Attributes:
        first, second: the texts; second is None where the task has one.
        labels: classes from 0 as int, or scores as float.
    """

    first: list[str]
    second: list[str] | None
    labels: list[int] | list[float]

    def __len__(self) -> int:
        return len(self.first)

    def take(self, numbers: Sequence[int]) -> "Examples":
        """The examples of these numbers, in this order."""
        return Examples(
            [self.first[k] for k in numbers],
            None if self.second is None else [self.second[k] for k in numbers],
            [self.labels[k] for k in numbers],
        )


@dataclass(frozen=True)
class TaskData:
    """A task and its examples by split.

    Attributes:
        task: with the names of its classes, also where they had to be found in the data.
        splits: name -> Examples, or QaExamples of a qa task.
        origin: split -> where it was read, for reports.
    """

    task: Task
    splits: dict[str, Examples | QaExamples]
    origin: dict[str, str] = field(default_factory=dict)


def load_task(
    task: str | Mapping,
    directory: str | Path | None = None,
    splits: Sequence[str] = ("train", "validation"),
    limit: Mapping[str, int] | int | None = None,
    seed: int = 0,
) -> TaskData:
    """Loads a task's splits and checks them.

    Args:
        task: a name in TASKS, or the user's own as a mapping: name; kind (classification,
            regression or qa); texts: one or two columns; label: a column; labels: the classes in
            order (else as found); metrics; range: [least, largest]; and either a file or list of
            files for each split (train, validation, ...) or hub: data set or [data set,
            configuration]. Files of qa are SQuAD's json.
        directory: a known task's folder, or the folder above it; None: FASTFFN_DATA, and the hub
            for what is not there. Of an own task, where its files' paths begin (None: here).
        splits: which to load.
        limit: at most so many rows of a split, a random but repeatable choice in the files'
            order; smaller limits choose among the larger ones' rows. A number is of "train".
        seed: of that choice.

    Raises:
        UserError: an unknown task or split, no data, a table that cannot be read, or examples that
            cannot be trained on.
    """
    if isinstance(task, str):
        if task not in TASKS:
            raise UserError(f"task {task!r} is unknown: choose from {', '.join(TASKS)}")
        task, files = TASKS[task], None
    else:
        task, files = _own_task(task)
    limits = {"train": limit} if isinstance(limit, int) else dict(limit or {})
    for split, number in limits.items():
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise UserError(f"task {task.name}: limit {number!r} of {split} is no positive number")
    source = _source(task, files, None if directory is None else Path(directory), splits)

    loaded: dict[str, Examples | QaExamples] = {}
    origin: dict[str, str] = {}
    for split in splits:
        rows, origin[split] = source(split)
        where = f"task {task.name}, split {split}"
        if not len(rows):
            raise UserError(f"{where} is empty: {origin[split]} holds no examples")
        if task.kind == "qa":
            examples = rows
        else:
            examples, task = _examples(task, rows, where)
        loaded[split] = _limited(examples, limits.get(split), seed)
    return TaskData(task, loaded, origin)


def _limited(examples, limit: int | None, seed: int):
    if limit is None or limit >= len(examples):
        return examples
    order = np.random.default_rng(seed).permutation(len(examples))
    return examples.take(sorted(order[:limit].tolist()))


# -- where the data are ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rows:
    """Raw values of a split: columns by the task's names, and where each row came from."""

    columns: dict[str, list]
    place: Callable[[int], str]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))


_Source = Callable[[str], tuple[_Rows | QaExamples, str]]


def _source(
    task: Task, files: Layout | None, directory: Path | None, splits: Sequence[str]
) -> _Source:
    """A function that reads a split; what is not there is said before anything is read."""
    if files is not None and files.splits:
        folder = directory or Path()
        for split in splits:
            if split not in files.splits:
                raise UserError(
                    f"task {task.name} has no files of split {split}: give {split}: FILE"
                )
        return lambda split: _read_split(task, folder, files, split)
    if files is not None:
        return lambda split: _from_hub(task, split)
    ours = os.environ.get("FASTFFN_DATA")
    if directory is None and not ours:
        if task.hub is not None:
            return lambda split: _from_hub(task, split)
        raise UserError(
            f"task {task.name} has no data: give the folder of its files, or set FASTFFN_DATA to "
            "the folder of all data sets"
        )
    try:
        folder, layout = _find(task, Path(ours) if directory is None else directory, splits)
    except _NoFiles:
        if directory is not None or task.hub is None:
            raise
        return lambda split: _from_hub(task, split)
    return lambda split: _read_split(task, folder, layout, split)


class _NoFiles(UserError):
    """A folder that holds nothing of a task."""


def _find(task: Task, directory: Path, splits: Sequence[str]) -> tuple[Path, Layout]:
    """The folder and the layout that hold a known task's splits, by files and columns.

    Layouts are compared by their training and validation files even where one of them is asked
    for: what is validation must not depend on whether training rows are loaded with it.
    """
    if not directory.is_dir():
        raise UserError(f"task {task.name}: folder {directory} does not exist")
    folders = [directory / name for name in task.folders if (directory / name).is_dir()]
    folders.append(directory)
    nearest = None
    for needed in ({"train", "validation", *splits}, {"validation", *splits}, set(splits)):
        for folder in folders:
            for layout in task.layouts:
                parts = [part for split in needed for part in layout.splits.get(split, ())]
                if not needed <= layout.splits.keys() or not all(
                    (folder / part.file).is_file() for part in parts
                ):
                    continue
                problem = next(filter(None, (_lacks(task, folder, layout, p) for p in parts)), None)
                if problem is None:
                    return folder, layout
                nearest = problem
    if nearest is not None:
        raise UserError(f"task {task.name}: {nearest}")
    known = {split for layout in task.layouts for split in layout.splits}
    for split in splits:
        if split not in known:
            raise UserError(
                f"task {task.name} has no split {split}: choose from {', '.join(sorted(known))}"
            )
    looked = [
        " + ".join(dict.fromkeys(p.file for s in splits for p in layout.splits.get(s, ())))
        for layout in task.layouts
    ]
    raise _NoFiles(
        f"task {task.name}: neither {directory} nor a folder {' or '.join(task.folders)} in it "
        f"holds {' or '.join(dict.fromkeys(looked))}"
    )


def _lacks(task: Task, folder: Path, layout: Layout, part: Part) -> str | None:
    """What a file lacks of the task's columns, told by its header."""
    if task.kind == "qa" or part.names is not None:
        return None
    there = column_names(folder / part.file)
    for name in (*task.texts, task.label):
        if (column := layout.columns.get(name, name)) not in there:
            return f"{folder / part.file} has no column {column}: it has {', '.join(there)}"
    return None


def _read_split(task: Task, folder: Path, layout: Layout, split: str):
    parts = layout.splits[split]
    origin = " + ".join(str(folder / part.file) for part in parts)
    if task.kind == "qa":
        return read_squad([(folder / part.file, part.articles) for part in parts]), origin
    named = {name: layout.columns.get(name, name) for name in (*task.texts, task.label)}
    tables = [
        read_table(folder / part.file, [*named.values()], names=part.names, ragged=part.ragged)
        for part in parts
    ]
    columns = {
        name: [value for table in tables for value in table.columns[column]]
        for name, column in named.items()
    }

    def place(row: int) -> str:
        for table in tables:
            if row < len(table):
                return table.place(row)
            row -= len(table)
        raise IndexError(row)

    return _Rows(columns, place), origin


def _from_hub(task: Task, split: str):
    name = task.hub_splits.get(split, split)
    if task.kind == "qa":
        columns, origin = hub_split(*task.hub, name, ("id", "question", "context", "answers"))
        return squad_examples(columns), origin
    columns, origin = hub_split(*task.hub, name, (*task.texts, task.label))
    return _Rows(columns, lambda row: f"{origin}, row {row}"), origin


# -- what the data hold ------------------------------------------------------------------------


def _examples(task: Task, rows: _Rows, where: str) -> tuple[Examples, Task]:
    texts = []
    for name in task.texts:
        for row, text in enumerate(rows.columns[name]):
            if not isinstance(text, str):
                raise UserError(f"{where}: {rows.place(row)}: {name} is no text but {text!r}")
        texts.append(list(rows.columns[name]))
    values = rows.columns[task.label]
    for row, value in enumerate(values):
        hidden = task.kind == "classification" and value == -1  # so the hub writes it
        if value is None or value == "" or hidden:
            raise UserError(
                f"{where}: {rows.place(row)} has no label: mend it, or choose a labelled split"
            )
    if task.kind == "regression":
        labels = [_score(task, value, where, rows, row) for row, value in enumerate(values)]
    else:
        if task.labels is None:
            task = dataclasses.replace(task, labels=_found(values, where))
        classes = {name: number for number, name in enumerate(task.labels)}
        labels = [_class(classes, value, where, rows, row) for row, value in enumerate(values)]
    return Examples(texts[0], texts[1] if len(texts) == 2 else None, labels), task


def _score(task: Task, value: object, where: str, rows: _Rows, row: int) -> float:
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise UserError(f"{where}: {rows.place(row)}: label {value!r} is no number")
    if task.range is not None and not task.range[0] <= score <= task.range[1]:
        raise UserError(
            f"{where}: {rows.place(row)}: label {value} is not between "
            f"{task.range[0]:g} and {task.range[1]:g}"
        )
    return score


def _class(classes: dict[str, int], value: object, where: str, rows: _Rows, row: int) -> int:
    """A class by name, or by number where no name is that number."""
    if (name := _name(value)) in classes:
        return classes[name]
    if name.isdecimal() and not any(known.isdecimal() for known in classes):
        if int(name) < len(classes):
            return int(name)
        raise UserError(
            f"{where}: {rows.place(row)}: label {value!r} is out of range: there are "
            f"{len(classes)} classes, 0 to {len(classes) - 1}"
        )
    names = list(classes)
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    raise UserError(f"{where}: {rows.place(row)}: label {value!r} is unknown: classes are {shown}")


def _name(value: object) -> str:
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _found(values: list, where: str) -> tuple[str, ...]:
    """The classes of a task that does not name them: numbers in their order, or else sorted."""
    names = {_name(value) for value in values}
    if len(names) < 2:
        raise UserError(f"{where} has labels of one class only: two are needed; or give labels")
    numeric = all(name.isdecimal() for name in names)
    return tuple(sorted(names, key=int if numeric else None))


# -- the user's own tasks ----------------------------------------------------------------------

_SPLITS = ("train", "validation", "test")
_OPTIONS = ("name", "kind", "texts", "label", "labels", "metrics", "range", "hub")


def _own_task(given: Mapping) -> tuple[Task, Layout]:
    name = str(given.get("name", "own"))
    for key in given:
        if key not in (*_OPTIONS, *_SPLITS):
            raise UserError(
                f"task {name}: {key} is unknown: known are {', '.join((*_OPTIONS, *_SPLITS))}"
            )
    values = {
        key: _several(given[key], name, key)
        for key in ("texts", "labels", "metrics")
        if given.get(key) is not None
    }
    for key in ("kind", "label"):
        if given.get(key) is not None:
            values[key] = str(given[key])
    if values.get("kind") == "qa":
        values |= {"texts": ("question", "context"), "label": "answers"}
    if (limits := given.get("range")) is not None:
        try:
            least, largest = (float(value) for value in limits)
        except (TypeError, ValueError):
            raise UserError(f"task {name}: range {limits!r} is not [least, largest]") from None
        values["range"] = (least, largest)
    if (hub := given.get("hub")) is not None:
        parts = _several(hub, name, "hub")
        if len(parts) > 2:
            raise UserError(f"task {name}: hub is a data set, or [data set, configuration]")
        if len(parts) == 1 and parts[0].count("/") == 2:
            parts = tuple(parts[0].rsplit("/", 1))
        values["hub"] = (parts[0], parts[1] if len(parts) == 2 else None)
    splits = {
        split: tuple(Part(file) for file in _several(given[split], name, split))
        for split in _SPLITS
        if given.get(split) is not None
    }
    if bool(splits) == ("hub" in values):
        raise UserError(f"task {name}: give either files (train, validation) or hub")
    return Task(name, **values), Layout(splits)


def _several(value: object, name: str, key: str) -> tuple[str, ...]:
    values = [value] if isinstance(value, (str, Path)) else value
    if not isinstance(values, Sequence) or not values:
        raise UserError(f"task {name}: {key} {value!r} is neither a name nor a list of names")
    return tuple(_name(entry) for entry in values)
