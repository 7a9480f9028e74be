"""The op `relation` and the losses over it, against the formula on cut-out tokens."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import assert_accurate

from fastffn.errors import UserError
from fastffn.functional import relation_kl, relation_loss, score_mse, split_relation_heads
from fastffn.ops import backend, relation_chunked
from fastffn.ops import relation_reference as oracle
from fastffn.ops.relation import DIVERGENCES, relation

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
NAN, INF = float("nan"), float("inf")


def make(batch, length, student=12, teacher=24, dtype=torch.float64, seed=0, device="cpu"):
    """student_a, student_b, teacher_a, teacher_b."""
    generator = torch.Generator().manual_seed(seed)
    widths = (student, student, teacher, teacher)
    return [
        torch.randn(batch, length, width, generator=generator, dtype=torch.float64).to(
            device, dtype
        )
        for width in widths
    ]


def mask_of(lengths, length, left=False, device="cpu"):
    mask = torch.arange(length) < torch.tensor(lengths).unsqueeze(-1)
    return (mask.flip(-1) if left else mask).to(device)


def naive(a, b, teacher_a, teacher_b, heads, mask, temperature=1.0, divergence="kl"):
    """Rows [batch, heads, length], of the real tokens alone: there is nothing to mask wrongly."""
    batch, length, _ = a.shape
    mask = torch.ones(batch, length, dtype=torch.bool) if mask is None else mask.cpu()
    rows = []
    for example in range(batch):
        real = mask[example].nonzero().squeeze(-1).to(a.device)

        def scores(x, y, example=example, real=real):
            x, y = (z[example, real].unflatten(-1, (heads, -1)).transpose(0, 1) for z in (x, y))
            return x @ y.mT / x.shape[-1] ** 0.5 / temperature

        s, t = scores(a, b), scores(teacher_a, teacher_b)
        log_r, log_p = s.log_softmax(-1), t.log_softmax(-1)
        values = {
            "kl": log_p.exp() * (log_p - log_r),
            "reverse_kl": log_r.exp() * (log_r - log_p),
            "probability_mse": (log_r.exp() - log_p.exp()) ** 2,
            "score_mse": (s - t) ** 2,
        }[divergence].sum(-1)
        row = a.new_zeros(heads, length)
        rows.append(row.index_copy(1, real, values.to(row.dtype)))
    empty = a.new_zeros(0, heads, length) + a.sum() + b.sum()  # known to autograd
    return torch.stack(rows) if rows else empty


def with_gradients(function, tensors, self_relation, weights):
    """[rows, gradients of their weighted sum by a (and b)]."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors[: 1 if self_relation else 2]]
    rows = function(leaves[0], leaves[-1], tensors[2], tensors[2 if self_relation else 3])
    gradients = torch.autograd.grad((rows * weights.to(rows.dtype)).sum(), leaves)
    return [rows.detach(), *gradients]


def ours(heads, mask, temperature=1.0, divergence="kl"):
    def function(a, b, teacher_a, teacher_b):
        if b is a and teacher_b is teacher_a:
            b = teacher_b = None
        return relation(a, b, teacher_a, teacher_b, mask, None, heads, temperature, divergence)

    return function


def theirs(heads, mask, temperature=1.0, divergence="kl"):
    return lambda *tensors: naive(*tensors, heads, mask, temperature, divergence)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_equals_the_formula(served_by, poisoned, data):
    batch = data.draw(st.integers(0, 3), label="batch")
    length = data.draw(st.integers(0, 9) | st.integers(15, 40), label="length")
    heads = data.draw(st.sampled_from([1, 2, 3]), label="heads")
    widths = [heads * data.draw(st.integers(1, 20), label="width") for _ in range(2)]
    lengths = data.draw(st.lists(st.integers(0, length), min_size=batch, max_size=batch))
    temperature = data.draw(st.sampled_from([0.5, 1.0, 2.0]))
    divergence = data.draw(st.sampled_from(DIVERGENCES))
    self_relation = data.draw(st.booleans())
    tensors = make(batch, length, *widths, seed=data.draw(st.integers(0, 9)))
    mask = mask_of(lengths, length).reshape(batch, length)
    mask = mask[:, data.draw(st.permutations(range(length)))]
    if data.draw(st.booleans()):
        mask = None
    # Weights of any strides, 0 too, as gradients of sums have; padding weighs nothing.
    weights = torch.rand(data.draw(st.sampled_from([(batch, heads, length), (batch, 1, 1)])))
    weights = weights.double().expand(batch, heads, length)
    settings_of = (heads, mask, temperature, divergence)
    exact = with_gradients(theirs(*settings_of), tensors, self_relation, weights)
    chunk = relation_chunked._CHUNK
    relation_chunked._CHUNK = data.draw(st.sampled_from([1, 100, chunk]))
    try:
        actual = with_gradients(ours(*settings_of), tensors, self_relation, weights)
    finally:
        relation_chunked._CHUNK = chunk
    for out, expected in zip(actual, exact, strict=True):
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("self_relation", [True, False], ids=["self", "general"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_accurate_as_torch_in_the_same_precision(
    served_by, poisoned, dtype, divergence, self_relation, device
):
    for heads, widths, length in ((12, (48, 96), 37), (3, (135, 33), 20), (1, (128, 64), 70)):
        tensors = make(4, length, *widths, dtype=dtype, device=device)
        mask = mask_of([length, 20, 1, 0], length, device=device)
        weights = torch.rand(4, heads, length, device=device)
        exact, same = (
            with_gradients(
                theirs(heads, mask, 1.0, divergence),
                [x.to(precision) for x in tensors],
                self_relation,
                weights,
            )
            for precision in (torch.float64, dtype)
        )
        actual = with_gradients(ours(heads, mask, 1.0, divergence), tensors, self_relation, weights)
        assert actual[0].dtype == torch.float32
        for which, out, true, rounded in zip("vab", actual, exact, same, strict=False):
            assert_accurate(out, true, rounded, f"{which}, {heads} heads", floor=1e-6)
            assert (
                out[1:][~mask[1:].unsqueeze(1).expand(-1, heads, -1)].eq(0).all()
                if (which == "v")
                else out[~mask].eq(0).all()
            )


def test_loss_is_as_accurate_as_the_formula(served_by):
    """fp32 error of a KL: at most twice the formula's, plus 1e-6."""
    for seed, size in enumerate((0.1, 1.0, 3.0)):
        tensors = [size * x for x in make(4, 65, 48, 96, torch.float32, seed)]
        exact = naive(*(x.double() for x in tensors), 12, None).mean()
        same = naive(*tensors, 12, None).mean()
        loss = relation_kl(*tensors, 12)
        assert abs(loss - exact) <= 2 * abs(same - exact) + 1e-6 * max(1, exact)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("self_relation", [True, False], ids=["self", "general"])
def test_scores_of_hundreds(served_by, divergence, self_relation, device):
    tensors = make(2, 33, dtype=torch.float32, device=device)
    tensors = [18 * x for x in tensors]  # scores beyond 300, on and off the diagonal
    tensors[0][:, 5] /= 100  # and a token whose own score is 0: no shift serves all rows
    weights = torch.rand(2, 3, 33, device=device)
    exact, same = (
        with_gradients(
            theirs(3, None, 1.0, divergence), [x.to(p) for x in tensors], self_relation, weights
        )
        for p in (torch.float64, torch.float32)
    )
    actual = with_gradients(ours(3, None, 1.0, divergence), tensors, self_relation, weights)
    # 1e-6 of the scores is what an exponential of them, and their difference, may be wrong by.
    for which, out, true, rounded in zip("vab", actual, exact, same, strict=False):
        size = 1.0 if which == "v" else true.abs().max().item()
        assert_accurate(out, true, rounded, which, floor=3e-4 * size)


def test_long_relations_with_themselves(served_by):
    """Too long for all exponentials to be kept."""
    tensors = make(1, 1500, 4, 8, torch.float32)
    weights = torch.rand(1, 1, 1500)
    exact, same = (
        with_gradients(theirs(1, None), [x.to(p) for x in tensors], True, weights)
        for p in (torch.float64, torch.float32)
    )
    for out, true, rounded in zip(
        with_gradients(ours(1, None), tensors, True, weights), exact, same, strict=True
    ):
        assert_accurate(out, true, rounded, floor=1e-5)  # sums of 1500, in four lanes at worst


def test_long_and_short_relations_in_one_batch(served_by):
    """The long example is computed in strips, the short one with its exponentials kept."""
    tensors = make(2, 1500, 4, 8, torch.float32)
    mask = mask_of([1500, 900], 1500)
    weights = torch.rand(2, 1, 1500) * mask.unsqueeze(1)
    exact, same = (
        with_gradients(theirs(1, mask), [x.to(p) for x in tensors], True, weights)
        for p in (torch.float64, torch.float32)
    )
    actual = with_gradients(ours(1, mask), tensors, True, weights)
    for out, true, rounded in zip(actual, exact, same, strict=True):
        assert_accurate(out, true, rounded, floor=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tokens_of_very_different_length(served_by, dtype):
    """Relations with themselves whose rows share a shift, as far as that is right."""
    for size in (1, 8, 12, 15, 40, 60):
        tensors = make(1, 61, 4, 4, dtype, seed=size)
        for x in tensors:
            x[:, ::3] *= size  # scores of these from some to thousands of nats; the others' small
        weights = torch.ones(1, 1, 61)
        exact, same = (
            with_gradients(theirs(1, None), [x.to(p) for x in tensors], True, weights)
            for p in (torch.float64, dtype)
        )
        actual = with_gradients(ours(1, None), tensors, True, weights)
        small = torch.arange(61) % 3 > 0
        for out, true, rounded in zip(actual, exact, same, strict=True):
            assert out.isfinite().all()
            assert_accurate(out, true, rounded, size, floor=1e-6 * size**2)
        # What the large tokens do to the small ones' rows is no rounding of the large ones'.
        assert_accurate(*(x[0][..., small] for x in (actual, exact, same)), size, floor=1e-4)


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


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("device", DEVICES)
def test_padding_changes_nothing_and_gets_no_gradient(served_by, device, divergence, poison, left):
    tensors = make(3, 21, dtype=torch.float32, device=device)
    mask = mask_of([21, 1, 0], 21, left, device)
    for self_relation in (True, False):
        weights = torch.rand(3, 3, 21, device=device) * mask.unsqueeze(1)
        clean = with_gradients(ours(3, mask, 1.0, divergence), tensors, self_relation, weights)
        poisoned = [torch.where(mask.unsqueeze(-1), x, poison) for x in tensors]
        dirty = with_gradients(ours(3, mask, 1.0, divergence), poisoned, self_relation, weights)
        for a, b in zip(clean, dirty, strict=True):
            assert torch.equal(a, b)
        assert dirty[0].transpose(1, 2)[~mask].eq(0).all()
        for gradient in dirty[1:]:
            assert gradient[~mask].eq(0).all()
            assert gradient[0].ne(0).any()


@pytest.mark.parametrize("value", [NAN, INF])
def test_what_real_tokens_hold_is_not_hidden(served_by, value):
    tensors = make(2, 20, dtype=torch.float32)
    tensors[0][0, 0, 0] = value
    for divergence in ("kl", "reverse_kl", "probability_mse"):
        assert not relation_kl(*tensors, 3, divergence=divergence).isfinite()
        q, _, t, _ = tensors
        assert not relation_kl(q, q, t, t, 3, divergence=divergence).isfinite()
    assert not score_mse(*tensors, 3).isfinite()


def test_a_nan_of_another_device_is_one():
    """CUDA's NaN has all bits set, which arithmetic on exponents could take for a number."""
    bits = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    tensors = make(1, 20, dtype=torch.float32)
    tensors[0][0, 0, 0] = bits
    for divergence in ("kl", "reverse_kl", "probability_mse"):
        assert relation_kl(*tensors, 3, divergence=divergence).isnan()


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
    assert loss.abs() < 1e-7
    assert q.grad.abs().max() < 1e-7


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


def test_strided_inputs(served_by):
    wide = torch.randn(2, 36, 20, dtype=torch.float64).transpose(1, 2)
    long = torch.randn(2, 40, 30, dtype=torch.float64)[:, ::2]
    tensors = [wide[..., :12], long[..., 3:15], wide[..., 12:], long[..., :24]]
    tensors[3] = tensors[3][:1].expand(2, -1, -1)
    weights = torch.rand(2, 1, 1).expand(2, 3, 20)
    for out, expected in zip(
        with_gradients(ours(3, None), tensors, False, weights),
        with_gradients(theirs(3, None), tensors, False, weights),
        strict=True,
    ):
        torch.testing.assert_close(out, expected)


def test_flagged_tensors(served_by):
    q, k, t, u = make(2, 4)
    negative = torch.complex(q, -q).conj().imag  # its sign is a flag
    torch.testing.assert_close(relation_kl(negative, k, t, u, 3), relation_kl(q, k, t, u, 3))


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


@pytest.mark.parametrize("self_relation", [True, False], ids=["self", "general"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_bits_depend_on_no_thread(self_relation, divergence):
    tensors = make(3, 50, 48, 96, torch.float32)
    mask = mask_of([50, 31, 7], 50)
    weights = torch.rand(3, 12, 50) * mask.unsqueeze(1)
    function = ours(12, mask, 1.0, divergence)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            found.append(with_gradients(function, tensors, self_relation, weights))
            found[-1].append(relation_kl(*tensors, 12, mask))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert torch.equal(one, two)


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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weighted", [True, False], ids=["loss", "rows"])
@pytest.mark.parametrize("self_relation", [True, False], ids=["self", "general"])
def test_opcheck(self_relation, weighted, device):
    a, b, t, u = make(2, 6, dtype=torch.float32, device=device)
    mask = mask_of([6, 2], 6, device=device)
    weights = torch.rand(2, 3, 6, device=device) * mask.unsqueeze(1) if weighted else None
    operands = (a, None, t, None) if self_relation else (a, b, t, u)
    for x in operands[:2]:
        if x is not None:
            x.requires_grad_()
    torch.library.opcheck(
        torch.ops.fastffn.relation.default, (*operands, mask, weights, 3, 1.0, "kl")
    )


def test_transforms_are_served_by_the_formula():
    a, b, t, u = make(2, 5)
    gradient = torch.func.grad(lambda a: relation_kl(a, b, t, u, 3))(a)
    a.requires_grad_()
    torch.testing.assert_close(gradient, torch.autograd.grad(relation_kl(a, b, t, u, 3), a)[0])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_oracle_agrees_with_cut_out_tokens(divergence):
    tensors, mask = make(3, 7), mask_of([7, 2, 0], 7)
    actual = oracle.relation(*tensors, mask, 3, 1.5, divergence)
    torch.testing.assert_close(actual, naive(*tensors, 3, mask, 1.5, divergence))


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


def test_flops_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    a, b, t, u = make(2, 8, dtype=torch.float32)
    a.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        loss = relation_kl(a, b, t, u, 3, reduction="none").sum()
    assert counter.get_total_flops() == 2 * 2 * 8 * 8 * (12 + 24)
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert counter.get_total_flops() == 2 * 2 * 8 * 8 * (12 + 24 + 12)


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


def test_who_serves_a_relation():
    x = torch.empty(1)
    expected = "reference" if backend.cpp()[0] is None else "cpp"
    assert backend.relation_engine([x]) == expected
    assert backend.relation_engine([x.to("meta")]) == "reference"
