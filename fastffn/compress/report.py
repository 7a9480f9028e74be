"""Writes a report for machines (report.json), for people (report.md, pictures) and the terminal.

Each file is whole or absent. `report.json` is strict JSON: plain figures, `null` for what is not
finite, keys in a fixed order, short lists on one line so that two runs compare by `diff`.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from fastffn.compress import pictures
from fastffn.compress.tables import Table, amount, is_number, ratio, tables
from fastffn.files import write_text_atomic

_ORDER = (
    *("teacher", "student", "size_ratio", "size_ratio_total", "speedup_b1", "speedup_b32"),
    *("length", "retention", "start", "baselines", "search", "embedding_effect", "curves"),
    *("phases", "data", "machine", "seconds"),
)
_LINE = 100  # characters of JSON on one line
_TARGET = "student"  # folder of the student, where the report does not say it


def write(report: Mapping, directory: str | Path) -> dict[str, Path]:
    """Writes report.json, report.md and the pictures that there are data for.

    Args:
        report: what `fastffn.compress.pipeline.run` returned; parts may be absent.
        directory: made if need be; older reports in it are replaced.

    Returns:
        name of the file -> its path, `report.md` among them.
    """
    directory = Path(directory)
    plain = _ordered(to_plain(report))
    files = {"report.json": directory / "report.json"}
    write_text_atomic(files["report.json"], to_json(plain) + "\n")
    drawn = pictures.draw(plain, directory)
    files.update({path.name: path for path in drawn.values()})
    files["report.md"] = directory / "report.md"
    write_text_atomic(files["report.md"], to_markdown(plain, drawn))
    return files


def to_plain(value: object) -> object:
    """Plain data: figures of numpy or torch as Python's, not finite ones as None, paths as text."""
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if value is None or isinstance(value, bool | str):
        return value
    if hasattr(value, "tolist"):  # arrays, tensors and their scalars
        return to_plain(value.tolist())
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Iterable):
        return [to_plain(item) for item in value]
    return str(value)


def _ordered(report: dict) -> dict:
    """The parts in reading order, however the run came to them."""
    known = [key for key in _ORDER if key in report]
    return {key: report[key] for key in known + sorted(report.keys() - set(_ORDER))}


def to_json(value: object, indent: str = "") -> str:
    """JSON in which whatever fits stands on one line."""
    flat = json.dumps(value, ensure_ascii=False, allow_nan=False)
    if len(indent) + len(flat) <= _LINE or not isinstance(value, dict | list) or not value:
        return flat
    deeper = indent + "  "
    if isinstance(value, dict):
        lines = [
            f"{json.dumps(key, ensure_ascii=False)}: {to_json(item, deeper)}"
            for key, item in value.items()
        ]
        first, last = "{", "}"
    else:
        lines = [to_json(item, deeper) for item in value]
        first, last = "[", "]"
    body = ",\n".join(deeper + line for line in lines)
    return f"{first}\n{body}\n{indent}{last}"


def summary(report: Mapping) -> str:
    """The result in a sentence."""
    teacher, student = report.get("teacher") or {}, report.get("student") or {}
    said = []
    if is_number(report.get("size_ratio")):
        said.append(f"{ratio(report['size_ratio'])} smaller without word embeddings")
    if is_number(report.get("size_ratio_total")):
        said.append(f"{ratio(report['size_ratio_total'])} with them")
    if is_number(report.get("speedup_b32")):
        said.append(f"{ratio(report['speedup_b32'])} faster at batch 32")
    kept = (report.get("retention") or {}).get("spearman")
    if is_number(kept):
        said.append(f"and orders sentence pairs like its teacher with a Spearman of {kept:.3f}")
    name = teacher.get("name") or "The teacher"
    sizes = f"{amount(teacher.get('params'))} parameters became {amount(student.get('params'))}"
    return f"{name}: {sizes}. The student is {', '.join(said)}." if said else f"{name}: {sizes}."


def to_markdown(report: Mapping, drawn: Mapping[str, Path]) -> str:
    """The page for people; pictures stand below the tables that they belong to."""
    parts = ["# A smaller encoder", summary(report)]
    path = (report.get("student") or {}).get("path") or _TARGET
    parts.append(
        "Load it (its tokenizer lies beside it):\n\n"
        "```python\n"
        "import fastffn\n\n"
        f'model = fastffn.EfficientBertModel.from_pretrained("{path}")  # from this folder\n'
        "```"
    )
    captions = {
        "latency": "Median time of a forward, teacher and student in turns in one run.",
        "candidates": "Every candidate of the search; the line joins those that no other beats "
        "in both size and quality.",
        "curves": "Training losses; thin: as measured, thick: smoothed.",
    }
    below = {"Teacher and student": "latency", "The FFNs found": "candidates"}
    left = dict(drawn)
    for table in tables(report):
        parts += [f"## {table.title}", _markdown_table(table)]
        if table.note:
            parts.append(table.note)
        if picture := left.pop(below.get(table.title, ""), None):
            parts.append(_picture(picture, captions[below[table.title]]))
    for name, picture in left.items():
        parts += [f"## {name.capitalize()}", _picture(picture, captions[name])]
    return "\n\n".join(parts) + "\n"


def _picture(path: Path, caption: str) -> str:
    return f"![{caption}]({path.name})\n\n*{caption}*"


def _markdown_table(table: Table) -> str:
    rules = ["---"] * table.left + ["---:"] * (len(table.columns) - table.left)
    cells = [[_escape(cell) for cell in row] for row in (table.columns, *table.rows)]
    if "gene" in table.columns:
        place = table.columns.index("gene")
        for row in cells[1:]:
            row[place] = f"`{row[place]}`"
    lines = [cells[0], rules, *cells[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")


def terminal(report: Mapping, files: Mapping[str, Path] | None = None, console=None) -> None:
    """Prints the same tables with rich, and where the files are.

    Args:
        files: what `write` returned; None: no files are named.
        console: a rich Console; None: standard output.
    """
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.padding import Padding
    from rich.table import Table as Rows

    console = console or Console()
    plain = to_plain(report)
    for table in tables(plain):
        shown = Rows(
            title=escape(table.title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD
        )
        shown.show_header = any(table.columns)
        for place, column in enumerate(table.columns):
            justify = "left" if place < table.left else "right"
            shown.add_column(escape(column), justify=justify, overflow="fold")
        for row in table.rows:
            shown.add_row(*map(escape, row))
        console.print(shown)
        if table.note:
            note = Padding(escape(table.note), (0, 0, 1, 2))
            console.print(note, style="dim", highlight=False)
    console.print(escape(summary(plain)), style="bold", highlight=False)
    if files:
        folder = next(iter(files.values())).parent
        console.print(
            f"Report: {escape(str(folder / 'report.md'))}", highlight=False, soft_wrap=True
        )
        student = folder / ((plain.get("student") or {}).get("path") or _TARGET)
        console.print(f"Student: {escape(str(student))}", highlight=False, soft_wrap=True)
