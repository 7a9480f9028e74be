"""Relation losses against the formula; what masks, padding and bad input may and may not do."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastffn.errors import UserError
from fastffn.ops import relation
from fastffn.ops.relation import relation_kl, relation_loss, split_relation_heads
from fastffn.ops.relation_reference import relation_kl_reference


def make(batch, length, student=12, teacher=24, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(width):
        return torch.randn(batch, length, width, generator=generator, dtype=dtype)

    return [draw(student), draw(student), draw(teacher), draw(teacher)]


def mask_of(lengths, length, left=False):
    mask = torch.arange(length) < torch.tensor(lengths).unsqueeze(-1)
    return mask.flip(-1) if left else mask


def loss_and_gradients(function, tensors, *args, **kwargs):
    student = [x.detach().clone().requires_grad_() for x in tensors[:2]]
    loss = function(*student, *tensors[2:], *args, **kwargs)
    loss.backward()
    return [loss.detach(), *(x.grad for x in student)]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_equals_the_formula(data):
    batch, length = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 9))
    heads = data.draw(st.sampled_from([1, 2, 3, 6]))
    lengths = data.draw(st.lists(st.integers(0, length), min_size=batch, max_size=batch))
    temperature = data.draw(st.sampled_from([0.5, 1.0, 2.0]))
    tensors = make(
        batch, length, 6 * data.draw(st.integers(1, 3)), 6 * data.draw(st.integers(1, 3))
    )
    mask = mask_of(lengths, length)
    mask = mask[:, data.draw(st.permutations(range(length)))]
    expected = loss_and_gradients(relation_kl_reference, tensors, heads, mask, temperature)
    chunk = relation._CHUNK
    relation._CHUNK = data.draw(st.sampled_from([1, 100, chunk]))
    try:
        actual = loss_and_gradients(relation_kl, tensors, heads, mask.long(), temperature)
    finally:
        relation._CHUNK = chunk
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_value_by_hand():
    # One head of width 1, two tokens: the student's maps are uniform, the teacher's are not.
    a = torch.tensor([[[0.0], [0.0]]], dtype=torch.float64)
    b = torch.tensor([[[0.0], [1.0]]], dtype=torch.float64)
    row = torch.tensor([0.0, 1.0], dtype=torch.float64).softmax(0)
    expected = ((row * row.log()).sum() + torch.log(torch.tensor(2.0))) / 2
    torch.testing.assert_close(relation_kl(a, a, b, b, num_heads=1), expected)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_gradcheck(temperature):
    tensors = make(2, 5)
    mask = mask_of([5, 3], 5)
    inputs = [x.requires_grad_() for x in tensors[:2]]

    def loss(a, b):
        return relation_kl(a, b, *tensors[2:], 3, mask, temperature)

    assert torch.autograd.gradcheck(loss, inputs)


def test_gradcheck_of_a_self_relation_with_one_gradient():
    x, fixed, t, _ = make(2, 4)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: relation_kl(x, x, t, t, 3), [x])
    assert torch.autograd.gradcheck(lambda x: relation_kl(fixed, x, t, t, 3), [x])
    assert torch.autograd.gradcheck(lambda x: relation_kl(x, fixed, t, t, 3), [x])


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_padding_changes_nothing_and_gets_no_gradient(poison, left):
    tensors = make(3, 6)
    mask = mask_of([6, 1, 0], 6, left)
    clean = loss_and_gradients(relation_kl, tensors, 3, mask)
    poisoned = [torch.where(mask.unsqueeze(-1), x, poison) for x in tensors]
    dirty = loss_and_gradients(relation_kl, poisoned, 3, mask)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)
    for gradient in dirty[1:]:
        assert gradient[~mask].eq(0).all()
        assert gradient[0].ne(0).any()


def test_nan_at_a_real_token_is_not_hidden():
    tensors = make(2, 4)
    tensors[0][0, 0, 0] = float("nan")
    assert relation_kl(*tensors, 3).isnan()


def test_equal_models_lose_nothing():
    q, k, *_ = make(2, 8, dtype=torch.float32)
    loss, *gradients = loss_and_gradients(relation_kl, [q, k, q, k], 3)
    assert loss == 0
    assert all(gradient.eq(0).all() for gradient in gradients)


def test_large_scores_stay_finite():
    tensors = [100 * x for x in make(2, 8, dtype=torch.float32)]
    actual = loss_and_gradients(relation_kl, tensors, 3)
    expected = loss_and_gradients(relation_kl_reference, [x.double() for x in tensors], 3)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_accurate_as_torch_in_the_same_precision(dtype):
    tensors = make(4, 32, 48, 96, dtype=dtype)
    mask = mask_of([32, 20, 1, 7], 32)
    exact = loss_and_gradients(relation_kl_reference, [x.double() for x in tensors], 12, mask)
    theirs = loss_and_gradients(relation_kl_reference, tensors, 12, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = loss_and_gradients(relation_kl, tensors, 12, mask)
    for a, b, c in zip(ours, theirs, exact, strict=True):
        allowed = 2 * (b.double() - c).abs().max() + 1e-6 * c.abs().max()
        assert (a.double() - c).abs().max() <= allowed
    assert ours[0].dtype == torch.float32
    assert ours[1].dtype == dtype


def test_strided_inputs():
    wide = torch.randn(2, 36, 5, dtype=torch.float64).transpose(1, 2)
    tensors = [wide[..., :12], wide[..., 12:24], *make(2, 5)[2:]]
    torch.testing.assert_close(
        loss_and_gradients(relation_kl, tensors, 3),
        loss_and_gradients(relation_kl_reference, tensors, 3),
    )


def test_inference_mode_teacher_and_repeated_backward():
    a, b, *_ = make(2, 4)
    a.requires_grad_()
    with torch.inference_mode():
        t = torch.randn(2, 4, 24, dtype=torch.float64)
    loss = relation_kl(a, b, t, t, 3)
    loss.backward(retain_graph=True)
    first = a.grad.clone()
    (2 * loss).backward()
    torch.testing.assert_close(a.grad, 3 * first)


def test_second_derivative_is_refused():
    a, b, t, u = make(2, 4)
    a.requires_grad_()
    loss = relation_kl(a, b, t, u, 3)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(loss, a, create_graph=True)


def test_memory_kept_for_backward_is_that_of_the_inputs():
    a, b, t, u = make(1, 64)
    a.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()), lambda x: x):
        relation_kl(a, b, t, u, 3)
    assert sum(saved) <= a.numel() + b.numel()


def test_compiles_into_one_graph():
    a, b, t, u = make(2, 4)
    a.requires_grad_()
    compiled = torch.compile(
        lambda a: relation_kl(a, b, t, u, 3), fullgraph=True, backend="aot_eager"
    )
    expected = loss_and_gradients(relation_kl, [a, b, t, u], 3)
    loss = compiled(a)
    loss.backward()
    torch.testing.assert_close([loss.detach(), a.grad], expected[:2])


def test_relation_loss_weighs_and_sums():
    q, k, tq, tk = make(2, 4)
    expected = 0.5 * relation_kl(q, q, tq, tq, 3) + 2 * relation_kl(q, k, tq, tk, 3)
    pairs = [(q, q, tq, tq), (q, k, tq, tk)]
    torch.testing.assert_close(relation_loss(pairs, [0.5, 2.0], num_heads=3), expected)


def test_split_relation_heads_is_a_view():
    x = torch.arange(24.0).reshape(1, 2, 12)
    split = split_relation_heads(x, 3)
    assert split.shape == (1, 3, 2, 4)
    assert split[0, 1, 0].tolist() == [4, 5, 6, 7]
    assert split.data_ptr() == x.data_ptr()


def test_bad_input_is_named():
    a, b, t, u = make(2, 4)
    with pytest.raises(
        UserError, match=r"5 relation heads .* 12 and 24: choose one of \[1, 2, 3, 4"
    ):
        relation_kl(a, b, t, u, 5)
    with pytest.raises(UserError, match=r"choose one of \[1, 2, 3, 4, 6, 12\]"):
        split_relation_heads(a, 5)
    with pytest.raises(UserError, match=r"expected \[batch, length\] = \[2, 4\]"):
        relation_kl(a, b, t, u, 3, torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(UserError, match="added to scores"):
        relation_kl(a, b, t, u, 3, torch.ones(2, 4))
    with pytest.raises(UserError, match="requires a gradient"):
        relation_kl(a, b, t.clone().requires_grad_(), u, 3)
    with pytest.raises(UserError, match="teacher_b has shape"):
        relation_kl(a, b, t, u[:1], 3)
    with pytest.raises(UserError, match="floating point"):
        relation_kl(a.long(), b, t, u, 3)
    with pytest.raises(UserError, match="temperature"):
        relation_kl(a, b, t, u, 3, temperature=0.0)
    with pytest.raises(UserError, match="1 weights for 2"):
        relation_loss([(a, b, t, u)] * 2, [1.0], num_heads=3)
    with pytest.raises(UserError, match="at least one"):
        relation_loss([])
