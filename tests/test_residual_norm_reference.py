"""The oracle of the row kernel: its random numbers are Philox's, its mask what random.h says."""

import pytest
import torch

from fastffn.ops.residual_norm_reference import (
    dropout_mask,
    philox,
    residual_norm,
    scale,
    threshold,
)

# Random123's published vectors for philox4x32, words of counter, key and result.
VECTORS = {
    (7, "00000000 00000000 00000000 00000000", "00000000 00000000"): (
        "5f6fb709 0d893f64 4f121f81 4f730a48"
    ),
    (7, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff"): (
        "5207ddc2 45165e59 4d8ee751 8c52f662"
    ),
    (10, "00000000 00000000 00000000 00000000", "00000000 00000000"): (
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8"
    ),
    (10, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff"): (
        "408f276d 41c83b0e a20bc7c6 6d5451fd"
    ),
    (10, "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0"): (
        "d16cfe09 94fdcceb 5001e420 24126ea1"
    ),
}


def scalar_philox(counter, key, rounds):
    """Written from the paper's description: multiply, permute, add the Weyl sequence to the key."""
    multipliers, weyl = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
    left0, right0, left1, right1 = counter
    for step in range(rounds):
        high0, low0 = divmod(multipliers[0] * left0, 2**32)
        high1, low1 = divmod(multipliers[1] * left1, 2**32)
        keys = [(word + step * constant) % 2**32 for word, constant in zip(key, weyl, strict=True)]
        left0, right0, left1, right1 = (
            high1 ^ right0 ^ keys[0],
            low1,
            high0 ^ right1 ^ keys[1],
            low0,
        )
    return [left0, right0, left1, right1]


def words(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("case", "result"), VECTORS.items())
def test_known_answers(case, result):
    rounds, counter, key = case[0], words(case[1]), words(case[2])
    assert scalar_philox(counter, key, rounds) == words(result)
    seed = key[0] | key[1] << 32
    tensors = tuple(torch.tensor([word]) for word in counter)
    signed = torch.tensor(seed - 2**64 if seed >= 2**63 else seed)
    for given in (seed, signed):
        assert [int(word) for word in philox(tensors, given, rounds)] == words(result)


@pytest.mark.parametrize("seed", [0, 1, 2**32, 0x0123456789ABCDEF, -1])
@pytest.mark.parametrize("columns", [1, 7, 8, 29])
def test_mask_follows_its_definition(seed, columns):
    """Element by element: column c of row r takes half c % 2 of word c % 8 / 2 of call c / 8."""
    p = 0.37
    mask = dropout_mask(seed, 5, columns, p)
    assert mask.shape == (5, columns)
    assert mask.dtype == torch.bool
    for r in range(5):
        for c in range(columns):
            key = [seed % 2**32, seed // 2**32 % 2**32]
            word = scalar_philox([c // 8, r, 0, 0], key, 7)[c % 8 // 2]
            half = word >> 16 if c % 2 else word & 0xFFFF
            assert bool(mask[r, c]) == (half >= round(p * 65536))
    torch.testing.assert_close(dropout_mask(torch.tensor([seed]), 5, columns, p), mask)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_mask_keeps_the_right_share(p):
    """Within five standard deviations, overall and in every column's share of the 16-bit halves."""
    mask = dropout_mask(1234, 4096, 64, p).double()
    for part in (mask, *(mask[:, i::8] for i in range(8))):
        deviation = (p * (1 - p) / part.numel()) ** 0.5
        assert abs(part.mean() - (1 - p)) < 5 * deviation
    assert not torch.equal(mask, dropout_mask(1235, 4096, 64, p).double())


def test_rates():
    assert threshold(0.0) == 0
    assert threshold(0.1) == 6554
    assert threshold(1.0) == 65535
    assert scale(0.5) == 2.0
    assert scale(0.0) == 1.0


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradients(p):
    generator = torch.Generator().manual_seed(0)
    x, residual = (
        torch.randn(2, 3, 11, generator=generator, dtype=torch.float64, requires_grad=True)
        for _ in range(2)
    )
    weight, bias = (
        torch.randn(11, generator=generator, dtype=torch.float64, requires_grad=True)
        for _ in range(2)
    )
    assert torch.autograd.gradcheck(
        lambda *args: residual_norm(*args, p, 1e-5, 3), (x, residual, weight, bias)
    )
    value = residual_norm(x, residual, None, None, p, 0.0, 3)
    torch.testing.assert_close(value.mean(-1), torch.zeros_like(value[..., 0]))
    torch.testing.assert_close(value.var(-1, correction=0), torch.ones_like(value[..., 0]))


def test_what_is_dropped_is_multiplied_by_zero():
    """As in torch: finite values leave no trace, NaN and infinity stay visible."""
    mask = dropout_mask(7, 4, 16, 0.5)
    x = torch.where(mask, 1.0, 1e30)
    x[0, int((~mask[0]).nonzero()[0])] = torch.inf
    x[1, int((~mask[1]).nonzero()[0])] = torch.nan
    x.requires_grad_()
    value = residual_norm(x, torch.randn(4, 16), None, None, 0.5, 1e-5, 7)
    assert value.isnan().all(1).tolist() == [True, True, False, False]
    value[2:].pow(3).sum().backward()
    assert (x.grad[2:][~mask[2:]] == 0).all()
    assert (x.grad[2:][mask[2:]] != 0).all()
