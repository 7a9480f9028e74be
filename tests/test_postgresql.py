"""A real PostgreSQL server, real workers and real kills."""

import pytest
from postgresql_server import server
from search_workers import SPACE, quality, survive

from fastffn.errors import UserError
from fastffn.search import Study
from fastffn.search.storage import Storage


@pytest.fixture(scope="module")
def postgresql():
    with server() as running:
        yield running


def test_killed_workers_lose_and_repeat_nothing(postgresql, tmp_path):
    study = survive(postgresql.url, tmp_path / "log", 24, workers=3, kills=3)
    assert len({record["worker"] for record in study.candidates()}) > 1


def test_a_search_resumes_and_outlives_a_restart_of_the_server(postgresql):
    study = Study(SPACE, quality, postgresql.url, name="restarted")
    study.run(3, "evolution")
    postgresql.stop()
    postgresql.start()
    study.run(5, "evolution")
    again = Study.load(postgresql.url, "restarted", quality)
    again.run(7, "evolution")
    alone = Study(SPACE, quality, name="restarted")
    alone.run(7, "evolution")
    assert [r["genes"] for r in again.candidates()] == [r["genes"] for r in alone.candidates()]


def test_a_server_that_goes_away_is_one_line_and_the_search_goes_on_later(postgresql):
    def evaluate(genes):
        if len(study.candidates()) == 2:
            postgresql.stop()
        return quality(genes)

    study = Study(SPACE, evaluate, postgresql.url, name="lost", heartbeat=1)
    with pytest.raises(UserError, match=r"lost the search's database postgresql://.*: ") as caught:
        study.run(4)
    assert "\n" not in str(caught.value)
    postgresql.start()
    study.evaluate = quality
    study.run(4)  # this process lives: its heartbeats have to stay away for their grace time
    assert [record["number"] for record in study.candidates()] == [0, 1, 2, 3]


def test_rungs_and_costs_are_kept(postgresql):
    def evaluate(genes):
        yield quality(genes) / 2
        yield quality(genes)

    objectives = ("quality", "params")

    def kept(place):
        study = Study(SPACE, evaluate, place, name="rungs", objectives=objectives, reduction=2)
        study.run(12)
        assert 0 < study.counts()["pruned"] < 11
        return [{**record, "seconds": 0} for record in study.candidates()]

    assert kept(postgresql.url) == kept(None)


def test_what_is_not_there_is_one_line(postgresql):
    Study(SPACE, quality, postgresql.url, name="one")
    with pytest.raises(UserError, match=r"no study 'none' in postgresql://.*there are: .*one"):
        Study.load(postgresql.url, "none")
    wrong = postgresql.url.replace("/postgres?", "/nosuch?")
    with pytest.raises(UserError, match='database "nosuch" does not exist') as caught:
        Storage(wrong)
    assert "\n" not in str(caught.value)
