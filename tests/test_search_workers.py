"""Searches in several processes, killed and joined: candidates, qualities and winner stay those of
one process that nobody disturbs."""

import random
import shutil
from collections import Counter

import pytest

pytest.importorskip("transformers")
pytest.importorskip("optuna")

from patience import PATIENCE, wait_for
from tiny_recipes import Files
from tiny_searches import (
    changed,
    coarse,
    events,
    fine,
    judged,
    outcome,
    report,
    said,
    search,
    spawn,
    three,
    undisturbed,
    worker,
)

from fastffn.errors import UserError
from fastffn.search import engine, evaluation
from fastffn.search import worker as working
from fastffn.search.storage import Storage
from fastffn.search.study import Study

_KILLED = -9


@pytest.fixture(autouse=True)
def alone():
    with undisturbed():
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return Files(tmp_path_factory.mktemp("tiny") / "files")


def test_a_search_that_is_killed_twice_ends_like_others(files, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert spawn(three(files), whole) == 0, said(whole)
    before, moments = {}, []
    for share in (0.6, 0.3):
        moments.append(random.randrange(int(share * events(whole))))
        assert spawn(three(files), out, moments[-1]) == _KILLED, moments
        assert before.items() <= (before := judged(out)).items(), moments
    assert spawn(three(files), out) == 0, said(out)
    assert before.items() <= judged(out).items()
    assert outcome(report(out)) == outcome(report(whole)), moments
    assert not (out / "work").exists()
    assert {path.name for path in (out / "supernets").iterdir()} == {"coarse", "fine"}


def test_a_worker_in_another_process_joins_a_search(files, tmp_path, monkeypatch):
    """It judges as the search itself does, goes with it to the next stage, and ends with it."""
    score = {"stage": "shared", "rows": 8}
    stages = [
        coarse(trials=10, rungs=[1], proposals="random"),
        fine(trials=4, score=score, proposals="random"),
    ]
    recipe, out = search(files, stages), tmp_path / "run"
    lonely = engine.run(recipe, tmp_path / "alone")

    own, calls, started = evaluation._Evaluation.score, [], []
    monkeypatch.setattr(
        evaluation._Evaluation, "score", lambda *given: calls.append(1) or own(*given)
    )

    def progress(stage, done, total, text):
        """Holds this process up between two candidates until the other has judged some."""
        if stage == "coarse" and not started:
            started.append(worker(out, tmp_path / "worker"))
            wait_for(lambda: by(started[0].pid) >= 2 or started[0].exitcode is not None)

    def by(pid):
        study = Study.load(Storage(out, create=False), "tiny.coarse")
        return sum(str(r["worker"]).endswith(f":{pid}") for r in study.candidates())

    found = engine.run(recipe, out, progress=progress)
    (process,) = started
    process.join(PATIENCE)
    assert process.exitcode == 0, said(tmp_path / "worker")

    judges = Counter(r["worker"].rpartition(":")[2] for r in found["candidates"])
    there = judges.pop(str(process.pid))
    assert there >= 2 and judges.total() == len(calls) > 0  # nothing here but what counts
    assert f"{there} candidates were judged here" in said(tmp_path / "worker")
    assert outcome(found) == outcome(lonely)
    trials = [t for stage in ("coarse", "fine") for t in _results(out, stage)]
    assert len(trials) == len(set(trials)) == 14


def _results(out, stage):
    """Of each trial with a value: stage and genes."""
    study = Study.load(Storage(out, create=False), f"tiny.{stage}")
    inherited = {r["fingerprint"] for r in study.candidates() if r["inherited"]}
    named = [t.user_attrs["fingerprint"] for t in study._study.trials if t.value is not None]
    return [(stage, name) for name in named if name not in inherited]


# -- workers that would spoil a search


@pytest.fixture(scope="module")
def interrupted(files, tmp_path_factory):
    """A search whose own process has left after two candidates: run directory and database."""
    folder = tmp_path_factory.mktemp("interrupted")
    out, url = folder / "run", f"sqlite:///{folder}/x.db"

    def stop(phase, done, total, text):
        if (phase, done) == ("coarse", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.run(search(files, [coarse(trials=6)]), out, storage=url, progress=stop)
    return out, url


def refused(url, **more) -> str:
    before = Study.load(Storage(url), "tiny.coarse").counts()
    with pytest.raises(UserError) as caught:
        working.run(url, **more)
    assert Study.load(Storage(url), "tiny.coarse").counts() == before
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_a_worker_with_another_teacher_is_refused(files, interrupted, tmp_path):
    _, url = interrupted
    other = shutil.copytree(files.teacher, tmp_path / "teacher")
    changed(other)
    text = refused(url, overrides=[f"teacher.load={other}"])
    assert text.startswith("stage coarse: models or data of this machine are not those")


def test_a_search_that_was_interrupted_says_that_nobody_leads_it(interrupted):
    _, url = interrupted
    assert Storage(url).notes("tiny")["beat"] == ""


def test_a_worker_with_other_options_is_refused(interrupted):
    _, url = interrupted
    text = refused(url, overrides=["stages.proxy.learning_rate=0.1"])
    assert text.startswith("stages.proxy.learning_rate is 0.001 in the search")


def test_a_worker_that_does_not_see_the_run_directory_is_told_how(interrupted, tmp_path):
    """A copy of it will do."""
    out, url = interrupted
    there = out.rename(tmp_path / "elsewhere")
    try:
        text = refused(url)
        assert text.startswith(f"the supernet {out / 'supernets' / 'coarse' / 'student'} is not")
        assert text.endswith("with --out")

        def stop(phase, done, total, text):
            if phase == "coarse":
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            working.run(url, out=there, progress=stop)
    finally:
        there.rename(out)
    assert Study.load(Storage(url), "tiny.coarse").counts()["settled"] == 3


def test_a_run_directory_without_a_search_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"^no search in "):
        working.run(str(tmp_path / "nothing"))
    assert not (tmp_path / "nothing").exists()
