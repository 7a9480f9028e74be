"""Workers of one search: together they judge what one would, and a dead one costs nothing."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest
from patience import PATIENCE, wait_for
from search_workers import SPACE, check, hold, quality, start, survive

from fastffn.errors import UserError
from fastffn.search import Study
from fastffn.search.storage import Storage
from fastffn.search.work import work


def test_killed_workers_of_a_run_directory_lose_and_repeat_nothing(tmp_path):
    study = survive(str(tmp_path / "run"), tmp_path / "log", 24, workers=3, kills=3)
    assert len({record["worker"] for record in study.candidates()}) > 1


def test_a_worker_that_was_taken_for_dead_gives_no_second_result(tmp_path):
    place, log = str(tmp_path / "run"), tmp_path / "log"
    hold(log, 2)
    sleeper = start(place, log, 8, heartbeat=1)
    wait_for(lambda: log.exists() and log.read_text().count("begin") == 3)
    os.kill(sleeper.pid, signal.SIGSTOP)  # as a machine that is suspended
    hold(log, 100)
    other = start(place, log, 8, heartbeat=1)
    assert other.wait(PATIENCE) == 0  # it took over what the sleeper had
    os.kill(sleeper.pid, signal.SIGCONT)
    assert sleeper.wait(PATIENCE) == 0
    check(place, log, 8, {sleeper.pid})


def test_a_trial_is_taken_by_one_worker(tmp_path, monkeypatch):
    """Both have read that it waits before either says that it runs."""
    import optuna

    study = Study(SPACE, quality, tmp_path / "run")
    study._queue.claim([SPACE.random(Random(0))])
    backends = [Storage(tmp_path / "run")._database for _ in range(2)]
    updatable = optuna.storages.RDBStorage.check_trial_is_updatable

    def slowly(self, trial_id, state):
        time.sleep(0.3)
        return updatable(self, trial_id, state)

    monkeypatch.setattr(optuna.storages.RDBStorage, "check_trial_is_updatable", slowly)
    (trial,) = study._study.get_trials(deepcopy=False)
    running = optuna.trial.TrialState.RUNNING
    with ThreadPoolExecutor(2) as pool:
        taken = pool.map(lambda b: b.set_trial_state_values(trial._trial_id, running), backends)
    assert sorted(taken) == [False, True]


# -- joining a search


def searched(place, stages: dict[str, int]) -> Study:
    """The head of a search with these stages and their trials; all are open."""
    storage = place if isinstance(place, Storage) else Storage(place)
    head = Study(SPACE, None, storage)
    head.note("stages", [*stages])
    for stage, trials in stages.items():
        study = Study(SPACE, quality, storage, f"search.{stage}", seed=2, heartbeat=1)
        study.run(trials, {"method": "evolution", "warmup": 3}, batch=2, stop=lambda: True)
        study.note("open", True)
    return head


def test_a_worker_goes_from_stage_to_stage_until_the_head_says_the_end(tmp_path):
    head = searched(tmp_path, {"coarse": 5, "fine": 3})
    asked, seen = [], []

    def evaluators(stage, notes, space):
        asked.append((stage, notes["stages"], space))
        return quality

    def progress(stage, record, done, total):
        seen.append((stage, done, total))
        if done == total:  # the head, as it would from another process
            Study.load(tmp_path, f"search.{stage}").note("open", False)
            if stage == "fine":
                head.note("finished", True)

    assert work(tmp_path, evaluators, wait=0.01, progress=progress) == 8
    assert asked == [(stage, ["coarse", "fine"], SPACE) for stage in ("coarse", "fine")]
    assert seen == [("coarse", n, 5) for n in range(1, 6)] + [("fine", n, 3) for n in range(1, 4)]
    alone = Study(SPACE, quality, name="search.coarse", seed=2)
    alone.run(5, {"method": "evolution", "warmup": 3}, batch=2)
    joined = Study.load(tmp_path, "search.coarse")
    assert [r["genes"] for r in joined.candidates()] == [r["genes"] for r in alone.candidates()]
    assert work(tmp_path, evaluators) == 0  # over


def test_a_worker_leaves_a_stage_that_is_closed_early(tmp_path):
    head = searched(tmp_path, {"coarse": 100})

    def progress(stage, record, done, total):
        if done == 3:
            Study.load(tmp_path, "search.coarse").note("open", False)
            head.note("finished", True)

    assert work(tmp_path, lambda *stage: quality, wait=0.01, progress=progress) == 3
    counts = Study.load(tmp_path, "search.coarse").counts()
    assert counts["settled"] == 3 and counts["running"] == 0


def test_an_interrupted_worker_gives_its_candidate_back(tmp_path):
    head = searched(tmp_path, {"coarse": 2})
    interrupted = []

    def evaluators(stage, notes, space):
        def evaluate(genes):
            interrupted.append(genes)
            raise KeyboardInterrupt

        return evaluate

    with pytest.raises(KeyboardInterrupt):
        work(tmp_path, evaluators)

    def finish(stage, record, done, total):
        if done == total:
            head.note("finished", True)
            Study.load(tmp_path, "search.coarse").note("open", False)

    assert work(tmp_path, lambda *stage: quality, wait=0.01, progress=finish) == 2
    first = Study.load(tmp_path, "search.coarse").candidates()[0]
    assert SPACE.candidate(first["genes"]).genes in interrupted


def test_a_run_waits_for_what_others_judge_and_tells_of_it(tmp_path):
    began, mine_done, seen = threading.Event(), threading.Event(), []

    def slow(genes):
        began.set()
        assert mine_done.wait(PATIENCE)
        return quality(genes)

    def quick(genes):
        mine_done.set()
        return quality(genes)

    def other():
        Study(SPACE, slow, tmp_path).run(1)

    thread = threading.Thread(target=other)
    thread.start()
    assert began.wait(PATIENCE)
    mine = Study(SPACE, quick, tmp_path)
    judged = mine.run(2, progress=lambda record, done, total: seen.append(record["number"]))
    thread.join()
    assert judged == 1 and sorted(seen) == [0, 1]


# -- what cannot be joined


def test_what_is_not_there_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no search in .*nothing: it has no search\.sqlite3"):
        work(tmp_path / "nothing", lambda *stage: quality)
    assert not (tmp_path / "nothing").exists()
    Study(SPACE, quality, tmp_path, name="mine")
    with pytest.raises(UserError, match=r"no study 'search' in .*; there are: mine"):
        work(tmp_path, lambda *stage: quality)
    study = Study.load(tmp_path, "mine", quality)
    with pytest.raises(UserError, match="cannot join, nobody has run it yet"):
        study.join()
    with pytest.raises(UserError, match="opened for reading"):
        Study.load(tmp_path, "mine").run(1)


def test_proposals_without_a_name_cannot_be_joined(tmp_path):
    from fastffn.search import RandomProposal

    Study(SPACE, quality, tmp_path).run(2, RandomProposal(SPACE))
    with pytest.raises(UserError, match="cannot join, its proposals have no name"):
        Study.load(tmp_path, evaluate=quality).join()


def test_a_missing_driver_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(UserError, match=r'pip install "fastffn\[postgresql\]"') as caught:
        Storage("postgresql://user:secret@host/name")
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)


RACE = """
import sys
sys.path.insert(0, {tests!r})
from search_workers import SPACE, quality
from fastffn.search import Study

print(flush=True)
sys.stdin.readline()  # until all are there
Study(SPACE, quality, {folder!r}).run(3)
"""


def test_workers_may_make_the_database_at_the_same_time(tmp_path):
    code = RACE.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "run"))
    command = [sys.executable, "-c", code]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    racing = [subprocess.Popen(command, **pipes) for _ in range(3)]
    for process in racing:
        process.stdout.readline()
    for process in racing:
        process.stdin.close()
    assert [process.wait(PATIENCE) for process in racing] == [0] * 3
    assert len(Study.load(tmp_path / "run").candidates()) == 3
