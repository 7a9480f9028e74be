"""The op `residual_norm` against torch: values, gradients, masks, layouts and dtypes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_accurate, tensor

from fastffn import UserError
from fastffn.functional import residual_norm
from fastffn.ops import residual_norm_reference as reference

pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def compare(got, true, same_dtype, what, floor=0.0):
    """The oracle rule; in float64, where the oracle has no more digits, nine of them."""
    if got.dtype == torch.float64:
        torch.testing.assert_close(got, true, rtol=1e-9, atol=1e-9)
    else:
        assert_accurate(got, true, same_dtype, what, floor)


def check(x, residual, weight, bias, dropout=0.0, grad=None, eps=1e-5):
    """Value and gradients by the oracle rule."""
    seed = torch.tensor([9], device=x.device) if dropout else None
    tensors = [x, residual, weight, bias]
    given_ = [None if t is None else t.detach().requires_grad_() for t in tensors]
    exact = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    same = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    out = residual_norm(*given_, dropout, eps, seed)
    want = reference.residual_norm(*same, dropout, eps, 9)
    true = reference.residual_norm(*exact, dropout, eps, 9)
    assert out.dtype == want.dtype
    compare(out, true, want, "y")
    if grad is None:
        grad = torch.randn(out.shape, dtype=torch.float64, device=x.device).to(out.dtype)

    def gradients(y, leaves, g):
        return torch.autograd.grad(y, [t for t in leaves if t is not None], g)

    mine, theirs = gradients(out, given_, grad), gradients(want, same, grad)
    truth = gradients(true, exact, grad.double())
    floor = 1e-6 * grad.abs().max().item() if grad.numel() else 0.0  # equal ones cancel in x
    for got, other, exactly in zip(mine, theirs, truth, strict=True):
        assert got.dtype == other.dtype
        compare(got, exactly, other, "gradient", floor)


def operands(rows, columns, dtype, seed=0, layout="dense"):
    generator = torch.Generator().manual_seed(seed)
    matrices = [tensor((rows, columns), dtype, layout, generator) for _ in range(2)]
    vectors = [torch.randn(columns, generator=generator).to(dtype) for _ in range(2)]
    return [*matrices, *vectors]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 7, 135, 540, 1537])
def test_odd_widths(columns, dtype, dropout, device):
    check(*(t.to(device) for t in operands(50, columns, dtype)), dropout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_executor(dtype, served_by):
    check(*operands(33, 135, dtype), dropout=0.1)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_layouts_and_shapes(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    rows = data.draw(st.sampled_from([0, 1, 2, 7, 200]))
    columns = data.draw(st.sampled_from([1, 3, 16, 45, 540]))
    layout = data.draw(st.sampled_from(["dense", "transposed", "row stride", "column stride"]))
    x, residual, weight, bias = operands(
        rows, columns, dtype, data.draw(st.integers(0, 99)), layout
    )
    weight = data.draw(st.sampled_from([weight, None]))
    bias = data.draw(st.sampled_from([bias, None]))
    grad = data.draw(st.sampled_from([None, torch.ones((), dtype=dtype).expand(rows, columns)]))
    check(x, residual, weight, bias, data.draw(st.sampled_from([0.0, 0.5])), grad)


def test_values_that_memory_does_not_show():
    x, residual, *_ = operands(4, 16, torch.float32)
    negative = torch.complex(torch.zeros(4, 16), -x).conj().imag
    assert negative.is_neg()
    assert torch.equal(residual_norm(negative, residual), residual_norm(x, residual))
    y = residual_norm(x.requires_grad_(), residual)
    (grad,) = torch.autograd.grad(y, x, torch._efficientzerotensor((4, 16)))
    assert grad.abs().max() == 0


@pytest.mark.parametrize("wide", [0, 1, 2, 3])
def test_one_wider_operand(wide):
    tensors = operands(6, 45, torch.float32)
    tensors[wide] = tensors[wide].double()
    leaves = [t.requires_grad_() for t in tensors]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    y, want = residual_norm(*leaves), reference.residual_norm(*exact)
    assert y.dtype == (torch.float64 if wide < 2 else torch.float32)
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert [g.dtype for g in grads] == [t.dtype for t in tensors]


def test_the_mask_is_the_documented_one(served_by):
    x, residual = torch.ones(300, 541), torch.zeros(300, 541)
    y = residual_norm(x, residual, dropout=0.4, seed=torch.tensor([2**62 + 5]))
    mask = reference.dropout_mask(2**62 + 5, 300, 541, 0.4)
    assert torch.equal(y > 0, mask)


def test_dropout_has_the_right_mean_and_follows_the_generator():
    x, residual = torch.ones(400, 512), torch.zeros(400, 512)

    def draw(seed):
        torch.manual_seed(seed)
        return residual_norm(x, residual, dropout=0.1) > 0

    one = draw(1)
    assert abs(one.float().mean() - 0.9) < 0.003
    assert torch.equal(one, draw(1)) and not torch.equal(one, draw(2))


@pytest.mark.parametrize("rows", [7, 700])
def test_bitwise_equal_on_any_number_of_threads(rows):
    def run(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            leaves = [t.requires_grad_() for t in operands(rows, 540, torch.float32)]
            y = residual_norm(*leaves, 0.1, seed=torch.tensor([3]))
            return [y, *torch.autograd.grad(y, leaves, y.detach())]
        finally:
            torch.set_num_threads(before)

    assert all(torch.equal(a, b) for a, b in zip(run(1), run(3), strict=True))


def test_nan_and_infinity_propagate_as_in_torch(served_by):
    x, residual, weight, bias = operands(6, 45, torch.float32)
    x[0, 3], x[1, 3], residual[2, 5], weight[7] = float("nan"), float("inf"), float("-inf"), 1e38
    x[3] = 3e38
    residual[3] = 3e38
    y = residual_norm(x, residual, weight, bias)
    want = torch.nn.functional.layer_norm(x + residual, (45,), weight, bias)
    assert torch.equal(y.isnan(), want.isnan())
    assert torch.equal(y.isfinite(), want.isfinite())


def test_a_dropped_nan_stays_one():
    x = torch.full((1, 64), float("nan"))
    y = residual_norm(x, torch.zeros(1, 64), dropout=0.9, seed=torch.tensor([0]))
    assert y.isnan().all()


def test_gradcheck(served_by):
    leaves = [t.requires_grad_() for t in operands(3, 11, torch.float64)]
    seed = torch.tensor([4])
    assert torch.autograd.gradcheck(lambda *a: residual_norm(*a, 0.3, 1e-5, seed), leaves)


def test_opcheck():
    leaves = [t.requires_grad_() for t in operands(5, 12, torch.float32)]
    op = torch.ops.fastffn.residual_norm.default
    torch.library.opcheck(op, (*leaves, torch.tensor([1]), 0.2, 1e-5))
    torch.library.opcheck(op, (leaves[0], leaves[1], None, None, None, 0.0, 1e-5))


def test_torch_compile_takes_it_whole():
    leaves = [t.requires_grad_() for t in operands(5, 12, torch.float32)]
    seed = torch.tensor([1])
    run = lambda *a: residual_norm(*a, 0.2, 1e-5, seed)  # noqa: E731
    compiled = torch.compile(run, fullgraph=True)
    assert torch.equal(compiled(*leaves), run(*leaves))
    mine = torch.autograd.grad(compiled(*leaves).sum(), leaves)
    assert all(
        torch.equal(a, b)
        for a, b in zip(mine, torch.autograd.grad(run(*leaves).sum(), leaves), strict=True)
    )


def test_second_gradients_are_refused():
    leaves = [t.requires_grad_() for t in operands(5, 12, torch.float32)]
    y = residual_norm(*leaves)
    with pytest.raises(RuntimeError, match="gradients of gradients"):
        torch.autograd.grad(y.square().sum(), leaves, create_graph=True)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"residual": torch.ones(3, 5)}, "residual"),
        ({"weight": torch.ones(5)}, "weight is"),
        ({"x": torch.ones(3, 4, dtype=torch.int32)}, "int32"),
        ({"dropout": 1.0}, "probability"),
        ({"seed": torch.ones(1, dtype=torch.int8)}, "expected int64"),
        ({"x": torch.ones(3, 0), "residual": torch.ones(3, 0)}, "x"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"x": torch.ones(3, 4), "residual": torch.ones(3, 4)} | change
    with pytest.raises(UserError, match=message):
        residual_norm(**arguments)


@pytest.mark.gpu
def test_offsets_beyond_31_bits_on_a_gpu():
    rows = 2**31 // 4096 + 8
    x = torch.zeros(rows, 4096, dtype=torch.bfloat16, device="cuda")
    x[-1] = torch.randn(4096, device="cuda")
    y = residual_norm(x, x)
    want = torch.nn.functional.layer_norm(2 * x[-1:].float(), (4096,))
    assert (y[-1].float() - want[0]).abs().max() < 0.05


def test_offsets_beyond_31_bits():
    """A stride of 2^30 elements: the third row lies 2^31 elements from the first."""
    torch.use_deterministic_algorithms(False)  # it would write to all of it
    try:
        storage = torch.empty(2**31 + 64, dtype=torch.bfloat16)  # touched in three places only
    except RuntimeError:
        pytest.skip("no 4 GiB of address space")
    x = storage.as_strided((3, 48), (2**30, 1))
    x.copy_(torch.randn(3, 48))
    y = residual_norm(x, torch.zeros(3, 48, dtype=torch.bfloat16))
    assert torch.equal(y, residual_norm(x.contiguous(), torch.zeros_like(y)))
