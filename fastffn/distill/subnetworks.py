"""Which sub-networks of a supernet learn at a step: the sandwich rule (arXiv 1903.05134).

The largest, the smallest, and random ones between them, all of the functions that the supernet was
given; stacks and widths vary, layer by layer, over EfficientBERT's choices (arXiv 2109.07222) or
those that are given, and the depth too where depths are given (DynaBERT, arXiv 2004.04037). What a
step runs is a function of (seed, step): resumed runs and other processes run the same.
"""

from collections.abc import Sequence
from fractions import Fraction
from random import Random
from typing import NamedTuple

from torch import nn

from fastffn.errors import UserError
from fastffn.expr import Gene

SHARES = tuple(Fraction(1, k) for k in (1, 2, 3, 4))  # of the largest width


class SubNetwork(NamedTuple):
    """One gene for each layer that runs, and the indices of these layers; None: all."""

    genes: list[Gene]
    layers: list[int] | None = None


def kept_layers(depth: int, count: int) -> list[int]:
    """Which `depth` of `count` layers run: the first, the last, and evenly between them.

    The last, since heads and losses on relations read it (DynaBERT keeps it for its knowledge); the
    first, since no other layer has learnt to read embeddings, and since all sub-networks of a step
    share its attention then. One layer alone is the last.
    """
    if depth == 1:
        return [count - 1]
    return [k * (count - 1) // (depth - 1) for k in range(depth)]


class Sandwich:
    """Sub-networks for each step.

    Args:
        supernet: an EfficientBert model with `config.supernet`; its genes name the functions.
        count: sub-networks per step, at least 2.
        seed: of the random ones.
        depths: numbers of layers that smaller sub-networks may have; none: all layers always. The
            largest has all layers, the smallest the least depth, random ones draw theirs.
        ratios: of the inner width, over hidden width times base; none: 1, 1/2, 1/3 and 1/4 of the
            largest. A layer whose function has x inside takes those that are not wider than x.

    Raises:
        UserError: the model is no supernet, `count` is below 2, or it has not so many layers or so
            wide ones.
    """

    def __init__(
        self,
        supernet: nn.Module,
        count: int,
        seed: int,
        depths: Sequence[int] = (),
        ratios: Sequence[Fraction | str] = (),
    ):
        config = supernet.config
        size = getattr(config, "supernet", None)
        if size is None:
            raise UserError("subnetworks: the student is no supernet: give it `supernet`")
        if count < 2:
            raise UserError(f"subnetworks {count}: at least 2, the largest and the smallest")
        self.genes = config.parsed_genes()
        for depth in depths:
            if not 1 <= depth <= len(self.genes):
                raise UserError(f"depths: {depth} of the supernet's {len(self.genes)} layers")
        self.count, self.seed, self.depths = count, seed, tuple(depths)
        self.stack = size["max_stack"]
        widest = Fraction(size["max_width"], config.hidden_size * config.ffn_base)
        given = [Fraction(ratio) for ratio in ratios]
        for ratio in given:
            if not 0 < ratio <= widest:
                raise UserError(f"ratios: {ratio} is not between 0 and the supernet's {widest}")
        self.ratios = [
            _ratios(given, min(widest, Fraction(1, config.ffn_base)) if _has_x(gene) else widest)
            for gene in self.genes
        ]

    def at(self, step: int) -> list[SubNetwork]:
        """`count` sub-networks; the largest first, the smallest second."""
        random = Random(f"{self.seed} {step}")
        found = [self.largest, self._same(1, -1, min(self.depths, default=None))]
        for _ in range(self.count - 2):
            layers = self._layers(random.choice(self.depths) if self.depths else None)
            shapes = [
                (random.randint(1, self.stack), random.choice(self.ratios[k])) for k in layers
            ]
            found.append(self._network(layers, shapes))
        return found

    @property
    def largest(self) -> SubNetwork:
        return self._same(self.stack, 0)

    def _layers(self, depth: int | None) -> list[int]:
        count = len(self.genes)
        return kept_layers(count if depth is None else depth, count)

    def _same(self, stack: int, place: int, depth: int | None = None) -> SubNetwork:
        """All layers with so many units and the ratio at that place, from the largest."""
        layers = self._layers(depth)
        return self._network(layers, [(stack, self.ratios[k][place]) for k in layers])

    def _network(self, layers: list[int], shapes: Sequence[tuple[int, Fraction]]) -> SubNetwork:
        genes = [
            self.genes[k].with_(stack=stack, ratio=ratio)
            for k, (stack, ratio) in zip(layers, shapes, strict=True)
        ]
        return SubNetwork(genes, layers if self.depths else None)


def _has_x(gene: Gene) -> bool:
    """Whether x stands between up and down, where it must be as wide as they are."""
    return "x" in gene.segments.middle.inputs


def _ratios(given: Sequence[Fraction], widest: Fraction) -> list[Fraction]:
    """The given ratios up to the widest, largest first; EfficientBERT's shares of it if none."""
    fitting = sorted({ratio for ratio in given if ratio <= widest}, reverse=True)
    return fitting or [widest * share for share in SHARES]
