"""Searches that are interrupted or killed: same candidates, qualities and winner as others."""

import pytest

from fastffn.search import Space, Study


@pytest.mark.parametrize("at", range(1, 12))
def test_who_is_stopped_early_does_not_depend_on_interruptions(at):
    """A candidate that is queued again must not come after the rest of its batch."""
    space = Space(hidden_size=120, num_layers=2)
    calls = 0

    def rungs(genes, interrupted):
        nonlocal calls
        for _ in range(2):
            calls += 1
            if interrupted and calls == at:
                raise KeyboardInterrupt
            yield float(len(str(genes)) % 17)

    def study(interrupted):
        study = Study(space, lambda genes: rungs(genes, interrupted), reduction=2)
        try:
            study.run(9, "random", batch=4)
        except KeyboardInterrupt:
            study.run(9, "random", batch=4)
        keys = ("number", "genes", "rungs", "pruned")
        return [{key: record[key] for key in keys} for record in study.candidates()]

    assert study(True) == study(False)
