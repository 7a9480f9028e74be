"""Claims: one slot per candidate, one candidate per slot, whatever dies between two steps."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading

import pytest

pytest.importorskip("optuna")

import optuna
from search_workers import SPACE, quality

from fastffn.errors import UserError
from fastffn.search import RandomProposal, Space, Study, ledger, liveness
from fastffn.search.claims import Claim
from fastffn.search.storage import Storage

ME = liveness.signature()


def dead_owner() -> str:
    """The signature of a process that is gone."""
    code = "from fastffn.search import liveness; print(liveness.signature())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def claim(slot: int, fingerprint: str, owner: str = ME) -> Claim:
    return Claim(slot, fingerprint, ("1x1 down(gelu(up(x)))",), 0, owner)


@pytest.fixture(params=["memory", "directory"])
def claims(request, tmp_path):
    storage = Storage(None if request.param == "memory" else tmp_path)
    for name in ("other", "search"):
        optuna.create_study(storage=storage.backend, study_name=name)
    assert storage.claims("other").add([claim(0, "a")])  # of its own, whatever the next one does
    return storage.claims("search")


def test_slots_and_candidates_are_claimed_once_and_batches_whole(claims):
    assert claims.add([claim(0, "a"), claim(1, "b")])
    assert not claims.add([claim(1, "c")])  # the slot is taken
    assert not claims.add([claim(2, "c"), claim(3, "b")])  # a candidate is: neither is claimed
    assert claims.add([claim(2, "c")])
    assert [found.fingerprint for found in claims.since(1)] == ["b", "c"]
    assert claims.get([2, 0]) == [claim(0, "a"), claim(2, "c")]
    assert claims.get([]) == [] and claims.since(3) == []


def test_an_attempt_is_raised_once(claims):
    assert claims.add([claim(0, "a")])
    (first,) = claims.get([0])
    assert claims.again(first, "b 1 2 3") and not claims.again(first, "c 1 2 3")
    assert claims.get([0]) == [first._replace(attempt=1, owner="b 1 2 3")]


def test_an_attempt_is_taken_once_and_only_while_it_is_the_last(claims):
    assert claims.add([claim(0, "a")])
    (before,) = claims.get([0])
    assert claims.take(0, 0) and not claims.take(0, 0)
    assert not claims.again(before, ME)  # it looked as if nobody had it
    (taken,) = claims.get([0])
    assert taken.taken == 0 and claims.again(taken, ME)
    assert not claims.take(0, 0) and claims.take(0, 1) and not claims.take(0, 1)


def test_many_threads_get_every_slot_once(tmp_path):
    storage = Storage(tmp_path)
    optuna.create_study(storage=storage.backend, study_name="search")
    won: list[tuple[int, int]] = []

    def compete(worker: int) -> None:
        claims, slot = storage.claims("search"), 0
        while slot < 12:
            if claims.add([claim(slot, f"{worker} {slot}")]):
                won.append((slot, worker))
            slot = len(claims.since(0))

    threads = [threading.Thread(target=compete, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(slot for slot, _ in won) == list(range(12))


class Counted(RandomProposal):
    """Chance, and how often it was asked."""

    asked = 0

    def propose(self, history, rng):
        self.asked += 1
        return super().propose(history, rng)


def test_batches_are_claimed_at_once_in_the_order_of_their_genes():
    judged, waiting = [], []

    def evaluate(genes):
        judged.append([str(gene) for gene in genes])
        waiting.append(study.counts()["waiting"])
        return quality(genes)

    study = Study(SPACE, evaluate)
    study.run(10, batch=4)
    assert waiting == [3, 2, 1, 0, 3, 2, 1, 0, 1, 0]
    for start in (0, 4, 8):
        assert judged[start : start + 4] == sorted(judged[start : start + 4])
    assert [record["genes"] for record in study.candidates()] == judged


def test_the_first_candidates_are_the_seeds_and_then_chance():
    study, method = Study(SPACE, quality), Counted(SPACE)
    seeds = SPACE.plain()[:2]
    study.run(8, method, seeds=seeds, random=5)
    assert [r["genes"] for r in study.candidates()[:2]] == [seed.texts for seed in seeds]
    assert method.asked == 3
    with pytest.raises(UserError, match="batch of at least 1"):
        study.run(9, batch=0)
    outside = Space(hidden_size=120, num_layers=2).plain()[0]
    with pytest.raises(UserError, match="outside the budget"):
        study.run(9, seeds=[outside])
    assert study.counts()["settled"] == 8


# -- what a kill leaves


def torn(study: Study, owner: str) -> str:
    """Claims a candidate and does not queue it. Returns its fingerprint."""
    candidate = study.space.plain()[0]
    texts = tuple(candidate.texts)
    study._queue.claims.add([Claim(0, candidate.fingerprint, texts, 0, owner)])
    return candidate.fingerprint


def test_a_claim_whose_worker_died_before_queueing_is_queued_at_once(tmp_path):
    study = Study(SPACE, quality, tmp_path, heartbeat=100)
    fingerprint = torn(study, dead_owner())
    study.run(2)
    assert [record["number"] for record in study.candidates()] == [0, 1]
    assert study.candidates()[0]["fingerprint"] == fingerprint


def test_a_claim_from_elsewhere_is_queued_after_the_grace_time(tmp_path, monkeypatch):
    study = Study(SPACE, quality, tmp_path, heartbeat=1)
    fingerprint = torn(study, "elsewhere 1 2 boot/pid")
    study._storage.grace = 0.3
    study.run(2)
    assert study.candidates()[0]["fingerprint"] == fingerprint
    assert study._queue.claims.get([0])[0].attempt == 1


def test_the_slow_owner_of_a_claim_that_was_given_away_changes_nothing(tmp_path):
    judged = []
    study = Study(SPACE, lambda genes: judged.append(genes) or quality(genes), tmp_path)
    torn(study, dead_owner())
    (late,) = study._queue.claims.get([0])
    study.run(1)
    study._queue._wait(late)  # the owner was not dead after all
    study.run(2)
    assert len(judged) == len(set(judged)) == 2
    assert study.counts()["settled"] == 2 and len(study.candidates()) == 2
    states = [(t.state.name, "outdated" in t.user_attrs) for t in study._study.trials]
    assert states == [("COMPLETE", False), ("FAIL", True), ("COMPLETE", False)]


TAKEN = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import optuna
from search_workers import SPACE, quality
from fastffn.search import Study
from fastffn.search.sampler import GeneSampler

if {unsigned}:
    GeneSampler.before_trial = lambda self, study, trial: os.kill(os.getpid(), signal.SIGKILL)

def evaluate(genes):
    os.kill(os.getpid(), signal.SIGKILL)

Study(SPACE, evaluate, {folder!r}, heartbeat=100).run(2)
"""


@pytest.mark.parametrize("unsigned", [False, True])
def test_a_worker_that_dies_as_it_takes_a_candidate(tmp_path, unsigned):
    tests = os.path.dirname(__file__)
    code = TAKEN.format(tests=tests, folder=str(tmp_path), unsigned=unsigned)
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    judged = []
    study = Study(SPACE, lambda genes: judged.append(genes) or quality(genes), tmp_path)
    assert study._study.trials[0].state.name == "RUNNING"
    assert (ledger.OWNER in study._study.trials[0].user_attrs) is not unsigned
    study.run(2)
    assert study._study.trials[0].state.name == "FAIL"
    records = study.candidates()
    assert [record["number"] for record in records] == [0, 1]
    # in this order: nothing was judged while that one seemed to be under way
    assert [[str(gene) for gene in genes] for genes in judged] == [r["genes"] for r in records]


def test_who_is_dead():
    assert not liveness.is_dead(ME)
    assert liveness.is_dead(dead_owner())
    host, pid, start, machine = ME.split(" ")
    assert liveness.is_dead(f"{host} {pid} {int(start) - 1} {machine}")  # another process had it
    assert not liveness.is_dead(f"{host} {pid} {int(start) - 1} other/boot")  # nobody can tell
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = f"{host} {child.pid} {liveness._start(child.pid)} {machine}"
    assert not liveness.is_dead(owner)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, its parent did not look yet
    assert liveness.is_dead(owner)
    child.communicate()
    assert liveness.worker(owner) == f"{host}:{child.pid}"


def test_a_table_of_another_version_is_refused(tmp_path):
    Storage(tmp_path)
    with sqlite3.connect(tmp_path / "search.sqlite3") as database:
        database.execute("alter table fastffn_claims drop column taken")
    with pytest.raises(UserError, match="another version of fastffn: take a new one"):
        Storage(tmp_path)


def test_a_worker_of_this_machine_is_seen_at_work_stopped_and_gone():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        owner = liveness._signature(process.pid)
        assert liveness.is_running(owner) and not liveness.is_dead(owner)
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        assert not liveness.is_running(owner) and not liveness.is_dead(owner)
    finally:
        process.kill()
        process.wait()
    assert not liveness.is_running(owner) and liveness.is_dead(owner)
    elsewhere = " ".join(["host", *owner.split(" ")[1:3], "another-boot/pid:[1]"])
    assert not liveness.is_running(elsewhere) and not liveness.is_dead(elsewhere)
