"""Attention scores before the softmax: fastffn, the formula in torch, torch.compile.

Forward and backward at BERT's shapes; scores of padding count as 0, as EfficientBERT and TinyBERT
have it.
"""

import functools

import pytest
import torch

from fastffn.functional import score_mse, split_relation_heads

from .harness import check_outputs, compiled, floor_seconds, interleave, losses_of
from .test_relation import lengths_of

STUDENT, TEACHER, HEADS = 384, 768, 12
SIZES = [(8, 128, "cpu"), (4, 512, "cpu"), (64, 128, "cuda"), (64, 512, "cuda")]
SIZES = [pytest.param(*s, marks=[pytest.mark.gpu] if s[2] == "cuda" else []) for s in SIZES]


def formula(teacher_q, teacher_k, real):
    def scores(q, k):
        q, k = split_relation_heads(q, HEADS), split_relation_heads(k, HEADS)
        return (q @ k.mT / q.shape[-1] ** 0.5).to(torch.promote_types(q.dtype, torch.float32))

    def loss(q, k):
        ours, theirs = scores(q, k), scores(teacher_q, teacher_k)
        if real is not None:
            padding = ~(real[:, None, :, None] & real[:, None, None, :])
            ours, theirs = ours.masked_fill(padding, 0), theirs.masked_fill(padding, 0)
        return torch.nn.functional.mse_loss(ours, theirs)

    return loss


def fused(teacher_q, teacher_k, real):
    def loss(q, k):
        return score_mse(q, k, teacher_q, teacher_k, HEADS, real)

    return loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("batch, length, device", SIZES)
@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "ragged"])
def test_score_mse(benchmark, ragged, batch, length, device, dtype):
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    q, k, *teacher = (
        torch.randn(batch, length, width, generator=generator).to(device, dtype)
        for width in (STUDENT, STUDENT, TEACHER, TEACHER)
    )
    lengths = lengths_of(batch, length, ragged, device)
    real = torch.arange(length, device=device) < lengths[:, None] if ragged else None
    plain = formula(*teacher, real)
    functions = {"fastffn": fused(*teacher, real), "eager": plain, **compiled(plain, device)}
    works = losses_of(functions, [x.requires_grad_() for x in (q, k)])
    wide = [x.detach().double().requires_grad_() for x in (q, k)]
    exact = losses_of({"exact": formula(*(x.double() for x in teacher), real)}, wide)["exact"]
    first = check_outputs(works, functools.cache(exact))
    entries = (lengths.double() ** 2).sum().item()
    # Scores of both models twice, and the student's two gradients.
    flops = entries * 2 * (2 * (TEACHER + STUDENT) + 2 * STUDENT)
    floor = floor_seconds(device, dtype, flops=flops)
    what = "ragged" if ragged else "dense"
    benchmark.group = f"score_mse, ({batch}, {length}), {HEADS} heads, {what}, {dtype}, {device}"
    interleave(benchmark, works, "fastffn", 2.0, floor, first)
