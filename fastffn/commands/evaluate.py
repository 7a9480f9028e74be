"""`fastffn evaluate`: how good a model is, in whatever format, on a task or against its teacher.

fastffn evaluate MODEL ... --task sst2 [--data-dir DIR] [--split validation] [--limit N]
fastffn evaluate MODEL ... --task task.yaml          the user's own task
fastffn evaluate MODEL ... --teacher T --text FILE   how much of a teacher's similarities is kept

A model is what `fastffn export` wrote, or a folder or hub name in safetensors. Several are compared
in one table.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastffn.errors import UserError

_SENTENCES = 2000  # of a retention, unless --limit says more


def add(commands: Any, add_command: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the command; `add_command` is `fastffn.cli`'s way to add one."""
    text = "score models and exports on a task, or by how much of a teacher they retain"
    command = add_command(commands, "evaluate", _evaluate, text)
    add = command.add_argument
    add("models", nargs="+", metavar="MODEL", help="an export, or a folder or hub name of a model")
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("--task", metavar="TASK", help="a known task, such as sst2, or a YAML file")
    what.add_argument("--teacher", metavar="MODEL", help="the model whose sentence vectors count")
    add("--text", nargs="+", type=Path, metavar="FILE", help="of --teacher: UTF-8 text")
    add(
        "--data-dir",
        metavar="DIR",
        help="the task's files, or the folder above them (default: FASTFFN_DATA, else the hub)",
    )
    add("--split", help="of the task (default: validation)")
    add("--limit", type=int, metavar="N", help="so many rows or sentences, chosen at random")
    add("--batch-size", type=int, default=32, metavar="N", help="(default: %(default)s)")
    add("--max-length", type=int, metavar="N", help="tokens of a row (default: the model's)")
    add("--threads", type=int, metavar="N", help="(default: one for each core)")
    add("--json", type=Path, metavar="FILE", help="also write the figures to FILE")


def _evaluate(arguments: argparse.Namespace) -> int:
    _check(arguments)
    if not arguments.debug:
        from fastffn.quiet import quiet

        quiet()
    found = _on_task(arguments) if arguments.task else _against_teacher(arguments)
    print(table(found["models"]))
    if arguments.json is not None:
        from fastffn.files import write_text_atomic

        write_text_atomic(arguments.json, json.dumps(found, indent=2) + "\n")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    for name in ("limit", "batch_size", "max_length", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}: {value} is no positive number")
    if arguments.teacher and not arguments.text:
        raise UserError("--teacher: give --text FILE, the sentences to compare vectors of")
    others = ("text",) if arguments.task else ("data_dir", "split", "max_length")
    for name in others:
        if getattr(arguments, name) is not None:
            owner = "--teacher" if arguments.task else "--task"
            raise UserError(f"--{name.replace('_', '-')} is of {owner}: leave it out")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each model: its format, metrics, size on disk and time."""
    metrics = list(rows[0]["metrics"])
    lines = [["model", "format", *metrics, "MB", "seconds"]]
    for row in rows:
        kind = f"{row['format']} {row['quantize'] or ''}".strip()
        values = [f"{row['metrics'][name]:.4f}" for name in metrics]
        size = f"{row['bytes'] / 1e6:.1f}"
        lines.append([row["model"], kind, *values, size, f"{row['seconds']:.1f}"])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if k < 2 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _row(name: str, served: Any, metrics: Mapping[str, float], seconds: float) -> dict[str, Any]:
    files = (path for path in served.folder.rglob("*") if path.is_file())
    return {
        "model": name,
        "format": served.kind,
        "quantize": served.quantize,
        "metrics": dict(metrics),
        "bytes": sum(path.stat().st_size for path in files),
        "seconds": seconds,
    }


# -- on a task -----------------------------------------------------------------------------------


def _on_task(arguments: argparse.Namespace) -> dict[str, Any]:
    from fastffn.data.encode import encode_task
    from fastffn.data.tasks import load_task
    from fastffn.evaluate.tasks import evaluate
    from fastffn.serve import load

    split = arguments.split or "validation"
    limit = None if arguments.limit is None else {split: arguments.limit}
    task, directory = _task(arguments.task, arguments.data_dir)
    data = load_task(task, directory, (split,), limit)
    rows = []
    for name in arguments.models:
        served = load(name, arguments.threads)
        _check_head(name, served, data.task)
        length = arguments.max_length or min(served.max_length, 384)
        if served.interface.positions is not None and length > served.interface.positions:
            positions = served.interface.positions
            raise UserError(f"--max-length: {length} tokens, {name} has {positions} positions")
        encoded = encode_task(served.tokenizer, data.splits[split], data.task, length, train=False)
        start = time.perf_counter()
        metrics = evaluate(served, encoded, data, split, arguments.batch_size)
        rows.append(_row(name, served, metrics, time.perf_counter() - start))
    number, origin = len(data.splits[split]), data.origin[split]
    print(f"{data.task.name}, {split}: {number} examples of {origin}")
    return {"task": data.task.name, "split": split, "examples": number, "models": rows}


def _task(given: str, directory: str | None) -> tuple[str | dict, str | Path | None]:
    """A known task by name, or a file's mapping; a file's paths begin where it lies."""
    from fastffn.distill import task_files

    if not task_files.is_task_file(given):
        return given, directory
    values, folder = task_files.read(given)
    return values, directory or folder


def _check_head(name: str, served: Any, task: Any) -> None:
    """Refuses a model that has not this task's head, which would score at random."""
    heads = {
        "classification": "sequence-classification",
        "regression": "regression",
        "qa": "question-answering",
    }
    if served.task != heads[task.kind]:
        raise UserError(
            f"{name} is a model for {served.task}, {task.name} is a task of {task.kind}: "
            "fine-tune it first, with fastffn finetune"
        )
    if served.tokenizer is None:
        raise UserError(f"{name} has no tokenizer: export it with one")
    if task.kind != "classification":
        return
    theirs, ours = ([str(label).casefold() for label in x] for x in (served.labels, task.labels))
    if len(theirs) != len(ours):
        raise UserError(f"{name} has {len(theirs)} classes, {task.name} has {len(ours)}")
    if theirs != ours and sorted(theirs) == sorted(ours):
        raise UserError(
            f"{name} has the classes of {task.name} in another order: {', '.join(served.labels)}"
        )


# -- against a teacher ---------------------------------------------------------------------------


def _against_teacher(arguments: argparse.Namespace) -> dict[str, Any]:
    import numpy as np

    from fastffn.data.text import read_documents
    from fastffn.evaluate.retention import retention
    from fastffn.serve import load

    documents = read_documents(arguments.text, least=3)
    sentences = list(dict.fromkeys(s for document in documents for s in document.sentences))
    limit = arguments.limit or _SENTENCES
    if len(sentences) > limit:
        chosen = np.random.default_rng(0).permutation(len(sentences))[:limit]
        sentences = [sentences[k] for k in sorted(chosen.tolist())]
    options = {"batch_size": arguments.batch_size, "pooling": "mean"}
    names = (arguments.teacher, *arguments.models)
    loaded = {name: load(name, arguments.threads) for name in names}
    for name, served in loaded.items():
        if served.task != "embedding":
            raise UserError(f"{name} is a model for {served.task}: sentence vectors are compared")
    truth = loaded[arguments.teacher].encode(sentences, **options)
    rows = []
    for name in arguments.models:
        start = time.perf_counter()
        vectors = loaded[name].encode(sentences, **options)
        seconds = time.perf_counter() - start
        rows.append(_row(name, loaded[name], retention(truth, vectors), seconds))
    print(f"{len(sentences)} sentences, against {arguments.teacher}")
    return {"teacher": arguments.teacher, "sentences": len(sentences), "models": rows}
