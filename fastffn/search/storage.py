"""Where a study lives: memory, an SQLite file in a run directory, or a database by its URL.

A run directory belongs to one process at a time: `exclusive` locks it while candidates are being
evaluated, and the operating system drops the lock when the process dies, however it dies. So
whatever the file says is running when the lock is taken was killed. A database by URL may serve
many processes; there Optuna's heartbeats tell the dead from the living.
"""

import contextlib
import fcntl
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError

FILE = "search.sqlite3"

_HEARTBEAT = 60  # seconds between two signs of life of a worker on a shared database


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
    """An Optuna storage and who may write to it.

    Args:
        place: None for memory; a directory, which gets the file `search.sqlite3`; or an
            SQLAlchemy URL such as postgresql://host/name.

    Attributes:
        backend: what `optuna.create_study` takes.
        shared: whether other processes may be evaluating candidates of the same study.

    Raises:
        UserError: no such database, or a file that is none.
    """

    def __init__(self, place: str | Path | None):
        optuna = import_optuna()
        self.folder: Path | None = None
        self.shared = False
        if place is None:
            self.backend = optuna.storages.InMemoryStorage()
            return
        if "://" in str(place):
            self.shared, url, options = True, str(place), {"heartbeat_interval": _HEARTBEAT}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                retry = optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=3)
            options["heartbeat_stale_trial_callback"] = retry
        else:
            self.folder = Path(place)
            if self.folder.exists() and not self.folder.is_dir():
                raise UserError(f"{place} is a file: give the run directory for the search")
            self.folder.mkdir(parents=True, exist_ok=True)
            url = f"sqlite:///{self.folder.resolve() / FILE}"
            options = {"engine_kwargs": {"connect_args": {"timeout": 60}}}
        with quiet(optuna), warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self.backend = _connect(optuna, url, options)

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keeps other processes from evaluating in the same run directory; nothing elsewhere.

        Raises:
            UserError: another process does so at the moment.
        """
        if self.folder is None:
            yield
            return
        with (self.folder / "search.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(
                    f"another process is searching in {self.folder}: wait for it, or take another "
                    "run directory"
                ) from None
            yield


def _connect(optuna, url: str, options: dict):
    from sqlalchemy.exc import SQLAlchemyError

    try:
        return optuna.storages.RDBStorage(url, **options)
    except (SQLAlchemyError, ImportError, optuna.exceptions.OptunaError, RuntimeError) as error:
        reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        raise UserError(f"cannot open the search's database {_hidden(url)}: {reason}") from error


def _hidden(url: str) -> str:
    """The URL without its password."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return url
