"""The op `ragged_attention` against the formula, sequence by sequence in float64."""

from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import assert_accurate
from torch.nn import functional as F

from fastffn.errors import UserError
from fastffn.ops import attention_reference as oracle
from fastffn.ops import backend
from fastffn.ops.attention import ragged_attention

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
NAN, INF = float("nan"), float("inf")


def make(lengths, heads, size, dtype=torch.float32, seed=0, gap=0, device="cpu"):
    """[query, key, value] as thirds of one matrix, between `gap` columns of NaN; and starts."""
    generator = torch.Generator().manual_seed(seed)
    width = heads * size
    packed = torch.full((sum(lengths), 3 * (width + gap) + gap), NAN, dtype=dtype, device=device)
    thirds = [packed[:, gap + i * (width + gap) :][:, :width] for i in range(3)]
    for x in thirds:
        x.copy_(torch.randn(x.shape, generator=generator, dtype=torch.float64))
    starts = torch.tensor([0, *lengths], device=device).cumsum(0)
    return thirds, starts


def by_torch(thirds, starts, heads, dtype):
    """scaled_dot_product_attention of each sequence, in `dtype`."""
    parts = []
    for first, last in pairwise(starts.tolist()):
        q, k, v = (
            x[first:last].to(dtype).unflatten(1, (heads, x.shape[1] // heads)).transpose(0, 1)[None]
            for x in thirds
        )
        parts.append(F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1).flatten(1))
    return torch.cat(parts)


def check(thirds, starts, heads, scale=None, bias=None, what="", floor=0.0):
    out = ragged_attention(*thirds, starts, heads, scale, bias)
    settings_of = (heads, scale, bias)
    exact = oracle.ragged_attention(*(x.double() for x in thirds), starts, *settings_of)
    same = oracle.ragged_attention(*thirds, starts, *settings_of)
    assert out.dtype == thirds[0].dtype and out.is_contiguous()
    assert_accurate(out, exact, same, what, floor)
    return out


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_equals_the_formula(served_by, poisoned, data):
    lengths = data.draw(st.lists(st.integers(0, 200) | st.integers(0, 20), max_size=4))
    heads = data.draw(st.integers(1, 3), label="heads")
    size = data.draw(st.integers(1, 80) | st.sampled_from([128, 192, 200, 255, 256]), label="size")
    dtype = data.draw(
        st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.float16])
    )
    scale = data.draw(st.sampled_from([None, 0.0, 1.0, -0.3]))
    gap, seed = data.draw(st.integers(0, 5), label="gap"), data.draw(st.integers(0, 9))
    thirds, starts = make(lengths, heads, size, dtype, seed, gap)
    bias = None
    if data.draw(st.booleans(), label="bias"):
        length = max([0, *lengths]) + data.draw(st.integers(0, 3))
        bias = torch.randn(heads, length, length + 2)[..., :length]
        bias = bias.mT if data.draw(st.booleans()) else bias
    # Over so few numbers the largest errors of two orders of the same sums differ by chance.
    check(thirds, starts, heads, scale, bias, floor=2e-7 * (1 + size**0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads, size", [(12, 45), (12, 32), (12, 64), (2, 256)])
def test_as_accurate_as_torch_in_the_same_precision(served_by, poisoned, heads, size, dtype):
    thirds, starts = make([128, 37, 0, 1, 200], heads, size, dtype)
    check(thirds, starts, heads)
    out = ragged_attention(*thirds, starts, heads)
    exact = by_torch(thirds, starts, heads, torch.float64)
    assert_accurate(out, exact, by_torch(thirds, starts, heads, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sequences_longer_than_a_stretch(served_by, dtype):
    """Rows whose largest score lies in the first, the second or the last stretch of keys."""
    thirds, starts = make([1100, 513], 1, 16, dtype)
    query, key, _ = thirds
    for row, largest in ((0, 10), (1, 600), (2, 1099)):
        key[largest] = 4 * query[row]
    bias = torch.randn(1, 1100, 1100)
    bias[:, :, :520] = -INF  # nothing of the first stretch counts
    bias[:, 5] = 0
    check(thirds, starts, 1)
    bias[:, :513, :513] = 0
    check(thirds, starts, 1, bias=bias)


@pytest.mark.parametrize("size", [1, 8, 45])
def test_extreme_scores(served_by, size):
    """Scores of +-10^4: exponentials of all but the largest are nothing, and none overflows."""
    thirds, starts = make([70, 20], 2, size)
    for x in thirds[:2]:
        x *= 100
    thirds[1][3] = thirds[1][4]  # a tie
    out = ragged_attention(*thirds, starts, 2, 1.0)
    exact = oracle.ragged_attention(*(x.double() for x in thirds), starts, 2, 1.0)
    assert out.isfinite().all()
    # A score of 10^4 is known to 10^-3: where two differ by less their weights are open.
    close = (out - exact).abs() < 1e-2
    assert close.float().mean() > 0.98
    thirds[0].fill_(-1e4)
    thirds[1].fill_(1.0)
    check(thirds, starts, 2, 1.0, floor=1e-6)


@pytest.mark.parametrize("value", [NAN, INF])
def test_what_is_not_finite_is_not_hidden(served_by, value):
    """It reaches the rows that it belongs to, and no others."""
    for which, wrong in ((0, [5]), (1, range(3, 12)), (2, range(3, 12))):
        thirds, starts = make([3, 9, 40], 1, 20)
        thirds[which][5, 2] = value
        out = ragged_attention(*thirds, starts, 1)
        exact = oracle.ragged_attention(*thirds, starts, 1)
        rows = exact.isfinite().all(1)
        assert torch.equal(out.isfinite().all(1), rows), which
        assert set((~rows).nonzero().flatten().tolist()) <= set(wrong)
        assert (~rows).any()


def test_a_nan_of_another_device_is_one(served_by):
    bits = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    for which in range(3):
        thirds, starts = make([20], 1, 20)
        thirds[which][5, 2] = bits
        assert ragged_attention(*thirds, starts, 1).isnan().any()
    thirds, starts = make([20], 1, 20)
    bias = torch.zeros(1, 20, 20)
    bias[0, 4, 4] = bits
    assert ragged_attention(*thirds, starts, 1, None, bias)[4].isnan().all()


def test_a_row_without_a_score_is_nan(served_by):
    thirds, starts = make([20], 1, 20)
    bias = torch.zeros(1, 20, 20)
    bias[0, 4] = -INF
    out = ragged_attention(*thirds, starts, 1, None, bias)
    assert out[4].isnan().all() and out[torch.arange(20) != 4].isfinite().all()


def test_strided_inputs(served_by):
    wide = torch.randn(24, 50).t()  # columns apart
    thirds = [wide[:, 8 * i : 8 * i + 8] for i in range(3)]
    starts = torch.tensor([0, 99, 20, 99, 50])[::2]
    check(thirds, starts, 2)
    check([x[:1].expand(50, 8) for x in thirds], starts, 2)
    negative = torch.complex(thirds[0], -thirds[0]).conj().imag  # its sign is a flag
    check([negative, *thirds[1:]], starts, 2)


def test_memory_beyond_the_matrix_is_not_touched(served_by):
    """The last row of the last third ends where the allocation does."""
    for size in (1, 7, 16, 45):
        for tokens in (1, 16, 33):
            numbers = torch.randn(tokens * 3 * size)
            thirds = numbers.view(tokens, 3 * size).split(size, 1)
            check(thirds, torch.tensor([0, tokens]), 1, floor=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_depend_on_no_thread(dtype):
    before = torch.get_num_threads()
    try:
        for lengths, heads in (([200], 1), ([50, 3, 128, 0, 90], 3), ([130], 12)):
            thirds, starts = make(lengths, heads, 45, dtype)
            found = []
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                found.append(ragged_attention(*thirds, starts, heads))
            for other in found[1:]:
                assert torch.equal(found[0], other)
    finally:
        torch.set_num_threads(before)


def test_a_sequence_knows_nothing_of_its_neighbours():
    thirds, starts = make([30, 77, 12], 3, 45)
    together = ragged_attention(*thirds, starts, 3)
    alone = ragged_attention(*(x[30:107] for x in thirds), torch.tensor([0, 77]), 3)
    assert torch.equal(together[30:107], alone)


def test_nothing_to_attend_to(served_by):
    for lengths in ([], [0], [0, 0, 0]):
        thirds, starts = make(lengths, 2, 8)
        assert ragged_attention(*thirds, starts, 2).shape == (0, 16)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("biased", [False, True])
def test_opcheck(biased, device):
    thirds, starts = make([5, 0, 9], 2, 8, device=device)
    bias = torch.randn(2, 9, 9, device=device) if biased else None
    torch.library.opcheck(
        torch.ops.fastffn.ragged_attention.default, (*thirds, starts, 2, 0.3, bias)
    )


def test_compiles_whole():
    thirds, starts = make([5, 0, 9], 2, 8)
    compiled = torch.compile(ragged_attention, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*thirds, starts, 2), ragged_attention(*thirds, starts, 2))


def test_serves_the_kernels_own_sizes_only():
    thirds, starts = make([5], 1, 300)  # beyond MAX_HEAD_SIZE: torch
    check(thirds, starts, 1, floor=1e-6)
    if module := backend.cpp()[0]:
        assert module.MAX_HEAD_SIZE == 256


def test_gradients_are_refused():
    thirds, starts = make([5], 1, 8)
    thirds[1] = thirds[1].clone().requires_grad_()
    with pytest.raises(UserError, match="no gradient"):
        ragged_attention(*thirds, starts, 1)
    with torch.no_grad():
        ragged_attention(*thirds, starts, 1)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"key": torch.ones(6, 8)}, "expected .tokens, width."),
        ({"query": torch.ones(5, 2, 4)}, "expected .tokens, width."),
        ({"heads": 3}, "does not divide into 3 heads"),
        ({"heads": 0}, "does not divide into 0 heads"),
        ({"value": torch.ones(5, 8).half()}, "one floating-point type"),
        ({"starts": torch.tensor([0, 5], dtype=torch.int32)}, "expected int64"),
        ({"starts": torch.tensor([[0, 5]])}, "expected int64"),
        ({"starts": torch.tensor([0, 4])}, "rise from 0 to the number of tokens, 5"),
        ({"starts": torch.tensor([1, 5])}, "rise from 0 to the number of tokens, 5"),
        ({"starts": torch.tensor([0, 4, 3, 5])}, "starts fall at sequence 1"),
        ({"bias": torch.ones(1, 5, 5)}, r"bias is \[1, 5, 5\], expected \[2, length, length\]"),
        ({"bias": torch.ones(2, 5, 6)}, "last two sizes differ"),
        ({"bias": torch.ones(2, 4, 4)}, "a bias of length 4 and a sequence of 5"),
    ],
)
def test_what_is_refused(served_by, change, message):
    given = {name: torch.ones(5, 8) for name in ("query", "key", "value")}
    given |= {"starts": torch.tensor([0, 5]), "heads": 2} | change
    with pytest.raises(UserError, match=message):
        ragged_attention(**given)
