"""The Triton products with a Program for epilogue, each beside torch and torch.compile: GPUs only.

The three products of a unit's middle: forward with its segment, the data gradient with the
segment's backward and the bias gradients, the weight gradient.
"""

import pytest
import torch
import torch.nn.functional as F

from fastffn.expr import Expr, backward_program, forward_program

from .harness import check_outputs, compiled, floor_seconds, interleave

pytestmark = pytest.mark.gpu
GELU = Expr.parse("gelu(z1)")
FORWARD, BACKWARD = forward_program(GELU), backward_program(GELU)
SIZES = [(540, 540), (540, 270), (540, 180), (384, 1536)]


def forward(x, weight, bias, z, grad):
    from fastffn.kernels import linear

    def fused():
        out = torch.empty_like(z)
        linear.run(x, [weight.t()], [bias], FORWARD, [], [out])
        return out

    def eager(x, weight, bias):
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")

    return fused, eager, (x, weight, bias)


def data_gradient(x, weight, bias, z, grad):
    """grad [M, H] @ down [H, I], then gelu's gradient at z, and the columns' sums."""
    from fastffn.kernels import linear

    down = weight.t().contiguous()

    def fused():
        out = torch.empty_like(z)
        rows = linear.rows_of_sums(z.shape[0], z.shape[1], grad.shape[1], z.dtype)
        sums = z.new_empty((rows, 1, z.shape[1]), dtype=torch.float32)
        linear.run(grad, [down], [None], BACKWARD, [z], [out], sums, (0,))
        return out, sums.sum(0)[0]

    def eager(grad, down, z):
        dz = torch.ops.aten.gelu_backward(grad @ down, z, approximate="tanh")
        return dz, dz.sum(0, dtype=torch.promote_types(dz.dtype, torch.float32))

    return fused, eager, (grad, down, z)


def weight_gradient(x, weight, bias, z, grad):
    from fastffn.kernels import linear

    def fused():
        out = torch.empty_like(weight)
        linear.weight_gradient(z, x, out)
        return out

    def eager(z, x):
        return z.t() @ x

    return fused, eager, (z, x)


@pytest.mark.parametrize("rows", [1024, 8192, 32768])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("which", [forward, data_gradient, weight_gradient])
def test_linear(benchmark, which, size, rows):
    torch._dynamo.reset()
    torch.manual_seed(0)
    hidden, width = size
    shapes = [(rows, hidden), (width, hidden), (width,), (rows, width), (rows, hidden)]
    tensors = [torch.randn(shape).to("cuda", torch.bfloat16) for shape in shapes]
    fused, eager, inputs = which(*tensors)
    works = {"fastffn": fused, "eager": lambda: eager(*inputs)}
    for name, function in compiled(eager, "cuda").items():
        works[name] = lambda function=function: function(*inputs)
    wide = [x.double() for x in inputs]
    first = check_outputs(works, lambda: eager(*wide))
    traffic = sum(x.nbytes for x in inputs) + tensors[3].nbytes
    floor = floor_seconds("cuda", torch.bfloat16, traffic, 2 * rows * hidden * width)
    benchmark.group = f"{which.__name__}, {size}, {rows} rows, bf16, cuda"
    interleave(benchmark, works, "fastffn", 1.0, floor, first)
