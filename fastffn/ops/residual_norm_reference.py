"""The oracle of the row kernel: dropout, residual and LayerNorm in plain torch, autograd included.

The dropout mask is the one that csrc/random.h defines, bit for bit: the numbers of an element are a
function of the seed and of its row and column alone.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

_WORD = 0xFFFFFFFF
ROUNDS = 7
COLUMNS = 8  # neighbours in a row that one call of `philox` serves, with 16 bits each


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int | Tensor, rounds: int = ROUNDS
):
    """Philox4x32 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3; SC 2011).

    Args:
        counter: four int64 tensors that broadcast, each element a word of 32 bits.
        seed: 64 bits; the low word is the first word of the key. A tensor has one element.
        rounds: 7 are the fewest that pass BigCrush, 10 the authors' choice.

    Returns:
        Four int64 tensors of random words.
    """
    w0, w1, w2, w3 = counter
    key0, key1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(rounds):
        # The products wrap at 64 bits, all of which are right whatever the sign they spell.
        a, b = w0 * 0xD2511F53, w2 * 0xCD9E8D57
        w0, w1 = ((b >> 32) & _WORD) ^ w1 ^ key0, b & _WORD
        w2, w3 = ((a >> 32) & _WORD) ^ w3 ^ key1, a & _WORD
        key0, key1 = (key0 + 0x9E3779B9) & _WORD, (key1 + 0xBB67AE85) & _WORD
    return w0, w1, w2, w3


def threshold(p: float) -> int:
    """Of 65536 values of 16 bits, how many drop an element whose dropout probability is `p`."""
    return min(65535, round(p * 65536))


def scale(p: float) -> float:
    """What kept elements are multiplied by: 1 over the probability that the threshold gives."""
    return 65536 / (65536 - threshold(p))


def draw_seeds(like: Tensor, count: int) -> Tensor:
    """Seeds of masks, int64 [count], from torch's generator of `like`'s device."""
    return torch.randint(2**63 - 1, (count,), device=like.device)


def dropout_mask(seed: int | Tensor, rows: int, columns: int, p: float) -> Tensor:
    """Which elements dropout keeps: bool [rows, columns], on the device of `seed` (int: the CPU).

    Args:
        seed: 64 bits, as an int or as an int64 tensor of one element.
        p: probability that an element is dropped, in steps of 1 / 65536.
    """
    device = seed.device if isinstance(seed, Tensor) else None
    if isinstance(seed, Tensor):
        seed = seed.reshape(())
    row = torch.arange(rows, device=device)[:, None]
    group = torch.arange(-(-columns // COLUMNS), device=device)[None, :]
    words = philox((group, row & _WORD, row >> 32, torch.zeros_like(row)), seed)
    words = torch.stack([word.expand(rows, group.shape[1]) for word in words], dim=-1)
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=-1)  # [rows, groups, word, half]
    return halves.flatten(1)[:, :columns] >= threshold(p)


def residual_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    eps: float = 1e-5,
    seed: int | Tensor = 0,
) -> Tensor:
    """layer_norm(residual + dropout(x)) over the last dimension, differentiable.

    Args:
        x, residual: [..., columns]; x is the value of the epilogue's program.
        weight, bias: [columns] or None.
        dropout: probability; 0 reads no seed.
        seed: see `dropout_mask`.
    """
    if dropout > 0:
        columns = x.shape[-1]
        mask = dropout_mask(seed, x.numel() // max(1, columns), columns, dropout)
        x = x * (mask.to(x).view(x.shape) * scale(dropout))  # a dropped NaN stays one
    return F.layer_norm(residual + x, x.shape[-1:], weight, bias, eps)
