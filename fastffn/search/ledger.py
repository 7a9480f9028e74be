"""What the trials of a study say about its slots: settled, under way, or to be queued again.

Reading costs what changed, not what there is: finished trials are looked at once, claims are read
from the first unknown slot on. A slot is settled when its candidate has a quality (judged to the
end or stopped early), diverged, or was given up because it ended its worker too often: what ended
it may be no fault of its own (no memory, a full disk), so it may be tried anew.
"""

from collections import Counter
from typing import Any

from . import liveness
from .claims import Claims

# attributes of trials
GENES, FINGERPRINT, SLOT, ATTEMPT = "genes", "fingerprint", "slot", "attempt"
COSTS = ("params", "macs", "latency")
OWNER = "owner"  # who took it (see `liveness`)
TAKER = "taker "  # before a signature: of who tried to, before it could sign as the owner
RUNGS = "rungs"  # qualities of rising fidelity, the last one counts
DIVERGED = "diverged"  # a quality was not a finite number
RAISED = "raised"  # the evaluation raised this; its candidate may be tried again
OUTDATED = "outdated"  # there was nothing to judge: another trial has the candidate
ANEW = "anew"  # it was given up, and is tried again: deaths before this trial count no longer
INHERITED = "inherited"  # judged in another study

MAX_DEATHS = 3  # a candidate that kills its process or raises this often is given up
_STOPPED = ("KeyboardInterrupt", "SystemExit")  # somebody ended the process: no fault of its own
_KILLED = "its process ended"


class Ledger:
    """The state of a study as of the last `refresh`.

    Args:
        study: Optuna's.
        claims: the study's.

    Attributes:
        slots: number of slots that are claimed.
        fingerprints: of all candidates that are claimed or inherited.
        settled: slot to record, in the order of settling.
        inherited: records of what other studies judged.
        live: slot to the trial that waits or runs.
        waiting: number of trials in the queue.
        running: trials under way.
        open: slots that are claimed and not settled.
        attempts: open slot to the latest attempt that a trial was made for.
    """

    def __init__(self, study, claims: Claims):
        self._study = study
        self._claims = claims
        self._first = 0  # trials before this one are finished and read
        self._read: set[int] = set()  # finished and read, from there on
        self._deaths: Counter[int] = Counter()
        self._anew: set[int] = set()  # trials that began anew and are read
        self.slots = 0
        self.fingerprints: set[str] = set()
        self.settled: dict[int, dict[str, Any]] = {}
        self.inherited: list[dict[str, Any]] = []
        self.live: dict[int, Any] = {}
        self.waiting = 0
        self.running: list[Any] = []
        self.open: set[int] = set()
        self.attempts: dict[int, int] = {}

    def refresh(self) -> None:
        """Reads what happened since the last time."""
        for claim in self._claims.since(self.slots):  # before the trials: those follow their claims
            self.slots = claim.slot + 1
            self.fingerprints.add(claim.fingerprint)
            self.open.add(claim.slot)
        self.live, self.running, self.waiting = {}, [], 0
        trials = self._study.get_trials(deepcopy=False)
        for trial in trials[self._first :]:
            if trial.number in self._read:
                continue
            if not trial.state.is_finished():
                self._unfinished(trial)
                continue
            self._read.add(trial.number)
            if GENES in trial.user_attrs:
                self._finished(trial)
        while self._first < len(trials) and trials[self._first].number in self._read:
            self._read.discard(trials[self._first].number)
            self._first += 1

    def rungs(self, but: int) -> list[tuple[dict[str, Any], list[float]]]:
        """Attributes or records, and qualities of rising fidelity, of all slots but one."""
        found = [(record, record[RUNGS]) for slot, record in self.settled.items() if slot != but]
        for slot, trial in self.live.items():
            if slot != but and trial.user_attrs.get(RUNGS):
                found.append((trial.user_attrs, trial.user_attrs[RUNGS]))
        return found

    def given_up(self) -> list[int]:
        """Slots whose candidates were given up."""
        return [slot for slot, record in self.settled.items() if record["given_up"]]

    def _begin_anew(self, trial) -> None:
        if ANEW in trial.user_attrs and trial.number not in self._anew:
            self._anew.add(trial.number)
            slot = trial.user_attrs[SLOT]
            self._deaths.pop(slot, None)
            self.settled.pop(slot, None)
            self.open.add(slot)

    def _unfinished(self, trial) -> None:
        self._begin_anew(trial)
        if trial.state.name == "WAITING":
            self.waiting += 1
        else:
            self.running.append(trial)
        if GENES in trial.user_attrs:
            slot = trial.user_attrs[SLOT]
            self.live[slot] = trial
            self._attempted(slot, trial)

    def _finished(self, trial) -> None:
        attributes = trial.user_attrs
        if OUTDATED in attributes:
            return
        if INHERITED in attributes:
            self.inherited.append(record(trial))
            self.fingerprints.add(attributes[FINGERPRINT])
            return
        slot = attributes[SLOT]
        self._begin_anew(trial)
        self._attempted(slot, trial)
        if trial.state.name == "FAIL" and DIVERGED not in attributes:
            self._deaths[slot] += not attributes.get(RAISED, "").startswith(_STOPPED)
            if self._deaths[slot] < MAX_DEATHS:
                return
        self.settled[slot] = record(trial)
        self.open.discard(slot)
        self.attempts.pop(slot, None)

    def _attempted(self, slot: int, trial) -> None:
        self.attempts[slot] = max(self.attempts.get(slot, 0), trial.user_attrs[ATTEMPT])


def record(trial) -> dict[str, Any]:
    """A finished trial as plain values for JSON; the keys are those of `Study.candidates`."""
    attributes = trial.user_attrs
    rungs = list(attributes.get(RUNGS, ()))
    owner = attributes.get(OWNER)
    failed = trial.state.name == "FAIL"
    given_up = failed and DIVERGED not in attributes
    return {
        "number": attributes.get(SLOT),
        "genes": list(attributes[GENES]),
        **{name: attributes[name] for name in COSTS},
        "quality": None if failed else rungs[-1],
        "given_up": attributes.get(RAISED, _KILLED) if given_up else None,
        "rungs": rungs,
        "pruned": trial.state.name == "PRUNED",
        "seconds": trial.duration.total_seconds() if trial.duration else 0.0,
        "fingerprint": attributes[FINGERPRINT],
        "inherited": INHERITED in attributes,
        "worker": owner and liveness.worker(owner),
    }


def verdict(record: dict[str, Any], digits: int = 4) -> str:
    """A record's quality, or why it has none, for people."""
    if record["quality"] is not None:
        return f"{record['quality']:.{digits}g}"
    return f"given up: {record['given_up']}" if record["given_up"] else "diverged"
