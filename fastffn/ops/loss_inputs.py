"""What every distillation loss asks of its inputs: a fixed teacher, and a mask that fits."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import UserError


def check_teacher(*teacher: Tensor) -> None:
    """
    Raises:
        UserError: a tensor asks for a gradient: the teacher would train towards its student.
    """
    if any(x.requires_grad for x in teacher):
        raise UserError(
            "the teacher requires a gradient: run it under torch.inference_mode() or detach it"
        )


def real_tokens(
    shape: Sequence[int],
    device: torch.device,
    attention_mask: Tensor | None,
    lengths: Tensor | Sequence[int] | None = None,
) -> Tensor | None:
    """Which tokens are real, as bool of `shape`; None: all.

    Args:
        shape: of the tokens, usually (batch, length).
        device: of the tensors that are compared.
        attention_mask: bool or integers of that shape, non-zero at real tokens; None: all real.
        lengths: instead of a mask, [batch] integers: the first so many tokens are real.

    Raises:
        UserError: both are given, or one has another shape, type or device.
    """
    if lengths is not None:
        return _of_lengths(shape, device, attention_mask, lengths)
    if attention_mask is None:
        return None
    if attention_mask.shape != torch.Size(shape):
        raise UserError(
            f"attention_mask has shape {list(attention_mask.shape)}: expected {list(shape)}"
        )
    if attention_mask.is_floating_point() or attention_mask.is_complex():
        raise UserError(
            f"attention_mask is {attention_mask.dtype}: expected bool or integers, 1 at real "
            "tokens (not a mask that is added to scores)"
        )
    if attention_mask.device != device:
        raise UserError(f"attention_mask is on {attention_mask.device} and the student on {device}")
    return attention_mask if attention_mask.dtype == torch.bool else attention_mask != 0


def _of_lengths(shape, device, attention_mask, lengths) -> Tensor:
    if attention_mask is not None:
        raise UserError("give attention_mask or lengths, not both")
    if len(shape) != 2:
        raise UserError(f"lengths need tokens of [batch, length], these are {list(shape)}")
    if not isinstance(lengths, Tensor):
        lengths = torch.tensor(lengths, device=device)
    if lengths.shape != (shape[0],) or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise UserError(
            f"lengths is {lengths.dtype} of shape {list(lengths.shape)}: "
            f"expected integers of shape [{shape[0]}]"
        )
    if lengths.device != device:
        raise UserError(f"lengths is on {lengths.device} and the student on {device}; move one")
    return torch.arange(shape[1], device=device) < lengths.unsqueeze(-1)
