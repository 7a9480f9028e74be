"""Candidates judged in steps of rising fidelity: early stops, several objectives, what is kept."""

import gc
import math
import weakref

import pytest

pytest.importorskip("optuna")

import optuna
from search_workers import SPACE, quality

from fastffn.errors import UserError
from fastffn.search import Study, merit

REDUCTION = 3


def rising(calls=None, closed=None):
    """Judges by three rungs; notes what was asked for, and which iterators were closed."""

    def evaluate(genes):
        try:
            for rung in (1, 2, 3):
                if calls is not None:
                    calls.append((genes, rung))
                yield quality(genes) * rung
        finally:
            if closed is not None:
                closed.append(genes)

    return evaluate


def test_only_the_best_of_a_rung_go_on():
    calls, closed = [], []
    study = Study(SPACE, rising(calls, closed), reduction=REDUCTION)
    study.run(30)
    records = study.candidates()
    assert len(records) == len(closed) == 30
    seen: list[list[float]] = [[], [], []]
    for record in records:
        assert record["quality"] == record["rungs"][-1]
        for rung, value in enumerate(record["rungs"]):
            mine, others = (value,), [(other,) for other in seen[rung]]
            last = rung == len(record["rungs"]) - 1
            goes_on = not seen[2] or merit.survives(mine, others, REDUCTION)
            assert rung == 2 or goes_on == (not last)
            seen[rung].append(value)
        assert record["pruned"] == (len(record["rungs"]) < 3)
    assert len(calls) == sum(len(record["rungs"]) for record in records) < 60
    counts = study.counts()
    assert counts["finished"] + counts["pruned"] == counts["settled"] == 30
    assert counts["pruned"] == sum(record["pruned"] for record in records) > 10
    assert not study.best()["pruned"] and not any(r["pruned"] for r in study.front())
    assert len(study.history()) == 30

    trials = study._study.trials  # as Optuna's own tools see it
    assert {trial.state.name for trial in trials} == {"COMPLETE", "PRUNED"}
    for trial, record in zip(trials, records, strict=True):
        assert [*trial.intermediate_values.values()] == record["rungs"]
        assert trial.params["layer0.stack"] == SPACE.candidate(record["genes"]).genes[0].stack
    importances = optuna.importance.get_param_importances(study._study)
    assert set(importances) == {f"layer{n}.{what}" for n in (0, 1) for what in ("stack", "ratio")}


def test_one_quality_is_never_stopped_early():
    study = Study(SPACE, quality, reduction=1.5)
    study.run(12)
    assert not any(record["pruned"] for record in study.candidates())


def test_divergence_at_any_rung_is_the_end(tmp_path):
    asked = []

    def evaluate(genes):
        for value in (1.0, math.inf, 2.0):
            asked.append(value)
            yield value

    study = Study(SPACE, evaluate, tmp_path)
    study.run(2)
    assert asked == [1.0, math.inf] * 2
    assert study.candidates() == [] and study.counts()["diverged"] == 2
    with pytest.raises(UserError, match="no candidate is finished yet"):
        study.best()


class Model:
    """Something heavy that an evaluation makes."""


def test_nothing_of_an_evaluation_is_kept(tmp_path):
    made = []

    def evaluate(genes):
        gc.collect()
        alive.append(sum(model() is not None for model in made))
        model = Model()
        made.append(weakref.ref(model))
        yield quality(genes)
        yield quality(genes) if model else math.nan

    alive: list[int] = []
    study = Study(SPACE, evaluate, tmp_path)
    study.run(12)
    assert study.counts()["pruned"] > 0
    assert alive == [0] * 12


def test_an_evaluation_without_a_quality_is_an_error():
    with pytest.raises(UserError, match="gave no quality for"):
        Study(SPACE, lambda genes: iter(())).run(1)


def test_several_objectives(tmp_path):
    objectives = ("quality", "params", "macs")
    study = Study(SPACE, rising(), tmp_path, objectives=objectives, reduction=2)
    study.run(24, "evolution")
    assert [d.name for d in study._study.directions] == ["MAXIMIZE", "MINIMIZE", "MINIMIZE"]
    records = study.candidates()
    assert 0 < study.counts()["pruned"] < 20
    for trial, record in zip(study._study.trials, records, strict=True):
        whole = [record["quality"], record["params"], record["macs"]]
        assert trial.values == (None if record["pruned"] else whole)
    expected = merit.merits(
        [merit.values(r, r["quality"], objectives) for r in records], objectives
    )
    assert [seen.merit for seen in study.history()] == expected
    finished = [record for record in records if not record["pruned"]]
    assert study.front() == merit.front(finished, objectives)

    again = Study.load(tmp_path, evaluate=rising())
    assert again.objectives == objectives and again.reduction == 2
    assert again.candidates() == records
    with pytest.raises(UserError, match="objectives quality, params, macs, not quality: take"):
        Study(SPACE, quality, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objectives": ("quality", "size")}, "unknown objective 'size'"),
        ({"objectives": ("quality", "latency")}, "latency needs a table"),
        ({"objectives": ("params",)}, 'must be "quality"'),
        ({"reduction": 1}, "reduction 1: give more than 1"),
        ({"heartbeat": 0.5}, "whole seconds"),
        ({"heartbeat": 0}, "whole seconds"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        Study(SPACE, quality, tmp_path, **changes)


@pytest.mark.parametrize("at", range(1, 12))
def test_who_is_stopped_early_does_not_depend_on_interruptions(at):
    """A candidate that is queued again must not come after the rest of its batch."""
    calls = 0

    def rungs(genes, interrupted):
        nonlocal calls
        for _ in range(2):
            calls += 1
            if interrupted and calls == at:
                raise KeyboardInterrupt
            yield float(len(str(genes)) % 17)

    def study(interrupted):
        study = Study(SPACE, lambda genes: rungs(genes, interrupted), reduction=2)
        try:
            study.run(9, "random", batch=4)
        except KeyboardInterrupt:
            study.run(9, "random", batch=4)
        keys = ("number", "genes", "rungs", "pruned")
        return [{key: record[key] for key in keys} for record in study.candidates()]

    assert study(True) == study(False)
