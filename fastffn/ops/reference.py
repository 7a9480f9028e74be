"""Elementwise expressions in plain torch: the oracle of every other executor, and the fallback.

Each primitive is one of torch's own functions, *not* the formula of the table, so that a wrong
formula is caught. The gradients are torch's autograd through them.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ..expr import Expr

PRIMITIVES = {
    "add": torch.add,
    "mul": torch.mul,
    "max": torch.maximum,
    "relu": torch.relu,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "swish": F.silu,
    "gelu": partial(F.gelu, approximate="tanh"),
    "gelu_erf": F.gelu,
}


def elementwise(expr: Expr, inputs: Mapping[str, Tensor]) -> Tensor:
    """The value of `expr` over tensors that broadcast; differentiable, one kernel an operation."""
    if expr.is_leaf:
        return inputs[expr.name]
    return PRIMITIVES[expr.op](*(elementwise(arg, inputs) for arg in expr.args))
