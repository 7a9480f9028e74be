"""A pytest-benchmark result file as a table: medians and ratios, one row a case."""

import json
from pathlib import Path

from fastffn.errors import UserError


def load(path: str | Path) -> dict:
    """The result file at `path`.

    Raises:
        UserError: it is absent or no such file.
    """
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
        return {"benchmarks": result["benchmarks"], "machine_info": result["machine_info"]}
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; make one with pytest --benchmark-json {path}"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not a result of pytest-benchmark --benchmark-json") from None


def table(result: dict) -> str:
    """Markdown: the case, milliseconds of each contender, and how many times faster fastffn is."""
    cases = [case for case in result["benchmarks"] if "ratio" in case["extra_info"]]
    rivals = list(dict.fromkeys(name for case in cases for name in case["extra_info"]["ratio"]))
    header = ["case", "fastffn ms", *(f"{name} ms" for name in rivals), *(f"x {n}" for n in rivals)]
    lines = [header, ["---"] + ["---:"] * (len(header) - 1)]
    for case in cases:
        info = case["extra_info"]
        times = [info["median_ms"].get(name) for name in ("fastffn", *rivals)]
        ratios = [info["ratio"].get(name) for name in rivals]
        lines.append(
            [
                case["group"] or case["name"],
                *("" if t is None else f"{t:.3g}" for t in times),
                *("" if r is None else f"{r:.2f}" for r in ratios),
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
