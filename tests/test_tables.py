"""Tables: formats, compression, rows and columns that are not as they should be."""

import gzip
import json
import lzma

import pytest

from fastffn.data.tables import MissingColumn, column_names, read_table
from fastffn.errors import UserError


def write(path, text, encoding="utf-8"):
    data = text.encode(encoding)
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "wb") as file:
        file.write(data)
    return path


def parquet(path, columns):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), path)
    return path


@pytest.mark.parametrize("name", ["t.tsv", "t.txt", "t.tsv.gz", "t.tsv.xz"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_tsv_keeps_characters_as_they_are(tmp_path, name, mark, end):
    lines = [f"{mark}text\tlabel", '"to be" or\t0', "a\u2028b, c\x85\t1", "", 'odd "\t0']
    table = read_table(write(tmp_path / name, end.join(lines)), ["label", "text"])
    assert table.columns == {
        "label": ["0", "1", "0"],
        "text": ['"to be" or', "a\u2028b, c\x85", 'odd "'],
    }
    assert list(table.columns) == ["label", "text"] and len(table) == 3
    assert table.place(2) == f"{name}:5"
    assert column_names(tmp_path / name) == ("text", "label")


def test_csv_has_quotes_and_lines_inside_of_fields(tmp_path):
    path = write(tmp_path / "t.csv", 'text,label\n"one, ""two""\nthree",1\nfour,0\n')
    table = read_table(path)
    assert table.columns == {"text": ['one, "two"\nthree', "four"], "label": ["1", "0"]}
    assert table.lines == [2, 4]
    literal = read_table(write(tmp_path / "l.csv", 'a,b\n"x",1\n'), quoting=False)
    assert literal.columns["a"] == ['"x"']
    with pytest.raises(UserError, match=r"t\.csv:2: not a row of csv"):
        read_table(write(path, 'text,label\n"open,1\n'))


@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.jsonl.gz"])
def test_objects_keep_their_types(tmp_path, name):
    rows = [{"text": "a\nb", "label": 1, "more": [1]}, {"label": None, "text": "c"}]
    table = read_table(
        write(tmp_path / name, "\n".join(map(json.dumps, rows)) + "\n"), ["text", "label"]
    )
    assert table.columns == {"text": ["a\nb", "c"], "label": [1, None]}
    assert column_names(tmp_path / name) == ("text", "label", "more")
    array = write(tmp_path / "array.json", json.dumps(rows, indent=1))
    assert read_table(array, ["text", "label"]).columns == table.columns


def test_parquet(tmp_path):
    path = parquet(tmp_path / "t.parquet", {"text": ["a", None], "label": [1.5, 2.0], "id": [7, 8]})
    table = read_table(path, ["label", "text"])
    assert table.columns == {"label": [1.5, 2.0], "text": ["a", None]}
    assert table.place(1) == "t.parquet:2"
    assert column_names(path) == ("text", "label", "id")
    with pytest.raises(MissingColumn, match="no column score: it has text, label, id"):
        read_table(path, ["score"])
    with pytest.raises(UserError, match="cannot be read"):
        read_table(write(tmp_path / "broken.parquet", "no parquet"))


def test_files_without_a_header(tmp_path):
    path = write(tmp_path / "t.tsv", "a\t0\t\tone\nb\t1\t*\ttwo\n")
    table = read_table(path, ["text"], names=("source", "label", "mark", "text"))
    assert table.columns == {"text": ["one", "two"]} and table.place(0) == "t.tsv:1"


def test_ragged_rows(tmp_path):
    path = write(tmp_path / "t.tsv", "a\tb\n1\t2\n3\n4\t5\t6\n7\t8\n")
    with pytest.raises(UserError, match=r"t\.tsv:3 has 1 fields, 2 are expected \(a, b\)"):
        read_table(path)
    assert read_table(path, ragged="skip").columns == {"a": ["1", "7"], "b": ["2", "8"]}
    with pytest.raises(UserError, match=r"t\.tsv:3 has 1"):
        read_table(path, ragged="extra")
    write(path, "a\tb\n1\t2\n4\t5\t6\n")
    assert read_table(path, ragged="extra").columns == {"a": ["1", "4"], "b": ["2", "5"]}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.tsv", None, "does not exist"),
        ("t.parquet", None, "does not exist"),
        ("t.tsv", "a\tb\n1\t2\n", "t.tsv has no column label: it has a, b"),
        ("t.tsv", "", "has no column label"),
        ("t.xls", "a", "format is not known"),
        ("t.parquet.gz", "a", "format is not known"),
        ("t.jsonl", '{"label": 1}\n{"a": 1}\n', "t.jsonl:2 has no column label: it has a"),
        ("t.jsonl", '{"label": 1}\n{"label"\n', "t.jsonl:2 is not JSON"),
        ("t.jsonl", '{"label": 1}\n3\n', "t.jsonl:2 is not a JSON object"),
    ],
)
def test_bad_tables_are_named_in_one_line(tmp_path, name, text, message):
    if text is not None:
        write(tmp_path / name, text)
    with pytest.raises(UserError, match=message) as caught:
        read_table(tmp_path / name, ["label"])
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text(tmp_path):
    path = write(tmp_path / "t.tsv", "größe\t1\n", "latin-1")
    with pytest.raises(UserError, match="is not UTF-8"):
        read_table(path)
    with pytest.raises(UserError, match="is not UTF-8"):
        column_names(path)
    path = tmp_path / "t.tsv.gz"
    path.write_bytes(gzip.compress(b"a\tb\n" * 1000)[:-12])
    with pytest.raises(UserError, match="cannot be read"):
        read_table(path)
