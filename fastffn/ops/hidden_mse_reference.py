"""The oracle of `hidden_mse` in plain torch, autograd and the projected states included."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .execute import compute_dtype


def hidden_mse(
    student: Tensor,
    teacher: Tensor,
    real: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """mean over real tokens and the width of (student weight^T + bias - teacher)^2.

    Args:
        student: [.., student width]. teacher: [.., teacher width].
        real: bool [..]; None: all tokens are real.
        weight, bias: [teacher width, student width] and [teacher width], or None.
    """
    if real is not None:  # before the product, whose gradient would meet NaN in the padding
        student, teacher = (torch.where(real.unsqueeze(-1), x, 0) for x in (student, teacher))
    projected = student if weight is None else F.linear(student, weight, bias)
    dtype = compute_dtype(student, teacher)
    square = (projected.to(dtype) - teacher.to(dtype)).square()
    if real is None:
        return square.sum() / max(1, square.numel())
    square = torch.where(real.unsqueeze(-1), square, 0)  # a projected zero is the bias
    return square.sum() / (real.sum() * teacher.shape[-1]).clamp(min=1)
