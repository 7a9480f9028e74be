"""What users call over the op `relation`: values, gradients, types, reductions, bad input."""

import math

import pytest
import torch
from relation_formula import make, mask_of, naive

from fastffn.errors import UserError
from fastffn.functional import relation_kl, relation_loss, score_mse, split_relation_heads
from fastffn.ops.relation import relation

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def test_loss_is_as_accurate_as_the_formula(served_by):
    """fp32 error of a KL: at most twice the formula's, plus 1e-6."""
    for seed, size in enumerate((0.1, 1.0, 3.0)):
        tensors = [size * x for x in make(4, 65, 48, 96, torch.float32, seed)]
        exact = naive(*(x.double() for x in tensors), 12, None).mean()
        same = naive(*tensors, 12, None).mean()
        loss = relation_kl(*tensors, 12)
        assert abs(loss - exact) <= 2 * abs(same - exact) + 1e-6 * max(1, exact)


def test_value_by_hand():
    # One head of width 1, two tokens: the student's maps are uniform, the teacher's are not.
    a = torch.tensor([[[0.0], [0.0]]], dtype=torch.float64)
    b = torch.tensor([[[0.0], [1.0]]], dtype=torch.float64)
    row = torch.tensor([0.0, 1.0], dtype=torch.float64).softmax(0)
    expected = ((row * row.log()).sum() + torch.log(torch.tensor(2.0))) / 2
    torch.testing.assert_close(relation_kl(a, a, b, b, num_heads=1), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "probability_mse"])
def test_gradcheck(served_by, divergence, reduction):
    a, b, t, u = make(2, 4, 6, 9)
    mask = mask_of([4, 3], 4)
    a.requires_grad_(), b.requires_grad_()

    def loss(a, b, *teacher):
        return relation_kl(a, b, *teacher, 3, mask, 1.7, reduction=reduction, divergence=divergence)

    assert torch.autograd.gradcheck(lambda a, b: loss(a, b, t, u), (a, b))
    assert torch.autograd.gradcheck(lambda a: loss(a, a, t, t), (a,))
    assert torch.autograd.gradcheck(lambda a: loss(a, a, t, u), (a,))  # the teacher's is none
    assert torch.autograd.gradcheck(lambda a: loss(a, b.detach(), t, u), (a,))
    assert torch.autograd.gradcheck(lambda b: loss(a.detach(), b, t, u), (b,))


@pytest.mark.parametrize("masked", ["zero", "exclude"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck_of_scores(served_by, reduction, masked):
    a, b, t, u = make(2, 4, 6, 9)
    mask = mask_of([4, 3], 4)
    a.requires_grad_(), b.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, b: score_mse(a, b, t, u, 3, mask, masked=masked, reduction=reduction), (a, b)
    )


@pytest.mark.parametrize("batch, length", [(0, 5), (2, 0), (0, 0)])
def test_nothing_to_compare(served_by, batch, length):
    for mask in (None, torch.ones(batch, length, dtype=torch.bool)):
        tensors = make(batch, length)
        leaves = [x.requires_grad_() for x in tensors[:2]]
        for reduction in ("mean", "sum"):
            loss = relation_kl(*tensors, 3, mask, reduction=reduction)
            loss = loss + score_mse(*tensors, 3, mask, reduction=reduction)
            assert loss == 0
            gradients = torch.autograd.grad(loss, leaves)
            assert all(g.shape == x.shape for g, x in zip(gradients, leaves, strict=True))


def test_equal_models_lose_nothing(served_by):
    q, k, *_ = make(2, 8, dtype=torch.float32)
    q.requires_grad_()
    loss = relation_kl(q, k, q.detach(), k, 3)
    loss.backward()
    assert loss == 0
    assert q.grad.eq(0).all()
    q.grad = None
    loss = relation_kl(q, q, q.detach(), q.detach(), 3)
    loss.backward()
    assert loss == 0
    assert q.grad.eq(0).all()


def test_reductions_and_temperature():
    tensors, mask = make(3, 7), mask_of([7, 2, 0], 7)
    rows = 1.5**2 * naive(*tensors, 3, mask, 1.5)
    found = {
        name: relation_kl(*tensors, 3, mask.long(), 1.5, reduction=name)
        for name in ("none", "sum", "mean")
    }
    torch.testing.assert_close(found["none"], rows)
    torch.testing.assert_close(found["sum"], rows.sum())
    # Over relation heads and the real tokens of an example, then over examples; an empty one is 0.
    mean = (rows[0].sum() / (3 * 7) + rows[1].sum() / (3 * 2)) / 3
    torch.testing.assert_close(found["mean"], mean)
    by_lengths = relation_kl(*tensors, 3, lengths=[7, 2, 0], temperature=1.5)
    assert torch.equal(by_lengths, found["mean"])


def test_score_mse_as_the_published_code_masks():
    """Scores of masked keys become 0 in both models, and the mean is over all elements."""
    q, k, tq, tk = make(2, 6)
    mask = mask_of([6, 4], 6)
    split = [split_relation_heads(x, 3) for x in (q, k, tq, tk)]
    ours, teacher = (x @ y.mT / x.shape[-1] ** 0.5 for x, y in (split[:2], split[2:]))
    there = mask[:, None, :, None] & mask[:, None, None, :]
    published = torch.nn.functional.mse_loss(
        torch.where(there, ours, 0), torch.where(there, teacher, 0)
    )
    torch.testing.assert_close(score_mse(q, k, tq, tk, 3, mask), published)
    squares = ((ours - teacher) ** 2)[there.expand_as(ours)]
    torch.testing.assert_close(score_mse(q, k, tq, tk, 3, mask, masked="exclude"), squares.mean())
    torch.testing.assert_close(
        score_mse(q, k, tq, tk, 3), torch.nn.functional.mse_loss(ours, teacher)
    )


def test_types_may_differ(served_by):
    q, k, t, u = make(2, 9, dtype=torch.float32)
    halves = [q.bfloat16(), k.half()]
    exact = naive(*(x.double() for x in (*halves, t, u)), 3, None).mean()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = relation_kl(*halves, t, u, 3)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)
    assert relation_kl(q, k, t.double(), u, 3).dtype == torch.float64


def test_small_gradients_of_half_precision_are_not_lost():
    """With a scaled loss, as mixed precision in float16 needs."""
    q, k, t, u = make(64, 64, 48, 48, torch.float16)
    scaled = []
    for factor in (1.0, 65536.0):
        x = q.clone().requires_grad_()
        (factor * relation_kl(x, k, t, u, 48)).backward()
        scaled.append(x.grad.double() / factor)
    exact = q.double().requires_grad_()
    relation_kl(exact, k.double(), t.double(), u.double(), 48).backward()
    error = [(x - exact.grad).abs().max() / exact.grad.abs().max() for x in scaled]
    assert error[1] < 1e-3 < error[0]  # 6e-8 is the least number of float16


@pytest.mark.parametrize("device", DEVICES)
def test_inference_mode_teacher_and_repeated_backward(device):
    a, b, *_ = make(2, 4, dtype=torch.float32, device=device)
    a.requires_grad_()
    with torch.inference_mode():
        t = torch.randn(2, 4, 24, device=device)
        mask = torch.ones(2, 4, dtype=torch.bool, device=device)
    for reduction in ("mean", "none"):
        a.grad = None
        loss = relation_kl(a, b, t, t, 3, mask, reduction=reduction).sum()
        loss.backward(retain_graph=True)
        first = a.grad.clone()
        (2 * loss).backward()
        torch.testing.assert_close(a.grad, 3 * first)


def test_second_derivative_is_refused():
    a, b, t, u = make(2, 4)
    a.requires_grad_()
    for reduction in ("mean", "none"):
        loss = relation_kl(a, b, t, u, 3, reduction=reduction).sum()
        with pytest.raises(RuntimeError, match="differentiated once"):
            torch.autograd.grad(loss, a, create_graph=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_memory_kept_for_backward_is_that_of_the_inputs(reduction):
    a, b, t, u = make(1, 64)
    a.requires_grad_()
    b.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()), lambda x: x):
        relation_kl(a, b, t, u, 3, reduction=reduction)
    allowed = [a, b] if reduction == "mean" else [a, b, t, u]
    assert sum(saved) <= sum(x.numel() for x in allowed) + 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_into_one_graph(reduction, device):
    tensors = make(2, 4, dtype=torch.float32, device=device)
    mask = mask_of([4, 2], 4, device=device)

    def loss(a, b, t, u):
        return (relation_kl(a, b, t, u, 3, mask, reduction=reduction)).sum() + relation_kl(
            a, a, t, t, 3, mask
        )

    results = []
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    dynamic = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for function in (loss, compiled, dynamic):
        a = tensors[0].clone().requires_grad_()
        value = function(a, *tensors[1:])
        value.backward()
        results.append([value.detach(), a.grad])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


def test_transforms_are_served_by_the_formula():
    a, b, t, u = make(2, 5)
    gradient = torch.func.grad(lambda a: relation_kl(a, b, t, u, 3))(a)
    a.requires_grad_()
    torch.testing.assert_close(gradient, torch.autograd.grad(relation_kl(a, b, t, u, 3), a)[0])


def test_relation_loss_weighs_and_sums():
    q, k, tq, tk = make(2, 4)
    expected = 0.5 * relation_kl(q, q, tq, tq, 3) + 2 * relation_kl(q, k, tq, tk, 3)
    pairs = [(q, q, tq, tq), (q, k, tq, tk)]
    torch.testing.assert_close(relation_loss(pairs, [0.5, 2.0], num_heads=3), expected)
    rows = relation_loss(pairs, [0.5, 2.0], num_heads=3, reduction="none")
    assert rows.shape == (2, 3, 4)
    torch.testing.assert_close(rows.mean(), expected)


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
    with pytest.raises(UserError, match="expected"):
        relation_kl(a, b, t, u, 3, torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(UserError, match="added to scores"):
        relation_kl(a, b, t, u, 3, torch.ones(2, 4))
    with pytest.raises(UserError, match="attention_mask is a list"):
        relation_kl(a, b, t, u, 3, [[1, 1, 1, 1]] * 2)
    with pytest.raises(UserError, match="from -1 to 5: expected numbers from 0 to 4"):
        relation_kl(a, b, t, u, 3, lengths=[-1, 5])
    with pytest.raises(UserError, match="expected 2 integers"):
        relation_kl(a, b, t, u, 3, lengths=[1.5, 2])
    with pytest.raises(UserError, match="four tensors"):
        relation_loss([(a, t)], num_heads=3)
    with pytest.raises(ValueError, match="both, or neither"):
        relation(a, None, t, u, None, None, 3)
    with pytest.raises(UserError, match="not both"):
        relation_kl(a, b, t, u, 3, torch.ones(2, 4).bool(), lengths=[1, 2])
    with pytest.raises(UserError, match="requires a gradient"):
        relation_kl(a, b, t.clone().requires_grad_(), u, 3)
    with pytest.raises(UserError, match="teacher_b has shape"):
        relation_kl(a, b, t, u[:1], 3)
    with pytest.raises(UserError, match="12 wide"):
        relation_kl(a, b[..., :6], t, u, 3)
    with pytest.raises(UserError, match="floating point"):
        relation_kl(a.long(), b, t, u, 3)
    with pytest.raises(UserError, match="on meta"):
        relation_kl(a, b, t.to("meta"), u, 3)
    for temperature in (0.0, -1.0, math.inf, math.nan, "1"):
        with pytest.raises(UserError, match="temperature"):
            relation_kl(a, b, t, u, 3, temperature=temperature)
    with pytest.raises(UserError, match="reduction 'avg' is unknown: choose one of mean, sum"):
        relation_kl(a, b, t, u, 3, reduction="avg")
    with pytest.raises(UserError, match="divergence 'js' is unknown"):
        relation_kl(a, b, t, u, 3, divergence="js")
    with pytest.raises(UserError, match="masked 'drop' is unknown"):
        score_mse(a, b, t, u, 3, masked="drop")
    with pytest.raises(UserError, match="1 weights for 2"):
        relation_loss([(a, b, t, u)] * 2, [1.0], num_heads=3)
    with pytest.raises(UserError, match="at least one"):
        relation_loss([])


def test_large_scores_stay_finite(served_by):
    tensors = [100 * x for x in make(2, 8, dtype=torch.float32)]
    results = []
    for given in (tensors, [x.double() for x in tensors]):
        leaves = [x.clone().requires_grad_() for x in given[:2]]
        loss = relation_kl(*leaves, *given[2:], 3)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)
