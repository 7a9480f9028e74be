"""The losses a recipe may name: what each reads from student and teacher, and how it compares them.

    options = TERMS["relations"](relation_heads=48)       what the recipe says, checked
    term = options.build(student_sizes, teacher_sizes)    a module, with its projections if it has
    value = term(ours, theirs, batch)                     a mean; `term.counted` says over what

`ours` and `theirs` are what `reading.read` gives: "hidden.3", "q.11", "logits" and so on. Of layers
that a sub-network leaves out `ours` has nothing, and a sum over layers is one over the others.
Helper parameters (projections) are the term's own, so they are trained and checkpointed with the
student and stay behind when it is exported.

A term's value is a mean over the things it counts: "examples", "tokens" (real ones), "pairs" (of
real tokens of one example), "squares" (pairs of all tokens, padding too) or "labels". A step that
is cut in pieces, over processes or by accumulation, adds the pieces' values in proportion to their
counts and so has the loss of the whole; `counts` counts. The whole's squares are more than its
pieces': it would be padded to its longest example.

The formulas and their sources are in `fastffn.losses` and `fastffn.functional`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from fastffn.distill import layers
from fastffn.distill.reading import LOGITS
from fastffn.distill.teacher import sentence_vectors
from fastffn.errors import UserError
from fastffn.functional import vector_cosine
from fastffn.losses import HiddenMSE, RelationLoss, ScoreMSE, SoftCrossEntropy

IGNORED = -100  # a label that does not count


class Sizes(NamedTuple):
    """What a term must know of a model."""

    layers: int
    width: int
    heads: int
    config: object  # of transformers; says for which teachers papers name a layer


class Term(nn.Module):
    """One loss of a stage, bound to the sizes of its models.

    Attributes:
        student_reads, teacher_reads: names for `reading.read`.
        counted: what the value is a mean over.
    """

    student_reads: tuple[str, ...] = ()
    teacher_reads: tuple[str, ...] = ()
    counted = "examples"

    def forward(self, ours: dict, theirs: dict, batch: dict[str, Tensor]) -> Tensor:
        raise NotImplementedError


def counts(batch: dict[str, Tensor]) -> dict[str, float]:
    """How many of each kind a batch (on a CPU, as the collator makes it) has."""
    lengths = batch["attention_mask"].sum(1).double()
    labels = batch.get("labels", lengths)
    labelled = (labels != IGNORED).sum() if labels.dim() > 1 else len(lengths)
    return {
        "examples": float(len(lengths)),
        "tokens": float(lengths.sum()),
        "pairs": float(lengths.square().sum()),
        "squares": float(len(lengths) * batch["attention_mask"].shape[1] ** 2),
        "labels": float(labelled),
    }


# -- attention -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Relations:
    """Relations between tokens: MiniLM (arXiv 2002.10957), MiniLMv2 (arXiv 2012.15828).

    Attributes:
        relations: pairs out of q, k, v: ("qk", "vv") is MiniLM, ("qq", "kk", "vv") MiniLMv2.
        relation_heads: a divisor of both widths; 0: the teacher's attention heads.
        teacher_layer: counted from 0, negative from the end; "auto": MiniLMv2's choice.
        student_layer: the same; the papers take the last.
        divergence, temperature: as `fastffn.losses.RelationLoss`.
    """

    relations: tuple[str, ...] = ("qq", "kk", "vv")
    relation_heads: int = 0
    teacher_layer: int | str = "auto"
    student_layer: int = -1
    divergence: str = "kl"
    temperature: float = 1.0
    needs_teacher, needs_labels = True, False

    def __post_init__(self):
        RelationLoss(self.relations, None, 1, self.temperature, self.divergence)  # checks them
        if self.relation_heads < 0:
            raise UserError(f"relation_heads {self.relation_heads} is negative: give 0 or more")
        if isinstance(self.teacher_layer, str) and self.teacher_layer != "auto":
            raise UserError(f'teacher_layer {self.teacher_layer!r} is neither a number nor "auto"')

    def build(self, student: Sizes, teacher: Sizes) -> Term:
        heads = self.relation_heads or teacher.heads
        for model, sizes in (("student", student), ("teacher", teacher)):
            if sizes.width % heads:
                raise UserError(
                    f"relation_heads {heads} does not divide the {model}'s width {sizes.width}: "
                    "choose a common divisor of both widths"
                )
        there = self.teacher_layer
        there = layers.relation_layer(teacher.config) if there == "auto" else there
        return _Relations(
            self,
            heads,
            _layer("student", self.student_layer, student.layers),
            _layer("teacher", there, teacher.layers),
        )


class _Relations(Term):
    def __init__(self, options: Relations, heads: int, here: int, there: int):
        super().__init__()
        self.here, self.there = here, there
        self.names = tuple(n for n in "qkv" if any(n in r for r in options.relations))
        self.student_reads = tuple(f"{name}.{here}" for name in self.names)
        self.teacher_reads = tuple(f"{name}.{there}" for name in self.names)
        self.loss = RelationLoss(
            options.relations, None, heads, options.temperature, options.divergence
        )

    def forward(self, ours, theirs, batch):
        ours = {name: ours[f"{name}.{self.here}"] for name in self.names}
        theirs = {name: theirs[f"{name}.{self.there}"] for name in self.names}
        return self.loss(ours, theirs, batch["attention_mask"])


@dataclass(frozen=True)
class Scores:
    """Attention scores before the softmax, summed over mapped layers: TinyBERT (arXiv 1909.10351).

    Attributes:
        layer_map: "uniform", "last" or "first" (`fastffn.layer_map`), or pairs (student layer,
            teacher layer) counted from 0.
        masked: "exclude" padding from the mean, or count it as equal, "zero", as EfficientBERT
            (arXiv 2109.07222) does.
    """

    layer_map: str | tuple[tuple[int, int], ...] = "uniform"
    masked: str = "exclude"
    needs_teacher, needs_labels = True, False

    def __post_init__(self):
        ScoreMSE(None, self.masked)

    def build(self, student: Sizes, teacher: Sizes) -> Term:
        if student.heads != teacher.heads:
            raise UserError(
                f"the student has {student.heads} attention heads and the teacher {teacher.heads}: "
                "scores are compared head by head; choose a student with as many, or relations"
            )
        return _Scores(self, _pairs(self.layer_map, student, teacher))


class _Scores(Term):
    def __init__(self, options: Scores, pairs: tuple[tuple[int, int], ...]):
        super().__init__()
        self.pairs = pairs
        self.counted = "pairs" if options.masked == "exclude" else "squares"
        self.student_reads = tuple(f"scores.{here}" for here, _ in pairs)
        self.teacher_reads = tuple(f"scores.{there}" for _, there in pairs)
        self.loss = ScoreMSE(None, options.masked)

    def forward(self, ours, theirs, batch):
        return sum(
            self.loss(
                {"scores": ours[f"scores.{here}"]},
                {"scores": theirs[f"scores.{there}"]},
                batch["attention_mask"],
            )
            for here, there in self.pairs
            if f"scores.{here}" in ours
        )


# -- hidden states -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hidden:
    """Hidden states, summed over mapped layers, the student's projected where widths differ.

    Attributes:
        layer_map: as for scores.
        embeddings: also what the first layer gets.
        projection: "shared" by embeddings and all layers (EfficientBERT, arXiv 2109.07222), "each"
            its own (TinyBERT, arXiv 1909.10351), or "none", for equal widths. "auto": each, if
            widths differ.
    """

    layer_map: str | tuple[tuple[int, int], ...] = "uniform"
    embeddings: bool = False
    projection: str = "auto"
    needs_teacher, needs_labels = True, False

    def __post_init__(self):
        if self.projection not in ("auto", "shared", "each", "none"):
            raise UserError(
                f"projection {self.projection!r} is unknown: choose auto, shared, each or none"
            )

    def build(self, student: Sizes, teacher: Sizes) -> Term:
        return _Hidden(self, _pairs(self.layer_map, student, teacher), student, teacher)


class _Hidden(Term):
    counted = "tokens"

    def __init__(self, options: Hidden, pairs, student: Sizes, teacher: Sizes):
        super().__init__()
        places = [("embeddings", "embeddings")] if options.embeddings else []
        places += [(f"hidden.{here}", f"hidden.{there}") for here, there in pairs]
        self.student_reads, self.teacher_reads = zip(*places, strict=True)
        project = {"auto": None, "none": False}.get(options.projection, True)
        count = 1 if options.projection == "shared" else len(places)
        made = [HiddenMSE(student.width, teacher.width, project=project) for _ in range(count)]
        self.losses = nn.ModuleList(made)

    def forward(self, ours, theirs, batch):
        losses = [*self.losses] * (len(self.student_reads) // len(self.losses))
        places = zip(losses, self.student_reads, self.teacher_reads, strict=True)
        mask = batch["attention_mask"]
        return sum(
            loss(ours[here], theirs[there], mask) for loss, here, there in places if here in ours
        )


@dataclass(frozen=True)
class Vector:
    """Sentence vectors: 1 - cosine similarity, of the last hidden states pooled by "mean" or "cls".

    Vectors of unequal width cannot be compared.
    """

    pooling: str = "mean"
    needs_teacher, needs_labels = True, False

    def __post_init__(self):
        if self.pooling not in ("mean", "cls"):
            raise UserError(f"pooling {self.pooling!r} is unknown: choose mean or cls")

    def build(self, student: Sizes, teacher: Sizes) -> Term:
        if student.width != teacher.width:
            raise UserError(
                f"sentence vectors of {student.width} and {teacher.width} numbers cannot be "
                "compared: choose a student of the teacher's width, or leave vector out"
            )
        return _Vector(self.pooling, student.layers - 1, teacher.layers - 1)


class _Vector(Term):
    def __init__(self, pooling: str, here: int, there: int):
        super().__init__()
        self.pooling = pooling
        self.student_reads, self.teacher_reads = (f"hidden.{here}",), (f"hidden.{there}",)

    def forward(self, ours, theirs, batch):
        mask = batch["attention_mask"]
        here, there = (
            sentence_vectors(states[name], mask, self.pooling)
            for states, (name,) in ((ours, self.student_reads), (theirs, self.teacher_reads))
        )
        return vector_cosine(here, there)


# -- what the task asks for ----------------------------------------------------------------------


@dataclass(frozen=True)
class SoftLabels:
    """The teacher's classes, softened (Hinton et al., arXiv 1503.02531).

    Scores are compared by their squared difference; of questions, the distributions of start and
    end over the real tokens, averaged.

    Attributes:
        temperature: divides both models' logits; the loss is multiplied by its square.
    """

    temperature: float = 1.0
    needs_teacher, needs_labels = True, True  # labels: not their values, but a task

    def __post_init__(self):
        SoftCrossEntropy(self.temperature)

    def build(self, student: Sizes, teacher: Sizes) -> Term:
        return _SoftLabels(self.temperature)


class _SoftLabels(Term):
    student_reads = teacher_reads = (LOGITS,)

    def __init__(self, temperature: float):
        super().__init__()
        self.loss = SoftCrossEntropy(temperature)

    def forward(self, ours, theirs, batch):
        ours, theirs = ours[LOGITS], theirs[LOGITS]
        if ours.shape != theirs.shape:
            raise UserError(
                f"the student's logits are {list(ours.shape)} and the teacher's "
                f"{list(theirs.shape)}: both need the task's head"
            )
        if "start_positions" in batch:  # [batch, length, 2] -> the distributions over tokens
            hidden = batch["attention_mask"].unsqueeze(-1) == 0
            ours, theirs = (x.float().masked_fill(hidden, -1e4) for x in (ours, theirs))
            return self.loss(ours.transpose(1, 2), theirs.transpose(1, 2))
        if ours.shape[-1] == 1:
            return F.mse_loss(ours.float(), theirs.detach().clone().float())
        return self.loss(ours, theirs)


@dataclass(frozen=True)
class HardLabels:
    """The task's own loss: cross entropy, squared error of scores, start and end of answers."""

    needs_teacher, needs_labels = False, True

    def build(self, student: Sizes, teacher: Sizes | None) -> Term:
        return _HardLabels()


class _HardLabels(Term):
    student_reads = (LOGITS,)
    counted = "labels"

    def forward(self, ours, theirs, batch):
        logits = ours[LOGITS].float()
        if "start_positions" in batch:
            hidden = batch["attention_mask"].unsqueeze(-1) == 0
            start, end = logits.masked_fill(hidden, -1e4).unbind(-1)
            ends = F.cross_entropy(end, batch["end_positions"])
            return (F.cross_entropy(start, batch["start_positions"]) + ends) / 2
        labels = batch["labels"]
        if labels.is_floating_point():
            return F.mse_loss(logits.squeeze(-1), labels)
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)


TERMS: dict[str, type] = {
    "relations": Relations,
    "scores": Scores,
    "hidden": Hidden,
    "vector": Vector,
    "soft_labels": SoftLabels,
    "hard_labels": HardLabels,
}


def _layer(model: str, layer: int, count: int) -> int:
    if not -count <= layer < count:
        raise UserError(f"{model}_layer {layer} does not exist: the {model} has {count} layers")
    return layer % count


def _pairs(chosen, student: Sizes, teacher: Sizes) -> tuple[tuple[int, int], ...]:
    if isinstance(chosen, str):
        return layers.layer_map(student.layers, teacher.layers, chosen)
    if not chosen:
        raise UserError("layer_map has no pairs: give uniform, last, first or pairs")
    return tuple(
        (_layer("student", here, student.layers), _layer("teacher", there, teacher.layers))
        for here, there in chosen
    )
