"""Which sub-networks of a supernet learn at a step: the sandwich rule (arXiv 1903.05134).

The largest, the smallest, and random ones between them, all of the functions that the supernet was
given; stacks and widths vary, layer by layer, over EfficientBERT's choices (arXiv 2109.07222). What
a step runs is a function of (seed, step): resumed runs and other processes run the same.
"""

from collections.abc import Sequence
from fractions import Fraction
from random import Random

from torch import nn

from fastffn.errors import UserError
from fastffn.expr import Gene

SHARES = tuple(Fraction(1, k) for k in (1, 2, 3, 4))  # of the largest width


class Sandwich:
    """Genes for each step.

    Args:
        supernet: an EfficientBert model with `config.supernet`; its genes name the functions.
        count: sub-networks per step, at least 2.
        seed: of the random ones.

    Raises:
        UserError: the model is no supernet, or `count` is below 2.
    """

    def __init__(self, supernet: nn.Module, count: int, seed: int):
        config = supernet.config
        size = getattr(config, "supernet", None)
        if size is None:
            raise UserError("subnetworks: the student is no supernet: give it `supernet`")
        if count < 2:
            raise UserError(f"subnetworks {count}: at least 2, the largest and the smallest")
        self.count, self.seed = count, seed
        self.stack = size["max_stack"]
        self.widest = Fraction(size["max_width"], config.hidden_size * config.ffn_base)
        self.genes = config.parsed_genes()

    def at(self, step: int) -> list[list[Gene]]:
        """`count` lists of genes, one for each layer; the largest first, the smallest second."""
        random = Random(f"{self.seed} {step}")
        chosen = [[(self.stack, SHARES[0])], [(1, SHARES[-1])]]
        shapes = [first * len(self.genes) for first in chosen]
        for _ in range(self.count - 2):
            drawn = [(random.randint(1, self.stack), random.choice(SHARES)) for _ in self.genes]
            shapes.append(drawn)
        return [self._genes(shape) for shape in shapes]

    @property
    def largest(self) -> list[Gene]:
        return self._genes([(self.stack, SHARES[0])] * len(self.genes))

    def _genes(self, shapes: Sequence[tuple[int, Fraction]]) -> list[Gene]:
        return [
            gene.with_(stack=stack, ratio=self.widest * share)
            for gene, (stack, share) in zip(self.genes, shapes, strict=True)
        ]
