"""Ahead-of-time compilation of Triton kernels, for tests on machines without a GPU.

    compiled = aot.compile(kernel, [tensor, tensor, 540], {"BLOCK": 1024, "num_warps": 4}, "sm_90")
    compiled.registers, compiled.spills, compiled.shared, compiled.count("LDG.E.128")

The arguments are those of a launch: tensors of any device (only their type and alignment are
looked at), `Pointer` where there is no tensor, and numbers; so a kernel is compiled with the very
specialisation of the launch.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

TARGETS = ("sm_80", "sm_90", "sm_100")
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}  # bytes per block
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Pointer:
    """Stands for a tensor of `dtype` at an address that is a multiple of `alignment` bytes only."""

    dtype: torch.dtype
    alignment: int = 16

    def data_ptr(self) -> int:
        return self.alignment


@dataclass(frozen=True)
class Compiled:
    """Machine code of one kernel and what it needs.

    Attributes:
        target: such as "sm_90".
        cubin: the binary.
        shared: bytes of shared memory per block.
    """

    target: str
    cubin: bytes
    shared: int

    @cached_property
    def sass(self) -> str:
        """The machine code as text, after a line with the resources."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:  # cuobjdump reads no pipes
            file.write(self.cubin)
            file.flush()
            command = [_CUOBJDUMP, "--dump-resource-usage", "--dump-sass", file.name]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    @property
    def registers(self) -> int:
        """Registers per thread."""
        return int(re.search(r"\bREG:(\d+)", self.sass)[1])

    @cached_property
    def instructions(self) -> list[str]:
        """Opcodes with modifiers ("LDG.E.128"), in order, without the padding."""
        found = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", self.sass)
        return [name for name in found if name not in ("NOP", "BRA")]

    @property
    def spills(self) -> int:
        """Loads from and stores to local memory: registers that did not suffice."""
        return self.count("LDL") + self.count("STL")

    def count(self, prefix: str) -> int:
        """How many instructions start with `prefix`, up to a dot."""
        return sum(f"{name}.".startswith(f"{prefix}.") for name in self.instructions)

    def widest(self, kind: str) -> int:
        """Bits of the widest instruction of `kind` ("LDG" or "STG"); 0 if there is none."""
        widths = [0]
        for name in self.instructions:
            parts = name.split(".")
            if parts[0] == kind:
                sizes = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
                widths.append(next((sizes[part] for part in parts if part in sizes), 32))
        return max(widths)


def compile(kernel, arguments, constants, target: str) -> Compiled:
    """Compiles `kernel` for `target` as `kernel[grid](*arguments, **constants)` would.

    Args:
        kernel: a `triton.jit` function (not one of the interpreter).
        arguments: tensors, `Pointer`s and numbers, in the order of the parameters.
        constants: the constexpr parameters and the options (num_warps, num_stages) by name.
        target: one of `TARGETS`.
    """
    gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    backend = make_backend(gpu)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*arguments, **constants)
    packed = kernel._pack_args(backend, dict(constants), bound, specialization, options)
    options, signature, constexprs, attributes = packed
    source = ASTSource(kernel, signature, constexprs, attributes)
    binary = triton.compile(source, target=gpu, options=options.__dict__)
    return Compiled(target, binary.asm["cubin"], binary.metadata.shared)
