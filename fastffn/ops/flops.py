"""FLOP counts of the ops for torch.utils.flop_counter: the matrix products, as torch counts."""

import torch
from torch.utils.flop_counter import register_flop_formula


def _products(x, gate, widths) -> tuple[int, int]:
    """The first product, and the second products of all genes."""
    *rows, hidden = x
    count = 1
    for size in rows:
        count *= size
    first = 2 * count * hidden * max(widths) * (1 if gate is None else 2)
    return first, 2 * count * hidden * sum(widths)


@register_flop_formula([torch.ops.fastffn.ffn, torch.ops.fastffn.ffn_forward])
def ffn(x, up, up_bias, gate, gate_bias, down, down_bias, norm_weight, norm_bias, seed, genes,
        widths, *settings, out_shape=None, **_) -> int:  # fmt: skip
    first, second = _products(x, gate, widths)
    return first + second


@register_flop_formula(torch.ops.fastffn.ffn_backward)
def ffn_backward(grads, kept, x, up, up_bias, gate, gate_bias, down, down_bias, norm_weight,
                 norm_bias, seed, genes, widths, dropout, eps, recompute, wants_x, wants_weights,
                 out_shape=None, **_) -> int:  # fmt: skip
    first, second = _products(x, gate, widths)
    again = first + second if recompute == "all" else 0
    weights = first + second if wants_weights else 0
    return again + second + weights + (first if wants_x else 0)
