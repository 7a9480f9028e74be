"""The head of a search: a study without candidates whose notes tell workers what goes on.

begun        made anew with each start over: a worker then forgets what it knows
options      of the recipe, flat: another recipe of the same name is refused
stages       names in order
recipe       as resolved, plain values
directory    the run directory, as the machine of the search sees it
supernets    stage -> [folder in the run directory, fingerprint of the weights]
finished     whether the search has ended
beat         the process of the search (see `liveness`) and a number that rises while it lives; ""
             when it has left
"""

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator
from typing import Any

from ..errors import UserError
from . import liveness
from .storage import NOTE, SPACE, Storage, import_optuna, quiet

_LONG = 20  # times the grace time: without a sign of life for so long, a worker leaves


class Head:
    """Makes the head of the search of that name, where there is none, and writes its notes.

    Raises:
        UserError: the name is that of a study of somebody else.
    """

    def __init__(self, storage: Storage, name: str):
        optuna = import_optuna()
        self._every = storage.heartbeat
        with quiet(optuna):
            self._study = optuna.create_study(
                storage=storage.backend, study_name=name, load_if_exists=True
            )
        if self._study.get_trials(deepcopy=False) or SPACE in self._study.user_attrs:
            raise UserError(
                f"{storage.place} has a study called {name} that is no search's: give the search "
                "another name=..."
            )

    def note(self, **values: Any) -> None:
        """Keeps JSON values, for other processes."""
        for key, value in values.items():
            self._study.set_user_attr(NOTE + key, value)

    @contextlib.contextmanager
    def alive(self) -> Iterator[None]:
        """Gives signs of life for the time of the block."""
        ended = threading.Event()
        thread = threading.Thread(target=self._beat, args=(ended,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self._say("")

    def _beat(self, ended: threading.Event) -> None:
        for number in itertools.count():
            self._say([liveness.signature(), number])
            if ended.wait(self._every):
                return

    def _say(self, beat: Any) -> None:
        """One that fails is missed, not fatal: whoever needs the database more will say so."""
        from sqlalchemy.exc import SQLAlchemyError

        lost = import_optuna().exceptions.StorageInternalError
        with contextlib.suppress(lost, SQLAlchemyError, KeyError):  # no study: started over
            self.note(beat=beat)


class HeadWatch:
    """What a worker that has nothing to do knows of the process that leads its search.

    By this process's clock, from when it saw a sign of life last: clocks of others may be wrong.

    Args:
        grace: seconds after which a head without a sign of life counts as gone.
    """

    def __init__(self, name: str, grace: float):
        self._name = name
        self._grace = grace
        self._beat: Any = None
        self._since = time.monotonic()
        self._said = False

    def look(self, head: dict[str, Any]) -> str | None:
        """A line to be said now, or None.

        Args:
            head: the notes of the search.

        Raises:
            UserError: the head has been gone for too long.
        """
        beat, now = head.get("beat"), time.monotonic()
        if beat and beat != self._beat:
            self._since, self._said = now, False
        self._beat = beat
        gone = now - self._since
        if self._said and gone > _LONG * self._grace:
            raise UserError(
                f"the process of the search {self._name} gave no sign of life for "
                f"{gone / 60:.0f} minutes: give its fastffn search command again, then this one"
            )
        known = beat == "" or (beat and liveness.is_dead(beat[0]))
        if self._said or not (known or gone > self._grace):
            return None
        self._said = True
        return (
            f"the process of the search {self._name} is gone, this one waits: its fastffn search "
            "command, given again, goes on"
        )
