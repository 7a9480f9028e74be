"""Elementwise expressions of one to seven operations: fastffn, eager torch and torch.compile.

Run: `make bench`, or `pytest bench/test_elementwise.py --benchmark-json FILE.json` and
`python -m bench report FILE.json`.
"""

import itertools
import random
import statistics
import time

import pytest
import torch
import torch._inductor.config

from fastffn import Expr
from fastffn.expr import PRIMITIVES
from fastffn.functional import elementwise
from fastffn.ops import reference

from .expressions import EXPRESSIONS
from .harness import check_outputs, interleave

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def contenders(expr: Expr, modes: list[str | None]):
    """Functions of the input tensors: fastffn, eager, torch.compile in each mode."""
    names = expr.inputs

    def eager(*tensors):
        return reference.elementwise(expr, dict(zip(names, tensors, strict=True)))

    def fused(*tensors):
        return elementwise(expr, **dict(zip(names, tensors, strict=True)))

    compiled = {
        f"torch.compile{f' {mode}' if mode else ''}": torch.compile(eager, mode=mode)
        for mode in modes
    }
    return {"fastffn": fused, "eager": eager, **compiled}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("width", [540, 180])
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("operations", EXPRESSIONS)
def test_elementwise(benchmark, operations, direction, width, dtype, device):
    torch._dynamo.reset()
    expr = Expr.parse(EXPRESSIONS[operations])
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(8192, width, generator=generator) for _ in expr.inputs]
    backward = direction != "forward"
    inputs = [x.to(device, dtype).requires_grad_(backward) for x in inputs]
    grad = torch.randn(8192, width, generator=generator).to(device, dtype)

    def work(function, inputs=inputs, grad=grad):
        if not backward:
            return lambda: function(*inputs)
        return lambda: torch.autograd.grad(function(*inputs), inputs, grad)

    functions = contenders(expr, [None] if device == "cpu" else [None, "max-autotune"])
    works = {name: work(function) for name, function in functions.items()}
    exact = work(
        functions["eager"],
        [x.detach().double().requires_grad_(backward) for x in inputs],
        grad.double(),
    )
    check_outputs(works, exact)
    benchmark.group = (
        f"{operations} operations, {direction}, {tuple(grad.shape)}, {dtype}, {device}"
    )
    interleave(benchmark, works, "fastffn")


def unseen_expressions(seed: int = 0):
    """Expressions of five to nine operations, none met twice."""
    generator = random.Random(seed)
    unary = [name for name, primitive in PRIMITIVES.items() if primitive.arity == 1]
    while True:
        a, b, c, d = (generator.choice(unary) for _ in range(4))
        joint = generator.choice(["add", "mul", "max"])
        yield Expr.parse(f"{joint}({a}({b}(a)), mul({c}({d}(b)), {a}(b)))")


def first_result(function, expr: Expr, inputs) -> float:
    """Seconds from the text of `expr` to its value and gradients."""
    start = time.perf_counter()
    out = function(str(expr))(*inputs)
    torch.autograd.grad(out.sum(), inputs)
    return time.perf_counter() - start


def test_first_result_of_a_new_expression(benchmark):
    inputs = [torch.randn(1024, 540, requires_grad=True) for _ in range(2)]

    def fused(text):
        return lambda a, b: elementwise(text, a=a, b=b)

    def compiled(text):
        expr = Expr.parse(text)
        return torch.compile(lambda a, b: reference.elementwise(expr, {"a": a, "b": b}))

    fresh = unseen_expressions()
    for expr in itertools.islice(fresh, 2):  # the first calls of a process import and start threads
        first_result(fused, expr, inputs)
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):  # an earlier run met them
        first_result(compiled, next(fresh), inputs)
        slow = [first_result(compiled, expr, inputs) for expr in itertools.islice(fresh, 3)]
    benchmark.group = "text of a new expression to its value and gradients, (1024, 540), fp32, cpu"
    benchmark.pedantic(
        lambda expr: first_result(fused, expr, inputs),
        setup=lambda: ((next(fresh),), {}),
        rounds=50,
    )
    ours = statistics.median(benchmark.stats.stats.data)
    rival = statistics.median(slow)
    benchmark.extra_info.update(
        median_ms={"fastffn": 1e3 * ours, "torch.compile": 1e3 * rival},
        ratio={"torch.compile": rival / ours},
        rounds=50,
        threads=torch.get_num_threads(),
    )
