"""What a contender takes of memory: loaded and run in a process of its own.

    python -m fastffn.runtimes.footprint FOLDER        with the question in FOLDER/footprint.pt

Counted is what the process grows by, beyond Python with torch and transformers: the weights in
whatever form the runtime packs them, its library, the graph, and what a batch needs on the way.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from .contenders import RUNTIMES, Batch, Files, Setting, Unavailable
from .subjects import Subject


def measure(
    files: Files, runtime: str, precision: str, setting: Setting, batches: Sequence[Batch]
) -> dict[str, float]:
    """Memory of one contender after a few forwards.

    Returns:
        In MiB: "resident" afterwards, "peak" while it was loaded and run, "disk": of what it was
        loaded from. On a GPU the first two are what torch has reserved there.

    Raises:
        Unavailable: it cannot be measured here; the reason.
    """
    subject = dataclasses.replace(files.subject, tokenizer=None)
    question = {
        "subject": {**dataclasses.asdict(subject), "folder": str(subject.folder)},
        "folder": str(files.folder),
        "contender": (runtime, precision, setting.threads, setting.device),
        "batches": [dict(batch) for batch in batches],
    }
    with tempfile.TemporaryDirectory() as folder:
        torch.save(question, Path(folder) / "footprint.pt")
        command = [sys.executable, "-m", "fastffn.runtimes.footprint", folder]
        threads = {"OMP_NUM_THREADS": str(setting.threads)}
        ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | threads)
    if ended.returncode:
        last = (ended.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise Unavailable(f"its memory was not measured: {last}")
    found = json.loads(ended.stdout.splitlines()[-1])
    made = RUNTIMES[runtime].make(files, precision)
    return {**found, "disk": round(files.size(made) / 2**20, 1)}


def _answer(folder: Path) -> dict[str, float]:
    import transformers  # noqa: F401  counted for nobody

    from .. import models  # noqa: F401

    question = torch.load(folder / "footprint.pt", weights_only=True)
    subject = question["subject"]
    files = Files(
        Subject(**{**subject, "folder": Path(subject["folder"])}), Path(question["folder"])
    )
    runtime, precision, threads, device = question["contender"]
    torch.set_num_threads(threads)
    batches = [{k: x.to(device) for k, x in batch.items()} for batch in question["batches"]]
    before = _resident("VmRSS")
    runner = RUNTIMES[runtime].load(files, precision, Setting(threads, device))
    runner.begin({tuple(batch["input_ids"].shape) for batch in batches})
    with torch.inference_mode():
        for batch in [*batches, *batches]:
            runner(batch)
    if device == "cuda":
        torch.cuda.synchronize()
        found = (torch.cuda.memory_reserved(), torch.cuda.max_memory_reserved())
    else:
        found = tuple(1024 * (_resident(name) - before) for name in ("VmRSS", "VmHWM"))
    return {name: round(n / 2**20, 1) for name, n in zip(("resident", "peak"), found, strict=True)}


def _resident(name: str) -> int:
    """KiB, by the name that Linux gives it."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(rf"{name}:\s+(\d+)", status)[1])


if __name__ == "__main__":
    print(json.dumps(_answer(Path(sys.argv[1]))))
