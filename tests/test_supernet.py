"""Several genes on one set of weights: shared products, and gradients of leading slices."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastffn import ElasticFFN
from fastffn.ops import slices

pytestmark = pytest.mark.usefixtures("poisoned")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
RECOMPUTE = ("none", "activation", "all")


def test_a_frozen_weight_with_a_gradient_and_a_narrow_gene():
    block, x = ElasticFFN(16, 1, 16, dropout=0.0), torch.randn(4, 16)
    block(x, "1x1 down(gelu(up(x)))").sum().backward()
    bias = block.units[0].up.bias
    before = bias.grad.clone()
    bias.requires_grad_(False)
    block(x, "1x1/2 down(gelu(up(x)))").sum().backward()
    assert torch.equal(bias.grad, before)


def test_autocast_and_a_narrow_gene():
    block = ElasticFFN(32, 1, 32, dropout=0.0)
    x, gene = torch.randn(12, 32), "1x1/2 tanh(down(gelu(up(x))))"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = block(x, gene)
    assert y.dtype == torch.float32
    y.square().sum().backward()
    torch.testing.assert_close(y, block(x, gene), rtol=0.05, atol=0.05)
    weight = block.units[0].up.weight
    assert weight.grad.dtype == torch.float32 and not weight.grad[16:].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_many_genes_in_one_call(recompute, device):
    genes = [
        "1x1 tanh(down(gelu(up(x))))",
        "2x1/3 down(relu(mul(up(x), x)))",
        "1x1/2 down(mul(swish(gate(x)), up(x)))",
        "1x1/2 down(gelu(up(max(x, tanh(x)))))",
        "2x1/2 mul(down(gelu(up(x))), x)",
    ]
    block = ElasticFFN(54, 2, 54, gated=True, dropout=0.0, recompute=recompute).to(device).double()
    x = torch.randn(3, 11, 54, dtype=torch.float64, device=device, requires_grad=True)
    weights = list(block.parameters())
    grads = [torch.randn_like(x) for _ in genes]
    many, single = block.forward_many(x, genes), [block(x, gene) for gene in genes]
    for a, b in zip(many, single, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    together = torch.autograd.grad(many, [x, *weights], grads, allow_unused=True)
    apart = torch.autograd.grad(single, [x, *weights], grads, allow_unused=True)
    for a, b in zip(together, apart, strict=True):
        assert (a is None) == (b is None)
        if a is not None:  # the second unit's gate
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_many_genes_share_one_product():
    block = ElasticFFN(48, 1, 48, dropout=0.0)
    x = torch.randn(10, 48)
    genes = ["1x1 down(gelu(up(x)))", "1x1/2 tanh(down(relu(up(x))))", "1x1/3 down(tanh(up(x)))"]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        block.forward_many(x, genes)
    assert counter.get_total_flops() == 2 * 10 * 48 * (48 + 48 + 24 + 16)


def test_slices_accumulate_without_zeros(monkeypatch):
    block = ElasticFFN(48, 1, 48, dropout=0.0)
    x = torch.randn(10, 48)
    genes = ["1x1 down(gelu(up(x)))", "1x1/2 tanh(down(relu(up(x))))", "1x1/3 down(tanh(up(x)))"]

    def step():
        block.zero_grad()
        for gene in genes:
            block(x, gene).square().sum().backward()
        return [p.grad.clone() for p in block.parameters()]

    calls = []
    padded = slices.padded
    monkeypatch.setattr(slices, "padded", lambda *a: (calls.append(a), padded(*a))[1])
    fast = step()
    assert not calls
    monkeypatch.setattr(slices, "_by_addition_alone", lambda leaf: False)
    for a, b in zip(fast, step(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert calls


def test_slices_leave_grad_alone_where_others_look():
    block = ElasticFFN(48, 1, 48, dropout=0.0)
    x, gene = torch.randn(10, 48), "1x1/2 down(gelu(up(x)))"
    weight = block.units[0].up.weight
    block(x, "1x1 down(gelu(up(x)))").sum().backward()
    before = weight.grad.clone()
    (grad,) = torch.autograd.grad(block(x, gene).sum(), [weight])
    assert grad.shape == weight.shape and torch.equal(weight.grad, before)
    seen = []
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.shape))
    block(x, gene).sum().backward()
    assert seen == [weight.shape]
