"""Weight gradients: out = dz^T x, a product whose sums run over the rows of both factors.

    dz   [M, N]   x [M, K]   any strides   ->   out [N, K], any strides

M is long and the result small (540 x 540 is 81 tiles for more than 100 multiprocessors), so M is
split: each part writes its product in fp32, and torch adds the parts in a fixed order. No atomics:
equal inputs give equal bits. A part is a power of two of steps, so that another M seldom compiles.

Rows are loaded as they lie, both factors along their dense direction, with strides divided by V as
in `linear`; the tensor cores take dz transposed.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from . import tiles
from .linear_operands import (
    DTYPES,
    INT32_MAX,
    capability,
    precision,
    readable,
    strides,
    vector,
)
from .segment import Launch


@triton.jit(do_not_specialize=["z_row", "x_row", "out_row", "out_part", "rows"])
def weight_gradient_part(
    dz, x, out, z_row, z_column, x_row, x_column, out_row, out_column, out_part, rows,
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
    dz += row * z_step + n * z_column
    x += row * x_step + k * x_column
    m = tl.arange(0, DEPTH)[:, None]
    i = tl.arange(0, ROWS)[None, :]
    j = tl.arange(0, COLUMNS)[None, :]
    z_offsets = m.to(INDEX) * (z_row.to(INDEX) * VZ) + i.to(INDEX) * z_column
    x_offsets = m.to(INDEX) * (x_row.to(INDEX) * VX) + j.to(INDEX) * x_column
    z_live = i < READABLE_N - n
    x_live = j < READABLE_K - k
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for at in range(0, STEPS * DEPTH, DEPTH):
        live = m < rows - row - at
        z_tile = tl.load(dz + z_offsets, mask=live & z_live, other=0.0)
        x_tile = tl.load(x + x_offsets, mask=live & x_live, other=0.0)
        total = tl.dot(tl.trans(z_tile), x_tile, total, input_precision=PRECISION)
        dz += DEPTH * z_step
        x += DEPTH * x_step
    i = tl.arange(0, ROWS)[:, None]
    out += part * out_part + n * (out_row.to(tl.int64) * V) + k * out_column
    out += i.to(INDEX) * (out_row.to(INDEX) * V) + j.to(INDEX) * out_column
    tl.store(out, total.to(out.dtype.element_ty), mask=(i < N - n) & (j < K - k))


def _rows(tensor: torch.Tensor) -> tuple[int, int, int, int]:
    """Row stride divided by V, column stride, V, and the columns that may be read V at a time."""
    row, column = strides(tensor)
    if column != 1:
        return row, column, 1, tensor.shape[1]
    width = vector([tensor], row)
    reach = readable(tensor, row, width)
    if reach % width:
        width = vector([tensor], row, reach)
    return row // width, column, width, reach


def plan_weight_gradient(
    dz: torch.Tensor, x: torch.Tensor, out: torch.Tensor, target: tuple[int, int] | None = None
) -> Launch | None:
    """The launch for `weight_gradient` on a device of compute capability `target`.

    Its third argument is where the parts go: `out`, or a new fp32 tensor [parts, N, K] if there are
    several. None where there is nothing to add.

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
    target = target or capability(dz.device)
    tile = tiles.weight_gradient(N, K, dz.element_size(), target)
    steps, parts = tiles.parts_of_rows(M, N, K, tile)
    z_row, z_column, VZ, reach_n = _rows(dz)
    x_row, x_column, VX, reach_k = _rows(x)
    place = out if parts == 1 else torch.empty((parts, N, K), dtype=torch.float32, device=dz.device)
    row, column = strides(place if parts == 1 else place[0])
    V = vector([place], row, K) if column == 1 else 1
    spans = [
        tile.depth * z_row * VZ + tile.rows * z_column,
        tile.depth * x_row * VX + tile.columns * x_column,
        tile.rows * row + tile.columns * column,
    ]
    numbers = [z_row, z_column, x_row, x_column, row // V, column, N * K, M]
    constants = {
        "N": N,
        "K": K,
        "READABLE_N": reach_n,
        "READABLE_K": reach_k,
        "VZ": VZ,
        "VX": VX,
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
    return Launch(weight_gradient_part, grid, (dz, x, place, *numbers), constants)


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
