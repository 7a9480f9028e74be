"""The report's files are whole, say the figures, and survive whatever is missing."""

import json
import math

import numpy as np
import pytest
import torch
from report_example import GENES, example

from fastffn.compress import pictures, tables
from fastffn.compress.report import summary, terminal, to_json, to_markdown, to_plain, write

rich_console = pytest.importorskip("rich.console")
pytest.importorskip("matplotlib")

PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


def printed(report, files=None, width=100) -> str:
    console = rich_console.Console(width=width, record=True, file=open("/dev/null", "w"))
    with console.file:
        terminal(report, files, console)
    return console.export_text()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return folder, write(example(), folder)


def test_writes_whole_files_and_nothing_else(written):
    folder, files = written
    names = {"report.json", "report.md", "latency.png", "candidates.png", "curves.png"}
    assert set(files) == names == {path.name for path in folder.iterdir()}
    for path in folder.glob("*.png"):
        data = path.read_bytes()
        assert data.startswith(PNG_START) and data.endswith(PNG_END) and len(data) > 5000


def test_json_holds_every_figure_in_a_fixed_order(written):
    folder, _ = written
    found = json.loads((folder / "report.json").read_text())
    assert found == json.loads(json.dumps(example()))
    assert list(found)[:4] == ["teacher", "student", "size_ratio", "size_ratio_total"]
    turned = dict(reversed(example().items()))
    write(turned, folder / "turned")
    again = (folder / "turned" / "report.json").read_text()
    assert again == (folder / "report.json").read_text()


def test_page_says_the_figures(written):
    page = (written[0] / "report.md").read_text()
    for text in (
        "| parameters without word embeddings | 10.8 M | 2.40 M | 4.5x |",
        "| latency at batch 32, ms | 813 | 181 | 4.5x |",
        "| Spearman of similarities | 1 | 0.831 |",
        "| no relation loss | 0.742 | 50 % | 55 % | -0.012 |",
        "same short distillation from the teacher's weights (60 steps, 21 s)",
        f"| 1 | 2 | `{GENES[1]}` |",
        "Some processor, 2.4 GHz",
        "| altogether | 9 min 01 s |",
        "![",
        "(candidates.png)",
    ):
        assert text in page, text
    assert page.endswith("\n") and "None" not in page and "nan" not in page


def test_terminal_prints_the_same_tables(written):
    _, files = written
    shown = printed(example(), files)
    for table in tables.tables(example()):
        assert table.title in shown
        for row in table.rows:
            for cell in row:
                assert cell in shown, cell
    assert str(files["report.md"]) in shown
    assert max(map(len, printed(example(), width=60).splitlines())) <= 60


def test_square_brackets_are_text():
    report = example()
    report["teacher"]["origin"] = "[red]/a/model"
    assert "[red]/a/model" in printed(report)


@pytest.mark.parametrize("key", [*example(), None])
def test_any_part_may_be_missing(key):
    report = {} if key is None else example()
    report.pop(key, None)
    page = to_markdown(report, {})
    assert "None" not in page and "nan" not in page
    assert summary(report)
    printed(report)


def test_nothing_at_all_still_makes_a_page(tmp_path):
    assert set(write({}, tmp_path)) == {"report.json", "report.md"}


def hollow(value):
    """The same structure with NaN for every figure."""
    if isinstance(value, dict):
        return {key: hollow(item) for key, item in value.items()}
    if isinstance(value, list):
        return [hollow(item) for item in value]
    return math.nan if isinstance(value, int | float) else value


def test_figures_that_are_not_finite(tmp_path):
    files = write(hollow(example()), tmp_path)
    assert set(files) == {"report.json", "report.md"}  # no data, no pictures

    def refuse(text):
        raise AssertionError(f"{text} is no JSON")

    json.loads(files["report.json"].read_text(), parse_constant=refuse)
    page = files["report.md"].read_text()
    assert tables.DASH in page and "nan" not in page
    printed(hollow(example()))


def test_one_bad_candidate_and_one_bad_step_leave_the_pictures():
    report = example()
    report["search"]["trials"][3]["quality"] = None
    report["curves"]["distil"][4][1] = math.nan
    report["curves"]["warmup"][2][2] = {"hidden": 0.0}
    assert pictures.candidates(report) is not None
    assert pictures.curves(report) is not None


def test_plain_data_of_numpy_torch_and_paths(tmp_path):
    value = {
        "a": np.float32(0.5),
        "b": torch.tensor([1, 2]),
        "c": (math.inf, True, np.int64(3)),
        4: tmp_path,
    }
    plain = {"a": 0.5, "b": [1, 2], "c": [None, True, 3], "4": str(tmp_path)}
    assert to_plain(value) == plain
    assert json.loads(to_json(to_plain(value))) == plain


def test_json_breaks_long_lines_only():
    value = {"short": [1, 2, {"a": []}], "long": [["x" * 60] * 2, "y" * 60]}
    text = to_json(value)
    assert json.loads(text) == value
    assert '  "short": [1, 2, {"a": []}],' in text.splitlines()


def test_full_baselines_are_not_called_short():
    report = example()
    report["baselines"]["budget"] = {"steps": 900, "seconds": 181.0, "what": "full"}
    page = to_markdown(report, {})
    assert "for as many steps as the student above" in page
    assert "(900 steps, 3 min 01 s)" in page
    assert "short" not in page


def test_effect_of_factorised_embeddings():
    report = example()
    report["embedding_effect"] = {
        "teacher's own": {"params": 14_123_456, "spearman": 0.831},
        "width_128": {"params": 6_400_000, "spearman": 0.802},
    }
    (table,) = (t for t in tables.tables(report) if t.title == "Smaller word embeddings")
    assert table.rows[1] == ("width 128", "6.40 M", "0.802")


def test_front_is_what_nothing_beats():
    points = [(3.0, 0.7), (1.0, 0.5), (2.0, 0.4), (2.5, 0.6), (3.0, 0.65), (1.0, 0.3)]
    assert pictures.pareto_front(points) == [(1.0, 0.5), (2.5, 0.6), (3.0, 0.7)]


def test_smoothing_neither_lags_nor_moves_the_ends():
    line = [100.0 - k for k in range(100)]
    assert pictures.smoothed(line) == pytest.approx(line)
    noisy = [value + (-1) ** k for k, value in enumerate(line)]
    smooth = pictures.smoothed(noisy)
    assert max(abs(a - b) for a, b in zip(smooth[5:-5], line[5:-5], strict=True)) < 0.2


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (22_565_376, "22.6 M"),
        (999_700, "1.00 M"),
        (1_434_451_968, "1.43 G"),
        (812, "812"),
        (0, "0"),
        (None, tables.DASH),
        (math.nan, tables.DASH),
    ],
)
def test_amounts(value, shown):
    assert tables.amount(value) == shown


def test_figures_have_two_or_three_digits():
    assert [tables.digits(v) for v in (812.7, 29.53, 7.046, 0.01234)] == [
        "813",
        "29.5",
        "7.05",
        "0.0123",
    ]
    assert [tables.ratio(v) for v in (4.13, 12.7, 0.456)] == ["4.1x", "13x", "0.46x"]
    assert [tables.seconds(v) for v in (4.21, 42.4, 125)] == ["4.2 s", "42 s", "2 min 05 s"]
    assert [tables.change(v, 0.754) for v in (0.742, 0.7539)] == ["-0.012", "+0.000"]
