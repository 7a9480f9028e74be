"""Workers of one search as real processes, killed at random moments; what must hold afterwards.

Run as a script it is such a worker: `python search_workers.py PLACE LOG TRIALS HEARTBEAT`. It notes
in the log when it begins and ends each candidate; lines of one write are never mixed.
"""

import os
import random
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

from fastffn.search import Space, Study

SPACE = Space(hidden_size=120, num_layers=2, params=(40_000, 120_000))
_SECONDS = 0.05  # of an evaluation, at most twice that


def quality(genes) -> float:
    """A made-up truth in small numbers."""
    return sum(len(str(gene)) / gene.stack for gene in genes)


def worker(place: str, log: Path, trials: int, heartbeat: int) -> None:
    with log.open("a", buffering=1) as file:

        def evaluate(genes):
            text = ";".join(map(str, genes))
            file.write(f"begin|{os.getpid()}|{text}\n")
            time.sleep(_SECONDS * (1 + random.random()))
            file.write(f"end|{os.getpid()}|{text}\n")
            return quality(genes)

        study = Study(SPACE, evaluate, place, seed=3, heartbeat=heartbeat)
        study.run(trials, "evolution", batch=3, random=6)


def start(place: str, log: Path, trials: int, heartbeat: int = 10) -> subprocess.Popen:
    arguments = [place, log, trials, heartbeat]  # long: a busy machine makes nobody seem dead
    return subprocess.Popen([sys.executable, __file__, *map(str, arguments)])


def survive(place: str, log: Path, trials: int, workers: int, kills: int, limit: float) -> Study:
    """Lets workers search, kills some at random moments and starts others for them; checks that
    every candidate was judged, and by one process that lived. Returns the finished study.

    Args:
        limit: seconds that it may take.
    """
    rng, killed = random.Random(trials), set()
    deadline = time.monotonic() + limit
    alive = [start(place, log, trials) for _ in range(workers)]
    try:
        while alive:
            assert time.monotonic() < deadline, "the search does not end"
            alive = [process for process in alive if process.poll() != 0]
            assert all(process.returncode is None for process in alive), "a worker failed"
            begun = log.read_text().count("begin") if log.exists() else 0
            if len(killed) < kills and begun > len(killed) * trials / (kills + 1):
                time.sleep(rng.random() * 0.2)
                victim = rng.choice(alive)
                victim.kill()
                if victim.wait() != 0:  # it had not ended just before
                    killed.add(victim.pid)
                alive = [process for process in alive if process is not victim]
                alive.append(start(place, log, trials))
            time.sleep(0.01)
    finally:
        for process in alive:
            process.kill()
            process.wait()
    assert len(killed) == kills
    return check(place, log, trials, killed)


def check(place: str, log: Path, trials: int, killed: set[int]) -> Study:
    study = Study.load(place)
    assert study.counts() == {
        **{"settled": trials, "finished": trials, "pruned": 0, "diverged": 0},
        **{"running": 0, "waiting": 0},
    }
    records = study.candidates()
    assert [record["number"] for record in records] == list(range(trials))
    assert len({record["fingerprint"] for record in records}) == trials
    for record in records:
        assert record["quality"] == quality(SPACE.candidate(record["genes"]).genes)
    values = Counter(
        trial.user_attrs["fingerprint"] for trial in study._study.trials if trial.value is not None
    )
    assert set(values.values()) == {1}  # one result each in the database too

    begun, ended = defaultdict(list), Counter()
    for line in log.read_text().splitlines():
        event, pid, genes = line.split("|")
        if event == "begin":
            begun[genes].append(int(pid))
        elif int(pid) not in killed:
            ended[genes] += 1
    assert set(begun) == {";".join(record["genes"]) for record in records}
    for genes, pids in begun.items():
        # begun again only where the process before was killed
        assert killed.issuperset(pids[:-1]), (genes, pids, killed)
        assert ended[genes] == (pids[-1] not in killed)
    return study


if __name__ == "__main__":
    worker(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
