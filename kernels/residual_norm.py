"""The row kernel: program, dropout, residual and LayerNorm in one pass over the rows, each way.

    e = program(inputs)                               [rows, columns], elementwise
    s = residual + dropout(e)
    y = (s - mean(s)) * rstd(s) * weight + bias       over the columns of a row

Fused: everything between reading the inputs and writing y; the backward computes e and s again and
hands on the gradients of the program's inputs and of the residual, with the column sums that the
gradients of weight, bias and of the linear map before need. Matrices have any strides (0 repeats a
row or column vector); arithmetic is fp32 (fp64 if an operand is fp64), rounded once. A mean and its
variance are two sums over a row in registers, so nothing cancels.

Dropout drops what csrc/random.h says, computed from the seed and the element's place, forward and
backward: no mask is stored. Without dropout there is no code for it.

The kernel is generated per Program and layout, a letter for each operand: m unit column stride, c
column vector, s scalar, g both strides general (as in `segment`), v a contiguous vector of one
element per row. Strides are passed divided by V; the number of columns is a constant, because a
masked load is as wide as the compiler can see, and because what lies beyond it then vanishes. So
a new width compiles; a new number of rows does not.

Why not the statistics as an epilogue of the product before: a block would have to hold whole rows,
and 540 columns of accumulators spill.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache

import torch
import triton.language as tl

from ..expr import Program
from . import codegen, residual_norm_source, tiles
from .segment import _INT32_MAX, Launch, _kind, _strides

_REMEMBERED = 4096
# Registers for what a thread holds of a row from one sum over it to the next; of 255, since the
# rest of the arithmetic needs its own.
_REGISTERS = 160
_FORWARD_VALUES = 5  # of an element, with the temporary ones of the program
_PROCESSORS = 2  # stands for the multiprocessors of a device that is no GPU


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def chunks(rows: int, columns: int, device: torch.device | str) -> int:
    """How many partial column sums `backward` should write: the first dimension of `sums`."""
    return tiles.residual_norm_chunks(rows, _processors(torch.device(device)))


_kernels: dict[tuple, tuple[object, Program, Program | None]] = {}


def _kernel(program: Program, gradient: Program | None, write, key: tuple):
    """By identity of the Programs, which the entry keeps: hashing one costs as much as a launch."""
    key = (id(program), id(gradient), key)
    if key not in _kernels:
        if len(_kernels) >= _REMEMBERED:
            _kernels.clear()
        direction = "forward" if gradient is None else "backward"
        module = codegen.load("residual_norm", write())
        name = residual_norm_source.kernel_name(program, direction)
        _kernels[key] = (getattr(module, name), program, gradient)
    return _kernels[key][0]


def _check_counts(program: Program, given: int, outputs: int) -> None:
    if (len(program.inputs), len(program.outputs)) != (given, outputs):
        plural = ["" if n == 1 else "s" for n in (len(program.inputs), len(program.outputs))]
        raise ValueError(
            f"the program has {len(program.inputs)} input{plural[0]} and {len(program.outputs)} "
            f"output{plural[1]}, not {given} and {outputs}"
        )


def _check(matrices: dict, row_vectors: dict, column_vectors: dict, threshold: int, seed) -> None:
    """Refuses what the kernel would read or write outside of the operands; all by name."""
    shape = next(iter(matrices.values())).shape
    if len(shape) != 2 or any(matrix.shape != shape for matrix in matrices.values()):
        shapes = ", ".join(f"{name} {tuple(m.shape)}" for name, m in matrices.items())
        raise ValueError(f"matrices must be 2-D and of one shape, not {shapes}")
    for name, vector in row_vectors.items():
        if vector.shape != shape[1:]:
            raise ValueError(f"{name} must be of shape ({shape[1]},), not {tuple(vector.shape)}")
    for name, vector in column_vectors.items():
        if vector.shape != shape[:1] or not vector.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous and of shape ({shape[0]},), not {tuple(vector.shape)}"
            )
    if threshold and (seed is None or seed.dtype != torch.int64 or seed.numel() != 1):
        raise ValueError("dropout needs a seed: an int64 tensor of one element")


class _Operands:
    """The operands of a launch by name, in the order of the kernel's arguments."""

    def __init__(self, rows: int, columns: int, written: Sequence[str]):
        self.rows, self.columns, self.written = rows, columns, written
        self.tensors: dict[str, torch.Tensor] = {}
        self.letters: dict[str, str] = {}
        self.strides: dict[str, tuple[int, int]] = {}

    def matrix(self, name: str, tensor: torch.Tensor) -> None:
        stride = _strides(tensor, self.rows, self.columns, False)
        self.add(name, tensor, _kind(*stride), stride)

    def row_vector(self, name: str, tensor: torch.Tensor) -> None:
        """A matrix of row stride 0: it is loaded as wide as the matrices beside it."""
        column = tensor.stride(0) if self.columns > 1 else 1
        self.add(name, tensor, _kind(0, column), (0, column))

    def add(self, name, tensor, letter: str, stride: tuple[int, int] = (0, 0)) -> None:
        self.tensors[name], self.letters[name], self.strides[name] = tensor, letter, stride

    @property
    def compute(self) -> str:
        double = any(tensor.dtype == torch.float64 for tensor in self.tensors.values())
        return "tl.float64" if double else "tl.float32"

    def tile(self, values: int) -> tiles.RowTile:
        """For so many values of an element in registers at a time.

        V divides all strides and is at most 16 bytes of what is written.
        """
        widest = max(self.tensors[name].element_size() for name in self.written)
        divisors = [self.strides[name][0] for name, kind in self.letters.items() if kind == "m"]
        most = math.gcd(self.columns, *divisors, tiles.VECTOR_BYTES // widest)
        words = 3 if self.compute == "tl.float64" else 1
        return tiles.residual_norm(self.columns, most, _REGISTERS // (values * words))

    def launch(self, kernel, grid: int, share: int, tile, threshold: int, seed) -> Launch:
        arguments, vector = [], tile.vector
        for name, letter in self.letters.items():
            row, column = self.strides[name]
            arguments += {"m": [row // vector], "c": [row], "g": [row, column]}.get(letter, [])
        reach = max(
            tile.rows * abs(row) + (self.columns + tile.width) * abs(column)
            for row, column in self.strides.values()
        )
        constants = {
            "COLUMNS": self.columns,
            "V": vector,
            "ROWS": tile.rows,
            "WIDTH": tile.width,
            "INDEX": tl.int32 if reach <= _INT32_MAX else tl.int64,
            "num_warps": tile.warps,
        }
        operands = list(self.tensors.values())
        if threshold:
            constants["THRESHOLD"] = threshold
            operands.append(seed)
        return Launch(kernel, (grid,), (*operands, *arguments, self.rows, share), constants)


def _add_inputs(operands: _Operands, live, inputs, residual: torch.Tensor | None) -> str:
    """Adds the live inputs and the residual; returns its name, or "" where there is none.

    An input that is the residual as well is read once, and gives it its name.
    """
    for i in sorted(live):
        operands.matrix(f"i{i}", inputs[i])
    if residual is None:
        return ""
    for i in sorted(live):
        if (inputs[i].data_ptr(), inputs[i].stride(), inputs[i].dtype) == (
            residual.data_ptr(),
            residual.stride(),
            residual.dtype,
        ):
            return f"i{i}"
    operands.matrix("residual", residual)
    return "residual"


def plan_forward(
    program: Program,
    inputs: Sequence[torch.Tensor],
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    threshold: int,
    seed: torch.Tensor | None,
    y: torch.Tensor,
    mean: torch.Tensor | None,
    rstd: torch.Tensor | None,
) -> Launch | None:
    """The launch that `forward` would make; None where there is nothing to compute.

    Raises:
        ValueError: the operands' number or shapes do not fit.
    """
    matrices = {"y": y} | ({} if residual is None else {"residual": residual})
    matrices |= {f"input {i}": tensor for i, tensor in enumerate(inputs)}
    vectors = {name: v for name, v in (("mean", mean), ("rstd", rstd)) if v is not None}
    affine = {name: v for name, v in (("weight", weight), ("bias", bias)) if v is not None}
    _check_counts(program, len(inputs), 1)
    _check(matrices, affine, vectors, threshold, seed)
    rows, columns = y.shape
    if rows == 0 or columns == 0:
        return None
    operands = _Operands(rows, columns, ["y"])
    same = _add_inputs(operands, codegen.live_inputs(program), inputs, residual)
    for name, tensor in affine.items():
        operands.row_vector(name, tensor)
    operands.matrix("y", y)
    for name, tensor in vectors.items():
        operands.add(name, tensor, "v")
    compute, tile, dropout = operands.compute, operands.tile(_FORWARD_VALUES), threshold > 0
    kernel = _kernel(
        program,
        None,
        lambda: residual_norm_source.forward_text(
            program, operands.letters, same, columns, tile, compute, dropout, eps
        ),
        (tuple(operands.letters.items()), same, columns, tile, compute, dropout, eps),
    )
    grid = tiles.ceil_div(rows, tile.rows)
    return operands.launch(kernel, grid, tile.rows, tile, threshold, seed)


def plan_backward(
    program: Program,
    gradient: Program,
    inputs: Sequence[torch.Tensor],
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    threshold: int,
    seed: torch.Tensor | None,
    dy: torch.Tensor,
    gradients: Sequence[torch.Tensor],
    dresidual: torch.Tensor | None,
    added_to: int,
    sums: torch.Tensor,
    summed: Sequence[int],
) -> Launch | None:
    """The launch that `backward` would make; None where there is nothing to compute.

    Raises:
        ValueError: the operands' number or shapes do not fit.
    """
    matrices = {"dy": dy} | ({} if residual is None else {"residual": residual})
    matrices |= {f"input {i}": tensor for i, tensor in enumerate(inputs)}
    matrices |= {f"gradient {i}": tensor for i, tensor in enumerate(gradients)}
    if dresidual is not None:
        matrices["dresidual"] = dresidual
    affine = {} if weight is None else {"weight": weight}
    _check_counts(program, len(inputs), 1)
    _check_counts(gradient, 1 + len(inputs), len(gradients))
    _check(matrices, affine, {"mean": mean, "rstd": rstd}, threshold, seed)
    rows, columns = dy.shape
    expected = (2 + len(summed), columns)
    if sums.dim() != 3 or sums.shape[1:] != expected or not sums.is_contiguous():
        raise ValueError(
            f"sums must be contiguous of shape (chunks, {expected[0]}, {columns}), "
            f"not {tuple(sums.shape)}"
        )
    if columns == 0 or len(sums) == 0:
        return None
    written = [f"g{i}" for i in range(len(gradients))]
    written += [] if dresidual is None else ["dresidual"]
    operands = _Operands(rows, columns, written or ["sums"])
    live = set(codegen.live_inputs(program))
    live |= {i - 1 for i in codegen.live_inputs(gradient) if i}
    same = _add_inputs(operands, live, inputs, residual)
    if weight is not None:
        operands.row_vector("weight", weight)
    operands.add("mean", mean, "v")
    operands.add("rstd", rstd, "v")
    operands.matrix("dy", dy)
    for i, tensor in enumerate(gradients):
        operands.matrix(f"g{i}", tensor)
    if dresidual is not None:
        operands.matrix("dresidual", dresidual)
    operands.add("sums", sums, "s")
    summed = tuple(summed)
    # The sums, weight, the normalised row, its gradient, and what the gradient program reads.
    values = 2 + len(summed) + 3 + residual_norm_source.carried(gradient)
    compute, tile, dropout = operands.compute, operands.tile(values), threshold > 0
    kernel = _kernel(
        program,
        gradient,
        lambda: residual_norm_source.backward_text(
            program,
            gradient,
            operands.letters,
            same,
            columns,
            tile,
            compute,
            dropout,
            added_to,
            summed,
        ),
        (*operands.letters.items(), same, columns, tile, compute, dropout, added_to, summed),
    )
    share = tiles.ceil_div(tiles.ceil_div(rows, len(sums)), tile.rows) * tile.rows
    return operands.launch(kernel, len(sums), share, tile, threshold, seed)


def _run(launch: Launch | None, device: torch.device) -> None:
    if launch is not None:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            launch.kernel[launch.grid](*launch.arguments, **launch.constants)


def forward(
    program: Program,
    inputs: Sequence[torch.Tensor],
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    threshold: int,
    seed: torch.Tensor | None,
    y: torch.Tensor,
    mean: torch.Tensor | None,
    rstd: torch.Tensor | None,
) -> None:
    """Computes y, and the mean and rstd that `backward` reads, on the device's current stream.

    Args:
        program: one output; as built by `forward_program`, not allocated.
        inputs: one tensor [rows, columns] per input; those that do not matter are not read.
        residual: [rows, columns] or None; read once where it is one of the inputs as well.
        weight, bias: [columns] or None.
        eps: added to the variance; a constant of the kernel.
        threshold: of 65536, how many values drop an element; 0: no dropout, `seed` is not read.
        seed: int64, one element, on the same device.
        y: [rows, columns]; written whole.
        mean, rstd: [rows], contiguous, fp32 (fp64 if an operand is fp64), or None.

    Raises:
        ValueError: see `plan_forward`.
    """
    launch = plan_forward(
        program, inputs, residual, weight, bias, eps, threshold, seed, y, mean, rstd
    )
    _run(launch, y.device)


def backward(
    program: Program,
    gradient: Program,
    inputs: Sequence[torch.Tensor],
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    threshold: int,
    seed: torch.Tensor | None,
    dy: torch.Tensor,
    gradients: Sequence[torch.Tensor],
    dresidual: torch.Tensor | None,
    added_to: int,
    sums: torch.Tensor,
    summed: Sequence[int],
) -> None:
    """Computes the gradients from dy, on the device's current stream.

    Args:
        program, inputs, residual, weight, mean, rstd, threshold, seed: as in and from `forward`.
        gradient: inputs: the gradient of e, then those of `program`.
        dy: [rows, columns].
        gradients: one tensor [rows, columns] per output of `gradient`; written whole.
        dresidual: [rows, columns] or None; written whole.
        added_to: output of `gradient` that the residual's gradient is added to (where the program
            reads the residual too), or -1.
        sums: [chunks, 2 + len(summed), columns], contiguous, fp32 (fp64 if an operand is fp64);
            written whole: partial column sums over ranges of rows, which the caller adds up. In
            order the gradient of weight, of bias, then the outputs of `gradient` in `summed`, as
            they are before rounding. No atomics: the same call gives the same bits.
        summed: positions among the outputs of `gradient`.

    Raises:
        ValueError: see `plan_backward`.
    """
    launch = plan_backward(
        program, gradient, inputs, residual, weight, mean, rstd, threshold, seed, dy, gradients,
        dresidual, added_to, sums, summed,
    )  # fmt: skip
    _run(launch, dy.device)
