"""The parts of a recipe: models, data, losses, stages. Each checks what it alone can know."""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from fastffn.distill.replacing import Schedule
from fastffn.errors import UserError

UNSET = "???"  # what the user must give
TOP_MODELS = ("teacher", "student")  # models that have a key of their own
_RATIO = re.compile(r"[1-9]\d*(/[1-9]\d*)?")
SOURCES = ("load", "layers_of", "like", "efficientbert", "supernet")


def model_path(name: str) -> tuple[str, ...]:
    """Where a recipe has the model of that name."""
    return (name,) if name in TOP_MODELS else ("models", name)


def model_name(path: tuple) -> str | None:
    """The name of the model at a path; None if another thing is there."""
    name = path[-1] if path else None
    return name if path and path == model_path(name) else None


@dataclass(frozen=True)
class ModelSpec:
    """Where a model comes from: exactly one of the first five.

    Attributes:
        load: a directory or a hub name.
        layers_of: a model of the recipe, of which this is a smaller copy: its embeddings, `layers`
            of its layers, its head if the task is the same.
        like: a model of the recipe, whose class this has, with random weights.
        efficientbert: an EfficientBert: {from: <model>, genes, layers, embedding_size, ...} of the
            recipe's model, or {preset: base, ...} or a configuration with random weights.
        supernet: the same with {max_stack, max_width, gated} besides: it holds all smaller FFNs.
        layers: with layers_of: indices from 0, or how many.
        how: with a number of layers: which, see `fastffn.layer_map`.
        config: with like: what differs in the configuration, such as hidden_size.
        dtype: with load: of the weights; for teachers.
    """

    load: str | None = None
    layers_of: str | None = None
    like: str | None = None
    efficientbert: dict[str, Any] | None = None
    supernet: dict[str, Any] | None = None
    layers: int | tuple[int, ...] | None = None
    how: Literal["uniform", "first", "last"] = "uniform"
    config: dict[str, Any] = field(default_factory=dict)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self):
        given = [name for name in SOURCES if getattr(self, name) is not None]
        if len(given) != 1:
            has = " and ".join(given) if given else "nothing"
            raise UserError(f"{has} given: a model has exactly one of {', '.join(SOURCES)}")
        options = (self.efficientbert or {}) | (self.supernet or {})
        if not isinstance(options.get("from", ""), str):
            raise UserError(f"{given[0]}: from {options['from']!r} is no name of a model")
        layers, indices = self.layers, isinstance(self.layers, tuple)
        if (self.layers_of is not None) != (layers is not None):
            raise UserError("layers: which ones, or how many, belongs to layers_of, and only there")
        if indices and (not layers or min(layers) < 0 or list(layers) != sorted(set(layers))):
            raise UserError(f"layers {list(layers)}: give different layers in rising order, from 0")
        if not indices and layers is not None and layers < 1:
            raise UserError(f"layers {layers} is not positive")
        if self.how != "uniform" and (indices or layers is None):
            raise UserError(f"how {self.how} chooses layers where layers is a number")
        if self.config and self.like is None:
            raise UserError("config changes the configuration of the model that like names")
        if self.dtype != "float32" and self.load is None:
            raise UserError(f"dtype {self.dtype} is for models that are loaded")

    @property
    def parent(self) -> str | None:
        """The recipe's model that this one is made from."""
        value = getattr(self, self.parent_key[0])
        return value.get("from") if isinstance(value, dict) else value

    @property
    def parent_key(self) -> tuple[str, ...]:
        """The key that names the parent."""
        for key in ("layers_of", "like"):
            if getattr(self, key) is not None:
                return (key,)
        return ("supernet" if self.supernet is not None else "efficientbert", "from")


@dataclass(frozen=True)
class DataSpec:
    """What is trained on: exactly one of task and text.

    Attributes:
        task: a name of `fastffn.data.tasks.TASKS`, or the description of a task of one's own; in a
            recipe also a YAML file with one (`task_files`).
        text: UTF-8 files, or patterns of names such as "wiki/*.txt.gz".
        dir: the task's folder, or the one above it; None: FASTFFN_DATA, else the hub.
        max_length: tokens of a sequence, special ones included.
        limit: training examples (sequences of text) at most, a random choice; None: all.
        hold_out: of these, how many are not trained on, by chance: a search judges by them. Not of
            questions, whose windows overlap.
    """

    task: str | dict[str, Any] | None = None
    text: tuple[str, ...] | None = None
    dir: str | None = None
    max_length: int = 128
    limit: int | None = None
    hold_out: int = 0

    def __post_init__(self):
        if (self.task is None) == (self.text is None):
            raise UserError("needs exactly one of task and text")
        if self.text is not None and not self.text:
            raise UserError("text names no files: give at least one")
        if self.dir is not None and self.task is None:
            raise UserError("dir is the folder of a task's files: text has paths of its own")
        if self.max_length < 3:
            raise UserError(f"max_length {self.max_length} leaves no room for a word: at least 3")
        _positive(self, "limit")
        if self.hold_out < 0:
            raise UserError(f"hold_out {self.hold_out} is negative: give 0 or more")


@dataclass(frozen=True)
class Loss:
    """One loss of a stage.

    Attributes:
        kind: a name of `fastffn.distill.terms.TERMS`.
        weight: its factor in the sum.
        options: the dataclass of that name with the loss's options.
    """

    kind: str
    options: Any
    weight: float = 1.0

    def __post_init__(self):
        if self.weight <= 0:
            raise UserError(
                f"weight {self.weight:g} is not positive: leave a loss out by giving null for it"
            )


@dataclass(frozen=True)
class Stage:
    """One training run: a teacher, students, data, losses and an optimiser of its own (AdamW).

    Attributes:
        name: unique in the recipe.
        data: name of the data.
        losses: by name.
        learning_rate: the highest.
        student: names of the models that are trained.
        teacher: name of the model that teaches. In a recipe: "teacher", where there is one and a
            loss or the replacing needs it.
        epochs, steps: passes over the data, or optimiser steps: one of them.
        batch_size: examples of a step, over all processes and passes.
        accumulate: passes, one after another, that share a step's examples.
        schedule: of the learning rate, after the warm-up.
        warmup, warmup_steps: a fraction of the stage, or steps: one of them; neither: 0.1.
        weight_decay, betas, eps, max_grad_norm: AdamW's, and the gradient's largest norm.
        freeze: parts that are not trained: "layers", "layers.0", "embeddings", "head", or how
            parameters' names begin.
        train: parts that are trained, others are not; empty: all.
        replacing: the student's layers stand in for the teacher's by this schedule (Theseus).
        subnetworks: of a supernet: how many learn at a step, largest and smallest among them.
        depths: with subnetworks: numbers of layers that smaller ones may have (elastic depth,
            DynaBERT, arXiv 2004.04037); none: all layers always.
        ratios: with subnetworks: the inner widths that they draw from, over the hidden width times
            base, such as 1/2; none: 1, 1/2, 1/3 and 1/4 of the supernet's.
        projections: helper parameters at the start of the stage: kept from the one before, or new.
        cache: keep the teacher's outputs on disk.
        enabled: false leaves the stage out.
    """

    name: str
    data: str
    losses: dict[str, Loss]
    learning_rate: float
    student: tuple[str, ...] = ("student",)
    teacher: str | None = None
    epochs: float | None = None
    steps: int | None = None
    batch_size: int = 32
    accumulate: int = 1
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    warmup: float | None = None
    warmup_steps: int | None = None
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    freeze: tuple[str, ...] = ()
    train: tuple[str, ...] = ()
    replacing: Schedule | None = None
    subnetworks: int | None = None
    depths: tuple[int, ...] = ()
    ratios: tuple[str | int, ...] = ()
    projections: Literal["keep", "new"] = "keep"
    cache: bool = False
    enabled: bool = True

    def __post_init__(self):
        _positive(self, "epochs", "steps", "batch_size", "accumulate", "learning_rate", "eps")
        _positive(self, "max_grad_norm")
        if (self.epochs is None) == (self.steps is None):
            raise UserError("needs exactly one of epochs and steps")
        if self.warmup is not None and self.warmup_steps is not None:
            raise UserError("warmup and warmup_steps say the same: give one")
        if self.warmup is None and self.warmup_steps is None:
            object.__setattr__(self, "warmup", 0.1)
        if self.warmup is not None and not 0 <= self.warmup <= 1:
            raise UserError(f"warmup {self.warmup:g} is no fraction: for steps give warmup_steps")
        if self.steps and (self.warmup_steps or 0) > self.steps:
            raise UserError(
                f"warmup_steps {self.warmup_steps} are more than the {self.steps} steps: the rate "
                "would never reach its height; give warmup, a fraction, instead"
            )
        for name in ("warmup_steps", "weight_decay"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UserError(f"{name} {value:g} is negative")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"betas {list(self.betas)}: both lie from 0 to below 1")
        if not self.losses:
            raise UserError("losses are missing: give at least one")
        if not self.student or len(set(self.student)) != len(self.student):
            raise UserError(f"student {list(self.student)}: give one model, or different ones")
        if self.subnetworks is not None and self.subnetworks < 2:
            raise UserError(f"subnetworks {self.subnetworks}: at least 2, largest and smallest")
        if self.depths and self.subnetworks is None:
            raise UserError("depths are those of sub-networks: give subnetworks too")
        if self.ratios and self.subnetworks is None:
            raise UserError("ratios are those of sub-networks: give subnetworks too")
        for ratio in self.ratios:
            if not _RATIO.fullmatch(str(ratio)):
                raise UserError(f"ratios {ratio} is none: give such as 1/2 or 1")
        if len(set(self.depths)) < len(self.depths) or min(self.depths, default=1) < 1:
            raise UserError(f"depths {list(self.depths)}: give different numbers of layers, from 1")

    @property
    def needs_teacher(self) -> bool:
        """Whether a loss or the replacing compares with a teacher."""
        terms = any(loss.options.needs_teacher for loss in self.losses.values())
        return terms or self.replacing is not None


def _positive(spec: Any, *names: str) -> None:
    for name in names:
        value = getattr(spec, name)
        if value is not None and value <= 0:
            raise UserError(f"{name} {value:g} is not positive")
