"""Merit: which of two candidates is better, with one objective or with several.

Quality grows, costs shrink. With one objective the merit of a candidate is its quality. With
several it is minus the number of candidates that dominate it (at least as good in everything,
better in something), and of equals the one in the emptier region counts for more (crowding
distance: Deb et al., NSGA-II, 2002). So whatever orders candidates (evolution, the learned
partition, early stopping) needs one number and not the objectives.

Why the count and not NSGA-II's layers of fronts: counts tell more candidates apart, need no
repeated sorting, and the first layer, which is the result, is the same (count zero).

Values stand in tuples in the order of the objectives, unsigned: (0.91, 1_200_000) is a quality and
a number of parameters.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..distill.recipe_fields import choice
from ..errors import UserError
from .space import Candidate, Space

OBJECTIVES = {
    "quality": "maximize",
    "params": "minimize",
    "macs": "minimize",
    "latency": "minimize",
}

Values = tuple[float, ...]


class _Evaluated(NamedTuple):
    candidate: Candidate
    quality: float
    merit: float


class Evaluated(_Evaluated):
    """A finished candidate as proposal methods see it.

    Attributes:
        candidate: with its costs.
        quality: more is better; of a candidate that was stopped early, its last.
        merit: what orders candidates (see `merits`); the quality where none is given.
    """

    __slots__ = ()

    def __new__(cls, candidate: Candidate, quality: float, merit: float | None = None):
        return super().__new__(cls, candidate, quality, quality if merit is None else merit)


def check_objectives(
    objectives: Sequence[str] | str, space: Space | None = None
) -> tuple[str, ...]:
    """The objectives as a tuple; a lone name is one objective.

    Args:
        space: where the candidates come from; None where that is not known yet.

    Raises:
        UserError: an unknown or a repeated name, "quality" not first, or "latency" where the space
            has no table of latencies.
    """
    objectives = (objectives,) if isinstance(objectives, str) else tuple(objectives)
    for name in objectives:
        if name not in OBJECTIVES:
            raise UserError(f"unknown objective {name!r}: {choice(name, OBJECTIVES)}")
    if not objectives or objectives[0] != "quality":
        raise UserError('the first objective must be "quality"; costs follow it')
    if len(set(objectives)) < len(objectives):
        raise UserError(f"objectives: {', '.join(objectives)} names one of them twice")
    if "latency" in objectives and space is not None and space.table is None:
        raise UserError(
            "the objective latency needs a table of measured latencies: measure it "
            "(fastffn.search.latency.measure) and give it to the space"
        )
    return objectives


def values(of: Candidate | Mapping[str, Any], quality: float, objectives: Sequence[str]) -> Values:
    """What a candidate (or a study's record of one) with this quality has of each objective."""
    costs = of if isinstance(of, Mapping) else vars(of)
    return tuple(quality if name == "quality" else costs[name] for name in objectives)


def merits(seen: Sequence[Values], objectives: Sequence[str] = ("quality",)) -> list[float]:
    """The merit of each among all of them; larger is better.

    With several objectives the whole part says how many dominate it, and what is added to it, less
    than 1, how far away its neighbours of the same count are.

    Args:
        seen: n tuples of finite values.

    Returns:
        n numbers. O(n) with one objective, O(n^2) comparisons (in numpy) with several.
    """
    if len(objectives) == 1:
        return [value for (value,) in seen]
    if not seen:
        return []
    import numpy as np

    points = np.array([_upward(value, objectives) for value in seen], dtype=float)
    dominators = np.array(
        [
            np.count_nonzero(np.all(points >= point, axis=1) & np.any(points > point, axis=1))
            for point in points
        ]
    )
    found = -dominators.astype(float)
    for count in set(dominators.tolist()):
        same = dominators == count
        distinct, place = np.unique(points[same], axis=0, return_inverse=True)
        found[same] += _crowding(distinct)[place.reshape(-1)]
    return found.tolist()


def front(
    records: Sequence[Mapping[str, Any]], objectives: Sequence[str] = ("quality", "params")
) -> list[Mapping[str, Any]]:
    """The records that none dominates, cheapest first; of equal ones the earliest.

    Args:
        records: mappings with a key for each objective; those that have None somewhere (no quality,
            no known latency) are left out.
    """
    rows = [(values(r, r["quality"], objectives), r) for r in records]
    known = [(_upward(row, objectives), r) for row, r in rows if None not in row]
    found: list[tuple[Values, Mapping[str, Any]]] = []
    # from the best quality down: what comes later never dominates what came earlier
    for point, record in sorted(known, key=lambda pair: pair[0], reverse=True):
        if not any(all(a >= b for a, b in zip(other, point, strict=True)) for other, _ in found):
            found.append((point, record))
    found.sort(key=lambda pair: ([-value for value in pair[0][1:]], -pair[0][0]))
    return [record for _, record in found]


def survives(
    mine: Values,
    others: Sequence[Values],
    reduction: float,
    objectives: Sequence[str] = ("quality",),
) -> bool:
    """Whether a candidate goes on from a rung: it is among the best 1/`reduction` seen there.

    Asynchronous successive halving (Li et al., arXiv 1810.05934): the decision falls at once, by
    what others had at the same rung so far, and nobody waits for a rung to fill. Where fewer than
    `reduction` candidates reached the rung there is nothing to compare with: it goes on. Of equals
    all go on, since nothing tells them apart.

    Args:
        mine: values of the candidate at this rung.
        others: values that the others had there.
        reduction: 3 keeps a third.
    """
    own, *rest = merits([mine, *others], objectives)
    seen = 1 + len(rest)
    return seen < reduction or sum(other > own for other in rest) < int(seen / reduction)


def hypervolume(seen: Sequence[Values], reference: Values, objectives: Sequence[str]) -> float:
    """Volume of the objectives' space that the values dominate, down to the reference (Zitzler and
    Thiele, 1998): grows with every improvement of the front.

    Args:
        reference: a value per objective; what is worse in any of them adds nothing.
    """
    low = _upward(reference, objectives)
    points = [_upward(value, objectives) for value in seen]
    gains = [tuple(a - b for a, b in zip(point, low, strict=True)) for point in points]
    return _volume([gain for gain in gains if min(gain) > 0])


def _upward(value: Values, objectives: Sequence[str]) -> Values:
    """The values with the sign that makes more better."""
    return tuple(
        item if OBJECTIVES[name] == "maximize" else -item
        for name, item in zip(objectives, value, strict=True)
    )


def _crowding(points):
    """Of distinct points ([n, k]): the normalised gaps between both neighbours, summed over the
    objectives; below 1, and largest at the ends, which keep the front wide. Returns [n]."""
    import numpy as np

    count, dims = points.shape
    total = np.zeros(count)
    ends = np.zeros(count, dtype=bool)
    for column in points.T:
        order = np.argsort(column, kind="stable")
        spread = column[order[-1]] - column[order[0]]
        ends[order[[0, -1]]] = True
        if spread > 0:
            total[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / spread
    total[ends] = dims
    return total / (dims + 1)


def _volume(points: Sequence[Values]) -> float:
    """Volume of the union of boxes from the origin to positive points: sliced along the first."""
    if not points:
        return 0.0
    if len(points[0]) == 1:
        return max(point[0] for point in points)
    ordered = sorted(points, reverse=True)
    heights = [point[0] for point in ordered] + [0.0]
    slices = (
        (heights[n - 1] - heights[n]) * _volume([point[1:] for point in ordered[:n]])
        for n in range(1, len(ordered) + 1)
        if heights[n - 1] > heights[n]
    )
    return math.fsum(slices)
