"""Methods side by side: equal budgets, shared judgements, numbers that say what happened."""

import json
from statistics import median

import pytest
from search_truths import SHAPES, SPACE, quality

from fastffn.errors import UserError
from fastffn.search.compare import compare, table
from fastffn.search.merit import hypervolume

pytest.importorskip("sklearn")
pytest.importorskip("optuna")


def test_every_search_has_the_same_budget_and_a_curve():
    judged, events = [], []

    def evaluate(genes):
        judged.append(genes)
        return quality(genes)

    def tell(method, seed, record, done, total):
        events.append((method, seed, record["quality"], done, total))

    partition = {"method": "partition", "exploration": 0.3}
    result = compare(SPACE, evaluate, ["random", "evolution", partition], 14, [3, 5], tell)
    assert json.loads(json.dumps(result)) == result
    assert (result["score"], result["trials"], result["seeds"]) == ("quality", 14, [3, 5])
    names = {"random", "evolution", "partition(exploration=0.3)"}
    assert set(result["methods"]) == names == {event[0] for event in events}
    for name, one in result["methods"].items():
        assert one["median"] == median(one["best"])
        assert (one["low"], one["high"]) == (min(one["best"]), max(one["best"]))
        runs = zip([3, 5], one["best"], one["curves"], one["genes"], strict=True)
        for seed, best, curve, genes in runs:
            mine = [event for event in events if event[:2] == (name, seed)]
            assert [event[3:] for event in mine] == [(done, 14) for done in range(1, 15)]
            assert curve == [max(event[2] for event in mine[: n + 1]) for n in range(14)]
            assert best == curve[-1] == quality(SPACE.candidate(genes).genes)
    # each candidate once, though searches of one seed begin with the same ones
    assert len(judged) == len(set(judged)) == result["judged"] <= 6 * 14 - 2 * 2 * 8


def test_what_was_judged_is_kept_and_an_interrupted_comparison_goes_on():
    def run(evaluate, judged):
        methods = ["random", "tpe", "nsga2"]
        return compare(SHAPES, evaluate, methods, 15, [0, 1], judged=judged, random=4)

    calls = []

    def dies(genes):
        if len(calls) == 20:
            raise KeyboardInterrupt
        calls.append(genes)
        return quality(genes)

    kept: dict = {}
    with pytest.raises(KeyboardInterrupt):
        run(dies, kept)
    assert len(kept) == 20 and all(entry["whole"] for entry in kept.values())
    kept = json.loads(json.dumps(kept))
    again = []
    result = run(lambda genes: again.append(genes) or quality(genes), kept)
    assert not set(calls) & set(again) and len(again) == result["judged"]
    fresh = run(quality, None)
    assert {**result, "judged": fresh["judged"]} == fresh


def test_rungs_are_played_again_and_judging_goes_on_where_it_was_stopped():
    steps, ended = [], []

    def evaluate(genes):
        try:
            for part in (0.2, 0.6, 1.0):
                steps.append((genes, part))
                yield part * (2 + quality(genes))
        finally:
            ended.append(genes)

    kept: dict = {}
    result = compare(SPACE, evaluate, ["random", "evolution"], 20, [0], judged=kept)
    lengths = [len(entry["rungs"]) for entry in kept.values()]
    assert {1, 3} <= set(lengths) <= {1, 2, 3}
    assert all(entry["whole"] == (len(entry["rungs"]) == 3) for entry in kept.values())
    assert len(ended) >= len(kept)
    whole = [entry["rungs"][-1] for entry in kept.values() if entry["whole"]]
    assert max(one["high"] for one in result["methods"].values()) == max(whole)
    before = len(steps)
    compare(SPACE, evaluate, ["random", "evolution"], 20, [0], judged=kept)
    assert len(steps) == before  # the same searches ask for nothing new


def test_several_objectives_are_scored_by_the_volume_below_the_front():
    seen: dict[int, list] = {}

    def tell(method, seed, record, done, total):
        seen.setdefault(seed, []).append((record["quality"], record["macs"]))

    both = ("quality", "macs")
    result = compare(SPACE, quality, ["random"], 12, [0, 1], tell, both)
    rows = seen[0] + seen[1]
    reference = (min(row[0] for row in rows), max(row[1] for row in rows))
    one = result["methods"]["random"]
    for seed in (0, 1):
        assert one["best"][seed] == pytest.approx(hypervolume(seen[seed], reference, both))
        assert one["curves"][seed] == sorted(one["curves"][seed])
    assert result["score"] == "hypervolume" and "best hypervolume" in table(result)


def test_the_table_is_for_people():
    result = compare(SHAPES, quality, ["random", "tpe"], 16, [0, 1, 2], random=6)
    lines = table(result).splitlines()
    assert lines[0] == "best quality after 16 candidates, 3 seeds"
    assert lines[1].split("  ")[0] == "method" and "median after 8" in lines[1]
    assert [line.split()[0] for line in lines[2:4]] == list(result["methods"])
    medians = [one["median"] for one in result["methods"].values()]
    assert medians == sorted(medians, reverse=True)
    assert f"{medians[0]:.4g}" in lines[2]
    assert len({len(line) for line in lines[1:4]}) == 1


@pytest.mark.parametrize(
    ("methods", "seeds", "objectives", "message"),
    [
        ([], [0], ("quality",), "at least one method"),
        (["random", "random"], [0], ("quality",), "none of them twice"),
        (["random"], [], ("quality",), "at least one seed"),
        (["random"], [1, 1], ("quality",), "none of them twice"),
        (["random", "magic"], [0], ("quality",), "unknown proposal method"),
        (["random", "tpe"], [0], ("quality",), "freeze functions"),
        (["random"], [0], ("params",), "must be"),
    ],
)
def test_bad_comparisons_are_refused_before_anything_is_judged(methods, seeds, objectives, message):
    def evaluate(genes):
        raise AssertionError("nothing should be judged")

    with pytest.raises(UserError, match=message):
        compare(SPACE, evaluate, methods, 5, seeds, objectives=objectives)


def test_a_search_without_a_quality_is_said():
    with pytest.raises(UserError, match="random, seed 7: no candidate reached a quality"):
        compare(SPACE, lambda genes: float("nan"), ["random"], 3, [7])
