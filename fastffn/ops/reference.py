"""Elementwise expressions in plain torch: the oracle of every other executor, and the fallback.

`elementwise` is the oracle: each primitive is one of torch's own functions, *not* the formula of
the table, so that a wrong formula is caught, and the gradients are torch's autograd through them.

`run` executes a Program, formula by formula, where no other executor can: below autograd there is
no autograd to ask for a gradient.
"""

from collections.abc import Mapping, Sequence
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ..expr import Expr, Program
from ..expr.evaluate import formula

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


Postfix = tuple[tuple[str, int], ...]


def postfix(expr: Expr) -> Postfix:
    """`expr` in postfix notation: (operation, number of operands), or (name of an input, 0).

    torch.compile traces `evaluate` over it, and cannot trace a walk over the tree.
    """
    if expr.is_leaf:
        return ((expr.name, 0),)
    return (*(part for arg in expr.args for part in postfix(arg)), (expr.op, len(expr.args)))


def evaluate(steps: Postfix, inputs: Mapping[str, Tensor]) -> Tensor:
    """The value of `postfix(expr)`, as `elementwise` gives it."""
    values: list[Tensor] = []
    for name, count in steps:
        if count == 0:
            values.append(inputs[name])
        else:
            operands = [values.pop() for _ in range(count)]
            values.append(PRIMITIVES[name](*reversed(operands)))
    return values[0]


def elementwise(expr: Expr, inputs: Mapping[str, Tensor]) -> Tensor:
    """The value of `expr` over tensors that broadcast; differentiable, one kernel an operation."""
    return evaluate(postfix(expr), inputs)


def _maximum(a: Tensor, b: Tensor | float) -> Tensor:
    return torch.maximum(a, b if isinstance(b, Tensor) else torch.full_like(a, b))


@cache
def _function(op: str):
    names = ("where", "exp", "expm1", "tanh", "erf", "sigmoid")
    functions = {name: getattr(torch, name) for name in names}
    return formula(op, {**functions, "maximum": _maximum})


def run(program: Program, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of a Program in single assignment, over tensors that broadcast."""
    registers = list(inputs)
    for instruction in program.instructions:
        function = _function(instruction.op)
        sources = instruction.sources[: function.__code__.co_argcount]
        registers.append(function(*(registers[source] for source in sources)))
    return [registers[output] for output in program.outputs]
