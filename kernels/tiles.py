"""Block sizes and warps by formula: the same shape takes the same kernel on every machine and run.

Autotuning would stall the first call of every new expression and shape. The formulas come from what
ahead-of-time compilation shows (registers, spills, vector width) and from traffic arithmetic; not
measured on a GPU.
"""

from dataclasses import dataclass
from functools import cache

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


@dataclass(frozen=True)
class ProductTile:
    """One block computes `rows` x `columns` of a matrix product with `warps` warps.

    `depth` terms of the sums are added at a time; `stages` such pieces of both factors are in
    flight in shared memory. An epilogue takes the tile in 2^halvings parts, one after the other.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    halvings: int = 0


_FILLED = 128  # blocks from which on a device counts as filled (an H100 has 132 multiprocessors)


@cache
def linear(
    M: int,
    N: int,
    K: int,
    item: int,
    matrices: int = 2,
    vector: int = 4,
    width: int = VECTOR_BYTES,
) -> ProductTile:
    """Tile of a product [M, K] x [K, N] of items of `item` bytes, on any GPU.

    16-bit: 128 x 64, which computes 576 columns for N = 540 where 128 wide computes 640; wider
    tiles spill. 32-bit: 64 x 64, since arithmetic without tensor cores keeps operands in registers.
    Tiles are halved as long as they leave multiprocessors idle.

    The epilogue takes 16 elements of each matrix at a time per thread, because the whole tile at
    once spilled; 8 where it holds more than five `matrices` (products, extras and results), or
    needs many addresses because less than four elements are loaded at a time (`vector`). Factors
    of which less than 4 bytes can be loaded at a time (`width`, in bytes) come by way of registers,
    and so are fetched in smaller pieces.

    The rows depend on M, N and `item` only: callers allocate partial sums by them.
    """
    rows = 128 if item == 2 else 64
    columns = max(16, min(64, next_power_of_2(N)))
    while rows > 32 and ceil_div(M, rows) * ceil_div(N, columns) < _FILLED:
        rows //= 2
    if columns == 64 and ceil_div(M, rows) * ceil_div(N, columns) < _FILLED:
        columns = 32
    warps = 8 if rows == 128 else 4
    parts = rows * columns // (warps * WARP * (8 if matrices > 5 or vector < 4 else 16))
    halvings = parts.bit_length() - 1 if parts else 0
    return ProductTile(rows, columns, _depth(K, item, width), warps, 3, halvings)


def weight_gradient(N: int, K: int, item: int, width: int = VECTOR_BYTES) -> ProductTile:
    """Tile of a weight gradient [N, K] as in `linear`; `depth` is the rows of a step."""
    rows, columns = (max(16, min(64, next_power_of_2(size))) for size in (N, K))
    return ProductTile(rows, columns, _depth(64, item, width), 4, 3)


def _depth(terms: int, item: int, width: int) -> int:
    return max(16, min(32 if item == 4 or width < 4 else 64, next_power_of_2(terms)))


def parts_of_rows(M: int, N: int, K: int, tile: ProductTile) -> tuple[int, int]:
    """Into how many parts a weight gradient splits M rows, as (steps of each part, parts).

    Enough that all multiprocessors have several blocks, but at least four steps to a part.
    """
    blocks = ceil_div(N, tile.rows) * ceil_div(K, tile.columns)
    steps = ceil_div(M, tile.depth)
    most = max(4, steps // ceil_div(4 * _FILLED, blocks))
    each = 1 << (min(most, max(4, steps)).bit_length() - 1)
    return each, ceil_div(steps, each)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


@dataclass(frozen=True)
class RowTile:
    """One step of a row kernel: `rows` rows, `width` columns at a time, by `warps` warps.

    A thread loads `vector` columns at a time.
    """

    vector: int
    rows: int
    width: int
    warps: int


_PIECES = 8  # of a row; the time to compile grows with their square


def residual_norm(columns: int, widest: int, elements: int) -> RowTile:
    """Tile of the row kernel.

    A row belongs to one warp while a thread then holds at most `elements` of it, else to the fewest
    warps that do: within a warp, sums over a row are shuffles without a barrier. Of short rows a
    warp takes several. Loads are as wide as possible (`widest`, in columns), unless narrower ones,
    of at least two columns, compute much fewer columns beyond the last: 384 columns in bf16 are one
    and a half times what a warp loads in 16 bytes each, and three times what it loads in 8.
    """

    def tile(vector: int) -> RowTile:
        lanes = min(WARP, next_power_of_2(ceil_div(columns, vector)))
        per_row = 1
        while per_row < 16 and ceil_div(columns, WARP * per_row * vector) > min(
            _PIECES, elements // vector
        ):
            per_row *= 2
        width = lanes * per_row * vector
        warps = max(_WARPS, per_row)
        return RowTile(vector, warps // per_row * (WARP // lanes), width, warps)

    def computed(tile: RowTile) -> int:
        return ceil_div(columns, tile.width) * tile.width

    best = tile(widest)
    vector = widest // 2
    while vector >= 2:
        narrower = tile(vector)
        if computed(narrower) * 8 <= computed(best) * 7:
            best = narrower
        vector //= 2
    return best


def residual_norm_chunks(rows: int, processors: int) -> int:
    """Into how many ranges of rows the column sums are split, on so many multiprocessors.

    Two blocks fit on a multiprocessor by their registers, and at least eight rows to a range keep
    the partial sums short beside what they are sums of.
    """
    return max(1, min(2 * processors, ceil_div(rows, 8)))


@dataclass(frozen=True)
class RelationTile:
    """One block takes `rows` tokens of a head with `warps` warps, `keys` other tokens at a time.

    `stages` tiles of the others are in flight in shared memory. The forward multiplies heads in
    pieces of `depth` columns; 0: whole.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    depth: int


@cache
def relation(length: int, row_bytes: int, values: int, tensor_cores: bool) -> RelationTile:
    """Tile of a relation kernel.

    With tensor cores a warp has 16 rows, as their layout deals them out. Without, operands of
    products are in registers: more warps, and heads in pieces. Of a short sequence a block is as
    small as the sequence.

    Args:
        row_bytes: of one token's head, student and teacher, padded.
        values: of an element that a thread holds at a time: two scores, and what else lives long;
            more where several loops hold operands of products in registers.
    """
    rows = max(16, min(64, next_power_of_2(length)))
    if not tensor_cores:
        rows = min(rows, 32 if row_bytes >= 512 else 64)
        return RelationTile(rows, min(32, rows), min(8, rows // 4), 3 if rows == 64 else 2, 16)
    keys = min(rows, 32 if values > 5 or values * row_bytes > 512 else 64)
    return RelationTile(rows, keys, rows // 16, 3 if keys * row_bytes < 16 * 1024 else 2, 0)
