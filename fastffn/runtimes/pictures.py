"""A comparison's pictures: every contender's time, and fastffn against the best of the others."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..compress.tables import digits
from ..figures import BLACK, BLUE, GREEN, GREY, ORANGE, figure, plain_axes, save
from .comparison import PRODUCTS
from .contenders import PRECISIONS
from .tables import per_batch, ratio_to_best

_COLOURS = {"fp32": BLUE, "bf16": ORANGE, "int8": GREEN}
_COLUMNS = 3


def draw(report: Mapping[str, Any], directory: Path) -> list[Path]:
    """Draws a picture of times for each number of threads, and one of ratios where there are any.

    Returns:
        The PNGs.
    """
    drawn = []
    for threads in dict.fromkeys(cell["threads"] for cell in report["cells"]):
        cells = [cell for cell in report["cells"] if cell["threads"] == threads]
        at = f"{threads} thread{'s' if threads > 1 else ''}"
        stem = f"{threads}-threads"
        drawn.append(save(_times(cells, at), directory / f"milliseconds-{stem}.png"))
        if (made := _ratios(cells, at)) is not None:
            drawn.append(save(made, directory / f"ratios-{stem}.png"))
    return drawn


def _times(cells, at: str):
    """A panel a workload: bars of milliseconds, the fastest first, coloured by precision."""
    rows = -(-len(cells) // _COLUMNS)
    columns = min(len(cells), _COLUMNS)
    longest = max(len(cell["results"]) for cell in cells)
    made = figure(5.2 * columns, 0.9 * rows + 0.2 * rows * longest)
    axes = made.subplots(rows, columns, squeeze=False).flat
    for ax, cell in zip(axes, cells, strict=False):
        plain_axes(ax, "x")
        found = sorted(cell["results"], key=lambda row: row["ms"])
        names = [f"{row['model']} {row['runtime']}" for row in found]
        colours = [
            GREY if row["runtime"] == PRODUCTS else _COLOURS[row["precision"]] for row in found
        ]
        low, times, high = (
            [per_batch(row[name], cell) for row in found] for name in ("low", "ms", "high")
        )
        spread = [
            [b - a for a, b in zip(*two, strict=True)] for two in ((low, times), (times, high))
        ]
        bars = ax.barh(range(len(found)), times, color=colours, xerr=spread, ecolor=BLACK)
        shown = zip(times, found, strict=True)
        ax.bar_label(bars, [f" {digits(ms)} {row['precision']}" for ms, row in shown], fontsize=7)
        ax.set_yticks(range(len(found)), names, fontsize=7)
        ax.invert_yaxis()
        ax.margins(x=0.25)
        ax.set_title(cell["workload"], loc="left")
        ax.set_xlabel("milliseconds")
    for ax in list(axes)[len(cells) :]:
        ax.set_axis_off()
    made.suptitle(f"Time of a batch, {at}; grey: the bare matrix products")
    return made


def _ratios(cells, at: str):
    """fastffn over the best other runtime at equal precision. None where fastffn has not run."""
    models = dict.fromkeys(row["model"] for cell in cells for row in cell["results"])
    groups = [
        (f"{model}, {cell['workload']}", found)
        for model in models
        for cell in cells
        if any(found := [ratio_to_best(cell, model, precision) for precision in PRECISIONS])
    ]
    if not groups:
        return None
    made = figure(7.5, 1.4 + 0.45 * len(groups))
    ax = plain_axes(made.subplots(), "x")
    for place, (_, found) in enumerate(groups):
        for k, (precision, ratio) in enumerate(zip(PRECISIONS, found, strict=True)):
            if ratio is not None:
                at_y = place + (k - 1) * 0.27
                (bar,) = ax.barh(at_y, ratio[0], 0.25, color=_COLOURS[precision])
                text = f" {precision} {digits(ratio[0])}x {ratio[1]}"
                ax.text(bar.get_width(), at_y, text, va="center", fontsize=6.5)
    ax.axvline(1, color=BLACK, linewidth=0.8)
    ax.set_yticks(range(len(groups)), [name for name, _ in groups], fontsize=7)
    ax.invert_yaxis()
    ax.margins(x=0.25)
    ax.set_xlabel("times faster than the best other runtime at equal precision")
    made.suptitle(f"fastffn against the best of the others, {at}")
    return made
