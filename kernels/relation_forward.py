"""Relations, forward: the value of every row in one pass over the tiles of keys.

Of the two distributions of a row the kernel keeps, as it meets more keys, the maxima m of the
scores, the sums l of e^(score - m), and the sum d of p times the difference of the two shifted
scores; when a maximum moves, l and d are scaled, and d is shifted as well, both exactly. So

    sum_j P (log P - log R) = d / l_p - log l_p + log l_r

holds only small numbers, even where scores are in the hundreds. All in powers of two: log2(e) is
in the scale. For the backward it saves m and 1 / l, not their log-sum-exp: that, rounded at
hundreds, costs R and P two digits, and where one key has nearly all of both they should cancel.

`LANES`: the columns of a tile fall into classes that one thread each holds (a thread of the tensor
cores' layout has columns 2 q and 2 q + 1 of every eight, q its number in a group of four). Every
class has its own m, l and d, and they meet once, behind the loop: inside it no thread waits for
another.

`probability_mse` takes two passes, since in one it would be a difference of three sums that nearly
cancel; `score_mse` has no softmax.
"""

import triton
import triton.language as tl

from .relation_tokens import count_of, head_of, load_rows, offsets, place, positions

# Instead of infinity, since differences and products with 0 are taken of it.
FAR = tl.constexpr(1e30)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _split(x, LANES: tl.constexpr):
    """[rows, keys] by classes of columns: [rows, groups, LANES, 2]."""
    return tl.reshape(x, (x.shape[0], x.shape[1] // (2 * LANES), LANES, 2))


@triton.jit
def _spread(x):
    return x[:, None, :, None]


@triton.jit
def _sum(x):
    """[rows, groups, LANES, 2] -> [rows, LANES]."""
    return tl.sum(tl.sum(x, 3), 1)


@triton.jit
def _shifted(x, m, live, scale, MASKED: tl.constexpr):
    """The new maxima, and the scores less them; `live`: which keys exist."""
    if MASKED:
        x = tl.where(live, x * scale, -FAR)
        top = tl.maximum(m, tl.max(tl.max(x, 3), 1))
    else:
        top = tl.maximum(m, tl.max(tl.max(x, 3), 1) * scale)
        x = x * scale
    return top, x - _spread(top)


@triton.jit
def _divergence_step(
    p, q, m_p, l_p, m_q, l_q, d, live, scale_p, scale_q,
    MASKED: tl.constexpr, DIFFERENCE: tl.constexpr,
):  # fmt: skip
    """One tile of keys; `p`, `q`: bare products."""
    top_p, x_p = _shifted(p, m_p, live, scale_p, MASKED)
    top_q, x_q = _shifted(q, m_q, live, scale_q, MASKED)
    e_p = tl.exp2(x_p)
    shrink = tl.exp2(m_p - top_p)
    if DIFFERENCE:
        d = (d + l_p * ((m_p - top_p) - (m_q - top_q))) * shrink + _sum(e_p * (x_p - x_q))
    l_p = l_p * shrink + _sum(e_p)
    l_q = l_q * tl.exp2(m_q - top_q) + _sum(tl.exp2(x_q))
    return top_p, l_p, top_q, l_q, d


@triton.jit
def _product(
    a, x, at_i, live_i, a_token, a_column, b, at, live, b_token, b_column,
    D: tl.constexpr, P: tl.constexpr, V: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Bare products of rows, loaded as `x`, with keys; if DEPTH > 0, both loaded in such pieces."""
    if DEPTH == 0:
        y = load_rows(b, at, live, b_token, b_column, D, P, V, INDEX)
        return tl.dot(x, tl.trans(y), input_precision=PRECISION)
    else:
        total = tl.zeros((at_i.shape[0], at.shape[0]), tl.float32)
        i = offsets(at_i, a_token, a_column, DEPTH, V, INDEX)
        j = offsets(at, b_token, b_column, DEPTH, V, INDEX)
        column = tl.arange(0, DEPTH)[None, :]
        for start in range(0, P, DEPTH):
            there = column < D - start
            piece = tl.load(a + start * a_column + i, mask=live_i[:, None] & there, other=0.0)
            y = tl.load(b + start * b_column + j, mask=live[:, None] & there, other=0.0)
            total = tl.dot(piece, tl.trans(y), total, input_precision=PRECISION)
        return total


@triton.jit
def _products(
    a, x, ta, tx, at_i, live_i, b, tb, order, start, count,
    a_token, a_column, ta_token, ta_column, b_token, b_column, tb_token, tb_column,
    ORDERED: tl.constexpr, D: tl.constexpr, TD: tl.constexpr, P: tl.constexpr, TP: tl.constexpr,
    V: tl.constexpr, TV: tl.constexpr, KEYS: tl.constexpr, LANES: tl.constexpr,
    DEPTH: tl.constexpr, PRECISION: tl.constexpr, TPRECISION: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Bare products of the rows with the keys from `start` on: student's, teacher's; and which
    of the keys exist."""
    rank = start + tl.arange(0, KEYS)
    live = rank < count
    at = positions(order, rank, live, ORDERED)
    s = _product(
        a, x, at_i, live_i, a_token, a_column, b, at, live, b_token, b_column,
        D, P, V, DEPTH, PRECISION, INDEX,
    )  # fmt: skip
    t = _product(
        ta, tx, at_i, live_i, ta_token, ta_column, tb, at, live, tb_token, tb_column,
        TD, TP, TV, DEPTH, TPRECISION, INDEX,
    )  # fmt: skip
    return _split(s, LANES), _split(t, LANES), _split(live[None, :], LANES)


@triton.jit
def _probabilities(s, t, scale, scale_t, top_s, inverse_s, top_t, inverse_t):
    r = tl.exp2(s * scale - top_s[:, None, None, None]) * inverse_s[:, None, None, None]
    p = tl.exp2(t * scale_t - top_t[:, None, None, None]) * inverse_t[:, None, None, None]
    return r, p


@triton.jit
def _save(stats, which: tl.constexpr, layer, value, live, mask):
    tl.store(stats + which * layer, tl.where(live, value, 0.0), mask=mask)


@triton.jit(
    do_not_specialize=[
        "scale", "scale_t", "heads", "blocks", "length",
        "a_batch", "a_token", "b_batch", "b_token",
        "ta_batch", "ta_token", "tb_batch", "tb_token",
    ]
)  # fmt: skip
def relation_forward(
    a, b, ta, tb, order, counts, rows, stats, scale, scale_t, heads, blocks, length,
    a_batch, a_token, a_column, b_batch, b_token, b_column,
    ta_batch, ta_token, ta_column, tb_batch, tb_token, tb_column,
    DIVERGENCE: tl.constexpr, ORDERED: tl.constexpr, STATS: tl.constexpr,
    D: tl.constexpr, TD: tl.constexpr, P: tl.constexpr, TP: tl.constexpr,
    V: tl.constexpr, TV: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    LANES: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr, TPRECISION: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """rows, and what the backward reads: see `relation`."""
    example, head, block = place(blocks, heads)
    count = count_of(counts, example, length, ORDERED)
    first = (block * ROWS).to(tl.int32)
    a = head_of(a, example, head, a_batch, a_column, D, V)
    b = head_of(b, example, head, b_batch, b_column, D, V)
    ta = head_of(ta, example, head, ta_batch, ta_column, TD, TV)
    tb = head_of(tb, example, head, tb_batch, tb_column, TD, TV)
    order += example * length
    rank = first + tl.arange(0, ROWS)
    live = rank < count
    at = positions(order, rank, rank < length, ORDERED)
    x = load_rows(a, at, live, a_token, a_column, D, P, V, INDEX)
    tx = load_rows(ta, at, live, ta_token, ta_column, TD, TP, TV, INDEX)
    keys = tl.where(first < count, count, 0)  # a block of padding has nothing to do
    whole = keys // KEYS * KEYS

    zero = tl.zeros((ROWS, LANES), tl.float32)
    d = zero
    if DIVERGENCE == "score_mse":
        for start in range(0, whole, KEYS):
            s, t, there = _products(
                a, x, ta, tx, at, live, b, tb, order, start, count,
                a_token, a_column, ta_token, ta_column, b_token, b_column, tb_token, tb_column,
                ORDERED, D, TD, P, TP, V, TV, KEYS, LANES, DEPTH, PRECISION, TPRECISION, INDEX,
            )  # fmt: skip
            c = s * scale - t * scale_t
            d += _sum(c * c)
        if whole < keys:
            s, t, there = _products(
                a, x, ta, tx, at, live, b, tb, order, whole, count,
                a_token, a_column, ta_token, ta_column, b_token, b_column, tb_token, tb_column,
                ORDERED, D, TD, P, TP, V, TV, KEYS, LANES, DEPTH, PRECISION, TPRECISION, INDEX,
            )  # fmt: skip
            c = tl.where(there, s * scale - t * scale_t, 0.0)
            d += _sum(c * c)
        value = tl.sum(d, 1)
    else:
        DIFFERENCE: tl.constexpr = DIVERGENCE != "probability_mse"
        m_p, l_p, m_q, l_q = zero - FAR, zero, zero - FAR, zero
        for start in range(0, whole, KEYS):
            s, t, there = _products(
                a, x, ta, tx, at, live, b, tb, order, start, count,
                a_token, a_column, ta_token, ta_column, b_token, b_column, tb_token, tb_column,
                ORDERED, D, TD, P, TP, V, TV, KEYS, LANES, DEPTH, PRECISION, TPRECISION, INDEX,
            )  # fmt: skip
            if DIVERGENCE == "reverse_kl":
                m_p, l_p, m_q, l_q, d = _divergence_step(
                    s, t, m_p, l_p, m_q, l_q, d, there, scale, scale_t, False, DIFFERENCE
                )
            else:
                m_p, l_p, m_q, l_q, d = _divergence_step(
                    t, s, m_p, l_p, m_q, l_q, d, there, scale_t, scale, False, DIFFERENCE
                )
        if whole < keys:
            s, t, there = _products(
                a, x, ta, tx, at, live, b, tb, order, whole, count,
                a_token, a_column, ta_token, ta_column, b_token, b_column, tb_token, tb_column,
                ORDERED, D, TD, P, TP, V, TV, KEYS, LANES, DEPTH, PRECISION, TPRECISION, INDEX,
            )  # fmt: skip
            if DIVERGENCE == "reverse_kl":
                m_p, l_p, m_q, l_q, d = _divergence_step(
                    s, t, m_p, l_p, m_q, l_q, d, there, scale, scale_t, True, DIFFERENCE
                )
            else:
                m_p, l_p, m_q, l_q, d = _divergence_step(
                    t, s, m_p, l_p, m_q, l_q, d, there, scale_t, scale, True, DIFFERENCE
                )
        # The classes of columns meet; one without keys has m = -FAR and so the weight 0.
        top_p, top_q = tl.max(m_p, 1), tl.max(m_q, 1)
        g_p, g_q = m_p - top_p[:, None], m_q - top_q[:, None]
        w_p = tl.exp2(g_p)
        sum_p = tl.where(live, tl.sum(l_p * w_p, 1), 1.0)
        sum_q = tl.where(live, tl.sum(l_q * tl.exp2(g_q), 1), 1.0)
        mean = tl.sum((d + l_p * (g_p - g_q)) * w_p, 1) / sum_p
        value = (mean - tl.log2(sum_p) + tl.log2(sum_q)) * LN2
        inverse_p, inverse_q = 1.0 / sum_p, 1.0 / sum_q

    if DIVERGENCE == "probability_mse":
        # The mean of c is taken over the sum of R as rounded: the backward subtracts it from c, and
        # where one key has nearly all of R little is left.
        d, slope, sum_r = zero, zero, zero
        for start in range(0, whole, KEYS):
            s, t, there = _products(
                a, x, ta, tx, at, live, b, tb, order, start, count,
                a_token, a_column, ta_token, ta_column, b_token, b_column, tb_token, tb_column,
                ORDERED, D, TD, P, TP, V, TV, KEYS, LANES, DEPTH, PRECISION, TPRECISION, INDEX,
            )  # fmt: skip
            r, p = _probabilities(s, t, scale, scale_t, top_q, inverse_q, top_p, inverse_p)
            c = r - p
            d += _sum(c * c)
            slope += _sum(r * c)
            sum_r += _sum(r)
        if whole < keys:
            s, t, there = _products(
                a, x, ta, tx, at, live, b, tb, order, whole, count,
                a_token, a_column, ta_token, ta_column, b_token, b_column, tb_token, tb_column,
                ORDERED, D, TD, P, TP, V, TV, KEYS, LANES, DEPTH, PRECISION, TPRECISION, INDEX,
            )  # fmt: skip
            r, p = _probabilities(s, t, scale, scale_t, top_q, inverse_q, top_p, inverse_p)
            r = tl.where(there, r, 0.0)
            c = r - tl.where(there, p, 0.0)
            d += _sum(c * c)
            slope += _sum(r * c)
            sum_r += _sum(r)
        value = tl.sum(d, 1)

    size = length.to(tl.int64)
    row = (example * heads + head) * size
    tl.store(rows + row + at, tl.where(live, value, 0.0), mask=rank < length)
    if STATS:
        layer = (tl.num_programs(0) // blocks) * size
        stats += row + rank
        if DIVERGENCE == "reverse_kl":
            _save(stats, 0, layer, top_p, live, rank < length)
            _save(stats, 1, layer, inverse_p, live, rank < length)
            _save(stats, 2, layer, top_q, live, rank < length)
            _save(stats, 3, layer, mean, live, rank < length)
        elif DIVERGENCE != "score_mse":
            _save(stats, 0, layer, top_q, live, rank < length)
            _save(stats, 1, layer, inverse_q, live, rank < length)
            _save(stats, 2, layer, top_p, live, rank < length)
            _save(stats, 3, layer, inverse_p, live, rank < length)
            if DIVERGENCE == "probability_mse":
                mean = 2.0 * tl.sum(slope, 1) / tl.where(live, tl.sum(sum_r, 1), 1.0)
                _save(stats, 4, layer, mean, live, rank < length)
