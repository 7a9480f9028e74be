"""Lowering, differentiation and register allocation, on plain numbers: no tensors, no backend."""

import math

import pytest
from hypothesis import given, settings
from oracle import expressions

from fastffn.expr import Expr, backward_program, forward_program
from fastffn.expr.evaluate import _function, evaluate

POINT = {"a": 0.37, "b": -1.21, "c": 0.84}


def run(program, inputs):
    """The program's outputs; every register that was not written is missing."""
    register = dict(enumerate(inputs[name] for name in program.inputs))
    for instruction in program.instructions:
        count = _function(instruction.op).__code__.co_argcount
        values = [register[source] for source in instruction.sources][:count]
        register[instruction.target] = _function(instruction.op)(*values)
    return [register[output] for output in program.outputs]


@given(expressions())
def test_forward_computes_the_expression(expr):
    (value,) = run(forward_program(expr), POINT)
    assert value == pytest.approx(evaluate(expr, POINT), rel=1e-12)


@settings(max_examples=200)
@given(expressions())
def test_backward_is_the_derivative(expr):
    gradients = run(backward_program(expr), {"grad": 1.7, **POINT})
    for name, gradient in zip(expr.inputs, gradients, strict=True):
        h = 1e-6
        up, down = ({**POINT, name: POINT[name] + s} for s in (h, -h))
        slope = 1.7 * (evaluate(expr, up) - evaluate(expr, down)) / (2 * h)
        middle = evaluate(expr, POINT)
        bend = abs(evaluate(expr, up) - 2 * middle + evaluate(expr, down)) / h  # a kink nearby
        assert gradient == pytest.approx(slope, rel=1e-4, abs=1e-6 + 2 * bend)


@given(expressions())
def test_allocation_keeps_inputs_and_meaning(expr):
    for program in (forward_program(expr), backward_program(expr)):
        allocated = program.allocated()
        inputs = {"grad": 0.6, **POINT}
        assert run(allocated, inputs) == run(program, inputs)
        assert allocated.registers <= program.registers
        written = [instruction.target for instruction in allocated.instructions]
        assert all(register >= len(program.inputs) for register in written)
        assert all(written.count(output) <= 1 for output in allocated.outputs)


def test_registers_are_reused():
    expr = Expr.parse("relu(" * 20 + "a" + ")" * 20)
    assert forward_program(expr).allocated().registers == 3  # input, value, output


def test_common_subexpressions_are_computed_once():
    expr = Expr.parse("mul(tanh(a), add(tanh(a), b))")
    assert [i.op for i in forward_program(expr).instructions].count("tanh") == 1
    assert [i.op for i in backward_program(expr).instructions].count("tanh") == 1
    gelu = backward_program(Expr.parse("mul(gelu(a), b)"))
    assert [i.op for i in gelu.instructions].count("gelu.t") == 1  # shared by value and gradient


def test_backward_of_some_inputs_computes_no_more():
    expr = Expr.parse("mul(gelu(a), tanh(b))")
    program = backward_program(expr, ("b",))
    assert len(program.outputs) == 1
    assert "gelu.da" not in [i.op for i in program.instructions]
    assert run(program, {"grad": 2.0, **POINT}) == [
        run(backward_program(expr), {"grad": 2.0, **POINT})[1]
    ]


def test_backward_of_an_input_is_the_upstream_gradient():
    program = backward_program(Expr.parse("a"))
    assert program.outputs == (0,) and not program.instructions
    assert math.isclose(run(program, {"grad": 3.0, "a": 1.0})[0], 3.0)


@given(expressions())
def test_backward_with_sums_order_and_value(expr):
    names = tuple(reversed(expr.inputs))
    added_to = names[:1]
    program = backward_program(expr, None, added_to, names, value=True)
    assert program.inputs == ("grad", *names, f"grad_{names[0]}")
    inputs = {"grad": 0.6, f"grad_{names[0]}": 2.5, **POINT}
    *gradients, value = run(program, inputs)
    expected = dict(zip(expr.inputs, run(backward_program(expr), inputs), strict=True))
    expected[names[0]] += 2.5
    assert gradients == pytest.approx([expected[name] for name in names], rel=1e-12)
    assert value == pytest.approx(evaluate(expr, POINT), rel=1e-12)
    assert run(program.fused().allocated(), inputs) == pytest.approx([*gradients, value])


def test_packed_layout():
    packed = forward_program(Expr.parse("add(a, relu(b))")).packed()
    numbers = memoryview(packed).cast("H").tolist()
    assert numbers[:4] == [2, 1, 4, 2]  # inputs, outputs, registers, instructions
    assert len(numbers) == 4 + 2 * 5 + 1


def test_fused_programs_are_shorter():
    def ops(program):
        return [instruction.op for instruction in program.fused().instructions]

    assert ops(forward_program(Expr.parse("add(swish(a), mul(a, b))"))) == ["swish.ty", "mul_add"]
    # In gelu's own backward the auxiliary value serves the gradient too, and stays.
    assert ops(backward_program(Expr.parse("mul(gelu(a), b)"))).count("gelu.t") == 1
    # A product that is read twice stays, and so does one that is an output.
    assert ops(forward_program(Expr.parse("add(mul(a, b), relu(mul(a, b)))"))) == [
        "mul",
        "relu",
        "add",
    ]
    square = backward_program(Expr.parse("add(mul(a, b), b)"))
    assert "mul_add" in ops(square) and len(square.fused().outputs) == 2
