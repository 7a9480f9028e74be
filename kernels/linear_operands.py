"""What the launches of matrix products ask of their operands: strides, vector widths, precision."""

import math

import torch

from . import tiles

INT32_MAX = 2**31 - 1
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def precision(dtype: torch.dtype) -> str:
    """How products of `dtype` are computed: fp32 exactly, unless torch is told to take tf32."""
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def strides(tensor: torch.Tensor) -> tuple[int, int]:
    """Strides of a matrix; those of a dimension of one element are as in a contiguous tensor."""
    row, column = tensor.stride()
    if tensor.shape[1] == 1:
        column = 1
    if tensor.shape[0] == 1:
        row = tensor.shape[1] * column
    return row, column


def vector(tensors: list[torch.Tensor], *numbers: int) -> int:
    """The most elements, up to 16 bytes of each of `tensors`, that divide `numbers`."""
    return math.gcd(*numbers, tiles.VECTOR_BYTES // min(x.element_size() for x in tensors))


def misalignment(tensor: torch.Tensor) -> int:
    """By how many elements to move `tensor` back to an address that 16 divides; 0 if impossible.

    Triton knows of an address whether 16 divides it, and nothing else: without this, the second
    half of rows of 2 x 540 items would be read one item at a time.
    """
    shift = tensor.data_ptr() % tiles.VECTOR_BYTES // tensor.element_size()
    return shift if shift <= tensor.storage_offset() else 0


def moved(tensor: torch.Tensor, shift: int) -> torch.Tensor:
    """`tensor` moved back by `shift` elements."""
    if shift == 0:
        return tensor
    return tensor.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset() - shift)


def readable(tensor: torch.Tensor, pitch: int, width: int) -> int:
    """Up to which column the rows of `tensor` may be read, `width` elements at a time.

    Rows of a slice may be read beyond their end, which lets loads be as wide as the pitch allows;
    but not beyond the memory of the tensor.
    """
    rows, columns = tensor.shape
    rounded = tiles.ceil_div(columns, width) * width
    end = tensor.storage_offset() + (rows - 1) * pitch + rounded
    there = tensor.untyped_storage().nbytes() // tensor.element_size()
    return rounded if end <= there else columns
