"""The run directory: what a run has finished, so that it can be interrupted at any moment.

    state.json       what the run was asked to do, its plan, and the result of every finished phase;
                     replaced atomically
    work/            what is only needed until the run is finished; removed at the end
    ...              results, each complete from the moment it exists

A phase either is in state.json with its result or has to run (again, or on from its own
checkpoints). Directories of weights are written beside their place and renamed.
"""

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from fastffn.errors import UserError
from fastffn.files import make_ordinary, write_text_atomic

_FORMAT = 1
_STATE = "state.json"
_LOCK = ".lock"


class RunDirectory:
    """Opens, resumes or empties a run directory.

    Nothing is written, and with `fresh` nothing removed, before there is a first result to keep: a
    mistake in the options must neither leave a directory that refuses the corrected ones nor cost
    an earlier run.

    Args:
        path: the directory.
        options: what decides the results, as JSON values by name; another run's are refused.
        fresh: start over where it holds another or a finished run.
        contents: names of the results, removed with `fresh`.
        free: phases that cost nothing: while only these are finished, other options are taken.
        writes: False: this process of several computes along but leaves the directory to another.

    Attributes:
        path: the directory.
        work: what is only needed until the run is finished.
        resumed: whether an earlier run left something to continue.

    Raises:
        UserError: it cannot be written, holds something else, or a run with other options; another
            process works in it (told when the first result is kept, too).
    """

    def __init__(
        self,
        path: Path,
        options: Mapping[str, Any],
        fresh: bool = False,
        contents: Sequence[str] = (),
        free: Sequence[str] = (),
        writes: bool = True,
    ):
        self.path = path
        self.work = self.path / "work"
        self._contents, self._writes = ("work", *contents), writes
        if writes:
            _check_writable(self.path)
        self._seen = self._text()
        found = self._read(fresh)
        self._stale = found is not None and fresh
        if self._stale:
            found = None
        if found is not None and not _same_options(found, dict(options), self.path, free):
            found, self._stale = None, True  # what other options have begun is of no use
        self.resumed = found is not None
        self._lock: TextIO | None = None
        if self.resumed and writes and "report" not in found:
            self._take()
        self._state = found or {
            "format": _FORMAT,
            "options": dict(options),
            "plan": {},
            "kept": {},
            "phases": {},
        }

    @property
    def finished(self) -> bool:
        return "report" in self._state

    @property
    def report(self) -> dict[str, Any]:
        """The finished run's report."""
        return self._state["report"]

    @property
    def plan(self) -> dict[str, int]:
        return self._state["plan"]

    def decide(self, **numbers: int) -> None:
        """Adds to the plan; what stands there stays."""
        self._state["plan"] = {**numbers, **self._state["plan"]}
        self._write()

    def keep(self, name: str, value: Any) -> Any:
        """Keeps a JSON value under a name, for `kept`; returns it."""
        self._state["kept"][name] = value
        self._write()
        return value

    def kept(self, name: str) -> Any:
        """What an earlier moment of this run kept under the name, or None."""
        return self._state["kept"].get(name)

    def seconds(self) -> dict[str, float]:
        """Of the finished phases, in order."""
        return {name: phase["seconds"] for name, phase in self._state["phases"].items()}

    def phase(self, name: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The phase's result: of the run that finished it, else by calling `run`.

        `run` returns JSON values; a "seconds" among them replaces the time that it took here,
        which lacks what interrupted runs spent on it.
        """
        if name not in self._state["phases"]:
            start = time.monotonic()
            result = run()
            seconds = result.pop("seconds", time.monotonic() - start)
            self._state["phases"][name] = {"seconds": round(seconds, 2), "result": result}
            self._write()
        return self._state["phases"][name]["result"]

    def forget(self, name: str) -> None:
        """Makes a finished phase one that has to run again."""
        del self._state["phases"][name]
        self._write()

    def result(self, name: str) -> dict[str, Any]:
        """Of a finished phase."""
        return self._state["phases"][name]["result"]

    def finish(self, report: dict[str, Any], keep: tuple[str, ...] = ()) -> None:
        """Keeps the report and removes the working files, except `keep`."""
        self._state["report"] = report
        self._write()
        if not self._writes:
            return
        (self.path / _LOCK).unlink(missing_ok=True)  # who waits for it sees another state
        for path in self.work.iterdir() if self.work.is_dir() else ():
            if path.name not in keep:
                shutil.rmtree(path)
        with contextlib.suppress(OSError):
            self.work.rmdir()  # stays if something in it does

    def reopen(self) -> None:
        """Makes a finished run one that goes on, with all of its phases finished."""
        del self._state["report"]
        self._write()

    def _read(self, fresh: bool) -> dict[str, Any] | None:
        try:
            state = json.loads((self.path / _STATE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            # A process that was killed at its first write leaves a lock and a temporary file.
            own = (_LOCK, f".{_STATE}.")
            others = self.path.iterdir() if self.path.is_dir() else ()
            if all(path.name.startswith(own) for path in others):
                return None
            raise UserError(
                f"{self.path} is not empty and holds no run of fastffn: choose another directory"
            ) from None
        except ValueError:
            state = {}
        if state.get("format") != _FORMAT and not fresh:
            raise UserError(
                f"{self.path} holds a run of another version of fastffn: choose another directory "
                "or start over with --fresh"
            )
        return state

    def _clear(self) -> None:
        """Removes what a run writes and nothing else; the state last: this can be cut short."""
        for path in (self.path / name for name in self._contents):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        (self.path / _STATE).unlink()

    def _text(self) -> bytes | None:
        """The state as it is on the disk now."""
        path = self.path / _STATE
        return path.read_bytes() if path.is_file() else None

    def _take(self) -> None:
        """Keeps other processes out until this one ends; a lock dies with its process."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / _LOCK).open("w")
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"another process works in {self.path}: wait for it, or choose another directory"
            ) from None
        if self._text() != self._seen:
            raise UserError(
                f"another process has worked in {self.path} meanwhile: run the command again"
            )
        # What a process was writing when it was killed.
        begun = [*self.path.glob(f".{_STATE}.*")]
        for name in self._contents:
            begun += self.path.glob(f".{name}.*")
        for name in self._contents[1:]:  # in work/ others see to it
            begun += (self.path / name).glob(".*")
        for path in begun:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _write(self) -> None:
        if not self._writes:
            return
        if self._lock is None:
            self._take()
        if self._stale:
            self._clear()
            self._stale = False
        write_text_atomic(self.path / _STATE, json.dumps(self._state, indent=1) + "\n")


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yields a temporary directory beside `path` and renames it there when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
            make_ordinary(file)  # some writers of weights make theirs private
        make_ordinary(temporary)
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_writable(path: Path) -> None:
    """Tries it, and leaves no directory that was not there."""
    absent = not path.is_dir()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
        if absent:
            path.rmdir()
    except OSError as error:
        raise UserError(
            f"output directory {path} cannot be written ({error.strerror}): choose another"
        ) from None


def _same_options(
    state: dict[str, Any], now: dict[str, Any], path: Path, free: Sequence[str]
) -> bool:
    """Whether the run has these options; False where nothing would be lost with it."""
    before = state["options"]
    names = dict.fromkeys([*before, *now])
    differing = [name for name in names if before.get(name) != now.get(name)]
    if differing and set(state["phases"]) - set(free):
        changes = ", ".join(
            f"{name} was {before.get(name)}, is {now.get(name)}" for name in differing
        )
        raise UserError(
            f"{path} holds a run with other options ({changes}): use these, choose another "
            "directory, or start over with --fresh"
        )
    return not differing
