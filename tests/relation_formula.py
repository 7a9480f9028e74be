"""Tensors to relate and what relations are by definition, for the tests of op and losses."""

import torch


def make(batch, length, student=12, teacher=24, dtype=torch.float64, seed=0, device="cpu"):
    """student_a, student_b, teacher_a, teacher_b."""
    generator = torch.Generator().manual_seed(seed)
    widths = (student, student, teacher, teacher)
    return [
        torch.randn(batch, length, width, generator=generator, dtype=torch.float64).to(
            device, dtype
        )
        for width in widths
    ]


def mask_of(lengths, length, left=False, device="cpu"):
    mask = torch.arange(length) < torch.tensor(lengths).unsqueeze(-1)
    return (mask.flip(-1) if left else mask).to(device)


def naive(a, b, teacher_a, teacher_b, heads, mask, temperature=1.0, divergence="kl"):
    """Rows [batch, heads, length], of the real tokens alone: there is nothing to mask wrongly."""
    batch, length, _ = a.shape
    mask = torch.ones(batch, length, dtype=torch.bool) if mask is None else mask.cpu()
    rows = []
    for example in range(batch):
        real = mask[example].nonzero().squeeze(-1).to(a.device)

        def scores(x, y, example=example, real=real):
            x, y = (z[example, real].unflatten(-1, (heads, -1)).transpose(0, 1) for z in (x, y))
            return x @ y.mT / x.shape[-1] ** 0.5 / temperature

        s, t = scores(a, b), scores(teacher_a, teacher_b)
        log_r, log_p = s.log_softmax(-1), t.log_softmax(-1)
        values = {
            "kl": log_p.exp() * (log_p - log_r),
            "reverse_kl": log_r.exp() * (log_r - log_p),
            "probability_mse": (log_r.exp() - log_p.exp()) ** 2,
            "score_mse": (s - t) ** 2,
        }[divergence].sum(-1)
        row = a.new_zeros(heads, length)
        rows.append(row.index_copy(1, real, values.to(row.dtype)))
    empty = a.new_zeros(0, heads, length) + a.sum() + b.sum()  # known to autograd
    return torch.stack(rows) if rows else empty
