"""The products of the block against float64, whichever library serves them."""

import pytest
import torch

from fastffn.ops import matmul

ROWS = (0, 1, 17, 63, 64, 65, 128, 200)


def layouts(*shape):
    x = torch.randn(*shape)
    rows, columns = shape
    return {
        "dense": x,
        "transposed": x.t().contiguous().t(),
        "leading columns": torch.cat([x, x], dim=1)[:, :columns],
        "leading rows": torch.cat([x, x])[:rows],
        "expanded": x[:1].expand(rows, columns) if rows else x,
        "sparse columns": x.repeat_interleave(2, dim=1)[:, ::2],
    }


def close(got, x, weight, bias=0.0):
    exact = x.double() @ weight.double().t() + bias
    assert got.is_contiguous() and got.dtype == x.dtype
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rows", ROWS)
def test_linear(rows):
    for weight in layouts(12, 40).values():
        for x in layouts(rows, 40).values():
            close(matmul.linear(x, weight), x, weight)
    packed = torch.randn(12, 3)
    for bias in (packed[:, 0].contiguous(), packed[:, 1], torch.randn(1).expand(12)):
        close(matmul.linear(x, weight, bias), x, weight, bias.double())


@pytest.mark.parametrize("rows", ROWS)
def test_weight_gradient(rows):
    for grad in layouts(rows, 24).values():
        for x in layouts(rows, 40).values():
            close(matmul.weight_gradient(grad, x), grad.t(), x.t())


@pytest.mark.parametrize("rows", ROWS)
def test_without_onednn(rows, monkeypatch):
    monkeypatch.setattr(matmul, "_onednn", lambda: None)
    x, weight, bias = torch.randn(rows, 40), torch.randn(12, 40), torch.randn(12)
    close(matmul.linear(x, weight, bias), x, weight, bias.double())
    grad = torch.randn(rows, 5)
    close(matmul.weight_gradient(grad, x), grad.t(), x.t())


def test_float64_stays_float64():
    x, weight = torch.randn(70, 9).double(), torch.randn(4, 9).double()
    torch.testing.assert_close(matmul.linear(x, weight), x @ weight.t())
