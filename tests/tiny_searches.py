"""Search recipes on the tiny teacher: a few candidates of a few steps, a search in a second or two.

Also processes that run them and may die; as in `tiny_recipes` they are forked from a server that
has imported everything.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from patience import PATIENCE
from safetensors.torch import load_file, save_file
from tiny_recipes import Files

from fastffn.cli import main
from fastffn.search import pictures, storage
from fastffn.search.recipe import SearchRecipe
from fastffn.search.study import Study

_FORK = multiprocessing.get_context("forkserver")
_FORK.set_forkserver_preload(["fastffn.search.engine", "optuna", "torch.utils.tensorboard"])

ROWS = 8  # held out
SPACE = {"stacks": [1, 2], "ratios": ["1/2", "1", "2"], "primitives": ["add", "gelu", "tanh"]}
SUPERNET = {"from": "teacher", "layers": 2, "max_stack": 2, "max_width": 48}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
RELATIONS = {"relations": {"relation_heads": 8}}
SAME = ("genes", "quality", "rungs", "pruned", "number", "stage")  # of a record


def search(
    files: Files,
    stages: list[dict[str, Any]],
    distil: list[dict[str, Any]] | None = None,
    task: bool = False,
    supernet: Mapping[str, Any] | None = None,
    space: Mapping[str, Any] | None = None,
    **more: Any,
) -> SearchRecipe:
    """A recipe on text, or on the task.

    Args:
        stages: of the search; a score is added where there is none.
        distil: None: warmup and shared train the supernet, proxy the candidate; steps and sizes
            are added where there are none.
        supernet, space: what differs from SUPERNET (None: the loaded one's options), SPACE.
    """
    losses = RELATIONS | ({"soft_labels": {}} if task else {})
    data = "task" if task else "general"
    if distil is None:
        distil = [
            {"name": "warmup", "student": "supernet", "subnetworks": 3},
            {"name": "proxy", "student": "candidate"},
            {"name": "shared", "student": "supernet", "subnetworks": 2},
        ]
        used = {name for stage in stages for key in ("supernet", "train") for name in stage[key]}
        used |= {stage["score"].get("stage") for stage in stages if "score" in stage}
        distil = [stage for stage in distil if stage["name"] in used]
    common = {"steps": 3, "batch_size": 8, "learning_rate": 1e-3, "data": data, "losses": losses}
    score = {"data": "task", "rows": ROWS} if task else {"stage": "proxy", "rows": ROWS}
    text = {"text": str(files.text), "max_length": 24, "limit": 40}
    spec = {"load": str(supernet["load"])} if supernet and "load" in supernet else None
    values = {
        "name": "tiny",
        "checkpoint_seconds": 1e-6,
        "teacher": str(files.classifier if task else files.teacher),
        "models": {"supernet": spec or {"supernet": SUPERNET | NO_DROPOUT | dict(supernet or {})}},
        "data": {data: files.task() if task else text},
        "stages": [common | stage for stage in distil],
        "space": SPACE | dict(space or {}),
        "search": [{"trials": 4, "random": 2, "score": score} | stage for stage in stages],
    }
    return SearchRecipe.from_mapping(values | more)


def coarse(**more: Any) -> dict[str, Any]:
    return {"name": "coarse", "supernet": ["warmup"], "train": ["proxy"], "rungs": [0.5, 1]} | more


def middle(**more: Any) -> dict[str, Any]:
    return {"name": "middle", "supernet": [], "train": ["proxy"], "freeze": "shapes"} | more


def fine(**more: Any) -> dict[str, Any]:
    """One-shot, on a supernet with the winner's functions."""
    own = {"name": "fine", "supernet": ["shared"], "train": [], "freeze": "functions", "batch": 2}
    return own | more


def three(files: Files, **more: Any) -> SearchRecipe:
    """All kinds of phases: two supernets, rungs, one-shot, batches."""
    score = {"stage": "shared", "rows": ROWS}
    return search(files, [coarse(), middle(rungs=[0.5, 1]), fine(score=score)], **more)


def changed(teacher: Path) -> None:
    """Gives a teacher other weights."""
    file = teacher / "model.safetensors"
    weights = load_file(file)
    name = min(name for name in weights if name.endswith("query.weight"))
    save_file(weights | {name: weights[name] + 0.1}, file, {"format": "pt"})


# -- what came of it -----------------------------------------------------------------------------


def outcome(report: Mapping[str, Any]) -> dict[str, Any]:
    """What two runs of the same search have in common: candidates, qualities, winner."""
    records = [{key: record[key] for key in SAME} for record in report["candidates"]]
    return {"genes": report["genes"], "candidates": records}


def report(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text())


def judged(out: Path, stages: tuple[str, ...] = ("coarse", "middle", "fine")) -> dict[str, Any]:
    """Of the search in a run directory, whatever its state: stage and slot -> (genes, quality)."""
    from fastffn.search.storage import FILE, Storage

    if not (out / FILE).exists():
        return {}
    storage = Storage(out, create=False)
    found = {}
    for stage in set(stages) & {name.partition(".")[2] for name in storage.names()}:
        try:
            study = Study.load(storage, f"tiny.{stage}")
        except ValueError:  # killed while it was made
            continue
        for record in study.candidates():
            if not record["inherited"]:
                found[stage, record["number"]] = (record["genes"], record["quality"])
    return found


@contextlib.contextmanager
def undisturbed():
    """One thread, as the processes have; no pictures, which cost more than the search."""
    draw, threads = pictures.draw, torch.get_num_threads()
    pictures.draw = lambda *_: {}
    torch.set_num_threads(1)
    try:
        yield
    finally:
        pictures.draw = draw
        torch.set_num_threads(threads)


# -- processes -----------------------------------------------------------------------------------


def spawn(recipe: SearchRecipe, out: Path, die_at: int | None = None) -> int:
    """Runs `fastffn search` in a process of its own.

    Args:
        die_at: kill -9 at the event of that number, see `events`.

    Returns:
        The exit status; -9 if it was killed. What it said is in `out`.log.
    """
    process = begin(recipe, out, die_at)
    process.join(PATIENCE)
    process.kill()
    process.join()
    return process.exitcode


def events(out: Path) -> int:
    """How often the last run that came to its end touched a file of `out` or changed its database:
    moments that do not depend on how fast the machine is."""
    return int(Path(f"{out}.events").read_text())


def begin(recipe: SearchRecipe, out: Path, die_at: int | None = None):
    """The same, without waiting for its end."""
    yaml = Path(f"{out}.yaml")
    yaml.write_text(recipe.to_yaml(), encoding="utf-8")
    return _started(["search", str(yaml), "--out", str(out)], out, die_at)


def worker(out: Path, log: Path, *words: str):
    """A process with `fastffn search worker`; what it says goes to `log`.log."""
    return _started(["search", "worker", "--study", str(out), *words], log, None)


def said(out: Path) -> str:
    return Path(f"{out}.log").read_text(encoding="utf-8")


def _started(command: list[str], out: Path, die_at: int | None):
    process = _FORK.Process(target=_run, args=(command, out, die_at))
    process.start()
    return process


def _run(command: list[str], out: Path, die_at: int | None) -> None:
    log = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    watch = _Watch(out, die_at)
    sys.addaudithook(watch)

    class Watched(storage._SQLite):
        def commit(self) -> None:
            watch.event()
            super().commit()

    storage._SQLite = Watched
    with undisturbed():
        status = main(command)
    Path(f"{out}.events").write_text(str(watch.count))
    sys.exit(status)


class _Watch:
    """An audit hook that counts what happens to files of a folder, and may kill the process."""

    def __init__(self, folder: Path, die_at: int | None):
        self.folder, self.die_at, self.count = f"{folder}{os.sep}", die_at, 0

    def __call__(self, event: str, arguments: tuple) -> None:
        if event not in ("open", "os.rename", "os.mkdir", "sqlite3.connect"):
            return
        path = str(arguments[event == "os.rename"])
        if path.startswith(self.folder):
            self.event()

    def event(self) -> None:
        if self.count == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(600)
        self.count += 1
