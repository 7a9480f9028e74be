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

import math
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property
from itertools import accumulate
from random import Random
from typing import Any, NamedTuple

from ..distill.recipe_fields import RecipeError

LIMIT = 6_000
_BITS = 48  # of a cost within a total: far more than any that adds up here

_AMOUNT = re.compile(r"([0-9][0-9_]*(?:\.[0-9]+)?) ?([kMG]?)")
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}

Total = int  # the costs of a combination, see `_packed`


class Shape(NamedTuple):
    """What of a gene decides its cost."""

    stack: int
    ratio: Fraction
    gated: bool = False


class Window(NamedTuple):
    """Least and greatest allowed value, both inclusive; None where there is no limit.

    Parameters and MACs are whole numbers. Latencies are milliseconds in a `Space`, and whole
    microseconds (`microseconds`) wherever something is added or compared.
    """

    low: float | None = None
    high: float | None = None

    @staticmethod
    def read(value: Any, path: tuple, whole: bool = True) -> "Window":
        """The window that a person writes: a maximum or [least, greatest], None: no limit.

        Args:
            value: numbers, or texts such as "15M", "1.2k", "3G".
            path: where it stands, for errors.
            whole: whether the limits must be whole numbers.

        Raises:
            RecipeError: it is none.
        """
        try:
            if isinstance(value, list | tuple):
                low, high = (_amount(limit, whole) for limit in value)
            else:
                low, high = None, _amount(value, whole)
        except ValueError:
            kind = "whole numbers such as 15M" if whole else "milliseconds"
            said = f"must be a maximum or [least, greatest] in {kind}, not {value!r}"
            raise RecipeError(path, said) from None
        if low is not None and high is not None and low > high:
            raise RecipeError(path, f"has its least, {low:,}, above its greatest, {high:,}")
        return Window(low, high)

    def microseconds(self) -> "Window":
        """Of milliseconds."""
        return Window(*(None if limit is None else round(1000 * limit) for limit in self))

    def less(self, fixed: int) -> "Window":
        """What remains where `fixed` is spent in any case."""
        return Window(*(None if limit is None else limit - fixed for limit in self))

    def distance(self, value: int) -> float:
        """0 inside, else how far outside, relative to the limit."""
        if self.low is not None and value < self.low:
            return (self.low - value) / max(self.low, 1)
        if self.high is not None and value > self.high:
            return (value - self.high) / max(self.high, 1)
        return 0.0

    def text(self, name: str) -> str:
        """For people; limits as candidates have them."""
        low, high = (None if limit is None else shown(name, limit) for limit in self)
        if low is None:
            return name if high is None else f"{name} <= {high}"
        return f"{name} >= {low}" if high is None else f"{low} <= {name} <= {high}"


def shown(name: str, value: float) -> str:
    """A candidate's cost for people: a latency, which is in microseconds, as milliseconds."""
    return f"{value / 1000:.2f} ms" if name == "latency" else f"{value:,}"


def _amount(value: Any, whole: bool) -> float | None:
    """The number that a limit is; a ValueError for what is none."""
    if value is None:
        return None
    if isinstance(value, str):
        match = _AMOUNT.fullmatch(value.strip())
        if match is None:
            raise ValueError(value)
        value = Fraction(match[1].replace("_", "")) * _UNITS[match[2]]
        value = int(value) if value.denominator == 1 else float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(value)
    if not math.isfinite(value) or value < 0 or (whole and value != int(value)):
        raise ValueError(value)
    return int(value) if whole else value


class ShapeTable:
    """Draws combinations of shapes, one per layer, whose total cost lies in the windows.

    Args:
        options: for each layer its shapes with their costs (tuples of integers from 0, as many as
            windows).
        windows: the budget of each cost.
    """

    def __init__(
        self,
        options: Sequence[Sequence[tuple[Shape, Sequence[int]]]],
        windows: Sequence[Window],
    ):
        self.options = [[(shape, _packed(cost)) for shape, cost in layer] for layer in options]
        self.windows = windows

    @cached_property
    def ways(self) -> list[dict[Total, int]]:
        """For each layer: total of this and all later layers -> number of combinations."""
        tables = [{0: 1}]
        for options in reversed(self.options):
            table: dict[Total, int] = {}
            for cost, times in Counter(cost for _, cost in options).items():
                for rest, count in tables[-1].items():
                    table[rest + cost] = table.get(rest + cost, 0) + count * times
            tables.append(_thinned(table, len(self.windows)))
        return tables[::-1]

    @cached_property
    def totals(self) -> list[Total]:
        """Every total inside the windows, in order, the first cost foremost."""
        return sorted(total for total in self.ways[0] if self._distance(total) == 0)

    @cached_property
    def _cumulated(self) -> list[int]:
        return list(accumulate(self.ways[0][total] for total in self.totals))

    @property
    def count(self) -> int:
        """Number of combinations inside the windows."""
        return self._cumulated[-1] if self.totals else 0

    def distance(self, costs: Sequence[int]) -> float:
        """How far outside the windows costs lie, relative to the limits; 0 inside."""
        return sum(
            window.distance(value) for window, value in zip(self.windows, costs, strict=True)
        )

    def nearest(self) -> list[Shape]:
        """A combination whose total misses the windows by least."""
        return self._reach(min(self.ways[0], key=self._distance), Random(0))

    def draw(self, rng: Random) -> list[Shape]:
        """One combination, each with the same chance."""
        place = bisect_right(self._cumulated, rng.randrange(self.count))
        return self._reach(self.totals[place], rng)

    def smallest(self) -> list[Shape]:
        """A combination with the least total (by the first cost)."""
        return self._reach(self.totals[0], Random(0))

    def largest(self) -> list[Shape]:
        """A combination with the greatest total (by the first cost)."""
        return self._reach(self.totals[-1], Random(0))

    def _distance(self, total: Total) -> float:
        return self.distance([column[0] for column in _columns([total], len(self.windows))])

    def _reach(self, total: Total, rng: Random) -> list[Shape]:
        shapes = []
        for options, ways in zip(self.options, self.ways[1:], strict=True):
            # a cost above the total leaves a number that is no total: nothing borrows so far down
            rests = [total - cost for _, cost in options]
            steps = list(accumulate(ways.get(rest, 0) for rest in rests))
            place = bisect_right(steps, rng.randrange(steps[-1]))
            shapes.append(options[place][0])
            total = rests[place]
        return shapes


def _packed(costs: Sequence[int]) -> Total:
    """Costs as one integer: these add, compare and hash several times as fast as tuples."""
    total = 0
    for cost in costs:
        total = total << _BITS | cost
    return total


def _columns(totals: Sequence[Total], number: int) -> list[list[int]]:
    """Each cost of all totals."""
    shifts = [_BITS * place for place in reversed(range(number))]
    return [[total >> shift & (1 << _BITS) - 1 for total in totals] for shift in shifts]


def _thinned(table: dict[Total, int], number: int) -> dict[Total, int]:
    """At most `LIMIT` / number of costs of the totals: the least of every grid cell."""
    limit = LIMIT // number
    if len(table) <= limit:
        return table
    totals = sorted(table)
    columns = _columns(totals, number)
    steps = 2 * limit
    while True:
        sizes = [max((max(column) - min(column)) // steps, 1) for column in columns]
        scaled = [
            [value // size for value in column] for column, size in zip(columns, sizes, strict=True)
        ]
        cells = list(zip(*scaled, strict=True))
        if len(set(cells)) <= limit:
            break
        steps = steps * 2 // 3
    kept: dict[tuple[int, ...], Total] = {}
    thinned: dict[Total, int] = {}
    for cell, total in zip(cells, totals, strict=True):
        total_of_cell = kept.setdefault(cell, total)
        thinned[total_of_cell] = thinned.get(total_of_cell, 0) + table[total]
    return thinned
