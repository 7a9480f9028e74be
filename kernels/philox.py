"""The dropout mask of csrc/random.h in Triton, bit for bit: Philox4x32 with seven rounds.

One call of the generator serves eight neighbouring columns with 16 bits each. A thread holds V
neighbouring columns at a time and makes one call for them, without exchange between threads: with
V = 8 exactly the calls that are needed, with V = 4 twice as many, of which each thread uses half.
"""

import triton
import triton.language as tl


@triton.jit
def philox(w0, w1, w2, w3, key0, key1):
    """Four random words from a counter of four words (uint32 tensors that broadcast)."""
    for _ in tl.static_range(7):
        # One wide product yields the high and the low word; `umulhi` and `*` are two.
        a = w0.to(tl.uint64) * 0xD2511F53
        b = w2.to(tl.uint64) * 0xCD9E8D57
        w0 = (b >> 32).to(tl.uint32) ^ w1 ^ key0
        w1 = b.to(tl.uint32)
        w2 = (a >> 32).to(tl.uint32) ^ w3 ^ key1
        w3 = a.to(tl.uint32)
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    return w0, w1, w2, w3


@triton.jit
def kept(
    seed, row, column,
    V: tl.constexpr, THRESHOLD: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Which elements of a tile [ROWS, WIDTH] dropout keeps.

    seed: pointer to 64 bits. row: int64 [ROWS, 1]. column: int32 [1, WIDTH / V], the first of each
    V neighbours. V: 1, 2, 4 or 8.
    """
    bits = tl.load(seed).to(tl.uint64, bitcast=True)
    w0, w1, w2, w3 = philox(
        (column // 8).to(tl.uint32),
        row.to(tl.uint32),
        (row >> 32).to(tl.uint32),
        tl.zeros([1, 1], tl.uint32),
        bits.to(tl.uint32),
        (bits >> 32).to(tl.uint32),
    )
    if V == 8:
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    elif V == 4:
        second = column % 8 == 4
        words = tl.join(tl.where(second, w2, w0), tl.where(second, w3, w1))
    else:
        pair = column % 8 // 2
        words = tl.where(pair < 2, tl.where(pair == 0, w0, w1), tl.where(pair == 2, w2, w3))
    # Halves are compared in place, at the upper end of a word: half >= threshold.
    if V == 1:
        halves = tl.where(column % 2 == 0, words << 16, words)
    else:
        halves = tl.join(words << 16, words)
    return tl.reshape(halves, [ROWS, WIDTH]) >= (THRESHOLD << 16)
