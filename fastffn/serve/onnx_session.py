"""An ONNX file in onnxruntime: opened, and run on tensors."""

import os
from collections.abc import Mapping
from importlib import util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError


def require(*modules: str) -> None:
    """Raises a UserError with the remedy unless the packages are installed."""
    absent = [name for name in modules if util.find_spec(name) is None]
    if absent:
        are = "is" if len(absent) == 1 else "are"
        raise UserError(f'{", ".join(absent)} {are} not installed: pip install "fastffn[onnx]"')


def open_session(path: Path, threads: int | None = None) -> Any:
    """An InferenceSession on the CPU; one may run in several threads at once.

    Args:
        threads: of each run; None: one for each core.

    Raises:
        UserError: onnxruntime is not installed, or cannot read the file.
    """
    require("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors
    # What onnxruntime raises has no base class of its own beyond RuntimeError, if even that.
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        said = str(error).strip().split("\n", 1)[0]
        raise UserError(f"{path} is no ONNX file that onnxruntime can run: {said}") from error


def run(session: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The outputs by name; the batch has just the session's inputs, int64, on the CPU."""
    names = [output.name for output in session.get_outputs()]
    arrays = {name: tensor.numpy() for name, tensor in batch.items()}
    return dict(zip(names, map(torch.from_numpy, session.run(names, arrays)), strict=True))
