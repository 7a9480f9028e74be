"""Matrix products of the feed-forward block: torch's, by the library that is fast on this
processor.

In float32 on a CPU torch multiplies by MKL, which does not use AVX-512 on processors of other
makers: on a Zen 5 it reached 190 GFLOP/s where oneDNN, which torch carries too, reached 440.
oneDNN is reachable without linking it, through the operator that torch.compile uses for fused
linear layers. So: oneDNN for float32 on CPUs that are not Intel's, if torch has it; everything else
is torch's own choice. Both compute in float32 throughout.

Three traps of it:

- A call costs 12 microseconds instead of 2: a few rows stay with torch.
- It generates code for each new shape, 1.5 milliseconds, and remembers a thousand. Batches have any
  number of tokens; so it gets a multiple of 64 rows, and torch the rest.
- It takes a weight dense or transposed; with any other row stride it falls back to a scalar loop, a
  thousand times slower, so a column slice is copied first, which costs a row of the product's work.
  It does not look at the stride of a bias.
"""

import functools
from pathlib import Path

import torch
from torch import Tensor

_ROWS = 64  # oneDNN gets multiples of it


@functools.cache
def _onednn():
    """torch's operator of oneDNN's linear layer, or None where it is not the better choice."""
    if not torch.backends.mkldnn.is_available() or _is_intel():
        return None
    try:
        return torch.ops.mkldnn._linear_pointwise.default
    except AttributeError:  # a private operator: absent in some builds, and free to go
        return None


def _is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return True


def is_onednns(dtype: torch.dtype) -> bool:
    """Whether products of this type on a CPU go to oneDNN and not to what torch takes."""
    return dtype == torch.float32 and torch.backends.mkldnn.enabled and _onednn() is not None


def explain() -> str:
    """In words, for `fastffn doctor`."""
    if _onednn() is None:
        return "matrix products are torch's"
    return "matrix products are torch's; float32 by oneDNN, since MKL is slow on this processor"


def _is_dense(w: Tensor) -> bool:
    return w.is_contiguous() or w.t().is_contiguous()


def _serves(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN computes x @ weight.T, but for the last rows."""
    if x.device.type != "cpu" or not is_onednns(x.dtype):
        return False
    return x.shape[1] > 0 and weight.shape[0] > 0


def _dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dense = weight if _is_dense(weight) else weight.contiguous()
    return _onednn()(x, dense, None if bias is None else bias.contiguous(), "none", [], "")


def _torch_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return torch.mm(x, weight.t())
    return torch.addmm(bias, x, weight.t())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias.

    Args:
        x: [rows, K], any strides.
        weight: [N, K], any strides (so that `linear(g, w.t())` is g @ w).
        bias: [N] or None.

    Returns:
        [rows, N], contiguous.
    """
    rows = x.shape[0]
    whole = rows & -_ROWS if _serves(x, weight) else 0
    if whole == 0:
        return _torch_linear(x, weight, bias)
    if whole == rows:
        return _dense_linear(x, weight, bias)
    rest = _torch_linear(x[whole:], weight, bias)
    return torch.cat([_dense_linear(x[:whole], weight, bias), rest])


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """grad.T @ x, [N, K], for grad [rows, N] and x [rows, K] with any strides."""
    rows = x.shape[0]
    whole = rows & -_ROWS if _serves(grad, x.t()) else 0
    if whole == 0:
        return torch.mm(grad.t(), x)
    if whole == rows:
        return _dense_linear(grad.t(), x.t(), None)
    product = _dense_linear(grad[:whole].t(), x[:whole].t(), None)
    return product.addmm_(grad[whole:].t(), x[whole:])
