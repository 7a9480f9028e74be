"""csrc/cuda against torch: its logic in the emulator, and all of it on a GPU where there is one."""

import struct

import cuda_checks
import pytest
import torch
from cuda_checks import DTYPES, Cuda
from expressions import EXPRESSIONS
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import LAYOUTS, UNARY, expressions, tensor

from fastffn import Expr
from fastffn.expr import PRIMITIVES, backward_program, forward_program
from fastffn.ops import backend, reference


@pytest.fixture(scope="module", params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def cuda(request) -> Cuda:
    """The functions on the emulator and on a device."""
    if request.param == "emulated":
        import emulator

        return Cuda(emulator.load(), "cpu")
    module = backend.cpp()[0]
    if not hasattr(module, "cuda_elementwise"):
        pytest.skip("csrc was built without CUDA")
    return Cuda(module, "cuda")


@pytest.fixture(params=["first thread first", "last thread first"])
def order(request, cuda):
    """Both orders of the emulator: in one of them a missing barrier gives a wrong result."""
    if cuda.device == "cpu":
        cuda.module.set_reverse_order(request.param == "last thread first")
        yield
        cuda.module.set_reverse_order(False)
    else:
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PRIMITIVES)
def test_every_primitive(cuda, name, dtype):
    generator = torch.Generator().manual_seed(1)
    expr = Expr.parse(f"{name}({', '.join('ab'[: PRIMITIVES[name].arity])})")
    inputs = {n: 3 * tensor((5, 135), dtype, "dense", generator) for n in expr.inputs}
    grad = tensor((5, 135), dtype, "dense", generator)
    cuda_checks.elementwise(cuda, expr, inputs, grad)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_expressions_layouts_and_shapes(cuda, data):
    expr = data.draw(expressions())
    dtype = data.draw(st.sampled_from(DTYPES))
    shape = (
        data.draw(st.sampled_from([0, 1, 2, 7])),
        data.draw(st.sampled_from([0, 1, 3, 16, 45, 135, 540])),
    )
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    inputs = {
        name: tensor(shape, dtype, data.draw(st.sampled_from(LAYOUTS)), generator)
        for name in expr.inputs
    }
    grad = tensor(shape, dtype, data.draw(st.sampled_from(LAYOUTS[:4])), generator)
    cuda_checks.elementwise(cuda, expr, inputs, grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_elements_than_one_pass_of_the_blocks(cuda, dtype, order):
    """Several blocks, rows that are aligned to 16, 8, 4 and 2 bytes, and a rest in each."""
    generator = torch.Generator().manual_seed(1)
    expr = Expr.parse(EXPRESSIONS[3])
    for width in (544, 540, 270, 135):
        wide = {n: tensor((9, 600), dtype, "dense", generator)[:, :width] for n in expr.inputs}
        grad = tensor((9, width), dtype, "dense", generator)
        cuda_checks.elementwise(cuda, expr, wide, grad)


def test_dimensions_and_permuted_memory(cuda):
    generator = torch.Generator().manual_seed(0)
    expr = Expr.parse("max(swish(a), tanh(b))")
    a = torch.randn(3, 4, 5, 6, generator=generator).permute(2, 0, 3, 1)
    b = torch.randn(3, 1, 4, generator=generator)
    cuda_checks.elementwise(cuda, expr, {"a": a, "b": b}, torch.randn(a.shape, generator=generator))
    eight = torch.randn([2] * 8, generator=generator)
    inputs = {"a": eight, "b": eight.permute(*reversed(range(8)))}
    cuda_checks.elementwise(cuda, expr, inputs, torch.randn(eight.shape, generator=generator))


@pytest.mark.parametrize("name", PRIMITIVES)
def test_nan_and_infinity_propagate_as_in_torch(cuda, name):
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0, -1.0, 1e30, -1e30])
    a, b = (x.reshape(-1).clone() for x in torch.meshgrid(values, values, indexing="ij"))
    inputs = {"a": a, "b": b} if PRIMITIVES[name].arity == 2 else {"a": a}
    expr = Expr.parse(f"{name}({', '.join(inputs)})")
    # One number at a time: torch's vector code makes gelu(inf) NaN, its scalar code inf.
    rows = zip(*inputs.values(), strict=True)
    want = [reference.elementwise(expr, dict(zip(inputs, row, strict=True))) for row in rows]
    out = cuda_checks.poisoned(a.shape, a.dtype, cuda.device)
    moved = [x.to(cuda.device) for x in inputs.values()]
    cuda.elementwise(forward_program(expr), moved, [out])
    torch.testing.assert_close(out.cpu(), torch.stack(want), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_storage_formats_are_exact(cuda, dtype):
    """All values survive widening; narrowing rounds to nearest even, as torch does."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(1 << 15, generator=generator)
    wide = wide * torch.randn(1 << 15, generator=generator).mul(8).exp()
    program = forward_program(Expr.parse("max(a, a)"))
    for values in (every, wide):
        out = cuda_checks.poisoned(values.shape, dtype, cuda.device)
        cuda.elementwise(program, [values.to(cuda.device)], [out])
        want, out = values.to(dtype), out.cpu()
        assert out.isnan().equal(want.isnan())
        real = ~want.isnan()
        assert out[real].view(torch.int16).equal(want[real].view(torch.int16))


def product(count: int) -> Expr:
    """A product of many functions, whose gradient needs all of its factors."""
    terms = [f"{op}(mul(a, {inner}(a)))" for op in UNARY for inner in UNARY][:count]
    while len(terms) > 1:  # as a tree of least height: nesting is limited
        pairs = zip(terms[::2], terms[1::2], strict=False)
        terms = [f"mul({one}, {two})" for one, two in pairs] + terms[len(terms) & -2 :]
    return Expr.parse(terms[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_long_programs_and_many_registers(cuda, dtype):
    """158 instructions over 60 registers are run; more than 160 are refused."""
    a = torch.linspace(-2, 2, 41, dtype=dtype)
    cuda_checks.elementwise(cuda, product(20), {"a": a}, torch.ones_like(a))
    long = backward_program(product(30))
    with pytest.raises(RuntimeError, match="218 instructions, more than the 160"):
        cuda.elementwise(long, [a.to(cuda.device)] * 2, [a.to(cuda.device)])


def test_registers_that_no_block_holds_are_refused(cuda):
    bytes_of_program = struct.pack("<10H", 1, 1, 250, 1, 9, 249, 0, 0, 0, 249)
    operand = (torch.zeros(4, dtype=torch.float64, device=cuda.device).data_ptr(), 1, (1,))
    program = cuda.module.Program(bytes_of_program)
    with pytest.raises(RuntimeError, match="more than a block has"):
        cuda.module.cuda_elementwise(program, (4,), [operand, operand], *cuda.where())
