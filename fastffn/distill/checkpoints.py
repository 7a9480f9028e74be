"""Checkpoints that are whole or not used: a list of digests, written last, seals each.

    checkpoint-120/    model.safetensors, optimizer.pt, ..., sealed.json

`sealed.json` holds the SHA-256 of every other file. Whatever the moment a run is killed, and
whatever becomes of a file afterwards (a full disk, a copy cut short, a flipped bit), a checkpoint
is used only if every file is as it was written; otherwise the one before is, and that is said.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from fastffn.errors import UserError
from fastffn.files import write_text_atomic

logger = logging.getLogger(__name__)

_SEAL = "sealed.json"


@contextlib.contextmanager
def writing(folder: str | Path) -> Iterator[None]:
    """Turns what a full disk raises in the block, by whichever library, into one line."""
    try:
        yield
    except UserError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise UserError(
            f"{folder} cannot be written ({reason}): make room and run the same command again; "
            "earlier checkpoints are kept"
        ) from error


def seal(checkpoint: str | Path) -> None:
    """Sees the files of a checkpoint on the disk and writes their digests."""
    checkpoint = Path(checkpoint)
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    digests = {str(path.relative_to(checkpoint)): _digest(path) for path in files}
    write_text_atomic(checkpoint / _SEAL, json.dumps(digests, indent=1) + "\n")


def damage(checkpoint: str | Path) -> str:
    """What is wrong with a checkpoint, in a few words; "": nothing."""
    checkpoint = Path(checkpoint)
    try:
        digests = json.loads((checkpoint / _SEAL).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "it was not finished"
    except (OSError, ValueError):
        return f"{_SEAL} cannot be read"
    for name, digest in digests.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if _digest(path) != digest:
            return f"{name} was altered or cut short"
    return ""


def last_checkpoint(directory: str | Path) -> Path | None:
    """The newest whole checkpoint of a run, or None; says which newer ones are damaged."""
    for path in sorted(Path(directory).glob("checkpoint-*"), key=_step, reverse=True):
        if not (wrong := damage(path)):
            return path
        logger.error("%s is not used (%s): an earlier checkpoint is, if any", path, wrong)
    return None


def remove_checkpoints(directory: str | Path, keep: Path | None = None) -> None:
    """Removes all checkpoints but one, those of an interrupted save too."""
    for path in Path(directory).glob("checkpoint-*"):
        if path != keep:
            shutil.rmtree(path)


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
