"""Proposal methods side by side: equal budgets, several seeds, one truth.

Every method gets its own study with the same number of candidates. Studies of one seed begin with
the same random candidates where the methods themselves begin by chance, and a candidate that any of
them judged is not judged again: so the comparison costs less than the searches one by one, and
methods differ by what they propose and not by luck in judging.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from functools import partial
from itertools import islice
from statistics import median
from typing import Any

from ..errors import UserError
from ..expr import Gene
from .merit import check_objectives, front, hypervolume, values
from .proposals import proposal
from .space import Space
from .study import Evaluate, Study

CompareProgress = Callable[[str, int, dict[str, Any], int, int], None]


def compare(
    space: Space,
    evaluate: Evaluate,
    methods: Sequence[str | Mapping[str, Any]],
    trials: int,
    seeds: Sequence[int],
    progress: CompareProgress | None = None,
    objectives: Sequence[str] = ("quality",),
    random: int = 0,
    judged: MutableMapping[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Searches with every method and every seed.

    Args:
        evaluate: as of a `Study`: a quality, or an iterator of qualities of rising fidelity.
        methods: names or mappings, as `proposals.proposal` takes them.
        trials: candidates that each search judges.
        progress: called after each candidate with the method's label, the seed, the candidate's
            record, how many this search has judged, and `trials`.
        objectives: with several, a search's score is the volume that its front dominates, down to
            the worst values that any of the searches saw.
        random: so many candidates come by chance first, in every search the same of a seed.
        judged: fingerprint -> qualities that are known; filled here. Whoever keeps it between two
            calls goes on where the first one was interrupted.

    Returns:
        Plain values: objectives, trials, seeds, "score" ("quality" or "hypervolume"), "judged" (how
        many candidates were evaluated), and "methods": label -> {"best": score per seed, "median",
        "low", "high", "curves": per seed the score after each candidate (None before the first
        quality), "genes": per seed those of the best quality}. Best median first.

    Raises:
        UserError: no method, one twice, no seed, or as the study and the methods do.
    """
    labels = [_label(method) for method in methods]
    if not labels or len(set(labels)) < len(labels):
        raise UserError("compare: give at least one method, and none of them twice")
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError("compare: give at least one seed, and none of them twice")
    objectives = check_objectives(objectives, space)
    for method in methods:
        proposal(method, space)  # what is wrong with the last is said before the first searches
    truth = _Judged(space, evaluate, {} if judged is None else judged)
    runs: dict[str, list[list[dict[str, Any]]]] = {label: [] for label in labels}
    for seed in seeds:
        for label, method in zip(labels, methods, strict=True):
            study = Study(space, truth, name="compare", seed=seed, objectives=objectives)
            tell = progress and partial(progress, label, seed)
            study.run(trials, method, progress=tell, random=random)
            whole = [record for record in study.candidates() if not record["pruned"]]
            if not whole:
                raise UserError(f"compare: {label}, seed {seed}: no candidate reached a quality")
            runs[label].append(whole)
    seen = [record for several in runs.values() for records in several for record in records]
    reference = (
        min(record["quality"] for record in seen),
        *(max(record[cost] for record in seen) for cost in objectives[1:]),
    )
    results = {}
    for label, several in runs.items():
        curves = [_curve(records, trials, objectives, reference) for records in several]
        best = [curve[-1] for curve in curves]
        results[label] = {
            "best": best,
            "median": median(best),
            "low": min(best),
            "high": max(best),
            "curves": curves,
            "genes": [max(records, key=lambda r: r["quality"])["genes"] for records in several],
        }
    return {
        "objectives": list(objectives),
        "score": "quality" if len(objectives) == 1 else "hypervolume",
        "trials": trials,
        "seeds": list(seeds),
        "judged": truth.judged,
        "methods": dict(sorted(results.items(), key=lambda item: -item[1]["median"])),
    }


def table(result: Mapping[str, Any]) -> str:
    """What `compare` found as lines of text, the best method first."""
    methods, seeds, trials = result["methods"], result["seeds"], result["trials"]
    title = f"best {result['score']} after {trials} candidates, {len(seeds)} seeds"
    half = max(trials // 2 - 1, 0)
    rows = [("method", "median", "lowest", "highest", f"median after {half + 1}")]
    for label, one in methods.items():
        early = [curve[half] for curve in one["curves"] if curve[half] is not None]
        numbers = (one["median"], one["low"], one["high"], median(early) if early else math.nan)
        rows.append((label, *(f"{number:.4g}" for number in numbers)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([title, *lines, f"{result['judged']} candidates were evaluated in all"])


class _Judged:
    """An evaluation that remembers what it said.

    Args:
        known: fingerprint -> {"rungs": qualities of rising fidelity, "whole": whether that is all}.

    Attributes:
        judged: how many candidates it was asked to evaluate, those it knew left out.
    """

    def __init__(
        self, space: Space, evaluate: Evaluate, known: MutableMapping[str, dict[str, Any]]
    ):
        self.space = space
        self.evaluate = evaluate
        self.known = known
        self.judged = 0

    def __call__(self, genes: tuple[Gene, ...]) -> Iterator[float]:
        """What is known; then, if that is not all and the study wants more, the rest."""
        name = self.space.candidate(genes).fingerprint
        known = self.known.get(name, {"rungs": [], "whole": False})
        rungs = list(known["rungs"])
        yield from rungs
        if known["whole"]:
            return
        self.judged += not rungs
        with contextlib.closing(_rungs(self.evaluate(genes))) as said:
            for quality in islice(said, len(rungs), None):
                rungs.append(quality)
                self.known[name] = {"rungs": list(rungs), "whole": False}
                yield quality
        self.known[name] = {"rungs": rungs, "whole": True}


def _rungs(said: float | Iterator[float]) -> Iterator[float]:
    if isinstance(said, Iterator):
        yield from said
    else:
        yield float(said)


def _curve(
    records: Sequence[Mapping[str, Any]],
    trials: int,
    objectives: Sequence[str],
    reference: tuple[float, ...],
) -> list[float | None]:
    """The score after each of the search's candidates."""
    by_slot = {record["number"]: record for record in records}
    curve: list[float | None] = []
    best: list[Mapping[str, Any]] = []
    for slot in range(trials):
        if slot in by_slot:
            best = front([*best, by_slot[slot]], objectives)
        points = [values(record, record["quality"], objectives) for record in best]
        if len(objectives) == 1:
            curve.append(points[0][0] if points else None)
        else:
            curve.append(hypervolume(points, reference, objectives))
    return curve


def _label(method: str | Mapping[str, Any]) -> str:
    """partition(exploration=0.3)"""
    if isinstance(method, str):
        return method
    options = ", ".join(f"{key}={value}" for key, value in method.items() if key != "method")
    return f"{method.get('method')}({options})" if options else str(method.get("method"))
