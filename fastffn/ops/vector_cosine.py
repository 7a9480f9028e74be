"""`vector_cosine`: sentence vectors towards the teacher's direction. Torch's operator serves it."""

import torch
from torch import Tensor

from ..errors import UserError
from .execute import compute_dtype
from .loss_inputs import check_teacher


def vector_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of 1 - cosine similarity between sentence vectors.

    Args:
        student: [batch, width], floating point; any leading dimensions, all averaged.
        teacher: the same shape; no gradient flows into it.

    Returns:
        A scalar from 0 to 2, 0 without vectors; float64 if one of them is, else float32, which
        halves are computed in.

    Raises:
        UserError: unequal shapes or devices, or a teacher that requires a gradient.
    """
    if student.shape != teacher.shape or student.dim() == 0:
        raise UserError(
            f"the student's vectors are {list(student.shape)} and the teacher's "
            f"{list(teacher.shape)}: project the student to the teacher's width"
        )
    if teacher.device != student.device:
        raise UserError(f"the teacher is on {teacher.device}, the student on {student.device}")
    check_teacher(teacher)
    dtype = compute_dtype(student, teacher)
    distances = 1 - torch.cosine_similarity(student.to(dtype), teacher.to(dtype), dim=-1)
    return distances.sum() / max(1, distances.numel())
