"""export.json: what an exported folder holds, how it was checked, and the size of each file."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..errors import UserError
from ..files import write_text_atomic
from .interface import Interface

FILE = "export.json"
_VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """Contents of export.json.

    Attributes:
        format: of the export.
        quantize: "int8" or None.
        max_length: tokens of a text, where the exported model's folder said so.
        interface: names of inputs and outputs, and their limits.
        checked: what the export has measured.
        files: name -> bytes.
        fastffn, torch: versions that wrote it.
    """

    format: str
    quantize: str | None
    max_length: int | None
    interface: Interface
    checked: dict[str, Any]
    files: dict[str, int] = field(default_factory=dict)
    fastffn: str = __version__
    torch: str = str(torch.__version__)
    version: int = _VERSION

    def write(self, folder: Path) -> None:
        """Writes it beside the files that are there."""
        paths = (path for path in folder.rglob("*") if path.is_file())
        files = {str(path.relative_to(folder)): path.stat().st_size for path in paths}
        manifest = dataclasses.replace(self, files=dict(sorted(files.items())))
        text = json.dumps(dataclasses.asdict(manifest), indent=2)
        write_text_atomic(folder / FILE, text + "\n")

    @staticmethod
    def read(folder: Path) -> "Manifest | None":
        """That of a folder, with all files there in their size; None where the folder has none.

        Raises:
            UserError: it is damaged, of a newer version, or a file is missing or not whole.
        """
        if not (folder / FILE).is_file():
            return None
        manifest = _parsed(folder)
        if manifest is None:
            raise UserError(f"{folder / FILE} is damaged: export the model again")
        if manifest.version > _VERSION:
            raise UserError(f"{folder} is of a newer fastffn: install that, or export again")
        for name, size in manifest.files.items():
            file = folder / name
            if not file.is_file():
                raise UserError(f"{folder} is not whole: {name} is missing; export the model again")
            if (there := file.stat().st_size) != size:
                raise UserError(
                    f"{folder} is not whole: {name} has {there} bytes of {size}; export the model "
                    "again"
                )
        return manifest

    @staticmethod
    def names(folder: Path) -> set[str]:
        """The files that an export has written into a folder, whole or not."""
        manifest = _parsed(folder)
        return set() if manifest is None else {FILE, *manifest.files}


def _parsed(folder: Path) -> Manifest | None:
    try:
        values = json.loads((folder / FILE).read_text(encoding="utf-8"))
        interface = values["interface"]
        interface |= {name: tuple(interface[name]) for name in ("inputs", "outputs")}
        return Manifest(**values | {"interface": Interface(**interface)})
    except (OSError, ValueError, KeyError, TypeError):
        return None
