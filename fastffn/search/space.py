"""The search space: one gene per layer, what each may be, and the budget that all together must
meet.

A `Candidate` is a tuple of genes, one per layer, in canonical spelling. Its cost comes from the
genes alone (`expr.cost`), no model is built. Two candidates whose genes compute the same functions
at the same widths have the same fingerprint and count as one. Functions come from `grammar`, stacks
and widths from `budget`; a space with `functions` or `shapes` given searches only the rest, which
is how the stages of a coarse-to-fine search narrow it.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from functools import cached_property, lru_cache
from random import Random
from typing import Any

from ..errors import UserError
from ..expr import PRIMITIVES, Cost, Expr, Gene, gene_cost
from ..expr.tree import MAX_HEIGHT
from .budget import Shape, ShapeTable, Window
from .grammar import LINEARS, Grammar

# EfficientBERT's; gelu_erf is in the table too but differs from gelu by less than a search can tell
DEFAULT_PRIMITIVES = (
    *("add", "mul", "max"),
    *("gelu", "sigmoid", "tanh", "relu", "leaky_relu", "elu", "swish"),
)
ANY = Window()  # no limit


@dataclass(frozen=True)
class Candidate:
    """One gene per layer, with the cost of all layers' feed-forward networks and the space's rest.

    Attributes:
        genes: in canonical spelling, first layer first.
        params, macs: trainable numbers, and multiply-accumulates per token.
        fingerprint: sixteen hexadecimal digits, equal for candidates that compute the same.
    """

    genes: tuple[Gene, ...]
    params: int
    macs: int
    fingerprint: str

    @property
    def texts(self) -> list[str]:
        return [str(gene) for gene in self.genes]

    def __str__(self) -> str:
        return ", ".join(self.texts)


@dataclass(frozen=True)
class Space:
    """What may be searched.

    Attributes:
        hidden_size: width of the encoder.
        num_layers: number of genes of a candidate.
        primitives: names of the elementwise operations.
        heights: least and greatest height of a gene's expression; down(gelu(up(x))) has 3.
        max_nodes: most nodes of a gene's expression.
        stacks: allowed numbers of stacked units.
        ratios: allowed ratios; texts such as "1/2" are taken too.
        base: width over hidden width before the ratio.
        gated: whether genes with gate(x) are searched beside those without.
        params: budget on a candidate's parameters: None, a maximum, or (low, high), either end
        None.
        macs: budget on its multiply-accumulates per token, likewise.
        rest_params, rest_macs: what the model has besides the feed-forward networks; added to every
            candidate's cost, so that a budget can speak of whole models.
        functions: one expression per layer; if given, only stacks and ratios are searched.
        shapes: one "stack x ratio" per layer, as in "2x1/2"; if given, only functions are searched.

    The defaults are EfficientBERT's (arXiv 2109.07222).

    Raises:
        UserError: a value that makes no sense, or no member (then the nearest cost is said).
    """

    hidden_size: int
    num_layers: int
    primitives: tuple[str, ...] = DEFAULT_PRIMITIVES
    heights: tuple[int, int] = (3, 7)
    max_nodes: int = 20
    stacks: tuple[int, ...] = (1, 2, 3, 4)
    ratios: tuple[Fraction, ...] = tuple(Fraction(1, n) for n in (1, 2, 3, 4))
    base: int = 1
    gated: bool = False
    params: Window = ANY
    macs: Window = ANY
    rest_params: int = 0
    rest_macs: int = 0
    functions: tuple[str, ...] | None = None
    shapes: tuple[str, ...] | None = None

    def __post_init__(self):
        def store(name, value):
            object.__setattr__(self, name, value)

        for name in ("hidden_size", "num_layers", "base", "max_nodes"):
            if not _whole(getattr(self, name)) or getattr(self, name) < 1:
                raise UserError(f"space: {name} must be a positive integer")
        unknown = [name for name in self.primitives if name not in PRIMITIVES]
        if unknown:
            known = ", ".join(PRIMITIVES)
            raise UserError(f"space: unknown primitive {unknown[0]!r}; known: {known}")
        store("primitives", tuple(dict.fromkeys(self.primitives)))
        heights = tuple(self.heights)
        if len(heights) != 2 or not all(map(_whole, heights)) or heights[0] > heights[1]:
            raise UserError("space: heights must be two integers, least and greatest")
        if heights[1] > MAX_HEIGHT or heights[1] <= LINEARS:
            raise UserError(f"space: the greatest height must be {LINEARS + 1} to {MAX_HEIGHT}")
        store("heights", heights)
        if not self.stacks or not all(_whole(n) and n > 0 for n in self.stacks):
            raise UserError("space: stacks must be positive integers")
        store("stacks", tuple(sorted(set(self.stacks))))
        store("ratios", _ratios(self.ratios, self.base, self.hidden_size))
        store("params", _window(self.params, "params"))
        store("macs", _window(self.macs, "macs"))
        for name in ("functions", "shapes"):
            value = getattr(self, name)
            if value is not None and len(value) != self.num_layers:
                raise UserError(f"space: {name} must have one entry per layer, {self.num_layers}")
            store(name, None if value is None else tuple(str(entry) for entry in value))
        self._fixed_shapes, self._fixed_functions  # noqa: B018  refuse what cannot be read at once

    # -- texts

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "Space":
        """The space that `to_dict` wrote, or a person.

        Raises:
            UserError: an unknown or missing key, or as the class itself.
        """
        known = {field.name for field in fields(Space)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise UserError(f"space: unknown key {unknown[0]!r}; known: {', '.join(sorted(known))}")
        missing = {"hidden_size", "num_layers"} - set(values)
        if missing:
            raise UserError(f"space: {min(missing)} is missing")
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return Space(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON or YAML."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["ratios"] = [str(ratio) for ratio in self.ratios]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    # -- members

    @cached_property
    def grammar(self) -> Grammar:
        return Grammar(self.primitives, self.heights, self.max_nodes)

    def narrow(self, ratio: Fraction) -> bool:
        """Whether the inner width is at most the hidden width, so that x may stand inside."""
        return ratio * self.base * self.hidden_size < self.hidden_size + 1

    def candidate(self, genes: Sequence[Gene | str]) -> Candidate:
        """The member with these genes.

        Raises:
            UserError: it is no member; the layer and the reason are said.
        """
        if len(genes) != self.num_layers:
            raise UserError(f"{len(genes)} genes for {self.num_layers} layers: give one per layer")
        read = []
        for layer, gene in enumerate(genes):
            gene = Gene.parse(gene, self.base) if isinstance(gene, str) else gene
            gene = gene.canonical()
            problem = self.problem(layer, gene)
            if problem:
                raise UserError(f"layer {layer}, gene {gene}: not in the search space, {problem}")
            read.append(gene)
        candidate = self._candidate(tuple(read))
        for name, window in self._windows:
            if window.distance(getattr(candidate, name)):
                found = f"{name} = {getattr(candidate, name):,}"
                raise UserError(f"{candidate}: {found} is outside the budget {window.text(name)}")
        return candidate

    def problem(self, layer: int, gene: Gene) -> str | None:
        """Why the layer cannot have this gene, the budget apart; None if it can."""
        if gene.base != self.base:
            return f"its base is {gene.base}, not {self.base}"
        if Shape(gene.stack, gene.ratio, gene.gated) not in self.costs[layer]:
            known = {f"{s.stack}x{s.ratio}" for s in self.costs[layer] if s.gated == gene.gated}
            allowed = ", ".join(sorted(known)) or "none"
            what = "gated " if gene.gated else ""
            return f"{what}{gene.stack}x{gene.ratio} is not among the allowed: {allowed}"
        if self.functions is not None:
            wanted = self._fixed_functions[layer]
            return None if gene.expr.canonical() == wanted else f"its function must be {wanted}"
        if "x" in gene.segments.middle.inputs and not self.narrow(gene.ratio):
            return "x stands between up and down, which are wider than x"
        return self.grammar.problem(gene.expr)

    def random(self, rng: Random) -> Candidate:
        """A random member: stacks and widths evenly among those in the budget, functions at random.

        Raises:
            UserError: there is no member.
        """
        return self._filled(self._members.draw(rng), rng)

    def smallest(self) -> Candidate:
        """The member with the fewest parameters, with plain functions where the space has them.

        Raises:
            UserError: there is no member.
        """
        return self._filled(self._members.smallest(), Random(0), plain=True)

    def plain(self, activation: str = "gelu") -> list[Candidate]:
        """The members with one shape and down(activation(up(x))) in every layer, largest first."""
        text, found = f"down({activation}(up(x)))", []
        for stack in self.stacks:
            for ratio in self.ratios:
                try:
                    found.append(self.candidate([f"{stack}x{ratio} {text}"] * self.num_layers))
                except UserError:
                    continue  # outside the budget, or the activation is not in the space
        return sorted(found, key=lambda candidate: -candidate.params)

    def in_budget(self, genes: Sequence[Gene]) -> Candidate | None:
        """The candidate if its cost meets the budget. Expects genes that `problem` finds right."""
        cost = self._cost(genes)  # before the fingerprint, which takes a hundred times longer
        if any(window.distance(getattr(cost, name)) for name, window in self._windows):
            return None
        return self._candidate(tuple(gene.canonical() for gene in genes))

    @cached_property
    def costs(self) -> list[dict[Shape, Cost]]:
        """For each layer the shapes that it may have, with what they cost."""
        return [self._shapes(layer) for layer in range(self.num_layers)]

    # -- inside

    @property
    def _windows(self) -> list[tuple[str, Window]]:
        """The budgets that are set; without any, the parameters, to know the smallest."""
        both = [("params", self.params), ("macs", self.macs)]
        return [(name, window) for name, window in both if window != ANY] or both[:1]

    @cached_property
    def _members(self) -> ShapeTable:
        windows = self._windows
        options = [
            [
                (shape, tuple(getattr(cost, name) for name, _ in windows))
                for shape, cost in shapes.items()
            ]
            for shapes in self.costs
        ]
        rest = [getattr(self, f"rest_{name}") for name, _ in windows]
        inner = [
            Window(*(None if limit is None else limit - fixed for limit in window))
            for (_, window), fixed in zip(windows, rest, strict=True)
        ]
        empty = [layer for layer, shapes in enumerate(options) if not shapes]
        if empty:
            raise UserError(
                f"space: layer {empty[0]} can have no gene: with primitives "
                f"{', '.join(self.primitives) or '(none)'} and heights {self.heights[0]} to "
                f"{self.heights[1]} no function fits between up and down; allow more of them"
            )
        table = ShapeTable(options, inner)
        if not table.totals:
            wanted = " and ".join(window.text(name) for name, window in windows)
            near = zip(windows, table.nearest(), rest, strict=True)
            found = ", ".join(f"{name} = {value + more:,}" for (name, _), value, more in near)
            raise UserError(
                f"no candidate meets the budget {wanted}: the nearest has {found}; "
                "change the budget or allow other stacks and ratios"
            )
        return table

    @cached_property
    def _fixed_functions(self) -> list[Expr] | None:
        if self.functions is None:
            return None
        return [Gene.parse(text, self.base).expr.canonical() for text in self.functions]

    @cached_property
    def _fixed_shapes(self) -> list[tuple[int, Fraction]] | None:
        if self.shapes is None:
            return None
        read = [Gene.parse(f"{text} down(gelu(up(x)))", self.base) for text in self.shapes]
        return [(gene.stack, gene.ratio) for gene in read]

    @cached_property
    def _kinds(self) -> set[tuple[bool, bool]]:
        """The (gated, narrow) for which the grammar has functions."""
        kinds = [
            (gated, narrow) for gated in (False, True)[: 1 + self.gated] for narrow in (True, False)
        ]
        return {kind for kind in kinds if self.grammar.random(Random(0), *kind) is not None}

    def _shapes(self, layer: int) -> dict[Shape, Cost]:
        pairs = [(stack, ratio) for stack in self.stacks for ratio in self.ratios]
        if self._fixed_shapes is not None:
            pairs = [self._fixed_shapes[layer]]
        shapes = {}
        for stack, ratio in pairs:
            if self._fixed_functions is not None:
                gene = Gene(stack, ratio, self._fixed_functions[layer], self.base)
                if self.narrow(ratio) or "x" not in gene.segments.middle.inputs:
                    shapes[Shape(stack, ratio, gene.gated)] = gene_cost(gene, self.hidden_size)
                continue
            for gated, narrow in sorted(self._kinds):
                if narrow == self.narrow(ratio):
                    expr = Expr.parse(_GATED if gated else _PLAIN, _ARITY)
                    gene = Gene(stack, ratio, expr, self.base)
                    shapes[Shape(stack, ratio, gated)] = gene_cost(gene, self.hidden_size)
        return shapes

    def _filled(self, shapes: Sequence[Shape], rng: Random, plain: bool = False) -> Candidate:
        """A candidate of these shapes."""
        genes = []
        for layer, shape in enumerate(shapes):
            if self._fixed_functions is not None:
                expr = self._fixed_functions[layer]
            else:
                expr = Expr.parse(_GATED if shape.gated else _PLAIN, _ARITY)
                if not plain or self.grammar.problem(expr):
                    expr = self.grammar.random(rng, shape.gated, self.narrow(shape.ratio))
            genes.append(Gene(shape.stack, shape.ratio, expr, self.base).canonical())
        return self._candidate(tuple(genes))

    def _cost(self, genes: Sequence[Gene]) -> Cost:
        cost = Cost(self.rest_params, self.rest_macs)
        for shapes, gene in zip(self.costs, genes, strict=True):
            cost += shapes[Shape(gene.stack, gene.ratio, gene.gated)]
        return cost

    def _candidate(self, genes: tuple[Gene, ...]) -> Candidate:
        cost = self._cost(genes)
        text = " ".join(f"{gene.stack}x{gene.ratio}-{_meaning(gene.expr)}" for gene in genes)
        digest = hashlib.sha256(f"{self.base} {text}".encode()).hexdigest()[:16]
        return Candidate(genes, cost.params, cost.macs, digest)


_PLAIN, _GATED = "down(gelu(up(x)))", "down(mul(swish(gate(x)), up(x)))"
_ARITY = {name: primitive.arity for name, primitive in PRIMITIVES.items()}
_ARITY |= dict.fromkeys(("up", "gate", "down"), 1)


@lru_cache(maxsize=100_000)
def _meaning(expr: Expr) -> str:
    """Fingerprint of the function alone, at ratio 1: it is the same function at every width."""
    return Gene(1, Fraction(1), expr).fingerprint()


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _ratios(values: Sequence[Fraction | str | int], base: int, hidden: int) -> tuple[Fraction, ...]:
    try:
        ratios = sorted({Fraction(value) for value in values})
    except (ValueError, TypeError, ZeroDivisionError):
        raise UserError('space: ratios must be numbers such as "1/2"') from None
    if not ratios or any(int(ratio * base * hidden) < 1 for ratio in ratios):
        raise UserError(f"space: every ratio must leave a width of at least 1 of {hidden}")
    return tuple(ratios)


def _window(value: Any, name: str) -> Window:
    window = Window(None, value) if value is None or _whole(value) else Window(*value)
    low, high = window
    if not all(limit is None or (_whole(limit) and limit >= 0) for limit in window) or (
        low is not None and high is not None and low > high
    ):
        raise UserError(f"space: {name} must be a maximum or [least, greatest], in whole numbers")
    return window


def frozen(space: Space, candidate: Candidate, what: str) -> Space:
    """The space around a candidate with its "functions" or its "shapes" kept in every layer."""
    if what == "functions":
        return replace(space, functions=tuple(str(gene.expr) for gene in candidate.genes))
    return replace(space, shapes=tuple(f"{gene.stack}x{gene.ratio}" for gene in candidate.genes))
