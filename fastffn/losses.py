"""Distillation losses as modules: thin, over the functions of `fastffn.functional`.

    RelationLoss       token-to-token relations of a layer   MiniLM, MiniLMv2
    ScoreMSE           attention scores before the softmax   TinyBERT, EfficientBERT
    HiddenMSE          hidden states, with the projection    TinyBERT, EfficientBERT
    SoftCrossEntropy   softened classes                      Hinton et al.
    VectorCosine       sentence vectors

`forward(student, teacher, attention_mask=None, *, lengths=None)`: of each, as far as it has tokens.
The first two take mappings such as `fastffn.capture` fills, "q", "k" and "v" -> [batch, length,
width]. A mask is [batch, length], bool or integers, non-zero at real tokens; `lengths` says the
same for right padding. What padding holds, NaN included, changes neither losses nor gradients. No
gradient reaches a teacher, and one that asks for it is refused.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from .errors import UserError
from .functional import (
    attention_relations,
    hidden_mse,
    score_mse,
    soft_cross_entropy,
    vector_cosine,
)
from .ops.named_relations import check_relations
from .ops.relation_losses import MASKED, RELATION_DIVERGENCES, check_temperature, one_of

__all__ = ["HiddenMSE", "RelationLoss", "ScoreMSE", "SoftCrossEntropy", "VectorCosine"]


class RelationLoss(nn.Module):
    """Divergence of a layer's token-to-token relations from the teacher's.

    The default is MiniLMv2 (arXiv 2012.15828); `relations=("qk", "vv")` with `num_heads` the
    attention heads is MiniLM (arXiv 2002.10957); `divergence="probability_mse"` is AutoDistil's
    (arXiv 2201.12507). See `fastffn.functional.relation_kl`.

    Args:
        relations: two letters each, of "q", "k" and "v".
        weights: one for each relation; None: 1 each.
        num_heads: relation heads, a divisor of both widths.
        temperature: divides the scores; the loss is multiplied by its square.
        divergence: "kl" (of the student from the teacher), "reverse_kl" or "probability_mse".

    Raises:
        UserError: an unknown relation or divergence, none, another number of weights than of
            relations, or a temperature that is not positive.
    """

    def __init__(
        self,
        relations: Sequence[str] = ("qq", "kk", "vv"),
        weights: Sequence[float] | None = None,
        num_heads: int = 48,
        temperature: float = 1.0,
        divergence: str = "kl",
    ):
        super().__init__()
        check_relations(relations, {"q", "k", "v"})
        check_temperature(temperature)
        one_of("divergence", divergence, RELATION_DIVERGENCES)
        if not relations:
            raise UserError('RelationLoss needs at least one relation, such as "qq"')
        if weights is not None and len(weights) != len(relations):
            raise UserError(f"{len(weights)} weights for {len(relations)} relations: one for each")
        self.relations = tuple(relations)
        self.weights = None if weights is None else tuple(weights)
        self.num_heads = num_heads
        self.temperature = temperature
        self.divergence = divergence

    def forward(
        self,
        student: Mapping[str, Tensor],
        teacher: Mapping[str, Tensor],
        attention_mask: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """A scalar: the weighted sum over the relations of the mean over relation heads, real
        tokens and examples."""
        return attention_relations(
            student,
            teacher,
            self.relations,
            self.weights,
            self.num_heads,
            attention_mask,
            self.temperature,
            lengths=lengths,
            divergence=self.divergence,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.relations}, weights={self.weights}, num_heads={self.num_heads}, "
            f"temperature={self.temperature}, divergence={self.divergence!r}"
        )


class ScoreMSE(nn.Module):
    """Mean squared difference of attention scores before the softmax; no map of them is made.

    Of TinyBERT (arXiv 1909.10351) and EfficientBERT (arXiv 2109.07222), whose sum over mapped
    layers is the caller's. See `fastffn.functional.score_mse`.

    Args:
        num_heads: attention heads of "q" and "k", a divisor of both widths. None: as captured
            "scores" say.
        masked: "zero": scores with padding count as equal in the mean over all; "exclude": the mean
            is over scores between real tokens.

    Raises:
        UserError: `masked` is neither.
    """

    def __init__(self, num_heads: int | None = None, masked: str = "zero"):
        super().__init__()
        one_of("masked", masked, MASKED)
        self.num_heads = num_heads
        self.masked = masked

    def forward(
        self,
        student: Mapping[str, object],
        teacher: Mapping[str, object],
        attention_mask: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """A scalar.

        Args:
            student, teacher: with "scores" as `fastffn.capture` yields them, which is what
                attention sees, or with "q" and "k", [batch, length, width] each.

        Raises:
            UserError: there is neither, numbers of heads differ, or as `score_mse`.
        """
        q, k, heads = self._scores("student", student)
        teacher_q, teacher_k, teacher_heads = self._scores("teacher", teacher)
        if heads != teacher_heads:
            raise UserError(
                f"the student has {heads} attention heads and the teacher {teacher_heads}: scores "
                "are compared head by head; choose a student with as many, or relations instead"
            )
        return score_mse(
            q, k, teacher_q, teacher_k, heads, attention_mask, lengths=lengths, masked=self.masked
        )

    def _scores(self, model: str, states: Mapping[str, object]) -> tuple[Tensor, Tensor, int]:
        if "scores" in states:
            q, k, heads = states["scores"]
            return q, k, self.num_heads or heads
        if {"q", "k"} <= set(states) and self.num_heads:
            return states["q"], states["k"], self.num_heads
        raise UserError(
            f'the {model}\'s states have no scores: capture what=("scores",), or "q" and "k" '
            "and give num_heads"
        )


class HiddenMSE(nn.Module):
    """Mean squared difference of hidden states, the student's projected to the teacher's width.

    One module for the embeddings and all layers shares the projection between them, as
    EfficientBERT does; TinyBERT has one for each. See `fastffn.functional.hidden_mse`.

    Args:
        student_width: width of the student's states.
        teacher_width: None: as the student's.
        bias: whether the projection has one.
        project: None: exactly if the widths differ.

    Attributes:
        projection: nn.Linear, [teacher width, student width], to train and to drop with the loss;
            or None.

    Raises:
        UserError: the widths differ and `project` is False.
    """

    def __init__(
        self,
        student_width: int,
        teacher_width: int | None = None,
        bias: bool = True,
        project: bool | None = None,
    ):
        super().__init__()
        teacher_width = student_width if teacher_width is None else teacher_width
        differ = student_width != teacher_width
        if differ and project is False:
            raise UserError(
                f"{student_width} and {teacher_width} wide states can only be compared by a "
                "projection: leave `project` out"
            )
        projects = differ or bool(project)
        self.projection = nn.Linear(student_width, teacher_width, bias) if projects else None

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        attention_mask: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """A scalar: the mean over real tokens and the teacher's width."""
        parameters = ()
        if self.projection is not None:
            parameters = (self.projection.weight, self.projection.bias)
        return hidden_mse(student, teacher, attention_mask, *parameters, lengths=lengths)


class SoftCrossEntropy(nn.Module):
    """Cross entropy towards the teacher's softened classes, times the temperature's square.

    Of Hinton et al. (arXiv 1503.02531). See `fastffn.functional.soft_cross_entropy`.

    Args:
        temperature: divides both models' logits.
    """

    def __init__(self, temperature: float = 1.0):
        super().__init__()
        if not temperature > 0:
            raise UserError(f"temperature {temperature} is not a positive number")
        self.temperature = temperature

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        mask: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """A scalar: the mean over the rows that count; logits are [.., classes]."""
        return soft_cross_entropy(
            student_logits, teacher_logits, self.temperature, mask, lengths=lengths
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"


class VectorCosine(nn.Module):
    """Mean of 1 - cosine similarity between sentence vectors, [batch, width] each."""

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """A scalar from 0 to 2. See `fastffn.functional.vector_cosine`."""
        return vector_cosine(student, teacher)
