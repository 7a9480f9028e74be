"""What one unit function is made of, as Programs: derived once per gene text.

p = prologue(x)    z1, zg = up(p), gate(p)    a = middle(z1, zg, x[:, :I])
z2 = down(a)       y = LayerNorm(x + dropout(epilogue(z2, x)))
"""

import functools
from dataclasses import dataclass, replace

from ..expr import Expr, Gene, Program
from ..expr.genes import Z1, Z2, ZG, X
from ..expr.program import backward_program, forward_program
from .execute import Pass

COPY = Pass(forward_program(Expr.leaf(Z1)))
COPY_GRADIENT = Pass(backward_program(Expr.leaf(Z1)))
ADD = Pass(forward_program(Expr.call("add", Expr.leaf(Z1), Expr.leaf(X))))


class Segment:
    """One elementwise part: its value and gradients as Programs.

    Args:
        expr: the part.
        order: of the inputs, as far as the expression has them.
        adds: whether the gradient of x is added to an operand instead of standing alone.
    """

    def __init__(self, expr: Expr, order: tuple[str, ...], adds: bool):
        self.expr = expr
        self.inputs = tuple(name for name in order if name in expr.inputs)
        self.reads_x = X in self.inputs
        self._added_to = (X,) if adds and self.reads_x else ()
        self._with_inputs: dict[int, Program] = {}

    def __str__(self) -> str:
        return str(self.expr)

    @functools.cached_property
    def value(self) -> Pass:
        """Over `inputs`."""
        return Pass(forward_program(self.expr, self.inputs))

    @functools.cached_property
    def gradient(self) -> Pass:
        """Of all inputs, over (upstream gradient, *inputs[, what that of x is added to])."""
        return Pass(self._gradient())

    @functools.cached_property
    def gradient_and_value(self) -> Pass:
        """As `gradient`, with the value as one more output: they share most of the work."""
        return Pass(self._gradient(value=True))

    def value_and_inputs(self, count: int) -> Program:
        """The value, then the first `count` inputs as they are: a product that is kept."""
        if count not in self._with_inputs:  # one object each: the kernels know Programs by identity
            program = self.value.program
            outputs = (*program.outputs, *range(count))
            self._with_inputs[count] = replace(program, outputs=outputs)
        return self._with_inputs[count]

    def _gradient(self, value: bool = False) -> Program:
        return backward_program(self.expr, self.inputs, self._added_to, self.inputs, value)


@dataclass(frozen=True)
class Plan:
    """The segments of one gene's unit; `prologue` is None where the product takes x itself."""

    gated: bool
    prologue: Segment | None
    middle: Segment
    epilogue: Segment


@functools.lru_cache(maxsize=4096)
def plan(text: str) -> Plan:
    """Of a unit's text such as "tanh(down(gelu(up(x))))"; raises ExprError as `Gene.parse` does."""
    gene = Gene.parse(text)
    parts = gene.segments
    return Plan(
        gene.gated,
        None if parts.prologue.is_leaf else Segment(parts.prologue, (X,), adds=True),
        Segment(parts.middle, (Z1, ZG, X), adds=True),
        Segment(parts.epilogue, (Z2, X), adds=False),
    )
