"""The row kernel against its oracle: interpreted here, for real on a GPU."""

import functools

import interpreter
import pytest
import residual_norm_checks as checks
import torch

from fastffn.expr import Expr, backward_program, forward_program
from fastffn.kernels import residual_norm, tiles

TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
EXPRESSIONS = (
    "z",
    "tanh(z)",
    "max(add(swish(z), tanh(x)), z)",
    "mul(max(elu(z), leaky_relu(x)), add(tanh(mul(gelu(z), sigmoid(x))), swish(z)))",
)


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def check(request):
    """Calls a function of `residual_norm_checks` where its kernels run, with the device first."""
    if request.param == "cuda":
        return lambda function, *args, **kwargs: function("cuda", *args, **kwargs)
    return lambda function, *args, **kwargs: interpreter.call(
        functools.partial(function, "cpu", *args, **kwargs)
    )


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("text", EXPRESSIONS)
def test_types(check, text, dtype, p):
    check(checks.agrees, text, dtype=dtype, p=p)


@pytest.mark.parametrize("columns", [1, 7, 8, 17, 135, 384, 540, 1537])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_widths(check, columns, dtype):
    check(checks.agrees, "tanh(z)", (11, columns), dtype)


def test_two_columns(check):
    """Only in fp64: the gradient is what cancellation leaves, in fp32 mere rounding."""
    check(checks.agrees, "tanh(z)", (11, 2), torch.float64)


def test_wide_rows(check):
    check(checks.agrees, EXPRESSIONS[2], (3, 8192), torch.float16)
    check(checks.agrees, "z", (2, 17000), torch.float32)


@pytest.mark.parametrize("second", ["pitched", "shifted", "stepped", "transposed", "column"])
@pytest.mark.parametrize("first", ["contiguous", "pitched", "row", "scalar"])
def test_layouts(check, first, second):
    check(checks.agrees, EXPRESSIONS[2], (21, 44), layouts=(first, second))
    check(checks.agrees, "add(tanh(a), b)", (21, 44), p=0.0, layouts=(first, second, "pitched"))


@pytest.mark.parametrize("layout", ["pitched", "shifted", "stepped", "transposed"])
def test_output_layouts(check, layout):
    check(checks.agrees, EXPRESSIONS[2], (21, 44), out_layout=layout)
    check(checks.agrees, "tanh(z)", (21, 44), layouts=("pitched",), out_layout=layout)


@pytest.mark.parametrize("layout", ["row", "column", "scalar", "stepped"])
def test_gradient_layouts(check, layout):
    check(checks.agrees, "tanh(z)", (21, 44), grad_layout=layout)


def test_without_residual(check):
    check(checks.without_residual)


def test_constant_gradient(check):
    check(checks.constant_gradient)


@pytest.mark.parametrize("affine", [(), ("weight",), ("bias",)])
def test_without_weight_or_bias(check, affine):
    check(checks.agrees, "tanh(z)", affine=affine)


def test_parameters_of_another_type(check):
    """fp32 parameters beside 16-bit activations."""
    check(checks.agrees, "tanh(z)", (9, 540), torch.bfloat16, affine_dtype=torch.float32)


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 64])
def test_numbers_of_rows(check, rows):
    check(checks.agrees, EXPRESSIONS[1], (rows, 45), parts=2)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_statistics(check, offset):
    check(checks.statistics, offset)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("columns", [1, 2, 4, 7, 44, 384, 540])
def test_mask(check, columns, dtype):
    check(checks.same_mask, (13, columns), 0.4, checks.SEED, dtype)
    check(checks.same_mask, (3, columns), 1.0, -1, dtype)


@pytest.mark.parametrize("vector", [1, 2, 4, 8])
def test_mask_of_far_rows(check, vector):
    check(checks.mask_of_far_rows, vector)


def test_parts_do_not_matter(check):
    check(checks.parts_do_not_matter)


def test_nothing_to_compute(check):
    check(checks.nothing_to_compute)


def test_bad_values_stay_in_their_row(check):
    check(checks.bad_values_stay_in_their_row)


@pytest.mark.parametrize(("rows", "stride"), [(2, 2**31 + 4), (9, 2**28)])
def test_far_rows(tmp_path, rows, stride):
    """Offsets beyond 2^31 elements: inside a tile and between tiles."""
    interpreter.call(checks.far_rows, str(tmp_path / "memory"), rows, stride)


def test_chunks():
    """One range at least, none shorter than eight rows, two blocks per multiprocessor at most."""
    assert tiles.residual_norm_chunks(0, 132) == 1
    assert tiles.residual_norm_chunks(17, 132) == 3
    assert tiles.residual_norm_chunks(10**6, 132) == 264
    assert residual_norm.chunks(4096, 540, torch.device("cpu")) == 4


def test_wrong_operands_are_refused():
    program, gradient = (
        make(Expr.parse("relu(a)")) for make in (forward_program, backward_program)
    )
    a, v = torch.empty(3, 4), torch.empty(3)
    forward = functools.partial(residual_norm.plan_forward, program)
    with pytest.raises(ValueError, match="1 input"):
        forward([a, a], a, None, None, 0.0, 0, None, a, v, v)
    with pytest.raises(ValueError, match="one shape"):
        forward([a], a[:2], None, None, 0.0, 0, None, a, v, v)
    with pytest.raises(ValueError, match="weight must be of shape"):
        forward([a], a, v, None, 0.0, 0, None, a, v, v)
    with pytest.raises(ValueError, match="rstd must be contiguous"):
        forward([a], a, None, None, 0.0, 0, None, a, v, a[:, 0])
    with pytest.raises(ValueError, match="seed"):
        forward([a], a, None, None, 0.0, 5, None, a, v, v)
    backward = functools.partial(
        residual_norm.plan_backward, program, gradient, [a], a, None, v, v, 0, None, a
    )
    with pytest.raises(ValueError, match="1 output"):
        backward([], a, -1, torch.empty(1, 2, 4), ())
    with pytest.raises(ValueError, match="sums must be contiguous"):
        backward([a], a, -1, torch.empty(1, 2, 4), (0,))
