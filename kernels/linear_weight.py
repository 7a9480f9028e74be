"""Weight gradients: out = dz^T x, a product whose sums run over the rows of both factors.

    dz   [M, N]   x [M, K]   any strides   ->   out [N, K], any strides

M is long and the result small (540 x 540 is 81 tiles for more than 100 multiprocessors), so M is
split: each part writes its product in fp32, and torch adds the parts in a fixed order. No atomics:
equal inputs give equal bits. A part is a power of two of steps, so that another M seldom compiles.

Both factors are loaded along their dense direction, with strides divided by V as in `linear`; the
tensor cores take dz transposed.
"""

import math
from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import tiles
from .linear_operands import (
    DTYPES,
    INT32_MAX,
    misalignment,
    moved,
    precision,
    readable,
    strides,
    vector,
)
from .segment import Launch


@triton.jit(do_not_specialize=["z_row", "x_row", "z_shift", "x_shift", "out_row", "rows"])
def weight_gradient_part(
    dz, x, out, z_row, z_column, z_shift, x_row, x_column, x_shift, out_row, out_column, rows,
    N: tl.constexpr, K: tl.constexpr, READABLE_N: tl.constexpr, READABLE_K: tl.constexpr,
    VZ: tl.constexpr, VX: tl.constexpr, V: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STEPS: tl.constexpr,
    PRECISION: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """One tile of `out` summed over one part of the rows, into out[part]."""
    tile = tl.program_id(0)
    part = tl.program_id(1).to(tl.int64)
    column_tiles = (K + COLUMNS - 1) // COLUMNS
    n = (tile // column_tiles).to(tl.int64) * ROWS
    k = (tile % column_tiles).to(tl.int64) * COLUMNS
    row = part * (STEPS * DEPTH)
    z_step = z_row.to(tl.int64) * VZ
    x_step = x_row.to(tl.int64) * VX
    dz += row * z_step + n * z_column + z_shift * VZ
    x += row * x_step + k * x_column + x_shift * VX
    m = tl.arange(0, DEPTH)
    i = tl.arange(0, ROWS)[:, None]
    j = tl.arange(0, COLUMNS)[None, :]
    # dz is loaded as its transpose: sm_80 cannot fetch it ahead if it is transposed afterwards.
    z_offsets = i.to(INDEX) * z_column + m[None, :].to(INDEX) * (z_row.to(INDEX) * VZ)
    x_offsets = m[:, None].to(INDEX) * (x_row.to(INDEX) * VX) + j.to(INDEX) * x_column
    z_live = i < READABLE_N - n
    x_live = j < READABLE_K - k
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for at in range(0, STEPS * DEPTH, DEPTH):
        live = m < rows - row - at
        z_tile = tl.load(dz + z_offsets, mask=z_live & live[None, :], other=0.0)
        x_tile = tl.load(x + x_offsets, mask=x_live & live[:, None], other=0.0)
        total = tl.dot(z_tile, x_tile, total, input_precision=PRECISION)
        dz += DEPTH * z_step
        x += DEPTH * x_step
    out += part * (N * K) + n * (out_row.to(tl.int64) * V) + k * out_column
    out += i.to(INDEX) * (out_row.to(INDEX) * V) + j.to(INDEX) * out_column
    tl.store(out, total.to(out.dtype.element_ty), mask=(i < N - n) & (j < K - k))


class _Rows(NamedTuple):
    """A factor as the kernel sees it.

    Attributes:
        tensor: moved back by `shift` elements to an aligned address.
        row, column: strides; divided by V as the shift is.
        V: elements of one load.
        readable: columns that may be read V at a time.
    """

    tensor: torch.Tensor
    row: int
    column: int
    shift: int
    V: int
    readable: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "_Rows":
        row, column = strides(tensor)
        if column != 1:
            return cls(tensor, row, column, 0, 1, tensor.shape[1])
        shift = misalignment(tensor)
        V = vector([tensor], row, shift)
        reach = readable(tensor, row, V)
        V = math.gcd(V, reach)
        return cls(moved(tensor, shift), row // V, column, shift // V, V, reach)


def plan_weight_gradient(dz: torch.Tensor, x: torch.Tensor, out: torch.Tensor) -> Launch | None:
    """The launch for `weight_gradient`; None where there is nothing to add.

    Its third argument is where the parts go: `out`, or a new fp32 tensor [parts, N, K] if there are
    several.

    Raises:
        ValueError: operands of the wrong shape or type.
    """
    (M, N), K = dz.shape, x.shape[1]
    if x.shape[0] != M or tuple(out.shape) != (N, K):
        shapes = ", ".join(str(tuple(t.shape)) for t in (dz, x, out))
        raise ValueError(f"operands must be [M, N], [M, K] and [N, K], not {shapes}")
    if dz.dtype not in DTYPES or x.dtype != dz.dtype:
        raise ValueError(f"factors must be fp32, bf16 or fp16 alike, not {dz.dtype} and {x.dtype}")
    if 0 in (M, N, K):
        return None
    z, right = _Rows.of(dz), _Rows.of(x)
    item = dz.element_size()
    tile = tiles.weight_gradient(N, K, item, min(z.V, right.V) * item)
    steps, parts = tiles.parts_of_rows(M, N, K, tile)
    place = out if parts == 1 else torch.empty((parts, N, K), dtype=torch.float32, device=dz.device)
    row, column = strides(place if parts == 1 else place[0])
    V = vector([place], row, K) if column == 1 else 1
    spans = [
        tile.depth * z.row * z.V + tile.rows * z.column,
        tile.depth * right.row * right.V + tile.columns * right.column,
        tile.rows * row + tile.columns * column,
    ]
    numbers = [z.row, z.column, z.shift, right.row, right.column, right.shift]
    numbers += [row // V, column, M]
    constants = {
        "N": N,
        "K": K,
        "READABLE_N": z.readable,
        "READABLE_K": right.readable,
        "VZ": z.V,
        "VX": right.V,
        "V": V,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "DEPTH": tile.depth,
        "STEPS": steps,
        "PRECISION": precision(dz.dtype),
        "INDEX": tl.int32 if max(spans) <= INT32_MAX else tl.int64,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    grid = (tiles.ceil_div(N, tile.rows) * tiles.ceil_div(K, tile.columns), parts)
    return Launch(weight_gradient_part, grid, (z.tensor, right.tensor, place, *numbers), constants)


def weight_gradient(dz: torch.Tensor, x: torch.Tensor, out: torch.Tensor) -> None:
    """out = dz^T x on the current stream of the operands' device; the same bits every time.

    Args:
        dz: [M, N], fp32, bf16 or fp16, any strides.
        x: [M, K] of the same type, any strides.
        out: [N, K], fp32, bf16 or fp16, any strides, written whole; rounded once, from fp32.

    Raises:
        ValueError: operands of the wrong shape or type.
    """
    launch = plan_weight_gradient(dz, x, out)
    if launch is None:
        out.zero_()
        return
    with torch.cuda.device(dz.device) if dz.is_cuda else nullcontext():
        launch.kernel[launch.grid](*launch.arguments, **launch.constants)
        place = launch.arguments[2]
        if place is not out:
            out.copy_(place.sum(0))
