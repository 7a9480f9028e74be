"""The bare matrix products of a model: about what no runtime of it goes below, and so a ceiling.

The products of its linear layers are noted in one forward of a few tokens, whatever the
architecture, and run again with as many rows as a workload has tokens: each with weights of its
own, as large as the model's, so that they come from the same caches or the same memory. The ratio
of two models' products is about what the one can be faster than the other when both run perfectly.

On a CPU they run in oneDNN, on weights in the layout that it likes best: the fastest that torch
has. At few rows better ones are possible, so a small batch may be faster than its products.

Attention's own products are left out: they are few at these lengths, and fused attention never
computes them as such.
"""

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..ops import backend

_TOKENS = 8  # of the forward that is looked at


class _Shapes(TorchDispatchMode):
    """Notes (rows, inner width, columns) of every product of two matrices."""

    def __init__(self):
        super().__init__()
        self.found: list[tuple[int, int, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        if func in (aten.mm.default, aten.addmm.default):
            x, w = args[-2:]
            self.found.append((x.shape[0], x.shape[1], w.shape[1]))
        elif func is aten.linear.default:
            x, w = args[:2]
            self.found.append((x[..., 0].numel(), x.shape[-1], w.shape[0]))
        return func(*args, **(kwargs or {}))


def shapes(model: nn.Module) -> list[tuple[float, int, int]]:
    """(rows for each token, inner width, columns) of each product of a forward, in its order."""
    device = next(model.parameters()).device
    ids = torch.full((1, _TOKENS), model.config.vocab_size // 2, device=device)
    with torch.no_grad(), backend.portable(), _Shapes() as noted:
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return [(rows / _TOKENS, inner, columns) for rows, inner, columns in noted.found]


class Products:
    """Runs the products of one forward of `tokens`.

    Args:
        found: of `shapes`.
        dtype, device: of the operands.
    """

    def __init__(
        self, found: Sequence[tuple[float, int, int]], dtype: torch.dtype, device: str = "cpu"
    ):
        self.found = found
        weights = [
            torch.randn(columns, inner, device=device).to(dtype) for _, inner, columns in found
        ]
        self.products = [_product(weight) for weight in weights]
        self.dtype, self.device = dtype, device
        self.inputs: dict[tuple[int, int], Tensor] = {}

    def __call__(self, tokens: int) -> None:
        for (rows, inner, _), product in zip(self.found, self.products, strict=True):
            place = (max(1, round(rows * tokens)), inner)
            if place not in self.inputs:
                self.inputs[place] = torch.randn(place, device=self.device).to(self.dtype)
            product(self.inputs[place])


def _product(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """x -> x weight^T, by the library that is fastest for it."""
    if weight.device.type == "cpu" and torch.backends.mkldnn.is_available():
        # Private operators, which may go: then the weight stays as it is.
        with contextlib.suppress(AttributeError, RuntimeError):
            packed = torch.ops.mkldnn._reorder_linear_weight(weight)
            run = torch.ops.mkldnn._linear_pointwise.default
            run(weight.new_zeros(1, weight.shape[1]), packed, None, "none", [], "")
            return lambda x: run(x, packed, None, "none", [], "")
    transposed = weight.t()
    return lambda x: torch.mm(x, transposed)
