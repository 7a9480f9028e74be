"""The language: parsing, printing, errors that point, order, identity by meaning."""

import pickle
import subprocess
import sys

import pytest
from hypothesis import given, settings
from oracle import expressions
from patience import PATIENCE

from fastffn import Expr, ExprError
from fastffn.expr import PRIMITIVES
from fastffn.expr.evaluate import evaluate
from fastffn.ops import reference


@given(expressions())
def test_text_and_tree_are_the_same(expr):
    assert Expr.parse(str(expr)) == expr
    assert Expr.parse(str(expr).replace(",", " ,\n ").replace("(", " (")) == expr


@pytest.mark.parametrize(
    ("text", "position", "message"),
    [
        ("", 0, "empty"),
        ("   ", 3, "empty"),
        ("foo(x)", 0, "unknown operation 'foo'"),
        ("add(gelu(x), foo(x))", 13, "unknown operation 'foo'"),
        ("gelu", 0, "needs operands"),
        ("gelu()", 0, "takes 1 operand, not 0"),
        ("gelu(x, y)", 0, "takes 1 operand, not 2"),
        ("add(x, mul(x))", 7, "takes 2 operands, not 1"),
        ("gelu(x", 4, "never closed"),
        ("gelu(x))", 7, "closes nothing"),
        ("mul(a b)", 6, "missing before 'b'"),
        ("mul(a,, b)", 6, "missing before ','"),
        ("a b", 2, "ended before 'b'"),
        ("gelu(2x)", 5, "missing before '2'"),
        ("relu(" * 33 + "x" + ")" * 33, 160, "more than 32 levels"),
    ],
)
def test_errors_point_at_the_character(text, position, message):
    with pytest.raises(ExprError, match=message.replace("(", r"\(")) as caught:
        Expr.parse(text)
    assert caught.value.position == position
    *_, line, caret = str(caught.value).split("\n")
    assert line == f"  {text}" and caret.index("^") == position + 2


def test_inputs_height_and_substitution():
    expr = Expr.parse("mul(gelu(b), add(a, b))")
    assert expr.inputs == ("b", "a")
    assert expr.height == 2
    assert (
        str(expr.substitute({"b": Expr.parse("tanh(c)")})) == "mul(gelu(tanh(c)), add(a, tanh(c)))"
    )


@settings(max_examples=50)
@given(expressions())
def test_canonical_order_keeps_the_meaning(expr):
    canonical = expr.canonical()
    assert canonical.canonical() == canonical
    if set(canonical.inputs) == set(expr.inputs):
        assert canonical.fingerprint() == expr.fingerprint()


def test_fingerprint_tells_functions_apart_not_spellings():
    same = ["mul(gelu(a), b)", "mul(b, gelu(a))", "mul(max(b, b), gelu(a))"]
    assert len({Expr.parse(text).fingerprint() for text in same}) == 1
    assert Expr.parse("relu(relu(a))").fingerprint() == Expr.parse("relu(a)").fingerprint()
    different = ["gelu(a)", "gelu_erf(a)", "swish(a)", "gelu(b)", "relu(a)", "leaky_relu(a)"]
    assert len({Expr.parse(text).fingerprint() for text in different}) == len(different)


def test_every_primitive_has_an_oracle_and_values():
    assert list(reference.PRIMITIVES) == list(PRIMITIVES)
    assert evaluate(Expr.parse("add(a, mul(a, b))"), {"a": 3.0, "b": 4.0}) == 15.0
    assert evaluate(Expr.parse("max(elu(a), sigmoid(b))"), {"a": -1000.0, "b": -1000.0}) == 0.0


def test_pickles_mean_the_same_in_another_process():
    """The hash of a text differs between processes, and an expression keeps its hash."""
    expr = Expr.parse("mul(gelu(a), sigmoid(b))")
    hash(expr)
    code = (
        "import pickle, sys; from fastffn import Expr; from fastffn.expr import backward_program\n"
        "expr = pickle.load(sys.stdin.buffer)\n"
        "assert expr in {Expr.parse('mul(gelu(a), sigmoid(b))')}\n"
        "backward_program(expr)"
    )
    subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(expr), check=True, timeout=PATIENCE
    )
    error = pickle.loads(pickle.dumps(ExprError("wrong", "gelu(", 4)))
    assert str(error) == str(ExprError("wrong", "gelu(", 4)) and error.position == 4
