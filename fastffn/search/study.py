"""The study: candidates, what they cost and how good they are, on an Optuna study that survives.

Every candidate is one Optuna trial that carries its genes, fingerprint and cost as user attributes
and its quality as the objective value. A candidate is first queued with all of these in one
transaction and then run by `study.optimize`: whatever is killed in between, a trial says what it
was, and heartbeats, which exist only inside `optimize`, work on shared databases.

Why not Optuna parameters for the genes: a categorical parameter must name its choices beforehand.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from ..errors import UserError
from ..expr import Gene
from .proposals import Evaluated, Proposal, proposal
from .space import Candidate, Space
from .storage import Storage, import_optuna, quiet

Evaluate = Callable[[tuple[Gene, ...]], float]
Progress = Callable[[dict[str, Any], int, int], None]

_SPACE = "fastffn.space"  # study attribute: what the space was
_CARRIED = ("genes", "fingerprint", "params", "macs")  # attributes that a retry takes over
_MAX_KILLS = 3  # a candidate that takes the process with it this often is given up
_REPEATS = 300  # proposals in a row that are all known before the space counts as exhausted


class Study:
    """Candidates of one space under one evaluation function.

    Args:
        space: where candidates come from.
        evaluate: takes the genes, one per layer; returns the quality, where more is better. Not a
            finite number: the candidate diverged; it is never tried again and has no quality.
        storage: run directory, database URL, or None for memory only.
        name: several studies may share one storage under different names.
        seed: of the proposals. With the same seed and evaluation, a study on one process gives
            the same candidates whether or not it was interrupted.

    Raises:
        UserError: the storage cannot be opened, or holds a study of that name over another space
            (the difference is said).
    """

    def __init__(
        self,
        space: Space,
        evaluate: Evaluate,
        storage: str | Path | None = None,
        name: str = "search",
        seed: int = 0,
    ):
        self.space = space
        self.evaluate = evaluate
        self.name = name
        self.seed = seed
        self._optuna = import_optuna()
        self._storage = Storage(storage)
        self._known: dict[str, Candidate] = {}
        with quiet(self._optuna):
            self._study = self._optuna.create_study(
                storage=self._storage.backend,
                study_name=name,
                direction="maximize",
                load_if_exists=True,
                sampler=self._optuna.samplers.RandomSampler(),  # unused: genes are not parameters
                pruner=self._optuna.pruners.NopPruner(),
            )
        self._same_space()

    # -- running

    def run(
        self,
        n_trials: int,
        propose: str | Proposal = "random",
        seeds: Iterable[Candidate] = (),
        progress: Progress | None = None,
    ) -> None:
        """Evaluates until `n_trials` candidates are finished, those of earlier runs included.

        Candidates that a killed or interrupted run left unfinished come first, then `seeds` that
        are new, then proposals. Ends early where every member of the space was tried.

        Args:
            propose: "random", "evolution" or an object with `propose(history, rng)`.
            progress: called after each candidate with its record (see `candidates`; quality None
                where it diverged), the number finished and `n_trials`.

        Raises:
            UserError: another process is searching in the same run directory.
            Exception: whatever `evaluate` raises; the candidate is tried again by the next run.
        """
        method = proposal(propose, self.space)
        with self._storage.exclusive(), quiet(self._optuna):
            if not self._storage.shared:
                self._revive()
            known = self._fingerprints()
            for seed in seeds:
                if seed.fingerprint not in known:
                    self._queue(seed)
                    known.add(seed.fingerprint)
            while (done := self._count()) < n_trials:
                if not self._trials("WAITING"):
                    candidate = self._fresh(method)
                    if candidate is None:
                        return
                    self._queue(candidate)
                last: list[Any] = []
                keep = [lambda study, trial, last=last: last.append(trial)]
                self._study.optimize(self._judge, n_trials=1, callbacks=keep)
                if progress is not None:
                    progress(_record(last[0]), done + 1, n_trials)

    def inherit(self, finished: Iterable[Evaluated]) -> None:
        """Takes over what another study found, as far as it is new and a member of this space.

        They count as known and guide the proposals, but not as this study's trials.
        """
        known = self._fingerprints()
        for candidate, quality in finished:
            try:
                member = self.space.candidate(candidate.genes)
            except UserError:
                continue
            if member.fingerprint not in known:
                known.add(member.fingerprint)
                attributes = {**_attributes(member), "inherited": True}
                trial = self._optuna.create_trial(value=quality, user_attrs=attributes)
                self._study.add_trial(trial)

    # -- results

    def candidates(self) -> list[dict[str, Any]]:
        """Every finished candidate with a quality, in order: plain dictionaries.

        Keys: number, genes (texts, one per layer), params, macs, quality, seconds, fingerprint,
        inherited.
        """
        return [_record(trial) for trial in self._trials("COMPLETE")]

    def best(self) -> dict[str, Any]:
        """The candidate of the best quality; of equals the one with fewer parameters.

        Raises:
            UserError: none is finished.
        """
        found = self.candidates()
        if not found:
            raise UserError(f"study {self.name}: no candidate is finished yet; run it first")
        return max(found, key=lambda record: (record["quality"], -record["params"]))

    def front(self) -> list[dict[str, Any]]:
        """The candidates that none beats in both parameters and quality, smallest first."""
        return front(self.candidates())

    def history(self) -> list[Evaluated]:
        """Every finished candidate with a quality, in order, as proposals see them."""
        return [
            Evaluated(self._candidate(trial), trial.value) for trial in self._trials("COMPLETE")
        ]

    # -- inside

    def _trials(self, *states: str) -> list[Any]:
        wanted = [self._optuna.trial.TrialState[state] for state in states]
        trials = self._study.get_trials(deepcopy=False, states=wanted or None)
        return [trial for trial in trials if "genes" in trial.user_attrs]

    def _candidate(self, trial) -> Candidate:
        attributes = trial.user_attrs
        fingerprint = attributes["fingerprint"]
        if fingerprint not in self._known:
            genes = tuple(Gene.parse(text, self.space.base) for text in attributes["genes"])
            cost = attributes["params"], attributes["macs"]
            self._known[fingerprint] = Candidate(genes, *cost, fingerprint)
        return self._known[fingerprint]

    def _fingerprints(self) -> set[str]:
        """Of all candidates that need no further proposal: finished, under way or given up."""
        live = self._trials("COMPLETE", "RUNNING", "WAITING")
        dead = [trial for trial in self._trials("FAIL") if "diverged" in trial.user_attrs]
        return {trial.user_attrs["fingerprint"] for trial in live + dead} | self._given_up()

    def _given_up(self) -> set[str]:
        killed = [
            trial.user_attrs["fingerprint"]
            for trial in self._trials("FAIL")
            if not {"diverged", "raised"} & set(trial.user_attrs)
        ]
        return {fingerprint for fingerprint, n in Counter(killed).items() if n >= _MAX_KILLS}

    def _count(self) -> int:
        """Number of candidates that this study has judged, diverged and given up ones included."""
        judged = self._trials("COMPLETE", "FAIL")
        judged = [
            trial.user_attrs["fingerprint"]
            for trial in judged
            if "diverged" in trial.user_attrs
            or (trial.value is not None and "inherited" not in trial.user_attrs)
        ]
        return len(set(judged) | self._given_up())

    def _fresh(self, method: Proposal) -> Candidate | None:
        """A candidate that no trial has, or None if the space seems to have no other."""
        known, history = self._fingerprints(), self.history()
        # one stream per candidate: a resumed search continues where the interrupted one would have
        rng = Random(f"{self.seed} {self.name} {len(known)}")
        for attempt in range(_REPEATS):
            late = attempt > _REPEATS // 2  # a method may circle in a corner of the space
            candidate = self.space.random(rng) if late else method.propose(history, rng)
            if candidate.fingerprint not in known:
                return candidate
        return None

    def _queue(self, candidate: Candidate) -> None:
        waiting = self._optuna.trial.TrialState.WAITING
        attributes = _attributes(candidate)
        self._study.add_trial(self._optuna.create_trial(state=waiting, user_attrs=attributes))

    def _judge(self, trial) -> float:
        try:
            quality = float(self.evaluate(self._candidate(trial).genes))
        except BaseException as error:
            trial.set_user_attr("raised", repr(error)[:500])
            raise
        if not math.isfinite(quality):
            trial.set_user_attr("diverged", True)
            return math.nan  # Optuna marks the trial as failed
        return quality

    def _revive(self) -> None:
        """Marks trials that a dead process left running as failed and queues them again."""
        failed, waiting = (self._optuna.trial.TrialState[name] for name in ("FAIL", "WAITING"))
        for trial in self._study.get_trials(
            deepcopy=False, states=[self._optuna.trial.TrialState.RUNNING]
        ):
            self._study.tell(trial.number, state=failed)
        known = self._fingerprints()
        for trial in self._trials("FAIL"):
            if trial.user_attrs["fingerprint"] not in known:
                known.add(trial.user_attrs["fingerprint"])
                carried = {key: trial.user_attrs[key] for key in _CARRIED}
                again = self._optuna.create_trial(state=waiting, user_attrs=carried)
                self._study.add_trial(again)

    def _same_space(self) -> None:
        ours, theirs = self.space.to_dict(), self._study.user_attrs.get(_SPACE)
        if theirs is None:
            if self._study.get_trials(deepcopy=False):
                raise UserError(f"study {self.name} was not made by fastffn: take another name")
            self._study.set_user_attr(_SPACE, ours)
            return
        differing = [key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)]
        if differing:
            each = (
                f"{key} {theirs.get(key)} there, {ours.get(key)} here" for key in sorted(differing)
            )
            raise UserError(
                f"study {self.name} was made with another space ({'; '.join(each)}): "
                "take another run directory or name, or the space it was made with"
            )


def front(records: Sequence[dict[str, Any]], cost: str = "params") -> list[dict[str, Any]]:
    """The records that none beats in both `cost` and quality, cheapest first."""
    best, found = -math.inf, []
    for record in sorted(records, key=lambda record: (record[cost], -record["quality"])):
        if record["quality"] > best:
            best = record["quality"]
            found.append(record)
    return found


def _attributes(candidate: Candidate) -> dict[str, Any]:
    values = (candidate.texts, candidate.fingerprint, candidate.params, candidate.macs)
    return dict(zip(_CARRIED, values, strict=True))


def _record(trial) -> dict[str, Any]:
    attributes = trial.user_attrs
    return {
        "number": trial.number,
        "genes": list(attributes["genes"]),
        "params": attributes["params"],
        "macs": attributes["macs"],
        "quality": trial.value,
        "seconds": trial.duration.total_seconds() if trial.duration else 0.0,
        "fingerprint": attributes["fingerprint"],
        "inherited": "inherited" in attributes,
    }
