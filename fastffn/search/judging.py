"""Judging one candidate of the queue: its rungs, when it is stopped early, and how it may fail.

Successive halving without waiting (Li et al., arXiv 1810.05934): after each rung a candidate goes
on only if it is among the best 1/`reduction` of what anybody has had at that rung so far. Whether a
rung is the last shows only when somebody went beyond it; until then every candidate goes on.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..errors import UserError
from ..expr import Gene
from . import ledger, merit
from .queue import Queue
from .space import Candidate
from .storage import import_optuna

Evaluate = Callable[[tuple[Gene, ...]], float | Iterator[float]]


class Judge:
    """Takes trials from the queue of a study and evaluates their candidates.

    Args:
        study: Optuna's.
        evaluate, objectives, reduction: as of `Study`.

    Attributes:
        judged: number of candidates that this object judged, those stopped early included.
    """

    def __init__(
        self, study, queue: Queue, evaluate: Evaluate, objectives: Sequence[str], reduction: float
    ):
        self._optuna = import_optuna()
        self._study = study
        self._queue = queue
        self._evaluate = evaluate
        self._objectives = objectives
        self._reduction = reduction
        self._error: BaseException | None = None
        self._number: int | None = None
        self._ended = False  # with a result, whether or not it still counts
        self.judged = 0

    def take(self) -> None:
        """Judges one trial of the queue.

        Raises:
            BaseException: whatever the evaluation raises; the candidate goes back to the queue.
        """
        self._error, self._number, self._ended = None, None, False
        try:
            self._study.optimize(self._judge, n_trials=1)
            self.judged += self._ended
        except Exception as error:
            if not self._taken_away():
                # Optuna asserts where it could not store a result; why not, says more.
                lost = error.__context__ if isinstance(error, AssertionError) else None
                raise (lost or error) from None
        if self._error is not None:
            raise self._error

    def _taken_away(self) -> bool:
        """Whether this process was taken for dead and the trial ended by another: its candidate is
        judged there, and what Optuna says of a result here does not matter."""
        self._queue.ledger.refresh()
        running = {trial.number for trial in self._queue.ledger.running}
        return self._number is not None and self._number not in running

    def _judge(self, trial) -> float | Sequence[float]:
        self._number = trial.number
        attributes = trial.user_attrs
        slot, attempt = attributes.get(ledger.SLOT), attributes.get(ledger.ATTEMPT)
        # no slot: another worker emptied the queue just before
        if (
            slot is None
            or self._queue.stands_back(slot, attempt)
            or not self._queue.claims.take(slot, attempt)
        ):
            trial.set_user_attr(ledger.OUTDATED, True)
            return math.nan  # Optuna marks the trial as failed
        try:
            genes = attributes[ledger.GENES]
            candidate = self._queue.candidate(attributes[ledger.FINGERPRINT], genes)
            values = self._values(trial, candidate, slot)
        except self._optuna.TrialPruned:
            self._ended = True
            raise
        except self._optuna.exceptions.UpdateFinishedTrialError:
            raise  # by another worker: see `_taken_away`
        except BaseException as error:
            self._error = error  # raised by `take`: Optuna lets some leave a trial running
            trial.set_user_attr(ledger.RAISED, repr(error)[:500])
            return math.nan
        self._ended = True
        return values

    def _values(self, trial, candidate: Candidate, slot: int) -> float | Sequence[float]:
        """The candidate's value for each objective, after all rungs; NaN where it diverged."""
        found: Any = self._evaluate(candidate.genes)
        steps = found if isinstance(found, Iterator) else iter((found,))
        rungs: list[float] = []
        try:
            for quality in map(float, steps):
                if not math.isfinite(quality):
                    trial.set_user_attr(ledger.DIVERGED, True)
                    return math.nan
                rungs.append(quality)
                trial.set_user_attr(ledger.RUNGS, rungs)
                if len(self._objectives) == 1:  # Optuna refuses it for several
                    trial.report(quality, len(rungs) - 1)
                if steps is found and not self._survives(candidate, slot, rungs):
                    raise self._optuna.TrialPruned
        finally:
            if hasattr(steps, "close"):
                steps.close()
        if not rungs:
            raise UserError(f"the evaluation gave no quality for {candidate}")
        return merit.values(candidate, rungs[-1], self._objectives)

    def _survives(self, candidate: Candidate, slot: int, rungs: Sequence[float]) -> bool:
        self._queue.ledger.refresh()
        others = self._queue.ledger.rungs(but=slot)
        reached = len(rungs)
        if not any(len(theirs) > reached for _, theirs in others):
            return True
        seen = [
            merit.values(costs, theirs[reached - 1], self._objectives)
            for costs, theirs in others
            if len(theirs) >= reached
        ]
        mine = merit.values(candidate, rungs[-1], self._objectives)
        return merit.survives(mine, seen, self._reduction, self._objectives)
