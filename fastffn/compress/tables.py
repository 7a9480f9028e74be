"""The report as tables of text, made once for the page, the terminal and whoever else shows them.

Figures carry two or three significant digits: more is noise on a machine that others use. A figure
that is absent or not finite becomes a dash, never a crash: a report may be partial.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

DASH = "–"
_UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))
BASELINES = {  # key in the report: what the row leaves out
    "start": "before any distillation",
    "searched": "searched FFN, all losses",
    "no_search": "plain gelu FFN of equal size",
    "no_relations": "no relation loss",
    "vectors_only": "sentence vectors alone",
}
PHASES = {
    "text": "reading text",
    "teacher": "teacher's outputs",
    "warmup": "warming up the supernet",
    "search": "searching",
    "distil": "distilling the winner",
    "baselines": "baselines",
    "measure": "measuring",
}


class Table(NamedTuple):
    """A table: its first `left` columns are words, the others figures; `note` goes below."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str = ""
    left: int = 1


def is_number(value: object) -> bool:
    """Whether there is a finite figure to show."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def digits(value: object, count: int = 3) -> str:
    """`count` significant digits, never in powers of ten."""
    if not is_number(value):
        return DASH
    if value == 0:
        return "0"
    value = float(f"{value:.{count - 1}e}")  # 0.9997 becomes 1 before its places are counted
    places = max(0, count - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}"


def amount(value: object) -> str:
    """A count in M, G or k: `22.7 M`."""
    if not is_number(value):
        return DASH
    for unit, name in _UNITS:
        if abs(value) >= 0.9995 * unit:
            return f"{digits(value / unit)} {name}"
    return digits(value)


def ratio(value: object) -> str:
    """`4.1x`, `13x`."""
    return f"{digits(value, 2)}x" if is_number(value) else DASH


def share(value: object) -> str:
    """A part of one as per cent: `71 %`."""
    return f"{100 * value:.0f} %" if is_number(value) else DASH


def correlation(value: object) -> str:
    """Three decimals."""
    return f"{value:.3f}" if is_number(value) else DASH


def change(value: object, base: object) -> str:
    """A correlation's difference from another, with its sign."""
    if not (is_number(value) and is_number(base)):
        return DASH
    return f"{round(value - base, 3) + 0.0:+.3f}"  # adding zero: never -0.000


def seconds(value: object) -> str:
    """`8.4 s`, `42 s`, `3 min 05 s`."""
    if not is_number(value):
        return DASH
    if value < 60:
        return f"{digits(value, 2)} s" if value < 10 else f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02} s"


def whole(value: object) -> str:
    """An integer with thousands apart."""
    return f"{value:,.0f}" if is_number(value) else DASH


def _part(report: Mapping, key: str) -> Mapping:
    value = report.get(key)
    return value if isinstance(value, Mapping) else {}


def _over(first: object, second: object) -> float | None:
    return first / second if is_number(first) and is_number(second) and second else None


def comparison(report: Mapping) -> Table:
    """Teacher beside student: size, work, time, and what of the teacher's judgement is kept."""
    teacher, student = _part(report, "teacher"), _part(report, "student")
    kept = _part(report, "retention")
    length = whole(report.get("length"))

    def row(label, key, show, times=None):
        big, small = teacher.get(key), student.get(key)
        factor = times if is_number(times) else _over(big, small)
        return (label, show(big), show(small), ratio(factor))

    rows = [
        row("parameters", "params", amount, report.get("size_ratio_total")),
        row(
            "parameters without word embeddings",
            "params_without_word_embeddings",
            amount,
            report.get("size_ratio"),
        ),
        row(f"MACs for {length} tokens", "macs", amount),
        row("latency at batch 1, ms", "latency_ms_b1", digits, report.get("speedup_b1")),
        row("latency at batch 32, ms", "latency_ms_b32", digits, report.get("speedup_b32")),
        ("Spearman of similarities", "1", correlation(kept.get("spearman")), ""),
        ("same nearest neighbour", "100 %", share(kept.get("top1")), ""),
        ("same ten nearest neighbours", "100 %", share(kept.get("top10")), ""),
    ]
    note = (
        f"Retention is measured on {whole(kept.get('sentences'))} sentences held out by document "
        f"({whole(kept.get('pairs'))} pairs); latency in one interleaved run, "
        f"{length} tokens a sentence."
    )
    return Table("Teacher and student", ("", "teacher", "student", "smaller, faster"), rows, note)


def baselines(report: Mapping) -> Table | None:
    """What each part brings: the same student without it, all on one budget."""
    found = {"start": _part(report, "start"), **_part(report, "baselines")}
    budget = found.pop("budget", None) or {}
    base = _part(found, "searched").get("spearman")
    rows = []
    for key, label in BASELINES.items():
        if row := _part(found, key):
            difference = "" if key == "searched" else change(row.get("spearman"), base)
            shown = (correlation(row.get("spearman")), share(row.get("top1")))
            rows.append((label, *shown, share(row.get("top10")), difference))
    if not rows:
        return None
    columns = ("student", "Spearman", "top 1", "top 10", "difference")
    return Table("What each part brings", columns, rows, _budget_note(budget, found))


def _budget_note(budget: Mapping, found: Mapping) -> str:
    spent = []
    if is_number(budget.get("steps")):
        spent.append(f"{whole(budget['steps'])} steps")
    if is_number(budget.get("seconds")):
        spent.append(seconds(budget["seconds"]))
    note = ""
    if any(_part(found, key) for key in ("searched", "no_search", "no_relations")):
        each = f" ({', '.join(spent)})" if spent else ""
        if budget.get("what") == "full":
            note = (
                "Every row was distilled from the teacher's weights, for as many steps as the "
                f"student above in the supernet and after it{each}."
            )
        else:
            note = (
                f"Every row had the same short distillation from the teacher's weights{each}, "
                "less than the student above: read the differences, not the heights. "
                "--ablate gives every row as much as the student."
            )
    gene = _part(found, "no_search").get("gene")
    return f"{note} The plain FFN: {gene}." if gene else note


def genes(report: Mapping) -> Table | None:
    """The FFN of each layer of the student."""
    student = _part(report, "student")
    texts = student.get("genes") or _part(report, "search").get("best_gene")
    if not texts:
        return None
    layers = student.get("layers") or []
    rows = [
        (str(k), str(layers[k]) if k < len(layers) else DASH, text) for k, text in enumerate(texts)
    ]
    search = _part(report, "search")
    note = "A gene: units in the stack, x inner width over hidden width, and the unit's function."
    if is_number(search.get("candidates")):
        note += f" Found among {whole(search['candidates'])} candidates"
        took = f" in {seconds(search['seconds'])}" if is_number(search.get("seconds")) else ""
        note += f"{took}."
    columns = ("layer", "from teacher's layer", "gene")
    return Table("The FFNs found", columns, rows, note, left=3)


def embeddings(report: Mapping) -> Table | None:
    """What factorised word embeddings cost and save, where that was measured."""
    effect = _part(report, "embedding_effect")
    variants = {name: row for name, row in effect.items() if isinstance(row, Mapping)}
    if not variants:
        return None
    shows = {
        "params": amount,
        "params_without_word_embeddings": amount,
        "spearman": correlation,
        "top1": share,
        "top10": share,
    }
    keys = [key for key in shows if any(key in row for row in variants.values())]
    rows = [
        (name.replace("_", " "), *(shows[key](row.get(key)) for key in keys))
        for name, row in variants.items()
    ]
    names = {"params_without_word_embeddings": "without word embeddings", "params": "parameters"}
    columns = ("word embeddings", *(names.get(key, key) for key in keys))
    return Table("Smaller word embeddings", columns, rows, str(effect.get("note") or ""))


def conditions(report: Mapping) -> Table:
    """Where, on what and for how long."""
    machine, data = dict(_part(report, "machine")), _part(report, "data")
    rows = [("teacher", str(_part(report, "teacher").get("origin") or DASH))]
    rows += [(label, machine.pop(key)) for key, label in (("cpu", "processor"),) if key in machine]
    if machine:
        rows.append(("machine", ", ".join(f"{k} {v}" for k, v in machine.items() if v is not None)))
    if data:
        train, tokens = whole(data.get("train_sentences")), whole(data.get("train_tokens"))
        held = whole(data.get("held_out_sentences"))
        rows.append(("text", f"{train} sentences, {tokens} tokens; {held} sentences held out"))
    phases = _part(report, "phases")
    order = [
        *(key for key in PHASES if key in phases),
        *(key for key in phases if key not in PHASES),
    ]
    rows += [(PHASES.get(phase, phase), seconds(phases[phase])) for phase in order]
    rows.append(("altogether", seconds(report.get("seconds"))))
    return Table("Conditions", ("", ""), rows, left=2)


def tables(report: Mapping) -> list[Table]:
    """Every table that the report has something to say in, in reading order."""
    made = (
        comparison(report),
        baselines(report),
        genes(report),
        embeddings(report),
        conditions(report),
    )
    return [table for table in made if table is not None]
