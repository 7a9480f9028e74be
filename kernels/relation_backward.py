"""Relations, backward: one kernel for both gradients, every divergence, self and general.

A program owns a block of tokens x and walks over tiles of the other side's tokens y:

    dx_i = scale sum_j M_ij y_j        M rounded to the type of y, as torch does

    M_ij = G_ij           x = a, y = b: the gradient of a         (`BY_ROW`)
    M_ij = G_ji           x = b, y = a: the gradient of b         (`BY_COLUMN`)
    M_ij = G_ij + G_ji    x = y = a:    a self relation, whose scores are symmetric: one
                                        accumulator serves both sides

G is computed again from the scores and what the forward saved of each row. No atomics: every
element of a gradient has one program.

The self relation of `kl` needs two exponentials per element, not four:

    M_ij = e^(S_ij - c) (u_i + u_j) - e^(T_ij - k) (v_i + v_j)
    u_i = w_i e^(c - m_i) / l_i for S, and v_i likewise for T

with m and l a row's maximum and sum, c and k midway between the smallest and the largest maximum of
a head. `relation_factors` computes u and v ahead, once per head: in the tile a column's factor
is two exponentials for every thread that holds the column. Since S_ij <= min(m_i, m_j), and a self
relation's m_i >= S_ii >= 0, nothing overflows; and while the maxima differ by at most `_SPREAD`
nothing that counts underflows, and rounding S_ij - c costs no more than 2e-6. A head where they
differ more takes four exponentials: a branch that a whole program takes, chosen on the device.

The weights are divided by their largest of the head, so that M fits half precision whatever the
loss's factor; the gradient is multiplied by it at the end.
"""

import triton
import triton.language as tl

from .relation_forward import FAR
from .relation_tokens import count_of, head_of, inside, load_rows, offsets, place, positions

_SPREAD = tl.constexpr(64.0)  # powers of two
HEAD_NUMBERS = tl.constexpr(4)  # largest weight, c, k, whether the spread is too large


@triton.jit
def _widest(x, live):
    return tl.min(tl.where(live, x, FAR), 0), tl.max(tl.where(live, x, -FAR), 0)


@triton.jit(do_not_specialize=["w_batch", "w_head", "w_token", "heads", "length"])
def relation_factors(
    weights, stats, order, counts, factors, numbers, w_batch, w_head, w_token, heads, length,
    DIVERGENCE: tl.constexpr, ORDERED: tl.constexpr, FACTORED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """factors: what a row's exponentials are multiplied by, see `_gradient`, in the order of the
    real tokens, 0 behind: [2 for kl, else 1, batch, heads, length]. numbers: HEAD_NUMBERS each."""
    program = tl.program_id(0).to(tl.int64)
    example = program // heads
    count = count_of(counts, example, length, ORDERED)
    weights += example * w_batch + (program % heads) * w_head
    order += example * length
    row = program * length
    layer = tl.num_programs(0) * length.to(tl.int64)
    stats += row
    factors += row
    lane = tl.arange(0, BLOCK)
    largest = tl.zeros((), tl.float32)
    low_s, high_s = tl.zeros((), tl.float32) + FAR, tl.zeros((), tl.float32) - FAR
    low_t, high_t = low_s, high_s
    for start in range(0, count, BLOCK):
        rank = start + lane
        live = rank < count
        at = positions(order, rank, live, ORDERED).to(tl.int64)
        w = tl.load(weights + at * w_token, mask=live, other=0.0)
        largest = tl.maximum(largest, tl.max(tl.abs(w), 0))
        if FACTORED:
            low, high = _widest(tl.load(stats + rank, mask=live, other=0.0), live)
            low_s, high_s = tl.minimum(low_s, low), tl.maximum(high_s, high)
            low, high = _widest(tl.load(stats + 2 * layer + rank, mask=live, other=0.0), live)
            low_t, high_t = tl.minimum(low_t, low), tl.maximum(high_t, high)
    # Of no weight at all the inverse is of no interest: the gradient is 0.
    inverse = 1.0 / tl.where(largest > 0.0, largest, 1.0)
    c, k = 0.5 * (low_s + high_s), 0.5 * (low_t + high_t)
    wide = tl.maximum(high_s - low_s, high_t - low_t) > _SPREAD
    numbers += program * HEAD_NUMBERS
    tl.store(numbers, largest)
    if FACTORED:
        tl.store(numbers + 1, c)
        tl.store(numbers + 2, k)
        tl.store(numbers + 3, wide.to(tl.float32))
    for start in range(0, length, BLOCK):
        rank = start + lane
        live, there = rank < count, rank < length
        at = positions(order, rank, live, ORDERED).to(tl.int64)
        u = tl.load(weights + at * w_token, mask=live, other=0.0) * inverse
        v = u
        if DIVERGENCE != "score_mse":
            u *= tl.load(stats + layer + rank, mask=live, other=0.0)
        if DIVERGENCE == "kl":
            v *= tl.load(stats + 3 * layer + rank, mask=live, other=0.0)
            if FACTORED:
                m_s = tl.load(stats + rank, mask=live, other=FAR)
                m_t = tl.load(stats + 2 * layer + rank, mask=live, other=FAR)
                u *= tl.where(wide, 1.0, tl.exp2(c - m_s))
                v *= tl.where(wide, 1.0, tl.exp2(k - m_t))
            tl.store(factors + layer + rank, v, mask=there)
        tl.store(factors + rank, u, mask=there)


@triton.jit
def _power(x, m, CLAMPED: tl.constexpr):
    """2^(x - m), at most 1 if CLAMPED."""
    if CLAMPED:
        return tl.exp2(tl.minimum(x - m, 0.0, propagate_nan=tl.PropagateNan.ALL))
    else:
        return tl.exp2(x - m)


@triton.jit
def _gradient(s, t, u, v, m_s, m_t, inverse, mean, DIVERGENCE: tl.constexpr, CLAMPED: tl.constexpr):
    """G without constant factors, of scores and of what was saved of their rows."""
    if DIVERGENCE == "kl":
        return _power(s, m_s, CLAMPED) * u - _power(t, m_t, CLAMPED) * v
    elif DIVERGENCE == "reverse_kl":
        # Both scores less their maxima first: as in the mean, all numbers are then small.
        return _power(s, m_s, CLAMPED) * u * ((s - m_s) - (t - m_t) - mean)
    elif DIVERGENCE == "probability_mse":
        e = _power(s, m_s, CLAMPED)
        return e * u * (2.0 * (e * inverse - _power(t, m_t, CLAMPED) * v) - mean)
    else:
        return (s - t) * u


@triton.jit
def _saved(stats, factors, rank, live, layer, DIVERGENCE: tl.constexpr):
    """u, v, m_s, m_t, inverse and mean of rows, for `_gradient`; absent ones repeat others.

    All zeros for a row that is not there: its scores are 0, so are its exponents, and u is 0.
    """
    u = tl.load(factors + rank, mask=live, other=0.0)
    v, m_s, m_t, inverse, mean = u, u, u, u, u
    if DIVERGENCE != "score_mse":
        m_s = tl.load(stats + rank, mask=live, other=0.0)
        m_t = tl.load(stats + 2 * layer + rank, mask=live, other=0.0)
    if DIVERGENCE == "kl":
        v = tl.load(factors + layer + rank, mask=live, other=0.0)
    elif DIVERGENCE == "reverse_kl":
        mean = tl.load(stats + 3 * layer + rank, mask=live, other=0.0)
    elif DIVERGENCE == "probability_mse":
        inverse = tl.load(stats + layer + rank, mask=live, other=0.0)
        v = tl.load(stats + 3 * layer + rank, mask=live, other=0.0)
        mean = tl.load(stats + 4 * layer + rank, mask=live, other=0.0)
    return u, v, m_s, m_t, inverse, mean


@triton.jit
def _tile(
    y, ty, order, start, count, y_token, y_column, ty_token, ty_column,
    ORDERED: tl.constexpr, D: tl.constexpr, TD: tl.constexpr, P: tl.constexpr, TP: tl.constexpr,
    V: tl.constexpr, TV: tl.constexpr, OTHERS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Tokens of the other side from `start` on: student's, teacher's, ranks, which exist."""
    rank = start + tl.arange(0, OTHERS)
    live = rank < count
    at = positions(order, rank, live, ORDERED)
    y = load_rows(y, at, live, y_token, y_column, D, P, V, INDEX)
    ty = load_rows(ty, at, live, ty_token, ty_column, TD, TP, TV, INDEX)
    return y, ty, rank, live


@triton.jit(
    do_not_specialize=[
        "scale", "scale_t", "factor", "heads", "blocks", "length",
        "x_batch", "x_token", "y_batch", "y_token",
        "tx_batch", "tx_token", "ty_batch", "ty_token", "out_batch", "out_token",
    ]
)  # fmt: skip
def relation_backward(
    x, y, tx, ty, order, counts, stats, factors, numbers, out,
    scale, scale_t, factor, heads, blocks, length,
    x_batch, x_token, x_column, y_batch, y_token, y_column,
    tx_batch, tx_token, tx_column, ty_batch, ty_token, ty_column, out_batch, out_token, out_column,
    DIVERGENCE: tl.constexpr, BY_ROW: tl.constexpr, BY_COLUMN: tl.constexpr, ORDERED: tl.constexpr,
    D: tl.constexpr, TD: tl.constexpr, P: tl.constexpr, TP: tl.constexpr,
    V: tl.constexpr, TV: tl.constexpr, OV: tl.constexpr, ROWS: tl.constexpr, OTHERS: tl.constexpr,
    PRECISION: tl.constexpr, TPRECISION: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """out = factor sum_j M_ij y_j, zeros at padding."""
    example, head, block = place(blocks, heads)
    count = count_of(counts, example, length, ORDERED)
    first = (block * ROWS).to(tl.int32)
    x = head_of(x, example, head, x_batch, x_column, D, V)
    y = head_of(y, example, head, y_batch, y_column, D, V)
    tx = head_of(tx, example, head, tx_batch, tx_column, TD, TV)
    ty = head_of(ty, example, head, ty_batch, ty_column, TD, TV)
    out = head_of(out, example, head, out_batch, out_column, D, OV)
    order += example * length
    size = length.to(tl.int64)
    layer = (tl.num_programs(0) // blocks) * size
    stats += (example * heads + head) * size
    factors += (example * heads + head) * size
    numbers += (example * heads + head) * HEAD_NUMBERS
    rank_i = first + tl.arange(0, ROWS)
    live_i = rank_i < count
    at_i = positions(order, rank_i, rank_i < length, ORDERED)
    xi = load_rows(x, at_i, live_i, x_token, x_column, D, P, V, INDEX)
    txi = load_rows(tx, at_i, live_i, tx_token, tx_column, TD, TP, TV, INDEX)
    end = tl.where(first < count, count, 0)  # a block of padding has nothing to do
    total = tl.zeros((ROWS, P), tl.float32)

    # The score 0 of a key that is not there may be far above a row's scores, unless the row's own
    # is among them, which is not negative.
    CLAMPED: tl.constexpr = BY_ROW and not BY_COLUMN
    FACTORED: tl.constexpr = BY_ROW and BY_COLUMN and DIVERGENCE == "kl"
    # The general form needs more registers: where it is the exception, it takes half the tile.
    STEP: tl.constexpr = OTHERS // 2 if FACTORED and OTHERS > 16 else OTHERS
    general = end  # where its loop ends
    if FACTORED:
        wide = tl.load(numbers + 3) > 0.0
        general = tl.where(wide, end, 0)
        factored = tl.where(wide, 0, end)
        c, k = tl.load(numbers + 1), tl.load(numbers + 2)
        a_i = tl.load(factors + rank_i, mask=live_i, other=0.0)[:, None]
        b_i = tl.load(factors + layer + rank_i, mask=live_i, other=0.0)[:, None]
        for start in range(0, factored, OTHERS):
            yj, tyj, rank, live = _tile(
                y, ty, order, start, count, y_token, y_column, ty_token, ty_column,
                ORDERED, D, TD, P, TP, V, TV, OTHERS, INDEX,
            )  # fmt: skip
            u = tl.load(factors + rank, mask=live, other=0.0)[None, :]
            v = tl.load(factors + layer + rank, mask=live, other=0.0)[None, :]
            s = tl.dot(xi, tl.trans(yj), input_precision=PRECISION)
            t = tl.dot(txi, tl.trans(tyj), input_precision=TPRECISION)
            m = tl.exp2(s * scale - c) * (a_i + u) - tl.exp2(t * scale_t - k) * (b_i + v)
            total = tl.dot(m.to(yj.dtype), yj, total, input_precision=PRECISION)
    u_i, v_i, s_i, t_i, inverse_i, mean_i = _saved(
        stats, factors, rank_i, live_i, layer, DIVERGENCE
    )
    for start in range(0, general, STEP):
        yj, tyj, rank, live = _tile(
            y, ty, order, start, count, y_token, y_column, ty_token, ty_column,
            ORDERED, D, TD, P, TP, V, TV, STEP, INDEX,
        )  # fmt: skip
        s = tl.dot(xi, tl.trans(yj), input_precision=PRECISION) * scale
        t = tl.dot(txi, tl.trans(tyj), input_precision=TPRECISION) * scale_t
        if BY_COLUMN:
            u, v, m_s, m_t, inverse, mean = _saved(stats, factors, rank, live, layer, DIVERGENCE)
        if DIVERGENCE == "score_mse" and BY_ROW and BY_COLUMN:
            m = (s - t) * (u_i[:, None] + u[None, :])
        elif BY_ROW:
            m = _gradient(
                s, t, u_i[:, None], v_i[:, None], s_i[:, None], t_i[:, None],
                inverse_i[:, None], mean_i[:, None], DIVERGENCE, CLAMPED,
            )  # fmt: skip
        if BY_COLUMN and not (DIVERGENCE == "score_mse" and BY_ROW):
            other = _gradient(
                s, t, u[None, :], v[None, :], m_s[None, :], m_t[None, :],
                inverse[None, :], mean[None, :], DIVERGENCE, False,
            )  # fmt: skip
            if BY_ROW:
                m += other
            else:
                m = other
        total = tl.dot(m.to(yj.dtype), yj, total, input_precision=PRECISION)

    total = tl.where(live_i[:, None], total * (factor * tl.load(numbers)), 0.0)
    out += offsets(at_i, out_token, out_column, P, OV, INDEX)
    tl.store(out, total.to(out.dtype.element_ty), mask=inside(rank_i < length, D, P))
