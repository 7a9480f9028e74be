"""Relations between tokens, compared between two models: no map of length x length in memory.

Per example and relation head (a slice of the last dimension), over the real tokens only:

    S_ij = scale   a_i . b_j      student         R = softmax_j(S)
    T_ij = scale_t ta_i . tb_j    teacher         P = softmax_j(T)

    divergence           value of row i                G_ij, for dA = scale G b, dB = scale G^T a
    "kl"                 sum_j P (log P - log R)       w_i (R - P)
    "reverse_kl"         sum_j R (log R - log P)       w_i R (S - T - m_i),   m_i = sum_j R (S - T)
    "probability_mse"    sum_j (R - P)^2               w_i R (c - sum_j R c), c = 2 (R - P)
    "score_mse"          sum_j (S - T)^2               2 w_i (S - T)

    a, b, da, db   [batch, length, heads * d]     fp32, bf16 or fp16, any strides
    ta, tb         [batch, length, heads * d_t]   likewise; of another type if need be
    real           [batch, length] bool, or None: all real
    rows, weights  [batch, heads, length] fp32    values in nats; w, 0 at padding
    stats          [stats_count(divergence), batch, heads, length] fp32

b and tb are None for a self relation (b = a, tb = ta).

Fused: everything from the inputs to the values of the rows, and from the inputs and `stats` to the
gradients; scores exist for one tile at a time, in fp32. How: `relation_forward`,
`relation_backward`; padding: `relation_tokens`. `stats` is for `backward` alone: maxima, inverse
sums and means of the rows, in the order of the real tokens. Equal inputs give equal bits.

A head's width is a constant of the kernel and padded in registers and shared memory only. Across
tokens strides are passed divided by V, so that loads are as wide as strides and head widths allow:
16 bytes at widths that 8 items of 16 bits divide, 8 at 12 items, 4 at 6, 2 at 45.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache

import torch
import triton.language as tl
from torch import Tensor

from . import tiles
from .linear_operands import DTYPES, INT32_MAX, precision
from .relation_backward import HEAD_NUMBERS, relation_backward, relation_factors
from .relation_forward import relation_forward
from .relation_tokens import real_tokens
from .segment import Launch

_STATS = {"kl": 4, "reverse_kl": 4, "probability_mse": 5, "score_mse": 0}
_LOG2_E = math.log2(math.e)
_SMALLEST = 16  # of a dimension of a product
_SCAN = 1024  # tokens that one step of the kernels over whole rows takes


def stats_count(divergence: str) -> int:
    """The first dimension of `stats`."""
    if divergence not in _STATS:
        raise ValueError(f"divergence {divergence!r}: it is one of {', '.join(_STATS)}")
    return _STATS[divergence]


@cache
def _capability(device: torch.device) -> int:
    """Major number of the device's compute capability."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Of batch, tokens, columns; that of a dimension of one element is what suits."""
    batch, token, column = x.stride()
    return batch * (x.shape[0] > 1), token * (x.shape[1] > 1), 1 if x.shape[2] == 1 else column


class _Side:
    """Operands of one width: the student's, the teacher's, or a gradient.

    Attributes:
        width: of a head; `padded` in the tile.
        vector: elements of one load.
        numbers: strides of all tensors, in order.
    """

    def __init__(self, tensors: Sequence[Tensor], heads: int):
        x = tensors[0]
        self.dtype, self.width = x.dtype, x.shape[2] // heads
        self.padded = max(_SMALLEST, tiles.next_power_of_2(self.width))
        strides = [_strides(x) for x in tensors]
        across = [n for batch, token, _ in strides for n in (batch, token)]
        dense = all(column == 1 for _, _, column in strides)
        widest = tiles.VECTOR_BYTES // x.element_size()
        self.vector = math.gcd(self.width, widest, *across) if dense else 1
        self.numbers = [
            n
            for batch, token, column in strides
            for n in (batch // self.vector, token // self.vector, column)
        ]
        self.reach = max(x.shape[1] * token + self.padded * column for _, token, column in strides)

    @property
    def row_bytes(self) -> int:
        return self.padded * self.dtype.itemsize


def _check(a, b, ta, tb, real, heads, divergence, rowwise: dict, stats, gradients) -> None:
    """Refuses what the kernels would read or write outside of the operands."""
    stats_count(divergence)
    if (b is None) != (tb is None):
        raise ValueError("a self relation has neither b nor tb, any other has both")
    batch, length = a.shape[:2]
    if heads < 1 or a.shape[2] % heads or ta.shape[2] % heads:
        raise ValueError(f"{heads} heads do not divide widths {a.shape[2]} and {ta.shape[2]}")
    for name, x, like in (("b", b, a), ("ta", ta, ta), ("tb", tb, ta), *gradients):
        if x is None:
            continue
        if x.shape != like.shape or x.dtype != like.dtype or x.shape[:2] != a.shape[:2]:
            raise ValueError(
                f"{name} is {x.dtype} {tuple(x.shape)} beside {like.dtype} {tuple(like.shape)} "
                f"of batch {batch} and length {length}"
            )
    for x in (a, ta):
        if x.dtype not in DTYPES:
            raise ValueError(f"relations are of fp32, bf16 or fp16 tensors, not {x.dtype}")
    if real is not None and (real.shape != a.shape[:2] or real.dtype != torch.bool):
        raise ValueError(f"real is {real.dtype} {tuple(real.shape)}, not bool {(batch, length)}")
    for name, x in rowwise.items():
        if x.shape != (batch, heads, length) or x.dtype != torch.float32:
            raise ValueError(f"{name} must be fp32 of shape {(batch, heads, length)}")
    wanted = (stats_count(divergence), batch, heads, length)
    if stats is not None and (
        stats.shape != wanted or stats.dtype != torch.float32 or not stats.is_contiguous()
    ):
        raise ValueError(f"stats must be contiguous fp32 of shape {wanted}")


class _Tokens:
    """Order and number of the real tokens, for the other kernels, and the launch that finds them.

    Where all are real the kernels look at neither; any tensor stands for them.
    """

    def __init__(self, real: Tensor | None, like: Tensor):
        batch, length = like.shape[:2]
        self.ordered = real is not None
        self.order = self.counts = like
        self.launches: list[Launch] = []
        if real is None:
            return
        self.order = torch.empty((batch, length), dtype=torch.int32, device=like.device)
        self.counts = torch.empty(batch, dtype=torch.int32, device=like.device)
        block = min(_SCAN, tiles.next_power_of_2(length))
        arguments = (real.view(torch.uint8), self.order, self.counts, *real.stride(), length)
        self.launches.append(
            Launch(real_tokens, (batch,), arguments, {"BLOCK": block, "num_warps": 4})
        )


def _scales(scale: float, scale_t: float, divergence: str) -> tuple[float, float]:
    """Scores are powers of two where exponentials are taken of them."""
    factor = 1.0 if divergence == "score_mse" else _LOG2_E
    return scale * factor, scale_t * factor


def _constants(divergence, tokens, student, teacher, tile, others: str) -> dict[str, object]:
    """What the forward and the backward kernel both ask for."""
    return {
        "DIVERGENCE": divergence,
        "ORDERED": tokens.ordered,
        "D": student.width,
        "TD": teacher.width,
        "P": student.padded,
        "TP": teacher.padded,
        "V": student.vector,
        "TV": teacher.vector,
        "ROWS": tile.rows,
        others: tile.keys,
        "PRECISION": precision(student.dtype),
        "TPRECISION": precision(teacher.dtype),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _index(*sides: _Side):
    return tl.int32 if max(side.reach for side in sides) <= INT32_MAX else tl.int64


def _tile(length: int, student: _Side, teacher: _Side, values: int) -> tiles.RelationTile:
    tensor_cores = all(
        side.dtype != torch.float32 or precision(side.dtype) == "tf32"
        for side in (student, teacher)
    )
    return tiles.relation(length, student.row_bytes + teacher.row_bytes, values, tensor_cores)


def plan_forward(
    a: Tensor,
    b: Tensor | None,
    ta: Tensor,
    tb: Tensor | None,
    real: Tensor | None,
    heads: int,
    scale: float,
    scale_t: float,
    divergence: str,
    rows: Tensor,
    stats: Tensor | None,
) -> list[Launch]:
    """The launches that `forward` would make.

    Raises:
        ValueError: operands whose shapes or types do not fit.
    """
    _check(a, b, ta, tb, real, heads, divergence, {"rows": rows}, stats, ())
    if not rows.is_contiguous():
        raise ValueError("rows must be contiguous")
    batch, length = a.shape[:2]
    if rows.numel() == 0:
        return []
    b, tb = a if b is None else b, ta if tb is None else tb
    student, teacher = _Side([a, b], heads), _Side([ta, tb], heads)
    tokens = _Tokens(real, a)
    tile = _tile(length, student, teacher, 5 if divergence == "probability_mse" else 3)
    blocks = tiles.ceil_div(length, tile.rows)
    saved = stats is not None and stats_count(divergence) > 0
    arguments = (a, b, ta, tb, tokens.order, tokens.counts, rows, stats if saved else rows)
    arguments += (*_scales(scale, scale_t, divergence), heads, blocks, length)
    constants = _constants(divergence, tokens, student, teacher, tile, "KEYS") | {
        "STATS": saved,
        # From capability 10 on a thread of the tensor cores' layout has half a row.
        "LANES": 4 if tile.depth == 0 and _capability(a.device) < 10 else 1,
        "DEPTH": tile.depth,
        "INDEX": _index(student, teacher),
    }
    numbers = (*student.numbers, *teacher.numbers)
    grid = (blocks * heads * batch,)
    return [*tokens.launches, Launch(relation_forward, grid, (*arguments, *numbers), constants)]


def plan_backward(
    a: Tensor,
    b: Tensor | None,
    ta: Tensor,
    tb: Tensor | None,
    real: Tensor | None,
    heads: int,
    scale: float,
    scale_t: float,
    divergence: str,
    stats: Tensor,
    weights: Tensor,
    da: Tensor | None,
    db: Tensor | None,
) -> list[Launch]:
    """The launches that `backward` would make.

    Raises:
        ValueError: operands whose shapes or types do not fit, or `db` for a self relation.
    """
    gradients = (("da", da, a), ("db", db, a))
    _check(a, b, ta, tb, real, heads, divergence, {"weights": weights}, stats, gradients)
    if b is None and db is not None:
        raise ValueError("a self relation has one gradient, da")
    batch, length = a.shape[:2]
    if weights.numel() == 0 or a.shape[2] == 0 or (da is None and db is None):
        return []
    if stats is None:
        if stats_count(divergence):
            raise ValueError(f"the gradient of {divergence} needs the stats of its forward")
        stats = weights  # not read
    itself = b is None
    tokens = _Tokens(real, a)
    launches = list(tokens.launches)
    factored = itself and divergence == "kl"
    shape = (2 if divergence == "kl" else 1, batch, heads, length)
    factors = torch.empty(shape, dtype=torch.float32, device=a.device)
    numbers = torch.empty((batch, heads, HEAD_NUMBERS.value), dtype=torch.float32, device=a.device)
    shared = (stats, tokens.order, tokens.counts, factors, numbers)
    constants = {
        "DIVERGENCE": divergence,
        "ORDERED": tokens.ordered,
        "FACTORED": factored,
        "BLOCK": min(_SCAN, tiles.next_power_of_2(length)),
        "num_warps": 4,
    }
    arguments = (weights, *shared, *weights.stride(), heads, length)
    launches.append(Launch(relation_factors, (batch * heads,), arguments, constants))
    factor = scale * {"score_mse": 2.0, "reverse_kl": math.log(2.0)}.get(divergence, 1.0)
    powers = _scales(scale, scale_t, divergence)
    values = 6 if itself and divergence == "probability_mse" else 3
    b, tb = a if itself else b, ta if itself else tb
    for x, y, tx, ty, out, by_row in ((a, b, ta, tb, da, True), (b, a, tb, ta, db, False)):
        if out is None:
            continue
        student, teacher, result = (_Side(t, heads) for t in ([x, y], [tx, ty], [out]))
        tile = _tile(length, student, teacher, values)
        blocks = tiles.ceil_div(length, tile.rows)
        constants = _constants(divergence, tokens, student, teacher, tile, "OTHERS") | {
            "BY_ROW": by_row,
            "BY_COLUMN": itself or not by_row,
            "OV": result.vector,
            "INDEX": _index(student, teacher, result),
        }
        arguments = (x, y, tx, ty, tokens.order, tokens.counts, stats, factors, numbers, out)
        arguments += (*powers, factor, heads, blocks, length)
        arguments += (*student.numbers, *teacher.numbers, *result.numbers)
        grid = (blocks * heads * batch,)
        launches.append(Launch(relation_backward, grid, arguments, constants))
    return launches


def _run(launches: list[Launch], device: torch.device) -> None:
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for launch in launches:
            launch.kernel[launch.grid](*launch.arguments, **launch.constants)


def forward(
    a: Tensor,
    b: Tensor | None,
    ta: Tensor,
    tb: Tensor | None,
    real: Tensor | None,
    heads: int,
    scale: float,
    scale_t: float,
    divergence: str,
    rows: Tensor,
    stats: Tensor | None,
) -> None:
    """Computes `rows`, and `stats` unless it is None, on the current stream of their device.

    Args:
        a, b, ta, tb: as the module says; none needs a gradient here. Padding is never loaded.
        real: any pattern; examples without tokens too.
        heads: relation heads; divides both widths.
        scale, scale_t: positive; of student's and teacher's products.
        divergence: one of the module's four.
        rows: contiguous; written whole, 0 at padding.
        stats: contiguous; written whole.

    Raises:
        ValueError: see `plan_forward`.
    """
    launches = plan_forward(
        a, b, ta, tb, real, heads, scale, scale_t, divergence, rows, stats
    )  # fmt: skip
    _run(launches, a.device)


def backward(
    a: Tensor,
    b: Tensor | None,
    ta: Tensor,
    tb: Tensor | None,
    real: Tensor | None,
    heads: int,
    scale: float,
    scale_t: float,
    divergence: str,
    stats: Tensor | None,
    weights: Tensor,
    da: Tensor | None,
    db: Tensor | None,
) -> None:
    """Computes the gradients of sum(weights * rows), on the current stream of their device.

    Args:
        a, b, ta, tb, real, heads, scale, scale_t, divergence, stats: as in and from `forward`.
        weights: any strides, 0 too; at padding not read.
        da, db: as `a`, any strides without overlap; written whole, 0 at padding. None: not wanted.

    Raises:
        ValueError: see `plan_backward`.
    """
    launches = plan_backward(
        a, b, ta, tb, real, heads, scale, scale_t, divergence, stats, weights, da, db
    )
    _run(launches, a.device)
