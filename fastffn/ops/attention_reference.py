"""The oracle of `ragged_attention` in plain torch, one sequence after the other.

Differentiable; computes in float64 for float64, else in float32.
"""

from itertools import pairwise

from torch import Tensor

from ..errors import UserError
from .execute import compute_dtype


def ragged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    heads: int,
    scale: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """softmax(scale Q K^T + bias) V for each head of each sequence; see ops/attention.py.

    Raises:
        UserError: `starts` does not rise from 0 to the number of tokens, or `bias` is shorter than
            a sequence.
    """
    bounds = starts.tolist()
    tokens, width = query.shape
    check(bounds, tokens, bias)
    scale = (width // heads) ** -0.5 if scale is None else scale
    out = query.new_empty(tokens, width)
    dtype = compute_dtype(query)
    for first, last in pairwise(bounds):
        q, k, v = (
            x[first:last].to(dtype).unflatten(1, (heads, width // heads)).transpose(0, 1)
            for x in (query, key, value)
        )
        scores = q @ k.mT * scale
        if bias is not None:
            scores = scores + bias[:, : last - first, : last - first]
        out[first:last] = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1).to(query.dtype)
    return out


def check(bounds: list[int], tokens: int, bias: Tensor | None) -> None:
    """Raises a UserError unless the sequences are in order, cover all tokens and fit the bias."""
    if bounds[0] != 0 or bounds[-1] != tokens:
        raise UserError(f"attention: starts rise from 0 to the number of tokens, {tokens}")
    for sequence, (first, last) in enumerate(pairwise(bounds)):
        if last < first:
            raise UserError(f"attention: starts fall at sequence {sequence}")
        if bias is not None and last - first > bias.shape[-1]:
            raise UserError(
                f"attention: a bias of length {bias.shape[-1]} and a sequence of {last - first}"
            )
