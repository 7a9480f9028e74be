"""Where studies live: memory, an SQLite file in a run directory, or a database by its URL.

Any number of processes may work on the same directory or database: what must happen once is
decided by the database (see `claims`), writers wait for each other, and signs of life tell the dead
from the living. SQLite serves the processes of one machine; for many machines take PostgreSQL.
"""

import contextlib
import fcntl
import logging
import sqlite3
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError
from . import liveness
from .claims import Claims, DatabaseClaims, MemoryClaims
from .ledger import OWNER, TAKER

FILE = "search.sqlite3"
LOCK = "-lock"  # after a database file's name: held while a worker takes a trial
SPACE = "fastffn.space"  # attribute of the studies that are ours: their space
NOTE = "fastffn.note."  # attributes of a study that start so are its notes
AGAIN = "~"  # in a study's name: search.fine~2 is the stage search.fine, begun a second time

GRACE = 3  # heartbeats that may stay away before a worker counts as dead
_HEARTBEAT_HERE, _HEARTBEAT_ELSEWHERE = 10, 60  # seconds between two: directory, URL
_SECRET = ("password", "sslpassword", "passfile")  # of a URL's query
_LOCKED = 60  # seconds that a writer waits for the others of an SQLite file
_CONNECT = 10  # seconds until a database server counts as unreachable
_OPENINGS = 8  # tries of making the tables while other workers do the same
_OTHERS = ("already exists", "UNIQUE", "unique", "duplicate", "locked")  # what it then says


def import_optuna():
    """The optuna module, with its own log silent below errors: a study says itself what happens."""
    try:
        import optuna
    except ImportError:
        raise UserError(
            "the search needs optuna, which is not installed: pip install 'fastffn[search]'"
        ) from None
    return optuna


@contextlib.contextmanager
def quiet(optuna) -> Iterator[None]:
    """Optuna's log without its line per trial, for the time of the block."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


class Storage:
    """A place for studies. One object serves any number of studies of a process.

    Args:
        place: None for memory; a directory, which gets the file `search.sqlite3`; or an
            SQLAlchemy URL such as postgresql://host/name.
        heartbeat: whole seconds between two signs of life of a worker; after three without, its
            candidate goes to another. Default: 10 in a directory, 60 at a URL. Workers of the same
            machine are found dead at once, without.
        create: False: a directory or database without a search is refused, and left as it is.

    Attributes:
        backend: what `optuna.create_study` takes.
        lonely: nobody but this object can write to it.
        heartbeat: seconds between two signs of life.
        grace: seconds without a sign of life after which a worker is dead.

    Raises:
        UserError: no such database, a file that is none, or a driver that is not installed.
    """

    def __init__(self, place: str | Path | None, heartbeat: int | None = None, create: bool = True):
        self._optuna = optuna = import_optuna()
        self.lonely = place is None
        self.place = "memory"
        self.heartbeat, self.grace = float(_HEARTBEAT_HERE), 0.0
        if place is None:
            self.backend = optuna.storages.InMemoryStorage()
            self._claims: dict[int, MemoryClaims] = {}
            return
        if "://" in str(place):
            url, interval = str(place), _HEARTBEAT_ELSEWHERE
        else:
            url, interval = _file_url(Path(place), create), _HEARTBEAT_HERE
        interval = interval if heartbeat is None else heartbeat
        if interval < 1 or int(interval) != interval:
            raise UserError("heartbeat: give whole seconds, at least 1")
        self.place = without_password(url) if "://" in str(place) else str(place)
        if not create and "://" in str(place):
            _check_there(url, self.place)
        self.heartbeat, self.grace = float(interval), float(GRACE * interval)
        with quiet(optuna), warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._database = _open(optuna, url, self.place, interval)
            self.backend = optuna.storages.get_storage(self._database)  # with Optuna's cache

    @contextlib.contextmanager
    def connected(self) -> Iterator[None]:
        """Says in one line that the database was lost, should that happen in the block.

        Raises:
            UserError: instead of the database's errors.
        """
        if self.lonely:
            yield
            return
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except (SQLAlchemyError, self._optuna.exceptions.StorageInternalError) as error:
            raise UserError(
                f"lost the search's database {self.place}: {_reason(error)}; what is judged is "
                "kept, the same call goes on"
            ) from error

    def claims(self, study: str) -> Claims:
        """The claims of the study of that name, which must exist."""
        number = self.backend.get_study_id_from_name(study)
        if self.lonely:
            return self._claims.setdefault(number, MemoryClaims())
        return DatabaseClaims(self._database.engine, number)

    def remove(self, search: str) -> None:
        """Removes the studies and claims of a search, its head last; others' studies stay.

        Raises:
            UserError: somebody judges a candidate of it.
        """
        names = [name for name in self.names() if name.startswith(f"{search}.")]
        names = [name for name in names if SPACE in self.attributes(name)]
        names += [search] if search in self.names() and "stages" in self.notes(search) else []
        running = (self._optuna.trial.TrialState.RUNNING,)
        for name in names:
            number = self.backend.get_study_id_from_name(name)
            for trial in self.backend.get_all_trials(number, deepcopy=False, states=running):
                owner = trial.user_attrs.get(OWNER)
                if owner and not liveness.is_dead(owner):
                    raise UserError(
                        f"{liveness.worker(owner)} judges a candidate of {search} in {self.place}: "
                        "end that process first"
                    )
        for name in names:
            self.claims(name).remove()
            self._optuna.delete_study(study_name=name, storage=self.backend)

    def names(self) -> list[str]:
        """Names of the studies, oldest first."""
        return [study.study_name for study in self.backend.get_all_studies()]

    def attributes(self, name: str) -> dict[str, Any]:
        """The attributes of a study.

        Raises:
            UserError: there is no study of that name; those that are there are named.
        """
        try:
            number = self.backend.get_study_id_from_name(name)
        except KeyError:
            known = ", ".join(self.names()) or "none"
            raise UserError(f"no study {name!r} in {self.place}; there are: {known}") from None
        return self.backend.get_study_user_attrs(number)

    def notes(self, name: str) -> dict[str, Any]:
        """The notes of a study (see `Study.note`); raises as `attributes`."""
        found = self.attributes(name)
        return {key[len(NOTE) :]: found[key] for key in found if key.startswith(NOTE)}


def _check_there(url: str, shown: str) -> None:
    """Raises a UserError where a database has no studies; what only looks must not make any."""
    from sqlalchemy import create_engine, inspect
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import SQLAlchemyError

    try:
        parts = make_url(url)
        file = parts.database if parts.get_backend_name() == "sqlite" else None
        there = file is None or Path(file).is_file()
        if there:
            engine = create_engine(url, **_engine_options(url))
            try:
                there = inspect(engine).has_table("studies")
            finally:
                engine.dispose()
    except (SQLAlchemyError, ImportError, ValueError):
        return  # `_open` says what is wrong
    if not there:
        raise UserError(f"no search in {shown}: start one with fastffn search")


def _file_url(folder: Path, create: bool) -> str:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: give the run directory for the search")
    if not create and not (folder / FILE).exists():
        raise UserError(f"no search in {folder}: it has no {FILE}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the run directory {folder}: {error.strerror}") from None
    return f"sqlite:///{folder.resolve() / FILE}"


def _engine_options(url: str) -> dict[str, Any]:
    """How SQLAlchemy connects."""
    from sqlalchemy.engine import make_url

    driver = make_url(url).get_backend_name()
    if driver == "sqlite":
        return {"connect_args": {"timeout": _LOCKED, "factory": _SQLite}}
    options: dict[str, Any] = {"pool_pre_ping": True}  # the server may have restarted
    if driver == "postgresql":
        options["connect_args"] = {"connect_timeout": _CONNECT}
    return options


def _open(optuna, url: str, shown: str, interval: int):
    """Optuna's storage with its tables and ours."""
    from sqlalchemy.exc import SQLAlchemyError

    for opening in range(_OPENINGS):
        try:
            options = _engine_options(url)
            database = _patient(optuna)(
                url,
                engine_kwargs=options,
                heartbeat_interval=interval,
                grace_period=GRACE * interval,
            )
            DatabaseClaims.create(database.engine)
            return database
        except ImportError as error:
            raise UserError(_driver(shown, error)) from None
        except (SQLAlchemyError, optuna.exceptions.OptunaError, RuntimeError) as error:
            reason = _reason(error)
            if opening + 1 < _OPENINGS and any(word in reason for word in _OTHERS):
                time.sleep(0.1 * (opening + 1))  # another worker makes the tables right now
                continue
            raise UserError(f"cannot open the search's database {shown}: {reason}") from error


class _SQLite(sqlite3.Connection):
    """A connection that does not wait for the disk at every commit, and whose readers do not wait
    for writers. A killed process loses nothing; what a power cut loses is the latest candidates."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.execute("PRAGMA journal_mode = WAL")
        self.execute("PRAGMA synchronous = NORMAL")


def _patient(optuna):
    """Optuna's storage for databases, where a sign of life that fails is missed, not fatal: the
    thread that gives them would end with the first error, and a healthy worker be given up. Nor is
    a worker given up that this machine shows at work: a busy one is late with its signs. And who
    takes a trial from the queue says so before: if it dies then, it has neither signed the trial
    nor given a sign of life."""

    class PatientStorage(optuna.storages.RDBStorage):
        def record_heartbeat(self, trial_id: int) -> None:
            with contextlib.suppress(optuna.exceptions.StorageInternalError):
                super().record_heartbeat(trial_id)

        def set_trial_state_values(self, trial_id, state, values=None) -> bool:
            if state != optuna.trial.TrialState.RUNNING:
                return super().set_trial_state_values(trial_id, state, values)
            self.set_trial_user_attr(trial_id, TAKER + liveness.signature(), True)
            with _one_at_a_time(self.engine.url):
                return super().set_trial_state_values(trial_id, state, values)

        def _get_stale_trial_ids(self, study_id: int) -> list[int]:
            stale = super()._get_stale_trial_ids(study_id)
            owners = {number: self.get_trial(number).user_attrs.get(OWNER) for number in stale}
            me = liveness.signature()  # signs of one's own are late for no such reason
            busy = {n for n, o in owners.items() if o and o != me and liveness.is_running(o)}
            return [number for number in stale if number not in busy]

    return PatientStorage


@contextlib.contextmanager
def _one_at_a_time(url) -> Iterator[None]:
    """Lets one process of this machine in, where the database is a file. Optuna reads a trial's
    state for update and then sets it; SQLite knows no such reading, so that two workers would both
    have taken the trial. The lock is a file of its own, since closing the database's would end
    SQLite's locks, and it ends with its process."""
    if url.get_backend_name() != "sqlite" or not url.database or url.database == ":memory:":
        yield
        return
    with open(f"{url.database}{LOCK}", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _reason(error: Exception) -> str:
    """The first line of what the database said."""
    said = [getattr(found, "orig", None) for found in (error, error.__cause__)]
    return str(next(filter(None, said), error)).strip().splitlines()[0]


def _driver(shown: str, error: ImportError) -> str:
    module = getattr(error.__cause__, "name", None) or "its driver"
    install = '"fastffn[postgresql]"' if module == "psycopg" else module
    return f"cannot open the search's database {shown}: it needs {module}: pip install {install}"


def without_password(url: str) -> str:
    """A database's URL as it may be shown and kept."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        parts = make_url(url)
        query = {key: "***" if key in _SECRET else value for key, value in parts.query.items()}
        return parts.set(query=query).render_as_string(hide_password=True)
    except (ArgumentError, ValueError):  # no URL: nothing of it that may be secret is repeated
        return f"{url.split('://')[0]}://..."
