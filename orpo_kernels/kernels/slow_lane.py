"""Rows whose competitors weigh too little or too much beside the target for the range of `tile`.

The first pass over the tiles takes the target's logit for `base` and leaves `S`, each row's sum of
`e^(z - base) 2^-60`. Where it tells that numbers vanished or overflowed (`is_abnormal`), the row is computed
again relative to its own largest competitor:

    slow_kernel(MAXIMA)         the row's maximum in each tile, [ceil(V / BV), C]
    rows.maximum_kernel         base = the largest of them
    slow_kernel(EXPONENTIALS)   its sums and, where they are stored, its exponentials, between 0 and 2^-60

after which everything that follows from `base` and `S` holds for it as for any other row, its competitors
down to 2^-66 of the largest included. Nothing is read back to the host: the kernels are always launched, and
a program returns at once unless one of its BC tokens is abnormal. So that this costs little, a grid has only
SLICES programs for BC tokens, each of which goes through its share of the tiles.

One program a row would read the whole weight for it: 1 GB and some 20 ms on one multiprocessor at V = 128256,
D = 4096. BC tokens at a time take their tiles on tensor cores, so that even a chunk without a single normal
row costs three products in place of one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from orpo_kernels.kernels.tile import bent_tile, competes, logit, store_exponentials

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
        r = bent_tile(
            p_hidden, p_rows, p_weight, p_bias, stride_hr, stride_hd, stride_wv, stride_wd, i_c, i_v, C, V, D,
            logit_scale, softcap, BC, BV, BD, EVEN_D, PRECISION, False, False,
        )  # fmt: skip
        p_out = p_partial + tl.cast(i_v, tl.int64) * C
        if EPILOGUE == MAXIMA:
            z = tl.where(competes(y, o_v, V), logit(r, softcap), -float("inf"))
            tl.store(p_out + o_c, tl.max(z, 1), mask=m_slow)
        else:
            store_exponentials(p_tile, p_out, stride_t, r, base, y, o_c, o_v, m_slow, V, logit_scale, softcap)
