"""The elementwise kernels as machine code for three GPU generations, without a GPU.

What is asserted decides their speed: no spills, no shared memory, no barriers, registers that leave
many threads in flight, and loads as wide as the strides allow.
"""

import itertools

import aot
import pytest
import torch
from test_kernels_segment import EXPRESSIONS

from fastffn.expr import Expr, backward_program, forward_program
from fastffn.kernels import segment

MOST = EXPRESSIONS[-1]
DIRECTIONS = {"forward": forward_program, "backward": backward_program}
REGISTERS = 96  # of 65,536 per multiprocessor: 640 threads with 16 bytes and more each in flight


def build(text, direction, operand, target):
    """Compiles one direction of `text` as a launch on tensors like `operand` would."""
    program = DIRECTIONS[direction](Expr.parse(text))
    outputs = [torch.empty(operand.shape, dtype=operand.dtype) for _ in program.outputs]
    launch = segment.plan(program, [operand for _ in program.inputs], outputs)
    compiled = aot.compile(launch.kernel, launch.arguments, launch.constants, target)
    assert compiled.spills == 0
    assert compiled.shared == 0
    assert compiled.count("BAR") == 0
    assert compiled.registers <= REGISTERS
    return compiled


def check_flat(text, direction, dtype, target):
    compiled = build(text, direction, torch.empty(64, 540, dtype=dtype), target)
    assert compiled.widest("LDG") == 128
    assert compiled.widest("STG") == 128
    if dtype == torch.bfloat16 and text != "relu(a)":
        rounding = [name for name in compiled.instructions if name.startswith("F2FP.")]
        assert rounding
        assert not any(".RZ" in name for name in rounding), (
            "bf16 is cut off, not rounded to nearest"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("text", EXPRESSIONS)
def test_contiguous(text, direction, dtype):
    check_flat(text, direction, dtype, "sm_90")


@pytest.mark.parametrize("target", ["sm_80", "sm_100"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("text", EXPRESSIONS[2::2])
def test_contiguous_elsewhere(text, direction, target):
    check_flat(text, direction, torch.bfloat16, target)


@pytest.mark.parametrize("target", aot.TARGETS)
def test_maximum_keeps_nan(target):
    """Here and not by the interpreter, whose maximum keeps NaN in any case."""
    compiled = build("max(a, b)", "forward", torch.empty(64, 540), target)
    maxima = [name for name in compiled.instructions if name.startswith("FMNMX")]
    assert maxima
    assert all(".NAN" in name for name in maxima)


@pytest.mark.parametrize(
    ("columns", "pitch", "dtype", "bits"),
    [
        (544, 552, torch.bfloat16, 128),
        (540, 544, torch.bfloat16, 64),
        (180, 540, torch.bfloat16, 64),
        (270, 540, torch.bfloat16, 32),
        (135, 540, torch.bfloat16, 16),
        (180, 540, torch.float32, 128),
    ],
)
def test_strided_rows(columns, pitch, dtype, bits):
    """The loads are as wide as the largest power of two that divides the width and the strides."""
    operand = torch.empty(64, pitch, dtype=dtype)[:, :columns]
    compiled = build(EXPRESSIONS[1], "forward", operand, "sm_90")
    assert compiled.widest("LDG") == bits
    assert compiled.widest("STG") == bits


@pytest.mark.parametrize("target", aot.TARGETS)
def test_strided_rows_backward(target):
    build(MOST, "backward", torch.empty(64, 540, dtype=torch.bfloat16)[:, :180], target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_broadcast_operands(dtype):
    """Vectors and scalars are read where they are needed, not by way of shared memory."""
    program = backward_program(Expr.parse("max(add(swish(a), mul(b, c)), a)"))
    a = torch.empty(64, 540, dtype=dtype)[:, :180]
    inputs = [a[:1, :1].expand_as(a), a, a[:1].expand_as(a), a[:, :1].expand_as(a)]
    launch = segment.plan(program, inputs, [torch.empty(a.shape, dtype=dtype) for _ in range(3)])
    compiled = aot.compile(launch.kernel, launch.arguments, launch.constants, "sm_90")
    assert compiled.spills == compiled.shared == compiled.count("BAR") == 0
    assert compiled.widest("STG") == (128 if dtype == torch.float32 else 64)


def test_far_rows_and_fp64():
    """The rare variants compile: 64-bit offsets inside a block, arithmetic in fp64, exact gelu."""
    far = torch.empty(1, dtype=torch.bfloat16, device="meta").as_strided((4, 540), (2**31, 1))
    program = forward_program(Expr.parse("gelu_erf(a)"))
    launch = segment.plan(program, [far], [far])
    operands = [aot.Pointer(torch.bfloat16)] * 2 + list(launch.arguments[2:])
    assert aot.compile(launch.kernel, operands, launch.constants, "sm_90").spills == 0
    double = torch.empty(64, 540, dtype=torch.float64)
    for direction in DIRECTIONS:
        build("max(gelu_erf(a), elu(tanh(b)))", direction, double, "sm_90")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "direction", "dtype", "target"),
    list(itertools.product(EXPRESSIONS, DIRECTIONS, [torch.float32, torch.bfloat16], aot.TARGETS)),
)
def test_grid(text, direction, dtype, target):
    check_flat(text, direction, dtype, target)
    for columns in (540, 270, 180, 135):
        build(text, direction, torch.empty(64, 544, dtype=dtype)[:, :columns], target)
