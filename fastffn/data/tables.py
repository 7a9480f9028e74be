"""Tables in files: columns of values, each row with the place it came from.

    .tsv, .txt      tab between fields, quotes are literal characters (as GLUE writes them)
    .csv            commas and quotes as spreadsheets write them
    .jsonl, .json   an object a line, or one array of objects
    .parquet        by pyarrow

All but parquet may end in .gz or .xz too, and may begin with a byte order mark. Values of tsv and
csv are text; those of the others keep their type, and null is None.

Why not pandas: it guesses types and missing values ("NA", "null" and "None" are words in a
sentence), and says in many lines what a user must read in one.
"""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastffn.data.text import OPENERS, read_utf8
from fastffn.errors import UserError

_FORMATS = (".tsv", ".txt", ".csv", ".jsonl", ".json", ".parquet")


class MissingColumn(UserError):
    """A column is not in the table."""


@dataclass(frozen=True)
class Table:
    """Columns of equal length.

    Attributes:
        path: the file.
        columns: name -> values.
        lines: the line on which each row begins, from 1; for parquet the row's number.
    """

    path: Path
    columns: dict[str, list]
    lines: list[int]

    def __len__(self) -> int:
        return len(self.lines)

    def place(self, row: int) -> str:
        """Where a row is, for messages: "train.tsv:17"."""
        return f"{self.path.name}:{self.lines[row]}"


def read_table(
    path: str | Path,
    columns: Sequence[str] | None = None,
    *,
    names: Sequence[str] | None = None,
    quoting: bool | None = None,
    ragged: str = "error",
) -> Table:
    """Reads columns of a table.

    Args:
        path: the file; its name says what it is.
        columns: which to read; None: all.
        names: the columns' names where the file has no header line (tsv and csv).
        quoting: whether quotes enclose fields; None: in csv only.
        ragged: a row of tsv or csv with another number of fields than there are names is an
            "error"; "skip" leaves it out; "extra" allows more fields, which are not read.

    Raises:
        UserError: a missing or unreadable file, an unknown format, a column that is not there, or
            a ragged row.
    """
    path = Path(path)
    kind = _format(path)
    if kind == ".parquet":
        return _read_parquet(path, columns)
    text = read_utf8(path, "table")
    if kind in (".jsonl", ".json"):
        return _read_objects(path, text, columns)
    if quoting is None:
        quoting = kind == ".csv"
    rows = _quoted(path, text, "," if kind == ".csv" else "\t") if quoting else _literal(text, kind)
    return _read_fields(path, rows, columns, names, ragged)


def column_names(path: str | Path) -> tuple[str, ...]:
    """The columns of a table with a header or with named values, from its beginning.

    Raises:
        UserError: a missing or unreadable file, or an unknown format.
    """
    path = Path(path)
    kind = _format(path)
    if kind == ".parquet":
        return tuple(_parquet(path).schema_arrow.names)
    if not path.is_file():
        read_utf8(path, "table")  # says so
    try:
        with OPENERS.get(path.suffix, open)(path, "rb") as file:
            line = file.readline().decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError):
        line = read_utf8(path, "table").partition("\n")[0]  # says what is wrong
    if kind in (".jsonl", ".json"):
        try:
            first = json.loads(line)
        except ValueError:  # not an object a line
            return tuple(_read_objects(path, read_utf8(path, "table"), None).columns)
        return tuple(first) if isinstance(first, dict) else ()
    rows = _quoted(path, line, ",") if kind == ".csv" else _literal(line, kind)
    return tuple(next(rows, (1, []))[1])


def _format(path: Path) -> str:
    name = path.with_suffix("") if path.suffix in OPENERS else path
    if name.suffix not in _FORMATS or (name is not path and name.suffix == ".parquet"):
        raise UserError(
            f"table {path}: its format is not known by its name: give one of {', '.join(_FORMATS)}"
            " (the text ones also with .gz or .xz)"
        )
    return name.suffix


def _check_columns(path: Path, wanted: Sequence[str], there: Sequence[str], at: str = "") -> None:
    for name in wanted:
        if name not in there:
            raise MissingColumn(
                f"{path}{at} has no column {name}: it has {', '.join(map(str, there)) or 'none'}"
            )


# -- lines of fields ---------------------------------------------------------------------------


def _literal(text: str, kind: str) -> Iterator[tuple[int, list[str]]]:
    separator = "," if kind == ".csv" else "\t"
    # Only \n ends a line: a sentence may hold the other characters that splitlines takes for ends.
    for number, line in enumerate(text.split("\n"), 1):
        if line := line.removesuffix("\r"):
            yield number, line.split(separator)


def _quoted(path: Path, text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(max(csv.field_size_limit(), 1 << 27))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    start = 1
    try:
        for row in reader:
            if row:
                yield start, row
            start = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path.name}:{start}: not a row of csv: {error}") from None


def _read_fields(
    path: Path,
    rows: Iterator[tuple[int, list[str]]],
    columns: Sequence[str] | None,
    names: Sequence[str] | None,
    ragged: str,
) -> Table:
    if names is None:
        names = next(rows, (1, []))[1]
    columns = tuple(names if columns is None else columns)
    _check_columns(path, columns, names)
    places = [list(names).index(name) for name in columns]
    kept: list[list[str]] = []
    lines: list[int] = []
    for line, row in rows:
        if len(row) != len(names) and not (ragged == "extra" and len(row) > len(names)):
            if ragged == "skip":
                continue
            raise UserError(
                f"{path}:{line} has {len(row)} fields, {len(names)} are expected "
                f"({', '.join(names)}): mend that line"
            )
        kept.append(row)
        lines.append(line)
    return Table(
        path,
        {name: [row[k] for row in kept] for name, k in zip(columns, places, strict=True)},
        lines,
    )


# -- objects and parquet -----------------------------------------------------------------------


def _read_objects(path: Path, text: str, columns: Sequence[str] | None) -> Table:
    rows: list[tuple[int, object]] = []
    try:
        if text.lstrip().startswith("["):
            line = 1
            rows = list(enumerate(json.loads(text), 1))
        else:
            for line, part in enumerate(text.split("\n"), 1):
                if part.strip():
                    rows.append((line, json.loads(part)))
    except ValueError as error:
        raise UserError(f"{path}:{line} is not JSON: {error}") from None
    if columns is None:
        columns = tuple(rows[0][1]) if rows and isinstance(rows[0][1], dict) else ()
    for line, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{path}:{line} is not a JSON object with the columns' names")
        _check_columns(path, columns, tuple(row), f":{line}")
    return Table(
        path,
        {name: [row[name] for _, row in rows] for name in columns},
        [line for line, _ in rows],
    )


def _parquet(path: Path):
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"table {path} needs pyarrow: pip install pyarrow, or give tsv") from None
    if not path.is_file():
        raise UserError(f"table {path} does not exist: give the path of a parquet file")
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"table {path} cannot be read: {reason}") from None


def _read_parquet(path: Path, columns: Sequence[str] | None) -> Table:
    file = _parquet(path)
    columns = tuple(file.schema_arrow.names if columns is None else columns)
    _check_columns(path, columns, file.schema_arrow.names)
    data = file.read(columns=list(columns)).to_pydict()
    return Table(
        path,
        {name: data[name] for name in columns},
        list(range(1, file.metadata.num_rows + 1)),
    )
