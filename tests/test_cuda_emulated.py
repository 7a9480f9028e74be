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
from fastffn.ops.residual_norm_reference import dropout_mask, philox, threshold


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
    """140 instructions over 55 registers are run; more than 144 are refused."""
    a = torch.linspace(-2, 2, 41, dtype=dtype)
    cuda_checks.elementwise(cuda, product(17), {"a": a}, torch.ones_like(a))
    long = backward_program(product(30))
    assert cuda.module.cuda_takes(cuda.program(backward_program(product(17))))
    assert not cuda.module.cuda_takes(cuda.program(long))
    with pytest.raises(RuntimeError, match="218 instructions, more than the 144"):
        cuda.elementwise(long, [a.to(cuda.device)] * 2, [a.to(cuda.device)])


def test_registers_that_no_block_holds_are_refused(cuda):
    bytes_of_program = struct.pack("<10H", 1, 1, 250, 1, 9, 249, 0, 0, 0, 249)
    operand = (torch.zeros(4, dtype=torch.float64, device=cuda.device).data_ptr(), 1, (1,))
    program = cuda.module.Program(bytes_of_program)
    with pytest.raises(RuntimeError, match="more than a block has"):
        cuda.module.cuda_elementwise(program, (4,), [operand, operand], *cuda.where())


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_column_sums(cuda, data):
    expr = data.draw(expressions())
    dtype = data.draw(st.sampled_from(DTYPES))
    shape = (
        data.draw(st.sampled_from([1, 2, 7, 30])),
        data.draw(st.sampled_from([1, 3, 16, 45, 135, 540])),
    )
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    inputs = {
        name: tensor(shape, dtype, data.draw(st.sampled_from(LAYOUTS)), generator)
        for name in expr.inputs
    }
    grad = tensor(shape, dtype, data.draw(st.sampled_from(LAYOUTS[:4])), generator)
    cuda_checks.summed_elementwise(cuda, expr, inputs, grad, data.draw(st.sampled_from([1, 5, 64])))


@pytest.mark.parametrize("width", [1, 7, 135, 540, 1537])
def test_column_sums_in_both_orders_of_the_threads(cuda, order, width):
    generator = torch.Generator().manual_seed(0)
    inputs = {n: tensor((23, width), torch.bfloat16, "dense", generator) for n in "ab"}
    grad = tensor((23, width), torch.bfloat16, "dense", generator)
    cuda_checks.summed_elementwise(cuda, Expr.parse(EXPRESSIONS[3]), inputs, grad, 10)


def norm(shape, dtype, generator, text="tanh(z)", residual_of=None, layout="dense", **settings):
    """A call of the row kernel on random tensors."""
    expr = Expr.parse(text)
    inputs = {name: tensor(shape, dtype, layout, generator) for name in expr.inputs}
    residual = inputs[residual_of] if residual_of else tensor(shape, dtype, layout, generator)
    weight, bias = (tensor(shape, dtype, "row vector", generator) for _ in range(2))
    dy = tensor(shape, dtype, layout, generator)
    return cuda_checks.Norm(
        expr, inputs, residual, weight, bias, dy, residual_of=residual_of, **settings
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 7, 135, 540, 1537])
def test_residual_norm(cuda, width, dtype):
    generator = torch.Generator().manual_seed(width)
    norm((9, width), dtype, generator).check(cuda)
    norm((5, width), dtype, generator, p=0.1, seed=-(2**40) + 7).check(cuda)


@pytest.mark.parametrize("layout", LAYOUTS[1:4])
def test_residual_norm_of_strided_rows(cuda, layout):
    generator = torch.Generator().manual_seed(1)
    norm((6, 45), torch.float32, generator, "max(gelu(z), x)", "x", layout, p=0.2).check(cuda)


@pytest.mark.parametrize("width", [270, 1100])
def test_residual_norm_in_both_orders_of_the_threads(cuda, order, width):
    generator = torch.Generator().manual_seed(2)
    norm((11, width), torch.bfloat16, generator, "mul(swish(z), x)", "x", p=0.3).check(cuda, 5)


def test_what_may_be_absent(cuda):
    for absent in ("residual", "weight", "bias"):
        case = norm((3, 20), torch.float32, torch.Generator().manual_seed(1), p=0.2)
        setattr(case, absent, None)
        case.check(cuda)


def test_the_residual_is_no_part_of_the_sums(cuda):
    """Of a gradient that the residual's is added to, the sum is that of the program alone."""
    generator = torch.Generator().manual_seed(1)
    norm((9, 70), torch.float32, generator, "mul(x, tanh(z))", "x", p=0.1).check(cuda)


def test_dropout_keeps_nan(cuda):
    case = norm((2, 40), torch.float32, torch.Generator().manual_seed(1), p=0.99)
    case.inputs["z"][0, 3] = torch.nan
    y = case.run(cuda, 4)["y"]
    assert y[0].isnan().all() and not y[1].isnan().any()


@pytest.mark.parametrize("width", [90, 2000])
def test_residual_norm_where_shared_memory_is_short(cuda, width):
    """A long program in double: rows are computed again in each pass, sums added up in memory."""
    case = norm((3, width), torch.float64, torch.Generator().manual_seed(1), str(product(17)))
    case.check(cuda, 2)


def test_dropout_is_the_mask_of_the_reference(cuda):
    """Bit for bit, from any row on: row 2^32 + 5 has a counter of its own."""
    rows, columns, p = 7, 75, 0.37
    case = norm((rows, columns), torch.float32, torch.Generator().manual_seed(1), "add(z, z)")
    case.p, case.seed = p, 0x123456789ABCDEF
    for first_row in (0, 3, 2**32 + 5):
        results = case.run(cuda, 4, first_row)
        row = torch.arange(rows)[:, None] + first_row
        group = torch.arange(columns)[None, :] // 8
        zero = torch.zeros_like(row)
        words = philox((group, row & 0xFFFFFFFF, row >> 32, zero), case.seed)
        lane = torch.arange(columns).expand(rows, columns) % 8
        words = torch.stack([word.expand(rows, columns) for word in words])
        half = words.gather(0, lane[None] // 2)[0] >> (lane % 2 * 16) & 0xFFFF
        kept = half >= threshold(p)
        assert (results["z"] != 0).equal(kept)
        if first_row == 0:
            assert kept.equal(dropout_mask(case.seed, rows, columns, p))
            case.check(cuda)


def test_offsets_past_2_31_elements(cuda, tmp_path):
    if cuda.device != "cpu":
        pytest.skip("a sparse file is memory of the CPU")
    cuda_checks.far_rows(cuda, str(tmp_path / "rows"))


def test_routines_in_device_memory(cuda):
    """The same launch runs whatever program and width are written there."""
    generator = torch.Generator().manual_seed(0)
    shape = (9, 100)
    z, x = (tensor(shape, torch.bfloat16, "dense", generator).to(cuda.device) for _ in range(2))
    captured = forward_program(Expr.parse("add(z, x)"))
    memory = cuda.routine(captured, 8)
    out = cuda_checks.poisoned(shape, torch.bfloat16, cuda.device)
    sums = cuda_checks.poisoned((2, 1, 100), torch.float32, cuda.device)

    def launch():
        cuda.summed_elementwise(captured, [z, x, out], sums, 5, (0,), memory, 8)

    graph = None
    for text, width in (("mul(gelu(z), x)", 53), ("add(z, tanh(x))", 100), ("max(z, x)", 8)):
        expr = Expr.parse(text)
        memory.copy_(cuda.routine(forward_program(expr), 8, width))
        if cuda.device == "cpu":
            launch()
        elif graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                launch()
        if graph:
            graph.replay()
        want = reference.elementwise(expr, {"z": z.float(), "x": x.float()})
        want[:, width:] = 0
        torch.testing.assert_close(out.float(), want, rtol=2**-7, atol=1e-6)
        torch.testing.assert_close(sums.sum((0, 1)), want.sum(0), rtol=1e-5, atol=1e-4)
    with pytest.raises(RuntimeError, match="55 registers where there is place for 8"):
        cuda.routine(backward_program(product(17)), 8)


def test_routines_of_the_row_kernel_in_device_memory(cuda):
    generator = torch.Generator().manual_seed(0)
    case = norm((9, 100), torch.bfloat16, generator, "mul(gelu(z), x)", "x", p=0.1)
    wanted = case.run(cuda, 4)
    results = case.run(cuda, 4, captured=Expr.parse("add(z, x)"))
    assert all(results[name].equal(x) for name, x in wanted.items())
