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
from .harness import check_outputs, compiled, floor_seconds, interleave, works_of

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


# Rows and columns: EfficientBERT's widths and those of a small BERT, short and long.
SIZES = [(8192, 540), (8192, 180), (1024, 540), (1024, 270), (1024, 1536), (128, 540), (128, 384)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("operations", EXPRESSIONS)
def test_elementwise(benchmark, operations, direction, size, dtype, device):
    torch._dynamo.reset()
    expr = Expr.parse(EXPRESSIONS[operations])
    names = expr.inputs
    backward = direction != "forward"
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(size, generator=generator) for _ in names]
    inputs = [x.to(device, dtype).requires_grad_(backward) for x in inputs]
    grad = torch.randn(size, generator=generator).to(device, dtype) if backward else None

    def eager(*tensors):
        return reference.elementwise(expr, dict(zip(names, tensors, strict=True)))

    def fused(*tensors):
        return elementwise(expr, **dict(zip(names, tensors, strict=True)))

    works = works_of({"fastffn": fused, "eager": eager, **compiled(eager, device)}, inputs, grad)
    wide = [x.detach().double().requires_grad_(backward) for x in inputs]
    exact = works_of({"exact": eager}, wide, grad.double() if backward else None)["exact"]
    first = check_outputs(works, exact)
    moved = (len(names) + 1) + (2 * len(names) + 1 if backward else 0)
    floor = floor_seconds(device, dtype, moved * inputs[0].nbytes)
    benchmark.group = f"{operations} operations, {direction}, {size}, {dtype}, {device}"
    interleave(benchmark, works, "fastffn", 1.0, floor, first)


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
