"""Claims: which candidate has which place in a study, decided once for all workers.

A study of n candidates has the slots 0 to n - 1. A worker that proposes candidates claims the next
slots for them before it queues them; the database's unique constraints let one worker have a slot
and let a candidate have one slot. So two workers never judge the same candidate, and there are
never more candidates than asked for.

A claim counts how often its candidate was queued (`attempt`). Whoever finds that the attempt came
to nothing (its worker died, even between the claim and the queue) raises the number, which only one
can, and queues the candidate again. Before a trial is judged, its worker takes the attempt, which
works once and only while the trial's number is the claim's: so a trial that comes too late is not
judged, and an attempt that was taken does not look as if it never reached the queue. The table
lies in the database of the study, whose other tables are Optuna's.

Why not claims inside Optuna's own transaction: that takes its private functions; and why not its
callback for stale trials: what dies between the failing and the callback is lost.
"""

import json
import threading
from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol

from ..errors import UserError


class Claim(NamedTuple):
    """A slot of a study and what it is for.

    Attributes:
        slot: 0, 1, 2, ...
        fingerprint: of the candidate.
        genes: its texts, one per layer.
        attempt: how often it was queued again, from 0.
        owner: who claimed or queued it last (see `liveness`).
        taken: the latest attempt that a worker took from the queue; -1 before the first.
    """

    slot: int
    fingerprint: str
    genes: tuple[str, ...]
    attempt: int
    owner: str
    taken: int = -1


class Claims(Protocol):
    """The claims of one study."""

    def add(self, claims: Sequence[Claim]) -> bool:
        """Makes all of them, or none and returns False: a slot or a candidate is taken."""

    def since(self, slot: int) -> list[Claim]:
        """Those from a slot on, in order."""

    def get(self, slots: Collection[int]) -> list[Claim]:
        """Those of these slots, as they are now."""

    def again(self, claim: Claim, owner: str) -> bool:
        """Raises the attempt for `owner`; False if the claim changed since it was read."""

    def take(self, slot: int, attempt: int) -> bool:
        """Takes an attempt from the queue; False if it is taken or out of date."""

    def remove(self) -> None:
        """Forgets all of them."""


class MemoryClaims:
    """Claims of a study that lives in memory."""

    def __init__(self):
        self._claims: list[Claim] = []
        self._lock = threading.Lock()

    def add(self, claims: Sequence[Claim]) -> bool:
        with self._lock:
            taken = {claim.fingerprint for claim in self._claims}
            slots = range(len(self._claims), len(self._claims) + len(claims))
            if [claim.slot for claim in claims] != [*slots]:
                return False
            if any(claim.fingerprint in taken for claim in claims):
                return False
            self._claims.extend(claims)
            return True

    def since(self, slot: int) -> list[Claim]:
        return self._claims[slot:]

    def get(self, slots: Collection[int]) -> list[Claim]:
        return [self._claims[slot] for slot in sorted(slots)]

    def again(self, claim: Claim, owner: str) -> bool:
        with self._lock:
            if self._claims[claim.slot] != claim:
                return False
            self._claims[claim.slot] = claim._replace(attempt=claim.attempt + 1, owner=owner)
            return True

    def remove(self) -> None:
        with self._lock:
            self._claims.clear()

    def take(self, slot: int, attempt: int) -> bool:
        with self._lock:
            claim = self._claims[slot]
            if claim.attempt != attempt or claim.taken == attempt:
                return False
            self._claims[slot] = claim._replace(taken=attempt)
            return True


class DatabaseClaims:
    """Claims in the table `fastffn_claims`.

    Args:
        engine: SQLAlchemy's.
        study: number of the study in that database.
    """

    def __init__(self, engine, study: int):
        self._engine = engine
        self._study = study
        self._table = _table()

    @staticmethod
    def create(engine) -> None:
        """Makes the table where it is missing. Raises a UserError where it is another version's."""
        from sqlalchemy import inspect

        table = _table()
        table.create(engine, checkfirst=True)
        there = {column["name"] for column in inspect(engine).get_columns(table.name)}
        if there != {*table.columns.keys()}:
            raise UserError(
                "the search's database was made by another version of fastffn: take a new one"
            )

    def add(self, claims: Sequence[Claim]) -> bool:
        from sqlalchemy.exc import IntegrityError

        rows = [
            {**claim._asdict(), "genes": json.dumps(claim.genes), "study": self._study}
            for claim in claims
        ]
        try:
            with self._engine.begin() as connection:
                connection.execute(self._table.insert(), rows)
        except IntegrityError:
            return False
        return True

    def since(self, slot: int) -> list[Claim]:
        return self._read(self._table.c.slot >= slot)

    def get(self, slots: Collection[int]) -> list[Claim]:
        return self._read(self._table.c.slot.in_(slots)) if slots else []

    def again(self, claim: Claim, owner: str) -> bool:
        unchanged = self._table.c.taken == claim.taken
        changes = {"attempt": claim.attempt + 1, "owner": owner}
        return self._update(claim.slot, claim.attempt, unchanged, changes)

    def remove(self) -> None:
        statement = self._table.delete().where(self._table.c.study == self._study)
        with self._engine.begin() as connection:
            connection.execute(statement)

    def take(self, slot: int, attempt: int) -> bool:
        return self._update(slot, attempt, self._table.c.taken < attempt, {"taken": attempt})

    def _update(self, slot: int, attempt: int, condition, changes: dict) -> bool:
        columns = self._table.c
        wanted = columns.study == self._study, columns.slot == slot, columns.attempt == attempt
        statement = self._table.update().where(*wanted, condition).values(**changes)
        with self._engine.begin() as connection:
            return connection.execute(statement).rowcount == 1

    def _read(self, condition) -> list[Claim]:
        columns = self._table.c
        wanted = [columns[name] for name in Claim._fields]
        from sqlalchemy import select

        statement = select(*wanted).where(columns.study == self._study, condition)
        with self._engine.connect() as connection:
            rows = connection.execute(statement.order_by(columns.slot)).all()
        return [Claim(*row)._replace(genes=tuple(json.loads(row.genes))) for row in rows]


def _table():
    from sqlalchemy import Column, Integer, MetaData, String, Table, Text, UniqueConstraint

    return Table(
        "fastffn_claims",
        MetaData(),
        Column("study", Integer, primary_key=True, autoincrement=False),
        Column("slot", Integer, primary_key=True, autoincrement=False),
        Column("fingerprint", String(64), nullable=False),
        Column("genes", Text, nullable=False),
        Column("attempt", Integer, nullable=False),
        Column("owner", String(512), nullable=False),
        Column("taken", Integer, nullable=False),
        UniqueConstraint("study", "fingerprint"),
    )
