"""Who serves which call, and why not another.

The backends run the same Programs: `cpp` (csrc, CPU), `triton` (kernels/, CUDA), `cuda` (csrc's
interpreter, CUDA) and `reference` (torch, everywhere). A call takes the first that is there and
takes its tensors. FASTFFN_BACKEND=reference in the environment keeps the others out, to compare or
to rule them out when hunting a defect; FASTFFN_BACKEND=interpreter keeps Triton out.
"""

import contextlib
import contextvars
import functools
import importlib
import json
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import torch  # before _C: both then share torch's OpenMP runtime

from ..errors import UserError
from . import matmul

BUILD_RECORD = Path(__file__).resolve().parent.parent / "_build.json"


def _setting() -> str:
    wanted = os.environ.get("FASTFFN_BACKEND", "")
    if wanted not in ("", "reference", "interpreter"):
        raise UserError(f"FASTFFN_BACKEND={wanted}: it is reference, interpreter, or unset")
    return wanted


def _reference_only() -> bool:
    return _setting() == "reference"


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
    """fastffn.kernels with its kernels loaded, or None; and the reason in words."""
    if _reference_only():
        return None, "FASTFFN_BACKEND=reference"
    if not torch.cuda.is_available():
        return None, "no CUDA device"
    try:
        for name in ("segment", "linear", "residual_norm", "relation"):
            importlib.import_module(f"fastffn.kernels.{name}")
    except ImportError as error:
        return None, f"triton does not import ({error})"
    return importlib.import_module("fastffn.kernels"), "triton imports and a CUDA device is there"


_interpreting = contextvars.ContextVar("fastffn_interpreting", default=False)


def is_interpreting() -> bool:
    """Whether `interpreted` is in force."""
    return _interpreting.get()


@contextlib.contextmanager
def interpreted(wanted: bool = True) -> Iterator[None]:
    """Within it CUDA tensors are served by csrc's interpreter: a new gene costs no compilation.

    What a search wants, which meets a new one every few seconds. A backward is served as its
    forward was. FASTFFN_BACKEND=interpreter does so for a whole process. No effect in a build
    without CUDA, and none on the CPU, where the interpreter always serves.
    """
    token = _interpreting.set(wanted)
    try:
        yield
    finally:
        _interpreting.reset(token)


_portable = contextvars.ContextVar("fastffn_portable", default=False)
_portable_anywhere = False  # of any thread: torch.compile guards on a global, on no ContextVar
_portable_blocks = 0
_portable_lock = threading.Lock()


@contextlib.contextmanager
def portable() -> Iterator[None]:
    """Within it every op and layer runs as torch's own functions, by the references.

    What is traced within it holds standard operations and none of fastffn's, so that it can be
    exported, or run where fastffn is not; `torch.export` and `torch.onnx` trace so by themselves.
    torch.compile compiles this form and the other apart: call what it returns within this too.
    Dropout without a seed is torch's own here.
    """
    global _portable_anywhere, _portable_blocks
    with _portable_lock:
        _portable_blocks += 1
        _portable_anywhere = True
    token = _portable.set(True)
    try:
        yield
    finally:
        _portable.reset(token)
        with _portable_lock:
            _portable_blocks -= 1
            _portable_anywhere = _portable_blocks > 0


def is_portable() -> bool:
    """Whether `portable` is in force, or an export is under way."""
    return torch.compiler.is_exporting() or (_portable_anywhere and _is_portable_here())


def _is_portable_here() -> bool:
    return _portable.get()


# As elementwise.constant_result: the compiler calls it, since it cannot trace a ContextVar.
_is_portable_here._dynamo_marked_constant = True


def cuda_engine() -> str:
    """Who serves CUDA tensors: "triton", "cuda" (csrc's interpreter) or "reference"."""
    module = cpp()[0]
    interpreter = module is not None and hasattr(module, "cuda_elementwise")
    wanted = is_interpreting() or _setting() == "interpreter"
    if interpreter and (wanted or triton()[0] is None):
        return "cuda"
    return "reference" if triton()[0] is None else "triton"


def relation_engine(tensors: Sequence[torch.Tensor]) -> str:
    """Who serves relations of these: "cpp", "triton" or "reference".

    Relations have no Program: csrc has no CUDA kernel of them, and Triton compiles one for each
    head width, not for each gene.
    """
    if tensors[0].is_cpu:
        return "reference" if cpp()[0] is None else "cpp"
    suits = tensors[0].is_cuda and all(x.dtype != torch.float64 for x in tensors)
    return "triton" if suits and _relations_on_triton() else "reference"


def _relations_on_triton() -> bool:
    return _setting() != "interpreter" and triton()[0] is not None


def explain() -> list[tuple[str, str, str, str]]:
    """Rows (op, device, backend that serves it, reason), for `fastffn doctor`."""
    module, reason = cpp()
    on_cpu = ("cpu", "cpp" if module else "reference", reason)
    on_cuda = ("cuda", *_explain_cuda())
    ops = ("elementwise", "residual_norm", "ffn")
    rows = [(op, *row) for op in ops for row in (on_cpu, on_cuda)]
    if torch.cuda.is_available() and not _relations_on_triton():
        on_cuda = ("cuda", "reference", "a few heads at a time; only Triton has a kernel for CUDA")
    rows += [("relation", *row) for row in (on_cpu, on_cuda)]
    on_cuda = ("cuda", *_explain_cuda())
    if torch.cuda.is_available():
        on_cuda = ("cuda", "reference", "one sequence at a time, by torch")
    rows += [("attention", *row) for row in (on_cpu, on_cuda)]
    return [*rows, ("linear", "cpu", "torch", matmul.explain())]


def _explain_cuda() -> tuple[str, str]:
    """Who serves CUDA tensors, and why."""
    reason = triton()[1]
    if not torch.cuda.is_available():
        return "none", reason
    engine = cuda_engine()
    if engine == "cuda" and triton()[0] is not None:
        return engine, "csrc's interpreter, by FASTFFN_BACKEND=interpreter"
    return engine, reason
