"""Rows whose competitors weigh too little or too much beside the target for the range of `tile`.

The first pass over the tiles takes the target's logit for `base` and leaves `S`, each row's sum of
`e^(z - base)`. Where it tells that numbers vanished or overflowed (`is_abnormal`), the row is computed
again relative to its own largest competitor:

    slow_kernel(MAXIMA)         the row's maximum in each tile, [ceil(V / BV), C]
    rows.maximum_kernel         base = the largest of them
    slow_kernel(EXPONENTIALS)   its sums and, where they are stored, its exponentials, between 0 and 1; and of the
                                statistics those that are relative to `base`

after which everything that follows from `base` and `S` holds for it as for any other row, its competitors
down to 2^-126 of the largest included. Nothing is read back to the host: the kernels are always launched, and
a program returns at once unless one of its BC tokens is abnormal. So that this costs little, a grid has only
SLICES programs for BC tokens, each of which goes through its share of the tiles.

One program a row would read the whole weight for it: 1 GB and some 20 ms on one multiprocessor at V = 128256,
D = 4096. BC tokens at a time take their tiles on tensor cores, so that even a chunk without a single normal
row costs three products in place of one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from orpo_kernels.kernels.tile import (
    bent,
    competes,
    exponentials,
    log2_above,
    product_tile,
    slope,
    store_tile,
    with_bias,
)
from orpo_kernels.kernels.tile_statistics import of_tile, store_moments

MAXIMA = tl.constexpr(3)


@triton.jit
def is_abnormal(S, V):
    """Whether a row's sum is outside the range that `tile` derives. NaN is not: it stays what it is."""
    return (S > 2.0**100) | (S < V * 2.0**-110)


@triton.jit(
    do_not_specialize=["C", "V"],
    do_not_specialize_on_alignment=["p_rows", "p_bias", "p_targets", "p_base"],
)
def slow_kernel(
    p_hidden,
    p_rows,
    p_weight,
    p_bias,
    p_targets,
    p_base,  # [C] fp32
    p_first_sum,  # [C] fp32: S of the first pass
    p_tile,  # [C, n_v BV], or None
    p_partial,  # [n_v, C] fp32: maxima or sums of abnormal rows
    p_planes,  # of `tile_statistics`, or None
    stride_hr,
    stride_hd,
    stride_wv,
    stride_wd,
    stride_t,
    C,
    V,
    D,
    logit_scale,
    softcap,
    EPILOGUE: tl.constexpr,
    WANTED: tl.constexpr,
    BC: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
    SLICES: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_c = tl.program_id(0)
    o_c = i_c * BC + tl.arange(0, BC)
    S = tl.load(p_first_sum + o_c, mask=o_c < C, other=1.0)
    m_slow = is_abnormal(S, V) & (o_c < C)
    if tl.max(m_slow.to(tl.int32), 0) == 0:
        return
    y = tl.load(p_targets + o_c, mask=m_slow, other=0).to(tl.int32)
    base = tl.load(p_base + o_c, mask=m_slow, other=float("inf"))
    for i_v in range(tl.program_id(1), tl.cdiv(V, BV), SLICES):
        o_v = i_v * BV + tl.arange(0, BV)
        x = product_tile(
            p_hidden, p_rows, p_weight, stride_hr, stride_hd, stride_wv, stride_wd, i_c, i_v, C, V, D,
            BC, BV, BD, EVEN_D, PRECISION, False,
        )  # fmt: skip
        p_out = p_partial + tl.cast(i_v, tl.int64) * C
        if EPILOGUE == MAXIMA:
            t = log2_above(bent(with_bias(x, p_bias, o_v, V), logit_scale, softcap), 0.0, logit_scale, softcap)
            t = tl.where(competes(y, o_v, V), t, -float("inf"))
            tl.store(p_out + o_c, tl.max(t, 1), mask=m_slow)
        else:
            e, r, t = exponentials(x, p_bias, y, base, i_v * BV, V, logit_scale, softcap, BV)
            tl.store(p_out + o_c, tl.sum(e, 1), mask=m_slow)
            if WANTED:
                found = of_tile(e, t, y, i_v * BV, V, BV, WANTED)
                store_moments(p_planes, found, i_v, tl.cdiv(V, BV), o_c, C, m_slow, WANTED)
            if p_tile is not None:
                if softcap is not None:
                    e = e * slope(r, logit_scale, softcap)
                store_tile(p_tile, stride_t, e, o_c, o_v, m_slow)
