"""Genes: the text that says which feed-forward network one layer has.

    "4x1/2 tanh(down(gelu(up(x))))"              four stacked units, each half as wide as the base
    "1x1/2 down(mul(swish(gate(x)), up(x)))"     gated: two up-projections
    "tanh(linear4_2(gelu(linear4_2(x,wb1)),wb2))"   EfficientBERT's own spelling of the first

`x` is the unit's input, H wide; `up` and `gate` are linear maps H -> I, `down` is linear I -> H,
with I = floor(ratio * base * H). The rest is elementwise. Around the gene every unit adds the
residual: y = LayerNorm(x + Dropout(gene(x))).

A gene splits at its linear maps into three elementwise *segments*, which is all that the kernels
see:

    prologue P(x)  ->  up, gate  ->  middle M(z1, zg, x[:I])  ->  down  ->  epilogue E(z2, x)

Binary operations on unequal widths use the leading columns of the wider operand. Source:
EfficientBERT (arXiv 2109.07222) and its published code; `up`, `down`, `gate`, the base and the
gated form are ours.
"""

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property

from ..errors import ExprError, UserError
from .primitives import primitives
from .tree import Expr

LINEAR = ("up", "gate", "down")
X, Z1, ZG, Z2 = "x", "z1", "zg", "z2"  # inputs of the segments

_HEAD = re.compile(r"\s*(\d+)\s*x\s*(\d+)(?:\s*/\s*(\d+))?")
_LEGACY = re.compile(r"linear([1-9]\d*)_([1-9]\d*)")


@dataclass(frozen=True)
class Segments:
    """The elementwise parts of a gene; a segment that only hands on its input is that input."""

    prologue: Expr  # over x, H wide
    middle: Expr  # over z1, and zg, x where the gene uses them, I wide
    epilogue: Expr  # over z2, and x where the gene uses it, H wide


@dataclass(frozen=True)
class Gene:
    """One layer's feed-forward network.

    Attributes:
        stack: number of units with this function, each with its own weights.
        ratio: inner width over `base` times the hidden width.
        expr: the function of one unit over `x`, with the linear maps as operations.
        base: width over hidden width before the ratio (1 in EfficientBERT, 4 in BERT).

    Raises:
        UserError: a stack or ratio that is not positive.
        ExprError: an expression that the segments cannot express; the reason is said.
    """

    stack: int
    ratio: Fraction
    expr: Expr
    base: int = 1

    def __post_init__(self):
        if self.stack < 1 or self.ratio <= 0 or self.base < 1:
            raise UserError(f"gene {self}: stack, ratio and base must be positive")
        self.segments  # noqa: B018  an inexpressible gene is refused where it is made

    @staticmethod
    def parse(text: str, base: int = 1) -> "Gene":
        """The gene that `text` writes, in the canonical or in EfficientBERT's spelling.

        Raises:
            ExprError: bad syntax, or `up`/`down` missing or repeated, a linear of a linear, or a
                function that the segments cannot express; the message points at the character.
            UserError: a stack or ratio that is not positive.
        """
        head = _HEAD.match(text)
        if head:
            for part, name in ((1, "stack"), (2, "ratio"), (3, "ratio's divisor")):
                if head[part] and int(head[part]) == 0:
                    raise ExprError(f"the {name} must be positive", text, head.start(part))
            if not text[head.end() :].strip():
                raise ExprError("the expression is missing after the widths", text, len(text))
            if not text[head.end()].isspace():
                raise ExprError("a blank is missing after the widths", text, head.end())
            body = " " * head.end() + text[head.end() :]  # positions stay those of `text`
            stack, ratio = int(head[1]), Fraction(int(head[2]), int(head[3] or 1))
        else:
            body, stack, ratio = text, 1, Fraction(1)
        legacy = sorted({match[0] for match in _LEGACY.finditer(body)})
        arity = {name: primitive.arity for name, primitive in primitives().items()}
        arity |= dict.fromkeys(LINEAR, 1) | dict.fromkeys(legacy, 2) | {"linear": 2}
        try:
            expr = Expr.parse(body, arity)
            if legacy or "linear" in {node.op for node in expr.walk()}:
                names = {node.op for node in expr.walk() if node.op in legacy}
                if len(names) > 1:
                    raise ExprError(f"one unit cannot mix {' and '.join(sorted(names))}", text, 0)
                if names and not head:
                    stack, denominator = map(int, _LEGACY.fullmatch(names.pop()).groups())
                    ratio = Fraction(1, denominator)
                expr = _modern(expr, text)
            return Gene(stack, ratio, expr, base)
        except ExprError as error:
            if error.text == text:
                raise
            message = str(error).partition(" (at character")[0]
            position = error.position if error.text == body else _locate(error, text)
            raise ExprError(message, text, position) from None

    def with_(self, **changes) -> "Gene":
        """The gene with some of stack, ratio, expr, base replaced."""
        return replace(self, **changes)

    def __str__(self) -> str:
        return f"{self.stack}x{self.ratio} {self.expr}"

    def width(self, hidden_size: int) -> int:
        """Inner width I = floor(ratio * base * hidden_size).

        Raises:
            UserError: if the width would be 0, or if it is wider than `hidden_size` while the
                function combines x with the inner values (there is no column of x to combine
                with).
        """
        width = int(self.ratio * self.base * hidden_size)
        if width < 1:
            raise UserError(f"gene {self}: hidden size {hidden_size} leaves an inner width of 0")
        if width > hidden_size and X in self.segments.middle.inputs:
            raise UserError(
                f"gene {self}: x has {hidden_size} columns and the inner width is {width}; "
                "take a ratio that makes it no wider than x, or leave x out inside down(...)"
            )
        return width

    @property
    def gated(self) -> bool:
        """Whether there are two up-projections."""
        return ZG in self.segments.middle.inputs

    @cached_property
    def segments(self) -> Segments:
        """The elementwise parts between the linear maps."""
        return _segments(self.expr)

    def canonical(self) -> "Gene":
        """The same gene with the operands of its binary operations in one order."""
        return replace(self, expr=self.expr.canonical())

    def fingerprint(self) -> str:
        """Equal for genes equal in stack, ratio, base and as functions; see `Expr.fingerprint`."""
        from .evaluate import digest, evaluate_gene

        return f"{self.stack}x{self.ratio}x{self.base}-{digest(evaluate_gene(self))}"


def _modern(expr: Expr, text: str) -> Expr:
    """EfficientBERT's linear(tensor, wb1|wb2) as up(tensor), down(tensor)."""
    if expr.is_leaf:
        if expr.name in ("wb1", "wb2"):
            raise ExprError(
                f"{expr.name} must be the second operand of a linear", text, text.find(expr.name)
            )
        return expr
    if expr.op == "linear" or _LEGACY.fullmatch(expr.op):
        weight = expr.args[1].name
        if weight not in ("wb1", "wb2"):
            raise ExprError(
                "the second operand of a linear is wb1 or wb2", text, text.find(expr.op)
            )
        return Expr.call("up" if weight == "wb1" else "down", _modern(expr.args[0], text))
    return Expr(expr.op, tuple(_modern(arg, text) for arg in expr.args))


def _locate(error: ExprError, text: str) -> int:
    """Position in `text` of the operation that an error about the printed expression points at."""
    word = re.match(r"\w*", error.text[error.position :])[0]
    count = len(re.findall(rf"\b{word}\b", error.text[: error.position]))
    spellings = {"up": r"up|linear\w*(?=\(.*wb1)", "down": r"down|linear\w*"}
    found = [m.start() for m in re.finditer(rf"\b(?:{spellings.get(word, word)})\b", text)]
    return found[min(count, len(found) - 1)] if found else 0


def _segments(expr: Expr) -> Segments:
    """Splits `expr` at its linear maps; raises ExprError at the operation that forbids it."""
    text = str(expr)

    def fail(message: str, word: str, occurrence: int = 0) -> ExprError:
        places = [match.start() for match in re.finditer(rf"\b{word}\b", text)]
        return ExprError(message, text, places[min(occurrence, len(places) - 1)] if places else 0)

    unknown = [name for name in expr.inputs if name != X]
    if unknown:
        raise fail(f"{unknown[0]!r} is unknown here: the only input of a gene is x", unknown[0])
    nodes = list(expr.walk())
    linears = {name: [node for node in nodes if node.op == name] for name in LINEAR}
    for name in ("up", "down"):
        if not linears[name]:
            raise fail(f"{name}(...) is missing: a gene needs up(...) and down(...)", "", 0)
    for name in LINEAR:
        if len(linears[name]) > 1:
            raise fail(f"{name} stands more than once: it has one set of weights", name, 1)

    (up,), (down,) = linears["up"], linears["down"]
    gate = linears["gate"][0] if linears["gate"] else None
    inside = list(down.walk())
    for node in filter(None, (up, gate)):
        if node not in inside:
            raise fail(f"{node.op} must stand inside down(...)", node.op)
        if any(child.op in LINEAR for child in node.args[0].walk()):
            raise fail("a linear map cannot hold another one without down around it", node.op)
    if gate is not None and gate.args != up.args:
        raise fail("gate and up must take the same argument: they are one matrix product", "gate")
    if down.args[0].op in ("up", "gate"):
        raise fail(
            "a linear of a linear is one linear: put an operation between up and down", "down"
        )

    x = Expr.leaf(X)
    middle = _replace(down.args[0], {up: Expr.leaf(Z1), gate: Expr.leaf(ZG)})
    if not {Z1} <= set(middle.inputs):
        raise fail("up is missing inside down(...)", "down")
    epilogue = _replace(expr, {down: Expr.leaf(Z2)})
    return Segments(prologue=up.args[0].substitute({X: x}), middle=middle, epilogue=epilogue)


def _replace(expr: Expr, by: dict[Expr | None, Expr]) -> Expr:
    if expr in by:
        return by[expr]
    return Expr(expr.op, tuple(_replace(arg, by) for arg in expr.args), expr.name)


PLAIN = Gene.parse("1x1 down(gelu(up(x)))")

# EfficientBERT's search result, layer 1 to 6 (used unchanged for its tiny, base and ++ sizes).
PUBLISHED = tuple(
    Gene.parse(text)
    for text in (
        "4x1/2 tanh(down(gelu(up(x))))",
        "2x1 elu(down(gelu(up(x))))",
        "1x1/2 sigmoid(down(relu(up(x))))",
        "2x1/2 down(gelu(up(max(x, tanh(x)))))",
        "1x1/2 down(relu(mul(up(x), x)))",
        "2x1/3 leaky_relu(down(gelu(up(x))))",
    )
)
