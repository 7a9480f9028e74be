"""Hidden states towards a wider teacher's: fastffn, the formula in torch, torch.compile.

Forward and backward, with the gradients of the student's states and of the projection.
"""

import functools

import pytest
import torch
import torch.nn.functional as F

from fastffn.functional import hidden_mse
from fastffn.ops.execute import compute_dtype

from .harness import check_outputs, compiled, floor_seconds, interleave, losses_of
from .test_relation import lengths_of

STUDENT, TEACHER = 384, 768
SIZES = [(8, 128, "cpu"), (32, 128, "cpu"), (64, 128, "cuda"), (64, 512, "cuda")]
SIZES = [pytest.param(*s, marks=[pytest.mark.gpu] if s[2] == "cuda" else []) for s in SIZES]


def formula(teacher, real):
    def loss(student, weight=None, bias=None):
        projected = student if weight is None else F.linear(student, weight, bias)
        dtype = compute_dtype(teacher)
        square = (projected.to(dtype) - teacher.to(dtype)).square()
        if real is None:
            return square.mean()
        return (square * real.unsqueeze(-1)).sum() / (real.sum() * teacher.shape[-1])

    return loss


def fused(teacher, real):
    def loss(student, weight=None, bias=None):
        return hidden_mse(student, teacher, real, weight, bias)

    return loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("batch, length, device", SIZES)
@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "ragged"])
@pytest.mark.parametrize("projected", [True, False], ids=["projected", "of one width"])
def test_hidden_mse(benchmark, projected, ragged, batch, length, device, dtype):
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    width = STUDENT if projected else TEACHER
    shapes = [(batch, length, TEACHER), (batch, length, width), (TEACHER, width), (TEACHER,)]
    scales = [1, 1, width**-0.5, 1]
    teacher, *inputs = (
        (torch.randn(shape, generator=generator) * scale).to(device, dtype)
        for shape, scale in zip(shapes, scales, strict=True)
    )
    teacher += 1  # else the bias's gradient is a sum that cancels, and roundings are compared
    inputs = [x.requires_grad_() for x in (inputs if projected else inputs[:1])]
    lengths = lengths_of(batch, length, ragged, device)
    real = torch.arange(length, device=device) < lengths[:, None] if ragged else None
    plain = formula(teacher, real)
    functions = {"fastffn": fused(teacher, real), "eager": plain, **compiled(plain, device)}
    works = losses_of(functions, inputs)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    exact = losses_of({"exact": formula(teacher.double(), real)}, wide)["exact"]
    first = check_outputs(works, functools.cache(exact))
    tokens = int(lengths.sum())
    traffic = tokens * (TEACHER + 2 * width) * teacher.element_size()
    flops = 6 * tokens * TEACHER * width if projected else 0
    floor = floor_seconds(device, dtype, traffic, flops)
    what = f"{width} to {TEACHER}" if projected else f"{width}, no projection"
    what += ", ragged" if ragged else ", dense"
    benchmark.group = f"hidden_mse, ({batch}, {length}), {what}, {dtype}, {device}"
    interleave(benchmark, works, "fastffn", 2.0, floor, first)
