"""The generated elementwise kernels against the reference: interpreted here, for real on a GPU."""

import functools

import interpreter
import pytest
import segment_checks as checks
import torch

from fastffn.expr import PRIMITIVES, Expr, forward_program

EXPRESSIONS = (
    "relu(a)",
    "mul(gelu(a), sigmoid(b))",
    "max(add(swish(a), tanh(b)), a)",
    "add(mul(tanh(a), gelu(b)), elu(max(a, b)))",
    "mul(max(elu(a), leaky_relu(b)), add(tanh(mul(gelu(a), sigmoid(b))), swish(a)))",
)


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def check(request):
    """Calls a function of `segment_checks` where its kernels run, with the device first."""
    if request.param == "cuda":
        return lambda function, *args, **kwargs: function("cuda", *args, **kwargs)
    return lambda function, *args, **kwargs: interpreter.call(
        functools.partial(function, "cpu", *args, **kwargs)
    )


def single(name: str) -> str:
    """The expression with just this primitive."""
    return f"{name}(a, b)" if PRIMITIVES[name].arity == 2 else f"{name}(a)"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PRIMITIVES)
def test_primitive(check, name, dtype):
    check(checks.agrees, single(name), dtype=dtype)


@pytest.mark.parametrize("name", PRIMITIVES)
def test_special_values(check, name):
    check(checks.special_values, single(name))


@pytest.mark.parametrize("name", PRIMITIVES)
def test_ties_and_kinks(check, name):
    check(checks.agrees, single(name), ties=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("text", EXPRESSIONS)
def test_expression(check, text, dtype):
    check(checks.agrees, text, (5, 540), dtype)


@pytest.mark.parametrize("columns", [1, 2, 17, 135, 180, 270, 540])
def test_widths(check, columns):
    check(checks.agrees, EXPRESSIONS[1], (11, columns), layouts=("contiguous", "pitched"))


@pytest.mark.parametrize("second", ["pitched", "shifted", "stepped", "transposed", "column"])
@pytest.mark.parametrize("first", ["contiguous", "pitched", "row", "scalar"])
def test_layouts(check, first, second):
    check(checks.agrees, EXPRESSIONS[2], (21, 44), layouts=(first, second))


@pytest.mark.parametrize("layout", ["pitched", "shifted", "stepped", "transposed"])
def test_output_layouts(check, layout):
    check(
        checks.agrees,
        EXPRESSIONS[3],
        (21, 44),
        layouts=("contiguous", "pitched"),
        out_layout=layout,
    )


@pytest.mark.parametrize("layout", ["row", "column", "scalar", "stepped"])
def test_gradient_layouts(check, layout):
    """The gradient of a sum is an expanded scalar, that of a sum over rows an expanded vector."""
    check(checks.agrees, EXPRESSIONS[2], (21, 44), grad_layout=layout)
    check(checks.agrees, "add(a, b)", (21, 44), grad_layout=layout)


def test_all_transposed(check):
    check(checks.agrees, EXPRESSIONS[1], (21, 45), layouts=("transposed",), out_layout="transposed")


def test_more_than_one_block(check):
    """Several blocks in both directions, the last ones cut, in both forms of the kernel."""
    check(checks.agrees, EXPRESSIONS[1], (37, 201))
    check(checks.agrees, EXPRESSIONS[1], (37, 201), layouts=("pitched",))


def test_small_arguments(check):
    check(checks.small_arguments)


def test_mixed_types(check):
    check(checks.mixed_types)


def test_empty_and_single(check):
    check(checks.empty_and_single)


@pytest.mark.parametrize(("rows", "stride"), [(2, 2**31 + 4), (33, 2**26), (3, 2**30 + 1)])
def test_far_rows(tmp_path, rows, stride):
    """Offsets beyond 2^31 elements: inside a block, between blocks, with a 32-bit stride."""
    interpreter.call(checks.far_rows, str(tmp_path / "memory"), rows, stride)


def test_wrong_operands_are_refused():
    from fastffn.kernels import segment

    program = forward_program(Expr.parse("mul(a, b)"))
    a = torch.empty(3, 4)
    with pytest.raises(ValueError, match="2 inputs and 1 outputs, not 1 and 1"):
        segment.plan(program, [a], [a])
    with pytest.raises(ValueError, match="one shape"):
        segment.plan(program, [a, a[:2]], [a])
