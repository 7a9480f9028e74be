"""The matrix products with epilogues against the reference: interpreted here, for real on a GPU."""

import functools

import interpreter
import linear_checks as checks
import pytest
import torch

from fastffn.expr import Expr, forward_program
from fastffn.kernels import linear

GELU = "gelu(z)"
GATED = "mul(gelu(z), sigmoid(h))"
WITH_EXTRA = "max(tanh(z), x)"
FACTORS = [name for name in checks.LAYOUTS if name not in ("row", "column", "scalar")]
BF16_ON_GPU = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def check(request):
    """Calls a function of `linear_checks` where its kernels run, with the device first."""
    if request.param == "cuda":
        return lambda function, *args, **kwargs: function("cuda", *args, **kwargs)
    if "dtype" in request.fixturenames and request.getfixturevalue("dtype") == torch.bfloat16:
        pytest.skip("the interpreter's bf16 products are wrong")
    return lambda function, *args, **kwargs: interpreter.call(
        functools.partial(function, "cpu", *args, **kwargs)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16_ON_GPU])
@pytest.mark.parametrize(
    ("text", "products"), [(GELU, 1), (WITH_EXTRA, 1), (GATED, 2), ("max(add(z, h), x)", 2)]
)
def test_forward(check, text, products, dtype):
    check(checks.agrees, text, (45, 70, 135), dtype, products=products)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16_ON_GPU])
@pytest.mark.parametrize("text", [GELU, GATED, WITH_EXTRA, "add(z, x)"])
def test_data_gradient(check, text, dtype):
    """The first product is upstream of the segment; the sums are the gradients of the biases."""
    outputs = tuple(range(len(Expr.parse(text).inputs)))
    check(
        checks.agrees, text, (45, 70, 135), dtype,
        backward=True, weight="contiguous", bias=None, summed=outputs,
    )  # fmt: skip


@pytest.mark.parametrize("width", [1, 7, 64, 135])
@pytest.mark.parametrize("depth", [1, 7, 64, 135])
def test_widths(check, width, depth):
    check(checks.agrees, WITH_EXTRA, (33, width, depth), summed=(0,))


@pytest.mark.parametrize(("N", "K"), [(540, 7), (7, 540), (1537, 3), (3, 1537)])
def test_wide(check, N, K):
    check(checks.agrees, GELU, (5, N, K), torch.float16)


def test_rows(check):
    """One row, and more than one group of tiles with the last one cut."""
    check(checks.agrees, WITH_EXTRA, (1, 70, 20), summed=(0,))
    check(checks.agrees, WITH_EXTRA, (300, 70, 20), summed=(0,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16_ON_GPU])
def test_full_tiles(check, dtype):
    """As large as those of many rows; the epilogue takes them in two parts, in four with more
    operands."""
    shape = (200, 70, 20)
    check(checks.agrees, WITH_EXTRA, shape, dtype, summed=(0,), full_tiles=True)
    check(
        checks.agrees, "max(mul(gelu(z), h), x)", shape, dtype,
        backward=True, bias=None, summed=(0, 2), alias=True, full_tiles=True,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("weight", FACTORS)
@pytest.mark.parametrize("a", ["pitched", "transposed", "stepped", "second half"])
def test_factor_layouts(check, a, weight, dtype):
    check(checks.agrees, GATED, (35, 45, 67), dtype, products=2, a=a, weight=weight)


@pytest.mark.parametrize("bias", ["shifted", "stepped", None])
def test_biases(check, bias):
    check(checks.agrees, GATED, (35, 45, 20), products=2, bias=bias)


@pytest.mark.parametrize(
    "layout", ["pitched", "transposed", "stepped", "shifted", "second half", "last slice"]
)
@pytest.mark.parametrize("extra", ["second half", "row", "column", "scalar", "stepped"])
def test_matrix_layouts(check, extra, layout):
    check(checks.agrees, WITH_EXTRA, (35, 44, 20), extra=extra, out=layout)


@pytest.mark.parametrize(("text", "products"), [(GELU, 1), (GATED, 2)])
def test_products_are_kept_beside_the_result(check, text, products):
    check(checks.agrees, text, (35, 44, 20), products=products, keep=True, summed=(0, products))


@pytest.mark.parametrize("text", [GELU, GATED, "add(z, x)"])
def test_a_result_may_overwrite_an_extra(check, text):
    check(checks.agrees, text, (70, 45, 20), backward=True, bias=None, alias=True)


@pytest.mark.parametrize("out_dtype", [torch.float32, BF16_ON_GPU])
def test_mixed_types(check, out_dtype):
    check(checks.agrees, WITH_EXTRA, (35, 44, 20), torch.float16, out_dtype=out_dtype)


def test_nan_and_infinity(check):
    check(checks.propagates)


def test_one_program_many_operands(check):
    check(checks.one_program_many_operands)


def test_empty_sizes(check):
    check(checks.empty_sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16_ON_GPU])
@pytest.mark.parametrize("shape", [(700, 45, 70), (1, 7, 135), (1100, 1, 1), (64, 64, 64)])
def test_weight_gradient(check, shape, dtype):
    check(checks.weight_gradient_agrees, shape, dtype)


@pytest.mark.parametrize("layout", list(checks.LAYOUTS))
def test_weight_gradient_layouts(check, layout):
    check(checks.weight_gradient_agrees, (300, 45, 67), dz=layout)
    check(checks.weight_gradient_agrees, (300, 45, 67), x=layout, out_dtype=torch.float16)


@pytest.mark.parametrize("out", ["pitched", "transposed", "stepped"])
@pytest.mark.parametrize("rows", [64, 700])
def test_weight_gradient_results(check, rows, out):
    check(checks.weight_gradient_agrees, (rows, 45, 67), out=out)


@pytest.mark.parametrize("stride", [2**31 + 8, 2**30 + 1])
def test_far_rows(tmp_path, stride):
    """Offsets beyond 2^31 elements in the left factor, the output, and a weight gradient."""
    interpreter.call(checks.far_rows, str(tmp_path / "memory"), stride)


def test_wrong_operands_are_refused():
    program = forward_program(Expr.parse(WITH_EXTRA))
    a, w, z = torch.empty(3, 4), torch.empty(4, 5), torch.empty(3, 5)
    with pytest.raises(ValueError, match="2 inputs and 1 outputs, not 1 and 1"):
        linear.run(a, [w], [None], program, [], [z])
    with pytest.raises(ValueError, match="one or two weights"):
        linear.run(a, [], [], program, [z], [z])
    with pytest.raises(ValueError, match=r"\(5, 4\) where \(4, 5\) is needed"):
        linear.run(a, [w, w.t()], [None, None], program, [], [z])
    with pytest.raises(ValueError, match="of one type"):
        linear.run(a, [w.half()], [None], program, [z], [z])
    with pytest.raises(ValueError, match="sums must be"):
        linear.run(a, [w], [None], program, [z], [z], None, (0,))
    with pytest.raises(ValueError, match="needed"):
        linear.run(a, [w], [None], program, [z], [z], torch.empty(2, 1, 5), (0,))
    with pytest.raises(ValueError, match=r"\[M, N\], \[M, K\] and \[N, K\]"):
        linear.weight_gradient(z, a, torch.empty(4, 5))
    with pytest.raises(ValueError, match="alike"):
        linear.weight_gradient(z.double(), a.double(), torch.empty(5, 4))
