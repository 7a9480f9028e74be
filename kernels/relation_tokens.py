"""Which tokens are real, found on the device, and how tiles of them are read and written.

`real_tokens` sorts the positions of every example: real tokens first, in their order, padding
behind. The kernels of `relation` walk along this order, so for them an example is a sequence of
`count` tokens without gaps, whatever the mask: left, right or ragged padding and holes cost
nothing, every tile but the last is whole, and what padding holds is never loaded.

Why not masks in the tiles: a softmax needs them per element, two instructions of about twelve; and
tiles without any key need guards. Why not a packed copy: the traffic of all inputs once more.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["real_batch", "real_token", "length"])
def real_tokens(real, order, counts, real_batch, real_token, length, BLOCK: tl.constexpr):
    """order[example]: positions, the real ones first; counts[example]: how many are real."""
    example = tl.program_id(0).to(tl.int64)
    real += example * real_batch
    order += example * length
    lane = tl.arange(0, BLOCK)
    found = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, length, BLOCK):
        at = start + lane
        flag = tl.load(real + at.to(tl.int64) * real_token, mask=at < length, other=0)
        found += (flag != 0).to(tl.int32)
    count = tl.sum(found, 0)
    tl.store(counts + example, count)
    before = count * 0
    for start in range(0, length, BLOCK):
        at = start + lane
        flag = tl.load(real + at.to(tl.int64) * real_token, mask=at < length, other=0)
        here = (flag != 0).to(tl.int32)
        rank = before + tl.cumsum(here, 0) - here  # real tokens ahead of this position
        tl.store(order + tl.where(here != 0, rank, count + at - rank), at, mask=at < length)
        before += tl.sum(here, 0)


@triton.jit
def place(blocks, heads):
    """Example, head and block of rows of this program."""
    program = tl.program_id(0).to(tl.int64)
    head = program // blocks
    return head // heads, head % heads, program % blocks


@triton.jit
def count_of(counts, example, length, ORDERED: tl.constexpr):
    """How many tokens an example has."""
    if ORDERED:
        return tl.load(counts + example)
    else:
        return length


@triton.jit
def positions(order, rank, live, ORDERED: tl.constexpr):
    """Where the tokens of the given ranks stand."""
    if ORDERED:
        return tl.load(order + rank, mask=live, other=0)
    else:
        return rank


@triton.jit
def head_of(x, example, head, batch, column, WIDTH: tl.constexpr, V: tl.constexpr):
    """Start of a head's slice of an example; strides are divided by V, those of columns not."""
    return x + example * (batch.to(tl.int64) * V) + (head * WIDTH) * column


@triton.jit
def offsets(at, token, column, PADDED: tl.constexpr, V: tl.constexpr, INDEX: tl.constexpr):
    """Of a tile of one head's rows: [tokens, PADDED]."""
    j = tl.arange(0, PADDED)[None, :].to(INDEX)
    return at[:, None].to(INDEX) * (token.to(INDEX) * V) + j * column


@triton.jit
def inside(live, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Which elements of a tile exist."""
    if WIDTH == PADDED:
        return live[:, None]
    else:
        return live[:, None] & (tl.arange(0, PADDED) < WIDTH)[None, :]


@triton.jit
def load_rows(
    x, at, live, token, column,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, V: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Rows of a head at positions `at`, [tokens, PADDED]; zeros where there is nothing."""
    where = offsets(at, token, column, PADDED, V, INDEX)
    return tl.load(x + where, mask=inside(live, WIDTH, PADDED), other=0.0)
