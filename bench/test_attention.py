"""Attention without padding: fastffn, and torch's sdpa on padded batches and sequence by sequence.

Query, key and value are thirds of one packed projection in all of them, as encoders have them. The
padded batch is given as such, and with equal lengths without a mask: what padding and unpadding
cost is not charged to torch.
"""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from fastffn.functional import ragged_attention

from .harness import check_outputs, floor_seconds, interleave

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
SHAPES = [(12, 45), (12, 32), (12, 64)]  # EfficientBERT, MiniLM, BERT-base


def lengths_of(batch: int, length: int, ragged: bool) -> list[int]:
    """All of them `length`, or evenly spread up to it."""
    return [-(-length * (k + 1) // batch) if ragged else length for k in range(batch)]


def by_heads(x, heads):
    """Thirds of [batch, length, 3 * width] as [batch, heads, length, head size]."""
    return (third.unflatten(-1, (heads, -1)).transpose(1, 2) for third in x.chunk(3, -1))


def sdpa(x, heads, mask=None):
    out = F.scaled_dot_product_attention(*by_heads(x, heads), attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


def contenders(packed, starts, heads):
    """Each with what turns its result into rows of tokens, for the comparison."""
    bounds = starts.tolist()
    lengths = starts.diff()
    real = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
    batch = packed.new_zeros(*real.shape, packed.shape[1])
    batch[real] = packed
    mask = None if real.all() else real[:, None, None]

    def one_by_one():
        return torch.cat([sdpa(packed[None, a:b], heads)[0] for a, b in pairwise(bounds)])

    return {
        "fastffn": (lambda: ragged_attention(*packed.chunk(3, 1), starts, heads), None),
        "sdpa padded": (lambda: sdpa(batch, heads, mask), lambda out: out[real]),
        "sdpa one by one": (one_by_one, None),
    }


@DTYPES
@pytest.mark.parametrize("heads, size", SHAPES)
@pytest.mark.parametrize(
    "batch, length, ragged",
    [(1, 32, False), (1, 128, False), (1, 384, False), (8, 128, False), (32, 128, True)],
)
def test_attention(benchmark, batch, length, ragged, heads, size, dtype):
    lengths = lengths_of(batch, length, ragged)
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(sum(lengths), 3 * heads * size, generator=generator).to(dtype)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    with torch.no_grad():
        exact = contenders(packed.double(), starts, heads)["sdpa one by one"][0]
        made = contenders(packed, starts, heads)
        rows = {
            name: (lambda work=work, to_rows=to_rows: to_rows(work())) if to_rows else work
            for name, (work, to_rows) in made.items()
        }
        first = check_outputs(rows, exact, "sdpa one by one")
        products = sum(4 * n * n for n in lengths) * heads * size
        floor = floor_seconds("cpu", dtype, 4 * packed.nbytes // 3, products)
        what = "ragged" if ragged else "equal lengths"
        benchmark.group = f"attention, ({batch}, {length}) {what}, {heads} x {size}, {dtype}, cpu"
        works = {name: work for name, (work, _) in made.items()}
        interleave(benchmark, works, "fastffn", 1.0, floor, first)
