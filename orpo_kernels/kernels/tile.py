"""One tile of logits, and what each pass does with it before it leaves the chip.

A program makes tiles `x = W h + b` of [BC, BV], from which `z = f(x)` follows, `f(x) = logit_scale * x` or, with a
soft-cap, `cap * tanh(logit_scale * x / cap)`. What is stored of it is the *epilogue*. With `z_y` the target's logit,
which a row dot made before, and `base = z_y`, both in units of log 2 (`t = z log2 e`):

    SUMS          sum over the tile's columns, the target's left out, of  2^(t - base)
    EXPONENTIALS  the same, and the tile  2^(t - base) * f'  itself, rounded once, 0 at the target
    GRADIENT      c s (onehot(y) - q) f'  with  q = 2^(t - L log2 e), rounded once; for the bias, its column sums

Row sums go to one slot a tile, [ceil(V / BV), C], and another kernel adds them up in order: no atomics, so
the same inputs give the same bits. From `S`, their sum, `log_odds = -log S` and `L = z_y + log S`: the target's own
term never enters the sum, so a sure token's log-odds are as exact as its competitors.

**Few instructions a logit.** A multiply-add makes `x logit_scale log2 e - base`, the exponential unit takes its power
of two, and for the gradient one more multiplication brings the coefficient. Only tiles that hold a target of theirs, or
reach past the vocabulary, compare columns: one branch that all threads of a program take together.
What the multiply-add's `base` loses to rounding, up to 2e-6, `rows` puts back into the sum's logarithm.

**Range.** fp32 and bf16 hold 2^-126 to 2^127. Within `V 2^-110 <= S <= 2^100` nothing is lost: V numbers smaller
than 2^-126, which may vanish, are together below 2^-16 of S, and a weight may multiply the stored values by 2^-16
or 2^27. At V = 2^17 those are log-odds from 64 (1 - p = 1e-28) to -69. Rows outside are left to `slow_lane`.

**Slope.** Without a soft-cap f' is logit_scale everywhere and is left out of EXPONENTIALS (whoever divides by
S multiplies by it). With one, f' varies, and multiplies the stored value but never the sum.

**Order.** Tiles go through GROUP blocks of tokens for one block of the vocabulary, then on to the next: what is
read at a time (a few blocks of the weight, GROUP of the hidden rows) stays in the L2 cache. A *persistent* kernel has
one program a multiprocessor, which goes from tile to tile (PROGRAMS of them), so that the next tile's operands are
on their way during this one's epilogue. Its loads and stores are the tensor memory unit's (descriptors), the stores
in quarters of a tile: what waits in shared memory to be stored takes the room of operands, and halves spill registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from orpo_kernels import interpreter
from orpo_kernels.kernels import tile_statistics as statistics

SUMS = tl.constexpr(0)
EXPONENTIALS = tl.constexpr(1)
GRADIENT = tl.constexpr(2)

LOG2_E = tl.constexpr(1.4426950408889634)
# Kernels are interpreted or compiled as of the moment their module is imported.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
if INTERPRETED.value:
    interpreter.mend()


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

    x: `W h + b`, and without a soft-cap returned as it is; with one, `r = 1 / (1 + e^(2 logit_scale x / cap))`.
    """
    if softcap is not None:
        return 1.0 / (1.0 + tl.exp2(x * (2.0 * LOG2_E * logit_scale / softcap)))
    else:
        return x


@triton.jit
def log2_above(r, base, logit_scale, softcap):
    """`z log2 e - base`, within 4e-7 of the cap where there is one: `tanh(a) = 1 - 2 / (1 + e^(2a))`."""
    if softcap is not None:
        cap = softcap * LOG2_E
        return (cap - (2.0 * cap) * r) - base
    else:
        return r * (logit_scale * LOG2_E) - base


@triton.jit
def slope(r, logit_scale, softcap):
    """f'; exact to the last places where z nears the cap, as `1 - tanh^2` is not."""
    if softcap is not None:
        return (4.0 * logit_scale) * (r * (1.0 - r))
    else:
        return logit_scale


@triton.jit
def finite(x):
    """0 in place of -inf: what to subtract where nothing competes, as -inf - -inf is NaN."""
    return tl.where(x == -float("inf"), 0.0, x)


@triton.jit
def hidden_rows(p_rows, o_c, C):
    """The int64 rows of `hidden` that the tokens `o_c` come from; past the end, the last token's."""
    o_c = tl.minimum(o_c, C - 1)
    if p_rows is not None:
        return tl.load(p_rows + o_c)
    return o_c.to(tl.int64)


@triton.jit
def product_tile(
    p_hidden,
    p_rows,
    p_weight,
    stride_hr,
    stride_hd,
    stride_wv,
    stride_wd,
    i_c,
    i_v,
    C,
    V,
    D,
    BC: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    """`W h` [BC, BV] of the i_c-th block of tokens and the i_v-th of the vocabulary.

    DESCRIBED: `p_hidden` and `p_weight` are descriptors, of [BC, BD] and [BV, BD] blocks. What is past the end is
    zero in those; otherwise it repeats the last token or entry.
    """
    if not DESCRIBED:
        rows = hidden_rows(p_rows, i_c * BC + tl.arange(0, BC), C)
        columns = tl.minimum(i_v * BV + tl.arange(0, BV), V - 1)
        o_d = tl.arange(0, BD).to(tl.int64)
        p_h = p_hidden + rows[:, None] * stride_hr + o_d[None, :] * stride_hd  # [BC, BD]
        p_w = p_weight + columns.to(tl.int64)[None, :] * stride_wv + o_d[:, None] * stride_wd  # [BD, BV]
    x = tl.zeros((BC, BV), dtype=tl.float32)
    for d in range(0, D, BD):
        if DESCRIBED:
            h = p_hidden.load([i_c * BC, d])
            w = tl.trans(p_weight.load([i_v * BV, d]))
        elif EVEN_D:
            h = tl.load(p_h)
            w = tl.load(p_w)
        else:
            m_d = d + tl.arange(0, BD) < D
            h = tl.load(p_h, mask=m_d[None, :], other=0.0)
            w = tl.load(p_w, mask=m_d[:, None], other=0.0)
        if INTERPRETED:
            # Its dot takes bf16 for integers.
            h = h.to(tl.float32)
            w = w.to(tl.float32)
        x = tl.dot(h, w, x, input_precision=PRECISION)
        if not DESCRIBED:
            p_h += tl.cast(BD, tl.int64) * stride_hd
            p_w += tl.cast(BD, tl.int64) * stride_wd
    return x


@triton.jit
def with_bias(x, p_bias, o_v, V):
    if p_bias is not None:
        x += tl.load(p_bias + tl.minimum(o_v, V - 1)).to(tl.float32)[None, :]
    return x


@triton.jit
def competes(y, o_v, V):
    """[BC, W]: not the target `y`, nor past the end of the vocabulary."""
    return (o_v[None, :] != y[:, None]) & (o_v < V)[None, :]


@triton.jit
def has_target(y, first, W: tl.constexpr):
    """Whether any of the targets [BC] is one of the W entries from `first` on."""
    return tl.max(((y >= first) & (y < first + W)).to(tl.int32), 0) > 0


@triton.jit
def exponentials(x, p_bias, y, base, first, V, logit_scale, softcap, W: tl.constexpr):
    """Exponentials of competitors [BC, W], 0 elsewhere, the `bent` numbers that their slopes follow from, and the
    exponents, which are not masked.

    x: `W h` for W entries of the vocabulary from `first` on. base: [BC].
    """
    o_v = first + tl.arange(0, W)
    r = bent(with_bias(x, p_bias, o_v, V), logit_scale, softcap)
    t = log2_above(r, base[:, None], logit_scale, softcap)
    masked = t
    if has_target(y, first, W) | (first + W > V):
        masked = tl.where(competes(y, o_v, V), t, -float("inf"))
    return tl.exp2(masked), r, t


@triton.jit
def gradient(x, p_bias, y, lse, c_s, first, V, logit_scale, softcap, W: tl.constexpr):
    """`c s (onehot(y) - q) f'` [BC, W] from `x` as in `exponentials`. lse: [BC], in units of log 2."""
    o_v = first + tl.arange(0, W)
    r = bent(with_bias(x, p_bias, o_v, V), logit_scale, softcap)
    q = tl.exp2(log2_above(r, lse[:, None], logit_scale, softcap))
    if softcap is not None:
        f = slope(r, logit_scale, softcap)
        g = (-c_s)[:, None] * (q * f)
        if has_target(y, first, W):
            g = tl.where(o_v[None, :] == y[:, None], c_s[:, None] * f, g)
    else:
        g = q * (c_s * -logit_scale)[:, None]
        if has_target(y, first, W):
            g = tl.where(o_v[None, :] == y[:, None], (c_s * logit_scale)[:, None], g)
    return g


@triton.jit
def store_tile(p_tile, stride_t, tile, o_c, o_v, m_c):
    """Rounds and stores a tile: whole rows, so that stores stay wide (the buffer's rows hold whole tiles)."""
    p_t = p_tile + o_c.to(tl.int64)[:, None] * stride_t + o_v[None, :]
    tl.store(p_t, rounded(tile, p_tile.dtype.element_ty), mask=m_c[:, None])


@triton.jit
def tile_of(program, n_c, n_v, GROUP: tl.constexpr):
    """Which block of tokens and of the vocabulary is the program's: GROUP blocks of tokens at a time."""
    group = program // (GROUP * n_v)
    size = tl.minimum(n_c - group * GROUP, GROUP)
    within = program - group * (GROUP * n_v)
    return group * GROUP + within % size, within // size


@triton.jit
def finish(
    x,
    p_bias,
    p_tile,
    p_sums,
    stride_t,
    y,
    base,
    c_s,
    i_c,
    first,
    C,
    V,
    n_v,
    logit_scale,
    softcap,
    EPILOGUE: tl.constexpr,
    WANTED: tl.constexpr,
    BC: tl.constexpr,
    BV: tl.constexpr,
    W: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    """The epilogue of W columns of a tile; returns their row sums (GRADIENT: zeros, it stores the columns' itself) and
    the statistics WANTED."""
    o_c = i_c * BC + tl.arange(0, BC)
    if EPILOGUE == GRADIENT:
        tile = gradient(x, p_bias, y, base, c_s, first, V, logit_scale, softcap, W)
        sums = tl.zeros((BC,), dtype=tl.float32)
        if p_sums is not None:
            p_columns = p_sums + i_c.to(tl.int64) * (n_v * BV) + first
            tl.store(p_columns + tl.arange(0, W), tl.sum(tile, 0))
        found = statistics.of_tile(tile, tile, y, first, V, W, 0)
    else:
        tile, r, t = exponentials(x, p_bias, y, base, first, V, logit_scale, softcap, W)
        sums = tl.sum(tile, 1)
        found = statistics.of_tile(tile, t, y, first, V, W, WANTED)
        if p_tile is not None and softcap is not None:
            tile = tile * slope(r, logit_scale, softcap)
    if p_tile is not None:
        if DESCRIBED:
            p_tile.store([i_c * BC, first], rounded(tile, p_tile.dtype))
        else:
            store_tile(p_tile, stride_t, tile, o_c, first + tl.arange(0, W), o_c < C)
    return sums, found


@triton.jit
def halved(x, BC: tl.constexpr, W: tl.constexpr):
    """The left and the right half of the columns of x [BC, W]."""
    return tl.split(tl.permute(tl.reshape(x, (BC, 2, W // 2)), (0, 2, 1)))


@triton.jit
def finish_halves(
    x,
    p_bias,
    p_tile,
    p_sums,
    stride_t,
    y,
    base,
    c_s,
    i_c,
    first,
    C,
    V,
    n_v,
    logit_scale,
    softcap,
    EPILOGUE: tl.constexpr,
    WANTED: tl.constexpr,
    BC: tl.constexpr,
    BV: tl.constexpr,
    W: tl.constexpr,
):
    """`finish` of W columns, one half after the other, stored by descriptor."""
    left, right = halved(x, BC, W)
    sums, found = finish(
        left, p_bias, p_tile, p_sums, stride_t, y, base, c_s, i_c, first, C, V, n_v,
        logit_scale, softcap, EPILOGUE, WANTED, BC, BV, W // 2, True,
    )  # fmt: skip
    sums_right, found_right = finish(
        right, p_bias, p_tile, p_sums, stride_t, y, base, c_s, i_c, first + W // 2, C, V, n_v,
        logit_scale, softcap, EPILOGUE, WANTED, BC, BV, W // 2, True,
    )  # fmt: skip
    return sums + sums_right, statistics.joined(found, found_right)


@triton.jit
def make_tile(
    i,
    p_hidden,
    p_rows,
    p_weight,
    p_bias,
    p_targets,
    p_base,
    p_coefficient,
    p_tile,
    p_sums,
    p_planes,
    stride_hr,
    stride_hd,
    stride_wv,
    stride_wd,
    stride_t,
    v_start,
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
    GROUP: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    """The i-th tile, product and epilogue."""
    n_c, n_v = tl.cdiv(C, BC), tl.cdiv(V, BV)
    i_c, i_v = tile_of(i, n_c, n_v, GROUP)
    x = product_tile(
        p_hidden, p_rows, p_weight, stride_hr, stride_hd, stride_wv, stride_wd, i_c, i_v, C, V, D,
        BC, BV, BD, EVEN_D, PRECISION, PERSISTENT,
    )  # fmt: skip
    o_c = i_c * BC + tl.arange(0, BC)
    m_c = o_c < C
    y = (tl.load(p_targets + o_c, mask=m_c, other=-1) - v_start).to(tl.int32)
    # Rows past the end repeat the last token or are zero: a base of inf makes all they add zero.
    base = tl.load(p_base + o_c, mask=m_c, other=float("inf"))
    c_s = base
    if EPILOGUE == GRADIENT:
        # L is -inf where there is no competitor; z is too, or it is the target.
        base = finite(base) * LOG2_E
        c_s = tl.load(p_coefficient + o_c, mask=m_c, other=0.0)
    first = i_v * BV
    if PERSISTENT:
        # In quarters: registers and shared memory for no more of it at a time.
        left, right = halved(x, BC, BV)
        sums, found = finish_halves(
            left, p_bias, p_tile, p_sums, stride_t, y, base, c_s, i_c, first, C, V, n_v,
            logit_scale, softcap, EPILOGUE, WANTED, BC, BV, BV // 2,
        )  # fmt: skip
        sums_right, found_right = finish_halves(
            right, p_bias, p_tile, p_sums, stride_t, y, base, c_s, i_c, first + BV // 2, C, V, n_v,
            logit_scale, softcap, EPILOGUE, WANTED, BC, BV, BV // 2,
        )  # fmt: skip
        sums += sums_right
        found = statistics.joined(found, found_right)
    else:
        sums, found = finish(
            x, p_bias, p_tile, p_sums, stride_t, y, base, c_s, i_c, first, C, V, n_v,
            logit_scale, softcap, EPILOGUE, WANTED, BC, BV, BV, False,
        )  # fmt: skip
    if EPILOGUE != GRADIENT:
        tl.store(p_sums + i_v.to(tl.int64) * C + o_c, sums, mask=m_c)
        if WANTED:
            statistics.store(p_planes, found, y, i_v, n_v, BV, o_c, C, m_c, WANTED)


# Slices of the tokens' own numbers start anywhere: one compiled kernel serves them all.
@triton.jit(
    do_not_specialize=["v_start", "C", "V"],
    do_not_specialize_on_alignment=["p_rows", "p_bias", "p_targets", "p_base", "p_coefficient"],
)
def tile_kernel(
    p_hidden,  # rows of any strides, or a descriptor
    p_rows,  # [C] int64, or None
    p_weight,  # [V, D], or a descriptor
    p_bias,  # [V], or None
    p_targets,  # [C] int64
    p_base,  # [C] fp32: `base`; for GRADIENT, L
    p_coefficient,  # [C] fp32, `c s`: GRADIENT only
    p_tile,  # [C, n_v BV], for EXPONENTIALS and GRADIENT; a descriptor of [BC, BV / 4] blocks if PROGRAMS
    p_sums,  # fp32: of rows [n_v, C]; for GRADIENT of columns [n_c, n_v BV], or None
    p_planes,  # fp32: of `tile_statistics`, or None
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
    WANTED: tl.constexpr,  # statistics besides the sums
    BC: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    PROGRAMS: tl.constexpr,  # of a persistent kernel, whose operands are descriptors; 0: a program a tile
):
    if PROGRAMS:
        n_tiles = tl.cdiv(C, BC) * tl.cdiv(V, BV)
        for i in tl.range(tl.program_id(0), n_tiles, PROGRAMS, flatten=True):
            make_tile(
                i, p_hidden, p_rows, p_weight, p_bias, p_targets, p_base, p_coefficient, p_tile, p_sums, p_planes,
                stride_hr, stride_hd, stride_wv, stride_wd, stride_t, v_start, C, V, D, logit_scale, softcap,
                EPILOGUE, WANTED, BC, BV, BD, GROUP, EVEN_D, PRECISION, True,
            )  # fmt: skip
    else:
        make_tile(
            tl.program_id(0), p_hidden, p_rows, p_weight, p_bias, p_targets, p_base, p_coefficient, p_tile, p_sums,
            p_planes, stride_hr, stride_hd, stride_wv, stride_wd, stride_t, v_start, C, V, D, logit_scale, softcap,
            EPILOGUE, WANTED, BC, BV, BD, GROUP, EVEN_D, PRECISION, False,
        )  # fmt: skip
