"""The op `elementwise` against torch: values and gradients over layouts, dtypes and ISAs."""

import gc
import os
import struct
import subprocess
import sys

import pytest
import torch
from expressions import EXPRESSIONS
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import LAYOUTS, assert_accurate, expressions, tensor
from patience import PATIENCE

from fastffn import Expr, ExprError, UserError
from fastffn.expr import PRIMITIVES, forward_program
from fastffn.functional import elementwise
from fastffn.ops import backend, reference

pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CPP = backend.cpp()[0]


@pytest.fixture(params=CPP.available_isas() if CPP else [])
def isa(request):
    """Each instruction set of the C++ interpreter in turn."""
    before = CPP.isa()
    CPP.select_isa(request.param)
    yield request.param
    CPP.select_isa(before)


def check(expr, inputs, grad=None):
    """Value and gradients of `expr` by the oracle rule; tensors whose gradient flows require it."""
    expr = Expr.parse(expr) if isinstance(expr, str) else expr
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    same = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    out = elementwise(expr, **inputs)
    out_exact, out_same = (reference.elementwise(expr, x) for x in (exact, same))
    assert out.dtype == out_same.dtype
    assert_accurate(out, out_exact, out_same, str(expr))
    if grad is None:
        grad = torch.randn(out.shape, dtype=torch.float64, device=out.device).to(out.dtype)
    names = list(expr.inputs)
    mine = torch.autograd.grad(out, [inputs[n] for n in names], grad)
    theirs = torch.autograd.grad(out_same, [same[n] for n in names], grad)
    truth = torch.autograd.grad(out_exact, [exact[n] for n in names], grad.double())
    for name, got, want, true in zip(names, mine, theirs, truth, strict=True):
        assert got.dtype == inputs[name].dtype and got.shape == inputs[name].shape
        assert_accurate(got, true, want, f"gradient of {name} in {expr}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PRIMITIVES)
def test_every_primitive(name, dtype, served_by):
    generator = torch.Generator().manual_seed(1)
    inputs = {n: 3 * tensor((33, 135), dtype, "dense", generator) for n in "ab"}
    arity = PRIMITIVES[name].arity
    check(f"{name}({', '.join('ab'[:arity])})", {n: inputs[n] for n in "ab"[:arity]})


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_random_expressions_layouts_and_shapes(data):
    expr = data.draw(expressions())
    dtype = data.draw(st.sampled_from(DTYPES))
    rows = data.draw(st.sampled_from([0, 1, 2, 7, 40]))
    columns = data.draw(st.sampled_from([0, 1, 3, 16, 45, 135, 540, 1537]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    inputs = {
        name: tensor((rows, columns), dtype, data.draw(st.sampled_from(LAYOUTS)), generator)
        for name in expr.inputs
    }
    size = torch.broadcast_shapes(*(x.shape for x in inputs.values()))
    kind = data.draw(st.sampled_from(["dense", "expanded", "strided"]))
    grad = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
    if kind == "expanded":  # as out.sum().backward() passes it
        grad = torch.ones((), dtype=dtype).expand(size)
    elif kind == "strided" and len(size) == 2:
        grad = torch.stack([grad, grad], dim=-1)[..., 0]
    check(expr, inputs, grad)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", EXPRESSIONS)
@pytest.mark.parametrize("width", [1, 7, 135, 540, 1537])
def test_benchmark_expressions_at_odd_widths(count, width, dtype, device):
    generator = torch.Generator().manual_seed(count)
    expr = Expr.parse(EXPRESSIONS[count])
    inputs = {n: tensor((50, width), dtype, "dense", generator).to(device) for n in expr.inputs}
    check(expr, inputs)


def test_many_dimensions_and_permuted_memory():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 5, 6, generator=generator)
    inputs = {"a": x.permute(2, 0, 3, 1), "b": torch.randn(3, 1, 4, generator=generator)}
    check("max(swish(a), tanh(b))", inputs)
    dense_like = elementwise("gelu(a)", a=x.permute(2, 0, 3, 1))
    assert dense_like.stride() == x.permute(2, 0, 3, 1).stride()
    nine = torch.randn([2] * 9, generator=generator)
    check("mul(gelu(a), b)", {"a": nine, "b": nine.permute(*reversed(range(9)))})


def test_mixed_dtypes_promote_as_in_torch():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(5, 33, generator=generator)
    check("mul(gelu(a), b)", {"a": a, "b": torch.randn(33, generator=generator).bfloat16()})
    check("mul(gelu(a), b)", {"a": a.half(), "b": a.bfloat16()})
    check("add(a, tanh(b))", {"a": a.double(), "b": a.clone()})
    scalar = torch.randn((), generator=generator, dtype=torch.float64)
    check("add(tanh(a), b)", {"a": a, "b": scalar})  # float32: a scalar does not promote
    check("add(tanh(a), b)", {"a": a.bfloat16(), "b": scalar.float()})
    check("mul(tanh(a), b)", {"a": scalar.detach().float(), "b": scalar.detach().clone()})


@pytest.mark.parametrize("name", PRIMITIVES)
def test_nan_and_infinity_propagate_as_in_torch(name, isa):
    values = torch.tensor(
        [float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1.0, -1.0, 1e30, -1e30]
    )
    a, b = (x.reshape(-1).clone() for x in torch.meshgrid(values, values, indexing="ij"))
    arity = PRIMITIVES[name].arity
    inputs = {"a": a, "b": b} if arity == 2 else {"a": a}
    expr = Expr.parse(f"{name}({', '.join(inputs)})")
    # One number at a time: torch's vector code makes gelu(inf) NaN, its scalar code inf.
    rows = zip(*inputs.values(), strict=True)
    want = [reference.elementwise(expr, dict(zip(inputs, row, strict=True))) for row in rows]
    torch.testing.assert_close(elementwise(expr, **inputs), torch.stack(want), equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_max_splits_ties_and_passes_nan(dtype, served_by):
    nan = float("nan")
    a = torch.tensor([1.0, 2.0, 3.0, nan, 1.0, nan], dtype=dtype, requires_grad=True)
    b = torch.tensor([1.0, 3.0, 2.0, 1.0, nan, nan], dtype=dtype, requires_grad=True)
    mine = torch.autograd.grad(elementwise("max(a, b)", a=a, b=b), (a, b), torch.ones_like(a))
    theirs = torch.autograd.grad(torch.maximum(a, b), (a, b), torch.ones_like(a))
    for got, want in zip(mine, theirs, strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)


def test_relu_stops_infinite_gradients():
    a = torch.tensor([-1.0, 1.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(
        elementwise("relu(a)", a=a), a, torch.full((2,), float("inf"))
    )
    assert gradient.tolist() == [0.0, float("inf")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_storage_formats_are_exact(dtype, isa):
    """All 65,536 values survive widening; narrowing rounds to nearest even, as torch does."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    same = elementwise("max(a, b)", a=every, b=every)
    assert same.isnan().equal(every.isnan())
    real = ~every.isnan()
    assert same[real].view(torch.int16).equal(every[real].view(torch.int16))

    wide = torch.randn(1 << 18) * torch.randn(1 << 18).mul(8).exp()
    narrow = torch.zeros(1 << 18, dtype=dtype)
    program = CPP.Program(forward_program(Expr.parse("max(a, a)")).packed())
    code = {torch.bfloat16: 2, torch.float16: 3}[dtype]
    operands = [(wide.data_ptr(), 0, (1,)), (narrow.data_ptr(), code, (1,))]
    CPP.elementwise(program, (1 << 18,), operands)
    assert narrow.view(torch.int16).equal(wide.to(dtype).view(torch.int16))


@pytest.mark.parametrize("text", EXPRESSIONS.values())
def test_gradcheck(text, served_by):
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    b = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)
    tensors = (a, b) if "b" in Expr.parse(text).inputs else (a,)
    names = Expr.parse(text).inputs
    assert torch.autograd.gradcheck(
        lambda *xs: elementwise(text, **dict(zip(names, xs, strict=True))), tensors
    )


@pytest.mark.parametrize(
    "shapes", [((4, 6), (4, 6)), ((4, 6), (6,)), ((0, 6), (6,)), ((2,) * 9,) * 2]
)
def test_opcheck(shapes):
    a, b = (torch.randn(shape, requires_grad=True) for shape in shapes)
    if a.dim() > 2:  # more than csrc takes, and in no memory order of its own
        a = a.detach()[:1].expand(a.shape).requires_grad_()
        b = b.detach().permute(*reversed(range(b.dim()))).requires_grad_()
    text = EXPRESSIONS[3]
    checks = torch.library.opcheck(torch.ops.fastffn.elementwise.default, (text, [a, b]))
    assert set(checks.values()) == {"SUCCESS"} and len(checks) == 4
    arguments = (text, torch.randn(shapes[0]), [a.detach(), b.detach()], [True, True])
    checks = torch.library.opcheck(torch.ops.fastffn.elementwise_backward.default, arguments)
    assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", PRIMITIVES)
def test_torch_compile_takes_every_primitive_whole(name):
    arity = PRIMITIVES[name].arity
    inputs = [torch.randn(3, 5, requires_grad=True) for _ in range(arity)]
    text = f"{name}({', '.join('ab'[:arity])})"

    def call(*tensors):
        return elementwise(text, **dict(zip("ab", tensors, strict=False)))

    torch._dynamo.reset()
    out = torch.compile(call, fullgraph=True, backend="aot_eager")(*inputs)
    assert out.equal(call(*inputs))


@pytest.mark.parametrize("as_text", [True, False])
def test_torch_compile_takes_it_whole(as_text):
    expr = EXPRESSIONS[3] if as_text else Expr.parse(EXPRESSIONS[3])

    def block(a, b):
        return elementwise(expr, a=a * 2, b=b) + 1

    a = torch.randn(6, 45, requires_grad=True)
    b = torch.randn(45, requires_grad=True)
    compiled = torch.compile(block, fullgraph=True)
    out = compiled(a, b)
    torch.testing.assert_close(out, block(a, b))
    mine = torch.autograd.grad(out.square().sum(), (a, b))
    theirs = torch.autograd.grad(block(a, b).square().sum(), (a, b))
    torch.testing.assert_close(mine, theirs)


def test_second_gradients_are_refused_not_wrong():
    a = torch.randn(5, requires_grad=True)
    for loss in (lambda y: y.sum(), lambda y: y.square().sum()):
        with pytest.raises(RuntimeError, match="gradients of gradients"):
            torch.autograd.grad(loss(elementwise("tanh(a)", a=a)), a, create_graph=True)


def test_forward_mode_and_transforms_are_served_by_torch():
    x, v = torch.randn(4, 3), torch.randn(4, 3)

    def f(a):
        return elementwise("mul(tanh(a), a)", a=a)

    def g(a):
        return a.tanh() * a

    torch.testing.assert_close(torch.func.jvp(f, (x,), (v,)), torch.func.jvp(g, (x,), (v,)))
    torch.testing.assert_close(torch.vmap(f)(x), g(x))
    hessian = torch.func.hessian(lambda a: f(a).sum())(x)
    torch.testing.assert_close(hessian, torch.func.hessian(lambda a: g(a).sum())(x))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, v)
        tangent = torch.autograd.forward_ad.unpack_dual(f(dual)).tangent
    torch.testing.assert_close(tangent, torch.func.jvp(g, (x,), (v,))[1])


def test_a_trace_depends_on_its_input():
    traced = torch.jit.trace(lambda a: elementwise("tanh(a)", a=a), torch.zeros(3))
    torch.testing.assert_close(traced(torch.ones(3)), torch.ones(3).tanh())


def test_memory_that_does_not_show_the_values():
    """Tensors on no memory, and tensors whose sign is a flag beside it."""
    assert elementwise("tanh(a)", a=torch.empty(2, 3, device="meta")).shape == (2, 3)
    zero = torch._efficientzerotensor((2, 3))
    assert elementwise("sigmoid(a)", a=zero).eq(0.5).all()
    a = torch.randn(5)
    check("mul(tanh(a), b)", {"a": a, "b": torch.randn(5)}, grad=torch._neg_view(torch.randn(5)))
    torch.testing.assert_close(elementwise("tanh(a)", a=torch._neg_view(a)), torch.tanh(-a))


def test_the_profiler_sees_the_op():
    with torch.profiler.profile() as profile:
        elementwise("tanh(a)", a=torch.randn(5))
    assert "fastffn::elementwise" in {event.key for event in profile.key_averages()}


def test_gradients_at_the_limits_are_torchs():
    values = [-1e30, -1e18, -1e13, -100.0, -1e-30, 0.0, 1e-30, 100.0, 1e13, 1e18, float("nan")]
    for name in PRIMITIVES:
        if PRIMITIVES[name].arity == 1:
            for value in values:
                a = torch.full((32,), value, requires_grad=True)
                (got,) = torch.autograd.grad(elementwise(f"{name}(a)", a=a).sum(), a)
                (want,) = torch.autograd.grad(reference.PRIMITIVES[name](a).sum(), a)
                if not (value == -1e30 and want.isnan().all()):  # torch's own overflow of a cube
                    torch.testing.assert_close(got, want, equal_nan=True, msg=f"{name} at {value}")


def test_many_operands_are_served_by_torch():
    names = [f"x{i}" for i in range(20)]
    text = names[0]
    for name in names[1:]:
        text = f"add({text}, tanh({name}))"
    inputs = {name: torch.randn(3, 4).bfloat16() for name in names}
    check(text, inputs)


def test_nothing_is_kept_of_forgotten_expressions():
    from fastffn.ops.elementwise import _Compiled, _compiled

    gc.collect()
    before = sum(isinstance(x, _Compiled) for x in gc.get_objects())
    a = torch.randn(3, requires_grad=True)
    for index in range(50):
        elementwise(f"mul(tanh(a{index}), a{index})", **{f"a{index}": a}).sum().backward()
    _compiled.cache_clear()
    gc.collect()
    assert sum(isinstance(x, _Compiled) for x in gc.get_objects()) <= before


def test_only_wanted_gradients_flow():
    a, b = torch.randn(4, 8, requires_grad=True), torch.randn(8)
    elementwise("mul(gelu(a), b)", a=a, b=b).sum().backward()
    assert a.grad.shape == a.shape and b.grad is None
    with torch.no_grad():
        assert not elementwise("gelu(a)", a=a).requires_grad


@pytest.mark.skipif(CPP is None, reason="csrc is not built")
def test_results_do_not_depend_on_the_number_of_threads():
    a, b = torch.randn(300, 541), torch.randn(541)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(elementwise(EXPRESSIONS[7], a=a, b=b))
    finally:
        torch.set_num_threads(before)
    assert results[0].equal(results[1]) and results[0].equal(results[2])


def test_bad_input_is_named():
    a = torch.randn(3)
    with pytest.raises(UserError, match="'b' is missing; its inputs are a, b"):
        elementwise("mul(a, b)", a=a)
    with pytest.raises(UserError, match="'c' is no input of it"):
        elementwise("gelu(a)", a=a, c=a)
    with pytest.raises(UserError, match=r"a is torch\.int64"):
        elementwise("gelu(a)", a=a.long())
    with pytest.raises(UserError, match="do not broadcast"):
        elementwise("mul(a, b)", a=a, b=torch.randn(4))
    with pytest.raises(UserError, match="b is on meta"):
        elementwise("mul(a, b)", a=a, b=a.to("meta"))
    with pytest.raises(UserError, match="a is a float, not a tensor"):
        elementwise("gelu(a)", a=3.0)
    with pytest.raises(UserError, match="make it dense first"):
        elementwise("gelu(a)", a=a.to_sparse())
    assert elementwise("gelu(expr)", expr=a).shape == a.shape
    with pytest.raises(ExprError, match="unknown operation"):
        elementwise("softplus(a)", a=a)


@pytest.mark.skipif(CPP is None, reason="csrc is not built")
def test_bytes_that_are_no_program_are_refused():
    good = forward_program(Expr.parse("max(a, b)")).packed()
    no_loop = struct.pack("<10H", 1, 1, 2, 1, 0, 1, 0, 0, 0, 1)  # opcode 0: add has no such slot
    unwritten = struct.pack("<5H", 1, 1, 2, 0, 1)
    for bad in (b"", good[:-2], good + b"\0\0", b"\xff" * len(good), no_loop, unwritten):
        with pytest.raises(ValueError, match="program"):
            CPP.Program(bad)


@pytest.mark.parametrize(
    ("name", "value"), [("FASTFFN_BACKEND", "refrence"), ("FASTFFN_ISA", "neon")]
)
def test_a_wrong_environment_is_named(name, value):
    code = (
        "import torch; from fastffn import UserError; from fastffn.functional import elementwise\n"
        "try: elementwise('tanh(a)', a=torch.ones(1))\n"
        "except UserError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, name: value},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert name in done.stdout and value in done.stdout, done.stderr
