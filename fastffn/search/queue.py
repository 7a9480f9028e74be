"""The queue of a study: candidates are claimed, wait as trials, and come back from the dead.

    claim -> waiting trial -> running trial -> settled
               ^                 |
               +--- raised, or its worker is gone (at most three times)

A worker that is gone is found at once if it ran on this machine (`liveness`), otherwise by its
missing heartbeats. Every step is one transaction; what a kill leaves between two steps is found by
any worker's next look and done again, and the claim's attempt makes sure that it is done once.
"""

import time
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import ledger, liveness
from .claims import Claim
from .ledger import Ledger
from .space import Candidate, Space
from .storage import Storage, import_optuna

if TYPE_CHECKING:  # it imports optuna
    from .sampler import GeneSampler


class Queue:
    """What is to be judged in a study.

    Args:
        study: Optuna's, of that name, in the storage.
        sampler: the study's.

    Attributes:
        ledger: the study's state as of the last look.
        claims: the study's.
    """

    def __init__(self, study, storage: Storage, space: Space, sampler: "GeneSampler"):
        self._optuna = import_optuna()
        self._study = study
        self._storage = storage
        self._space = space
        self._sampler = sampler
        self._known: dict[str, Candidate] = {}
        self._since: dict[Any, float] = {}  # when something was first seen in a doubtful state
        self.claims = storage.claims(study.study_name)
        self.ledger = Ledger(study, self.claims)

    def claim(self, candidates: Sequence[Candidate]) -> bool:
        """Claims the next slots and queues their candidates; False if another was faster."""
        me, first = liveness.signature(), self.ledger.slots
        claims = [
            Claim(slot, candidate.fingerprint, tuple(candidate.texts), 0, me)
            for slot, candidate in enumerate(candidates, first)
        ]
        if not self.claims.add(claims):
            return False
        for claim, candidate in zip(claims, candidates, strict=True):
            self._known[candidate.fingerprint] = candidate
            self._wait(claim)
        return True

    def add(self, candidate: Candidate, more: dict[str, Any], values=None) -> None:
        """Adds a trial in one transaction: waiting, or finished if it has values."""
        states = self._optuna.trial.TrialState
        attributes = {
            ledger.GENES: candidate.texts,
            ledger.FINGERPRINT: candidate.fingerprint,
            **{name: getattr(candidate, name) for name in ledger.COSTS},
            **more,
        }
        trial = self._optuna.create_trial(
            state=states.WAITING if values is None else states.COMPLETE,
            values=values,
            params=self._sampler.params(candidate.genes),
            distributions=self._sampler.distributions,
            user_attrs=attributes,
        )
        self._study.add_trial(trial)

    def candidate(self, fingerprint: str, texts: Sequence[str]) -> Candidate:
        """The member of the space with these genes, read once."""
        if fingerprint not in self._known:
            self._known[fingerprint] = self._space.candidate(list(texts))
        return self._known[fingerprint]

    def look(self) -> None:
        """Reads the state, fails the trials of dead workers and queues again what nobody judges."""
        state = self.ledger
        state.refresh()
        for trial in state.running:
            if self._abandoned(trial):
                self._fail(trial.number)
                state.refresh()
        idle = state.open - state.live.keys()
        for claim in self.claims.get(idle):
            failed = claim.attempt == state.attempts.get(claim.slot)
            # otherwise its owner is about to queue it, or died before it could, or it is so new
            # that only its claim says that a worker has it
            torn = claim.taken < claim.attempt and (
                self._gone(claim.owner) or self._overdue((claim.slot, claim.attempt))
            )
            if failed or torn:
                self._again(claim)
        if idle:
            state.refresh()

    def stands_back(self, slot: int, attempt: int) -> bool:
        """Whether a candidate of an earlier slot waits, one that was queued again and stands behind
        the rest of its batch; then this one is queued again too. Whom successive halving stops
        depends on the order, which is that of the slots, interrupted or not."""
        live = self.ledger.live.items()
        if not any(trial.state.name == "WAITING" for other, trial in live if other < slot):
            return False
        (claim,) = self.claims.get([slot])
        if claim.attempt == attempt:
            self._again(claim)
        return True

    def retry(self) -> int:
        """Queues what was given up again, with as many tries as at first. Returns how many."""
        self.ledger.refresh()
        claims = self.claims.get(self.ledger.given_up())
        found = sum(self._again(claim, {ledger.ANEW: True}) for claim in claims)
        self.ledger.refresh()
        return found

    def _again(self, claim: Claim, more: Mapping[str, Any] | None = None) -> bool:
        """Queues a claim's candidate again, unless another does."""
        me = liveness.signature()
        mine = self.claims.again(claim, me)
        if mine:
            self._wait(claim._replace(attempt=claim.attempt + 1, owner=me), more)
        return mine

    def look_far(self) -> None:
        """Fails the trials whose workers, of any machine, gave no sign of life for too long."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", self._optuna.exceptions.ExperimentalWarning)
            self._optuna.storages.fail_stale_trials(self._study)

    def _wait(self, claim: Claim, more: Mapping[str, Any] | None = None) -> None:
        candidate = self.candidate(claim.fingerprint, claim.genes)
        place = {ledger.SLOT: claim.slot, ledger.ATTEMPT: claim.attempt}
        self.add(candidate, {**place, **(more or {})})

    def _fail(self, number: int) -> None:
        failed = self._optuna.trial.TrialState.FAIL
        try:
            self._study.tell(number, state=failed, skip_if_finished=True)
        except self._optuna.exceptions.UpdateFinishedTrialError:
            pass  # another was faster

    def _abandoned(self, trial) -> bool:
        """Whether nobody judges a trial that runs."""
        if (owner := trial.user_attrs.get(ledger.OWNER)) is not None:
            return self._gone(owner)
        # It was taken and not signed yet. To wait here would change the order of the candidates.
        keys = [key for key in trial.user_attrs if key.startswith(ledger.TAKER)]
        takers = [key.removeprefix(ledger.TAKER) for key in keys]
        gone = self._storage.lonely or (takers and all(map(self._gone, takers)))
        return gone or self._overdue((trial.number, "unsigned"))

    def _gone(self, owner: str | None) -> bool:
        return self._storage.lonely or (owner is not None and liveness.is_dead(owner))

    def _overdue(self, what: Any) -> bool:
        """Whether this was first seen so long ago that a living worker would have gone on.

        By this process's clock: those of other machines may be wrong."""
        now = time.monotonic()
        return now - self._since.setdefault(what, now) > self._storage.grace
