"""Block sizes and warps by formula: the same shape takes the same kernel on every machine and run.

Autotuning would stall the first call of every new expression and shape. The formulas come from what
ahead-of-time compilation shows (registers, spills, vector width) and from traffic arithmetic; not
measured on a GPU.
"""

from dataclasses import dataclass

WARP = 32
_WARPS = 4  # of an elementwise block: small blocks fill the last wave better
VECTOR_BYTES = 16  # widest load of one thread


@dataclass(frozen=True)
class Tile:
    """One block of the grid computes `rows` x `columns` elements with `warps` warps."""

    rows: int
    columns: int
    warps: int


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def segment_flat(narrowest: int) -> Tile:
    """Tile of the elementwise kernel on contiguous tensors; `narrowest`: smallest item, in bytes.

    Every thread loads 16 bytes of the narrowest operand at a time: elementwise kernels live from
    the bytes in flight, and more elements per thread cost registers, that is, threads.
    """
    return Tile(1, WARP * _WARPS * max(2, min(8, VECTOR_BYTES // narrowest)), _WARPS)


def segment_rows(columns: int, vector: int) -> Tile:
    """Tile of the elementwise kernel on strided rows: `columns` elements, `vector` to a load.

    Of the power-of-two widths the widest one that computes at most an eighth too many columns (540:
    64 wide, 576 computed), else the one that wastes least. Not below a warp, so that a warp reads
    long runs of memory. A thread has four elements, or one vector where that is more.
    """
    elements = WARP * _WARPS * max(4, vector)

    def waste(width: int) -> float:
        return ceil_div(columns, width) * width / columns - 1

    widths = [width for width in (512, 256, 128, 64, 32) if width <= elements]
    width = next((width for width in widths if waste(width) <= 1 / 8), None)
    if width is None:
        width = min(widths, key=waste)
    return Tile(elements // width, width, _WARPS)
