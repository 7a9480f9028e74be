"""The matrix products as machine code for three GPU generations, without a GPU.

What is asserted decides their speed: tensor cores, no spills, loads ahead into shared memory that
are as wide as the pitch allows, and registers and shared memory for two blocks per multiprocessor.
"""

import itertools

import aot
import pytest
import torch

from fastffn.expr import Expr, backward_program, forward_program
from fastffn.kernels import linear, linear_weight

ROWS = 16384
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TENSOR_CORES = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}
REGISTERS = 65536  # of a multiprocessor
FEW = 16  # accesses to spilled registers, which the assembler trades for one more block
WIDTHS = [(540, 540), (540, 270), (270, 540), (540, 180), (384, 1536), (1536, 384), (135, 135)]
ELSEWHERE = [WIDTHS[0], WIDTHS[5]]
GATED = "mul(gelu(z), sigmoid(h))"


def matrix(rows, columns, dtype, pitch=None, start=0):
    return torch.empty(rows, pitch or columns, dtype=dtype)[:, start : start + columns]


def forward(N, K, dtype=BF16, text="gelu(z)", pitch=None, a=None):
    """The launch of a forward product; `pitch`: of both factors."""
    expr = Expr.parse(text)
    products = len(expr.inputs)
    return linear.plan(
        matrix(ROWS, K, dtype, pitch) if a is None else a,
        [matrix(N, K, dtype, pitch).t() for _ in range(products)],
        [torch.empty(N, dtype=dtype) for _ in range(products)],
        forward_program(expr),
        [],
        [matrix(ROWS, N, dtype)],
    )


def data_gradient(N, K, dtype=BF16, text="gelu(z)", pitch=None, halves=False, alias=False):
    """The launch of a data gradient with the sums of all outputs.

    `pitch`: of the weight; `halves`: extras and outputs are the right halves of wider rows.
    """
    program = backward_program(Expr.parse(text))
    wide = (2 * N, N) if halves else (N, 0)
    extras = [matrix(ROWS, N, dtype, *wide) for _ in program.inputs[1:]]
    outputs = extras if alias else [matrix(ROWS, N, dtype, *wide) for _ in program.outputs]
    summed = tuple(range(len(outputs)))
    sums = torch.empty(linear.rows_of_sums(ROWS, N, K, dtype), len(summed), N)
    weight = matrix(K, N, dtype, pitch)
    return linear.plan(
        matrix(ROWS, K, dtype), [weight], [None], program, extras, outputs, sums, summed
    )


def weight_gradient(N, K, dtype=BF16, pitch=None):
    out = torch.empty(N, K, dtype=dtype)
    return linear_weight.plan_weight_gradient(
        matrix(ROWS, N, dtype, pitch), matrix(ROWS, K, dtype), out
    )


def bits(dtype, *pitches):
    """Bits of a load where rows are so many elements apart; 0 if too few to load ahead."""
    size = dtype.itemsize
    width = min([16 // size] + [pitch & -pitch for pitch in pitches]) * size * 8
    return width if width >= 32 else 0


def build(launch, target, tensor_cores=True, few_spills=False):
    compiled = aot.compile(launch.kernel, launch.arguments, launch.constants, target)
    assert compiled.spills <= (FEW if few_spills else 0)
    assert compiled.shared * 2 <= aot.SHARED_LIMIT[target]
    name = TENSOR_CORES[target]
    assert (compiled.count(name) > 0) == tensor_cores, "tensor cores"
    return compiled


def two_blocks(compiled, launch, *widths):
    """Narrow loads and stores take more registers for addresses, above all on sm_80."""
    if all(width % 4 == 0 for width in widths):
        assert compiled.registers * launch.constants["num_warps"] * 32 * 2 <= REGISTERS


def check_forward(N, K, dtype, target, few_spills=False):
    launch = forward(N, K, dtype)
    compiled = build(launch, target, dtype != FP32, few_spills)
    two_blocks(compiled, launch, N, K)
    assert compiled.widest("LDGSTS") == bits(dtype, K)
    assert compiled.widest("STG") == (bits(dtype, N) or 16)


def check_data_gradient(N, K, dtype, target, few_spills=False):
    launch = data_gradient(N, K, dtype)
    compiled = build(launch, target, dtype != FP32, few_spills)
    two_blocks(compiled, launch, N, K)
    # Both factors are loaded ahead, or the one whose rows are even.
    assert compiled.widest("LDGSTS") == max(bits(dtype, K), bits(dtype, N))
    assert compiled.widest("LDG") >= (bits(dtype, N) or 16)
    assert compiled.widest("STG") >= (bits(dtype, N) or 16)


def check_weight_gradient(N, K, dtype, target, few_spills=False):
    launch = weight_gradient(N, K, dtype)
    compiled = build(launch, target, dtype != FP32, few_spills)
    two_blocks(compiled, launch, N, K)
    assert compiled.widest("LDGSTS") == max(bits(dtype, K), bits(dtype, N))
    assert compiled.widest("STG") == bits(FP32, K)


CHECKS = [check_forward, check_data_gradient, check_weight_gradient]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(("N", "K"), WIDTHS)
def test_hopper(check, N, K):
    check(N, K, BF16, "sm_90")


@pytest.mark.parametrize("target", ["sm_80", "sm_100"])
@pytest.mark.parametrize(("N", "K"), ELSEWHERE)
def test_elsewhere(N, K, target):
    for check in CHECKS if (N, K) == ELSEWHERE[0] else CHECKS[:1]:
        check(N, K, BF16, target)


@pytest.mark.parametrize("dtype", [FP16, FP32])
def test_other_types(dtype):
    check_forward(540, 540, dtype, "sm_90")


def test_tf32_where_torch_allows_it():
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        launch = forward(540, 540, FP32)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    build(launch, "sm_90", tensor_cores=True)


@pytest.mark.parametrize("target", aot.TARGETS)
def test_two_products(target):
    build(forward(540, 540, text=GATED), target)


def test_width_follows_the_pitch():
    """A slice of 135 columns of wider rows is loaded as wide as the pitch allows."""
    compiled = build(forward(135, 135, pitch=136), "sm_90")
    assert compiled.widest("LDGSTS") == 128
    compiled = build(data_gradient(135, 540, pitch=540), "sm_90")
    assert compiled.widest("LDGSTS") == 64
    assert not [name for name in compiled.instructions if name == "LDGSTS.E"]
    assert build(weight_gradient(135, 540, pitch=540), "sm_90").widest("LDG") == 0


def test_second_halves_of_rows():
    """Their addresses are no multiples of 16 bytes, and still they are not read one by one."""
    compiled = build(data_gradient(540, 540, halves=True, alias=True), "sm_90")
    assert compiled.widest("LDG") == 64
    assert not [name for name in compiled.instructions if ".U16" in name]


def test_far_rows():
    """64-bit offsets inside a tile."""
    far = torch.empty(1, dtype=BF16, device="meta").as_strided((ROWS, 540), (2**26, 1))
    launch = forward(540, 540, a=far)
    pointers = [aot.Pointer(BF16), *launch.arguments[1:]]
    assert aot.compile(launch.kernel, pointers, launch.constants, "sm_90").spills == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("check", "width", "dtype", "target"),
    list(itertools.product(CHECKS, WIDTHS, [BF16, FP16, FP32], aot.TARGETS)),
)
def test_grid(check, width, dtype, target):
    check(*width, dtype, target, few_spills=True)


@pytest.mark.slow
@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize(("N", "K"), [(540, 540), (135, 540), (540, 135)])
@pytest.mark.parametrize("text", [GATED, "max(mul(gelu(z), sigmoid(h)), tanh(x))"])
def test_gated_data_gradients(text, N, K, dtype, target):
    build(data_gradient(N, K, dtype, text), target, dtype != FP32, few_spills=True)
