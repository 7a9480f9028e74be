"""What wins: how often each primitive, stack and ratio occurs in each layer, best against all.

The best are the best quarter of every stage's candidates by quality. A stage that keeps functions
says nothing about primitives, one that keeps shapes nothing about stacks and ratios: it is left
out there.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ..expr import PRIMITIVES

_OP = re.compile(r"(\w+)\(")
_LEAST = 12  # candidates of a stage; a quarter of fewer says nothing


@dataclass(frozen=True)
class Block:
    """Shares of one kind of choice.

    Attributes:
        name: "primitives", "stacks" or "ratios".
        items: what there is to choose from; rows of the tables.
        best: for each item and layer the share of the best candidates that have it there, 0 to 1.
        all: the same of all candidates.
        good: number of the best.
        count: number of all.
    """

    name: str
    items: list[str]
    best: list[list[float]]
    all: list[list[float]]
    good: int
    count: int

    @property
    def gaps(self) -> list[list[float]]:
        """By how much the best's share is larger."""
        return [
            [best - whole for best, whole in zip(*rows, strict=True)]
            for rows in zip(self.best, self.all, strict=True)
        ]

    def clear(self, item: int, layer: int) -> bool:
        """Whether a difference is more than three standard errors of a share of as many candidates
        drawn from all of them by chance (hypergeometric)."""
        share = self.all[item][layer]
        left = (self.count - self.good) / max(1, self.count - 1)
        error = math.sqrt(share * (1 - share) / self.good * left)
        return abs(self.gaps[item][layer]) > 3 * error


def wins(
    space: Mapping[str, Any],
    stages: Mapping[str, Sequence[Mapping[str, Any]]],
    described: Sequence[Mapping[str, Any]] = (),
) -> list[Block]:
    """The shares; what occurs nowhere, and what no stage could choose, is left out.

    Args:
        space: with "num_layers".
        stages: name -> records with "genes" (canonical texts), "quality" and "pruned"; a stage of
            fewer than 12 candidates has no quarter to speak of.
        described: stages with "name" and "freeze".
    """
    freeze = {stage["name"]: stage.get("freeze") for stage in described}
    found = []
    for name, fixed, choices in (
        ("primitives", "functions", _primitives),
        ("stacks", "shapes", _stack),
        ("ratios", "shapes", _ratio),
    ):
        free = [
            records
            for stage, records in stages.items()
            if freeze.get(stage) != fixed and len(records) >= _LEAST
        ]
        block = _block(name, free, choices, space)
        if block is not None:
            found.append(block)
    return found


def _block(name: str, stages: Sequence, choices: Any, space: Mapping[str, Any]) -> Block | None:
    layers = space["num_layers"]
    everyone: list[list[set[str]]] = []
    good: list[list[set[str]]] = []
    for records in stages:
        chosen = [[choices(text) for text in record["genes"]] for record in records]
        finished = [at for at, record in enumerate(records) if not record.get("pruned")]
        finished.sort(key=lambda at: -records[at]["quality"])
        good += [chosen[at] for at in finished[: len(records) // 4]]
        everyone += chosen
    items = {item for genes in everyone for of_layer in genes for item in of_layer}
    if not good or len(items) < 2:
        return None
    ordered = sorted(items, key=_rank)

    def shares(of: Sequence[Sequence[set[str]]]) -> list[list[float]]:
        counts = [[sum(item in g[k] for g in of) for k in range(layers)] for item in ordered]
        return [[count / len(of) for count in row] for row in counts]

    return Block(name, ordered, shares(good), shares(everyone), len(good), len(everyone))


# Of the canonical text of a gene; parsing thousands of genes would take longer than a picture.


def _primitives(gene: str) -> set[str]:
    ops = set(_OP.findall(gene))
    return (ops & PRIMITIVES.keys()) | ({"gate"} & ops)


def _stack(gene: str) -> set[str]:
    stack = gene.partition("x")[0]
    return {f"{stack} unit{'s' * (stack != '1')}"}


def _ratio(gene: str) -> set[str]:
    return {f"ratio {gene.partition(' ')[0].partition('x')[2]}"}


def _rank(item: str) -> tuple[float, str]:
    """Primitives in the order of their table, numbers rising."""
    if item in PRIMITIVES:
        return list(PRIMITIVES).index(item), item
    number = next((word for word in item.split() if word[0].isdigit()), None)
    return (float(Fraction(number)) if number else math.inf), item
