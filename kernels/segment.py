"""One elementwise Program over 2-D operands: one kernel, one pass over memory.

    inputs   [rows, columns] each, any strides, also 0 (broadcast row or column vectors, scalars)
    outputs  [rows, columns] each, any strides without overlap; one per output of the Program

Fused: everything between the loads and the stores; intermediate values live in registers, in fp32
(fp64 if an operand is fp64), and are rounded once, to the type of the output. Nothing is saved: a
backward Program recomputes from the inputs, which costs arithmetic that a kernel bound by memory
has to spare.

Two forms of the kernel, generated per Program and *layout*, one letter per operand:

    flat   every operand is one contiguous block in the same order, or a scalar: a 1-D kernel whose
           loads are 16 bytes wide whatever the width of the rows, since only the last block of all
           is masked.
    rows   anything else. Letters: m unit column stride (rows, and row vectors of row stride 0),
           c column vector (column stride 0), s scalar, g both strides general. A run-time width or
           stride would make every load scalar, because the compiler cannot see that it is a
           multiple of the vector width. So both are passed divided by V, the largest power of two
           that divides them all, and multiplied by the constant V inside: 540 columns load 4 at a
           time, 270 load 2, 135 load 1.

Widths and strides are run-time arguments: a new shape compiles only where its V or tile is new.
Why not one flat kernel with the row number from a division: with strided rows it gains no wider
load.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import triton.language as tl

from ..expr import Program
from . import codegen, segment_source, tiles

_INT32_MAX = 2**31 - 1
_MAX_GRID = 65535  # of the second and third dimension
_REMEMBERED = 4096


@dataclass(frozen=True)
class Launch:
    """What one call launches: `kernel[grid](*arguments, **constants)`."""

    kernel: object
    grid: tuple[int, ...]
    arguments: tuple
    constants: dict[str, object]


class _Segment:
    """The kernels of one Program, by form, layout and compute type."""

    def __init__(self, program: Program):
        self.program = program
        self.live = codegen.live_inputs(program)
        self.kernels: dict[tuple[str, str, str], object] = {}

    def kernel(self, form: str, layout: str, compute: str):
        key = (form, layout, compute)
        if key not in self.kernels:
            write = segment_source.flat_text if form == "flat" else segment_source.rows_text
            module = codegen.load("segment", write(self.program, layout, compute))
            self.kernels[key] = getattr(module, segment_source.kernel_name(self.program))
        return self.kernels[key]


_segments: dict[int, _Segment] = {}


def _segment(program: Program) -> _Segment:
    """By identity: hashing a Program costs as much as a launch. Holding it keeps the identity."""
    found = _segments.get(id(program))
    if found is None:
        if len(_segments) >= _REMEMBERED:
            _segments.clear()
        found = _segments[id(program)] = _Segment(program)
    return found


def _strides(tensor: torch.Tensor, rows: int, columns: int, swapped: bool) -> tuple[int, int]:
    """Row and column stride; those of a dimension of one element are as in a contiguous tensor."""
    row, column = tensor.stride()
    if swapped:
        row, column = column, row
    if columns == 1:
        column = 1
    if rows == 1:
        row = columns * column
    return row, column


def _kind(row: int, column: int) -> str:
    if column == 1:
        return "m"  # also a row vector: told apart, it would be loaded wider and change its layout
    if column == 0:
        return "s" if row == 0 else "c"
    return "g"


def plan(
    program: Program, inputs: list[torch.Tensor], outputs: list[torch.Tensor]
) -> Launch | None:
    """The launch that `run` would make; None where there is nothing to compute.

    Raises:
        ValueError: the number of operands is not the Program's, or they are not 2-D of one shape.
    """
    segment = _segment(program)
    if len(inputs) != len(program.inputs) or len(outputs) != len(program.outputs):
        raise ValueError(
            f"the program has {len(program.inputs)} inputs and {len(program.outputs)} outputs, "
            f"not {len(inputs)} and {len(outputs)}"
        )
    used = [inputs[i] for i in segment.live]
    operands = [*used, *outputs]
    shape = outputs[0].shape
    if len(shape) != 2 or any(operand.shape != shape for operand in operands):
        shapes = ", ".join(str(tuple(operand.shape)) for operand in operands)
        raise ValueError(f"operands must be 2-D and of one shape, not {shapes}")
    rows, columns = shape
    if rows == 0 or columns == 0:
        return None
    # The faster axis of the output becomes the columns; [rows, 1] is one row of them.
    row, column = outputs[0].stride()
    swapped = columns == 1 or (rows > 1 and row == 1 and column != 1)
    if swapped:
        rows, columns = columns, rows
    strides = [_strides(operand, rows, columns, swapped) for operand in operands]
    kinds = [_kind(*stride) for stride in strides]
    compute = "tl.float64" if any(x.dtype == torch.float64 for x in operands) else "tl.float32"
    narrowest = min(operand.element_size() for operand in operands)

    flat = all(
        (kind == "s" and i < len(used)) or (kind == "m" and stride[0] == columns)
        for i, (kind, stride) in enumerate(zip(kinds, strides, strict=True))
    )
    if flat:
        tile = tiles.segment_flat(narrowest)
        size = rows * columns
        kernel = segment.kernel("flat", "".join(kinds[: len(used)]), compute)
        constants = {"BLOCK": tile.columns, "num_warps": tile.warps}
        return Launch(kernel, (tiles.ceil_div(size, tile.columns),), (*operands, size), constants)

    divisors = [stride[0] for kind, stride in zip(kinds, strides, strict=True) if kind == "m"]
    vector = math.gcd(columns, *divisors, tiles.VECTOR_BYTES // narrowest)
    tile = tiles.segment_rows(columns, vector)
    arguments = []
    for kind, (row, column) in zip(kinds, strides, strict=True):
        arguments += {"m": [row // vector], "c": [row], "g": [row, column]}.get(kind, [])
    reach = max(tile.rows * abs(row) + tile.columns * abs(column) for row, column in strides)
    constants = {
        "V": vector,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "INDEX": tl.int32 if reach <= _INT32_MAX else tl.int64,
        "num_warps": tile.warps,
    }
    blocks = tiles.ceil_div(rows, tile.rows)
    grid = (
        tiles.ceil_div(columns, tile.columns),
        min(blocks, _MAX_GRID),
        tiles.ceil_div(blocks, _MAX_GRID),
    )
    kernel = segment.kernel("rows", "".join(kinds), compute)
    return Launch(kernel, grid, (*operands, *arguments, rows, columns // vector), constants)


def run(program: Program, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
    """Computes `program` from `inputs` into `outputs`, on the current stream of their device.

    Args:
        program: as built by `forward_program` or `backward_program`, not allocated.
        inputs: one tensor [rows, columns] per input, fp32, fp64, bf16 or fp16, any strides, all on
            one device; those no output depends on are not read.
        outputs: one tensor [rows, columns] per output; written whole.

    Raises:
        ValueError: see `plan`.
    """
    launch = plan(program, inputs, outputs)
    if launch is None:
        return
    target = outputs[0]
    with torch.cuda.device(target.device) if target.is_cuda else nullcontext():
        launch.kernel[launch.grid](*launch.arguments, **launch.constants)
