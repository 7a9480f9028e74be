"""The study: candidates, what they cost and how good they are, on an Optuna study that survives.

Every candidate is claimed (`claims`), then queued as an Optuna trial that carries its genes,
fingerprint and costs, then judged inside `study.optimize`, where the trial gives signs of life.
Any number of processes may run the same study: the claims keep them from judging a candidate
twice, the queue gives work to whoever is free, and what a dead worker had goes back to it.
Optuna's parameters, values and intermediate values are filled in, for its dashboard and plots.

Why not ask and tell: Optuna's heartbeats exist only inside `optimize`. Why heartbeats and not
leases of our own: they are what Optuna's tools show.
"""

import json
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from ..errors import UserError
from . import ledger, merit
from .judging import Evaluate, Judge
from .merit import Evaluated, front
from .proposals import Proposal, RandomProposal, proposal
from .queue import Queue
from .space import Candidate, Space
from .storage import NOTE, SPACE, Storage, import_optuna, quiet

Progress = Callable[[dict[str, Any], int, int], None]

# attributes of the study
_OBJECTIVES, PLAN = "fastffn.objectives", "fastffn.plan"
_REPEATS = 300  # proposals in a row that are all known before the space counts as exhausted
_POLL = (0.05, 1.0)  # seconds between two looks at what others do: first, and at most


class Study:
    """Candidates of one space under one evaluation function.

    Args:
        space: where candidates come from.
        evaluate: takes the genes, one per layer; returns the quality, where more is better, or an
            iterator of qualities of rising fidelity, of which the last counts; after each but the
            last, candidates that are not among the best 1/`reduction` are stopped. Not a finite
            number: the candidate diverged; it is never tried again and has no quality. None: the
            study is only read.
        storage: run directory, database URL, None for memory only, or a `Storage`.
        name: several studies may share one storage under different names.
        seed: of the proposals. With the same seed and evaluation, a study on one process gives
            the same candidates whether or not it was interrupted.
        objectives: names of `merit.OBJECTIVES`, "quality" first.
        reduction: of successive halving (arXiv 1810.05934).
        heartbeat: seconds between two signs of life (see `Storage`).

    Raises:
        UserError: the storage cannot be opened, the space has no member, or the storage holds a
            study of that name over another space (the difference is said) or other objectives.
    """

    def __init__(
        self,
        space: Space,
        evaluate: Evaluate | None,
        storage: str | Path | Storage | None = None,
        name: str = "search",
        seed: int = 0,
        objectives: Sequence[str] = ("quality",),
        reduction: float = 3,
        heartbeat: int | None = None,
    ):
        space.smallest()  # refuses a space without members
        self.space = space
        self.evaluate = evaluate
        self.name = name
        self.seed = seed
        self.objectives = merit.check_objectives(objectives, space)
        if reduction <= 1:
            raise UserError(f"reduction {reduction}: give more than 1, such as 3")
        self.reduction = reduction
        self._optuna = import_optuna()
        self._storage = storage if isinstance(storage, Storage) else Storage(storage, heartbeat)
        from .sampler import GeneSampler

        sampler = GeneSampler(space)
        with quiet(self._optuna):
            self._study = self._optuna.create_study(
                storage=self._storage.backend,
                study_name=name,
                directions=[merit.OBJECTIVES[objective] for objective in self.objectives],
                load_if_exists=True,
                sampler=sampler,
                pruner=self._optuna.pruners.NopPruner(),  # successive halving is ours
            )
        self._same_study()
        self._queue = Queue(self._study, self._storage, space, sampler)
        self._ledger = self._queue.ledger
        self._history: tuple[int, list[Evaluated]] = (0, [])
        self._read: dict[str, tuple[merit.Values, Evaluated]] = {}  # by fingerprint

    @staticmethod
    def load(
        storage: str | Path | Storage,
        name: str = "search",
        evaluate: Evaluate | None = None,
        heartbeat: int | None = None,
    ) -> "Study":
        """A study that exists, with the space and the settings that it was made and run with.

        Raises:
            UserError: no such storage or study; the names of those that are there are said.
        """
        if not isinstance(storage, Storage):
            storage = Storage(storage, heartbeat, create=False)
        attributes = storage.attributes(name)
        if SPACE not in attributes:
            raise UserError(f"study {name} was not made by fastffn")
        plan = attributes.get(PLAN, {})
        settings = {key: plan[key] for key in ("seed", "reduction") if key in plan}
        settings["objectives"] = attributes[_OBJECTIVES]
        return Study(Space.from_dict(attributes[SPACE]), evaluate, storage, name, **settings)

    # -- running

    def run(
        self,
        n_trials: int,
        propose: str | Mapping[str, Any] | Proposal = "random",
        seeds: Iterable[Candidate] = (),
        progress: Progress | None = None,
        batch: int = 1,
        random: int = 0,
        stop: Callable[[], bool] | None = None,
    ) -> int:
        """Evaluates until `n_trials` candidates are settled, by whichever process, those of earlier
        runs included: judged, stopped early, diverged or given up.

        Candidates that a killed or interrupted run left unfinished come first, then `seeds` that
        are new, then proposals. Ends early where every member of the space was tried.

        Args:
            propose: name of a method, a mapping with "method" and its options, or an object with
                `propose(history, rng)`.
            progress: called after each candidate, of other processes too, with its record (see
                `candidates`; quality None where it has none), the number settled and `n_trials`.
            batch: so many proposals are claimed and queued at once, sorted by their genes, so that
                neighbours share their first layers.
            random: the first candidates, seeds included, that are drawn by chance.
            stop: asked between candidates; True ends the run.

        Returns:
            How many candidates this call judged.

        Raises:
            UserError: an unknown method, a seed that is no member, a study that is only read, or a
                database that is lost meanwhile.
            Exception: whatever `evaluate` raises; the candidate goes back to the queue.
        """
        if batch < 1 or random < 0:
            raise UserError("a study needs a batch of at least 1 and random of at least 0")
        method = proposal(propose, self.space)
        plan = {
            "trials": n_trials,
            "random": random,
            # an object stays here: other processes cannot have it
            "propose": propose if isinstance(propose, str | Mapping) else None,
            "batch": batch,
            "seed": self.seed,
            "objectives": list(self.objectives),
            "reduction": self.reduction,
        }
        if self.plan != plan:
            self._study.set_user_attr(PLAN, plan)
        return self._run(plan, method, seeds, progress, stop)

    def join(self, progress: Progress | None = None, stop: Callable[[], bool] | None = None) -> int:
        """Evaluates as the plan says that another process left in the study by `run`.

        Raises:
            UserError: nobody ran the study yet, or its proposals come from an object of the process
                that runs it.
        """
        plan = self.plan
        if plan is None or plan["propose"] is None:
            why = "nobody has run it yet" if plan is None else "its proposals have no name"
            raise UserError(f"study {self.name}: cannot join, {why}")
        return self._run(plan, proposal(plan["propose"], self.space), (), progress, stop)

    def retry(self) -> int:
        """Puts candidates that were given up back into the queue: what ended their processes, such
        as a full disk, may be mended. Nobody else may run the study meanwhile.

        Returns:
            How many.
        """
        self._history = (0, [])
        with self._storage.connected():
            return self._queue.retry()

    def inherit(self, finished: Iterable[Evaluated]) -> None:
        """Takes over what another study found, as far as it is new and a member of this space.

        They count as known and guide the proposals, but not as this study's trials.
        """
        self._ledger.refresh()
        known = set(self._ledger.fingerprints)
        for seen in finished:
            try:
                member = self.space.candidate(seen.candidate.genes)
            except UserError:
                continue
            if member.fingerprint not in known:
                known.add(member.fingerprint)
                more = {ledger.INHERITED: True, ledger.RUNGS: [seen.quality]}
                self._queue.add(member, more, merit.values(member, seen.quality, self.objectives))

    # -- results

    def candidates(self) -> list[dict[str, Any]]:
        """Every settled candidate with a quality, those inherited first: plain dictionaries.

        Keys: number (the slot; None if inherited), genes (texts, one per layer), params, macs,
        latency (microseconds or None), quality (of the highest fidelity that was reached), rungs
        (all qualities, by rising fidelity), pruned (stopped early), seconds, fingerprint,
        inherited, worker (host:pid or None), given_up (None).
        """
        self._ledger.refresh()
        return [dict(record) for record in self._judged()]

    def _judged(self) -> list[dict[str, Any]]:
        settled = sorted(self._ledger.settled.items())
        found = [*self._ledger.inherited, *(record for _, record in settled)]
        return [record for record in found if record["quality"] is not None]

    def best(self) -> dict[str, Any]:
        """The candidate of the best quality among those judged to the end; of equals the one with
        fewer parameters.

        Raises:
            UserError: none is finished.
        """
        found = [record for record in self.candidates() if not record["pruned"]]
        if not found:
            raise UserError(f"study {self.name}: no candidate is finished yet; run it first")
        return max(found, key=lambda record: (record["quality"], -record["params"]))

    def front(self) -> list[dict[str, Any]]:
        """Of the candidates judged to the end those that none beats in all objectives (in quality
        and parameters if there is only quality), cheapest first."""
        objectives = self.objectives if len(self.objectives) > 1 else ("quality", "params")
        return front([r for r in self.candidates() if not r["pruned"]], objectives)

    def reasons(self) -> list[str]:
        """Why candidates were given up."""
        self._ledger.refresh()
        given_up = (self._ledger.settled[slot] for slot in self._ledger.given_up())
        return sorted({record["given_up"] for record in given_up})

    def history(self) -> list[Evaluated]:
        """Every settled candidate with a quality, as `candidates`, as proposals see them."""
        self._ledger.refresh()
        return list(self._seen())

    def _seen(self) -> list[Evaluated]:
        """The history as of the last look, made anew only where something was settled."""
        count = len(self._ledger.settled) + len(self._ledger.inherited)
        if count != self._history[0]:
            records = self._judged()
            for record in records:
                if record["fingerprint"] not in self._read:
                    candidate = self._queue.candidate(record["fingerprint"], record["genes"])
                    values = merit.values(record, record["quality"], self.objectives)
                    self._read[record["fingerprint"]] = values, Evaluated(candidate, values[0])
            read = [self._read[record["fingerprint"]] for record in records]
            merits = merit.merits([values for values, _ in read], self.objectives)
            self._history = (
                count,
                [
                    seen if seen.merit == worth else Evaluated(seen.candidate, seen.quality, worth)
                    for worth, (_, seen) in zip(merits, read, strict=True)
                ],
            )
        return self._history[1]

    def counts(self) -> dict[str, int]:
        """How many candidates are settled, finished (judged to the end), pruned, diverged,
        given_up, running and waiting."""
        self._ledger.refresh()
        settled = self._ledger.settled.values()
        lost = sum(record["quality"] is None for record in settled)
        given_up = len(self._ledger.given_up())
        pruned = sum(record["pruned"] for record in settled)
        return {
            "settled": len(settled),
            "finished": len(settled) - pruned - lost,
            "pruned": pruned,
            "diverged": lost - given_up,
            "given_up": given_up,
            "running": len(self._ledger.running),
            "waiting": self._ledger.waiting,
        }

    # -- notes

    @property
    def plan(self) -> dict[str, Any] | None:
        """What `run` was last called with: trials, random, batch, seed, objectives, reduction,
        propose; None before the first run."""
        return self._storage.attributes(self.name).get(PLAN)

    @property
    def notes(self) -> dict[str, Any]:
        """What `note` kept, as it is in the storage now."""
        return self._storage.notes(self.name)

    def note(self, key: str, value: Any) -> None:
        """Keeps a JSON value in the study, for other processes."""
        self._study.set_user_attr(NOTE + key, value)

    # -- the loop

    def _run(self, plan, method: Proposal, seeds, progress, stop) -> int:
        if self.evaluate is None:
            raise UserError(f"study {self.name} was opened for reading: it has no evaluation")
        judge = Judge(self._study, self._queue, self.evaluate, self.objectives, self.reduction)
        state, wait = self._ledger, _POLL[0]
        with quiet(self._optuna), self._storage.connected():
            state.refresh()
            told = len(state.settled)
            self._seed([self.space.candidate(seed.genes) for seed in seeds], plan["trials"])
            while True:
                self._queue.look()
                for record in list(state.settled.values())[told:]:
                    told += 1
                    if progress is not None:
                        progress(dict(record), told, plan["trials"])
                if told >= plan["trials"] or (stop is not None and stop()):
                    break
                fresh = [] if state.waiting else self._propose(plan, method)
                if fresh and not self._queue.claim(fresh):
                    continue  # another worker has these slots
                if fresh or state.waiting:
                    judge.take()
                    wait = _POLL[0]
                elif state.open:
                    self._queue.look_far()
                    time.sleep(wait)
                    wait = min(2 * wait, _POLL[1])
                else:
                    break
        return judge.judged

    def _seed(self, members: Sequence[Candidate], trials: int) -> None:
        """Queues those that are new, as far as there are slots."""
        members = list({member.fingerprint: member for member in members}.values())
        while True:
            new = [m for m in members if m.fingerprint not in self._ledger.fingerprints]
            new = new[: max(trials - self._ledger.slots, 0)]
            if not new or self._queue.claim(new):
                return
            self._ledger.refresh()  # another claimed the same slots first

    def _propose(self, plan, method: Proposal) -> list[Candidate]:
        """Candidates for the next slots; none if there are no slots, or the space seems to have no
        other."""
        chance, first, found = RandomProposal(self.space), self._ledger.slots, []
        if first >= plan["trials"]:
            return found
        known, history = set(self._ledger.fingerprints), self._seen()
        for slot in range(first, min(first + plan["batch"], plan["trials"])):
            # one stream per slot: a resumed search goes on where the interrupted one would have
            rng = Random(f"{self.seed} {self.name} {slot}")
            for attempt in range(_REPEATS):
                late = attempt > _REPEATS // 2  # a method may circle in a corner of the space
                by_chance = late or slot < plan["random"]
                candidate = (chance if by_chance else method).propose(history, rng)
                if candidate.fingerprint not in known:
                    known.add(candidate.fingerprint)
                    found.append(candidate)
                    break
            else:
                break
        return sorted(found, key=lambda candidate: candidate.texts)

    # -- what the study is

    def _same_study(self) -> None:
        found = self._storage.attributes(self.name)
        ours, theirs = json.loads(json.dumps(self.space.to_dict())), found.get(SPACE)
        objectives = list(self.objectives)
        if theirs is None:
            if self._study.get_trials(deepcopy=False):
                raise UserError(f"study {self.name} was not made by fastffn: take another name")
            self._study.set_user_attr(_OBJECTIVES, objectives)
            self._study.set_user_attr(SPACE, ours)
            return
        differing = [
            f"{key} {_short(theirs.get(key))} there, {_short(ours.get(key))} here"
            for key in sorted(ours.keys() | theirs.keys())
            if ours.get(key) != theirs.get(key)
        ]
        if differing:
            raise UserError(
                f"study {self.name} was made with another space ({'; '.join(differing)}): "
                "take another run directory or name, or the space it was made with"
            )
        if found[_OBJECTIVES] != objectives:
            raise UserError(
                f"study {self.name} was made with the objectives {', '.join(found[_OBJECTIVES])}, "
                f"not {', '.join(objectives)}: take another run directory or name, or those"
            )


def _short(value: Any) -> str:
    return textwrap.shorten(str(value), 80, placeholder=" ...")
