"""Where an op is faster than the modules that it stands for; elsewhere these are called, and so
they are within `backend.portable`, since they consist of torch's operations already.

On a GPU always. On a CPU as measured on AVX-512 (EPYC, one thread, times of torch's over ours):

    the whole unit      1.6 to 2 in float32, where the products go through oneDNN (`ops.matmul`);
                        below 64 rows they do not. In half precision the products are torch's, and
                        its exact gelu takes half the time of ours: 0.9 to 1. Its tanh form takes
                        four times as long as ours.
    residual_norm       with dropout 1 to 3, and more where memory is short; without it 0.6 at
                        12,000 numbers, from 1 at 65,000 to 1.9 at 800,000; with a backward 0.5 to
                        0.95 in float32, above 1 from 130,000 in half precision.
    act(x) * gate       1 within a fifth from 130,000 numbers, and it keeps a third less.
    act(x) alone        nothing to fuse: only gelu's tanh form.
"""

import torch
from torch import Tensor

from ..ops import backend, matmul
from ..ops.elementwise import constant_result

_ROWS = 64
_HALVES = (torch.bfloat16, torch.float16)


def whole_unit(x: Tensor, primitive: str, recompute: str) -> bool:
    """The op `ffn`, for rows x [.., H]; what is to be recomputed, only it can recompute."""
    if backend.is_portable():
        return False
    if x.device.type != "cpu" or primitive == "gelu" or recompute != "none":
        return True
    rows = x.numel() // max(1, x.shape[-1])
    return rows >= _ROWS and faster_products(x)


def faster_products(x: Tensor) -> bool:
    """Whether `ops.matmul.linear` multiplies x faster than torch."""
    autocast = x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    return x.device.type == "cpu" and not autocast and _is_onednns(x.dtype)


@constant_result
def _is_onednns(dtype: torch.dtype) -> bool:
    return matmul.is_onednns(dtype)


def residual_norm(x: Tensor, residual: Tensor, dropout: float) -> bool:
    """The op of that name."""
    if backend.is_portable():
        return False
    if x.device.type != "cpu":
        return True
    if dropout > 0:
        return x.numel() >= 1 << 14
    if torch.is_grad_enabled() and (x.requires_grad or residual.requires_grad):
        return x.dtype in _HALVES and x.numel() >= 1 << 17
    return x.numel() >= 1 << 16


def elementwise(x: Tensor, primitive: str, gated: bool) -> bool:
    """The op of that name for the activation of x, times a gate or not."""
    if backend.is_portable():
        return False
    if primitive == "gelu":
        return True
    return gated and (x.device.type != "cpu" or x.numel() >= 1 << 17)
