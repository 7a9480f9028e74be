"""The report's pictures: losses, candidates as size against quality, latency."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from fastffn.compress.tables import digits, is_number, ratio
from fastffn.figures import BLACK, BLUE, GREEN, GREY, LIGHT, ORANGE, RED, figure, plain_axes, save

_CURVES = {"warmup": "warm-up of the supernet", "distil": "distillation of the student"}


def draw(report: Mapping, directory: str | Path) -> dict[str, Path]:
    """Draws what the report has data for.

    Returns:
        "latency", "candidates", "curves" -> the PNG in `directory`.
    """
    drawn = {}
    for name, made in (
        ("latency", latency(report)),
        ("candidates", candidates(report)),
        ("curves", curves(report)),
    ):
        if made is not None:
            drawn[name] = save(made, Path(directory) / f"{name}.png")
    return drawn


def _panels(width: float, height: float, columns: int = 1):
    """A figure of so many inches and its axes, side by side."""
    made = figure(width, height)
    return made, [plain_axes(ax) for ax in made.subplots(1, columns, squeeze=False)[0]]


# -- candidates ----------------------------------------------------------------------------------


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points (size, quality) that no other beats: none is as small and better. By size."""
    front: list[tuple[float, float]] = []
    for size, quality in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or quality > front[-1][1]:
            front.append((size, quality))
    return front


def candidates(report: Mapping):
    """Size against quality of every candidate, the front, the winner. None without candidates."""
    search = report.get("search") or {}
    trials = [
        trial
        for trial in search.get("trials") or []
        if is_number(trial.get("params")) and is_number(trial.get("quality"))
    ]
    if not trials:
        return None
    drawn, (ax,) = _panels(6.4, 4.2)
    largest = max(trial["params"] for trial in trials)
    unit, unit_name = (1e6, "millions") if largest >= 1e6 else (1e3, "thousands")
    marks = {"coarse": ("o", BLUE, 34), "fine": ("^", ORANGE, 46)}
    for stage in dict.fromkeys(trial.get("stage") for trial in trials):
        marker, colour, size = marks.get(stage, ("s", GREY, 34))
        ours = [trial for trial in trials if trial.get("stage") == stage]
        ax.scatter(
            [trial["params"] / unit for trial in ours],
            [trial["quality"] for trial in ours],
            s=size,
            marker=marker,
            color=colour,
            edgecolors="white",
            linewidths=0.6,
            label=f"{stage or 'candidates'} ({len(ours)})",
            zorder=3,
        )
    front = pareto_front([(trial["params"] / unit, trial["quality"]) for trial in trials])
    ax.step(*zip(*front, strict=True), where="post", color=GREY, linewidth=1, label="front")
    best = search.get("best_gene")
    winners = [trial for trial in trials if best and trial.get("genes") == best]
    if winners:
        winner = max(winners, key=lambda trial: trial["quality"])
        ax.scatter(
            [winner["params"] / unit],
            [winner["quality"]],
            s=190,
            marker="o",
            facecolors="none",
            edgecolors=RED,
            linewidths=1.8,
            label="chosen",
            zorder=4,
        )
    ax.grid(axis="x", color=LIGHT, linewidth=0.6)
    ax.margins(0.08)
    ax.set_xlabel(f"parameters without word embeddings, {unit_name}")
    ax.set_ylabel("quality on validation text (Spearman)")
    ax.set_title("Candidates of the search", loc="left")
    drawn.legend(loc="outside lower center", ncols=4, frameon=False)
    return drawn


# -- losses --------------------------------------------------------------------------------------


def smoothed(values: Sequence[float]) -> list[float]:
    """Running mean over a twentieth of the values to either side, fewer at both ends.

    Symmetric, so that it does not lag behind a falling loss as exponential weights do.
    """
    reach = len(values) // 20
    means = []
    for place in range(len(values)):
        side = min(reach, place, len(values) - 1 - place)
        window = values[place - side : place + side + 1]
        means.append(sum(window) / len(window))
    return means


def _points(curve: object) -> list[tuple[float, float, Mapping]]:
    """(step, loss, parts) of a curve; points without a finite loss are left out."""
    points = []
    for step, loss, *rest in curve or []:
        if is_number(step) and is_number(loss):
            points.append((step, loss, rest[0] if rest and isinstance(rest[0], Mapping) else {}))
    return points


def curves(report: Mapping):
    """Loss over steps of every phase that trained. None without such a phase."""
    found = {
        name: points
        for name, curve in (report.get("curves") or {}).items()
        if len(points := _points(curve)) > 1
    }
    if not found:
        return None
    drawn, axes = _panels(max(6.4, 4.8 * len(found)), 3.8, len(found))
    colours = _part_colours(found.values())
    for ax, (name, points) in zip(axes, found.items(), strict=True):
        _line(ax, [(step, loss) for step, loss, _ in points], BLACK, "altogether", "-")
        for part, (colour, style) in colours.items():
            pairs = [(step, values.get(part)) for step, _, values in points]
            _line(ax, pairs, colour, part.replace("_", " "), style)
        _log_scale(ax)
        ax.set_xlabel("step")
        ax.set_ylabel("loss")
        ax.set_title(_CURVES.get(name, name), loc="left")
    lines = {line.get_label(): line for ax in axes for line in ax.lines}
    shown = {label: line for label, line in lines.items() if not label.startswith("_")}
    drawn.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=6, frameon=False)
    return drawn


def _part_colours(all_points) -> dict[str, tuple[str, str]]:
    """Part of the loss -> colour and line, the same in every panel."""
    parts = dict.fromkeys(
        part for points in all_points for _, _, values in points for part in values
    )
    looks = list(zip((BLUE, ORANGE, GREEN, RED), ("--", "-.", ":", (0, (5, 1, 1, 1))), strict=True))
    return {part: looks[place % len(looks)] for place, part in enumerate(parts)}


def _line(ax, pairs, colour: str, label: str, style) -> None:
    """One loss: as measured, and smoothed. What a log scale cannot show is left out."""
    pairs = [(step, value) for step, value in pairs if is_number(value) and value > 0]
    if len(pairs) > 1:
        steps, values = zip(*pairs, strict=True)
        ax.plot(steps, values, color=colour, linewidth=0.7, alpha=0.3)
        ax.plot(steps, smoothed(values), color=colour, linewidth=1.7, linestyle=style, label=label)


def _log_scale(ax) -> None:
    """Ticks in plain figures; at 1, 2 and 5 unless the losses cross many powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    subs = (1.0, 2.0, 5.0) if high < 300 * low else (1.0,)
    ax.yaxis.set_major_locator(LogLocator(subs=subs))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


# -- latency -------------------------------------------------------------------------------------


def latency(report: Mapping):
    """Teacher's and student's time at each batch size. None without figures of both."""
    models = [report.get("teacher") or {}, report.get("student") or {}]
    sizes = [
        size
        for size in (1, 32)
        if all(is_number(model.get(f"latency_ms_b{size}")) for model in models)
    ]
    if not sizes:
        return None
    drawn, axes = _panels(3.2 * len(sizes), 3.2, len(sizes))
    for ax, size in zip(axes, sizes, strict=True):
        times = [model[f"latency_ms_b{size}"] for model in models]
        bars = ax.bar(["teacher", "student"], times, color=[GREY, BLUE], width=0.6)
        speedup = report.get(f"speedup_b{size}") or times[0] / times[1]
        texts = [digits(times[0]), f"{digits(times[1])}\n{ratio(speedup)} faster"]
        ax.bar_label(bars, texts, padding=2)
        ax.margins(y=0.2)
        ax.set_ylabel("milliseconds")
        ax.set_title(f"batch {size}", loc="left")
    length = report.get("length")
    drawn.suptitle(f"Time of a forward{f', {length} tokens a sentence' if length else ''}")
    return drawn
