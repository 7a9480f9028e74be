"""`relation` in torch operations, a few heads at a time: where neither csrc nor Triton serves.

Values and gradients of a chunk are made together, so that no map outlives its chunk. With G as in
csrc/relation.h, dA = scale G b and dB = scale G^T a.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .relation_reference import scores

# Entries of the length x length maps computed at a time, at least one map; four of fp32 are then
# 16 MiB up to length 1024.
_CHUNK = 1 << 20


@torch.no_grad()
def run(
    operands: Sequence[Tensor | None],
    weights: Tensor | None,
    settings: tuple[int, float, str],
    rows: Tensor | None,
    loss: Tensor | None,
    gradients: Sequence[Tensor | None],
) -> None:
    """Writes rows, loss and gradients, each unless None; see `fastffn.ops.relation`."""
    with torch.autocast(operands[0].device.type, enabled=False):
        _run(operands, weights, settings, rows, loss, gradients)


def _run(operands, weights, settings, rows, loss, gradients) -> None:
    a, b, teacher_a, teacher_b, real = operands
    heads, temperature, divergence = settings
    self_relation = b is None and teacher_b is None
    b, teacher_b = a if b is None else b, teacher_a if teacher_b is None else teacher_b
    dtype = (rows if rows is not None else weights).dtype
    scale = (a.shape[-1] / heads) ** -0.5 / temperature
    step = max(1, _CHUNK // max(1, a.shape[1] ** 2))
    total = 0.0
    for example in range(a.shape[0]):
        mask = None if real is None else real[example : example + 1]
        for first in range(0, heads, step):
            last = min(first + step, heads)

            def cut(x, first=first, last=last, example=example, mask=mask):
                width = x.shape[-1] // heads
                x = x[example : example + 1, :, first * width : last * width].to(dtype)
                return x if mask is None else torch.where(mask.unsqueeze(-1), x, 0)

            ours, other, theirs, their_other = (cut(x) for x in (a, b, teacher_a, teacher_b))
            s = scores(ours, other, None, last - first, temperature)
            t = scores(theirs, their_other, None, last - first, temperature)
            values, maps = _maps(s, t, mask, divergence)
            at = (slice(example, example + 1), slice(first, last))
            if rows is not None:
                rows[at] = values
            if weights is None:
                continue
            w = weights[at]
            w = w if mask is None else torch.where(mask.unsqueeze(1), w, 0)
            total = total + (w * values).sum()
            maps = maps * w.unsqueeze(-1) * scale
            if self_relation:
                maps = maps + maps.mT
            for gradient, g, x in zip(gradients, (maps, maps.mT), (other, ours), strict=True):
                if gradient is not None:
                    width = x.shape[-1] // (last - first)
                    part = g @ x.unflatten(-1, (last - first, -1)).transpose(1, 2)
                    columns = slice(first * width, last * width)
                    gradient[example, :, columns] = part.transpose(1, 2).flatten(2)[0]
    if loss is not None:
        loss.copy_(total) if isinstance(total, Tensor) else loss.zero_()


def _maps(s: Tensor, t: Tensor, mask: Tensor | None, divergence: str) -> tuple[Tensor, Tensor]:
    """Values of the rows, and G for weights of 1, 0 at padding."""
    if mask is None:
        keep = torch.ones_like(s[..., :1, :], dtype=torch.bool)
        keep = keep & keep.mT
    else:
        keep = mask[:, None, None, :] & mask[:, None, :, None]
    if divergence == "score_mse":
        difference = torch.where(keep, s - t, 0)
        return difference.square().sum(-1), 2 * difference
    low = torch.finfo(s.dtype).min / 4
    log_r, log_p = (x.masked_fill(~keep, low).log_softmax(-1) for x in (s, t))
    # A padded query's row holds nothing but masked keys; its softmax is finite, and dropped.
    r, p = (torch.where(keep, x.exp(), 0) for x in (log_r, log_p))
    ratio = torch.where(keep, log_r - log_p, 0)
    if divergence == "kl":
        return -(p * ratio).sum(-1), r - p
    if divergence == "reverse_kl":
        value = (r * ratio).sum(-1, keepdim=True)
        return value.squeeze(-1), r * (ratio - value)
    difference = r - p
    slope = (r * difference).sum(-1, keepdim=True)
    return difference.square().sum(-1), 2 * r * (difference - slope)
