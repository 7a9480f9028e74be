"""The op `relation` against the formula on cut-out tokens."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import assert_accurate
from relation_formula import make, mask_of, naive

from fastffn.functional import relation_kl, score_mse
from fastffn.ops import backend, relation_chunked
from fastffn.ops import relation_reference as oracle
from fastffn.ops.relation import DIVERGENCES, relation

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
NAN, INF = float("nan"), float("inf")


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


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_oracle_agrees_with_cut_out_tokens(divergence):
    tensors, mask = make(3, 7), mask_of([7, 2, 0], 7)
    actual = oracle.relation(*tensors, mask, 3, 1.5, divergence)
    torch.testing.assert_close(actual, naive(*tensors, 3, mask, 1.5, divergence))


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


def test_who_serves_a_relation():
    x = torch.empty(1)
    expected = "reference" if backend.cpp()[0] is None else "cpp"
    assert backend.relation_engine([x]) == expected
    assert backend.relation_engine([x.to("meta")]) == "reference"
