"""The plain-torch backend: any device, any dtype, and the oracle of the kernels' tests.

Tokens go in chunks, the vocabulary in blocks, so that a tile [C, Vb] of logits stays in the cache and is used
for everything it is good for before the next one is made:

    z = f(h W_b^T + b_b)             the tile, the target's column set to -inf
    e = exp(z - r)                   r follows the running maximum of the row
    S = S e^(r_old - r) + sum(e)     A = A e^(r_old - r) + (e * f') W_b

and after the last block `L = r + log S` and `u = f'_y W_y - A / S`. The base r moves only when the maximum
has outgrown it by `_SLACK`, so the sum of products A is rarely rescaled.

`torch_gradient` has the gradient of the weight, `torch_products` how operands of 16 bits are multiplied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from orpo_kernels.kernels.interface import Forward, Head, KeptLogitGrads, TargetLogits, Tokens
from orpo_kernels.kernels.products import chunks_of
from orpo_kernels.kernels.statistics import NO_STATISTICS, Statistics, TokenStatistics, entropy_slopes
from orpo_kernels.kernels.torch_gradient import weight_gradient
from orpo_kernels.kernels.torch_products import Products, finite, target_columns
from orpo_kernels.kernels.torch_statistics import RunningStatistics
from orpo_kernels.plan import MIB, Schedule

__all__ = ["forward", "settle_kept", "settle_u", "target_logits", "weight_gradient"]

# e^8 = 2981 fits fp16 and costs no accuracy; a larger slack would only help inputs no model produces.
_SLACK = 8.0
# The GNU allocator takes what exceeds 32 MiB from the system and gives it back at once; smaller pieces it may hold.
_PART = 33 * MIB


def forward(
    tokens: Tokens, head: Head, schedule: Schedule, want_u: bool, wanted: Statistics = NO_STATISTICS
) -> Forward:
    """See `interface.Backend`."""
    n, v, wide = tokens.targets.numel(), head.weight.shape[0], head.accumulation_dtype
    device = head.weight.device
    math = Products(head, device)
    # On a CPU u is wide: the sum grows in its place, and the gradient is rounded once.
    u_dtype = wide if device.type == "cpu" else head.compute_dtype

    def numbers(asked: bool = True, dtype: torch.dtype = wide) -> Tensor | None:
        return torch.empty(n, dtype=dtype, device=device) if asked else None

    def vectors(asked: bool) -> Tensor | None:
        return torch.empty(n, head.inner_size, dtype=u_dtype, device=device) if asked else None

    log_odds, lse = numbers(), numbers()
    assert log_odds is not None
    assert lse is not None
    statistics = TokenStatistics(
        numbers(wanted.entropy),
        numbers(wanted.log_sum_sq_probs),
        numbers(wanted.mean_logits),
        numbers(wanted.is_top1, torch.bool),
        vectors(wanted.entropy_grad and want_u),
    )
    block, keep = schedule.forward_block, schedule.keep_rows
    out = Forward(log_odds, lse, vectors(want_u), _empty_kept(keep, head, block) if keep else None, statistics)
    for chunk in chunks_of(n, schedule.forward_chunk, keep):
        running = _Chunk(math, tokens, chunk, min(block, v), out, wanted, keep=chunk.start < keep)
        for group, columns in enumerate(chunks_of(v, block)):
            running.add_tile(group, columns)
        running.finish()
        del running  # before the next chunk's is made
    return out


class _Chunk:
    """A chunk of tokens on its way through the vocabulary: sums that its tiles add to, in `out` where they can."""

    def __init__(
        self,
        math: Products,
        tokens: Tokens,
        chunk: slice,
        block: int,
        out: Forward,
        wanted: Statistics,
        keep: bool,
    ) -> None:
        self.math, self.chunk, self.out, self.wanted = math, chunk, out, wanted
        self.h: Tensor | None = math.hidden_rows(tokens, chunk)
        self.y = tokens.targets[chunk]
        self.kept = out.kept if keep else None
        c, wide = self.y.numel(), math.wide
        self.sums = torch.zeros(c, dtype=wide, device=self.y.device)
        self.known = tokens.known is not None
        if tokens.known is None:
            self.z_y = torch.zeros_like(self.sums)
            self.slope_y = torch.full_like(self.sums, math.head.logit_scale)
        else:
            self.z_y, self.slope_y = tokens.known.value[chunk].to(wide), tokens.known.slope[chunk]
        self.base = torch.full_like(self.sums, -torch.inf)
        self.product = self._sum_of_products(out.u)
        self.entropy_product = self._sum_of_products(out.statistics.entropy_u)
        self.tile: Tensor | None = math.tile_buffer(c, block)
        keeps_products = self.entropy_product is not None
        self.statistics = RunningStatistics(wanted, self.sums, block, keeps_products=keeps_products)

    def _sum_of_products(self, u: Tensor | None) -> Tensor | None:
        """Zeros [C, D]: where u is as wide as the sum, in its place."""
        if u is None:
            return None
        return (u[self.chunk] if u.dtype == self.math.wide else u[self.chunk].to(self.math.wide)).zero_()

    def add_tile(self, group: int, columns: slice) -> None:
        math, kept = self.math, self.kept
        assert self.h is not None
        assert self.tile is not None
        w = math.weight_rows(columns)
        # Where kept values are as wide as logits, the tile is made in their place.
        own = kept.tile(self.chunk, columns) if kept is not None and math.head.compute_dtype == math.wide else None
        want_slope = self.product is not None or kept is not None
        z, slope = math.logits(self.h, w, columns, self.tile if own is None else own, want_slope=want_slope)
        self.statistics.see_logits(z)
        at, inside = target_columns(self.y, columns)
        z_at = z.gather(1, at).squeeze(1)
        if not self.known:
            self.z_y = torch.where(inside, z_at, self.z_y)
        z.scatter_(1, at, z_at.masked_fill(inside, -torch.inf)[:, None])
        if slope is not None and not self.known:
            self.slope_y = torch.where(inside, slope.gather(1, at).squeeze(1), self.slope_y)
        maximum = z.amax(1)
        self.statistics.see_competitors(z, maximum, z_at, at, inside, self.y >= columns.stop)

        old, self.base = self.base, _follow(self.base, maximum)
        base = finite(self.base)
        decay, shift = torch.exp(old - base), finite(old) - base
        sums, products = self.statistics.take_exponentials(z, base, decay, shift, self.sums)
        self.sums = self.sums * decay + sums
        e = z if slope is None else z.mul_(slope)
        if kept is not None:
            if own is None:
                kept.tile(self.chunk, columns).copy_(e)
            kept.base[self.chunk, group] = base
        if self.product is None:
            return
        # On a GPU asking whether anything moved would wait for the device.
        rescale = self.product.is_cuda or not torch.equal(old, self.base)
        if self.entropy_product is not None and products is not None:
            if rescale:
                self.entropy_product.addcmul_(self.product, shift[:, None]).mul_(decay[:, None])
            math.add_product(self.entropy_product, products if slope is None else products.mul_(slope), w)
        if rescale:
            self.product.mul_(decay[:, None])
        math.add_product(self.product, e, w)

    def finish(self) -> None:
        """Writes the chunk's part of `out`."""
        # Buffers that have served, before the targets' rows are gathered.
        self.h = self.tile = self.statistics.tile = None
        out, chunk, found = self.out, self.chunk, self.out.statistics
        # No competitor at all (V = 1): L = -inf, the target is certain, and q is 0.
        out.lse[chunk] = finite(self.base) + torch.log(self.sums)
        # A target's logit of +inf is an overflow, not certainty.
        log_odds = torch.where(self.z_y == torch.inf, torch.nan, self.z_y - out.lse[chunk])
        out.log_odds[chunk] = log_odds
        if found.entropy is not None:
            found.entropy[chunk] = self.statistics.entropy(log_odds, self.sums)
        if found.log_sum_sq_probs is not None:
            found.log_sum_sq_probs[chunk] = self.statistics.log_sum_sq_probs(log_odds, self.sums)
        if found.mean_logits is not None:
            found.mean_logits[chunk] = self.statistics.total / self.math.head.weight.shape[0]
        if found.is_top1 is not None:
            found.is_top1[chunk] = self.statistics.is_top1(self.z_y)
        if out.u is None or self.product is None:
            return
        inverse = torch.where(self.sums == 0, 0.0, 1.0 / self.sums).neg_()
        if self.math.head.softcap is None:
            inverse = inverse * self.math.head.logit_scale
        if self.entropy_product is not None and found.entropy_u is not None and found.entropy is not None:
            s, slopes = torch.sigmoid(-log_odds), entropy_slopes(log_odds, found.entropy[chunk])
            level = slopes.level - s * finite(self.sums.log())
            self.entropy_product.mul_(s[:, None]).addcmul_(self.product, level[:, None])
            self._write(found.entropy_u, self.entropy_product, inverse, slopes.own * self.slope_y)
            self.entropy_product = None
        self._write(out.u, self.product, inverse, self.slope_y)

    def _write(self, u: Tensor, product: Tensor, factor: Tensor, of_target: Tensor) -> None:
        """u = factor product + of_target W[y], for the chunk; in the place of the product."""
        self.math.add_target_rows(product.mul_(factor[:, None]), self.y, of_target)
        if u.dtype != product.dtype:
            u[self.chunk] = product


def target_logits(tokens: Tokens, head: Head, schedule: Schedule) -> TargetLogits:
    """z_y [N] in fp64 and its slope of the tokens whose target is one of the head's rows; 0 of the others."""
    math = Products(head, head.weight.device)
    n, wide = tokens.targets.numel(), head.accumulation_dtype
    value = torch.zeros(n, dtype=torch.float64, device=head.weight.device)
    slope = torch.zeros(n, dtype=wide, device=head.weight.device)
    # A row's operands and their products take the room of its tile.
    for part in chunks_of(n, max(1, schedule.forward_chunk // 4)):
        y = tokens.targets[part]
        for all_of, found in zip((value, slope), math.target_logits(math.hidden_rows(tokens, part), y), strict=True):
            all_of[part] = torch.where(y < 0, 0.0, found)
    return TargetLogits(value, slope)


def settle_kept(kept: KeptLogitGrads, tokens: Tokens, head: Head, lse: Tensor) -> None:
    """Nothing to do: the target's entry is put in by the gradient."""


def settle_u(u: Tensor, tokens: Tokens, head: Head, own: Tensor, rest: Tensor, step: int) -> None:
    """u [N, D] of a slice, in place, as its part of the whole vocabulary's u.

    The forward gave `f'_y W[y] - (q_p f') W` with q_p over the slice's own competitors. The whole vocabulary's q is
    `own` [N] times that, so this part is `own u + rest f'_y W[y]` with `rest` = 1 - own. step: tokens at a time.
    """
    assert tokens.known is not None
    math = Products(head, head.weight.device)
    for part in chunks_of(u.shape[0], step):
        total = u[part].to(math.wide).mul_(own[part, None])
        math.add_target_rows(total, tokens.targets[part], rest[part].to(math.wide) * tokens.known.slope[part])
        if u.dtype != math.wide:
            u[part] = total


def _empty_kept(rows: int, head: Head, block: int) -> KeptLogitGrads:
    v, device = head.weight.shape[0], head.weight.device
    base = torch.empty(rows, -(-v // block), dtype=head.accumulation_dtype, device=device)
    return KeptLogitGrads(_parts(rows, v, block, head.compute_dtype, device), base, block)


def _parts(rows: int, v: int, block: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Memory for [rows, v] in parts of whole blocks, each large enough to go back to the system when it is freed."""
    width = block * -(-_PART // (rows * block * dtype.itemsize))
    return [torch.empty(rows, p.stop - p.start, dtype=dtype, device=device) for p in chunks_of(v, width)]


def _follow(base: Tensor, maximum: Tensor) -> Tensor:
    """The base for a new block: unchanged while the maximum is within `_SLACK` of it (NaN passes on)."""
    return torch.where(maximum <= base + _SLACK, base, torch.maximum(maximum, base))
