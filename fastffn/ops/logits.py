"""`soft_cross_entropy`: a student's classes towards a teacher's softened ones.

A composition of torch's operators: a softmax over classes is one fused operator already, and a
batch has one row per example, so there is nothing to gain.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import UserError
from .execute import compute_dtype
from .loss_inputs import check_teacher, real_tokens

REDUCTIONS = ("mean", "sum", "none")


def soft_cross_entropy(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Cross entropy of the student's distribution against the teacher's, both softened.

        T^2 * -sum over classes of softmax(teacher / T) * log_softmax(student / T)

    of each row, averaged over rows: the soft term of Hinton et al. (arXiv 1503.02531), whose T^2
    keeps the size of the gradient. Its gradient is that of the KL divergence.

    EfficientBERT (arXiv 2109.07222) averages over rows and classes, at T = 1. That is this divided
    by the number of classes: `soft_cross_entropy(student, teacher) / student.shape[-1]`.

    Args:
        student_logits: [.., classes], floating point, finite.
        teacher_logits: the same shape; no gradient flows into them.
        temperature: T.
        mask: [..], bool or integers, non-zero at rows that count; None: all. What the others hold,
            NaN included, changes nothing and gets no gradient.
        lengths: [batch] integers instead of a mask, for logits of [batch, length, classes].
        reduction: "mean" over the rows that count, "sum" over them, or "none": [..], 0 at rows
            that do not count.

    Returns:
        float64 if one of the logits is, else float32, which halves are computed in.

    Raises:
        UserError: shapes that differ, a mask that does not fit, a temperature that is not positive,
            an unknown reduction, or a teacher that requires a gradient.
    """
    if student_logits.shape != teacher_logits.shape or student_logits.dim() == 0:
        raise UserError(
            f"the student's logits are {list(student_logits.shape)} and the teacher's "
            f"{list(teacher_logits.shape)}: both are [.., classes] of one shape"
        )
    if not 0 < temperature < float("inf"):
        raise UserError(f"temperature {temperature} is not a positive number")
    if reduction not in REDUCTIONS:
        raise UserError(f"reduction {reduction!r}: expected one of {', '.join(REDUCTIONS)}")
    check_teacher(teacher_logits)
    device, rows = student_logits.device, student_logits.shape[:-1]
    if teacher_logits.device != device:
        raise UserError(f"the teacher is on {teacher_logits.device}, the student on {device}")
    real = real_tokens(rows, device, mask, lengths)

    dtype = compute_dtype(student_logits, teacher_logits)
    student, teacher = (x.to(dtype) for x in (student_logits, teacher_logits))
    if real is not None:
        student, teacher = (torch.where(real.unsqueeze(-1), x, 0) for x in (student, teacher))
    if temperature != 1:
        student, teacher = student / temperature, teacher / temperature
    values = (teacher.softmax(-1) * student.log_softmax(-1)).sum(-1) * -(temperature**2)
    if real is not None:
        values = torch.where(real, values, 0)
    if reduction == "none":
        return values
    if reduction == "sum":
        return values.sum()
    return values.sum() / (max(1, values.numel()) if real is None else real.sum().clamp(min=1))
