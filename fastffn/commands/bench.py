"""`fastffn bench`: how fast it is.

fastffn bench [PYTEST ...]              the benchmarks of fastffn's own operations, in a checkout
fastffn bench model MODEL [MODEL ...]   models in all runtimes side by side, on this machine
"""

import argparse
import json
import sys
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

import fastffn
from fastffn.errors import UserError

TWO_WORDS = ("bench model",)


def add(commands: Any, add_command: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds both commands; `add_command` is `fastffn.cli`'s way to add one."""
    bench = add_command(commands, "bench", _bench, "run the benchmarks of a source checkout")
    bench.add_argument("pytest", nargs="*", help="passed on to pytest; put -- before options")

    text = "compare models and runtimes on this machine: time, memory, size on disk"
    model = add_command(commands, TWO_WORDS[0], _model, text, _resume)
    add = model.add_argument
    add(
        "models",
        nargs="+",
        metavar="MODEL",
        help="a folder, a hub name or a preset such as efficientbert or bert-base; NAME=MODEL "
        "calls it NAME. The others are related to the first",
    )
    add("--batch", nargs="+", type=_positive, default=[1, 8, 32], metavar="N", help="texts")
    add("--length", nargs="+", type=_positive, metavar="N", help="tokens (default: 32 128 384)")
    add("--threads", nargs="+", type=_positive, metavar="N", help="(default: as torch has it)")
    add(
        "--text",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="texts with their own lengths too: sentences of UTF-8 text, or a .tsv's first column",
    )
    add("--tokenizer", metavar="DIR_OR_HUB_NAME", help="for models that came without one")
    add("--runtimes", nargs="+", metavar="NAME", help="(default: all; peers when installed)")
    add("--precisions", nargs="+", metavar="NAME", help="(default: fp32 bf16 int8)")
    add("--seconds", type=float, default=10.0, metavar="S", help="of a workload (default: 10)")
    add("--rounds", type=_positive, default=50, metavar="N", help="at most (default: 50)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    add("--no-memory", action="store_true", help="do not measure memory")
    add(
        "--json",
        type=Path,
        metavar="FILE",
        help="the report, written after each workload; the same command goes on with what it has",
    )
    add("--out", type=Path, metavar="DIR", help="report.json, table.md and pictures")


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no count such as 8")
    return number


# -- models --------------------------------------------------------------------------------------


def _model(arguments: argparse.Namespace) -> int:
    if not arguments.debug:
        from fastffn.quiet import quiet

        quiet()
    import torch

    from fastffn.files import write_text_atomic
    from fastffn.runtimes import comparison, pictures, tables, workloads
    from fastffn.runtimes.contenders import PRECISIONS

    lengths = arguments.length
    if lengths is None:
        lengths = [] if arguments.text else [32, 128, 384]
    chosen = workloads.fixed(arguments.batch, lengths)
    for path in arguments.text or ():
        chosen += workloads.real(path.name, workloads.read_texts(path), arguments.batch)
    options = comparison.Options(
        models=arguments.models,
        workloads=chosen,
        threads=arguments.threads or [torch.get_num_threads()],
        runtimes=arguments.runtimes,
        precisions=arguments.precisions or PRECISIONS,
        seconds=arguments.seconds,
        least=min(5, arguments.rounds),
        most=arguments.rounds,
        device=arguments.device,
        memory=not arguments.no_memory,
        tokenizer=arguments.tokenizer,
    )

    def save(report: dict[str, Any]) -> None:
        if arguments.json is not None:
            write_text_atomic(arguments.json, json.dumps(report, indent=1) + "\n")

    def progress(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    report = comparison.run(options, _earlier(arguments), save, progress)
    save(report)
    text = tables.markdown(report)
    print(text, end="")
    if arguments.out is not None:
        write_text_atomic(arguments.out / "report.json", json.dumps(report, indent=1) + "\n")
        write_text_atomic(arguments.out / "table.md", text)
        for path in pictures.draw(report, arguments.out):
            progress(f"drawn: {path}")
    return 0


def _earlier(arguments: argparse.Namespace) -> dict[str, Any]:
    """The report at --json, to go on with, or an empty one.

    Raises:
        UserError: the file is something else, or of other models or other choices.
    """
    asked = {
        name: getattr(arguments, name)
        for name in ("models", "device", "runtimes", "precisions", "tokenizer")
    }
    path = arguments.json
    if path is None or not path.exists():
        return {"asked": asked}
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        report = None
    if not isinstance(report, dict) or "asked" not in report:
        raise UserError(f"{path} is no report of fastffn bench model: give another --json")
    for name, value in asked.items():
        if report["asked"].get(name) != value:
            raise UserError(f"{path} is of other {name}: give another --json, or delete it")
    return report


def _resume(arguments: argparse.Namespace) -> str:
    if arguments.json is None or not arguments.json.exists():
        return "; with --json FILE what is measured would have been kept"
    return f": {arguments.json} keeps what is measured; run the same command again to go on"


# -- operations ----------------------------------------------------------------------------------


def _bench(arguments: argparse.Namespace) -> int:
    import subprocess

    root = Path(fastffn.__file__).resolve().parent.parent
    if not (root / "bench" / "__main__.py").is_file():
        raise UserError(
            "bench needs a source checkout of fastffn: clone it and run `make bench` there"
        )
    if util.find_spec("pytest_benchmark") is None:
        raise UserError('pytest-benchmark is not installed: pip install "fastffn[test]"')
    result = Path("runs") / "bench" / "latest.json"
    (root / result.parent).mkdir(parents=True, exist_ok=True)
    tests = [sys.executable, "-m", "pytest", "bench", f"--benchmark-json={result}"]
    status = subprocess.run([*tests, *arguments.pytest], cwd=root).returncode
    if status == 0:
        shown = [sys.executable, "-m", "bench", "report", str(result)]
        status = subprocess.run(shown, cwd=root).returncode
    return status
