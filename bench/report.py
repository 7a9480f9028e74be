"""Results of pytest-benchmark as a table, a picture, and the compact file that is committed.

Several runs of the same benchmark become one result: of each case the median over the runs, of the
milliseconds and of the ratios by themselves. One run on a shared machine proves little.
"""

import json
import platform
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastffn.errors import UserError
from fastffn.files import atomic_path, write_text_atomic


def load(paths: Sequence[str | Path]) -> dict[str, Any]:
    """The runs at `paths` as one result.

    Returns:
        {"date", "commit", "device", "versions", "runs", "cases": [{"case", "threads", "median_ms",
        "first_call_ms", "ratio", "floor", "peak_mib", "left_out"}]}, the last three where they are
        known; the conditions are those of the first run. A file that `save` wrote is returned as it
        is.

    Raises:
        UserError: a file is absent or no result.
    """
    runs = [_read(path) for path in paths]
    if len(runs) == 1 and "cases" in runs[0]:
        return runs[0]
    cases: dict[str, list[dict[str, Any]]] = {}
    for path, run in zip(paths, runs, strict=True):
        if "benchmarks" not in run:
            raise UserError(f"{path}: not a result of pytest-benchmark --benchmark-json")
        for case in run["benchmarks"]:
            if "ratio" in case["extra_info"]:
                cases.setdefault(case["group"], []).append(case["extra_info"])
    first = runs[0]
    return {
        "date": first["datetime"][:10],
        "commit": (first["commit_info"].get("id") or "")[:12]
        + ("+" if first["commit_info"].get("dirty") else ""),
        "device": _device(first["machine_info"]),
        "versions": first["machine_info"].get("versions", {}),
        "runs": len(runs),
        "cases": [
            {
                "case": name,
                "threads": infos[0]["threads"],
                **{
                    key: _medians([info[key] for info in infos if key in info])
                    for key in ("median_ms", "first_call_ms", "ratio", "floor", "peak_mib")
                    if any(key in info for info in infos)
                },
                **({"left_out": infos[0]["left_out"]} if infos[0].get("left_out") else {}),
            }
            for name, infos in cases.items()
        ],
    }


def _read(path: str | Path) -> dict[str, Any]:
    try:
        run = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; pytest --benchmark-json {path} makes one") from None
    except ValueError:
        raise UserError(f"{path}: not a JSON file") from None
    if not isinstance(run, dict):
        raise UserError(f"{path}: not a result of pytest-benchmark --benchmark-json")
    return run


def _device(machine: dict[str, Any]) -> str:
    cpu = machine.get("cpu") or {}
    gpu = machine.get("gpu")
    name = f"{cpu.get('brand_raw', platform.machine())}, {cpu.get('count', '?')} cores"
    return f"{gpu}; {name}" if gpu else name


def _medians(rows: list[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {
        name: round(statistics.median([row[name] for row in rows if name in row]), 4)
        for name in names
    }


def save(result: dict[str, Any], path: str | Path) -> None:
    """Writes the compact result, a line a case, whole or not at all."""
    text = json.dumps(result, indent=1)
    text = re.sub(r"\{\s+([^{}]*?)\s+\}", lambda m: "{" + re.sub(r"\s+", " ", m[1]) + "}", text)
    write_text_atomic(path, text + "\n")


def table(result: dict[str, Any]) -> str:
    """Markdown: the case, milliseconds of each contender, how many times faster fastffn is, what
    each takes of memory; below it who could not take part, and why."""
    rivals = list(dict.fromkeys(name for case in result["cases"] for name in case["ratio"]))
    header = ["case", "fastffn ms", *(f"{name} ms" for name in rivals), *(f"x {n}" for n in rivals)]
    header.append("of the floor")
    weighed = any("peak_mib" in case for case in result["cases"])
    header += ["MiB", *(f"{name} MiB" for name in rivals)] if weighed else []
    lines = [header, ["---"] + ["---:"] * (len(header) - 1)]
    for case in result["cases"]:
        (ours,) = (ms for name, ms in case["median_ms"].items() if name not in case["ratio"])
        times = [ours, *(case["median_ms"].get(name) for name in rivals)]
        ratios = [case["ratio"].get(name) for name in rivals]
        share = case.get("floor", {}).get("share")
        lines.append(
            [
                case["case"],
                *("" if t is None else f"{t:.3g}" for t in times),
                *("" if r is None else f"{r:.2f}" for r in ratios),
                "" if share is None else f"{100 * share:.0f} %",
                *(_memory(case, rivals) if weighed else ()),
            ]
        )
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    runs = f"median of {result['runs']} runs" if result["runs"] > 1 else "one run"
    conditions = f"{result['device']}; {versions}; {result['date']}, {result['commit']}; {runs}"
    absent = [
        f"{case['case']}: without {name}, {reason}"
        for case in result["cases"]
        for name, reason in case.get("left_out", {}).items()
    ]
    absent = ["", *(f"- {line}" for line in absent)] if absent else []
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", conditions, *absent])


def _memory(case: dict[str, Any], rivals: Sequence[str]) -> list[str]:
    """MiB of fastffn and of each rival."""
    peaks = case.get("peak_mib", {})
    (ours,) = (name for name in case["median_ms"] if name not in case["ratio"])
    found = [peaks.get(name) for name in (ours, *rivals)]
    return ["" if mib is None else f"{mib:.0f}" if mib >= 10 else f"{mib:.2g}" for mib in found]


def picture(result: dict[str, Any], path: str | Path) -> None:
    """Bars of the ratios, one group a case; 1 is as fast as the rival.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError('pictures need matplotlib: pip install "fastffn[demo]"') from None
    cases = result["cases"]
    rivals = list(dict.fromkeys(name for case in cases for name in case["ratio"]))
    figure = Figure(figsize=(9, 1.2 + 0.32 * len(cases)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(rivals)
    for index, rival in enumerate(rivals):
        rows = [(i, case["ratio"][rival]) for i, case in enumerate(cases) if rival in case["ratio"]]
        places = [i + (index - (len(rivals) - 1) / 2) * height for i, _ in rows]
        axes.barh(places, [ratio for _, ratio in rows], height, label=rival)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks(range(len(cases)), [case["case"] for case in cases], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("times faster than")
    axes.legend(loc="lower right")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix.lstrip(".") or "png", dpi=150)
