"""`fastffn.export`: a model in the format that its users run, in a folder of its own.

    safetensors            as transformers saves it, weights bit for bit
    onnx                   a graph of standard operations, for onnxruntime and others; int8 too
    torch-export           a program of torch.export: torch runs it without fastffn
    sentence-transformers  a folder that SentenceTransformer(folder) opens

The folder also has the configuration, the tokenizer, and export.json: what was written, how it was
checked, and each file's size. `fastffn.serve.load` opens all of them in one way. A graph is run and
compared before its folder gets its name, so a folder that exists is whole and right.
"""

import copy
from pathlib import Path
from typing import Any

from torch import nn

from ..distill.teacher import quiet
from ..errors import UserError
from ..files import atomic_folder
from . import onnx_export, sentence_transformers_folder, source, torch_export
from .interface import Interface
from .manifest import Manifest

FORMATS = ("safetensors", "onnx", "torch-export", "sentence-transformers")


def export(
    model: nn.Module | str | Path,
    out: str | Path,
    format: str = "safetensors",
    quantize: str | None = None,
    tokenizer: Any = None,
    pooling: str | None = None,
    normalize: bool | None = None,
) -> Path:
    """Writes a model in a format that others run.

    Args:
        model: an encoder of transformers or of fastffn, with a head or without, patched or not; or
            the folder or hub name of one. It is left as it is.
        out: the folder to write; an earlier export there is replaced.
        format: one of `FORMATS`.
        quantize: "int8" of onnx: products in int8, 4 times smaller. export.json says how far its
            outputs are from those in float32.
        tokenizer: kept beside the model; None: the one in the model's folder.
        pooling: "mean" or "cls", of an encoder without a head: also give sentence vectors
            (`sentence_embedding`). None: as its folder or configuration says; sentence-transformers
            takes the mean where nothing is said.
        normalize: sentence vectors of length 1; None: as the folder says.

    Returns:
        `out`.

    Raises:
        UserError: an unknown format, a model that cannot be read or written so, an absent package,
            outputs that differ from the model's, or a folder that holds other things. Nothing is
            written then.
    """
    if format not in FORMATS:
        raise UserError(f"format {format!r} is unknown: choose one of {', '.join(FORMATS)}")
    if quantize not in (None, "int8"):
        raise UserError(f"quantize {quantize!r} is unknown: int8, or None")
    if quantize is not None and format != "onnx":
        raise UserError(f"quantize is of onnx: leave it out of format {format}")
    out = Path(out)
    _check_target(out)
    if format == "onnx":  # before a model is loaded
        onnx_export.require(*onnx_export.PACKAGES)
    given = isinstance(model, str | Path)
    found = source.read(model) if given else source.given(model)
    model = found.model
    tokenizer = found.tokenizer if tokenizer is None else tokenizer
    pooling = pooling or found.pooling
    if pooling is None and format == "sentence-transformers":
        pooling = getattr(model.config, "sentence_pooling", None) or "mean"
    normalize = found.normalize if normalize is None else normalize
    interface = Interface.of(model, pooling, normalize)
    if found.folder is not None and out.exists() and found.folder.samefile(out):
        raise UserError(f"{out} is the model itself: export it to another folder")

    with atomic_folder(out) as folder, quiet():
        if format == "onnx":
            report = onnx_export.write(model, interface, folder, quantize)
        elif format == "torch-export":
            report = torch_export.write(model, interface, folder)
        elif format == "sentence-transformers":
            report = sentence_transformers_folder.write(
                model, interface, folder, tokenizer, found.max_length
            )
        else:
            model.save_pretrained(folder)
            report = {}
        if format != "sentence-transformers" and tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if format in ("onnx", "torch-export"):
            _configuration(model).save_pretrained(folder)
        Manifest(format, quantize, found.max_length, interface, report).write(folder)
    return out


def _check_target(out: Path) -> None:
    """Refuses a folder that holds anything but an earlier export."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out} is a file: give a folder to export to")
    there = {str(p.relative_to(out)) for p in out.rglob("*") if not p.is_dir()}
    if not there:
        return
    known = Manifest.names(out)
    if other := sorted(there - known):
        raise UserError(f"{out} holds other things ({other[0]}): give a folder of its own")


def _configuration(model: nn.Module) -> Any:
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    return config
