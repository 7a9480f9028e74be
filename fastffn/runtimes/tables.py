"""A comparison's report as tables in Markdown, which terminals show as well as pages do.

milliseconds    every contender at every workload, with texts per second
at equal precision   fastffn against the best of the others, model by model
against the first model   every other model, best against best, and the ceiling
memory and files, and who is missing and why
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..compress.tables import DASH, digits
from .comparison import PRODUCTS
from .contenders import OURS, PRECISIONS

Cell = Mapping[str, Any]


def markdown(report: Mapping[str, Any]) -> str:
    """All tables, with headings."""
    parts = []
    for threads in dict.fromkeys(cell["threads"] for cell in report["cells"]):
        cells = [cell for cell in report["cells"] if cell["threads"] == threads]
        at = f"{threads} thread{'s' if threads > 1 else ''}"
        parts += [f"## Milliseconds (texts per second), {at}", milliseconds(cells)]
        if equal := at_equal_precision(cells):
            parts += [f"## {OURS} against the best of the others at equal precision, {at}", equal]
        for model in _models(cells)[1:]:
            first = _models(cells)[0]
            parts += [f"## {model} against {first}, {at}", against(cells, first, model)]
    if report.get("memory"):
        parts += ["## Memory and files, MiB", memory(report)]
    if report.get("refused"):
        parts += ["## Left out", "\n".join(_left_out(report["refused"]))]
    if report.get("conditions"):
        parts.append(_conditions(report["conditions"]))
    return "\n\n".join(parts) + "\n"


def milliseconds(cells: Sequence[Cell]) -> str:
    """Contenders down, workloads across."""
    rows = []
    for precision in PRECISIONS:
        for model in _models(cells):
            for runtime in _runtimes(cells):
                found = [find(cell, model, runtime, precision) for cell in cells]
                if any(found):
                    times = [_time(ms, cell) for ms, cell in zip(found, cells, strict=True)]
                    rows.append([f"{model} {runtime}", precision, *times])
    return table(["contender", "precision", *(_name(cell) for cell in cells)], rows, left=2)


def at_equal_precision(cells: Sequence[Cell]) -> str:
    """How many times faster fastffn is than the best other runtime, and which that is.

    Empty where fastffn has not run.
    """
    rows = []
    for model in _models(cells):
        for cell in cells:
            row = [_ratio_to_best(cell, model, precision) for precision in PRECISIONS]
            if any(row):
                rows.append([model, _name(cell), *(each or DASH for each in row)])
    return table(["model", "workload", *PRECISIONS], rows, left=2) if rows else ""


def against(cells: Sequence[Cell], first: str, model: str) -> str:
    """How many times faster `model` is than `first`: each runtime of it than eager torch in
    float32 (or what else was measured), the best than the best, and the bare products."""
    contenders = [
        (runtime, precision)
        for precision in PRECISIONS
        for runtime in _runtimes(cells)
        if runtime != PRODUCTS and any(find(cell, model, runtime, precision) for cell in cells)
    ]
    measured = [p for p in PRECISIONS if any(find(cell, first, "eager", p) for cell in cells)]
    base_precision = (measured or ["fp32"])[0]
    rows = []
    for cell in cells:
        base = find(cell, first, "eager", base_precision)
        row = [over(base, find(cell, model, *each)) for each in contenders]
        products = [
            over(*(find(cell, name, PRODUCTS, precision) for name in (first, model)))
            for precision in ("fp32", "bf16")
        ]
        rows.append([_name(cell), *map(times, row), best_against_best(cell, first, model)])
        rows[-1] += map(times, products)
    header = ["workload", *(" ".join(each) for each in contenders)]
    header += ["best against best", "products fp32", "products bf16"]
    note = (
        f"Each is so many times faster than {first} in eager torch, {base_precision}; best against "
        "best takes the fastest contender of either model; products are the bare matrix products "
        "of both models' linear layers, about the ceiling."
    )
    return f"{table(header, rows)}\n\n{note}"


def memory(report: Mapping[str, Any]) -> str:
    """What each contender takes, what it loses, and how long its first call was."""
    rows = []
    for row in report["memory"]:
        names = {name: row[name] for name in ("model", "runtime", "precision")}
        runs = [
            r for cell in report["cells"] for r in cell["results"] if names.items() <= r.items()
        ]
        far = max((run["disagreement"] for run in runs), default=None)
        first = max((run["first_ms"] for run in runs), default=None)
        sizes = [digits(row[name]) for name in ("resident", "peak", "disk")]
        lost = DASH if far is None else f"{far:.1e}"
        seconds = DASH if first is None else digits(first / 1e3, 2)
        rows.append([f"{row['model']} {row['runtime']}", row["precision"], *sizes, lost, seconds])
    header = ["contender", "precision", "resident", "peak", "on disk", "error", "first call, s"]
    workload = report["memory"][0]["workload"]
    note = (
        f"Memory beyond Python, torch and transformers, in a process of its own, after {workload}; "
        "error: of the hidden states of the worst text, against eager torch in float32; first "
        "call: the longest, with compilation."
    )
    return f"{table(header, rows, left=2)}\n\n{note}"


def _left_out(refused: Iterable[Mapping[str, Any]]) -> list[str]:
    """A line for each reason."""
    found: dict[tuple[str, ...], list[str]] = {}
    for row in refused:
        key = (row["runtime"], row["precision"], row["why"])
        at = f" at {row['where']}" if row["where"] else ""
        found.setdefault(key, []).append(f"{row['model']}{at}")
    return [
        f"- {runtime} {precision} ({', '.join(dict.fromkeys(places))}): {why}"
        for (runtime, precision, why), places in found.items()
    ]


def _conditions(conditions: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {each}" for name, each in conditions["versions"].items())
    commit = f", {conditions['commit']}" if conditions.get("commit") else ""
    return f"{conditions['device']}; {versions}; {conditions['date']}{commit}"


# -- reading a cell ------------------------------------------------------------------------------


def find(cell: Cell, model: str, runtime: str, precision: str) -> float | None:
    """Milliseconds of one contender; None where it did not run."""
    wanted = {"model": model, "runtime": runtime, "precision": precision}
    return next((row["ms"] for row in cell["results"] if wanted.items() <= row.items()), None)


def best(
    cell: Cell, model: str, precision: str | None = None, without: Sequence[str] = (PRODUCTS,)
) -> Mapping[str, Any] | None:
    """The fastest contender of a model: in one precision or in any; None where none ran."""
    rows = [
        row
        for row in cell["results"]
        if row["model"] == model
        and row["runtime"] not in without
        and precision in (None, row["precision"])
    ]
    return min(rows, key=lambda row: row["ms"], default=None)


def ratio_to_best(cell: Cell, model: str, precision: str) -> tuple[float, str] | None:
    """How many times faster fastffn is than the best other runtime, and that one's name."""
    ours = find(cell, model, OURS, precision)
    other = best(cell, model, precision, (PRODUCTS, OURS))
    return None if ours is None or other is None else (other["ms"] / ours, other["runtime"])


def _ratio_to_best(cell: Cell, model: str, precision: str) -> str:
    found = ratio_to_best(cell, model, precision)
    return f"{times(found[0])} {found[1]}" if found else ""


def best_against_best(cell: Cell, first: str, model: str) -> str:
    """Ratio of the fastest contenders of both models, whatever they are."""
    ours, theirs = best(cell, model), best(cell, first)
    if ours is None or theirs is None:
        return DASH
    pair = " / ".join(f"{row['runtime']} {row['precision']}" for row in (theirs, ours))
    return f"{times(theirs['ms'] / ours['ms'])} ({pair})"


def over(first: float | None, second: float | None) -> float | None:
    """Their ratio, if both are known."""
    return first / second if first and second else None


def times(ratio: float | None) -> str:
    """`1.07x`, `13.1x`."""
    return DASH if ratio is None else f"{digits(ratio)}x"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Markdown, padded so that a terminal shows columns; all but the `left` ones to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    marks = [("-" * w if k < left else "-" * (w - 1) + ":") for k, w in enumerate(widths)]

    def shown(line: Sequence[str]) -> str:
        pairs = enumerate(zip(line, widths, strict=True))
        cells = [text.ljust(w) if k < left else text.rjust(w) for k, (text, w) in pairs]
        return f"| {' | '.join(cells)} |"

    return "\n".join([shown(lines[0]), shown(marks), *map(shown, lines[1:])])


def _name(cell: Cell) -> str:
    return cell["workload"]


def per_batch(ms: float, cell: Cell) -> float:
    """Milliseconds of a batch, of those of the whole workload."""
    return ms * cell["batch_size"] / cell["texts"]


def _time(ms: float | None, cell: Cell) -> str:
    """Milliseconds of a batch and texts per second."""
    if ms is None:
        return DASH
    return f"{digits(per_batch(ms, cell))} ({digits(1e3 * cell['texts'] / ms)})"


def _models(cells: Sequence[Cell]) -> list[str]:
    return list(dict.fromkeys(row["model"] for cell in cells for row in cell["results"]))


def _runtimes(cells: Sequence[Cell]) -> list[str]:
    return list(dict.fromkeys(row["runtime"] for cell in cells for row in cell["results"]))
