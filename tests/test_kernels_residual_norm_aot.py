"""The row kernel as machine code for three GPU generations, without a GPU.

What is asserted decides its speed: no spills, the width of loads and stores, a row within a warp
(no barrier and no shared memory in the forward, none but for the column sums at the end in the
backward), and how many instructions a row costs, which is what the kernel is bound by next to
memory.
"""

import itertools

import aot
import pytest
import torch

from fastffn.expr import Expr, backward_program, forward_program
from fastffn.kernels import residual_norm

DIRECTIONS = ("forward", "backward")
TYPES = (torch.bfloat16, torch.float32)
RATE = 6554  # threshold of a dropout of 0.1
REGISTERS = {"forward": 168, "backward": 255}  # 12 and 8 warps on a multiprocessor


def plan(direction, text, columns, dtype, threshold, pitch=None, affine_dtype=torch.float32):
    """The launch on 64 rows; the input x, where there is one, is the residual as well."""
    expr = Expr.parse(text)
    program, gradient = forward_program(expr), backward_program(expr)

    def matrix():
        return torch.empty(64, pitch or columns, dtype=dtype)[:, :columns]

    inputs = [matrix() for _ in expr.inputs]
    shared = expr.inputs.index("x") if "x" in expr.inputs else -1
    residual = matrix() if shared < 0 else inputs[shared]
    weight = torch.empty(columns, dtype=affine_dtype)
    statistics = (torch.empty(64), torch.empty(64))
    seed = torch.empty(1, dtype=torch.int64)
    if direction == "forward":
        return residual_norm.plan_forward(
            program, inputs, residual, weight, weight, 1e-5, threshold, seed, matrix(), *statistics
        )
    return residual_norm.plan_backward(
        program,
        gradient,
        inputs,
        residual,
        weight,
        *statistics,
        threshold,
        seed,
        matrix(),
        [matrix() for _ in inputs],
        None if shared >= 0 else matrix(),
        shared,
        torch.empty(4, 3, columns),
        (0,),
    )


def build(direction, text, columns, dtype, threshold, target, **kwargs):
    launch = plan(direction, text, columns, dtype, threshold, **kwargs)
    compiled = aot.compile(launch.kernel, launch.arguments, launch.constants, target)
    assert compiled.spills == 0
    assert compiled.registers <= REGISTERS[direction]
    return compiled


def moved(compiled, kind: str, bits: int) -> int:
    """How many loads ("LDG") or stores ("STG") move `bits` at a time."""
    size = {8: ".U8", 16: ".U16", 64: ".64", 128: ".128"}.get(bits)
    names = [f"{name}." for name in compiled.instructions if name.startswith(kind)]
    if size is None:
        return sum(
            not any(f"{s}." in name for s in (".U8", ".U16", ".64", ".128")) for name in names
        )
    return sum(f"{size}." in name for name in names)


def check(direction, columns, dtype, threshold, target):
    """A launch with the epilogue tanh: the width of its loads, and where threads meet."""
    compiled = build(direction, "tanh(z)", columns, dtype, threshold, target)
    vector = {540: 4, 384: 4, 135: 1, 1537: 1}[columns]
    per_row = 8 if columns == 1537 else 1
    pieces = -(-columns // (32 * per_row * vector))  # of a row, in a thread
    bits = vector * dtype.itemsize * 8
    matrices = {"forward": (2, 1), "backward": (3, 2)}[direction]
    # And no more: nothing is loaded beyond the last column.
    extra = 8 * pieces if bits in (32, 128) else 1  # fp32 parameters, statistics and sums
    assert matrices[0] * pieces <= moved(compiled, "LDG", bits) <= matrices[0] * pieces + extra
    assert matrices[1] * pieces <= moved(compiled, "STG", bits) <= matrices[1] * pieces + extra
    if direction == "backward":
        assert compiled.shared <= 2 * 1024
    elif per_row == 1:
        assert compiled.shared == 0
        assert compiled.count("BAR") == 0
    else:
        assert compiled.shared <= 64
    if dtype == torch.bfloat16:
        rounding = [name for name in compiled.instructions if name.startswith("F2FP.")]
        assert rounding
        assert not any(".RZ" in name for name in rounding), "bf16 is cut off, not rounded"
    return compiled


@pytest.mark.parametrize("columns", [540, 384, 135, 1537])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_with_dropout(direction, columns):
    check(direction, columns, torch.bfloat16, RATE, "sm_90")


@pytest.mark.parametrize("columns", [540, 384, 135, 1537])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_without_dropout(direction, columns):
    check(direction, columns, torch.float32, 0, "sm_90")


@pytest.mark.parametrize("target", ["sm_80", "sm_100"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_elsewhere(direction, target):
    check(direction, 540, torch.bfloat16, RATE, target)


def test_dropout_costs_little_and_nothing_without():
    """Per row of 540 columns in a warp: five calls of seven rounds, each used for 20 elements."""
    counts = {}
    for threshold in (0, RATE):
        compiled = check("forward", 540, torch.bfloat16, threshold, "sm_90")
        counts[threshold] = len(compiled.instructions)
        products = compiled.count("IMAD.WIDE.U32") + compiled.count("IMAD.HI.U32")
        assert (products > 40) == (threshold > 0)
    assert counts[0] <= 850
    assert counts[RATE] - counts[0] <= 300
    # Another seed is another value of an argument, and none where there is no dropout.
    with_seed, without = (plan("forward", "z", 540, torch.float32, t) for t in (RATE, 0))
    assert len(with_seed.arguments) == len(without.arguments) + 1


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_residual_is_read_once(direction):
    """Where the program reads the residual too: as many loads as with one matrix less."""
    launch = plan(direction, "add(tanh(z), x)", 540, torch.bfloat16, 0)
    compiled = aot.compile(launch.kernel, launch.arguments, launch.constants, "sm_90")
    assert moved(compiled, "LDG", 64) == {"forward": 2, "backward": 3}[direction] * 5


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_long_programs(direction):
    """More values of an element in registers: more warps to a row instead of spills."""
    text = "mul(max(elu(z), leaky_relu(x)), add(tanh(mul(gelu(z), sigmoid(x))), swish(z)))"
    build(direction, text, 540, torch.bfloat16, RATE, "sm_90")


def test_pitched_rows_and_16_bit_parameters():
    for options in ({"pitch": 1088}, {"affine_dtype": torch.bfloat16}):
        compiled = build("backward", "tanh(z)", 540, torch.bfloat16, RATE, "sm_90", **options)
        assert moved(compiled, "STG", 64) == 10


def test_fp64():
    launch = plan("backward", "tanh(z)", 540, torch.float64, RATE)
    assert aot.compile(launch.kernel, launch.arguments, launch.constants, "sm_90").spills == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("direction", "columns", "dtype", "threshold", "target"),
    list(itertools.product(DIRECTIONS, (540, 384, 135, 1537), TYPES, (0, RATE), aot.TARGETS)),
)
def test_grid(direction, columns, dtype, threshold, target):
    check(direction, columns, dtype, threshold, target)
