"""Candidates as rows of numbers, for what learns from them.

Every candidate of a space has the same features in the same order, whatever its expressions: of
each layer its shape, the size of its function and how often each primitive and x stand before the
first linear map, between the two and after them; of the whole its cost. Why counts by place and not
the nodes in order (EfficientBERT pads the numbers of the nodes to 20): one node more would shift
all that follow, and a learner would have to discover the alphabet first.
"""

import math
from collections import Counter
from functools import lru_cache

from ..expr import PRIMITIVES, Gene
from .grammar import SEGMENTS
from .space import Candidate, Space

_SHAPE = ("stack", "ratio", "gated", "units", "height", "nodes")
_COUNTED = (*PRIMITIVES, "x")  # all, since layers may differ in what they allow


def names(space: Space) -> list[str]:
    """What the features are, such as "layer0.stack" or "layer2.middle.gelu"."""
    counted = [f"{segment}.{name}" for segment in SEGMENTS for name in _COUNTED]
    layers = [
        f"layer{layer}.{name}" for layer in range(space.num_layers) for name in (*_SHAPE, *counted)
    ]
    return [*layers, "params", "macs"]


def features(space: Space, candidate: Candidate) -> list[float]:
    """The numbers that `names` names: counts, ratios, and logarithms of sizes."""
    row: list[float] = []
    for gene in candidate.genes:
        row += _gene(gene, space.hidden_size)
    return [*row, math.log(candidate.params), math.log(candidate.macs)]


@lru_cache(maxsize=4096)  # few, since an expression takes kilobytes
def _gene(gene: Gene, hidden: int) -> tuple[float, ...]:
    nodes = list(gene.expr.walk())
    row = [
        gene.stack,
        float(gene.ratio),
        gene.gated,
        math.log(gene.stack * gene.width(hidden)),
        gene.expr.height,
        len(nodes),
    ]
    for segment in SEGMENTS:
        walked = getattr(gene.segments, segment).walk()
        counts = Counter(node.name if node.is_leaf else node.op for node in walked)
        row += [counts[name] for name in _COUNTED]
    return tuple(row)
