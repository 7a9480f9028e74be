"""Expressions on plain Python numbers: enough to tell two of them apart by what they compute.

A search meets the same function in many spellings (mul(a, b) and mul(b, a), relu(relu(x)), a gelu
that feeds a max with itself). Evaluating on a few fixed samples and hashing the rounded results
finds them without algebra; it needs neither torch nor a build.
"""

import hashlib
import math
import operator
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache

from .primitives import opcode, primitives
from .tree import Expr

_SAMPLES = 24


def _where(condition, then, otherwise):
    return then if condition else otherwise


def _guarded(function, overflow):
    def call(value):
        try:
            return function(value)
        except OverflowError:
            return overflow

    return call


_exp = _guarded(math.exp, math.inf)
_NUMBERS = {
    "where": _where,
    "maximum": lambda a, b: a if a != a or a > b else b,
    "exp": _exp,
    "expm1": _guarded(math.expm1, math.inf),
    "tanh": math.tanh,
    "erf": math.erf,
    "sigmoid": lambda a: 1.0 / (1.0 + _exp(-a)),
}


def formula(name: str, functions: Mapping[str, Callable]) -> Callable:
    """The opcode's formula as a Python function of its operands, over the given functions."""
    op = opcode(name)
    body = re.sub(r"\bC\(([^()]*)\)", r"\1", op.formula)
    return eval(f"lambda {', '.join(op.operands)}: {body}", {"__builtins__": {}, **functions})


@cache
def _function(name: str) -> Callable:
    return formula(name, _NUMBERS)


def apply(op: str, *values: float) -> float:
    """The primitive `op` on numbers (double precision)."""
    if primitives()[op].kind == "GATED":
        values = (*values, _function(f"{op}.t")(*values))
    elif primitives()[op].kind == "UNARY":
        values = values[:1]
    return _function(op)(*values)


def evaluate(expr: Expr, inputs: Mapping[str, float]) -> float:
    """The value of `expr` where each input has the given number."""
    if expr.is_leaf:
        return inputs[expr.name]
    return apply(expr.op, *(evaluate(arg, inputs) for arg in expr.args))


def digest(values: Iterable[float]) -> str:
    """Sixteen hexadecimal digits of the values rounded to six significant digits."""
    text = ",".join(f"{value + 0.0:.5e}" for value in values)
    return hashlib.sha256(text.replace("-0.00000e+00", "0.00000e+00").encode()).hexdigest()[:16]


@cache
def samples(name: str, count: int) -> Sequence[float]:
    """Fixed samples for the input called `name`: normal, with a wide tail."""
    generator = random.Random(f"fastffn {name}")
    return tuple(generator.gauss(0, 1) * (3 if i % 4 == 0 else 1) for i in range(count))


def expression_fingerprint(expr: Expr) -> str:
    """See `Expr.fingerprint`."""
    columns = {name: samples(name, _SAMPLES) for name in expr.inputs}
    rows = ({name: column[i] for name, column in columns.items()} for i in range(_SAMPLES))
    return digest(evaluate(expr, row) for row in rows)


def evaluate_gene(gene, hidden_size: int = 12, rows: int = 4) -> list[float]:
    """One unit of `gene` (without residual and LayerNorm) on fixed rows, with fixed linear maps.

    The hidden size is small but divisible by 1, 2, 3 and 4, so that the ratios of the published
    space have widths of their own.
    """
    width = max(1, int(gene.ratio * gene.base * hidden_size))
    if "x" in gene.segments.middle.inputs:
        width = min(width, hidden_size)
    shape = {"up": (width, hidden_size), "gate": (width, hidden_size), "down": (hidden_size, width)}
    maps = {name: _fixed_map(name, *size) for name, size in shape.items()}

    def run(node: Expr, x: list[float]) -> list[float]:
        if node.is_leaf:
            return x
        args = [run(arg, x) for arg in node.args]
        if node.op in maps:
            return [
                sum(map(operator.mul, line, args[0]), start=bias) for line, bias in maps[node.op]
            ]
        return [apply(node.op, *values) for values in zip(*args, strict=False)]

    flat = samples("x", rows * hidden_size)
    inputs = [list(flat[i * hidden_size : (i + 1) * hidden_size]) for i in range(rows)]
    return [value for x in inputs for value in run(gene.expr, x)]


@cache
def _fixed_map(name: str, rows: int, columns: int) -> list[tuple[list[float], float]]:
    """Weights and biases of a linear map that is the same in every process."""
    generator = random.Random(f"fastffn map {name}")
    scale = columns**-0.5
    return [
        ([generator.gauss(0, scale) for _ in range(columns)], generator.gauss(0, 0.1))
        for _ in range(rows)
    ]
