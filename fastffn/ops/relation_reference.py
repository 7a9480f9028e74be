"""The oracle of `relation`: the formula in plain torch, autograd and full maps included.

It keeps length x length maps for every head: use it on small tensors. Differentiable any number of
times.
"""

import torch
from torch import Tensor


def relation(
    a: Tensor,
    b: Tensor | None,
    teacher_a: Tensor,
    teacher_b: Tensor | None,
    real: Tensor | None,
    heads: int,
    temperature: float = 1.0,
    divergence: str = "kl",
) -> Tensor:
    """Values of the rows, [batch, heads, length]; see `fastffn.ops.relation`.

    Half precision is computed in float32, otherwise in the inputs' own.
    """
    student = scores(a, b, real, heads, temperature)
    teacher = scores(teacher_a, teacher_b, real, heads, temperature)
    if real is None:
        real = torch.ones(a.shape[:2], dtype=torch.bool, device=a.device)
    keys, queries = real[:, None, None, :], real[:, None, :]
    if divergence == "score_mse":
        terms = (student - teacher).square()
    else:
        r, p = (_log_softmax(x, keys) for x in (student, teacher))
        if divergence == "kl":
            terms = p.exp() * (p - r)
        elif divergence == "reverse_kl":
            terms = r.exp() * (r - p)
        else:
            terms = (r.exp() - p.exp()).square()
    rows = torch.where(keys, terms, 0).sum(-1)
    return torch.where(queries, rows, 0)


def scores(
    a: Tensor, b: Tensor | None, real: Tensor | None, heads: int, temperature: float = 1.0
) -> Tensor:
    """a b^T / (sqrt(d) temperature) of each head, [batch, heads, length, length]; padding is 0."""

    def split(x):
        x = x if real is None else torch.where(real.unsqueeze(-1), x, 0)
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    scale = (a.shape[-1] / heads) ** -0.5 / temperature
    return split(a) @ split(a if b is None else b).mT * scale


def _log_softmax(x: Tensor, keys: Tensor) -> Tensor:
    """Over the real keys. The others get a finite bias, so that a row without any stays finite."""
    return x.masked_fill(~keys, torch.finfo(x.dtype).min / 4).log_softmax(-1)
