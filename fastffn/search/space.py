"""The search space: one gene per layer, what each may be, and the budget that all together must
meet.

A `Candidate` costs what its genes say (`expr.cost`, and `latency_table` where one was measured), no
model is built. Functions come from `grammar`, stacks and widths from `budget`, what a layer may
have from `rules`; a space with `functions` or `shapes` given searches only the rest, which is how
the stages of a coarse-to-fine search narrow it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

from ..errors import UserError
from ..expr import Cost, Expr, Gene, gene_cost
from . import space_text
from .budget import Shape, ShapeTable, Window, shown
from .candidate import Candidate, canonical, read_gene
from .grammar import Grammar, plainest
from .latency_table import LatencyTable, Target
from .rules import DEFAULT_PRIMITIVES, Rules

__all__ = ["DEFAULT_PRIMITIVES", "Candidate", "Space", "frozen"]

ANY = Window()  # no limit
HERE = Target()
_DRAWS = 4  # of functions for one combination of shapes under a latency budget


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
        layers: layer -> the six from primitives to gated (base apart) that are others there.
        params: budget on a candidate's parameters: None, a maximum, or (low, high), either end
            None; texts such as "15M" are taken too.
        macs: budget on its multiply-accumulates per token, likewise.
        latency: budget on its latency on the target in milliseconds, likewise.
        target: where latency counts; its fields as a mapping are taken too.
        table: latencies that were measured there (`latency.measure`), also as a mapping or the path
            of a file; without it no member of a space with a latency budget can be told.
        rest_params, rest_macs: what the model has besides the feed-forward networks; added to every
            candidate's cost, so that a budget can speak of whole models.
        functions: one expression per layer; if given, only stacks and ratios are searched.
        shapes: one "stack x ratio" per layer, as in "2x1/2"; if given, only functions are searched.

    The defaults are EfficientBERT's (arXiv 2109.07222).

    Raises:
        UserError: a value that makes no sense. Whether there is a member is asked later, by
            whatever needs one.
    """

    hidden_size: int
    num_layers: int
    primitives: tuple[str, ...] = Rules.primitives
    heights: tuple[int, int] = Rules.heights
    max_nodes: int = Rules.max_nodes
    stacks: tuple[int, ...] = Rules.stacks
    ratios: tuple[Fraction, ...] = Rules.ratios
    base: int = 1
    gated: bool = Rules.gated
    params: Window = ANY
    macs: Window = ANY
    rest_params: int = 0
    rest_macs: int = 0
    functions: tuple[str, ...] | None = None
    shapes: tuple[str, ...] | None = None
    layers: Mapping[int, Mapping[str, Any]] = field(default_factory=dict, hash=False)
    latency: Window = ANY
    target: Target = HERE
    table: LatencyTable | None = field(default=None, hash=False)

    def __post_init__(self):
        for name, value in space_text.checked(self).items():
            object.__setattr__(self, name, value)
        self._fixed_shapes, self._fixed_functions  # noqa: B018  refuse what cannot be read at once

    # -- texts

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "Space":
        """The space that `to_dict` wrote, or a person.

        Raises:
            UserError: an unknown or missing key, or as the class itself.
        """
        return space_text.from_dict(values)

    @staticmethod
    def read(path: str | Path) -> "Space":
        """The space that a YAML file describes, with the attributes as keys.

        Raises:
            UserError: as `from_dict`, with the file's line.
        """
        return space_text.read(Path(path))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON or YAML; `from_dict` gives an equal space."""
        return space_text.to_dict(self)

    def describe(self) -> str:
        """A few lines for people: what is searched, how much of it, from which cost to which.

        Raises:
            UserError: there is no member.
        """
        return space_text.describe(self)

    # -- members

    @cached_property
    def rules(self) -> tuple[Rules, ...]:
        """What each layer may have."""
        common = {field.name: getattr(self, field.name) for field in fields(Rules)}
        return tuple(
            Rules(**{**common, **self.layers.get(layer, {})}) for layer in range(self.num_layers)
        )

    def grammar(self, layer: int) -> Grammar:
        """The functions that a layer may have."""
        return self.rules[layer].grammar

    @property
    def count(self) -> int:
        """Number of combinations of stacks and widths within the budget; functions not counted.

        With a budget on latency: of those that meet it with plain functions. Nearly right where
        totals are too many to be kept apart (see `budget`).
        """
        return self._shape_table.count

    def narrow(self, ratio: Fraction) -> bool:
        """Whether the inner width is at most the hidden width, so that x may stand inside."""
        return ratio * self.base * self.hidden_size < self.hidden_size + 1

    def candidate(self, genes: Sequence[Gene | str]) -> Candidate:
        """The member with these genes.

        Raises:
            UserError: it is no member; the layer and the reason are said.
        """
        if isinstance(genes, str) or len(genes) != self.num_layers:
            number = 1 if isinstance(genes, str) else len(genes)
            raise UserError(f"{number} genes for {self.num_layers} layers: give one per layer")
        read = []
        for layer, gene in enumerate(genes):
            gene = canonical(read_gene(layer, gene, self.base))
            problem = self.problem(layer, gene)
            if problem:
                raise UserError(f"layer {layer}, gene {gene}: not in the search space, {problem}")
            read.append(gene)
        candidate = Candidate.of(read, self._cost(read))
        for name, window in self.budgets:
            if window.distance(getattr(candidate, name)):
                found = f"{name} = {shown(name, getattr(candidate, name))}"
                raise UserError(f"{candidate}: {found} is outside the budget {window.text(name)}")
        return candidate

    def problem(self, layer: int, gene: Gene) -> str | None:
        """Why the layer cannot have this gene, the budget apart; None if it can."""
        if gene.base != self.base:
            return f"its base is {gene.base}, not {self.base}"
        if _shape(gene) not in self.costs[layer]:
            known = sorted({s[:2] for s in self.costs[layer] if s.gated == gene.gated})
            allowed = ", ".join(f"{stack}x{ratio}" for stack, ratio in known) or "none"
            what = "gated " if gene.gated else ""
            return f"{what}{gene.stack}x{gene.ratio} is not among the allowed: {allowed}"
        if self.functions is not None:
            wanted = self._fixed_functions[layer]
            return None if gene.expr.canonical() == wanted else f"its function must be {wanted}"
        if "x" in gene.segments.middle.inputs and not self.narrow(gene.ratio):
            return "x stands between up and down, which are wider than x"
        return self.grammar(layer).problem(gene.expr)

    def random(self, rng: Random) -> Candidate:
        """A random member: stacks and widths evenly among those in the budget, functions at random.

        Under a budget on latency, for which functions matter too, the shapes are those that meet it
        with plain functions; functions are drawn anew where the whole does not meet it, and at last
        made plain in one layer after the other.

        Raises:
            UserError: there is no member.
        """
        shapes = self._members.draw(rng)
        for _ in range(_DRAWS):
            genes = [self._gene(layer, shape, rng) for layer, shape in enumerate(shapes)]
            candidate = self.in_budget(genes)
            if candidate is not None:
                return candidate
        for layer in rng.sample(range(self.num_layers), self.num_layers):
            genes[layer] = self._gene(layer, shapes[layer])
            candidate = self.in_budget(genes)
            if candidate is not None:
                break
        return candidate

    def smallest(self) -> Candidate:
        """The member of the least cost (the first with a budget, else parameters), as plain as the
        space allows.

        Raises:
            UserError: there is no member.
        """
        return self._plainest(self._members.smallest())

    def largest(self) -> Candidate:
        """The member of the greatest cost, likewise."""
        return self._plainest(self._members.largest())

    def plain(self, activation: str = "gelu") -> list[Candidate]:
        """The members with one shape and down(activation(up(x))) in every layer, largest first."""
        text, found = f"down({activation}(up(x)))", []
        for shape in self.costs[0]:
            gene = f"{shape.stack}x{shape.ratio} {text}"
            try:
                found += [] if shape.gated else [self.candidate([gene] * self.num_layers)]
            except UserError:
                continue  # outside the budget, or a layer cannot have it
        return sorted(found, key=lambda candidate: -candidate.params)

    def in_budget(self, genes: Sequence[Gene]) -> Candidate | None:
        """The candidate if its cost meets the budget. Expects genes that `problem` finds right."""
        cost = self._cost(genes)  # before the fingerprint, which takes a hundred times longer
        if any(window.distance(cost[name]) for name, window in self.budgets):
            return None
        return Candidate.of(list(map(canonical, genes)), cost)

    @cached_property
    def budgets(self) -> list[tuple[str, Window]]:
        """The costs that are limited, by the names of a candidate's attributes; latency in
        microseconds.

        Raises:
            UserError: a budget on latency without a table.
        """
        windows = {"params": self.params, "macs": self.macs, "latency": self.latency.microseconds()}
        if self.latency != ANY and self.table is None:
            raise UserError(
                f"space: a budget on latency needs measurements on {self.target}: make a table "
                "with fastffn.search.latency.measure and give it as table"
            )
        return [(name, window) for name, window in windows.items() if window != ANY]

    @cached_property
    def costs(self) -> list[dict[Shape, Cost]]:
        """For each layer the shapes that it may have, with what they cost."""
        return [
            {shape: gene_cost(gene, self.hidden_size) for shape, gene in genes.items()}
            for genes in self._examples
        ]

    # -- inside

    @cached_property
    def _examples(self) -> list[dict[Shape, Gene]]:
        """For each layer the shapes that it may have, with the plainest gene of each."""
        return [self._layer_examples(layer) for layer in range(self.num_layers)]

    def _layer_examples(self, layer: int) -> dict[Shape, Gene]:
        rules = self.rules[layer]
        pairs = [(stack, ratio) for stack in rules.stacks for ratio in rules.ratios]
        if self._fixed_shapes is not None:
            pairs = [self._fixed_shapes[layer]]
        genes = {}
        for stack, ratio in pairs:
            narrow = self.narrow(ratio)
            if self._fixed_functions is not None:
                gene = Gene(stack, ratio, self._fixed_functions[layer], self.base)
                found = [gene] if narrow or "x" not in gene.segments.middle.inputs else []
            else:
                kinds = (False, True)[: 1 + rules.gated]
                exprs = [plainest(rules.grammar, gated, narrow) for gated in kinds]
                found = [Gene(stack, ratio, expr, self.base) for expr in exprs if expr is not None]
            genes |= {_shape(gene): gene for gene in found}
        return genes

    @cached_property
    def _shape_table(self) -> ShapeTable:
        """Of all combinations of shapes, each with the cost of its plainest genes."""
        names = [name for name, _ in self.budgets] or ["params"]  # to know the smallest
        options = []
        for layer, (genes, rules) in enumerate(zip(self._examples, self.rules, strict=True)):
            if not genes:
                primitives = ", ".join(rules.primitives) or "(none)"
                raise UserError(
                    f"space: layer {layer} can have no gene: with primitives {primitives} and "
                    f"heights {rules.heights[0]} to {rules.heights[1]} no function fits between up "
                    "and down; allow more of them"
                )
            costs = {shape: self._layer_cost(layer, gene) for shape, gene in genes.items()}
            options.append(
                [(shape, tuple(cost[name] for name in names)) for shape, cost in costs.items()]
            )
        windows = dict(self.budgets) or {"params": ANY}
        return ShapeTable(options, [windows[name].less(self._rest[name]) for name in names])

    @cached_property
    def _members(self) -> ShapeTable:
        """The combinations of shapes, if there is one within the budget."""
        table = self._shape_table
        if not table.totals:
            wanted = " and ".join(window.text(name) for name, window in self.budgets)
            found = self._cost(
                [genes[shape] for genes, shape in zip(self._examples, table.nearest(), strict=True)]
            )
            costs = ", ".join(f"{name} = {shown(name, cost)}" for name, cost in found.items())
            raise UserError(
                f"no candidate meets the budget {wanted}: the nearest has {costs}; "
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
    def _rest(self) -> dict[str, int]:
        """What every candidate costs besides its genes, by the names of its attributes."""
        rest = {"params": self.rest_params, "macs": self.rest_macs}
        return rest if self.table is None else rest | {"latency": round(self.table.rest)}

    def _gene(self, layer: int, shape: Shape, rng: Random | None = None) -> Gene:
        """A gene of this shape with a random function; without `rng` the plainest."""
        gene = self._examples[layer][shape]
        if rng is None or self._fixed_functions is not None:
            return gene
        narrow = self.narrow(shape.ratio)
        expr = self.grammar(layer).random(rng, shape.gated, narrow)
        return gene if expr is None else gene.with_(expr=expr.canonical())

    def _plainest(self, shapes: Sequence[Shape]) -> Candidate:
        genes = [self._gene(layer, shape) for layer, shape in enumerate(shapes)]
        return Candidate.of(genes, self._cost(genes))

    def _layer_cost(self, layer: int, gene: Gene) -> dict[str, int]:
        cost = self.costs[layer][_shape(gene)]
        found = {"params": cost.params, "macs": cost.macs}
        if self.table is not None:
            found["latency"] = self.table.of(gene, self.hidden_size)
        return found

    def _cost(self, genes: Sequence[Gene]) -> dict[str, int]:
        """By the names of a candidate's attributes."""
        total = dict(self._rest)
        for layer, gene in enumerate(genes):
            for name, value in self._layer_cost(layer, gene).items():
                total[name] += value
        return total


def frozen(space: Space, candidate: Candidate, what: str) -> Space:
    """The space around a candidate with its "functions" or its "shapes" kept in every layer."""
    if what == "functions":
        return replace(space, functions=tuple(str(gene.expr) for gene in candidate.genes))
    return replace(space, shapes=tuple(f"{gene.stack}x{gene.ratio}" for gene in candidate.genes))


def _shape(gene: Gene) -> Shape:
    return Shape(gene.stack, gene.ratio, gene.gated)
