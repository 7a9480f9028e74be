"""Coarse to fine: search everything roughly, then keep what was found and refine the rest.

EfficientBERT (arXiv 2109.07222, section on progressive search) searches functions and widths
jointly first, then functions alone, then stacks and widths alone, each time around the winner. Each
stage here is a `Study` of its own over a space that the winner so far narrows, in the same storage
under its own name. Where stages judge alike, the next one inherits what is known and nothing is
judged twice. An interrupted search resumes in the stage where it stopped: finished stages only read
their results again.

Why stages and not one long search: functions and widths interact, but most of what a width change
brings does not depend on the function, and the joint space is the product of both.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..expr import Gene
from .merit import front
from .proposals import Evaluated, Proposal
from .space import Candidate, Space, frozen
from .storage import AGAIN, Storage
from .study import SPACE, Evaluate, Study

StageProgress = Callable[[str, dict[str, Any], int, int], None]

_FREEZE = ("functions", "shapes")
_BASIS = "basis"  # note of a study


@dataclass(frozen=True)
class Stage:
    """One stage of a search.

    Attributes:
        name: what it is called in results and storage.
        trials: candidates to judge, those by chance included.
        random: how many of them are drawn by chance before `proposals` takes over.
        freeze: None searches the whole space; "functions" keeps the winner's functions and searches
            stacks and ratios; "shapes" the other way round.
        proposals, objectives, batch, reduction: see `Study`.
    """

    name: str
    trials: int
    random: int = 0
    freeze: str | None = None
    proposals: str | Mapping[str, Any] | Proposal = "evolution"
    objectives: tuple[str, ...] = ("quality",)
    batch: int = 1
    reduction: int = 3

    def __post_init__(self):
        if self.trials < 1 or not 0 <= self.random <= self.trials:
            raise UserError(f"stage {self.name}: trials must be at least 1, random 0 to trials")
        if self.freeze not in (None, *_FREEZE):
            known = ", ".join(_FREEZE)
            raise UserError(f"stage {self.name}: cannot freeze {self.freeze!r}; known: {known}")


STAGES = (Stage("coarse", trials=24, random=10), Stage("fine", trials=12, freeze="functions"))


class StageJudge:
    """How a search's stages judge candidates; this one always by the same function."""

    def __init__(self, evaluate: Evaluate):
        self.evaluate = evaluate

    def open(self, stage: Stage, study: Study, winner: Candidate | None) -> Evaluate:
        """Called before a stage's first candidate; gives what judges them."""
        return self.evaluate

    def close(self, stage: Stage, study: Study) -> None:
        """Called when a stage is finished, also when an earlier run finished it."""

    def comparable(self, stage: Stage, other: Stage) -> bool:
        """Whether qualities of both stages mean the same."""
        return True

    def enough(self, stage: Stage) -> bool:
        """Whether a stage ends now, after the candidate that was just judged."""
        return False

    def ended(self, stage: Stage, study: Study) -> bool:
        """Whether an earlier run ended the stage like this, and it stays so."""
        return False

    def basis(self, stage: Stage, winner: Candidate | None) -> Any:
        """What of the winner before a stage its qualities depend on, beside the space: JSON."""
        return None


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        genes: the winner, one gene per layer.
        best: its record.
        candidates: records of all that were judged (see `Study.candidates`), with "stage".
        front: the records of the last stage, and of those that judge as it does, that none beats in
            all objectives (of quality alone: in quality and parameters).
    """

    genes: tuple[Gene, ...]
    best: dict[str, Any]
    candidates: list[dict[str, Any]]
    front: list[dict[str, Any]]


def coarse_to_fine(
    space: Space,
    evaluate: Evaluate | StageJudge,
    storage: str | Path | Storage | None = None,
    stages: Sequence[Stage] = STAGES,
    seeds: Iterable[Candidate] = (),
    seed: int = 0,
    name: str = "search",
    progress: StageProgress | None = None,
    retry: bool = False,
) -> SearchResult:
    """Runs the stages in order, each on what the earlier ones found.

    Args:
        space: the whole space with its budget.
        evaluate: takes the genes, one per layer; returns the quality, where more is better. Or a
            `StageJudge`, where stages judge differently.
        storage: run directory, database URL, or None for memory only (see `Study`).
        seeds: candidates to judge first, such as `space.plain()`.
        seed: of all proposals.
        name: of the search; its studies are called name.stage.
        progress: called after each candidate with the stage's name, the candidate's record, the
            number finished in the stage and the stage's total.
        retry: candidates that earlier runs gave up are tried again.

    Raises:
        UserError: stages without names of their own, a storage that holds another search, a space
            without members, or no candidate with a quality.
    """
    if not stages or len({stage.name for stage in stages}) < len(stages):
        raise UserError("a search needs at least one stage, and every stage a name of its own")
    judge = evaluate if isinstance(evaluate, StageJudge) else StageJudge(evaluate)
    storage = storage if isinstance(storage, Storage) else Storage(storage)
    records: list[dict[str, Any]] = []
    known: list[Evaluated] = []  # by stages that judge as the last one
    winner: Candidate | None = None
    reasons: list[str] = []  # why candidates were given up
    for place, stage in enumerate(stages):
        if place and not judge.comparable(stage, stages[place - 1]):
            known = []
        here = _narrowed(space, stage, winner)
        first = tuple(seeds) if winner is None else (winner,)
        study = _searched(
            here, stage, judge, storage, first, known, winner, seed, name, progress, retry
        )
        reasons += study.reasons()
        for record, seen in zip(study.candidates(), study.history(), strict=True):
            if record.pop("inherited"):
                continue
            records.append({"stage": stage.name, **record})
            if not record["pruned"]:
                known.append(seen)
        if known:
            winner = max(known, key=lambda seen: (seen.quality, -seen.candidate.params)).candidate
    if winner is None:
        raise UserError(f"no candidate reached a quality: {_lost(reasons)}")
    last = [
        record
        for record in records
        if not record["pruned"] and judge.comparable(_named(stages, record["stage"]), stages[-1])
    ]
    if not last:
        what = f"no candidate of stage {stages[-1].name} reached a quality"
        raise UserError(f"{what}: {_lost(reasons)}")
    best = max(last, key=lambda record: (record["quality"], -record["params"]))
    genes = tuple(Gene.parse(text, space.base) for text in best["genes"])
    objectives = stages[-1].objectives
    objectives = objectives if len(objectives) > 1 else ("quality", "params")
    return SearchResult(genes, best, records, front(last, objectives))


def _lost(reasons: Sequence[str]) -> str:
    if not reasons:
        return "all of them diverged"
    return f"they diverged or were given up ({reasons[0]}); the same call tries these again"


def _searched(
    here, stage, judge, storage, seeds, known, winner, seed, name, progress, retry
) -> Study:
    """The study of a stage, all of whose candidates are judged."""
    judged: list[Evaluate] = []
    basis = judge.basis(stage, winner)
    study = Study(
        here,
        lambda genes: judged[0](genes),
        storage,
        _title(storage, f"{name}.{stage.name}", here, basis),
        seed,
        stage.objectives,
        stage.reduction,
    )
    study.note(_BASIS, basis)
    study.inherit(known)
    over = study.counts()["settled"] >= stage.trials and not study.counts()["finished"]
    if (retry or over) and not judge.ended(stage, study):
        study.retry()
    if study.counts()["settled"] < stage.trials and not judge.ended(stage, study):
        judged.append(judge.open(stage, study, winner))
        study.run(
            stage.trials,
            stage.proposals,
            seeds,
            progress and partial(progress, stage.name),
            stage.batch,
            stage.random,
            lambda: judge.enough(stage) and study.counts()["finished"] > 0,
        )
    judge.close(stage, study)
    return study


def _title(storage: Storage, name: str, here: Space, basis: Any) -> str:
    """The name of the stage's study. Where more candidates of an earlier stage have brought another
    winner, the stage begins anew, beside what was judged around the one before."""
    number, begun, ours = 1, set(storage.names()), json.loads(json.dumps(here.to_dict()))
    while (title := f"{name}{AGAIN}{number}" if number > 1 else name) in begun:
        there = storage.attributes(title).get(SPACE)
        before = storage.notes(title)
        around = there is None or all(there[key] == ours[key] for key in ("functions", "shapes"))
        if around and before.get(_BASIS, basis) == basis:
            break
        number += 1
    return title


def _named(stages: Sequence[Stage], name: str) -> Stage:
    return next(stage for stage in stages if stage.name == name)


def _narrowed(space: Space, stage: Stage, winner: Candidate | None) -> Space:
    """The stage's space: around the winner so far where the stage freezes something."""
    if stage.freeze is None:
        return space
    if winner is None:
        raise UserError(
            f"stage {stage.name} freezes {stage.freeze}, but no earlier stage found a candidate"
        )
    return frozen(space, winner, stage.freeze)
