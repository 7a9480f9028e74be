"""Coarse to fine: search everything roughly, then keep what was found and refine the rest.

EfficientBERT (arXiv 2109.07222, section on progressive search) searches functions and widths
jointly first and afterwards only the stacks and widths, with the functions of the winner. Each
stage here is a `Study` of its own over a space that the winner so far narrows, in the same storage
under its own name; the next stage inherits what is known, so nothing is judged twice. An
interrupted search resumes in the stage where it stopped: finished stages only read their results
again.

Why stages and not one long search: functions and widths interact, but most of what a width change
brings does not depend on the function, and the joint space is the product of both.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..expr import Gene
from .proposals import Evaluated
from .space import Candidate, Space, frozen
from .study import Evaluate, Study, front

StageProgress = Callable[[str, dict[str, Any], int, int], None]

_FREEZE = ("functions", "shapes")


@dataclass(frozen=True)
class Stage:
    """One stage of a search.

    Attributes:
        name: what it is called in results and storage.
        trials: candidates to judge, those by chance included.
        random: how many of them are drawn by chance before evolution starts.
        freeze: None searches the whole space; "functions" keeps the winner's functions and searches
            stacks and ratios; "shapes" the other way round.
    """

    name: str
    trials: int
    random: int = 0
    freeze: str | None = None

    def __post_init__(self):
        if self.trials < 1 or not 0 <= self.random <= self.trials:
            raise UserError(f"stage {self.name}: trials must be at least 1, random 0 to trials")
        if self.freeze not in (None, *_FREEZE):
            known = ", ".join(_FREEZE)
            raise UserError(f"stage {self.name}: cannot freeze {self.freeze!r}; known: {known}")


STAGES = (Stage("coarse", trials=24, random=10), Stage("fine", trials=12, freeze="functions"))


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        genes: the winner, one gene per layer.
        best: its record.
        candidates: records of all that were judged (see `Study.candidates`), with "stage".
        front: the records that none beats in both parameters and quality, smallest first.
    """

    genes: tuple[Gene, ...]
    best: dict[str, Any]
    candidates: list[dict[str, Any]]
    front: list[dict[str, Any]]


def coarse_to_fine(
    space: Space,
    evaluate: Evaluate,
    storage: str | Path | None = None,
    stages: Sequence[Stage] = STAGES,
    seeds: Iterable[Candidate] = (),
    seed: int = 0,
    name: str = "search",
    progress: StageProgress | None = None,
) -> SearchResult:
    """Runs the stages in order, each on what the earlier ones found.

    Args:
        space: the whole space with its budget.
        evaluate: takes the genes, one per layer; returns the quality, where more is better.
        storage: run directory, database URL, or None for memory only (see `Study`).
        seeds: candidates to judge first, such as `space.plain()`.
        seed: of all proposals.
        name: of the search; its studies are called name.stage.
        progress: called after each candidate with the stage's name, the candidate's record, the
            number finished in the stage and the stage's total.

    Raises:
        UserError: stages without names of their own, a storage that holds another search, a space
            without members, or no candidate with a quality.
    """
    if not stages or len({stage.name for stage in stages}) < len(stages):
        raise UserError("a search needs at least one stage, and every stage a name of its own")
    known: list[Evaluated] = []
    records: list[dict[str, Any]] = []
    for stage in stages:
        here = _narrowed(space, stage, known)
        study = Study(here, evaluate, storage, f"{name}.{stage.name}", seed)
        study.inherit(known)
        tell = progress and partial(progress, stage.name)
        if stage.random:
            study.run(stage.random, "random", seeds, tell)
        study.run(stage.trials, "evolution", seeds, tell)
        seeds = ()
        for record, seen in zip(study.candidates(), study.history(), strict=True):
            if not record.pop("inherited"):
                known.append(seen)
                records.append({"stage": stage.name, **record})
    if not records:
        raise UserError("no candidate reached a quality: all of them diverged")
    best = max(records, key=lambda record: (record["quality"], -record["params"]))
    genes = tuple(Gene.parse(text, space.base) for text in best["genes"])
    return SearchResult(genes, best, records, front(records))


def _narrowed(space: Space, stage: Stage, known: Sequence[Evaluated]) -> Space:
    """The stage's space: around the best candidate so far where the stage freezes something."""
    if stage.freeze is None:
        return space
    if not known:
        raise UserError(
            f"stage {stage.name} freezes {stage.freeze}, but no earlier stage found a candidate"
        )
    winner = max(known, key=lambda seen: (seen.quality, -seen.candidate.params))
    return frozen(space, winner.candidate, stage.freeze)
