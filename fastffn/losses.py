"""Distillation losses as modules: thin, over the functions of `fastffn.functional`.

    HiddenMSE          hidden states, with the projection    TinyBERT, EfficientBERT
    SoftCrossEntropy   softened classes                      Hinton et al.
    VectorCosine       sentence vectors

`forward(student, teacher, attention_mask=None, *, lengths=None)`: of each, as far as it has tokens.
A mask is [batch, length], bool or integers, non-zero at real tokens; `lengths` says the same for
right padding. What padding holds, NaN included, changes neither losses nor gradients. No gradient
reaches a teacher, and one that asks for it is refused.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from .errors import UserError
from .functional import hidden_mse, soft_cross_entropy, vector_cosine

__all__ = ["HiddenMSE", "SoftCrossEntropy", "VectorCosine"]


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
