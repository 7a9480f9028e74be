"""Matrix products of the feed-forward block: torch's, by the library that is fast on this
processor.

In float32 on a CPU torch multiplies by MKL, which does not use AVX-512 on processors of other
makers: on a Zen 5 it reached 190 GFLOP/s where oneDNN, which torch carries too, reached 440.
oneDNN is reachable without linking it, through the operator that torch.compile uses for fused
linear layers.
So: oneDNN for float32 on CPUs that are not Intel's, if torch has it; everything else is torch's own
choice. Both compute in float32 throughout.

It has a price: 12 microseconds a call instead of 2, so a handful of rows stays with torch. oneDNN
takes the weight dense or transposed; on one with any other row stride it falls back to a
scalar loop (a thousand times slower), so a column slice is copied first, which costs a row of the
product's work.
"""

import functools
from pathlib import Path

import torch
from torch import Tensor

_MIN_ROWS = 16


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


def explain() -> str:
    """In words, for `fastffn doctor`."""
    if _onednn() is None:
        return "matrix products are torch's"
    return "matrix products are torch's; float32 by oneDNN, since MKL is slow on this processor"


def _is_dense(w: Tensor) -> bool:
    return w.is_contiguous() or w.t().is_contiguous()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias.

    Args:
        x: [rows, K], any strides.
        weight: [N, K], any strides (so that `linear(g, w.t())` is g @ w).
        bias: [N] or None.

    Returns:
        [rows, N], contiguous.
    """
    big = x.shape[0] >= _MIN_ROWS and x.shape[1] > 0 and weight.shape[0] > 0
    if big and x.dtype == torch.float32 and x.device.type == "cpu":
        run = _onednn()
        if run is not None and torch.backends.mkldnn.enabled:
            dense = weight if _is_dense(weight) else weight.contiguous()
            if bias is not None:
                bias = bias.contiguous()  # its stride would be ignored
            return run(x, dense, bias, "none", [], "")
    if bias is None:
        return torch.mm(x, weight.t())
    return torch.addmm(bias, x, weight.t())
