"""The functions of one unit: which are allowed, random ones, and small changes to them.

A function is handled as its three segments (`expr.genes.Segments`), each a tree over leaves: the
prologue over x; the middle over z1, zg and x; the epilogue over z2 and x. The leaves z1, zg and z2
stand exactly once, x as often as it likes. So every random tree and every change is well typed by
construction, and what remains to be checked are EfficientBERT's rules (arXiv 2109.07222): no
activation directly on an activation, no binary operation on two equal operands, a window of
heights.

Why not genetic programming on the whole tree, as the original has it: there most changes tear one
of the two linear maps out or double it, and the sampler spends its time on throwing them away.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, lru_cache
from random import Random

from ..expr import PRIMITIVES, Expr, Gene, Segments

X, Z1, ZG, Z2 = (Expr.leaf(name) for name in ("x", "z1", "zg", "z2"))
SEGMENTS = ("prologue", "middle", "epilogue")
LINEARS = 2  # levels that the linear maps take from the height

_TRIES = 200
_STOP = 0.35  # chance that a growing tree ends where it may
_BINARY = 0.4  # chance of a binary operation where both kinds fit


def assemble(segments: Segments) -> Expr:
    """The gene's expression whose segments these are."""
    maps = {
        "z1": Expr.call("up", segments.prologue),
        "zg": Expr.call("gate", segments.prologue),
    }
    down = Expr.call("down", segments.middle.substitute(maps))
    return segments.epilogue.substitute({"z2": down})


def plain(gated: bool = False) -> Segments:
    """The function that stands for all of its kind: gelu, or swish of the gate times the other."""
    middle = Expr.call("mul", Expr.call("swish", ZG), Z1) if gated else Expr.call("gelu", Z1)
    return Segments(X, middle, Z2)


def places(expr: Expr, path: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Expr]]:
    """Every node with the operand numbers that lead to it from the root."""
    yield path, expr
    for index, arg in enumerate(expr.args):
        yield from places(arg, (*path, index))


def put(expr: Expr, path: tuple[int, ...], new: Expr) -> Expr:
    """`expr` with the node at `path` replaced."""
    if not path:
        return new
    args = list(expr.args)
    args[path[0]] = put(args[path[0]], path[1:], new)
    return Expr.call(expr.op, *args)


def _linear_leaves(expr: Expr) -> tuple[Expr, ...]:
    """The leaves that must stand exactly once, in order."""
    return tuple(node for node in expr.walk() if node.is_leaf and node != X)


def _equal(first: Expr, second: Expr) -> bool:
    """Whether two expressions without equal operands inside them differ in order alone."""
    return first.height == second.height and first.canonical() == second.canonical()


@dataclass(frozen=True)
class Grammar:
    """What functions a space allows.

    Attributes:
        primitives: names of the elementwise operations.
        heights: least and greatest height of the whole expression, linear maps included.
        max_nodes: most nodes of the whole expression.
    """

    primitives: tuple[str, ...]
    heights: tuple[int, int]
    max_nodes: int

    @cached_property
    def unary(self) -> tuple[str, ...]:
        return tuple(name for name in self.primitives if PRIMITIVES[name].arity == 1)

    @cached_property
    def binary(self) -> tuple[str, ...]:
        return tuple(name for name in self.primitives if PRIMITIVES[name].arity == 2)

    def problem(self, expr: Expr) -> str | None:
        """Why the rules forbid this function, or None. Expects the expression of a `Gene`."""
        low, high = self.heights
        if not low <= expr.height <= high:
            return f"its height {expr.height} is outside {low} to {high}"
        nodes = list(expr.walk())
        if len(nodes) > self.max_nodes:
            return f"it has {len(nodes)} nodes, more than {self.max_nodes}"
        for node in nodes:
            if node.op not in PRIMITIVES:
                continue
            if node.op not in self.primitives:
                return f"{node.op} is not among the primitives ({', '.join(self.primitives)})"
            if len(node.args) == 1 and node.args[0].op in self.unary:
                return f"{node.op} stands directly on {node.args[0].op}"
            if len(node.args) == 2 and _equal(*node.args):
                return f"both operands of {node.op} are {node.args[0]}"
        return None

    def random(self, rng: Random, gated: bool = False, narrow: bool = True) -> Expr | None:
        """A random function, or None if none was found.

        Args:
            gated: with two up-projections.
            narrow: whether the inner width is at most the hidden width, so that x may stand inside.
        """
        inner = (Z1, ZG) if gated else (Z1,)
        heights = list(range(max(self.heights[0], LINEARS + 1), self.heights[1] + 1))
        rng.shuffle(heights)  # each height is as likely as another, where chance finds one
        for height in heights:
            for _ in range(_TRIES):
                levels = [0, 1, 0]  # the operation between up and down is the one that must be
                for _ in range(height - LINEARS - 1):
                    levels[rng.randrange(3)] += 1
                parts = (
                    self._grow(rng, (), True, levels[0], full=True),
                    self._grow(rng, inner, narrow, levels[1], full=True),
                    self._grow(rng, (Z2,), True, levels[2], full=True),
                )
                expr = self._whole(parts)
                if expr is not None and expr.height == height:
                    return expr
        return None

    def mutate(self, expr: Expr, rng: Random, narrow: bool = True) -> Expr | None:
        """A function one change away: another subtree, another operation, one more or one less."""
        segments, before = _segments(expr), expr.canonical()
        changes = (self._subtree, self._node, self._insert, self._shrink)
        for _ in range(_TRIES):
            spots = [(name, *spot) for name in SEGMENTS for spot in places(getattr(segments, name))]
            name, path, node = rng.choice(spots)
            new = rng.choice(changes)(rng, node, narrow or name != "middle")
            if new is None:
                continue
            changed = replace(segments, **{name: put(getattr(segments, name), path, new)})
            result = self._whole((changed.prologue, changed.middle, changed.epilogue))
            if result is not None and result.canonical() != before:
                return result
        return None

    def cross(self, first: Expr, second: Expr, rng: Random, narrow: bool = True) -> Expr | None:
        """A function with segments of both parents, or None if no mixture is new and allowed."""
        parents = [_segments(first), _segments(second)]
        before = {first.canonical(), second.canonical()}
        mixtures = [tuple(bits >> shift & 1 for shift in range(3)) for bits in range(1, 7)]
        rng.shuffle(mixtures)
        gated = ZG.name in parents[0].middle.inputs
        for mixture in mixtures:
            parts = tuple(
                getattr(parents[pick], name) for pick, name in zip(mixture, SEGMENTS, strict=True)
            )
            if (ZG.name in parts[1].inputs) != gated or not (
                narrow or X.name not in parts[1].inputs
            ):
                continue
            result = self._whole(parts)
            if result is not None and result.canonical() not in before:
                return result
        return None

    def _whole(self, parts: tuple[Expr | None, ...]) -> Expr | None:
        """The parts as one allowed expression, or None."""
        if any(part is None for part in parts) or parts[1].is_leaf:
            return None  # the middle as a leaf is a linear of a linear
        expr = assemble(Segments(*parts))
        return expr if self.problem(expr) is None else None

    def _grow(
        self,
        rng: Random,
        must: tuple[Expr, ...],
        x: bool,
        levels: int,
        full: bool = False,
        activated: bool = False,
    ) -> Expr | None:
        """A random tree of at most `levels` levels (`full`: if chance allows, as many) over the
        leaves `must`, once each, and x if
        allowed.

        None where chance led to a dead end; the callers draw again.
        """
        leaf = must[0] if len(must) == 1 else X if x and not must else None
        if leaf is not None and (levels == 0 or (not full and rng.random() < _STOP)):
            return leaf
        unary = bool(self.unary) and not activated
        binary = bool(self.binary) and (x or len(must) > 1)
        if levels == 0 or not (unary or binary):
            return leaf
        if unary and not (binary and rng.random() < _BINARY):
            arg = self._grow(rng, must, x, levels - 1, full, activated=True)
            return None if arg is None else Expr.call(rng.choice(self.unary), arg)
        sides: tuple[list[Expr], list[Expr]] = ([], [])
        for name in must:
            sides[rng.randrange(2)].append(name)
        if not x and not all(sides):
            return None
        deep = rng.randrange(2)
        args = [
            self._grow(rng, tuple(side), x, levels - 1, full and index == deep)
            for index, side in enumerate(sides)
        ]
        return None if None in args else Expr.call(rng.choice(self.binary), *args)

    def _subtree(self, rng: Random, node: Expr, x: bool) -> Expr | None:
        return self._grow(rng, _linear_leaves(node), x, rng.randint(0, 3))

    def _node(self, rng: Random, node: Expr, x: bool) -> Expr | None:
        if node.is_leaf:
            return None
        return Expr.call(rng.choice(self.unary if len(node.args) == 1 else self.binary), *node.args)

    def _insert(self, rng: Random, node: Expr, x: bool) -> Expr | None:
        ops = self.unary + (self.binary if x else ())
        op = rng.choice(ops)
        if op in self.unary:
            return Expr.call(op, node)
        other = self._grow(rng, (), x, rng.randint(0, 2))
        return None if other is None else Expr.call(op, node, other)

    def _shrink(self, rng: Random, node: Expr, x: bool) -> Expr | None:
        keep = _linear_leaves(node)
        fits = [arg for arg in node.args if _linear_leaves(arg) == keep]
        return rng.choice(fits) if fits else None


def _segments(expr: Expr) -> Segments:
    return Gene(1, Fraction(1), expr).segments


@lru_cache(maxsize=1000)
def plainest(grammar: Grammar, gated: bool, narrow: bool) -> Expr | None:
    """The plain function of a kind where the grammar has it, else one that it has; None: none."""
    expr = assemble(plain(gated)).canonical()
    if grammar.problem(expr):
        expr = grammar.random(Random(0), gated, narrow)
    return expr and expr.canonical()
