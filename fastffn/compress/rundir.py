"""The run directory: what a run has finished, so that it can be interrupted at any moment.

    state.json       options, plan, and the result of every finished phase; replaced atomically
    work/            teacher outputs, checkpoints, supernet, search; removed at the end
    student/         the result, complete from the moment it exists
    report.json ...  written by the report

A phase either is in state.json with its result or has to run (again, or on from its own
checkpoints). Directories of weights are written beside their place and renamed.
"""

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastffn.compress.options import Options
from fastffn.errors import UserError
from fastffn.files import make_ordinary, write_text_atomic

_FORMAT = 1
_STATE = "state.json"


class RunDirectory:
    """Opens, resumes or empties a run directory.

    Nothing is written, and with `fresh` nothing removed, before there is a first result to keep: a
    mistake in the options must neither leave a directory that refuses the corrected ones nor cost
    an earlier run.

    Attributes:
        path: the directory.
        work: what is only needed until the run is finished.
        resumed: whether an earlier run left something to continue.

    Raises:
        UserError: it cannot be written, holds something else, or a run with other options.
    """

    def __init__(self, options: Options):
        self.path = options.out
        self.work = self.path / "work"
        _check_writable(self.path)
        found = self._read(options.fresh)
        self._stale = found is not None and options.fresh
        if self._stale:
            found = None
        if found is not None and not _same_options(found, options.identity(), self.path):
            found = None
        self.resumed = found is not None
        self._state = found or {
            "format": _FORMAT,
            "options": options.identity(),
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

    def result(self, name: str) -> dict[str, Any]:
        """Of a finished phase."""
        return self._state["phases"][name]["result"]

    def finish(self, report: dict[str, Any], keep: tuple[str, ...] = ()) -> None:
        """Keeps the report and removes the working files, except `keep`."""
        self._state["report"] = report
        self._write()
        for path in self.work.iterdir() if self.work.is_dir() else ():
            if path.name not in keep:
                shutil.rmtree(path)
        with contextlib.suppress(OSError):
            self.work.rmdir()  # stays if something in it does

    def _read(self, fresh: bool) -> dict[str, Any] | None:
        try:
            state = json.loads((self.path / _STATE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            if not self.path.is_dir() or next(self.path.iterdir(), None) is None:
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
        for name in ("work", "student"):
            shutil.rmtree(self.path / name, ignore_errors=True)
        for name in ("report.json", "report.md"):
            (self.path / name).unlink(missing_ok=True)
        (self.path / _STATE).unlink()

    def _write(self) -> None:
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


def _same_options(state: dict[str, Any], now: dict[str, Any], path: Path) -> bool:
    """Whether the run has these options; False where nothing would be lost with it."""
    before = state["options"]
    differing = [name for name in now if before.get(name) != now[name]]
    if differing and set(state["phases"]) - {"text"}:
        changes = ", ".join(f"{name} was {before.get(name)}, is {now[name]}" for name in differing)
        raise UserError(
            f"{path} holds a run with other options ({changes}): use these, choose another "
            "directory, or start over with --fresh"
        )
    return not differing
