"""What a tile leaves of its rows besides their sums of exponentials: the statistics of `kernels.statistics`.

With t = z log2 e and `base` as in `tile`, over the competitors in the tile:

    FIRST    sum e (t - base)                  to the entropy
    SECOND   sum (e 2^-40)^2                   to log sum p^2
    TOTAL    sum (t - base)                    to the mean logit
    LARGEST  the largest t - base, and of those before the target the next number above it

One plane [ceil(V / BV), C] each, in this order, of those that WANTED has; behind them, with LARGEST, a row [C] with the
target's own t - base as its tile has it. The target is the argmax if that is not below LARGEST: of equal logits the
first is, and a logit that is above one before it is not below the next number.

**Range.** Exponentials up to 2^100 (see `tile`), times 2^-40, have squares that fp32 holds. Those below 2^-23 vanish;
beside p(y)^2, or in the slow lane beside the largest competitor's, they are below 2^-46.
"""

from __future__ import annotations

import triton
import triton.language as tl

FIRST = tl.constexpr(1)
SECOND = tl.constexpr(2)
TOTAL = tl.constexpr(4)
LARGEST = tl.constexpr(8)

# Exponents from here down give 0, and 0 times this is 0, as it is not times -inf.
_LEAST = tl.constexpr(-1000.0)


@triton.jit
def plane_of(STATISTIC: tl.constexpr, WANTED: tl.constexpr):
    """How many planes come before that of a statistic."""
    below: tl.constexpr = (STATISTIC - 1) & WANTED
    return below % 2 + below // 2 % 2 + below // 4


@triton.jit
def next_above(x):
    """The next fp32 number above x; x where it is not finite."""
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(x == 0.0, 1, tl.where(x > 0.0, bits + 1, bits - 1))
    return tl.where(tl.abs(x) < float("inf"), bits.to(tl.float32, bitcast=True), x)


@triton.jit
def of_tile(e, t, y, first, V, W: tl.constexpr, WANTED: tl.constexpr):
    """(FIRST, SECOND, TOTAL, LARGEST, the target's own t) of W columns from `first` on: [BC] each.

    e: exponentials [BC, W], 0 where nothing competes. t: z log2 e - base, of the target and past the end too.
    """
    sum_1 = tl.zeros_like(y).to(tl.float32)
    sum_2 = sum_1
    total = sum_1
    largest = sum_1 - float("inf")
    own = largest
    if FIRST & WANTED:
        sum_1 = tl.sum(e * tl.maximum(t, _LEAST), 1)
    if SECOND & WANTED:
        small = e * 2.0**-40
        sum_2 = tl.sum(small * small, 1)
    if (TOTAL | LARGEST) & WANTED:
        o_v = first + tl.arange(0, W)
        within = (y >= first) & (y < first + W)
        # One branch that all threads of a program take together.
        if (tl.max(within.to(tl.int32), 0) > 0) | (first + W > V):
            m_own = o_v[None, :] == y[:, None]
            m = (o_v < V)[None, :] & (o_v[None, :] != y[:, None])
            if LARGEST & WANTED:
                own = tl.max(tl.where(m_own, t, -float("inf")), 1)
                before = tl.max(tl.where(m & (o_v[None, :] < y[:, None]), t, -float("inf")), 1)
                behind = tl.max(tl.where(m & (o_v[None, :] > y[:, None]), t, -float("inf")), 1)
                largest = tl.maximum(next_above(before), behind)
            if TOTAL & WANTED:
                total = tl.sum(tl.where(m, t, 0.0), 1)
        else:
            if LARGEST & WANTED:
                largest = tl.max(t, 1)
                largest = tl.where(y >= first + W, next_above(largest), largest)
            if TOTAL & WANTED:
                total = tl.sum(t, 1)
    return sum_1, sum_2, total, largest, own


@triton.jit
def joined(a, b):
    """What `of_tile` gives of two halves together."""
    return a[0] + b[0], a[1] + b[1], a[2] + b[2], tl.maximum(a[3], b[3]), tl.maximum(a[4], b[4])


@triton.jit
def store_moments(p_planes, found, i_v, n_v, o_c, C, m_c, WANTED: tl.constexpr):
    """FIRST and SECOND: those that the slow lane replaces."""
    p_out = p_planes + tl.cast(i_v, tl.int64) * C + o_c
    plane = tl.cast(n_v, tl.int64) * C
    if FIRST & WANTED:
        tl.store(p_out + plane * plane_of(FIRST, WANTED), found[0], mask=m_c)
    if SECOND & WANTED:
        tl.store(p_out + plane * plane_of(SECOND, WANTED), found[1], mask=m_c)


@triton.jit
def store(p_planes, found, y, i_v, n_v, BV: tl.constexpr, o_c, C, m_c, WANTED: tl.constexpr):
    store_moments(p_planes, found, i_v, n_v, o_c, C, m_c, WANTED)
    p_out = p_planes + tl.cast(i_v, tl.int64) * C + o_c
    plane = tl.cast(n_v, tl.int64) * C
    if TOTAL & WANTED:
        tl.store(p_out + plane * plane_of(TOTAL, WANTED), found[2], mask=m_c)
    if LARGEST & WANTED:
        tl.store(p_out + plane * plane_of(LARGEST, WANTED), found[3], mask=m_c)
        within = (y >= i_v * BV) & (y < (i_v + 1) * BV)
        tl.store(p_planes + plane * (plane_of(LARGEST, WANTED) + 1) + o_c, found[4], mask=m_c & within)
