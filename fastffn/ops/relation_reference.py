"""The oracle of `relation_kl`: the formula in plain torch, autograd and full maps included.

Written for reading, one example at a time: an example's real tokens are cut out, so that there is
no mask whose handling could be wrong. Use it on small float64 tensors.
"""

import torch
from torch import Tensor

from fastffn.ops.relation import split_relation_heads


def relation_kl_reference(
    student_a: Tensor,
    student_b: Tensor,
    teacher_a: Tensor,
    teacher_b: Tensor,
    num_heads: int = 48,
    attention_mask: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """As `fastffn.functional.relation_kl`, without checks and in the inputs' own precision."""
    batch, length, _ = student_a.shape
    if attention_mask is None:
        attention_mask = torch.ones(batch, length, dtype=torch.bool, device=student_a.device)
    total = student_a[:0].sum() + student_b[:0].sum()  # 0, but known to autograd
    for example in range(batch):
        real = attention_mask[example].nonzero().squeeze(-1)
        if len(real) == 0:
            continue
        student = _relation(
            student_a[example, real], student_b[example, real], num_heads, temperature
        )
        teacher = _relation(
            teacher_a[example, real], teacher_b[example, real], num_heads, temperature
        )
        divergence = (teacher.exp() * (teacher - student)).sum(-1)  # [heads, tokens]
        total = total + divergence.mean() * temperature**2
    return total / max(1, batch)


def _relation(a: Tensor, b: Tensor, num_heads: int, temperature: float) -> Tensor:
    """Log of the relation of [tokens, width] and [tokens, width]: [heads, tokens, tokens]."""
    a, b = split_relation_heads(a, num_heads), split_relation_heads(b, num_heads)
    return (a @ b.mT / a.shape[-1] ** 0.5 / temperature).log_softmax(-1)
