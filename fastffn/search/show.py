"""What a search has found so far: as a report, as tables on a terminal, as pictures, as a line.

    show("runs/search")             tables, and pictures in runs/search/pictures
    collect("postgresql://...")     the report of a search under way, from its database

A finished search has a report.json. Of one under way the same is made from the database, whichever
processes work on it, without disturbing them.

The database is one of Optuna, so its own tools read it too: `optuna.visualization`,
`optuna.importance` and the dashboard, `optuna-dashboard sqlite:///runs/search/search.sqlite3` or
with the URL. Parameters there are the stack and the ratio of each layer, intermediate values are
rungs, genes and costs are user attributes.
"""

import json
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..figures import amount
from ..progress import duration
from . import merit, pictures
from .storage import AGAIN, FILE, Storage
from .study import Study

REPORT, PICTURES = "report.json", "pictures"  # in a run directory
_ROWS = 12  # of a table of candidates


# -- the report ----------------------------------------------------------------------------------


def collect(place: str | Path | Storage, name: str | None = None) -> dict[str, Any]:
    """The report of a search, finished or under way.

    Args:
        place: its run directory, or the URL of its database; a `Storage`: what is there, without a
            look at an older report.json.
        name: of the search in the database, whose stages are the studies called name.stage; None:
            the latest one there.

    Returns:
        What the engine writes to report.json: "name", "seed", "objectives", "genes", "best",
        "front", "stages", "candidates", "space", "supernet" and "seconds". While no candidate is
        finished "genes" is empty and "best" None. "best" and "front" are of the last stage that
        has a finished candidate, as stages measure different things.

    Raises:
        UserError: there is no search, or its report cannot be read.
    """
    known = None
    if isinstance(place, Storage):
        return _collect(place, name)
    if "://" not in str(place) and (Path(place) / REPORT).exists():
        known = _read(Path(place) / REPORT)
        if not (Path(place) / FILE).exists():
            return known
    found = _collect(Storage(place, create=False), name)
    # An old report stays where a finished search goes on with more trials.
    return known if known is not None and _counts(known) == _counts(found) else found


def _counts(report: Mapping[str, Any]) -> list[tuple[int, ...]]:
    counted = ("finished", "pruned", "diverged", "given_up")
    return [tuple(stage.get(key, 0) for key in counted) for stage in report["stages"]]


def _collect(storage: Storage, name: str | None) -> dict[str, Any]:
    names = storage.names()
    if not names:
        raise UserError(f"no search in {storage.place} yet")
    name = name or names[-1].partition(".")[0]
    names = [study for study in names if study.startswith(f"{name}.")] or [name]
    latest = {study.removeprefix(f"{name}.").partition(AGAIN)[0]: study for study in names}
    studies = {stage: Study.load(storage, study) for stage, study in latest.items()}
    stages, candidates, last = [], [], None
    for stage, study in studies.items():
        records = study.candidates()
        new = [{"stage": stage, **record} for record in records if not record["inherited"]]
        candidates += new
        stages.append(_stage(stage, study, storage, new))
        if any(not record["pruned"] for record in records):
            last = study
    first, *_ = studies.values()
    of_stage = {record["fingerprint"]: record["stage"] for record in candidates}

    def placed(record: Mapping[str, Any]) -> dict[str, Any]:
        return {"stage": of_stage.get(record["fingerprint"]), **record}

    best = placed(last.best()) if last else None
    return {
        "name": name,
        "seed": (first.plan or {}).get("seed", first.seed),
        "objectives": list((last or first).objectives),
        "genes": best["genes"] if best else [],
        "best": best,
        "front": [placed(record) for record in last.front()] if last else [],
        "stages": stages,
        "candidates": candidates,
        "space": first.space.to_dict(),
        "supernet": None,
        "seconds": sum(stage["seconds"] for stage in stages),
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(report, dict) or not {"candidates", "stages", "space"} <= set(report):
        raise UserError(f"{path} is not the report of a search: give a search's run directory")
    return report


def _stage(name: str, study: Study, storage: Storage, records: Sequence[Mapping]) -> dict[str, Any]:
    """What the report says of a stage; its seconds are those in which somebody judged."""
    counts, plan = study.counts(), study.plan or {}
    number = storage.backend.get_study_id_from_name(study.name)
    trials = storage.backend.get_all_trials(number, deepcopy=False)
    times = ((trial.datetime_start, trial.datetime_complete) for trial in trials)
    seconds = _covered([(start, end) for start, end in times if start and end])
    space = study.space
    return {
        "name": name,
        "trials": plan.get("trials", counts["settled"]),
        **{key: counts[key] for key in ("finished", "pruned", "diverged", "given_up")},
        "reasons": study.reasons(),
        "seconds": seconds,
        "candidates_per_minute": 60 * len(records) / seconds if seconds else 0.0,
        "freeze": "functions" if space.functions else "shapes" if space.shapes else None,
        "proposals": plan.get("propose"),
    }


def _covered(spans: Sequence[tuple[datetime, datetime]]) -> float:
    """Seconds in at least one of the spans: workers overlap, and interruptions are gaps."""
    seconds, until = 0.0, datetime.min
    for start, end in sorted(spans):
        start = max(start, until)
        if end > start:
            seconds += (end - start).total_seconds()
            until = end
    return seconds


# -- on a terminal -------------------------------------------------------------------------------


def show(place: str | Path, out: str | Path | None = None, console: Any = None) -> dict[str, Path]:
    """Prints a search's tables and draws its pictures.

    Args:
        place: its run directory, or the URL of its database.
        out: folder of the pictures; None: `pictures` in the run directory, none for a URL.
        console: a rich Console; None: standard output.

    Returns:
        The pictures (see `pictures.draw`).

    Raises:
        UserError: as `collect`; no rich or matplotlib.
    """
    try:
        from rich.console import Console
    except ImportError:
        raise UserError("tables need rich, which is not installed: pip install rich") from None
    report = collect(place)
    console = console or Console()
    for part in table(report):
        console.print(part, highlight=False)
    if out is None:
        if "://" in str(place):
            console.print("Pictures: give a folder for them by --out", highlight=False)
            return {}
        out = Path(place) / PICTURES
    drawn = pictures.draw(report, out)
    if drawn:
        names = ", ".join(path.name for path in drawn.values())
        console.print(f"Pictures in {out}: {names}", highlight=False, markup=False, soft_wrap=True)
    return drawn


def table(report: Mapping[str, Any]) -> list[Any]:
    """Tables of rich: the stages, the winner's genes, and the front, its best candidates alone
    where it is long."""
    from rich.text import Text

    parts = [_stages_table(report)]
    best = report.get("best")
    if not best:
        return [*parts, Text("No candidate is finished yet.")]
    parts.append(_genes_table(report))
    front = report.get("front") or []
    if len(front) > 1:
        parts.append(_front_table(report, front))
    parts.append(Text(_sentence(report, best), style="bold"))
    return parts


def _rows(title: str, columns: Sequence[str]) -> Any:
    from rich import box
    from rich.table import Table

    look = {"title_justify": "left", "title_style": "bold", "box": box.SIMPLE_HEAD}
    made = Table(title=title, padding=(0, 1, 0, 0), pad_edge=False, **look)
    for name in columns:
        justify = "left" if name in ("stage", "keeps", "proposals", "gene") else "right"
        one_line = name != "gene" and " " not in name
        made.add_column(name, justify=justify, no_wrap=one_line, overflow="fold")
    return made


def _stages_table(report: Mapping[str, Any]) -> Any:
    """A row for each stage; what is zero everywhere has no column."""
    stages = report["stages"]
    lost = {"pruned": "stopped early", "diverged": "diverged", "given_up": "given up"}
    lost = {key: name for key, name in lost.items() if any(stage.get(key) for stage in stages)}
    columns = ["stage", "judged", *lost.values(), "best", "a minute", "time", "keeps", "proposals"]
    made = _rows(f"Search {report['name']}", columns)
    for stage in stages:
        judged = stage["finished"] + sum(stage[key] for key in lost)
        qualities = [
            record["quality"]
            for record in report["candidates"]
            if record["stage"] == stage["name"] and not record["pruned"]
        ]
        method = stage.get("proposals") or "own"
        made.add_row(
            stage["name"],
            str(judged) if judged >= stage["trials"] else f"{judged} of {stage['trials']}",
            *(str(stage[key]) for key in lost),
            f"{max(qualities):.4g}" if qualities else "–",
            f"{stage['candidates_per_minute']:.1f}",
            duration(stage["seconds"]),
            stage.get("freeze") or "",
            method if isinstance(method, str) else method["method"],
        )
    return made


def _genes_table(report: Mapping[str, Any]) -> Any:
    from rich.text import Text

    from ..expr import Gene, gene_cost

    space = report["space"]
    made = _rows("The winner", ["layer", "gene", "parameters"])
    for layer, text in enumerate(report["genes"]):
        cost = gene_cost(Gene.parse(text, space.get("base", 1)), space["hidden_size"])
        made.add_row(str(layer), Text(text), amount(cost.params))
    return made


def _front_table(report: Mapping[str, Any], front: Sequence[Mapping[str, Any]]) -> Any:
    """The candidates of the front from the best down."""
    objectives = report["objectives"] if len(report["objectives"]) > 1 else ["quality", "params"]
    shown = sorted(front, key=lambda record: -record["quality"])[:_ROWS]
    more = f", its {_ROWS} best" if len(front) > _ROWS else ""
    latency = any(record.get("latency") is not None for record in shown)
    columns = ["quality", "parameters", "MACs", *(["ms"] if latency else []), "stage", "number"]
    made = _rows(f"Front of {' and '.join(objectives)}: {len(front)}{more}", columns)
    for record in shown:
        costs = [amount(record[cost], digits=4) for cost in ("params", "macs")]
        cells = [f"{record['quality']:.4g}", *costs]
        if latency:
            known = record.get("latency") is not None
            cells.append(f"{record['latency'] / 1000:.3g}" if known else "–")
        made.add_row(*cells, str(record.get("stage") or "–"), str(record.get("number")))
    return made


def _sentence(report: Mapping[str, Any], best: Mapping[str, Any]) -> str:
    costs = [f"{best['params']:,} parameters", f"{best['macs']:,} MACs a token"]
    if best.get("latency") is not None:
        costs.append(f"{best['latency'] / 1000:.3g} ms")
    count = len(report["candidates"])
    what = f"{count} candidate{'s' * (count != 1)} in {duration(report['seconds'])}"
    return f"{what}; best: quality {best['quality']:.4g} with {', '.join(costs)}"


# -- while it runs -------------------------------------------------------------------------------


def status(
    records: Sequence[Mapping[str, Any]],
    objectives: Sequence[str],
    done: int,
    total: int,
    started: float,
    before: int = 0,
) -> str:
    """A line on a stage under way: "best 0.912 (1.18M), front 7, 12.3 a minute".

    Args:
        records: of the candidates with a quality so far.
        objectives: of the search; with quality alone the front is not named.
        done: candidates that are settled.
        total: candidates of the stage.
        started: `time.monotonic()` when this run began.
        before: candidates that were settled then: an earlier run's work is no speed of this one.
    """
    said = []
    finished = [record for record in records if not record.get("pruned")]
    if finished:
        best = max(finished, key=lambda record: (record["quality"], -record["params"]))
        said.append(f"best {best['quality']:.4g} ({amount(best['params'])})")
        if len(objectives) > 1:
            said.append(f"front {len(merit.front(finished, objectives))}")
    minutes = (time.monotonic() - started) / 60
    if done > before and minutes > 0:
        rate = (done - before) / minutes
        said.append(f"{rate:.3g} a minute" if rate < 1000 else f"{rate:.0f} a minute")
    return ", ".join(said) or f"0 of {total} judged"
