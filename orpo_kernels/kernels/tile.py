"""One tile of logits, and what each pass does with it before it leaves the chip.

A program makes one tile `z = f(W h + b)` of [BC, BV] logits, `f(x) = logit_scale * x` or, with a soft-cap,
`cap * tanh(logit_scale * x / cap)`, and ends in an *epilogue*. Every epilogue sees competitors only: the
target's own column is masked like the columns past the end of the vocabulary. With `z_y` the target's logit,
which a row dot made before, and `base = z_y`:

    SUMS          sum over the tile's columns of  e^(z - base) 2^-60
    EXPONENTIALS  the same, and the tile  e^(z - base) 2^-60 * f'  itself, rounded once
    GRADIENT      c s (onehot(y) - q) f'  with  q = e^(z - L), rounded once; for the bias, its column sums

Row sums go to one slot a tile, [ceil(V / BV), C], and another kernel adds them up in order: no atomics, so
the same inputs give the same bits. From `S`, their sum, `L = base + log(S 2^60)` and `gap = log(S 2^60)`:
the target's own term never enters the sum, so a sure token's gap is as exact as its competitors.

**Range.** The factor 2^-60 moves the numbers that fp32 and bf16 hold to where tokens are: competitors that
together weigh 2^-33 (1e-10, at V = 2^17) to 2^160 (e^111) times the target. Within `V 2^-110 <= S <= 2^100`
nothing is lost: V numbers smaller than 2^-126, which may vanish, are together below 2^-16 of S, and a weight
may multiply the stored values by 2^-16 or 2^27. Rows outside are left to `slow_lane`.
The power is written `(e2 2^-60) e2` with `e2 = e^((z - base) / 2)`: 60 subtracted in the exponent would round
up to 4e-6 off every value near the target.

**Slope.** Without a soft-cap f' is logit_scale everywhere and is left out of EXPONENTIALS (whoever divides by
S multiplies by it). With one, f' varies, and multiplies the stored value but never the sum.

Programs run through GROUP blocks of tokens for one block of the vocabulary, then on to the next: what a wave
of programs reads (a few blocks of the weight, GROUP of the hidden rows) stays in the L2 cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

SUMS = tl.constexpr(0)
EXPONENTIALS = tl.constexpr(1)
GRADIENT = tl.constexpr(2)

SHIFT = tl.constexpr(2.0**-60)
LOG_SHIFT = tl.constexpr(-41.58883083359672)
LOG2_E = tl.constexpr(1.4426950408889634)
# Kernels are interpreted or compiled as of the moment their module is imported.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """fp32 to `dtype`, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        # The interpreter's own conversion cuts the low bits off.
        bits = x.to(tl.int32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def bent(x, logit_scale, softcap):
    """What z and f' both follow from, one number a logit: there are registers for no more.

    x: `W h + b`. Without a soft-cap it is z itself; with one, `r = 1 / (1 + e^(2 logit_scale x / cap))`.
    """
    a = x * logit_scale
    if softcap is not None:
        return 1.0 / (1.0 + tl.exp2(a * (2.0 * LOG2_E / softcap)))
    else:
        return a


@triton.jit
def logit(r, softcap):
    """z, within 4e-7 of cap where there is one: `tanh(a) = 1 - 2 / (1 + e^(2a))`."""
    if softcap is not None:
        return softcap - (2.0 * softcap) * r
    else:
        return r


@triton.jit
def slope(r, logit_scale, softcap):
    """f'; exact to the last places where z nears the cap, as `1 - tanh^2` is not."""
    if softcap is not None:
        return (4.0 * logit_scale) * (r * (1.0 - r))
    else:
        return logit_scale


@triton.jit
def hidden_rows(p_rows, o_c, C):
    """The int64 rows of `hidden` that the tokens `o_c` come from; past the end, the last token's."""
    o_c = tl.minimum(o_c, C - 1)
    if p_rows is not None:
        return tl.load(p_rows + o_c)
    return o_c.to(tl.int64)


@triton.jit
def bent_tile(
    p_hidden,
    p_rows,
    p_weight,
    p_bias,
    stride_hr,
    stride_hd,
    stride_wv,
    stride_wd,
    i_c,
    i_v,
    C,
    V,
    D,
    logit_scale,
    softcap,
    BC: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIBED_H: tl.constexpr,
    DESCRIBED_W: tl.constexpr,
):
    """`bent` logits [BC, BV] of the i_c-th block of tokens and the i_v-th of the vocabulary.

    DESCRIBED_H, DESCRIBED_W: whether `p_hidden` and `p_weight` are descriptors, of [BC, BD] and [BV, BD] blocks. What
    is past the end is zero in those; otherwise it repeats the last token or entry.
    """
    o_c = i_c * BC + tl.arange(0, BC)
    columns = tl.minimum(i_v * BV + tl.arange(0, BV), V - 1)
    o_d = tl.arange(0, BD).to(tl.int64)
    if not DESCRIBED_H:
        rows = hidden_rows(p_rows, o_c, C)
        p_h = p_hidden + rows[:, None] * stride_hr + o_d[None, :] * stride_hd  # [BC, BD]
    if not DESCRIBED_W:
        p_w = p_weight + columns.to(tl.int64)[None, :] * stride_wv + o_d[:, None] * stride_wd  # [BD, BV]
    x = tl.zeros((BC, BV), dtype=tl.float32)
    for d in range(0, D, BD):
        m_d = d + tl.arange(0, BD) < D
        if DESCRIBED_H:
            h = p_hidden.load([i_c * BC, d])
        elif EVEN_D:
            h = tl.load(p_h)
        else:
            h = tl.load(p_h, mask=m_d[None, :], other=0.0)
        if DESCRIBED_W:
            w = tl.trans(p_weight.load([i_v * BV, d]))
        elif EVEN_D:
            w = tl.load(p_w)
        else:
            w = tl.load(p_w, mask=m_d[:, None], other=0.0)
        if INTERPRETED:
            # Its dot takes bf16 for integers.
            h = h.to(tl.float32)
            w = w.to(tl.float32)
        x = tl.dot(h, w, x, input_precision=PRECISION)
        if not DESCRIBED_H:
            p_h += tl.cast(BD, tl.int64) * stride_hd
        if not DESCRIBED_W:
            p_w += tl.cast(BD, tl.int64) * stride_wd
    if p_bias is not None:
        x += tl.load(p_bias + columns).to(tl.float32)[None, :]
    return bent(x, logit_scale, softcap)


@triton.jit
def shifted_exponentials(z, base):
    """`e^(z - base) 2^-60`."""
    e2 = tl.exp2((z - base) * (0.5 * LOG2_E))
    return (e2 * SHIFT) * e2


@triton.jit
def store_tile(p_tile, stride_t, tile, o_c, o_v, m_c):
    """Rounds and stores a tile: whole rows, so that stores stay wide (the buffer's rows hold whole tiles)."""
    p_t = p_tile + o_c.to(tl.int64)[:, None] * stride_t + o_v[None, :]
    tl.store(p_t, rounded(tile, p_tile.dtype.element_ty), mask=m_c[:, None])


@triton.jit
def competes(y, o_v, V):
    """[BC, BV]: not the target `y`, nor past the end of the vocabulary."""
    return (o_v[None, :] != y[:, None]) & (o_v < V)[None, :]


@triton.jit
def store_exponentials(p_tile, p_sums, stride_t, r, base, y, o_c, o_v, m_c, V, logit_scale, softcap):
    """Row sums of the tile's exponentials, and the tile where `p_tile` is not None, for the rows in `m_c`."""
    e = shifted_exponentials(logit(r, softcap), base[:, None])
    e = tl.where(competes(y, o_v, V), e, 0.0)
    tl.store(p_sums + o_c, tl.sum(e, 1), mask=m_c)
    if p_tile is not None:
        if softcap is not None:
            e = e * slope(r, logit_scale, softcap)
        store_tile(p_tile, stride_t, e, o_c, o_v, m_c)


@triton.jit
def tile_of(program, n_c, n_v, GROUP: tl.constexpr):
    """Which block of tokens and of the vocabulary a program takes: GROUP blocks of tokens at a time."""
    group = program // (GROUP * n_v)
    size = tl.minimum(n_c - group * GROUP, GROUP)
    within = program - group * (GROUP * n_v)
    return group * GROUP + within % size, within // size


# Slices of the tokens' own numbers start anywhere: one compiled kernel serves them all.
@triton.jit(
    do_not_specialize=["v_start", "C", "V"],
    do_not_specialize_on_alignment=["p_rows", "p_bias", "p_targets", "p_reference", "p_coefficient"],
)
def tile_kernel(
    p_hidden,  # rows of any strides, or a descriptor
    p_rows,  # [C] int64, or None
    p_weight,  # [V, D], or a descriptor
    p_bias,  # [V], or None
    p_targets,  # [C] int64
    p_reference,  # [C] fp32: `base`; for GRADIENT, L
    p_coefficient,  # [C] fp32, `c s`: GRADIENT only
    p_tile,  # [C, n_v BV]: EXPONENTIALS and GRADIENT
    p_sums,  # fp32: of rows [n_v, C]; for GRADIENT of columns [n_c, n_v BV], or None
    stride_hr,
    stride_hd,
    stride_wv,
    stride_wd,
    stride_t,
    v_start,  # the vocabulary entry that is row 0 of `p_weight`
    C,
    V,
    D,
    logit_scale,
    softcap,
    EPILOGUE: tl.constexpr,
    BC: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIBED_H: tl.constexpr,
    DESCRIBED_W: tl.constexpr,
):
    n_c, n_v = tl.cdiv(C, BC), tl.cdiv(V, BV)
    i_c, i_v = tile_of(tl.program_id(0), n_c, n_v, GROUP)
    o_c = i_c * BC + tl.arange(0, BC)
    o_v = i_v * BV + tl.arange(0, BV)
    m_c = o_c < C
    r = bent_tile(
        p_hidden, p_rows, p_weight, p_bias, stride_hr, stride_hd, stride_wv, stride_wd, i_c, i_v, C, V, D,
        logit_scale, softcap, BC, BV, BD, EVEN_D, PRECISION, DESCRIBED_H, DESCRIBED_W,
    )  # fmt: skip
    y = (tl.load(p_targets + o_c, mask=m_c, other=0) - v_start).to(tl.int32)
    # Rows past the end repeat the last token: a reference of inf makes all they add zero.
    reference = tl.load(p_reference + o_c, mask=m_c, other=float("inf"))

    if EPILOGUE == GRADIENT:
        c = tl.load(p_coefficient + o_c, mask=m_c, other=0.0)
        # L is -inf where there is no competitor; z is too, or it is the target.
        q = tl.exp(logit(r, softcap) - tl.where(reference == -float("inf"), 0.0, reference)[:, None])
        g = c[:, None] * (slope(r, logit_scale, softcap) * tl.where(o_v[None, :] == y[:, None], 1.0, -q))
        store_tile(p_tile, stride_t, g, o_c, o_v, m_c)
        if p_sums is not None:
            p_sums += i_c.to(tl.int64) * (n_v * BV)
            tl.store(p_sums + o_v, tl.sum(g, 0))
    else:
        p_sums += i_v.to(tl.int64) * C
        store_exponentials(p_tile, p_sums, stride_t, r, reference, y, o_c, o_v, m_c, V, logit_scale, softcap)
