"""Shapes under a budget: which stacks and widths fit, drawn evenly among all that do.

What a candidate costs depends only on each layer's `Shape`, never on its function. With per-layer
costs that add, the number of ways to reach every total follows layer by layer (dynamic programming
over exact integer sums), and with those numbers one draws uniformly from all combinations inside
the budget, knows for certain whether there is one, and which total is nearest if there is none.

Why not draw and reject, as the original does: its window of 15 to 16 M keeps a quarter of the
draws, a narrow one keeps next to none and then cannot be told from an empty one.

Gates and a second budget multiply the totals (12 layers: a million). A table of more than `LIMIT`
totals keeps one of several that lie close together, with their joint count: what is drawn still has
exactly the cost it claims, "uniformly" becomes "nearly", and a window much narrower than the gaps
may seem empty.
"""

from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property
from itertools import accumulate
from random import Random
from typing import NamedTuple

LIMIT = 12_000

Total = tuple[int, ...]


class Shape(NamedTuple):
    """What of a gene decides its cost."""

    stack: int
    ratio: Fraction
    gated: bool = False


class Window(NamedTuple):
    """Least and greatest allowed value, both inclusive; None where there is no limit."""

    low: int | None = None
    high: int | None = None

    def distance(self, value: int) -> float:
        """0 inside, else how far outside, relative to the limit."""
        if self.low is not None and value < self.low:
            return (self.low - value) / max(self.low, 1)
        if self.high is not None and value > self.high:
            return (value - self.high) / max(self.high, 1)
        return 0.0

    def text(self, name: str) -> str:
        if self.low is None:
            return f"{name} <= {self.high:,}"
        if self.high is None:
            return f"{name} >= {self.low:,}"
        return f"{self.low:,} <= {name} <= {self.high:,}"


class ShapeTable:
    """Draws combinations of shapes, one per layer, whose total cost lies in the windows.

    Args:
        options: for each layer its shapes with their costs (tuples of integers, as many as
        windows).
        windows: the budget of each cost.
    """

    def __init__(self, options: Sequence[Sequence[tuple[Shape, Total]]], windows: Sequence[Window]):
        self.options = options
        self.windows = windows

    @cached_property
    def ways(self) -> list[dict[Total, int]]:
        """For each layer: total of this and all later layers -> number of combinations."""
        zero = (0,) * len(self.windows)
        tables = [{zero: 1}]
        for options in reversed(self.options):
            table: dict[Total, int] = {}
            costs: dict[Total, int] = {}
            for _, cost in options:
                costs[cost] = costs.get(cost, 0) + 1
            for rest, count in tables[-1].items():
                for cost, times in costs.items():
                    total = tuple(map(sum, zip(rest, cost, strict=True)))
                    table[total] = table.get(total, 0) + count * times
            tables.append(_thinned(table))
        return tables[::-1]

    @cached_property
    def totals(self) -> list[Total]:
        """Every total inside the windows, in order."""
        return sorted(total for total in self.ways[0] if self.distance(total) == 0)

    @cached_property
    def _cumulated(self) -> list[int]:
        return list(accumulate(self.ways[0][total] for total in self.totals))

    @property
    def count(self) -> int:
        """Number of combinations inside the windows."""
        return self._cumulated[-1] if self.totals else 0

    def distance(self, total: Total) -> float:
        """How far outside the windows a total lies, relative to the limits; 0 inside."""
        return sum(
            window.distance(value) for window, value in zip(self.windows, total, strict=True)
        )

    def nearest(self) -> Total:
        """The total that misses the windows by least."""
        return min(self.ways[0], key=self.distance)

    def draw(self, rng: Random) -> list[Shape]:
        """One combination, each with the same chance."""
        place = bisect_right(self._cumulated, rng.randrange(self.count))
        return self._reach(self.totals[place], rng)

    def smallest(self) -> list[Shape]:
        """A combination with the least total (by the first cost)."""
        return self._reach(self.totals[0], Random(0))

    def _reach(self, total: Total, rng: Random) -> list[Shape]:
        shapes = []
        for options, ways in zip(self.options, self.ways[1:], strict=True):
            rests = [tuple(t - c for t, c in zip(total, cost, strict=True)) for _, cost in options]
            steps = list(accumulate(ways.get(rest, 0) for rest in rests))
            place = bisect_right(steps, rng.randrange(steps[-1]))
            shapes.append(options[place][0])
            total = rests[place]
        return shapes


def _thinned(table: dict[Total, int]) -> dict[Total, int]:
    """At most `LIMIT` of the totals (a quarter with two costs): the least of every grid cell."""
    limit = LIMIT // len(next(iter(table))) ** 2
    if len(table) <= limit:
        return table
    lows, highs = (tuple(map(f, zip(*table, strict=True))) for f in (min, max))
    totals = sorted(table)
    steps = 2 * limit
    while True:
        sizes = [max((high - low) // steps, 1) for low, high in zip(lows, highs, strict=True)]
        if len(sizes) == 1:
            cells = [total[0] // sizes[0] for total in totals]
        else:
            cells = [(total[0] // sizes[0], total[1] // sizes[1]) for total in totals]
        if len(set(cells)) <= limit:
            break
        steps = steps * 2 // 3
    kept: dict[object, Total] = {}
    thinned: dict[Total, int] = {}
    for cell, total in zip(cells, totals, strict=True):
        total_of_cell = kept.setdefault(cell, total)
        thinned[total_of_cell] = thinned.get(total_of_cell, 0) + table[total]
    return thinned
