"""Merit: the order that several objectives give, checked against their definitions."""

import itertools
import random

import pytest

from fastffn.errors import UserError
from fastffn.search import Space
from fastffn.search.merit import (
    OBJECTIVES,
    check_objectives,
    front,
    hypervolume,
    merits,
    survives,
    values,
)

TWO = ("quality", "params")
THREE = ("quality", "params", "latency")


def dominates(a, b) -> bool:
    """With quality first and costs after it."""
    no_worse = a[0] >= b[0] and all(x <= y for x, y in zip(a[1:], b[1:], strict=True))
    return no_worse and a != b


def some(seed: int, count: int, size: int) -> list[tuple[float, ...]]:
    """Values on a coarse grid, so that there are ties and equals."""
    rng = random.Random(seed)
    return [tuple(rng.randrange(6) for _ in range(size)) for _ in range(count)]


def test_one_objective_is_the_quality_itself():
    assert merits([(0.25,), (0.75,), (-1.0,)]) == [0.25, 0.75, -1.0]
    assert merits([]) == merits([], TWO) == []


@pytest.mark.parametrize("objectives", [TWO, THREE])
@pytest.mark.parametrize("seed", range(5))
def test_merit_counts_dominators_and_orders_by_them(objectives, seed):
    seen = some(seed, 40, len(objectives))
    found = merits(seen, objectives)
    for value, merit in zip(seen, found, strict=True):
        dominators = sum(dominates(other, value) for other in seen)
        assert -dominators <= merit < -dominators + 1
    for (a, mine), (b, other) in itertools.combinations(zip(seen, found, strict=True), 2):
        if dominates(a, b):
            assert mine > other
        if a == b:
            assert mine == other


def test_of_equals_the_lonelier_counts_for_more():
    line = [(0.0, 0), (1.0, 1), (1.1, 2), (1.2, 3), (6.0, 9), (9.0, 10)]
    found = merits(line, TWO)
    assert found[0] == found[-1] == max(found)  # the ends keep the front wide
    assert found[4] > found[3] > found[1] > found[2]


@pytest.mark.parametrize("objectives", [TWO, THREE, ("quality",)])
@pytest.mark.parametrize("seed", range(5))
def test_the_front_is_what_none_dominates(objectives, seed):
    seen = some(seed, 60, len(objectives))
    records = [
        {"at": n, **dict(zip(objectives, value, strict=True))} for n, value in enumerate(seen)
    ]
    records.append({"at": -1, **dict.fromkeys(objectives, 0), "quality": None})
    records.append({"at": -2, **dict.fromkeys(objectives, 0), objectives[-1]: None})
    found = front(records, objectives)
    rows = [tuple(record[name] for name in objectives) for record in found]
    assert set(rows) == {v for v in seen if not any(dominates(other, v) for other in seen)}
    assert len(set(rows)) == len(rows)
    assert [row[1:] for row in rows] == sorted(row[1:] for row in rows)  # cheapest first
    assert [record["at"] for record in found] == [seen.index(row) for row in rows]  # the earliest


def test_a_rung_keeps_the_best_part_of_what_it_has_seen():
    others = [(quality,) for quality in (0.1, 0.2, 0.3, 0.4, 0.5)]
    assert survives((0.45,), others, 3)  # second of six
    assert not survives((0.35,), others, 3)
    assert not survives((0.45,), others, 6)
    assert survives((0.6,), others, 6)
    assert survives((0.0,), others[:1], 3)  # too few to tell
    assert not survives((0.0,), others[:2], 3)
    assert survives((0.1,), [(0.1,)] * 9, 3)  # nothing tells them apart
    assert survives((0.2, 1), [(0.5, 5), (0.6, 6), (0.7, 7), (0.1, 8)], 2, TWO)  # cheapest
    assert not survives((0.2, 9), [(0.5, 5), (0.6, 6), (0.7, 7), (0.1, 8)], 2, TWO)


def test_values_come_from_candidates_and_records():
    candidate = Space(hidden_size=24, num_layers=1).plain()[0]
    record = {"params": 7, "macs": 8, "latency": 9, "quality": 0.5}
    assert values(candidate, 0.5, ("quality", "macs", "params")) == (
        0.5,
        candidate.macs,
        candidate.params,
    )
    assert values(record, 0.25, tuple(OBJECTIVES)) == (0.25, 7, 8, 9)


def test_hypervolume_is_the_area_under_the_front():
    seen = [(1.0, 2), (3.0, 4), (2.0, 4), (5.0, 20)]
    assert hypervolume(seen, (0.0, 10), TWO) == 1 * 8 + 2 * 6  # the last is beyond the reference
    assert hypervolume([], (0.0, 10), TWO) == 0
    assert hypervolume([(0.5,), (0.75,)], (0.25,), ("quality",)) == 0.5
    cubes = [(x, 10 - y, 10 - z) for x, y, z in ((1, 2, 3), (3, 1, 2), (2, 2, 2))]
    cells = itertools.product(range(4), repeat=3)
    boxes = ((1, 2, 3), (3, 1, 2), (2, 2, 2))
    covered = sum(
        any(all(c < s for c, s in zip(cell, box, strict=True)) for box in boxes) for cell in cells
    )
    assert hypervolume(cubes, (0, 10, 10), THREE) == covered


def test_objectives_are_checked():
    space = Space(hidden_size=24, num_layers=1)
    assert check_objectives("quality") == ("quality",)
    assert check_objectives(["quality", "macs"], space) == ("quality", "macs")
    assert check_objectives(["quality", "latency"]) == ("quality", "latency")
    for wrong, message in (
        (["quality", "parms"], "'parms': did you mean params"),
        (["params", "quality"], 'must be "quality"'),
        ([], 'must be "quality"'),
        (["quality", "macs", "macs"], "twice"),
    ):
        with pytest.raises(UserError, match=message):
            check_objectives(wrong, space)
    with pytest.raises(UserError, match="needs a table"):
        check_objectives(["quality", "latency"], space)
