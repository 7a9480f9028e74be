"""The process that leads a search gives signs of life; workers without work say when it is gone."""

import pytest
from patience import wait_for
from search_workers import SPACE, quality

from fastffn.errors import UserError
from fastffn.search import Study, head, liveness
from fastffn.search.head import Head, HeadWatch
from fastffn.search.storage import Storage
from fastffn.search.work import work

ELSEWHERE = "elsewhere 1 2 boot/pid"  # nobody here can tell whether it lives
GONE = "the process of the search search is gone, this one waits"


def test_a_head_gives_signs_of_life_until_it_leaves(tmp_path):
    storage = Storage(tmp_path, heartbeat=1)
    leading = Head(storage, "search")
    with pytest.raises(KeyboardInterrupt), leading.alive():
        wait_for(lambda: storage.notes("search").get("beat", ["", 0])[1] >= 2)
        assert storage.notes("search")["beat"][0] == liveness.signature()
        raise KeyboardInterrupt
    assert storage.notes("search")["beat"] == ""


def test_a_sign_of_life_that_cannot_be_given_is_missed(tmp_path, monkeypatch):
    import optuna

    storage = Storage(tmp_path, heartbeat=1)
    leading = Head(storage, "search")
    given, own = [], leading.note

    def note(**values):
        given.append(values)
        if len(given) == 1:
            raise optuna.exceptions.StorageInternalError("locked")
        own(**values)

    monkeypatch.setattr(leading, "note", note)
    with leading.alive():
        wait_for(lambda: storage.notes("search").get("beat"))


def test_a_head_that_was_started_over_elsewhere_ends_quietly(tmp_path):
    storage = Storage(tmp_path, heartbeat=1)
    leading = Head(storage, "search")
    with leading.alive():
        leading.note(stages=[])
        storage.remove("search")
    assert storage.names() == []


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(head.time, "monotonic", lambda: now[0])
    return now


def test_a_head_that_gives_no_sign_of_life_is_told_of_once_then_given_up(clock):
    watch = HeadWatch("search", grace=30)
    for number in range(3):  # it lives
        assert watch.look({"beat": [ELSEWHERE, number]}) is None
        clock[0] += 29
    assert watch.look({"beat": [ELSEWHERE, 2]}) is None
    clock[0] += 2
    assert watch.look({"beat": [ELSEWHERE, 2]}).startswith(GONE)
    clock[0] += 2
    assert watch.look({"beat": [ELSEWHERE, 2]}) is None  # said
    assert watch.look({"beat": [ELSEWHERE, 3]}) is None  # it was only slow
    clock[0] += 31
    assert watch.look({"beat": [ELSEWHERE, 3]}).startswith(GONE)
    clock[0] += 20 * 30 - 32
    assert watch.look({"beat": [ELSEWHERE, 3]}) is None
    clock[0] += 2
    with pytest.raises(UserError, match="gave no sign of life for 10 minutes: give its fastffn"):
        watch.look({"beat": [ELSEWHERE, 3]})


@pytest.mark.parametrize("beat", ["", [" ".join(["x", "1", "2", "?"]), 7]])
def test_a_head_that_has_left_or_died_here_is_told_of_at_once(clock, monkeypatch, beat):
    monkeypatch.setattr(liveness, "is_dead", lambda owner: True)
    watch = HeadWatch("search", grace=30)
    assert watch.look({"beat": beat}).startswith(GONE)
    assert watch.look({"beat": beat}) is None
    monkeypatch.setattr(liveness, "is_dead", lambda owner: False)
    assert watch.look({"beat": [ELSEWHERE, 0]}) is None  # another one leads now
    clock[0] += 20 * 30 - 1
    assert watch.look({"beat": [ELSEWHERE, 1]}) is None


def test_a_search_of_before_there_were_signs_of_life_is_waited_for_too(clock):
    watch = HeadWatch("search", grace=30)
    assert watch.look({}) is None
    clock[0] += 31
    assert watch.look({}).startswith(GONE)


@pytest.mark.parametrize("judged", [0, 2])
def test_a_worker_without_a_head_ends_in_the_end(tmp_path, monkeypatch, judged):
    """What there is to judge it judges before; until a stage is open it has nothing to do."""
    monkeypatch.setattr(head, "_LONG", 0.1)  # of three seconds
    storage = Storage(tmp_path, heartbeat=1)
    leading = Head(storage, "search")
    leading.note(stages=["coarse"], beat="")
    if judged:
        study = Study(SPACE, quality, storage, "search.coarse")
        study.run(judged, "random", stop=lambda: True)
        study.note("open", True)
    said = []
    with pytest.raises(UserError, match="gave no sign of life"):
        work(storage, lambda *stage: quality, wait=0.01, say=said.append)
    assert len(said) == 1 and said[0].startswith(GONE)
    if judged:
        assert study.counts()["settled"] == judged
