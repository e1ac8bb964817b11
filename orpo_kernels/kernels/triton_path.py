"""The Triton backend: the same two functions as `torch_path`, on kernels that keep the logits on the chip.

Forward, for a chunk of tokens:

    target_kernel   z_y and the first base of every row, once for all chunks
    tile_kernel     exponentials E [C, V] of the competitors (only their sums where u is not wanted)
    sum_kernel      S, L and the log-odds
    slow lane       base, E and S (and moments) of rows that the first pass could not hold; see `slow_lane`
    E W             by the library, in fp32
    u_kernel        u = f'_y W[y] - (E W) / S; and where E is kept, its entry at the target becomes -S f'_y

Gradient of the head, for a block of the vocabulary: `G = c s (onehot - q) f'` [N, Vb] by tile_kernel, then `G^T H` by
the library, summed in fp32 and rounded once. Tokens whose exponentials were kept need no G: a row of it is -c s / S
times a row of E, and that factor goes to the rows of H once for all blocks, `E^T (-c s / S H)`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from orpo_kernels.kernels.configs import TileConfig
from orpo_kernels.kernels.interface import (
    EntropyGradient,
    Forward,
    Head,
    HeadGradients,
    KeptLogitGrads,
    TargetLogits,
    Tokens,
)
from orpo_kernels.kernels.products import chunks_of, has_mixed_product
from orpo_kernels.kernels.rows import scale_kernel
from orpo_kernels.kernels.statistics import NO_STATISTICS, Statistics
from orpo_kernels.kernels.tile import INTERPRETED
from orpo_kernels.kernels.triton_bytes import DTYPES
from orpo_kernels.kernels.triton_launch import OPTIONS, Launcher, default_config, device_guard, tile_buffer
from orpo_kernels.kernels.triton_statistics import GatheredStatistics
from orpo_kernels.plan import Schedule

# How much of the inner dimension is widened at a time where no 16-bit product has an fp32 result.
_WIDENED = 2048
# Of a kept row's sum, as a logarithm: bf16 and fp32 hold e^88.
_LARGEST_SUM = 64.0


def supports(head: Head, tokens_device: torch.device) -> str | None:
    """None where these kernels can serve `head` on that device; else the reason, in words."""
    if head.adapter is not None:
        return "the kernels take a plain weight, and the head has an adapter"
    if head.compute_dtype not in DTYPES:
        return f"the kernels take bf16 and fp32 operands, and the compute dtype is {head.compute_dtype}"
    if INTERPRETED.value:
        where = tokens_device.type
        return None if where == "cpu" else f"TRITON_INTERPRET is set: kernels run on the CPU, not on {where}"
    if tokens_device.type != "cuda":
        return f"the kernels run on CUDA and ROCm devices, not on {tokens_device.type}"
    if torch.version.hip is None and torch.cuda.get_device_capability(tokens_device) < (8, 0):
        return "the kernels need tensor cores that take bf16 (compute capability 8.0 or later)"
    return None


def forward(
    tokens: Tokens,
    head: Head,
    schedule: Schedule,
    want_u: bool,
    wanted: Statistics = NO_STATISTICS,
    *,
    config: TileConfig | None = None,
) -> Forward:
    """Log-probability terms of every token; see `interface` for the symbols and shapes.

    schedule: one made with `full_vocab_tiles=True`: a chunk's exponentials span the vocabulary. ValueError if not.
    config: the tile's shape; None takes the tuned one, or the device's default.

    """
    n, d, v = tokens.targets.numel(), head.weight.shape[1], head.weight.shape[0]
    device, dtype = head.weight.device, head.compute_dtype
    if schedule.forward_block < v:
        raise ValueError(
            f"schedule.forward_block={schedule.forward_block} does not span the vocabulary of {v}: make the "
            "schedule with full_vocab_tiles=True, and Plan.scratch_bytes large enough for that"
        )
    what = "exponentials" if want_u else "sums"
    config = config or default_config(head, what, min(n, schedule.forward_chunk), statistics=bool(wanted.asked))
    launch = Launcher(head, config)
    statistics = GatheredStatistics(wanted, n, v, device)
    log_odds = torch.empty(n, dtype=torch.float32, device=device)
    lse = torch.empty(n, dtype=torch.float32, device=device)
    u = torch.empty(n, d, dtype=dtype, device=device) if want_u else None
    keep, kept = min(schedule.keep_rows, n), None
    if schedule.keep_rows:
        base = torch.empty(keep, 1, dtype=torch.float32, device=device)
        kept = KeptLogitGrads([tile_buffer(keep, v, dtype, device, config)], base, v)
    scratch = tile_buffer(min(schedule.forward_chunk, n - keep) if want_u else 0, v, dtype, device, config)

    with device_guard(device):
        if tokens.known is None:
            target, slopes, bases = launch.targets(tokens.hidden, tokens.rows, tokens.targets)
        else:
            target, slopes, bases = _known_targets(tokens.known)
        for chunk in chunks_of(n, schedule.forward_chunk, keep):
            hidden, rows = _hidden_rows(tokens, chunk, dtype)
            y = tokens.targets[chunk]
            keeps = kept is not None and chunk.start < keep
            tile = None
            if kept is not None and keeps:
                tile = kept.values[0][chunk, :v]
            elif want_u:
                tile = scratch[: y.numel(), :v]
            slope_y, base, total = slopes[chunk], bases[chunk], torch.empty_like(log_odds[chunk])
            numbers = (base, target[:, chunk], total, log_odds[chunk], lse[chunk])
            planes = statistics.planes(launch.n_v, y.numel())
            partial = launch.sums(hidden, rows, y, base, tile, planes, statistics.mask)
            launch.finish_sums(partial, *numbers)
            launch.slow_lane(hidden, rows, y, base, total, tile, partial, planes, statistics.mask)
            launch.finish_sums(partial, *numbers, again=True)
            statistics.add(planes, launch.n_v, chunk, target[0, chunk], total)
            if u is not None and tile is not None:
                product = _add_product(None, tile, launch.weight, u[chunk])
                launch.finish_u(product, y, slope_y, total, u[chunk])
                del product
            if kept is not None and keeps and tile is not None:
                kept.base[chunk, 0] = base * math.log(2)
                if tokens.known is None:  # else S is that of a slice, and `settle_kept` knows the whole
                    own = -total * (slope_y / launch.left_out)
                    tile.scatter_(1, y[:, None], own.to(dtype)[:, None])
            del hidden, partial, planes  # Before the next chunk's are made.
        return Forward(log_odds, lse, u, kept, statistics.finish(log_odds))


def weight_gradient(
    tokens: Tokens,
    head: Head,
    coefficient: Tensor,
    lse: Tensor,
    kept: KeptLogitGrads | None,
    schedule: Schedule,
    want_weight: bool,
    want_bias: bool,
    want_adapter: bool = False,
    entropy: EntropyGradient | None = None,
    *,
    config: TileConfig | None = None,
) -> HeadGradients:
    """See `interface.Backend`. A weight of another dtype than the compute dtype is cast a block at a time."""
    assert not want_adapter, "`supports` refuses a head with an adapter"
    assert entropy is None, "`dispatch` takes a gradient of the entropy to the torch path"
    n, v = tokens.targets.numel(), head.weight.shape[0]
    device, dtype, wide = head.weight.device, head.compute_dtype, torch.float32
    d_weight = torch.empty_like(head.weight, memory_format=torch.contiguous_format) if want_weight else None
    d_bias = torch.empty_like(head.bias) if want_bias and head.bias is not None else None
    if n == 0 or (d_weight is None and d_bias is None):
        return HeadGradients(*(None if d is None else d.zero_() for d in (d_weight, d_bias)))
    chunk_size, block = min(schedule.backward_chunk, n), min(schedule.backward_block, v)
    keep = kept.base.shape[0] if kept is not None else 0
    config = config or default_config(head, "gradient", chunk_size, bias_gradient=d_bias is not None)
    factors = None if kept is None else _kept_factors(head, coefficient, lse, kept)
    chunks = list(chunks_of(n, chunk_size, keep))
    alone = len(chunks) == 1

    def operand(chunk: slice) -> Tensor:
        """Rows of hidden [C, D], those of kept tokens times their factors."""
        rows = _gathered(tokens, chunk, dtype)
        if factors is None or chunk.start >= keep:
            return rows
        return torch.mul(rows, factors[chunk, None], out=torch.empty(rows.shape, dtype=dtype, device=device))

    with device_guard(device):
        # Rows that serve every block are made once.
        ready = [operand(chunk) for chunk in chunks] if n == chunk_size else None
        buffer = tile_buffer(min(chunk_size, n - keep), block, dtype, device, config)
        for columns in chunks_of(v, block):
            launch = Launcher(head, config, columns) if keep < n else None
            width = columns.stop - columns.start
            dest = d_weight[columns] if d_weight is not None else None
            total: Tensor | None = None
            total_bias = None
            if d_bias is not None:
                total_bias = torch.zeros(width, dtype=wide, device=device)
            for i, chunk in enumerate(chunks):
                rows = operand(chunk) if ready is None else ready[i]
                g = buffer
                if kept is not None and factors is not None and chunk.start < keep:
                    g = kept.tile(chunk, columns)
                    if total_bias is not None:
                        total_bias += _weighted_sums(g, factors[chunk])
                elif launch is not None:
                    g = buffer[: chunk.stop - chunk.start, :width]
                    launch.gradient(rows, tokens.targets[chunk], coefficient[chunk], lse[chunk], g, total_bias)
                if dest is not None and alone:
                    _product(g.t(), rows, dest)
                elif dest is not None:
                    total = _add_product(total, g.t(), rows, dest)
            if dest is not None and total is not None and total is not dest:
                dest.copy_(total)
            if d_bias is not None and total_bias is not None:
                d_bias[columns] = total_bias
    return HeadGradients(d_weight, d_bias)


def target_logits(tokens: Tokens, head: Head, schedule: Schedule) -> TargetLogits:
    """z_y [N] in fp64 and its slope of the tokens whose target is one of the head's rows; 0 of the others."""
    launch = Launcher(head, default_config(head, "sums", tokens.targets.numel()))
    with device_guard(head.weight.device):
        (t_y, low), slopes, _ = launch.targets(tokens.hidden, tokens.rows, tokens.targets)
    absent = tokens.targets < 0
    value = (t_y.double() + low.double()) * math.log(2)
    return TargetLogits(value.masked_fill_(absent, 0.0), slopes.masked_fill(absent, 0.0))


def _known_targets(known: TargetLogits) -> tuple[Tensor, Tensor, Tensor]:
    """What `Launcher.targets` gives, from z_y itself."""
    exact = known.value / math.log(2)
    t_y = exact.float()
    low = torch.where(t_y.isfinite(), exact - t_y, 0.0).float()
    return torch.stack([t_y, low]), known.slope, torch.where(t_y == -torch.inf, 0.0, t_y)


def settle_kept(kept: KeptLogitGrads, tokens: Tokens, head: Head, lse: Tensor) -> None:
    """Puts the targets' entries, `-S f'_y` with S over the whole vocabulary, into what a slice has kept; in place.

    S is e^(L - base). Where that is out of range, though the slice's own sum is not, the base is raised and
    the row falls with it.
    """
    assert tokens.known is not None
    keep, tile = len(kept.base), kept.values[0]
    base, y = kept.base[:, 0], tokens.targets[:keep, None]
    logarithm = lse[:keep] - base
    over = (logarithm - _LARGEST_SUM).clamp_(min=0.0).nan_to_num_(0.0)
    with device_guard(tile.device):
        scale_kernel[(triton.cdiv(keep, 16), 64)](
            tile, (-over).exp().float(), tile.stride(0), keep, kept.columns, BC=16, BV=256, **OPTIONS
        )  # fmt: skip
    left_out = head.logit_scale if head.softcap is None else 1.0
    own = -(logarithm - over).exp() * (tokens.known.slope[:keep] / left_out)
    y_held = y.clamp_min(0)
    tile.scatter_(1, y_held, torch.where(y < 0, tile.gather(1, y_held), own[:, None].to(tile.dtype)))
    kept.base[:, 0] = base + over.float()


def _kept_factors(head: Head, coefficient: Tensor, lse: Tensor, kept: KeptLogitGrads) -> Tensor:
    """What kept exponentials [K, V] miss to be rows of G: -c s f' / S without a soft-cap, where f' is a number."""
    keep = len(kept.base)
    # L is -inf where nothing competes, and the kept values are 0.
    lse = torch.where(lse[:keep] == -torch.inf, 0.0, lse[:keep])
    slope = head.logit_scale if head.softcap is None else 1.0
    return torch.exp(kept.base[:, 0] - lse) * (-slope * coefficient[:keep])


def _weighted_sums(tile: Tensor, factors: Tensor) -> Tensor:
    """[V] fp32: the columns' sums of the tile [K, V], its rows times fp32 factors [K]."""
    parts: list[Tensor] = []
    left = factors
    while len(parts) < (1 if tile.dtype == torch.float32 else 3):  # 3 x 8 bits are all of an fp32 factor's
        parts.append(left.to(tile.dtype))
        left = left - parts[-1].float()
    weights = torch.stack(parts, 1)
    return _add_product(None, tile.t(), weights, factors.new_empty(tile.shape[1], weights.shape[1])).sum(1)


def _hidden_rows(tokens: Tokens, chunk: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Hidden rows in the compute dtype, and which of them are the chunk's; gathered only to be cast."""
    if tokens.hidden.dtype != dtype:
        return _gathered(tokens, chunk, dtype), None
    if tokens.rows is None:
        return tokens.hidden[chunk], None
    return tokens.hidden, tokens.rows[chunk]


def _gathered(tokens: Tokens, chunk: slice, dtype: torch.dtype) -> Tensor:
    if tokens.rows is None:
        return tokens.hidden[chunk].to(dtype)
    return tokens.hidden.index_select(0, tokens.rows[chunk]).to(dtype)


def _add_product(total: Tensor | None, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """`total + a @ b` in fp32; `out` has its shape and is used where it has its dtype."""
    wide = torch.float32
    place = out if out.dtype == wide else None
    if a.dtype == wide:
        if total is None:
            return torch.mm(a, b, out=place)
        return torch.addmm(total, a, b, out=total)
    if has_mixed_product(a.device, a.dtype):
        if total is not None:
            return torch.addmm(total, a, b, out_dtype=wide, out=total)
        if place is not None:
            return torch.mm(a, b, out_dtype=wide, out=place)
        return torch.mm(a, b, out_dtype=wide)
    if total is None:
        total = torch.zeros(out.shape, dtype=wide, device=a.device)
    for part in chunks_of(a.shape[1], _WIDENED):
        torch.addmm(total, a[:, part].to(wide), b[part].to(wide), out=total)
    return total


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`a @ b`, summed in fp32 and rounded once to the dtype of `out`."""
    if out.dtype == a.dtype and has_mixed_product(a.device, a.dtype):
        with _fp32_reductions():
            torch.mm(a, b, out=out)
        return
    total = _add_product(None, a, b, out)
    if total is not out:
        out.copy_(total)


@contextlib.contextmanager
def _fp32_reductions() -> Iterator[None]:
    """Where the library cuts the inner dimension of a bf16 product, it adds the parts up before they are rounded."""
    matmul: Any = torch.backends.cuda.matmul
    # Set alone, it would also allow cuts that the user has forbidden.
    before = matmul.allow_bf16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction_split_k
    matmul.allow_bf16_reduced_precision_reduction = (False, before[1])
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before
