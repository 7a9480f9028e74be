"""The feed-forward unit in plain torch: the oracle of `ffn`, and its stand-in under transforms."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..expr import Gene
from ..expr.genes import Z1, Z2, ZG, X
from . import reference, residual_norm_reference


def ffn(
    x: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    seed: Tensor | None,
    gene: str,
    width: int,
    dropout: float,
    eps: float,
) -> Tensor:
    """y [.., H] of one unit of `gene` with the leading `width` intermediate columns.

    Every elementwise part is torch's own functions, differentiable as often as they are.
    """
    parts = Gene.parse(gene).segments

    def leading(vector: Tensor | None) -> Tensor | None:
        return None if vector is None else vector[:width]

    p = reference.elementwise(parts.prologue, {X: x})
    inputs = {Z1: F.linear(p, up[:width], leading(up_bias)), X: x[..., :width]}
    if gate is not None:
        inputs[ZG] = F.linear(p, gate[:width], leading(gate_bias))
    a = reference.elementwise(parts.middle, inputs)
    z2 = F.linear(a, down[:, :width], down_bias)
    value = reference.elementwise(parts.epilogue, {Z2: z2, X: x})
    seed = torch.zeros((), dtype=torch.int64) if seed is None else seed
    return residual_norm_reference.residual_norm(
        value, x, norm_weight, norm_bias, dropout, eps, seed
    )
