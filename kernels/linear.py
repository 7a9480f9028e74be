"""Matrix products with a Program for epilogue: forward and data gradient of an FFN's linear maps.

    acc_n = a @ weights[n] + biases[n]          one or two, fp32
    outputs = program(acc_0[, acc_1], *extras)  stored
    sums[t, s] = column sums of outputs[summed[s]] over the rows of tile t

    a        [M, K]            weights  [K, N] each    biases  [N] each, or None
    extras   [M, N] each       outputs  [M, N] each
    sums     [rows_of_sums(M, N, K, dtype), len(summed), N] fp32

Fused: the bias, the whole elementwise segment behind the product, and the sums that the gradients
of biases need; an accumulator goes to memory only if it is an output. Two weights are a gated
FFN's: a tile of `a` is loaded once for both. With a backward Program the same kernel computes the
data gradient: acc_0 is the upstream gradient of the segment, the extras are the segment's inputs.

Nothing is required of the strides: a weight may be a leading slice of a larger one, or transposed.
How wide the loads are follows from them. A letter says in which direction an operand is dense: k
(along K), n (along N), m (an [M, N] operand along N), g (in none). Across a dense direction the
stride is passed divided by V, the largest power of two that divides all strides of its kind, and
multiplied by the constant V inside: so the compiler sees that 540 is a multiple of 4. N and K are
constants of the kernel, which makes masks along them as wide as the loads; a model has few of
them. Strides and M are run-time numbers.

Why not a library's product and an elementwise kernel: at 540 columns the traffic of the segment
costs as much as the product. Why no TMA: its rows are multiples of 16 bytes, and 540 items of 16
bits are not. Why no atomics: partial sums per tile, added by the caller, give equal bits for equal
inputs.
"""

import itertools
import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import triton.language as tl

from ..expr import Program
from . import codegen, linear_source, tiles
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
from .linear_weight import weight_gradient
from .segment import Launch

__all__ = ["plan", "rows_of_sums", "run", "weight_gradient"]

_REMEMBERED = 4096
_GROUP = 8  # tiles of rows that walk all columns together


@dataclass(frozen=True)
class _Prepared:
    """All of a launch but the tensors; `shifts`: (position, elements) of those to be moved back."""

    kernel: object
    grid: tuple[int, ...]
    numbers: tuple[int, ...]
    constants: dict[str, object]
    shifts: tuple[tuple[int, int], ...]


class _Linear:
    """The kernels of one Program, by form, and its launches, by what they depend on."""

    def __init__(self, program: Program):
        self.program = program
        self.live = codegen.live_inputs(program)
        self.kernels: dict[linear_source.Form, object] = {}
        self.prepared: dict[tuple, _Prepared | None] = {}

    def kernel(self, form: linear_source.Form):
        if form not in self.kernels:
            module = codegen.load("linear", linear_source.text(self.program, form))
            self.kernels[form] = getattr(module, linear_source.kernel_name(self.program))
        return self.kernels[form]


_linears: dict[int, _Linear] = {}


def _linear(program: Program) -> _Linear:
    """By identity: hashing a Program costs as much as a launch. Holding it keeps the identity."""
    found = _linears.get(id(program))
    if found is None:
        if len(_linears) >= _REMEMBERED:
            _linears.clear()
        found = _linears[id(program)] = _Linear(program)
    return found


def rows_of_sums(M: int, N: int, K: int, dtype: torch.dtype) -> int:
    """How many partial column sums `run` stores for factors of `dtype`: one per tile of rows."""
    return tiles.ceil_div(M, tiles.linear(M, N, K, dtype.itemsize).rows)


def _check(a, weights, biases, program, extras, outputs, sums, summed) -> tuple[int, int, int]:
    """M, N and K, of operands that fit together."""
    products = len(weights)
    if products not in (1, 2) or len(biases) != products:
        raise ValueError(f"one or two weights with a bias or None each, not {len(weights)}")
    if len(program.inputs) != products + len(extras) or len(program.outputs) != len(outputs):
        raise ValueError(
            f"the program has {len(program.inputs)} inputs and {len(program.outputs)} outputs, "
            f"not {products + len(extras)} and {len(outputs)}"
        )
    if a.dtype not in DTYPES or any(w.dtype != a.dtype for w in weights):
        types = ", ".join(str(x.dtype) for x in (a, *weights))
        raise ValueError(f"factors must be fp32, bf16 or fp16 and of one type, not {types}")
    M, K = a.shape
    N = weights[0].shape[1]
    wanted = [(a, (M, K)), *((w, (K, N)) for w in weights), *((x, (M, N)) for x in extras)]
    wanted += [(b, (N,)) for b in biases if b is not None] + [(x, (M, N)) for x in outputs]
    if sums is not None or summed:
        wanted.append((sums, (rows_of_sums(M, N, K, a.dtype), len(summed), N)))
        if sums is None or sums.dtype != torch.float32 or not sums.is_contiguous():
            raise ValueError("sums must be a contiguous fp32 tensor where outputs are summed")
    for tensor, shape in wanted:
        if tuple(tensor.shape) != shape:
            raise ValueError(f"a tensor is {tuple(tensor.shape)} where {shape} is needed")
    return M, N, K


@dataclass(frozen=True)
class _Operand:
    """A matrix as the kernel sees it.

    Attributes:
        tensor: as the caller gave it.
        letter: its dense direction.
        strides: of rows and columns.
        pitch: the stride across the dense direction; 0 if there is none.
        shift: how many elements to move it back to an aligned address.
    """

    tensor: torch.Tensor
    letter: str
    strides: tuple[int, int]
    pitch: int
    shift: int

    @classmethod
    def of(cls, tensor: torch.Tensor, along_columns: str, along_rows: str = "g") -> "_Operand":
        row, column = strides(tensor)
        letter, pitch = (along_columns, row) if column == 1 else (along_rows, column)
        if letter == "g" or (column != 1 and row != 1):
            return cls(tensor, "g", (row, column), 0, 0)
        return cls(tensor, letter, (row, column), pitch, misalignment(tensor))

    def numbers(self, V: int) -> tuple[int, ...]:
        return self.strides if self.letter == "g" else (self.pitch // V,)

    def reach(self, rows: int, columns: int) -> int:
        """An upper bound of the offsets inside a tile."""
        return rows * self.strides[0] + columns * self.strides[1]


def _vector(operands: list[_Operand], *numbers: int) -> int:
    """How many elements a load of any of `operands` takes."""
    dense = [x for x in operands if x.letter != "g"]
    if not dense:
        return 1
    divisors = [n for x in dense for n in (x.pitch, x.shift)]
    return vector([x.tensor for x in operands], *divisors, *numbers)


def _prepare(
    linear: _Linear, a, weights, biases, program, extras, outputs, sums, summed
) -> _Prepared | None:
    """What `plan` remembers of one kind of operands; None where there is nothing to compute."""
    M, N, K = _check(a, weights, biases, program, extras, outputs, sums, summed)
    if M == 0 or N == 0:
        return None
    live = [extras[i - len(weights)] for i in linear.live if i >= len(weights)]
    left = _Operand.of(a, "k")
    rights = [_Operand.of(w.t(), "k", "n") for w in weights]
    matrices = [_Operand.of(x, "m") for x in (*live, *outputs)]
    names = ["a", *(f"w{n}" for n in range(len(weights)))]
    names += [f"e{i}" for i in linear.live if i >= len(weights)]
    names += [f"o{i}" for i in range(len(outputs))]
    operands = [left, *rights, *matrices]

    VA = _vector([left])
    VW = _vector(rights)
    wide = [(w, x) for w, x in zip(weights, rights, strict=True) if x.letter == "n"]
    readable_columns = min((readable(w, x.pitch, VW) for w, x in wide), default=N)
    VW = math.gcd(VW, readable_columns) if wide else VW
    V = _vector(matrices, N)

    width = min(VA, VW) * a.element_size()
    held = len(weights) + len(live) + sum(r >= len(program.inputs) for r in program.outputs)
    tile = tiles.linear(M, N, K, a.element_size(), held, V, width)
    along = [VA] + [VW for x in rights if x.letter == "k"]
    bias_letters = [
        "-" if b is None else "m" if b.stride(0) == 1 or N == 1 else "g" for b in biases
    ]
    letters = "".join(x.letter for x in operands)
    extras_at, outputs_at = 1 + len(weights), 1 + len(weights) + len(live)
    form = linear_source.Form(
        a=letters[0],
        weights=letters[1:extras_at],
        biases="".join(bias_letters),
        extras=letters[extras_at:outputs_at],
        outputs=letters[outputs_at:],
        summed=tuple(summed),
        tail="none" if K % tile.depth == 0 else "loop" if K % max(along) == 0 else "after",
        even=N % tile.columns == 0,
        shifted=frozenset(n for n, x in zip(names, operands, strict=True) if x.shift),
        halvings=tile.halvings,
        aliased=_share_memory(extras, outputs),
    )

    divisors = [VA, *(VW for _ in rights), *(V for _ in matrices)]
    numbers = [x.numbers(divisor) for x, divisor in zip(operands, divisors, strict=True)]
    given = [b for b in biases if b is not None]
    numbers[extras_at:extras_at] = [
        (b.stride(0),) for b, letter in zip(biases, bias_letters, strict=True) if letter == "g"
    ]
    numbers += [
        (x.shift // divisor,) for x, divisor in zip(operands, divisors, strict=True) if x.shift
    ]
    behind = len(given)  # the biases stand before the extras
    shifts = tuple(
        (at + (behind if at >= extras_at else 0), x.shift)
        for at, x in enumerate(operands)
        if x.shift
    )
    reach = max(
        left.reach(tile.rows, tile.depth),
        *(x.reach(tile.columns, tile.depth) for x in rights),
        *(x.reach(tile.rows, tile.columns) for x in matrices),
    )
    constants = {
        "N": N,
        "K": K,
        "READABLE": readable_columns,
        "VA": VA,
        "VW": VW,
        "V": V,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "DEPTH": tile.depth,
        "GROUP": _GROUP,
        "PRECISION": precision(a.dtype),
        "INDEX": tl.int32 if reach <= INT32_MAX else tl.int64,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    grid = (tiles.ceil_div(M, tile.rows) * tiles.ceil_div(N, tile.columns),)
    numbers = (*itertools.chain(*numbers), M)
    return _Prepared(linear.kernel(form), grid, numbers, constants, shifts)


def _share_memory(extras: list[torch.Tensor], outputs: list[torch.Tensor]) -> bool:
    return bool({x.data_ptr() for x in extras} & {x.data_ptr() for x in outputs})


def _signature(tensor: torch.Tensor) -> tuple:
    """What a launch depends on, of an operand."""
    address = tensor.data_ptr() % tiles.VECTOR_BYTES
    start = tensor.storage_offset() if address else 0
    return tensor.shape, tensor.stride(), tensor.dtype, address, start


def plan(
    a: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor | None],
    program: Program,
    extras: list[torch.Tensor],
    outputs: list[torch.Tensor],
    sums: torch.Tensor | None = None,
    summed: tuple[int, ...] = (),
) -> Launch | None:
    """The launch that `run` would make; None where there is nothing to compute.

    Raises:
        ValueError: operands of the wrong number, shape or type.
    """
    linear = _linear(program)
    given = [b for b in biases if b is not None]
    key = (
        tuple(_signature(x) for x in (a, *weights, *given, *extras, *outputs)),
        tuple((w.storage_offset(), w.untyped_storage().nbytes()) for w in weights),
        tuple(b is None for b in biases),
        sums is not None and (sums.shape, sums.stride(), sums.dtype),
        tuple(summed),
        len(outputs),
        precision(a.dtype),
        _share_memory(extras, outputs),
    )
    if key not in linear.prepared:
        if len(linear.prepared) >= _REMEMBERED:
            linear.prepared.clear()
        linear.prepared[key] = _prepare(
            linear, a, weights, biases, program, extras, outputs, sums, summed
        )
    found = linear.prepared[key]
    if found is None:
        return None
    live = [extras[i - len(weights)] for i in linear.live if i >= len(weights)]
    tensors = [a, *weights, *given, *live, *outputs]
    for at, shift in found.shifts:
        tensors[at] = moved(tensors[at], shift)
    if summed:
        tensors.append(sums)
    return Launch(found.kernel, found.grid, (*tensors, *found.numbers), found.constants)


def run(
    a: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor | None],
    program: Program,
    extras: list[torch.Tensor],
    outputs: list[torch.Tensor],
    sums: torch.Tensor | None = None,
    summed: tuple[int, ...] = (),
) -> None:
    """Computes the module's formula on the current stream of the operands' device.

    Args:
        a: [M, K], fp32, bf16 or fp16, any strides.
        weights: one or two [K, N] of the type of `a`, any strides: `parameter.t()` of a parameter
            [N, K] for a forward, the parameter itself for a data gradient.
        biases: [N] or None for each weight.
        program: as built by `forward_program` or `backward_program`, not allocated; its first
            inputs are the products in the order of `weights`, the others `extras`. An output may be
            an input's register.
        extras: [M, N] each, any strides, also 0; those no output depends on are not read.
        outputs: [M, N] each, fp32, bf16 or fp16, written whole. One may be one of `extras` (same
            address and strides); no other memory may be shared.
        sums: contiguous fp32 [rows_of_sums(M, N, K, a.dtype), len(summed), N], written whole.
        summed: positions of the outputs to sum, before they are rounded.

    Raises:
        ValueError: operands of the wrong number, shape or type.
    """
    launch = plan(a, weights, biases, program, extras, outputs, sums, summed)
    if launch is None:
        return
    with torch.cuda.device(a.device) if a.is_cuda else nullcontext():
        launch.kernel[launch.grid](*launch.arguments, **launch.constants)
