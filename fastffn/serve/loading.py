"""`fastffn.serve.load`: opens what `fastffn.export` wrote, and any model's folder, to run it.

Weights in safetensors run as fastffn's models, with its ops where they have them; a graph of ONNX
in onnxruntime; a program of torch.export in torch.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..distill.teacher import LOADING_ERRORS, first_line, quiet
from ..errors import UserError
from . import onnx_export, source, torch_export
from .interface import Interface, Plain
from .manifest import Manifest
from .onnx_session import open_session, run
from .served import Served

_Run = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]


def load(folder: str | Path, threads: int | None = None) -> Served:
    """Loads a model to run it on the CPU.

    Args:
        folder: what `fastffn.export` wrote, or a folder or hub name of a model in safetensors.
        threads: of a run; None: as they are (onnxruntime: one for each core). torch has one number
            for the whole process, so of other formats than onnx this sets it.

    Raises:
        UserError: no such folder, files that are missing, damaged or not whole, or an absent
            package.
    """
    path = Path(folder).expanduser()
    manifest = Manifest.read(path) if path.is_dir() else None
    kind = "safetensors" if manifest is None else manifest.format
    if threads is not None and kind != "onnx":
        torch.set_num_threads(threads)
    if kind in ("onnx", "torch-export"):
        return _graph(path, kind, manifest, threads)
    found = source.read(path if path.is_dir() else str(folder))
    model = found.model.float().requires_grad_(False)
    pooling, normalize = found.pooling, found.normalize
    if manifest is not None:
        interface = manifest.interface
    else:
        interface = Interface.of(model, pooling, normalize)
        if found.folder is not None and (found.folder / source.MODULES).is_file():
            kind = "sentence-transformers"
    plain = Plain(model, interface).eval()
    return Served(
        lambda batch: plain(**batch),
        kind,
        found.folder or path,
        interface,
        model.config,
        found.tokenizer,
        max_length=found.max_length if manifest is None else manifest.max_length,
    )


def _graph(folder: Path, kind: str, manifest: Manifest, threads: int | None) -> Served:
    """What is no model of transformers any more."""
    import transformers

    from .. import models  # noqa: F401  registers EfficientBERT with the Auto classes

    quantize = manifest.quantize
    if kind == "onnx":
        name = onnx_export.FILE_INT8 if quantize else onnx_export.FILE
        session = open_session(folder / name, threads)
        function: _Run = partial(run, session)
    else:
        function = _program(folder / torch_export.FILE)
    with quiet():
        try:
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except LOADING_ERRORS as error:
            raise UserError(f"{folder}: config.json is damaged: {first_line(error)}") from error
    tokenizer = source.read_tokenizer(folder, str(folder))
    return Served(
        function,
        kind,
        folder,
        manifest.interface,
        config,
        tokenizer,
        quantize,
        manifest.max_length,
    )


def _program(file: Path) -> _Run:
    try:
        program = torch.export.load(file)
    except Exception as error:  # whatever its reader raises
        raise UserError(
            f"{file} is damaged: {first_line(error)}; export the model again"
        ) from error
    module = program.module()
    return lambda batch: module(**batch)
