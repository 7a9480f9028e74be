"""What the distillation losses share: a fixed teacher, a mask that fits, what a backward needs."""

import operator
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
    if not isinstance(attention_mask, Tensor):
        raise UserError(f"attention_mask is a {type(attention_mask).__name__}: give a tensor")
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
        raise UserError(
            f"attention_mask is on {attention_mask.device} and the student on {device}; move one"
        )
    real = attention_mask if attention_mask.dtype == torch.bool else attention_mask != 0
    if torch.compiler.is_compiling() or not real.is_inference():
        return real
    return real.clone()  # an inference tensor cannot be saved for a backward


def _of_lengths(shape, device, attention_mask, lengths) -> Tensor:
    if attention_mask is not None:
        raise UserError("give attention_mask or lengths, not both")
    if len(shape) != 2:
        raise UserError(f"lengths need tokens of [batch, length], these are {list(shape)}")
    if not isinstance(lengths, Tensor):
        try:
            given = [operator.index(length) for length in lengths]
        except TypeError:
            raise UserError(f"lengths are {lengths!r}: expected {shape[0]} integers") from None
        lengths = torch.tensor(given, dtype=torch.int64, device=device)
    if lengths.shape != (shape[0],) or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise UserError(
            f"lengths is {lengths.dtype} of shape {list(lengths.shape)}: "
            f"expected integers of shape [{shape[0]}]"
        )
    if lengths.device != device:
        raise UserError(f"lengths is on {lengths.device} and the student on {device}; move one")
    # Elsewhere than on a CPU one would have to wait for the answer.
    if lengths.is_cpu and not torch.compiler.is_compiling() and lengths.numel():
        least, most = (x.item() for x in lengths.aminmax())
        if least < 0 or most > shape[1]:
            raise UserError(
                f"lengths are from {least} to {most}: expected numbers from 0 to {shape[1]}"
            )
    return torch.arange(shape[1], device=device) < lengths.unsqueeze(-1)


def save(ctx, *tensors: Tensor | None) -> None:
    """`ctx.save_for_backward`, which refuses what a teacher made under inference_mode: such tensors
    are held as they are."""
    ctx.held = {k: x for k, x in enumerate(tensors) if x is not None and x.is_inference()}
    ctx.save_for_backward(*(None if k in ctx.held else x for k, x in enumerate(tensors)))


def saved(ctx) -> list[Tensor | None]:
    """What `save` was given."""
    return [ctx.held.get(k, x) for k, x in enumerate(ctx.saved_tensors)]
