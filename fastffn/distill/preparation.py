"""Loads what a recipe names and checks that it fits together, before anything is trained.

Data are read and turned into token ids, models are loaded or built with the heads that their tasks
need, and every loss of every stage is bound to the sizes of its models: a mistake in the last stage
is told before the first one has cost a day.

Students are trained in place. What a later stage takes as a teacher is the same object.
"""

import contextlib
import glob
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fastffn.data.encode import Encoded, encode_task, encode_text, tokenizer_digest
from fastffn.data.tasks import TaskData, load_task
from fastffn.data.text import read_documents
from fastffn.distill.heads import Head
from fastffn.distill.reading import LOGITS
from fastffn.distill.recipe import DataSpec, Recipe, Stage
from fastffn.distill.replacing import Replacing
from fastffn.distill.stage_module import StageModule, sizes
from fastffn.distill.students import (
    build_student,
    check_positions,
    check_vocabulary,
    load_model,
    same_tokenizer,
)
from fastffn.distill.subnetworks import Sandwich
from fastffn.errors import UserError

HELD_OUT = "held_out"  # split of a task
_NO_HEAD = Head("none")
Progress = Callable[[str, float, float, str], None]


def _silent(phase: str, done: float, total: float, text: str) -> None:
    pass


@dataclass(frozen=True)
class Data:
    """One of a recipe's data.

    Attributes:
        train: what is trained on.
        validation: what a task is judged on; None for text.
        task: the task's data, None for text.
        held_out: training rows that are not trained on, the split HELD_OUT of a task; None: none.
    """

    train: Encoded
    validation: Encoded | None = None
    task: TaskData | None = None
    held_out: Encoded | None = None

    @property
    def fingerprint(self) -> str:
        parts = (self.train, self.validation, self.held_out)
        parts = [part.fingerprint for part in parts if part is not None]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()


@dataclass
class Prepared:
    """Everything that a recipe's stages use, by the recipe's names.

    Attributes:
        models: in evaluation mode, on the CPU.
        tokenizers: of the models.
        origins: where models that were loaded came from.
        fresh: parameters of loaded models that are random: heads that their files lack.
        heads: that the models have; none for those that are not named.
        data: what the enabled stages train on.
    """

    recipe: Recipe
    models: dict[str, nn.Module] = field(default_factory=dict)
    tokenizers: dict[str, object] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    fresh: dict[str, tuple[str, ...]] = field(default_factory=dict)
    heads: dict[str, Head] = field(default_factory=dict)
    data: dict[str, Data] = field(default_factory=dict)

    def rebuild(self, number: int) -> None:
        """Makes those models of a stage anew whose origins an earlier stage has trained."""
        stages = self.recipe.enabled
        trained = {name for stage in stages[:number] for name in stage.student}
        used = {*stages[number].student, stages[number].teacher} - {None}
        used |= {origin for name in used for origin in origins(self.recipe, name)}
        for name in _order(self.recipe):
            if name in used and name not in trained and trained & set(origins(self.recipe, name)):
                self.build(name)

    def build(self, name: str) -> None:
        """Makes a model from those that are there."""
        spec, head = self.recipe.models[name], self.heads.get(name, _NO_HEAD)
        seed = int.from_bytes(hashlib.sha256(f"{self.recipe.seed} {name}".encode()).digest()[:4])
        self.models[name] = build_student(spec, self.models, head, seed)

    def steps(self, stage: Stage) -> int:
        """Optimiser steps of a stage."""
        if stage.steps is not None:
            return stage.steps
        rows = len(self.data[stage.data].train)
        return max(1, round(stage.epochs * max(1, rows // stage.batch_size)))

    def module(self, stage: Stage, number: int) -> StageModule:
        """What a stage trains, with new projections; a function of the recipe alone.

        Raises:
            UserError: models and losses that do not fit.
        """
        students = {name: self.models[name] for name in stage.student}
        teacher = self.models[stage.teacher] if stage.teacher else None
        theirs = None if teacher is None else sizes(teacher)
        seed = stage_seed(self.recipe, number)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            terms = {
                name: {
                    loss: spec.options.build(sizes(student), theirs)
                    for loss, spec in stage.losses.items()
                }
                for name, student in students.items()
            }
        first = next(iter(students.values()))
        for what in ("replacing", "subnetworks"):
            if getattr(stage, what) is not None and len(students) > 1:
                raise UserError(f"{what} is for one student, not {len(students)}")
        replacing = sandwich = None
        if stage.replacing is not None:
            steps = self.steps(stage)
            replacing = Replacing(first, teacher, stage.replacing, steps, seed)
        if stage.subnetworks is not None:
            sandwich = Sandwich(first, stage.subnetworks, seed, stage.depths, stage.ratios)
        return StageModule(students, terms, replacing, sandwich)


def stage_seed(recipe: Recipe, number: int) -> int:
    """Of what is drawn by chance in a stage: none repeats another's."""
    return recipe.seed * 1000 + number


def prepare(recipe: Recipe, progress: Progress = _silent) -> Prepared:
    """Loads and checks all that the enabled stages need.

    Args:
        progress: called as progress(phase, done, total, text) while text is encoded.

    Raises:
        UserError: the first thing that does not fit, with the stage's or model's name.
    """
    made = Prepared(recipe)
    stages = recipe.enabled
    tasks = _tasks(recipe)
    made.heads = _heads(recipe, tasks)
    for name in _order(recipe):
        _make(made, name)
    for stage in stages:
        names = [*stage.student, *([stage.teacher] if stage.teacher else [])]
        _check_tokenizers(made, stage, names)
        spec = recipe.data[stage.data]
        for name in names:
            with _naming(f"data.{stage.data} of stages.{stage.name}"):
                check_positions(made.models[name], spec.max_length)
        known = made.data.get(stage.data)
        if known and known.train.tokenizer != tokenizer_digest(made.tokenizers[names[0]]):
            raise UserError(
                f"stages.{stage.name}: {stage.data} is in the tokens of another stage's models: "
                "give data of models with another tokenizer a name of their own"
            )
        if known is None:
            with _naming(f"data.{stage.data}"):
                tokenizer = made.tokenizers[names[0]]
                made.data[stage.data] = _data(
                    recipe,
                    spec,
                    tasks.get(stage.data),
                    tokenizer,
                    lambda done, total, name=stage.data: progress(f"data {name}", done, total, ""),
                )
    for number, stage in enumerate(stages):
        with _naming(f"stages.{stage.name}"):
            module = made.module(stage, number)
            reads = set(module.teacher_reads)
            if (LOGITS in reads or stage.replacing) and not _trained_before(recipe, stage):
                _check_head(made, stage.teacher)
    return made


def _tasks(recipe: Recipe) -> dict[str, TaskData]:
    """The tasks that enabled stages train on."""
    tasks = {}
    for stage in recipe.enabled:
        spec = recipe.data[stage.data]
        if spec.task is not None and stage.data not in tasks:
            limit = None if spec.limit is None else {"train": spec.limit}
            with _naming(f"data.{stage.data}"):
                tasks[stage.data] = load_task(spec.task, spec.dir, limit=limit, seed=recipe.seed)
    return tasks


def _heads(recipe: Recipe, tasks: Mapping[str, TaskData]) -> dict[str, Head]:
    """The head that each model needs: that of the task of a stage it takes part in."""
    heads: dict[str, Head] = {}
    for stage in recipe.enabled:
        if stage.data not in tasks:
            continue
        task = tasks[stage.data].task
        head = Head(task.kind, task.labels or ())
        for name in {*stage.student, stage.teacher} - {None}:
            if heads.setdefault(name, head) != head:
                raise UserError(
                    f"stages.{stage.name}: {name} is used for two tasks with different heads: give "
                    "each task a model of its own"
                )
    # What a model is made from may hand its head on.
    for name in reversed(_order(recipe)):
        parent = recipe.models[name].parent
        if parent and name in heads:
            heads.setdefault(parent, heads[name])
    return heads


def _order(recipe: Recipe) -> list[str]:
    """Models that enabled stages use, parents first."""
    order: list[str] = []

    def visit(name: str) -> None:
        if name in order:
            return
        if parent := recipe.models[name].parent:
            visit(parent)
        order.append(name)

    for stage in recipe.enabled:
        for name in (stage.teacher, *stage.student):
            if name:
                visit(name)
    return order


def origins(recipe: Recipe, name: str) -> list[str]:
    """What a model is made from, and what that is made from, and so on."""
    found = []
    while (name := recipe.models[name].parent) is not None:
        found.append(name)
    return found


def _make(made: Prepared, name: str) -> None:
    spec, head = made.recipe.models[name], made.heads.get(name, _NO_HEAD)
    with _naming(f"models.{name}" if name not in ("teacher", "student") else name):
        if spec.load is not None:
            role = "student" if any(name in s.student for s in made.recipe.enabled) else "teacher"
            loaded = load_model(spec.load, head, spec.dtype, role, made.recipe.seed)
            made.models[name], made.tokenizers[name] = loaded.model, loaded.tokenizer
            made.origins[name], made.fresh[name] = loaded.origin, loaded.fresh
            return
        made.build(name)
        tokenizer = made.tokenizers.get(spec.parent) or next(iter(made.tokenizers.values()), None)
        if tokenizer is None:
            raise UserError("has no tokenizer: make it from a model that is loaded")
        check_vocabulary(made.models[name], tokenizer)
        made.tokenizers[name] = tokenizer


def _data(
    recipe: Recipe,
    spec: DataSpec,
    task: TaskData | None,
    tokenizer,
    progress: Callable[[int, int], None],
) -> Data:
    if task is not None:
        parts = {
            split: encode_task(
                tokenizer, task.splits[split], task.task, spec.max_length, train=split == "train"
            )
            for split in ("train", "validation")
        }
        return _held_out(Data(parts["train"], parts["validation"], task), spec, recipe.seed)
    paths = [path for pattern in spec.text for path in _paths(pattern)]
    documents = read_documents(paths)
    encoded = encode_text(tokenizer, documents, spec.max_length, progress)
    if spec.limit is not None and spec.limit < len(encoded):
        order = np.random.default_rng(recipe.seed).permutation(len(encoded))
        encoded = encoded.take(np.sort(order[: spec.limit]))
    return _held_out(Data(encoded), spec, recipe.seed)


def _held_out(data: Data, spec: DataSpec, seed: int) -> Data:
    """The data with some of the training rows apart."""
    if not spec.hold_out:
        return data
    rows = len(data.train)
    if data.train.kind == "qa":
        raise UserError("hold_out: windows of questions overlap: give text, or another task")
    if spec.hold_out >= rows:
        raise UserError(
            f"hold_out {spec.hold_out} leaves none of the {rows} rows to train on: make it smaller"
        )
    order = np.random.default_rng((seed, rows)).permutation(rows)
    apart, rest = np.sort(order[: spec.hold_out]), np.sort(order[spec.hold_out :])
    task = data.task
    if task is not None:
        train = task.splits["train"]
        splits = {"train": train.take(rest), HELD_OUT: train.take(apart)}
        task = replace(task, splits=task.splits | splits)
    return Data(data.train.take(rest), data.validation, task, data.train.take(apart))


def _paths(pattern: str) -> Sequence[Path]:
    found = sorted(glob.glob(pattern, recursive=True))
    return [Path(path) for path in found] or [Path(pattern)]


def _check_tokenizers(made: Prepared, stage: Stage, names: Sequence[str]) -> None:
    first = names[0]
    for other in names[1:]:
        if not same_tokenizer(made.tokenizers[first], made.tokenizers[other]):
            raise UserError(
                f"stages.{stage.name}: the tokenizers of {first} and {other} differ, so their "
                "tokens cannot be compared: take a student of the teacher's vocabulary"
            )


def _trained_before(recipe: Recipe, stage: Stage) -> bool:
    earlier = recipe.enabled[: recipe.enabled.index(stage)]
    return any(stage.teacher in other.student for other in earlier)


def _check_head(made: Prepared, name: str) -> None:
    if fresh := made.fresh.get(name):
        raise UserError(
            f"its teacher {name} has no head for the task ({fresh[0]} is not in its files): "
            "fine-tune it first, with `fastffn finetune`"
        )


@contextlib.contextmanager
def _naming(where: str) -> Iterator[None]:
    """Says in a UserError where in the recipe it arose."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
