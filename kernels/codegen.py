"""Programs as Triton source: one line of text per instruction, kept in real files.

`function_text` prints a Program as a Triton function whose lines are the formulas of
csrc/primitives.def; a kernel calls it on tiles of any shape. `load` writes a whole generated
module to a file that is named by the hash of its content, and imports it.

Why text and not a kernel that takes the functions as constexpr arguments: Triton's cache key holds
a tuple of functions only by their names, so a kernel compiled for an older body comes back. A new
text is a new file and a new key. Why files and not `exec` alone: Triton reads the source of what
it compiles, and profilers and error messages point at a line that can be opened.
"""

import hashlib
import importlib.util
import os
import re
import sys
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType

from ..expr import Instruction, Program
from ..expr.primitives import opcode
from ..files import write_text_atomic

PREAMBLE = """\
import triton
import triton.language as tl

from fastffn.kernels.math import erf, exp, expm1, maximum, sigmoid, tanh, where  # noqa: F401
"""

_CONSTANT = re.compile(r"\bC\(([^()]*)\)")
_OPERAND = re.compile(r"\b[gabty]\b")


def read_sources(instruction: Instruction) -> set[int]:
    """The registers that an instruction reads; an unread source repeats another."""
    op = opcode(instruction.op)
    reads = op.primitive.reads(op.slot)
    return {
        source
        for letter, source in zip(op.operands, instruction.sources, strict=False)
        if letter in reads
    }


def live_inputs(program: Program) -> tuple[int, ...]:
    """Positions of the inputs that some output depends on; the others need not be loaded."""
    needed = set(program.outputs)
    for instruction in reversed(program.instructions):
        if instruction.target in needed:
            needed |= read_sources(instruction)
    return tuple(i for i in range(len(program.inputs)) if i in needed)


def instruction_lines(program: Program) -> list[str]:
    """`r5 = r3 * r4`: one assignment per instruction, over registers r0, r1, ..."""
    lines = []
    for instruction in program.instructions:
        op = opcode(instruction.op)
        register = dict(zip(op.operands, instruction.sources, strict=False))
        text = _CONSTANT.sub(r"\1", op.formula)
        text = _OPERAND.sub(lambda match, register=register: f"r{register[match[0]]}", text)
        lines.append(f"r{instruction.target} = {text}")
    return lines


def function_text(program: Program, name: str = "program") -> str:
    """A Triton function called `name` that computes `program`, as built (not allocated).

    Its parameters are the live inputs, in order, as tensors of one shape or broadcastable; it
    returns the output, or a tuple of them when there are several.
    """
    parameters = ", ".join(f"r{i}" for i in live_inputs(program))
    results = ", ".join(f"r{i}" for i in program.outputs)
    body = [*instruction_lines(program), f"return {results}"]
    return "\n".join(
        ["@triton.jit", f"def {name}({parameters}):", *(f"    {line}" for line in body), ""]
    )


def describe(program: Program) -> str:
    """The operations of `program` as an identifier, for the names that profilers show."""
    ops = (instruction.op.replace(".", "_") for instruction in program.instructions)
    return "_".join(ops)[:64] or "copy"


def cache_folder() -> Path:
    """Where generated modules lie: $FASTFFN_CACHE, else fastffn/ in the user's cache folder."""
    if chosen := os.environ.get("FASTFFN_CACHE"):
        return Path(chosen) / "triton"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fastffn" / "triton"


@cache
def _private_folder() -> tempfile.TemporaryDirectory:
    """Where the cache folder cannot be written: a folder that goes with the process."""
    return tempfile.TemporaryDirectory(prefix="fastffn-")


def _write(name: str, text: str) -> Path:
    path = cache_folder() / f"{name}.py"
    try:
        # Compared, not trusted: a file that was cut short or edited is replaced.
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_text_atomic(path, text)
    except OSError:
        path = Path(_private_folder().name) / f"{name}.py"
        path.write_text(text, encoding="utf-8")
    return path


@cache
def load(stem: str, text: str) -> ModuleType:
    """The module whose source is `text`, from a file `<stem>_<hash>.py` that processes share."""
    name = f"{stem}_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    path = _write(name, text)
    spec = importlib.util.spec_from_file_location(f"fastffn.kernels.generated.{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # inspect, and so Triton, looks the source up by module
    # Not spec.loader.exec_module: it would take bytecode that lies there for this text.
    exec(compile(text, str(path), "exec"), module.__dict__)
    return module
