"""Genes and operands of the tests of the block; and checks on the Triton kernels, which are run
where these run, see test_ffn_fused."""

import contextlib
import types
from unittest import mock

import torch
from oracle import assert_accurate

from fastffn.ops import backend, execute, ffn, ffn_fused, ffn_reference, row_kernel

GENES = {
    "plain": "down(gelu(up(x)))",
    "epilogue": "tanh(down(gelu(up(x))))",
    "prologue": "down(gelu(up(max(x, tanh(x)))))",
    "x in the middle": "down(relu(mul(up(x), x)))",
    "x in the epilogue": "mul(sigmoid(down(elu(up(x)))), x)",
    "gated": "down(mul(swish(gate(x)), up(x)))",
    "everything": "max(down(mul(mul(sigmoid(gate(swish(x))), up(swish(x))), x)), tanh(x))",
}


@contextlib.contextmanager
def _served_by_triton(device):
    """Where Triton interprets, CPU tensors take the way of CUDA tensors."""
    if device == "cuda":
        yield
        return
    from fastffn.kernels import linear, residual_norm, segment

    kernels = types.SimpleNamespace(linear=linear, residual_norm=residual_norm, segment=segment)
    with (
        mock.patch.object(execute, "engine_of", lambda x: ("triton", ())),
        mock.patch.object(row_kernel, "engine_of", lambda x: ("triton", ())),
        mock.patch.object(backend, "triton", lambda: (kernels, "test")),
    ):
        yield


def operands(gene, rows, hidden, width, dtype, device="cpu", seed=0):
    """x, up, up_bias, gate, gate_bias, down, down_bias, norm_weight, norm_bias; requiring grad."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size, scale=1.0):
        values = scale * torch.randn(*size, generator=generator, dtype=torch.float64)
        return values.to(device, dtype).requires_grad_()

    gated = "gate" in gene
    return [
        normal(rows, hidden),
        normal(width, hidden, scale=hidden**-0.5),
        normal(width),
        normal(width, hidden, scale=hidden**-0.5) if gated else None,
        normal(width) if gated else None,
        normal(hidden, width, scale=width**-0.5),
        normal(hidden),
        normal(hidden),
        normal(hidden),
    ]


def _both(device, gene, dtype, widths, recompute, dropout, rows=37, hidden=40):
    """(mine, exact, torch's): outputs and gradients of one call for all `widths`."""
    leaves = operands(gene, rows, hidden, max(widths), dtype, device)
    seeds = torch.arange(3, 3 + len(widths), device=device)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(rows, hidden, generator=generator).to(device, dtype) for _ in widths]

    def oracle(wanted):
        copies = [None if x is None else x.detach().to(wanted).requires_grad_() for x in leaves]
        ys = [
            ffn_reference.ffn(*copies, seed, gene, width, dropout, 1e-5)
            for width, seed in zip(widths, seeds, strict=True)
        ]
        inputs = [x for x in copies if x is not None]
        return [*ys, *torch.autograd.grad(ys, inputs, [g.to(wanted) for g in grads])]

    with (
        _served_by_triton(device),
        mock.patch.object(ffn_fused, "forward", wraps=ffn_fused.forward) as used,
    ):
        settings = ("\n".join([gene] * len(widths)), tuple(widths), dropout, 1e-5, recompute)
        ys = ffn.run([*leaves, seeds if dropout else None], settings)
        inputs = [x for x in leaves if x is not None]
        mine = [*ys, *torch.autograd.grad(ys, inputs, grads)]
    assert used.called
    return mine, oracle(torch.float64), oracle(dtype)


def agrees(device, gene, dtype, widths=(24,), dropout=0.0):
    """By the oracle rule, and every mode of recomputation bit for bit the same."""
    modes = [
        _both(device, gene, dtype, widths, mode, dropout) for mode in ("none", "activation", "all")
    ]
    mine, exact, same = modes[0]
    for got, true, other in zip(mine, exact, same, strict=True):
        assert got.dtype == other.dtype
        assert_accurate(got, true, other, gene)
    for other, _, _ in modes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))
