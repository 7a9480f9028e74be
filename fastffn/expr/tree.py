"""Expressions as trees: parse, print, put into canonical order, identify by meaning.

An `Expr` is an input (`x`) or a primitive applied to expressions (`mul(gelu(a), sigmoid(b))`). It
is immutable and compared by structure, so equal subtrees are common subexpressions wherever an
`Expr` is a dictionary key. Nothing here computes on tensors: that is `program` and the executors.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from ..errors import ExprError
from .primitives import COMMUTATIVE, primitives

MAX_HEIGHT = 32  # deeper than any searched or published gene; bounds the recursion of every pass

_TOKEN = re.compile(r"\s*(?:([A-Za-z_][A-Za-z0-9_]*)|(\S))")
_INPUT = "input"


@dataclass(frozen=True)
class Expr:
    """A node: `op` applied to `args`, or the input called `name` (then op is "input")."""

    op: str
    args: tuple["Expr", ...] = ()
    name: str = ""

    @staticmethod
    def leaf(name: str) -> "Expr":
        """The input called `name`."""
        return Expr(_INPUT, (), name)

    @staticmethod
    def call(op: str, *args: "Expr") -> "Expr":
        """`op` applied to `args`; unchecked, for code that builds trees it knows to be right."""
        return Expr(op, args)

    @staticmethod
    def parse(text: str, arity: Mapping[str, int] | None = None) -> "Expr":
        """The expression that `text` writes in call syntax.

        Args:
            text: such as "max(swish(a), tanh(b))"; any other identifier without "(" is an input.
            arity: operand count of each operation; the table of primitives unless given.

        Raises:
            ExprError: unknown operation, wrong number of operands, unbalanced or empty text, or
                more than `MAX_HEIGHT` levels; the message points at the character.
        """
        if arity is None:
            arity = {name: primitive.arity for name, primitive in primitives().items()}
        return _Parser(text, arity).parse()

    @property
    def is_leaf(self) -> bool:
        return self.op == _INPUT

    def __str__(self) -> str:
        return self._text

    @cached_property
    def _text(self) -> str:  # kept, like the hash: every call of an op names its expression
        return self.name if self.is_leaf else f"{self.op}({', '.join(map(str, self.args))})"

    def __reduce__(self):  # without what is kept: the hash of a text differs between processes
        return Expr, (self.op, self.args, self.name)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:  # kept: a tree is hashed at each of its levels otherwise
        return hash((self.op, self.name, self.args))

    @cached_property
    def height(self) -> int:
        """Levels of operations above the deepest input; 0 for an input."""
        return 1 + max(arg.height for arg in self.args) if self.args else 0

    def walk(self) -> Iterator["Expr"]:
        """Every node, operands before operations; repeated subtrees as often as they stand."""
        for arg in self.args:
            yield from arg.walk()
        yield self

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs, in order of first appearance."""
        return tuple(dict.fromkeys(node.name for node in self.walk() if node.is_leaf))

    def substitute(self, leaves: Mapping[str, "Expr"]) -> "Expr":
        """The expression with each named input replaced."""
        if self.is_leaf:
            return leaves.get(self.name, self)
        return Expr(self.op, tuple(arg.substitute(leaves) for arg in self.args))

    def canonical(self) -> "Expr":
        """The same function with the operands of add, mul, max sorted by text; max(a, a) is a."""
        args = tuple(arg.canonical() for arg in self.args)
        if len(args) == 2 and args[0] == args[1] and self.op == "max":
            return args[0]
        if self.op in COMMUTATIVE:
            args = tuple(sorted(args, key=str))
        return Expr(self.op, args, self.name)

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that are equal for expressions equal as functions.

        The inputs keep their names (gelu(a) is not gelu(b)); equality is judged on fixed samples,
        to six significant digits.
        """
        from .evaluate import expression_fingerprint

        return expression_fingerprint(self)


class _Parser:
    """Recursive descent over `name` and `name(arg, ...)`."""

    def __init__(self, text: str, arity: Mapping[str, int]):
        self.text = text
        self.arity = arity
        self.tokens = [
            (match[1] or match[2], match.start(1) if match[1] else match.start(2))
            for match in _TOKEN.finditer(text)
            if match[1] or match[2]
        ]
        self.index = 0

    def fail(self, message: str, position: int | None = None) -> ExprError:
        if position is None:
            position = self.peek()[1]
        return ExprError(message, self.text, position)

    def peek(self) -> tuple[str, int]:
        return self.tokens[self.index] if self.index < len(self.tokens) else ("", len(self.text))

    def take(self) -> tuple[str, int]:
        token = self.peek()
        self.index += 1
        return token

    def parse(self) -> Expr:
        if not self.tokens:
            raise self.fail("the expression is empty: write one such as gelu(x)")
        expr = self.expression(0)
        token, _ = self.peek()
        if token == ")":
            raise self.fail("this ')' closes nothing")
        if token:
            raise self.fail(f"the expression ended before {token!r}")
        return expr

    def expression(self, level: int) -> Expr:
        name, position = self.take()
        if not (name[:1].isalpha() or name[:1] == "_"):
            found = repr(name) if name else "the end"
            raise self.fail(f"an input or an operation is missing before {found}", position)
        if self.peek()[0] != "(":
            if name in self.arity:
                raise self.fail(f"{name} is an operation: it needs operands, {name}(...)", position)
            return Expr.leaf(name)
        if name not in self.arity:
            raise self.fail(f"unknown operation {name!r}; known: {', '.join(self.arity)}", position)
        if level >= MAX_HEIGHT:
            raise self.fail(f"nested more than {MAX_HEIGHT} levels deep", position)
        args = self.operands(level + 1)
        if len(args) != self.arity[name]:
            wants = self.arity[name]
            raise self.fail(
                f"{name} takes {wants} operand{'s' * (wants > 1)}, not {len(args)}", position
            )
        return Expr(name, tuple(args))

    def operands(self, level: int) -> list[Expr]:
        _, opened = self.take()
        if self.peek()[0] == ")":
            self.take()
            return []
        args = [self.expression(level)]
        while True:
            token, position = self.take()
            if token == ")":
                return args
            if token == "":
                raise self.fail("this '(' is never closed", opened)
            if token != ",":
                raise self.fail(f"',' or ')' is missing before {token!r}", position)
            args.append(self.expression(level))
