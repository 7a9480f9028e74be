"""Pictures of a search: quality against cost, quality over the candidates, what wins, the winner.

    draw(report, "runs/search")     front.png, history.png, wins.png, winner.png, winner.svg

What two stages measured differs (one trains its candidates, another takes them as they are), so
the best so far and the best quarter are those of each stage. A candidate that was stopped early
has the quality of its last rung, after less training than the others: it is drawn as a cross and
never counts as good. Where few candidates are far worse than the rest, the axis ends above them,
and arrowheads at its end say how many there are.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..expr import Gene
from ..figures import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    LIGHT,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    amount,
    figure,
    plain_axes,
    save,
)
from . import drawing
from .merit import front as best_of_two
from .wins import Block, wins

_LOOKS = ((BLUE, "o"), (ORANGE, "^"), (GREEN, "s"), (PURPLE, "D"), (SKY, "v"))  # of the stages
_COSTS = {  # what it is called; what one unit of the axis is
    "params": ("parameters", (("millions", 1e6), ("thousands", 1e3))),
    "macs": ("multiply-accumulates of a token", (("millions", 1e6), ("thousands", 1e3))),
    "latency": ("latency by the table", (("milliseconds", 1e3), ("microseconds", 1.0))),
}


def draw(report: Mapping[str, Any], directory: str | Path) -> dict[str, Path]:
    """Draws what the report has data for.

    Args:
        report: of a search that is finished or under way.
        directory: made if need be.

    Returns:
        "front", "history", "wins", "winner" -> the PNG; "winner.svg" -> the winner as SVG.

    Raises:
        UserError: matplotlib is not installed.
    """
    drawn = {}
    for name, make in (("front", front), ("history", history), ("wins", winning)):
        if (made := make(report)) is not None:
            drawn[name] = save(made, Path(directory) / f"{name}.png")
    if (made := winner(report)) is not None:
        drawn["winner"] = save(made, Path(directory) / "winner.png")
        drawn["winner.svg"] = save(made, Path(directory) / "winner.svg")
    return drawn


def winner(report: Mapping[str, Any]) -> Any:
    """The winning genes as graphs; None while there are none. See `drawing`."""
    if not report.get("genes"):
        return None
    space, best = report["space"], report.get("best") or {}
    title = [f"{report['name']}: the winner"]
    if _is_number(best.get("quality")):
        title = [f"{report['name']}: quality {best['quality']:.4g}"]
    if best.get("params"):
        title.append(f"{amount(best['params'])} parameters")
    genes = [Gene.parse(text, space.get("base", 1)) for text in report["genes"]]
    return drawing.winner(genes, space["hidden_size"], ", ".join(title))


# -- candidates ----------------------------------------------------------------------------------


def judged(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The candidates with a quality, each where it was judged: inherited ones are left out."""
    return [
        record
        for record in report.get("candidates") or []
        if _is_number(record.get("quality")) and not record.get("inherited")
    ]


def front(report: Mapping[str, Any]) -> Any:
    """Quality against parameters, and against latency where it is known. None without candidates.

    A further cost that the search minimised has a panel too. The line of a panel joins those that
    none beats in the two of the panel, among the finished candidates of the stages that the
    report's front comes from.
    """
    records = judged(report)
    if not records:
        return None
    costs = ["params"]
    if any(_is_number(record.get("latency")) for record in records):
        costs.append("latency")
    costs += [name for name in report.get("objectives", ()) if name in _COSTS.keys() - set(costs)]
    drawn = figure(6.4 if len(costs) == 1 else 5.2 * len(costs), 4.6)
    axes = drawn.subplots(1, len(costs), squeeze=False, sharey=True)[0]
    low, high, hidden = _range([record["quality"] for record in records])
    stages = {record.get("stage") for record in report.get("front") or records}
    comparable = [r for r in records if r.get("stage") in stages and not r.get("pruned")]
    for ax, cost in zip(axes, costs, strict=True):
        unit, scale = _unit(cost, records)
        _dots(ax, report, records, lambda record, c=cost, s=scale: _cost(record, c, s), low)
        _front_line(ax, comparable, cost, scale)
        _budget(ax, report, cost, scale)
        _ring(ax, report, _cost(report.get("best") or {}, cost, scale))
        plain_axes(ax, "both").set_xlabel(f"{_COSTS[cost][0]}, {unit}")
        ax.margins(x=0.06)
    axes[0].set_ylim(low, high)
    axes[0].set_ylabel(_quality_text(report))
    return _finished(drawn, axes, f"{report['name']}: candidates", hidden)


def history(report: Mapping[str, Any]) -> Any:
    """Quality of candidate after candidate, stage by stage. None without candidates."""
    records = judged(report)
    if not records:
        return None
    drawn = figure(8.2, 4.6)
    ax = plain_axes(drawn.subplots())
    low, high, hidden = _range([record["quality"] for record in records])
    places = {id(record): place for place, record in enumerate(records, 1)}
    _dots(ax, report, records, lambda record: places[id(record)], low)
    start = 0
    for at, (name, ours) in enumerate(_by_stage(report, records).items()):
        end = start + len(ours)
        if at % 2:
            ax.axvspan(start + 0.5, end + 0.5, color=LIGHT, alpha=0.35, linewidth=0, zorder=0)
        if len(ours) >= 0.012 * len(name) * len(records):
            middle = (start + end + 1) / 2
            look = {"ha": "center", "va": "bottom", "fontsize": 9, "color": GREY}
            ax.text(middle, 1.01, name, transform=ax.get_xaxis_transform(), **look)
        steps, best = [], -math.inf
        for record in ours:
            if not record.get("pruned"):
                best = max(best, record["quality"])
            if best >= low:
                steps.append((places[id(record)], best))
        if steps:
            label = "best of the stage so far" if start == 0 else None
            last = (end + 0.5, steps[-1][1])
            line = list(zip(*steps, last, strict=True))
            ax.step(*line, where="post", color=BLACK, linewidth=1.3, label=label, zorder=2.5)
        start = end
    _ring(ax, report, places.get(_place_of_best(report, records)))
    ax.set(xlim=(0.5, len(records) + 0.5), ylim=(low, high))
    ax.set_xlabel("candidate, in order")
    ax.set_ylabel(_quality_text(report))
    return _finished(drawn, [ax], f"{report['name']}: quality", hidden, pad=18)


def _place_of_best(report: Mapping[str, Any], records: Sequence[Mapping]) -> int | None:
    """`id` of the record that is the report's best."""
    best = report.get("best") or {}
    same = ("stage", "number", "fingerprint")
    for record in records:
        if best and all(record.get(key) == best.get(key) for key in same):
            return id(record)
    return None


def _by_stage(report: Mapping[str, Any], records: Sequence[dict]) -> dict[str, list[dict]]:
    """The stages' records, in the report's order of stages; stages without any are left out."""
    names = [stage["name"] for stage in report.get("stages") or []]
    found = {name: [] for name in [*names, *(record.get("stage") or "" for record in records)]}
    for record in records:
        found[record.get("stage") or ""].append(record)
    return {name: ours for name, ours in found.items() if ours}


def _dots(ax: Any, report: Mapping, records: Sequence[dict], place: Any, low: float) -> None:
    """One mark for each candidate with a place: its stage's; a cross where it was stopped early;
    an arrowhead on the axis where its quality is below `low`."""
    size = 12 + 28 * min(1.0, 60 / len(records))
    alpha = 0.45 + 0.5 * min(1.0, 100 / len(records))
    crosses, under = [], []
    for at, (name, ours) in enumerate(_by_stage(report, records).items()):
        colour, marker = _LOOKS[at % len(_LOOKS)]
        shown = [(place(r), r["quality"], bool(r.get("pruned"))) for r in ours]
        shown = [point for point in shown if point[0] is not None]
        dots = [(x, y) for x, y, pruned in shown if not pruned and y >= low]
        crosses += [(x, y) for x, y, pruned in shown if pruned and y >= low]
        under += [(x, low) for x, y, _ in shown if y < low]
        look = {"color": colour, "marker": marker, "edgecolors": "white", "linewidths": 0.4}
        label = f"{name or 'candidates'} ({len(ours)})"
        ax.scatter(*_columns(dots), s=size, alpha=alpha, label=label, zorder=3, **look)
    if crosses:
        look = {"color": GREY, "marker": "x", "linewidths": 0.8}
        label = f"stopped early ({sum(bool(r.get('pruned')) for r in records)})"
        ax.scatter(*_columns(crosses), s=0.6 * size, alpha=alpha, label=label, zorder=2, **look)
    if under:
        look = {"color": GREY, "marker": "v", "clip_on": False}
        ax.scatter(*_columns(under), s=size, label="_under", zorder=4, **look)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _ring(ax: Any, report: Mapping, x: float | None) -> None:
    quality = (report.get("best") or {}).get("quality")
    if x is not None and _is_number(quality):
        look = {"facecolors": "none", "edgecolors": RED, "linewidths": 1.8, "zorder": 5}
        ax.scatter([x], [quality], s=130, label="chosen", **look)


def _front_line(ax: Any, records: Sequence[Mapping], cost: str, scale: float) -> None:
    known = [record for record in records if _is_number(record.get(cost))]
    found = best_of_two(known, ("quality", cost))
    if found:
        points = [(record[cost] / scale, record["quality"]) for record in found]
        look = {"color": BLACK, "linewidth": 1.1, "zorder": 2.5}
        ax.step(*_columns(points), where="post", label="front", **look)


def _budget(ax: Any, report: Mapping, cost: str, scale: float) -> None:
    """Lines where the space's budget ends, where they are near what is shown."""
    window = report["space"].get(cost)
    window = window if isinstance(window, list | tuple) else [None, window]
    scale = scale / 1e3 if cost == "latency" else scale  # a budget is in milliseconds
    left, right = ax.get_xlim()
    for limit in filter(_is_number, window):
        if left - 0.3 * (right - left) <= limit / scale <= right + 0.3 * (right - left):
            ax.axvline(limit / scale, color=GREY, linewidth=1, linestyle="--", label="budget")


def _cost(record: Mapping, cost: str, scale: float) -> float | None:
    return record[cost] / scale if _is_number(record.get(cost)) else None


def _unit(cost: str, records: Sequence[Mapping]) -> tuple[str, float]:
    large = max((record[cost] for record in records if _is_number(record.get(cost))), default=0)
    units = _COSTS[cost][1]
    return next(((name, scale) for name, scale in units if large >= scale), units[-1])


def _quality_text(report: Mapping) -> str:
    metrics = {(stage.get("score") or {}).get("metric") for stage in report.get("stages") or [{}]}
    metric = metrics.pop() if len(metrics) == 1 else None
    return {None: "quality", "loss": "quality (minus the loss)"}.get(metric, f"quality ({metric})")


def _range(values: Sequence[float]) -> tuple[float, float, int]:
    """Where the quality's axis ends, and how many values lie below: what is more than twice as far
    below the best as the worst quarter begins. Never more than a tenth of all."""
    ordered = sorted(values)
    high, quarter, tenth = (ordered[at] for at in (-1, len(ordered) // 4, len(ordered) // 10))
    low = min(tenth, max(ordered[0], high - 2 * (high - quarter)))
    room = 0.06 * (high - low) or 0.01 * (abs(high) or 1.0)
    return low - room, high + room, sum(value < low - room for value in ordered)


def _finished(drawn: Any, axes: Sequence[Any], title: str, hidden: int, pad: float = 8) -> Any:
    """With title and one legend for all panels."""
    axes[0].set_title(title, loc="left", pad=pad)
    marks = {}
    for ax in axes:
        for mark, label in zip(*ax.get_legend_handles_labels(), strict=True):
            marks.setdefault(label.split(" (")[0], (mark, label))
    if hidden:
        from matplotlib.lines import Line2D

        mark = Line2D([], [], color=GREY, marker="v", linestyle="")
        marks["under"] = mark, f"below the axis ({hidden})"
    look = {"loc": "outside lower center", "ncols": 4, "frameon": False, "fontsize": 9}
    legend = drawn.legend(*zip(*marks.values(), strict=True), **look)
    for mark in legend.legend_handles:
        mark.set_alpha(1)
    return drawn


# -- what wins -----------------------------------------------------------------------------------


def winning(report: Mapping[str, Any]) -> Any:
    """How often primitives, stacks and ratios occur in each layer, among the best and among all.

    Colour says by how many points the best quarter differs from all candidates. None where there
    are too few candidates to have a quarter (see `wins`).
    """
    blocks = wins(report["space"], _by_stage(report, judged(report)), report.get("stages") or [])
    if not blocks:
        return None
    layers = report["space"]["num_layers"]
    rows = [len(block.items) for block in blocks]
    drawn = figure(1.9 + 0.62 * max(layers, 6), 1.75 + 0.27 * sum(rows) + 0.42 * len(rows))
    axes = drawn.subplots(len(blocks), 1, squeeze=False, height_ratios=rows)[:, 0]
    largest = max(abs(gap) for block in blocks for row in block.gaps for gap in row)
    limit = max(20, 10 * math.ceil(10 * largest))
    for ax, block in zip(axes, blocks, strict=True):
        image = _shares(ax, block, limit)
    axes[-1].set_xlabel("layer")
    title = f"{report['name']}: what the best quarter has, in % of them"
    drawn.suptitle(title, x=0.02, ha="left", fontsize=12)
    bar = drawn.colorbar(image, ax=axes, location="bottom", aspect=40, shrink=0.8, pad=0.02)
    bar.set_label(
        "points more than among all candidates; bold: beyond three standard errors", fontsize=8
    )
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    return drawn


def _shares(ax: Any, block: Block, limit: float) -> Any:
    """One table of coloured cells: a row for each item, a column for each layer."""
    gaps = [[100 * gap for gap in row] for row in block.gaps]
    layers = len(gaps[0])
    image = ax.imshow(gaps, cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto")
    for row, shares in enumerate(block.best):
        for layer, share in enumerate(shares):
            strong = abs(gaps[row][layer]) > 0.55 * limit
            look = {"ha": "center", "va": "center", "fontsize": 7.5}
            look |= {"color": "white" if strong else BLACK}
            look |= {"weight": "bold" if block.clear(row, layer) else "normal"}
            ax.text(layer, row, f"{100 * share:.0f}", **look)
    ax.set_xticks(range(layers))
    ax.set_yticks(range(len(block.items)), block.items)
    ax.tick_params(length=0, labelsize=8)
    ax.spines[:].set_visible(False)
    ax.set_xticks([at + 0.5 for at in range(layers - 1)], minor=True)
    ax.set_yticks([at + 0.5 for at in range(len(block.items) - 1)], minor=True)
    ax.grid(which="minor", color="white", linewidth=1)
    ax.tick_params(which="minor", length=0)
    ax.set_title(f"{block.name}: {block.good} of {block.count}", loc="left", fontsize=9)
    return image


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
