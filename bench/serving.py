"""What serving costs: small encoders against BERT-base, and runtimes against each other.

    python -m bench.serving --out FILE.json [--parts against-bert student] [--threads 2]
                            [--text sst2=FILE wikipedia=FILE --tokenizer DIR] [--device cuda]

    against-bert   EfficientBERT (published genes) and BERT-base, random weights, 128 tokens, batch
                   1 and 32: in each runtime, best against best, and the bare matrix products
    student        EfficientBERT in all runtimes, batch 1, 8, 32 and length 32, 128, 384
    real           the same on real texts, padded to the longest of a batch as they come
    plain          BERT-base and all-MiniLM-L6-v2's shape in all runtimes, ctranslate2 too
    cuda           with --device cuda, in place of all others: both in bf16, batch 1 and 256

All of it is `fastffn bench model` (fastffn/runtimes/comparison.py) with other choices. Each
workload is written when it is measured, and the same command again goes on with what is missing.
`--show` prints the tables of a file; `--tiny` is a trial on tiny models.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fastffn.errors import UserError
from fastffn.files import write_text_atomic
from fastffn.quiet import quiet
from fastffn.runtimes import comparison, tables, workloads
from fastffn.runtimes.contenders import OURS, PRECISIONS

PARTS = ("against-bert", "student", "real", "plain", "cuda")
_SIZES = {"batches": (1, 8, 32), "lengths": (32, 128, 384), "length": 128, "gpu": 256}
_TINY = {"batches": (1, 2), "lengths": (8, 16), "length": 8, "gpu": 2}


def plan(
    part: str, texts: dict[str, Path], tiny: bool = False
) -> tuple[Sequence[str], list[workloads.Workload]]:
    """Models and workloads of a part."""
    small, big = ("efficientbert-tiny", "bert-tiny") if tiny else ("efficientbert", "bert-base")
    sizes = _TINY if tiny else _SIZES
    batches, length = sizes["batches"], sizes["length"]
    ends = (batches[0], batches[-1])
    if part == "against-bert":
        return (big, small), workloads.fixed(ends, (length,))
    if part == "student":
        return (small,), workloads.fixed(batches, sizes["lengths"])
    if part == "plain":
        return (big, "bert-mini" if tiny else "minilm-l6"), workloads.fixed(batches, (length,))
    if part == "cuda":
        return (big, small), workloads.fixed((1, sizes["gpu"]), (length,))
    found = []
    for name, path in texts.items():
        found += workloads.real(name, workloads.read_texts(path), batches)
    return (small,), found


def run(
    parts: Sequence[str],
    out: Path,
    texts: dict[str, Path],
    tokenizer: str | None,
    threads: int,
    seconds: float,
    rounds: int,
    device: str = "cpu",
    tiny: bool = False,
    memory: bool = True,
) -> dict[str, Any]:
    """Measures what `out` does not have yet; the result, as it is in the file."""
    result = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"parts": {}}
    for part in parts:
        models, chosen = plan(part, texts, tiny)
        report = result["parts"].setdefault(part, {})
        options = comparison.Options(
            models=models,
            workloads=chosen,
            threads=(threads,),
            precisions=("bf16",) if device == "cuda" else ("fp32", "bf16", "int8"),
            seconds=seconds,
            least=min(5, rounds),
            most=rounds,
            device=device,
            memory=memory,
            tokenizer=tokenizer,
        )

        def save(_: dict[str, Any], report: dict[str, Any] = report) -> None:
            report["conditions"].setdefault("commit", commit())
            write_text_atomic(out, json.dumps(result, indent=1) + "\n")

        comparison.run(options, report, save, lambda line: print(line, flush=True))
        save(report)
    return result


def commit() -> str:
    """Of the working tree; "+" where it has changes."""
    described = ["git", "describe", "--always", "--dirty=+", "--abbrev=12"]
    return subprocess.run(described, capture_output=True, text=True).stdout.strip()


# -- what was aimed at ---------------------------------------------------------------------------


def reach(result: dict[str, Any]) -> str:
    """A table: each figure that is aimed at, what is wanted and what was found, the worst of all
    workloads where there are several."""
    found = [*_against_bert(result), *_between_runtimes(result), *_on_gpu(result)]
    rows = [[what, f"{wanted}x", tables.times(ratio), at] for what, wanted, ratio, at in found]
    return tables.table(["figure", "wanted", "found", "where"], rows)


_Figure = tuple[str, float, float | None, str]


def _pairs(result: dict[str, Any], part: str) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Each cell of a part of two models, with their names, the big one first."""
    report = result["parts"].get(part, {})
    for cell in report.get("cells", []):
        yield cell, *(model["name"] for model in report["models"])


def _against_bert(result: dict[str, Any]) -> Iterator[_Figure]:
    """The small model against the big one, batch by batch."""
    wanted = {1: 8.0}
    for cell, big, small in _pairs(result, "against-bert"):
        name = cell["workload"]
        base = tables.find(cell, big, "eager", "fp32")
        ours = tables.find(cell, small, OURS, "fp32")
        ratio = tables.over(base, ours)
        yield f"fp32 against {big} eager", wanted.get(cell["batch_size"], 6.5), ratio, name
        rows = [tables.best(cell, model) for model in (big, small)]
        pair = " / ".join(f"{row['runtime']} {row['precision']}" for row in rows)
        yield "best against best", 6.0, rows[0]["ms"] / rows[1]["ms"], f"{name}: {pair}"
        products = [tables.find(cell, model, comparison.PRODUCTS, "fp32") for model in (big, small)]
        yield "bare products, fp32", 7.0, tables.over(*products), name


def _between_runtimes(result: dict[str, Any]) -> Iterator[_Figure]:
    """The worst workload of each part and precision; of real texts those apart that have padding
    to be left out."""
    student = result["parts"].get("student", {}).get("cells", [])
    real = result["parts"].get("real", {}).get("cells", [])
    for what, cells, wanted in (
        ("student", student, {"fp32": 1.0, "bf16": 1.0, "int8": 0.95}),
        ("real, one by one", [cell for cell in real if not cell["padding"]], {}),
        ("real", [cell for cell in real if cell["padding"]], dict.fromkeys(PRECISIONS, 1.5)),
    ):
        for precision in PRECISIONS:
            found = [each for cell in cells if (each := _to_best(cell, precision))]
            if found:
                ratio, name, where = min(found)
                yield f"{what} {precision} against {name}", wanted.get(precision, 1.0), ratio, where


def _to_best(cell: dict[str, Any], precision: str) -> tuple[float, str, str] | None:
    """fastffn's ratio to the best other runtime, in int8 to plain onnxruntime; that and where."""
    model = cell["results"][0]["model"]
    found = tables.ratio_to_best(cell, model, precision)
    if precision == "int8":
        names = ("onnxruntime", OURS)
        times = (tables.find(cell, model, name, precision) for name in names)
        ratio = tables.over(*times)
        found = None if ratio is None else (ratio, "onnxruntime")
    return None if found is None else (*found, cell["workload"])


def _on_gpu(result: dict[str, Any]) -> Iterator[_Figure]:
    """The small model against the big one in eager torch, which runs sdpa, both in bf16."""
    for cell, big, small in _pairs(result, "cuda"):
        base = tables.find(cell, big, "eager", "bf16")
        ours = tables.find(cell, small, OURS, "bf16")
        wanted = 6.0 if cell["batch_size"] == 1 else 5.0
        ratio = tables.over(base, ours)
        yield f"GPU, bf16 against {big} eager", wanted, ratio, cell["workload"]


def markdown(result: dict[str, Any]) -> str:
    """All tables of a result."""
    parts = [f"# {part}\n\n{tables.markdown(r)}" for part, r in result["parts"].items()]
    return "\n".join([*parts, "# Reach\n", reach(result)]) + "\n"


def _named(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not (equals and name and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FILE")
    return name, Path(path)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.serving", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE.json")
    add("--parts", nargs="+", choices=PARTS, help="default: all that can be measured")
    add("--text", nargs="+", type=_named, default=[], metavar="NAME=FILE", help="of the part real")
    add("--tokenizer", metavar="DIR", help="of the part real; may be a folder with vocab.txt alone")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--seconds", type=float, default=10.0, help="of a workload's race, about")
    add("--rounds", type=int, default=50, help="at most")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--no-memory", action="store_true", help="do not measure memory")
    add("--tiny", action="store_true", help="a trial")
    add("--show", action="store_true", help="print the tables of --out and measure nothing")
    given = parser.parse_args()
    quiet()
    try:
        if given.show:
            result = json.loads(given.out.read_text(encoding="utf-8"))
        else:
            parts = given.parts or [p for p in PARTS if p != "cuda" and (p != "real" or given.text)]
            if given.device == "cuda":
                parts = ["cuda"]
            options = (given.threads, given.seconds, given.rounds, given.device, given.tiny)
            options += (not given.no_memory,)
            result = run(parts, given.out, dict(given.text), given.tokenizer, *options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
