"""The feed-forward unit in plain torch: the oracle of `ffn`, and its stand-in under transforms."""

from torch import Tensor
from torch.nn import functional as F

from ..expr import Gene
from ..expr.genes import Z1, Z2, ZG, X
from . import reference, residual_norm_reference
from .elementwise import constant_result


@constant_result
def _segments(gene: str) -> tuple[reference.Postfix, ...]:
    parts = Gene.parse(gene).segments
    return tuple(map(reference.postfix, (parts.prologue, parts.middle, parts.epilogue)))


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

    Every elementwise part is torch's own functions, differentiable as often as they are, and so is
    dropout without a seed.
    """
    prologue, middle, epilogue = _segments(gene)

    def leading(vector: Tensor | None) -> Tensor | None:
        return None if vector is None else vector[:width]

    p = reference.evaluate(prologue, {X: x})
    inputs = {Z1: F.linear(p, up[:width], leading(up_bias)), X: x[..., :width]}
    if gate is not None:
        inputs[ZG] = F.linear(p, gate[:width], leading(gate_bias))
    a = reference.evaluate(middle, inputs)
    z2 = F.linear(a, down[:, :width], down_bias)
    value = reference.evaluate(epilogue, {Z2: z2, X: x})
    if seed is None:
        value = F.dropout(value, dropout) if dropout > 0 else value
        dropout, seed = 0.0, 0
    return residual_norm_reference.residual_norm(
        value, x, norm_weight, norm_bias, dropout, eps, seed
    )
