"""The directory that holds a model's outputs: what lies in it, and that it is whole.

    offsets.npy       int64    [sequences + 1]    sequence i is rows offsets[i] : offsets[i + 1]
    <output>.npy      float16  [tokens, width]    an output by token, or
                               [sequences, width] one by sequence; float32 where wanted
    <beside>.npy      any                         what the caller keeps beside them
    index.json                                    what this is, how far it is, and its seals
    .lock                                         held by the process that computes

The index goes first and comes back last: whatever the moment a run is killed, a directory has a
whole cache, one that says how far it is and can be continued, or none. Seals are each file's size,
time of change and SHA-256: a file of another size is never read, and the sums are compared where
the times differ, so that a copied directory is good and a damaged one is noticed.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastffn.errors import UserError
from fastffn.files import write_text_atomic

logger = logging.getLogger(__name__)

OFFSETS = "offsets"
_FORMAT = 2
_INDEX = "index.json"
_KEYS = {"format", "fingerprint", "done", "outputs", "beside", "sizes", "seals"}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # files are named so


class Output(NamedTuple):
    """What an output looks like: (by_token, width), or with its type on disk."""

    by_token: bool  # a row for each token; else one for each sequence
    width: int
    dtype: str = "float16"  # or "float32"


@dataclass(frozen=True)
class OutputFiles:
    """What is to lie in a directory.

    Attributes:
        of: the caller's fingerprint of what the outputs depend on.
        outputs: what is to be computed.
        given: what is known: offsets, and what the caller keeps beside the outputs.
    """

    directory: Path
    of: str
    outputs: dict[str, Output]
    given: dict[str, np.ndarray]

    def __post_init__(self):
        names = (*self.given, *self.outputs)
        for name in names:
            if not _NAME.fullmatch(name) or names.count(name) > 1:
                raise ValueError(f"{name!r} is no name for a file, or twice there")
        for name, (_, width, dtype) in self.outputs.items():
            if width < 1 or dtype not in ("float16", "float32"):
                raise ValueError(f"output {name} cannot have width {width} and type {dtype}")

    @functools.cached_property
    def fingerprint(self) -> str:
        chosen = [_FORMAT, self.of, self.outputs]
        digest = hashlib.sha256(json.dumps(chosen, sort_keys=True).encode())
        for name, array in sorted(self.given.items()):
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()

    def is_whole(self) -> bool:
        """Whether just this lies there, complete and unaltered."""
        index = self._index()
        return (
            index is not None
            and index["seals"] is not None
            and of_another_size(self.directory, index) is None
            and not _altered(self.directory, index)
        )

    def done(self) -> int | None:
        """Sequences done where just this was begun and is to be continued; else None."""
        index = self._index()
        if index is None or index["seals"] or of_another_size(self.directory, index):
            return None
        return index["done"]

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Waits until no other process computes here; a lock is dropped with its process."""
        with self._written():
            self.directory.mkdir(parents=True, exist_ok=True)
            lock = (self.directory / ".lock").open("w")
            fcntl.flock(lock, fcntl.LOCK_EX)
        with lock:
            yield

    def start(self) -> None:
        """Removes what lies there and reserves space, so that a full disk shows now."""
        if self._index() is not None:
            logger.warning(
                "%s: teacher outputs were cut or altered, computed again", self.directory
            )
        with self._written():
            old = read_index(self.directory) or {"sizes": ()}
            (self.directory / _INDEX).unlink(missing_ok=True)
            for name in {*self.given, *self.outputs, *old["sizes"]}:
                array_path(self.directory, name).unlink(missing_ok=True)  # perhaps mapped elsewhere
            self._check_space()
            for name, array in self.given.items():
                np.save(array_path(self.directory, name), array)
            for name, output in self.outputs.items():
                path = array_path(self.directory, name)
                np.lib.format.open_memmap(path, "w+", output.dtype, self._shape(output))
                if hasattr(os, "posix_fallocate"):  # a write into a map cannot fail gracefully
                    with path.open("r+b") as file:
                        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        self.save(0, {})

    def arrays(self) -> dict[str, np.ndarray]:
        """The outputs' files, mapped to be written."""
        return {
            name: np.lib.format.open_memmap(array_path(self.directory, name), "r+")
            for name in self.outputs
        }

    def save(self, done: int, arrays: dict[str, np.ndarray], seal: bool = False) -> None:
        """What is done is on the disk before the index says so."""
        paths = {name: array_path(self.directory, name) for name in (*self.given, *self.outputs)}
        with self._written():
            for array in arrays.values():
                array.flush()
            for path in paths.values():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            index = {
                "format": _FORMAT,
                "fingerprint": self.fingerprint,
                "done": done,
                "outputs": self.outputs,
                "beside": [name for name in self.given if name != OFFSETS],
                "sizes": {name: path.stat().st_size for name, path in paths.items()},
                "seals": {name: _seal(path) for name, path in paths.items()} if seal else None,
            }
            write_text_atomic(self.directory / _INDEX, json.dumps(index, indent=1) + "\n")

    def _index(self) -> dict | None:
        index = read_index(self.directory)
        return index if index and index["fingerprint"] == self.fingerprint else None

    def _shape(self, output: Output) -> tuple[int, int]:
        offsets = self.given[OFFSETS]
        return int(offsets[-1]) if output.by_token else len(offsets) - 1, output.width

    def _check_space(self) -> None:
        needed = sum(array.nbytes for array in self.given.values())
        for output in self.outputs.values():
            needed += math.prod(self._shape(output)) * np.dtype(output.dtype).itemsize
        free = shutil.disk_usage(self.directory).free
        if free < 1.05 * needed:
            raise UserError(
                f"teacher outputs need {needed / 2**30:.1f} GiB in {self.directory}, "
                f"{free / 2**30:.1f} GiB are free: make room, or use less text or fewer layers"
            )

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"teacher outputs cannot be written to {self.directory}: {error.strerror or error}"
            ) from error


def read_index(directory: Path) -> dict | None:
    """The directory's index, of whatever work; None where there is none of this format."""
    try:
        index = json.loads((directory / _INDEX).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    if not isinstance(index, dict) or index.get("format") != _FORMAT or set(index) != _KEYS:
        return None
    return index if all(map(_NAME.fullmatch, index["sizes"])) else None


def array_path(directory: Path, name: str) -> Path:
    return directory / f"{name}.npy"


def of_another_size(directory: Path, index: dict) -> Path | None:
    """The first file that is missing or not as large as the index says; None: there is none."""
    for name, size in index["sizes"].items():
        path = array_path(directory, name)
        if not path.is_file() or path.stat().st_size != size:
            return path
    return None


def _altered(directory: Path, index: dict) -> bool:
    for name, (changed, digest) in index["seals"].items():
        path = array_path(directory, name)
        if path.stat().st_mtime_ns != changed and _seal(path)[1] != digest:
            return True
    return False


def _seal(path: Path) -> tuple[int, str]:
    """Time of change, SHA-256."""
    with path.open("rb") as file:
        return path.stat().st_mtime_ns, hashlib.file_digest(file, "sha256").hexdigest()
