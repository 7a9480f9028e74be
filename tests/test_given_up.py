"""Candidates whose evaluation failed again and again, which need not be their fault: they are given
up, with the reason, and tried anew when the search is run again."""

import math

import pytest
from search_workers import SPACE, quality

from fastffn.errors import UserError
from fastffn.search import Stage, Study, coarse_to_fine
from fastffn.search.ledger import verdict

STAGES = (Stage("coarse", 4), Stage("fine", 3, freeze="functions"))
FULL = "OSError(28, 'No space left on device')"


class Disk:
    """An evaluation that needs space for one candidate, which is better than all others."""

    def __init__(self, victim=None, full: bool = True):
        self.victim, self.full, self.failures = victim, full, 0

    def __call__(self, genes) -> float:
        if self.victim is None or genes == self.victim.genes:
            if self.full:
                self.failures += 1
                raise OSError(28, "No space left on device")
            return 1000.0
        return quality(genes)


def fails(times: int, run) -> None:
    for _ in range(times):
        with pytest.raises(OSError, match="No space left"):
            run()


@pytest.fixture(params=["memory", "directory"])
def studies(request, tmp_path):
    """Makes the study, the same one each time."""
    made = []

    def make(evaluate) -> Study:
        if request.param == "directory" or not made:
            made.append(Study(SPACE, evaluate, tmp_path if request.param == "directory" else None))
        made[-1].evaluate = evaluate
        return made[-1]

    return make


def test_it_is_given_up_with_the_reason_and_tried_again_when_asked_to(studies):
    disk = Disk(SPACE.plain()[0])

    def run(trials=3) -> Study:
        study = studies(disk)
        study.run(trials, "evolution", seeds=[disk.victim])
        return study

    fails(3, run)
    study = run()
    assert disk.failures == 3
    assert study.counts()["given_up"] == 1 and study.counts()["diverged"] == 0
    assert study.reasons() == [FULL]
    assert verdict(study._ledger.settled[0]) == f"given up: {FULL}"
    run(5)  # more trials are no reason to try it again
    assert disk.failures == 3 and study.best()["quality"] < 1000

    study = studies(disk)
    assert study.retry() == 1 and study.retry() == 0
    assert study.counts()["given_up"] == 0 and study.counts()["waiting"] == 1
    fails(3, lambda: run(5))  # as many tries as before
    assert run(5).counts()["given_up"] == 1 and disk.failures == 6

    disk.full = False
    assert studies(disk).retry() == 1
    study = run(5)
    assert study.best()["number"] == 0 and study.best()["quality"] == 1000
    assert study.counts()["given_up"] == 0 and study.counts()["finished"] == 5
    assert max(seen.quality for seen in study.history()) == 1000
    assert study.retry() == 0


def test_a_search_that_is_run_again_tries_it_and_goes_on_from_it(tmp_path):
    disk = Disk(SPACE.plain()[0])

    def search(**more):
        return coarse_to_fine(SPACE, disk, tmp_path, STAGES, [disk.victim], **more)

    fails(3, search)
    without = search()
    disk.full = False
    assert search() == without  # it is finished
    found = search(retry=True)
    assert found.best["quality"] == 1000 and found.genes == disk.victim.genes


def test_a_search_without_any_result_tries_again_by_itself(tmp_path):
    disk, stages = Disk(), STAGES[:1]

    def search():
        return coarse_to_fine(SPACE, disk, tmp_path, stages)

    fails(13, search)
    disk.full = False
    assert len(search().candidates) == 4


def test_a_search_without_any_result_says_why(tmp_path):
    """Where other processes have tried the rest meanwhile."""
    disk = Disk(SPACE.plain()[0])
    stages = [Stage("coarse", 2)]

    def evaluate(genes) -> float:
        return disk(genes) if genes == disk.victim.genes else math.nan

    def search():
        return coarse_to_fine(SPACE, evaluate, tmp_path, stages, [disk.victim])

    fails(3, search)
    with pytest.raises(UserError, match=r"given up \(OSError\(28, .*\); the same call tries these"):
        search()
    disk.full = False
    assert search().best["quality"] == 1000
