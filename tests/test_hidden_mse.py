"""`hidden_mse` against its oracle: values, gradients, padding, layouts, dtypes, threads, traces."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_accurate
from torch.utils.flop_counter import FlopCounterMode

from fastffn import UserError
from fastffn.functional import hidden_mse
from fastffn.ops import hidden_mse as module
from fastffn.ops import hidden_mse_reference as reference

pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def make(batch=3, length=7, student=6, teacher=10, dtype=torch.float64, seed=0):
    """Student and teacher states, weight and bias."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, length, student), (batch, length, teacher), (teacher, student), (teacher,)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def random_mask(batch, length, seed=0):
    return torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) > 0.4


def results(function, student, teacher, real, weight, bias, grad=1.0):
    """The loss, and the gradients of student, weight and bias where they are."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in (student, weight, bias)]
    loss = function(leaves[0], teacher, real, *leaves[1:])
    leaves = [x for x in leaves if x is not None]
    grad = torch.full((), grad, dtype=loss.dtype, device=loss.device)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, grad)]


def check(student, teacher, weight=None, bias=None, real=None, ulps=0):
    """The oracle rule for loss and gradients; in float64 nine digits.

    ulps: allowed besides, where there are so few numbers that torch may round all luckily.
    """
    arguments = student, teacher, real, weight, bias
    ours, theirs = results(hidden_mse, *arguments), results(reference.hidden_mse, *arguments)
    wide = [x.double() if x is not None and x.is_floating_point() else x for x in arguments]
    exact = results(reference.hidden_mse, *wide)
    names = ("loss", "d student", "d weight", "d bias")
    for name, got, other, true in zip(names, ours, theirs, exact, strict=False):
        assert got.dtype == other.dtype, name
        if got.dtype == torch.float64:
            torch.testing.assert_close(got, true, rtol=1e-9, atol=1e-12)
        else:
            size = true.abs().max().item() if true.numel() else 0.0
            assert_accurate(got, true, other, name, ulps * torch.finfo(student.dtype).eps * size)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("projected", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_equals_the_oracle(masked, projected, dtype, device):
    student, teacher, weight, bias = make(4, 50, 24, 37 if projected else 24, dtype)
    operands = [student, teacher, *((weight, bias) if projected else (None, None))]
    real = random_mask(4, 50).to(device) if masked else None
    check(*(None if x is None else x.to(device) for x in operands), real)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_shapes_layouts_and_slabs(data):
    batch, length = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 9))
    dtype = data.draw(st.sampled_from(DTYPES))
    student, teacher, weight, bias = make(batch, length, 5, 8, dtype, data.draw(st.integers(0, 9)))
    if data.draw(st.booleans()):
        student = student.repeat_interleave(2, -1)[..., ::2]
    if data.draw(st.booleans()):
        teacher = teacher.transpose(0, 1).contiguous().transpose(0, 1)
    if data.draw(st.booleans()):
        weight = weight.t().contiguous().t()
    bias = data.draw(st.sampled_from([bias, None]))
    lengths = data.draw(st.lists(st.integers(0, length), min_size=batch, max_size=batch))
    real = torch.arange(length) < torch.tensor(lengths, dtype=torch.long).unsqueeze(-1)
    real = data.draw(st.sampled_from([real, real.flip(-1), None]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_MIN_ROWS", data.draw(st.sampled_from([2, 5, 1024])))
        patch.setattr(module, "_SLAB_BYTES", {"cpu": 1})
        check(student, teacher, weight, bias, real, ulps=1)


def test_value_by_hand():
    student = torch.tensor([[[1.0], [2.0], [9.0]]])
    teacher = torch.tensor([[[0.0, 1.0], [1.0, 4.0], [5.0, 5.0]]])
    weight = torch.tensor([[1.0], [2.0]])
    # differences: (1, 1), (1, 0); the third token is padding
    assert hidden_mse(student, teacher, torch.tensor([[1, 1, 0]]), weight) == 3 / 4
    assert hidden_mse(student, teacher, weight=weight, lengths=torch.tensor([2])) == 3 / 4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("projected", [True, False])
@pytest.mark.parametrize("gathers", [True, False])
def test_padding_changes_nothing_and_gets_no_gradient(
    gathers, projected, poison, device, monkeypatch
):
    student, teacher, weight, bias = make(3, 6, 8, 8)
    operands = [student, teacher, *((weight, bias) if projected else (None, None))]
    student, teacher, weight, bias = (None if x is None else x.to(device) for x in operands)
    real = random_mask(3, 6).to(device)
    if not gathers:
        monkeypatch.setattr(module, "_gathers", lambda device: False)
    clean = results(hidden_mse, student, teacher, real, weight, bias)
    padding = ~real.unsqueeze(-1)
    student, teacher = student.masked_fill(padding, poison), teacher.masked_fill(padding, poison)
    dirty = results(hidden_mse, student, teacher, real, weight, bias)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert dirty[1][~real].eq(0).all() and dirty[1][real].ne(0).all()


def test_masked_equals_gathered(monkeypatch):
    """Where real rows are not gathered, padding is computed and masked out."""
    student, teacher, weight, bias = make(3, 6)
    arguments = student, teacher, random_mask(3, 6), weight, bias
    gathered = results(hidden_mse, *arguments)
    monkeypatch.setattr(module, "_gathers", lambda device: False)
    torch.testing.assert_close(results(hidden_mse, *arguments), gathered)


@pytest.mark.parametrize("projected", [True, False])
def test_no_tokens_at_all(projected):
    student, teacher, weight, bias = make(2, 4, 8, 8)
    operands = (weight, bias) if projected else (None, None)
    for real in (torch.zeros(2, 4, dtype=torch.long), torch.zeros(2, 4, dtype=torch.bool)):
        loss, *gradients = results(hidden_mse, student, teacher, real, *operands)
        assert loss == 0 and all(g.eq(0).all() for g in gradients)
    loss, *gradients = results(hidden_mse, student[:0], teacher[:0], None, *operands)
    assert loss == 0 and all(g.eq(0).all() for g in gradients)


def test_a_nan_at_a_real_token_is_not_hidden():
    student, teacher, weight, _ = make()
    student[0, 0, 0] = float("nan")
    assert hidden_mse(student, teacher, None, weight).isnan()


def test_gradcheck():
    student, teacher, weight, bias = make()
    real = random_mask(3, 7)
    leaves = [x.requires_grad_() for x in (student, weight, bias)]
    loss = lambda x, w, b: hidden_mse(x, teacher, real, w, b)  # noqa: E731
    assert torch.autograd.gradcheck(loss, leaves)
    narrow = teacher[..., :6].clone()
    assert torch.autograd.gradcheck(lambda x: hidden_mse(x, narrow, real), [student])


@pytest.mark.parametrize("wanted", range(3))
def test_only_what_is_wanted_is_made(wanted):
    student, teacher, weight, bias = make()
    leaves = [student, weight, bias]
    leaves[wanted].requires_grad_()
    hidden_mse(student, teacher, None, weight, bias).backward()
    true = results(reference.hidden_mse, student, teacher, None, weight, bias)[1 + wanted]
    torch.testing.assert_close(leaves[wanted].grad, true)
    assert [x.grad is not None for x in leaves] == [i == wanted for i in range(3)]


def test_backward_twice_and_upstream_gradients():
    student, teacher, weight, bias = make()
    student.requires_grad_()
    loss = hidden_mse(student, teacher, None, weight, bias)
    loss.backward(retain_graph=True)
    first = student.grad.clone()
    (3 * loss).backward()
    torch.testing.assert_close(student.grad, 4 * first)
    (expanded,) = torch.autograd.grad(
        hidden_mse(student, teacher, None, weight).expand(5), student, torch.ones(()).expand(5)
    )
    (one,) = torch.autograd.grad(hidden_mse(student, teacher, None, weight), student)
    torch.testing.assert_close(expanded, 5 * one)


def test_small_gradients_survive_float16():
    """2 / n is below float16's smallest number here; a loss scaler's factor makes up for it."""
    student, teacher, weight, _ = make(8, 128, 32, 4096, torch.float16)
    ours = results(hidden_mse, student, teacher, None, weight, None, grad=2.0**16)
    wide = [student.double(), teacher.double(), None, weight.double(), None]
    exact = results(reference.hidden_mse, *wide, grad=2.0**16)
    for got, true in zip(ours, exact, strict=True):
        assert (got.double() - true).abs().max() <= 2e-3 * true.abs().max()


def test_memory_kept_is_that_of_student_and_weight():
    student, teacher, weight, bias = make(4, 64, 6, 96)
    leaves = [x.requires_grad_() for x in (student, weight, bias)]
    saved = []
    keep = lambda x: saved.append(x) or x  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        hidden_mse(student, teacher, None, weight, bias)
        assert sum(x.numel() for x in saved) == sum(x.numel() for x in leaves) + 1
        saved.clear()
        other = teacher.clone()
        hidden_mse(other.requires_grad_(), teacher)
    pointers = {other.data_ptr(), teacher.data_ptr()}
    assert sum(x.numel() for x in saved if x.data_ptr() not in pointers) == 1


@pytest.mark.parametrize("masked", [True, False])
def test_bitwise_equal_on_any_number_of_threads(masked):
    student, teacher, weight, bias = make(16, 256, 384, 768, torch.float32)
    real = random_mask(16, 256) if masked else None

    def run(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return results(hidden_mse, student, teacher, real, weight, bias)
        finally:
            torch.set_num_threads(before)

    one = run(1)
    for threads in (1, 2):
        assert all(torch.equal(a, b) for a, b in zip(one, run(threads), strict=True))


def test_opcheck():
    student, teacher, weight, bias = make(dtype=torch.float32)
    leaves = [x.requires_grad_() for x in (student, weight, bias)]
    op, real = torch.ops.fastffn.hidden_mse.default, random_mask(3, 7)
    torch.library.opcheck(op, (student, teacher, weight, bias, real))
    torch.library.opcheck(op, (student, teacher, weight, None, None))
    torch.library.opcheck(op, (student, teacher[..., :6].clone(), None, None, real))
    torch.library.opcheck(
        torch.ops.fastffn.hidden_mse_forward.default,
        (*(x.detach() for x in (student, teacher, weight, bias)), real, [True, False, True]),
        test_utils=("test_schema", "test_faketensor"),
    )
    assert leaves[0].grad is None


def test_torch_compile_takes_it_whole():
    student, teacher, weight, bias = make(dtype=torch.float32)
    leaves = [x.requires_grad_() for x in (student, weight, bias)]
    real = random_mask(3, 7).long()
    run = lambda x, w, b: hidden_mse(x, teacher, real, w, b)  # noqa: E731
    compiled = torch.compile(run, fullgraph=True)
    assert torch.equal(compiled(*leaves), run(*leaves))
    pairs = zip(
        torch.autograd.grad(compiled(*leaves), leaves),
        torch.autograd.grad(run(*leaves), leaves),
        strict=True,
    )
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("how", ["plain", "op"])
def test_autocast_multiplies_in_its_type(how):
    student, teacher, weight, bias = make(dtype=torch.float32)
    leaves = [x.requires_grad_() for x in (student, weight, bias)]
    function = hidden_mse
    if how == "op":
        op = torch.ops.fastffn.hidden_mse
        function = lambda s, t, real, w, b: op(s, t, w, b, real)  # noqa: E731
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = function(student, teacher, None, weight, bias)
        want = reference.hidden_mse(student, teacher, None, weight, bias)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)
    for got, true in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(want, leaves), strict=True
    ):
        assert got.dtype == torch.float32
        assert (got - true).abs().max() < 0.02 * true.abs().max()


def test_transforms_are_served_by_the_oracle():
    student, teacher, weight, bias = make()
    losses = torch.vmap(lambda s, t: hidden_mse(s, t, None, weight, bias))(student, teacher)
    want = [hidden_mse(s, t, None, weight, bias) for s, t in zip(student, teacher, strict=True)]
    torch.testing.assert_close(losses, torch.stack(want))


def test_second_gradients_are_refused():
    student, teacher, weight, _ = make()
    loss = hidden_mse(student.requires_grad_(), teacher, None, weight)
    with pytest.raises(RuntimeError, match="gradients of gradients"):
        torch.autograd.grad(loss, student, create_graph=True)


@pytest.mark.parametrize("projects", [True, False])
def test_an_inference_mode_teacher(projects):
    student, _, weight, _ = make()
    with torch.inference_mode():
        teacher = torch.randn(3, 7, 10 if projects else 6, dtype=torch.float64)
        mask = torch.ones(3, 7, dtype=torch.bool)
    hidden_mse(student.requires_grad_(), teacher, mask, weight if projects else None).backward()
    assert student.grad.isfinite().all()


def test_flops_are_counted():
    student, teacher, weight, _ = make()

    product = 2 * 3 * 7 * 6 * 10
    for leaves, products in (((), 1), ((student,), 2), ((student, weight), 3)):
        for x in leaves:
            x.requires_grad_()
        with FlopCounterMode(display=False) as counter:
            hidden_mse(student, teacher, None, weight)
        assert counter.get_total_flops() == products * product


ONES = {"student": torch.ones(2, 4, 8), "teacher": torch.ones(2, 4, 8)}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"teacher": torch.ones(2, 4, 9)}, r"project the student by a weight of \[9, 8\]"),
        ({"teacher": torch.ones(2, 5, 8)}, "not states of the same tokens"),
        ({"teacher": torch.ones(2, 4, 8, requires_grad=True)}, "requires a gradient"),
        ({"student": torch.ones(2, 4, 8, dtype=torch.int64)}, "student is torch.int64"),
        ({"attention_mask": torch.ones(2, 4)}, "added to scores"),
        ({"attention_mask": torch.ones(2, 5).bool()}, "attention_mask has shape"),
        ({"attention_mask": torch.ones(2, 4).bool(), "lengths": [1, 2]}, "not both"),
        ({"lengths": [1]}, r"integers of shape \[2\]"),
        ({"lengths": torch.ones(2)}, "lengths is torch.float32"),
        ({"weight": torch.ones(4, 8)}, r"teacher width, student width\] = \[8, 8\]"),
        ({"weight": torch.ones(8, 8).double()}, "run under autocast"),
        ({"weight": torch.ones(8, 8), "bias": torch.ones(1)}, r"bias is \[1\]"),
        ({"bias": torch.ones(8)}, "needs a weight"),
        ({"teacher": torch.ones(2, 4, 8, device="meta")}, "is on meta"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(UserError, match=message):
        hidden_mse(**(ONES | change))
