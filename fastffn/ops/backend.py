"""Who serves which call, and why not another.

Three backends run the same Programs: `cpp` (csrc, CPU), `triton` (kernels/, CUDA) and `reference`
(torch, everywhere). A call takes the first that is there and takes its tensors.
FASTFFN_BACKEND=reference in the environment keeps the other two out, to compare or to rule them
out when hunting a defect.
"""

import functools
import importlib
import json
import os
from pathlib import Path
from types import ModuleType

import torch  # before _C: both then share torch's OpenMP runtime

from ..errors import UserError

BUILD_RECORD = Path(__file__).resolve().parent.parent / "_build.json"


def _reference_only() -> bool:
    wanted = os.environ.get("FASTFFN_BACKEND", "")
    if wanted not in ("", "reference"):
        raise UserError(f"FASTFFN_BACKEND={wanted}: it is reference, or unset")
    return wanted == "reference"


@functools.cache
def cpp() -> tuple[ModuleType | None, str]:
    """The extension module, or None; and the reason in words.

    Raises:
        UserError: the environment asks for a backend or an instruction set that is not there.
    """
    if _reference_only():
        return None, "FASTFFN_BACKEND=reference"
    try:
        module = importlib.import_module("fastffn._C")
    except ImportError as error:
        return None, _why_absent(error)
    try:
        return module, f"built, runs on {module.isa()}"
    except ValueError as error:
        raise UserError(f"FASTFFN_ISA: {error}") from None


def _why_absent(error: ImportError) -> str:
    """The build's own word if there is one: an absent extension was not built or cannot load."""
    try:
        record = json.loads(BUILD_RECORD.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"not built ({error})"
    return f"not built: {record['error']}" if record.get("error") else f"does not load ({error})"


@functools.cache
def triton() -> tuple[ModuleType | None, str]:
    """The module of generated elementwise kernels, or None; and the reason in words."""
    if _reference_only():
        return None, "FASTFFN_BACKEND=reference"
    if not torch.cuda.is_available():
        return None, "no CUDA device"
    try:
        module = importlib.import_module("fastffn.kernels.segment")
    except ImportError as error:
        return None, f"triton does not import ({error})"
    return module, "triton imports and a CUDA device is there"


def explain() -> list[tuple[str, str, str, str]]:
    """Rows (op, device, backend that serves it, reason), for `fastffn doctor`."""
    module, reason = cpp()
    rows = [("elementwise", "cpu", "cpp" if module else "reference", reason)]
    module, reason = triton()
    rows.append(("elementwise", "cuda", "triton" if module else "reference", reason))
    rows += [
        ("relation_kl", device, "torch", "chunked torch operations on every device")
        for device in ("cpu", "cuda")
    ]
    rows += [
        ("linear", device, "torch", "matrix products are torch's") for device in ("cpu", "cuda")
    ]
    return rows
