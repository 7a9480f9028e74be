"""Dropout, residual and LayerNorm: fastffn, eager torch and torch.compile.

The outputs are compared without dropout, since every contender draws its own mask.
"""

import pytest
import torch
import torch.nn.functional as F

from fastffn.functional import residual_norm

from .harness import check_outputs, compiled, floor_seconds, interleave, works_of

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def contenders(dropout: float, device: str):
    def eager(x, residual, weight, bias):
        x = F.dropout(x, dropout) if dropout else x
        return F.layer_norm(residual + x, weight.shape, weight, bias)

    def fused(x, residual, weight, bias):
        return residual_norm(x, residual, weight, bias, dropout)

    return {"fastffn": fused, "eager": eager, **compiled(eager, device)}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", [128, 1024, 8192, pytest.param(32768, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("width", [540, 384])
@pytest.mark.parametrize(
    "direction, dropout", [("forward", 0.0), ("forward+backward", 0.0), ("forward+backward", 0.1)]
)
def test_residual_norm(benchmark, direction, dropout, width, rows, dtype, device):
    if rows > 8192 and device == "cpu":
        pytest.skip("a size for GPUs")
    torch._dynamo.reset()
    backward = direction != "forward"
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, width), (rows, width), (width,), (width,)]
    inputs = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    inputs = [x.requires_grad_(backward) for x in inputs]
    grad = torch.randn(rows, width, generator=generator).to(device, dtype) if backward else None

    wide = [x.detach().double().requires_grad_(backward) for x in inputs]
    compared = contenders(0.0, device)
    exact = works_of(compared, wide, grad.double() if backward else None)["eager"]
    works = works_of(compared, inputs, grad)
    first = check_outputs(works, exact)
    if dropout:
        works, first = works_of(contenders(dropout, device), inputs, grad), None
    floor = floor_seconds(device, dtype, (8 if backward else 3) * inputs[0].nbytes)
    what = f"{direction}, dropout {dropout}" if dropout else direction
    benchmark.group = f"residual_norm, {what}, ({rows}, {width}), {dtype}, {device}"
    interleave(benchmark, works, "fastffn", 1.0, floor, first)
