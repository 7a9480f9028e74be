"""Runs Programs over tensors, by the first backend that takes them.

Who serves a call: csrc for dense CPU tensors; for CUDA tensors the Triton kernels, or csrc's CUDA
interpreter (`backend.cuda_engine`); and the reference for everything else (other devices, a library
without csrc, more operands, registers or dimensions than csrc takes).

These functions know nothing of autograd: they fill outputs that the caller allocated. Matrices are
[rows, columns] with any strides.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import UserError
from ..expr import Program
from . import backend, reference

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # csrc DType
HALVES = (torch.bfloat16, torch.float16)
ABSENT = (0, 0, 0, 0)  # instead of a matrix, see csrc/bindings.h


class Pass:
    """One Program, and its form for csrc."""

    def __init__(self, program: Program):
        self.program = program

    @functools.cached_property
    def native(self):
        """csrc's Program, or None if it has more operands or registers than csrc takes."""
        module, packed = backend.cpp()[0], self.program.packed()
        operands = len(self.program.inputs) + len(self.program.outputs)
        registers = int.from_bytes(packed[4:6], "little")
        if operands > module.MAX_OPERANDS or registers > module.MAX_REGISTERS:
            return None
        return module.Program(packed)

    def on(self, engine: str):
        """`native` if the engine is one of csrc's and takes this Program, else None."""
        if engine not in ("cpp", "cuda") or self.native is None:
            return None
        return self.native if engine == "cpp" or self._fits_cuda else None

    @functools.cached_property
    def _fits_cuda(self) -> bool:
        return backend.cpp()[0].cuda_takes(self.native)


def in_memory(x: Tensor | None) -> Tensor | None:
    """The tensor with its values where its address says: some signs and zeros are mere flags."""
    if x is None:
        return None
    if x._is_zerotensor():
        return torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    return x.resolve_neg()


def dense_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialised contiguous tensor of x's shape."""
    if x.dtype == dtype and x.is_contiguous():
        return torch.empty_like(x)  # half the time of the other
    return x.new_empty(x.shape, dtype=dtype)


def check_seed(op: str, seed: Tensor | None, x: Tensor, count: int) -> None:
    """Raises a UserError unless `seed` is None or holds `count` seeds where x is."""
    if seed is None:
        return
    if seed.dtype != torch.int64 or seed.shape != (count,):
        raise UserError(f"{op}: seed is {seed.dtype} {list(seed.shape)}, expected int64 [{count}]")
    if seed.device != x.device:
        raise UserError(f"{op}: seed is on {seed.device} and x on {x.device}; move one")


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if a tensor is, else float32."""
    double = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if double else torch.float32


def engine_of(tensor: Tensor) -> tuple[str, tuple[int, int]]:
    """Who serves tensors of this device, and what csrc's CUDA functions take besides."""
    if tensor.device.type == "cpu":
        return "cpp" if backend.cpp()[0] is not None else "reference", ()
    if tensor.device.type != "cuda":
        return "reference", ()
    engine = backend.cuda_engine()
    if engine != "cuda":
        return engine, ()
    index = tensor.device.index
    return engine, (index, torch.cuda.current_stream(index).cuda_stream)


def matrix(x: Tensor | None) -> tuple[int, int, int, int]:
    """As csrc/bindings.h takes it; a vector is a row."""
    if x is None:
        return ABSENT
    strides = x.stride()
    row, column = strides if len(strides) == 2 else (0, strides[0])
    return x.data_ptr(), DTYPES[x.dtype], row, column


def elementwise(
    which: Pass, size: torch.Size, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
) -> None:
    """Runs the Program over tensors that broadcast to `size`, into `outputs`."""
    engine, where = engine_of(outputs[0])
    if engine != "reference":
        inputs = [in_memory(x) for x in inputs]
        if engine == "triton":
            return _triton_elementwise(which.program, size, inputs, outputs)
        module = backend.cpp()[0]
        native = which.on(engine)
        if native is not None and len(size) <= module.MAX_DIMS:
            operands = [
                (
                    x.data_ptr(),
                    DTYPES[x.dtype],
                    x.stride() if x.shape == size else x.expand(size).stride(),
                )
                for x in (*inputs, *outputs)
            ]
            run = module.cuda_elementwise if where else module.elementwise
            return run(native, size, operands, *where)
    _reference(which, inputs, outputs)
    return None


def _reference(which: Pass, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    wide = [x.float() if x.dtype in HALVES else x for x in inputs]  # as the others compute
    for output, result in zip(outputs, reference.run(which.program, wide), strict=True):
        output.copy_(result)


def _triton_elementwise(
    program: Program, size: torch.Size, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
) -> None:
    if size.numel() == 0:
        return
    columns = size[-1] if size else 1

    def rows(tensor: Tensor) -> Tensor:  # a copy only if two dimensions cannot say its strides
        return tensor.expand(size).reshape(-1, columns)

    views = [rows(output) for output in outputs]
    backend.triton()[0].segment.run(program, [rows(tensor) for tensor in inputs], views)
    for output, view in zip(outputs, views, strict=True):
        if view.data_ptr() != output.data_ptr():
            output.copy_(view.view(size))


def chunks_of(rows: int, engine: str) -> tuple[int, int]:
    """Rows of one partial sum, and how many of them there are: by the size alone, so that the
    result does not depend on the number of threads."""
    chunk = max(16, -(-rows // 128)) if engine == "cpp" else max(4, -(-rows // 1024))
    return chunk, -(-rows // chunk)


def summed_elementwise(
    which: Pass, inputs: Sequence[Tensor], outputs: Sequence[Tensor], summed: Sequence[int]
) -> Tensor:
    """Runs the Program over matrices, into `outputs`.

    Returns:
        [len(summed), columns]: the sum over the rows of each output in `summed`, in float32
        (float64 if an operand is), added before the output was rounded (by csrc).
    """
    rows, columns = outputs[0].shape
    dtype = compute_dtype(*inputs)
    engine, where = engine_of(outputs[0])
    if (native := which.on(engine)) is not None:
        chunk, chunks = chunks_of(rows, engine)
        sums = outputs[0].new_empty((chunks, len(summed), columns), dtype=dtype)
        module = backend.cpp()[0]
        run = module.cuda_summed_elementwise if where else module.summed_elementwise
        if sums.numel():
            operands = [matrix(x) for x in (*inputs, *outputs)]
            run(native, rows, columns, operands, sums.data_ptr(), chunk, list(summed), *where)
        return sums.sum(0) if chunks != 1 else sums[0]
    elementwise(which, outputs[0].shape, inputs, outputs)
    return torch.stack([outputs[k].sum(0, dtype=dtype) for k in summed])
