"""FLOP counts of the ops for torch.utils.flop_counter: the matrix products, as torch counts."""

import math

import torch
from torch.utils.flop_counter import register_flop_formula

from . import hidden_mse as _hidden_mse  # noqa: F401  its op must be there
from . import relation as _relation  # noqa: F401


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


def _projection(student, weight) -> int:
    """Every token counts: how many are real is not to be seen in a shape."""
    if weight is None:
        return 0
    *rows, _ = student
    return 2 * math.prod(rows) * math.prod(weight)


@register_flop_formula(torch.ops.fastffn.hidden_mse)
def hidden_mse(student, teacher, weight, bias, real, out_shape=None, **_) -> int:
    return _projection(student, weight)


@register_flop_formula(torch.ops.fastffn.hidden_mse_forward)
def hidden_mse_forward(student, teacher, weight, bias, real, wanted, out_shape=None, **_) -> int:
    """The projection, and the products of the gradients, which are made with it."""
    return _projection(student, weight) * (1 + wanted[0] + wanted[1])


def _maps(a, teacher_a) -> tuple[int, int]:
    """Scores of both models, and one product of the student's maps with its tokens."""
    batch, length, width = a
    per_column = 2 * batch * length * length
    return per_column * (width + teacher_a[-1]), per_column * width


@register_flop_formula(torch.ops.fastffn.relation)
def relation(a, b, teacher_a, teacher_b, real, weights, heads, *settings, out_shape=None, **_):
    return _maps(a, teacher_a)[0]


@register_flop_formula(torch.ops.fastffn.relation_forward)
def relation_forward(a, b, teacher_a, teacher_b, real, weights, heads, temperature, divergence,
                     wanted, out_shape=None, **_) -> int:  # fmt: skip
    """With weights: the gradients too, although on CUDA the backward makes them."""
    scores, product = _maps(a, teacher_a)
    return scores + (0 if weights is None else sum(wanted) * product)


@register_flop_formula(torch.ops.fastffn.relation_backward)
def relation_backward(a, b, teacher_a, teacher_b, real, weights, kept, heads, temperature,
                      divergence, wanted, out_shape=None, **_) -> int:  # fmt: skip
    scores, product = _maps(a, teacher_a)
    return scores + sum(wanted) * product
