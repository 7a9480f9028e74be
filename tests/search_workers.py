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

from patience import PATIENCE, wait_for

from fastffn.files import write_text_atomic
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
            mine, limit = begun(log), Path(f"{log}.hold")
            while limit.exists() and mine > int(limit.read_text()):
                time.sleep(0.01)
            time.sleep(_SECONDS * (1 + random.random()))
            file.write(f"end|{os.getpid()}|{text}\n")
            return quality(genes)

        study = Study(SPACE, evaluate, place, seed=3, heartbeat=heartbeat)
        study.run(trials, "evolution", batch=3, random=6)


def hold(log: Path, limit: int) -> None:
    """Workers that begin a candidate when so many were begun wait in it until the limit rises."""
    write_text_atomic(Path(f"{log}.hold"), str(limit))


def start(place: str, log: Path, trials: int, heartbeat: int = 60) -> subprocess.Popen:
    arguments = [place, log, trials, heartbeat]  # long: a busy machine makes nobody seem dead
    return subprocess.Popen([sys.executable, __file__, *map(str, arguments)])


def survive(place: str, log: Path, trials: int, workers: int, kills: int) -> Study:
    """Lets workers search, kills some at random moments and starts others for them; checks that
    every candidate was judged, and by one process that lived. Returns the finished study.

    All workers judge something, and all kills come before the end, however slow the machine: they
    are held up until then.
    """
    rng, killed = random.Random(trials), set()
    hold(log, 0)
    alive = [start(place, log, trials) for _ in range(workers)]
    try:
        wait_for(lambda: len({pid for _, pid, _ in events(log)}) == workers)
        for kill in range(kills):
            hold(log, trials * (kill + 1) // (kills + 1))
            reached = trials * kill // (kills + 1)
            wait_for(lambda reached=reached: begun(log) > reached)
            time.sleep(rng.random() * 0.2)
            victim = alive.pop(rng.randrange(workers))
            victim.kill()
            victim.wait()
            killed.add(victim.pid)
            alive.append(start(place, log, trials))
        hold(log, 100 * trials)
        assert [process.wait(PATIENCE) for process in alive] == [0] * workers
    finally:
        for process in alive:
            process.kill()
            process.wait()
    return check(place, log, trials, killed)


def begun(log: Path) -> int:
    """How many evaluations were begun."""
    return sum(event == "begin" for event, _, _ in events(log))


def events(log: Path) -> list[list[str]]:
    """[event, pid, genes] in order."""
    text = log.read_text() if log.exists() else ""
    return [line.split("|") for line in text.split("\n")[:-1]]


def check(place: str, log: Path, trials: int, killed: set[int]) -> Study:
    study = Study.load(place)
    assert study.counts() == {
        **{"settled": trials, "finished": trials, "pruned": 0, "diverged": 0, "given_up": 0},
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

    pids, ended = defaultdict(list), Counter()
    for event, pid, genes in events(log):
        if event == "begin":
            pids[genes].append(int(pid))
        elif int(pid) not in killed:
            ended[genes] += 1
    assert set(pids) == {";".join(record["genes"]) for record in records}
    for genes, of in pids.items():
        # begun again only where the process before was killed
        assert killed.issuperset(of[:-1]), (genes, of, killed)
        assert ended[genes] == (of[-1] not in killed)
    return study


if __name__ == "__main__":
    worker(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
