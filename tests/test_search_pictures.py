"""Pictures of a search: they show what the report says, and nothing overlaps."""

import math
from random import Random

import pytest
from search_report_example import example

from fastffn.figures import amount
from fastffn.search import pictures
from fastffn.search.wins import wins

pytest.importorskip("matplotlib")


def _labels(drawn) -> list[str]:
    return [text.get_text() for legend in drawn.legends for text in legend.get_texts()]


def _texts(drawn) -> list:
    """Everything written in a figure, ticks beyond the ends of their axes left out."""
    found = [*drawn.texts, *(text for legend in drawn.legends for text in legend.get_texts())]
    for ax in drawn.axes:
        found += [*ax.texts, ax.title, ax._left_title]
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            found += [axis.label, *(tick.label1 for tick in ticks)]
    return [text for text in found if text.get_visible() and text.get_text().strip()]


def _no_overlaps(drawn) -> None:
    """No two texts of the figure touch, and all lie inside it."""
    drawn.canvas.draw()
    seen = []
    for text in _texts(drawn):
        box, said = text.get_window_extent(), text.get_text()
        if box.width < 1:
            continue  # a tick label of an axis that shares another's
        assert box.x0 >= -1 and box.x1 <= drawn.bbox.x1 + 1, f"{said} is cut off"
        assert box.y0 >= -1 and box.y1 <= drawn.bbox.y1 + 1, f"{said} is cut off"
        for other, near in seen:
            across = min(box.x1, near.x1) - max(box.x0, near.x0)
            along = min(box.y1, near.y1) - max(box.y0, near.y0)
            assert across < 1 or along < 1, f"{said} touches {other}"
        seen.append((said, box))


# -- pictures ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"layers": 3, "counts": {"only": 10}},
        {"layers": 6, "counts": {"coarse": 60, "middle": 10, "fine": 30}, "latency": True},
        {
            **{"layers": 12, "counts": {"coarse": 1400, "middle": 300, "fine": 300}},
            **{"latency": True, "objectives": ("quality", "latency")},
        },
    ],
    ids=["smallest", "usual", "largest"],
)
def test_nothing_overlaps_in_searches_of_any_size(options):
    report = example(**options)
    for make in (pictures.front, pictures.history, pictures.winning):
        if (figure := make(report)) is not None:
            _no_overlaps(figure)


def test_pictures_are_files_of_their_kind(tmp_path):
    drawn = pictures.draw(example(), tmp_path / "new")
    assert set(drawn) == {"front", "history", "wins", "winner", "winner.svg"}
    for name, path in drawn.items():
        assert path.read_bytes()[:4] == (b"<?xm" if name.endswith("svg") else b"\x89PNG")


def test_front_shows_every_candidate_once():
    report = example(latency=True, objectives=("quality", "latency", "macs"))
    drawn = pictures.front(report)
    assert [ax.get_xlabel().split(",")[0] for ax in drawn.axes] == [
        "parameters",
        "latency by the table",
        "multiply-accumulates of a token",
    ]
    labels = _labels(drawn)
    stopped = sum(record["pruned"] for record in report["candidates"])
    assert {"coarse (24)", "middle (12)", "fine (12)", "front", "budget", "chosen"} <= set(labels)
    assert f"stopped early ({stopped})" in labels
    shown = [mark for mark in drawn.axes[0].collections if mark.get_label() != "chosen"]
    assert sum(len(mark.get_offsets()) for mark in shown) == len(report["candidates"])


@pytest.mark.parametrize("unit", [1, 1000])
def test_a_latency_budget_is_drawn_where_it_is(unit):
    report = example(latency=True)
    for record in report["candidates"]:
        record["latency"] = record["latency"] // unit
    slowest = max(record["latency"] for record in report["candidates"])
    report["space"]["latency"] = [None, slowest / 1000]  # milliseconds
    ax = pictures.front(report).axes[1]
    (line,) = [line for line in ax.lines if line.get_label() == "budget"]
    shown = slowest if "microseconds" in ax.get_xlabel() else slowest / 1000
    assert line.get_xdata()[0] == pytest.approx(shown)
    assert ("microseconds" in ax.get_xlabel()) == (unit == 1000)


def test_the_front_line_rises_and_leaves_early_stopped_ones_out():
    report = example(counts={"coarse": 80})
    cheap = {**report["candidates"][0], "params": 1_000_000, "quality": 2.0, "pruned": True}
    report["candidates"].append(cheap)
    for ax in pictures.front(report).axes:
        (line,) = [line for line in ax.lines if line.get_label() == "front"]
        x, y = line.get_data()
        assert list(x) == sorted(x) and list(y) == sorted(y)
        assert max(y) < 1


def test_a_few_bad_ones_do_not_squeeze_the_rest():
    report = example(counts={"coarse": 60})
    good = [record["quality"] for record in report["candidates"]]
    for number in range(4):
        report["candidates"][number]["quality"] = -10.0 * number
    drawn = pictures.front(report)
    low, high = drawn.axes[0].get_ylim()
    assert high - low < 3 * (max(good) - min(good))
    assert "below the axis (4)" in _labels(drawn)
    low, _ = pictures.history(report).axes[0].get_ylim()
    assert low > -1
    for record in report["candidates"]:
        record["quality"] = 0.5
    low, high = pictures.front(report).axes[0].get_ylim()
    assert low < 0.5 < high, "equal qualities"


def test_best_so_far_starts_anew_with_every_stage():
    report = example()
    ax = pictures.history(report).axes[0]
    lines = [line.get_data() for line in ax.lines]
    assert len(lines) == 3
    for (x, y), stage in zip(lines, report["stages"], strict=True):
        own = [r for r in report["candidates"] if r["stage"] == stage["name"]]
        assert max(y) == max(r["quality"] for r in own if not r["pruned"])
        assert list(y) == sorted(y)
        assert x[-1] - x[0] <= stage["trials"]


def test_a_search_without_candidates_has_no_pictures(tmp_path):
    report = {**example(), "candidates": [], "genes": [], "best": None, "front": []}
    assert pictures.draw(report, tmp_path) == {}
    diverged = {**example()["candidates"][0], "quality": math.nan}
    assert pictures.front({**report, "candidates": [diverged]}) is None


# -- what wins -----------------------------------------------------------------------------------


def _records(genes: list[str], qualities: list[float]) -> list[dict]:
    return [
        {"genes": [gene], "quality": quality, "pruned": False}
        for gene, quality in zip(genes, qualities, strict=True)
    ]


def test_shares_of_the_best_quarter_and_of_all():
    genes = ["2x1/2 down(gelu(up(x)))"] * 4 + ["1x1 tanh(down(relu(up(x))))"] * 12
    space = {"num_layers": 1, "base": 1}
    records = _records(genes, [*range(100, 104), *range(12)])
    primitives, stacks, ratios = wins(space, {"only": records})
    assert (primitives.good, primitives.count) == (4, 16)
    assert primitives.items == ["relu", "tanh", "gelu"]
    assert primitives.best == [[0], [0], [1]]
    assert primitives.all == [[0.75], [0.75], [0.25]]
    assert primitives.clear(2, 0), "all four of the best, a quarter of all"
    assert stacks.items == ["1 unit", "2 units"] and stacks.gaps == [[-0.75], [0.75]]
    assert ratios.items == ["ratio 1/2", "ratio 1"]


def test_a_stage_says_nothing_of_what_it_keeps():
    space = {"num_layers": 1, "base": 1}
    genes = [f"{1 + k % 3}x1 down(gelu(up(x)))" for k in range(16)]
    stages = {"fine": _records(genes, list(range(16)))}
    described = [{"name": "fine", "freeze": "functions"}]
    assert [block.name for block in wins(space, stages, described)] == ["stacks"]


def test_chance_is_not_called_clear():
    rng = Random(0)
    genes = [f"{rng.choice((1, 2))}x1 down(gelu(up(x)))" for _ in range(400)]
    (stacks,) = wins({"num_layers": 1}, {"only": _records(genes, [rng.random() for _ in genes])})
    assert not stacks.clear(0, 0) and not stacks.clear(1, 0)


def test_candidates_stopped_early_are_never_among_the_best():
    records = _records(["1x1 down(gelu(up(x)))"] * 12 + ["2x1 down(gelu(up(x)))"] * 12, [1.0] * 24)
    for record in records[:12]:
        record.update(pruned=True, quality=9.0)
    (stacks,) = wins({"num_layers": 1}, {"only": records})
    assert stacks.best == [[0], [1]]


def test_amounts_have_three_digits():
    numbers = (0, 96, 999.6, 1234, 999_600, 1_180_000, 110e6, 3.2e9)
    assert [*map(amount, numbers)] == ["0", "96", "1k", "1.23k", "1M", "1.18M", "110M", "3.2G"]
    assert amount(14_806_944, digits=4) == "14.81M"
