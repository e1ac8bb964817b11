"""The kernels that work on a row at a time, before and after the tiles.

    target_kernel    t_y = z_y log2 e with z_y = f(h . W[y] + b[y]), in fp32, its slope, and the first `base`
    sum_kernel       S, and from it  log_odds = (t_y - base - log2 S) log 2  and  L = z_y - log_odds
    maximum_kernel   `base` of the rows that the slow lane takes
    u_kernel         u = f'_y W[y] - (E W) / S, rounded once
    scale_kernel     rows of kept exponentials whose base has been raised

`t_y` and `base` are in units of log 2, as `tile` needs them. `base` is t_y rounded to fp32 for every row but those of
the slow lane, and what that rounding left, `low`, is kept beside it: `base - t_y` is -low.
"""

from __future__ import annotations

import triton
import triton.language as tl

from orpo_kernels.kernels.slow_lane import is_abnormal
from orpo_kernels.kernels.tile import LOG2_E, bent, finite, hidden_rows, log2_above, rounded, slope

LOG_2 = tl.constexpr(0.6931471805599453)


@triton.jit(
    do_not_specialize=["C"],
    do_not_specialize_on_alignment=["p_rows", "p_bias", "p_targets", "p_t_y", "p_low", "p_slope_y", "p_base"],
)
def target_kernel(
    p_hidden,
    p_rows,
    p_weight,
    p_bias,
    p_targets,
    p_t_y,  # [C] fp32
    p_low,  # [C] fp32
    p_slope_y,  # [C] fp32
    p_base,  # [C] fp32
    stride_hr,
    stride_hd,
    stride_wv,
    stride_wd,
    C,
    D,
    logit_scale,
    softcap,
    BC: tl.constexpr,
    BD: tl.constexpr,
):
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    m_c = o_c < C
    y = tl.maximum(tl.load(p_targets + o_c, mask=m_c, other=0), 0)  # -1: of another slice; what comes of it is not used
    p_h = p_hidden + hidden_rows(p_rows, o_c, C)[:, None] * stride_hr  # [BC, 1]
    p_w = p_weight + y[:, None] * stride_wv  # [BC, 1]
    total = tl.zeros((BC, BD), dtype=tl.float32)
    for d in range(0, D, BD):
        o_d = d + tl.arange(0, BD)
        m_d = m_c[:, None] & (o_d < D)[None, :]
        o_d = o_d.to(tl.int64)[None, :]
        h = tl.load(p_h + o_d * stride_hd, mask=m_d, other=0.0).to(tl.float32)
        h = rounded(h, p_weight.dtype.element_ty).to(tl.float32)  # as it enters the products
        w = tl.load(p_w + o_d * stride_wd, mask=m_d, other=0.0).to(tl.float32)
        total += h * w
    x = tl.sum(total, 1)
    if p_bias is not None:
        x += tl.load(p_bias + y, mask=m_c, other=0.0).to(tl.float32)
    r = bent(x, logit_scale, softcap)
    t_y = log2_above(r, 0.0, logit_scale, softcap)
    low = tl.zeros_like(t_y)
    if softcap is None:
        # The product that `tile` subtracts `base` from in one multiply-add, exactly.
        factor = tl.full((BC,), logit_scale * LOG2_E, tl.float32)
        product = x.to(tl.float64) * factor.to(tl.float64)
        low = tl.where(tl.abs(t_y) < float("inf"), product - t_y.to(tl.float64), 0.0).to(tl.float32)
    tl.store(p_t_y + o_c, t_y, mask=m_c)
    tl.store(p_low + o_c, low, mask=m_c)
    tl.store(p_slope_y + o_c, tl.zeros_like(t_y) + slope(r, logit_scale, softcap), mask=m_c)
    tl.store(p_base + o_c, finite(t_y), mask=m_c)


@triton.jit(
    do_not_specialize=["C", "V", "n_v"],
    do_not_specialize_on_alignment=["p_base", "p_t_y", "p_low", "p_log_odds", "p_lse"],
)
def sum_kernel(
    p_partial,  # [n_v, C] fp32
    p_base,
    p_t_y,
    p_low,
    p_sum,
    p_log_odds,
    p_lse,
    C,
    V,
    n_v,
    AGAIN: tl.constexpr,  # only rows that the slow lane has replaced
    BC: tl.constexpr,
    BV: tl.constexpr,
):
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    m_c = o_c < C
    if AGAIN:
        m_c = m_c & is_abnormal(tl.load(p_sum + o_c, mask=m_c, other=1.0), V)
        if tl.max(m_c.to(tl.int32), 0) == 0:
            return
    S = tl.zeros((BC,), dtype=tl.float32)
    for v in range(0, n_v, BV):
        o_v = v + tl.arange(0, BV)
        p_s = p_partial + o_v.to(tl.int64)[:, None] * C + o_c[None, :]  # [BV, BC]
        S += tl.sum(tl.load(p_s, mask=(o_v < n_v)[:, None] & m_c[None, :], other=0.0), 0)
    base = tl.load(p_base + o_c, mask=m_c, other=0.0)
    t_y = tl.load(p_t_y + o_c, mask=m_c, other=0.0)
    low = tl.load(p_low + o_c, mask=m_c, other=0.0)
    tl.store(p_sum + o_c, S, mask=m_c)
    # A target's logit of +inf is an overflow, not certainty.
    log_odds = tl.where(t_y == float("inf"), float("nan"), (t_y - base) * LOG_2 - (tl.log(S) - low * LOG_2))
    tl.store(p_log_odds + o_c, log_odds, mask=m_c)
    # From `base`, as t_y may be -inf.
    tl.store(p_lse + o_c, base * LOG_2 + tl.log(S), mask=m_c)


@triton.jit(do_not_specialize=["C", "V", "n_v"], do_not_specialize_on_alignment=["p_base"])
def maximum_kernel(
    p_partial,  # [n_v, C] fp32
    p_first_sum,
    p_base,
    C,
    V,
    n_v,
    BC: tl.constexpr,
    BV: tl.constexpr,
):
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    m_c = o_c < C
    m_slow = is_abnormal(tl.load(p_first_sum + o_c, mask=m_c, other=1.0), V) & m_c
    if tl.max(m_slow.to(tl.int32), 0) == 0:
        return
    largest = tl.full((BC,), -float("inf"), dtype=tl.float32)
    for v in range(0, n_v, BV):
        o_v = v + tl.arange(0, BV)
        p_m = p_partial + o_v.to(tl.int64)[:, None] * C + o_c[None, :]  # [BV, BC]
        m = (o_v < n_v)[:, None] & m_slow[None, :]
        largest = tl.maximum(largest, tl.max(tl.load(p_m, mask=m, other=-float("inf")), 0))
    tl.store(p_base + o_c, finite(largest), mask=m_slow)


@triton.jit(do_not_specialize=["C"], do_not_specialize_on_alignment=["p_targets", "p_slope_y"])
def u_kernel(
    p_product,  # [C, D] fp32: E W
    p_weight,
    p_targets,
    p_slope_y,
    p_sum,
    p_u,  # [C, D]; may be p_product
    stride_wv,
    stride_wd,
    C,
    D,
    factor,  # the part of f' that exponentials do not have
    BC: tl.constexpr,
    BD: tl.constexpr,
):
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_c = o_c < C
    m = m_c[:, None] & (o_d < D)[None, :]
    y = tl.maximum(tl.load(p_targets + o_c, mask=m_c, other=0), 0)  # -1: of another slice, with a slope of 0
    slope_y = tl.load(p_slope_y + o_c, mask=m_c, other=0.0)
    S = tl.load(p_sum + o_c, mask=m_c, other=1.0)
    p_w = p_weight + y[:, None] * stride_wv + o_d.to(tl.int64)[None, :] * stride_wd
    w = tl.load(p_w, mask=m, other=0.0).to(tl.float32)
    o = o_c.to(tl.int64)[:, None] * D + o_d[None, :]
    # Without competitors there is nothing to divide.
    product = tl.load(p_product + o, mask=m, other=0.0) * tl.where(S == 0.0, 0.0, factor / S)[:, None]
    tl.store(p_u + o, rounded(slope_y[:, None] * w - product, p_u.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["C", "V"], do_not_specialize_on_alignment=["p_factor"])
def scale_kernel(
    p_tile,  # [C, V]
    p_factor,  # [C] fp32
    stride_t,
    C,
    V,
    BC: tl.constexpr,
    BV: tl.constexpr,
):
    """Multiplies the rows whose factor is not 1; a program whose BC rows need nothing returns at once."""
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    factor = tl.load(p_factor + o_c, mask=o_c < C, other=1.0)
    m_c = (o_c < C) & (factor != 1.0)
    if tl.max(m_c.to(tl.int32), 0) == 0:
        return
    for v in range(tl.program_id(1) * BV, V, BV * tl.num_programs(1)):
        o_v = v + tl.arange(0, BV)
        m = m_c[:, None] & (o_v < V)[None, :]
        p_t = p_tile + o_c.to(tl.int64)[:, None] * stride_t + o_v[None, :]
        tile = tl.load(p_t, mask=m, other=0.0).to(tl.float32) * factor[:, None]
        tl.store(p_t, rounded(tile, p_tile.dtype.element_ty), mask=m)
