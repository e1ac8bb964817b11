"""The plain-torch backend: any device, any dtype, and the oracle of the kernels' tests.

Tokens go in chunks, the vocabulary in blocks, so that a tile [C, Vb] of logits stays in the cache and is used
for everything it is good for before the next one is made:

    z = f(h W_b^T + b_b)             the tile, the target's column set to -inf
    e = exp(z - r)                   r follows the running maximum of the row
    S = S e^(r_old - r) + sum(e)     A = A e^(r_old - r) + (e * f') W_b

and after the last block `L = r + log S` and `u = f'_y W_y - A / S`. The reference r moves only when the maximum
has outgrown it by `_SLACK`, so the sum of products A is rarely rescaled.

The gradient of the weight visits the vocabulary in the outer loop. With L known, a tile's part of it is
`G^T h` with `G = c s (onehot - q) f'` and `q = exp(z - L)`; the products of one block of rows of the weight add
up in fp32 and are rounded once.

Products of 16-bit operands give fp32: by `torch.mm(..., out_dtype=...)` where the device has it (CUDA), else
by widening the operands, which is exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

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
from orpo_kernels.kernels.statistics import NO_STATISTICS, Statistics, TokenStatistics, entropy_slopes
from orpo_kernels.kernels.torch_statistics import LEAST_LOG, RunningStatistics
from orpo_kernels.plan import MIB, Schedule

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
    math = _Products(head, device)
    # On a CPU u is wide: the sum grows in its place, and the gradient is rounded once.
    u_dtype = wide if device.type == "cpu" else head.compute_dtype

    def numbers(asked: bool = True, dtype: torch.dtype = wide) -> Tensor | None:
        return torch.empty(n, dtype=dtype, device=device) if asked else None

    def rows(asked: bool) -> Tensor | None:
        return torch.empty(n, head.inner_size, dtype=u_dtype, device=device) if asked else None

    log_odds, lse = numbers(), numbers()
    assert log_odds is not None
    assert lse is not None
    statistics = TokenStatistics(
        numbers(wanted.entropy),
        numbers(wanted.log_sum_sq_probs),
        numbers(wanted.mean_logits),
        numbers(wanted.is_top1, torch.bool),
        rows(wanted.entropy_grad and want_u),
    )
    block, keep = schedule.forward_block, schedule.keep_rows
    out = Forward(log_odds, lse, rows(want_u), _empty_kept(keep, head, block) if keep else None, statistics)
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
        math: _Products,
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
        self.reference = torch.full_like(self.sums, -torch.inf)
        self.product = self._sum_of_products(out.u)
        self.entropy_product = self._sum_of_products(out.statistics.entropy_u)
        self.tile: Tensor | None = math.tile_buffer(c, block)
        spare = torch.empty(c * block, dtype=wide, device=self.y.device) if wanted.second_tile else None
        self.statistics = RunningStatistics(wanted, self.sums, spare)

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
        at, inside = _target_columns(self.y, columns)
        z_at = z.gather(1, at).squeeze(1)
        if not self.known:
            self.z_y = torch.where(inside, z_at, self.z_y)
        z.scatter_(1, at, z_at.masked_fill(inside, -torch.inf)[:, None])
        if slope is not None and not self.known:
            self.slope_y = torch.where(inside, slope.gather(1, at).squeeze(1), self.slope_y)
        maximum = z.amax(1)
        self.statistics.see_competitors(z, maximum, z_at, at, inside, self.y >= columns.stop)

        old, self.reference = self.reference, _follow(self.reference, maximum)
        reference = _finite(self.reference)
        e, above = self.statistics.exponentials(z, reference)
        decay, moved = torch.exp(old - reference), _finite(old) - reference
        self.statistics.see_exponentials(e, above, decay, moved, self.sums)
        self.sums = self.sums * decay + e.sum(1)
        if slope is not None:
            e.mul_(slope)
        if kept is not None:
            if own is None:
                kept.tile(self.chunk, columns).copy_(e)
            kept.reference[self.chunk, group] = reference
        if self.product is None:
            return
        # On a GPU asking whether anything moved would wait for the device.
        rescale = self.product.is_cuda or not torch.equal(old, self.reference)
        if self.entropy_product is not None and above is not None:
            if rescale:
                self.entropy_product.addcmul_(self.product, moved[:, None]).mul_(decay[:, None])
            math.add_product(self.entropy_product, above if slope is None else above.mul_(slope), w)
        if rescale:
            self.product.mul_(decay[:, None])
        math.add_product(self.product, e, w)

    def finish(self) -> None:
        """Writes the chunk's part of `out`."""
        # Buffers that have served, before the targets' rows are gathered.
        self.h = self.tile = self.statistics.tile = None
        out, chunk, found = self.out, self.chunk, self.out.statistics
        # No competitor at all (V = 1): L = -inf, the target is certain, and q is 0.
        out.lse[chunk] = _finite(self.reference) + torch.log(self.sums)
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
            level = slopes.level - s * _finite(self.sums.log())
            self.entropy_product.mul_(s[:, None]).addcmul_(self.product, level[:, None])
            self._write(found.entropy_u, self.entropy_product, inverse, slopes.own * self.slope_y)
            self.entropy_product = None
        self._write(out.u, self.product, inverse, self.slope_y)

    def _write(self, u: Tensor, product: Tensor, factor: Tensor, of_target: Tensor) -> None:
        """u = factor product + of_target W[y], for the chunk; in the place of the product."""
        self.math.add_target_rows(product.mul_(factor[:, None]), self.y, of_target)
        if u.dtype != product.dtype:
            u[self.chunk] = product


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
) -> HeadGradients:
    """See `interface.Backend`."""
    n, v = tokens.targets.numel(), head.weight.shape[0]
    wide, device = head.accumulation_dtype, head.weight.device
    math = _Products(head, device)
    # Not filled at once: its memory is needed block by block, as that of the kept values goes.
    d_weight = torch.empty_like(head.weight, memory_format=torch.contiguous_format) if want_weight else None
    d_bias = torch.zeros_like(head.bias) if want_bias and head.bias is not None else None
    d_adapter = torch.zeros_like(head.adapter) if want_adapter and head.adapter is not None else None
    # The columns of the inner dimension that train: an adapter on a frozen weight costs a product r wide.
    size = head.weight.shape[1]
    trained = slice(0 if want_weight else size, head.inner_size if d_adapter is not None else size)
    in_place = d_adapter is None and d_weight is not None and d_weight.dtype == wide
    largest = _largest(coefficient, entropy, math)
    scale = (1.0 if head.softcap is not None else head.logit_scale) / (1.0 if largest is None else largest)
    keep_rows = kept.reference.shape[0] if kept is not None else 0
    # One group of kept columns shares a reference, so blocks must not straddle groups.
    block = schedule.backward_block if kept is None else min(schedule.backward_block, kept.columns)
    chunk_size = max(schedule.backward_chunk, 1)
    tile = math.tile_buffer(min(chunk_size, n), min(block, v))
    spare = None if entropy is None else torch.empty(min(chunk_size, n) * min(block, v), dtype=wide, device=device)
    slope_y = None if head.softcap is None else _slopes_of_kept(math, tokens, keep_rows, max(1, chunk_size // 4))

    wide_columns = 0 if in_place else trained.stop - trained.start
    total_buffer = torch.empty(min(block, v), wide_columns, dtype=wide, device=device) if wide_columns else None
    chunks = list(chunks_of(n, chunk_size, keep_rows))
    # Rows that serve every block are gathered once.
    whole = math.hidden_rows(tokens, chunks[0]) if len(chunks) == 1 else None

    for columns in _blocks(v, block, kept.columns if kept is not None else v):
        width = columns.stop - columns.start
        place = d_weight[columns] if in_place and d_weight is not None else total_buffer
        total = None if place is None else place[:width].zero_()
        total_bias = torch.zeros(width, dtype=wide, device=device) if d_bias is not None else None
        w = math.weight_rows(columns) if keep_rows < n else None
        for chunk in chunks:
            h = math.hidden_rows(tokens, chunk) if whole is None else whole
            target = _target_columns(tokens.targets[chunk], columns)
            of_chunk = _factors(coefficient, entropy, chunk, scale)
            if kept is not None and chunk.start < keep_rows:
                slope_at = torch.ones_like(of_chunk.own) if slope_y is None else slope_y[chunk]
                q = _kept_competitors(math.tile(tile, h.shape[0], width), kept, chunk, columns, lse[chunk])
                q.mul_(of_chunk.level[:, None])
            else:
                q, slope_at = _competitors(math, h, w, columns, tile, spare, lse[chunk], of_chunk, target[0])
            _into_gradient(q, slope_at * of_chunk.own, *target)
            if total is not None:
                math.add_product(total, q.t(), h[:, trained])
            if total_bias is not None:
                total_bias += q.sum(0)
            del h, q
        for sums in (total, total_bias):
            if largest is not None and sums is not None:
                sums.mul_(largest)
        for gradient, part in ((d_weight, slice(0, size)), (d_adapter, slice(size - trained.start, None))):
            if total is not None and gradient is not None and not in_place:
                gradient[columns] = total[:, part]
        if d_bias is not None and total_bias is not None:
            d_bias[columns] = total_bias
        if kept is not None:
            kept.release(columns)
        del w, total
    return HeadGradients(d_weight, d_bias, d_adapter)


def target_logits(tokens: Tokens, head: Head, schedule: Schedule) -> TargetLogits:
    """z_y [N] in fp64 and its slope of the tokens whose target is one of the head's rows; 0 of the others."""
    math = _Products(head, head.weight.device)
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
    math = _Products(head, head.weight.device)
    for part in chunks_of(u.shape[0], step):
        total = u[part].to(math.wide).mul_(own[part, None])
        math.add_target_rows(total, tokens.targets[part], rest[part].to(math.wide) * tokens.known.slope[part])
        if u.dtype != math.wide:
            u[part] = total


class _Products:
    """Products whose operands are rounded to the compute dtype and whose results are wide."""

    def __init__(self, head: Head, device: torch.device) -> None:
        self.head = head
        self.wide = head.accumulation_dtype
        mixed = head.compute_dtype != self.wide
        self.mixed_product = mixed and has_mixed_product(device, head.compute_dtype)
        self.operand_dtype = head.compute_dtype if self.mixed_product else self.wide
        self._rows: Tensor | None = None

    def _operand(self, x: Tensor) -> Tensor:
        return x.to(self.head.compute_dtype).to(self.operand_dtype)

    def hidden_rows(self, tokens: Tokens, chunk: slice) -> Tensor:
        if tokens.rows is None:
            return self._operand(tokens.hidden[chunk])
        return self._operand(tokens.hidden.index_select(0, tokens.rows[chunk]))

    def weight_rows(self, columns: slice) -> Tensor:
        """[Vb, D + r], in the memory of the last call's where operands are widened or joined."""
        parts = [part[columns] for part in (self.head.weight, self.head.adapter) if part is not None]
        if len(parts) == 1 and parts[0].dtype == self.head.compute_dtype == self.operand_dtype:
            return parts[0]
        shape = (columns.stop - columns.start, self.head.inner_size)
        if self._rows is None or len(self._rows) < shape[0]:
            self._rows = None  # never two at once
            self._rows = self.head.weight.new_empty(shape, dtype=self.operand_dtype)
        out, start = self._rows[: shape[0]], 0
        for part in parts:
            out[:, start : start + part.shape[1]] = part.to(self.head.compute_dtype)
            start += part.shape[1]
        return out

    def target_rows(self, y: Tensor) -> Tensor:
        """The targets' rows of the weight [C, D + r], rounded to the compute dtype, wide."""
        parts = [self.head.weight] + ([] if self.head.adapter is None else [self.head.adapter])
        y = y.clamp_min(0)  # -1: none of the rows; the caller has a slope of 0 for it
        rows = [part.index_select(0, y).to(self.head.compute_dtype).to(self.wide) for part in parts]
        return rows[0] if len(rows) == 1 else torch.cat(rows, 1)

    def tile_buffer(self, rows: int, columns: int) -> Tensor:
        """Memory for every tile of up to [rows, columns]; none where the product makes its own."""
        size = 0 if self.mixed_product else rows * columns
        return torch.empty(size, dtype=self.wide, device=self.head.weight.device)

    def tile(self, buffer: Tensor, rows: int, columns: int) -> Tensor:
        """[rows, columns] of the buffer, or new where there is none."""
        size = rows * columns
        return (buffer[:size] if size <= buffer.numel() else buffer.new_empty(size)).view(rows, columns)

    def _place(self, buffer: Tensor, h: Tensor, w: Tensor) -> Tensor:
        return buffer if buffer.dim() == 2 else self.tile(buffer, h.shape[0], w.shape[0])

    def logits(
        self, h: Tensor, w: Tensor, columns: slice, buffer: Tensor, *, want_slope: bool
    ) -> tuple[Tensor, Tensor | None]:
        """z [C, Vb], and its slope f' [C, Vb] where a soft-cap makes that vary (else it is logit_scale).

        buffer: memory for z, [C, Vb] or flat; not used where the product makes its own.
        """
        head = self.head
        bias = None
        if head.bias is not None:
            bias = head.bias[columns].to(head.compute_dtype).to(self.wide)
        if self.mixed_product:
            z = torch.mm(h, w.t(), out_dtype=self.wide)
            if bias is not None:
                z.add_(bias)
            if head.logit_scale != 1.0:
                z.mul_(head.logit_scale)
        elif bias is None:
            # alpha rides along with the product; beta=0 never reads the buffer.
            out = self._place(buffer, h, w)
            z = torch.addmm(out, h, w.t(), beta=0, alpha=head.logit_scale, out=out)
        else:
            out = self._place(buffer, h, w)
            z = torch.addmm(bias, h, w.t(), beta=head.logit_scale, alpha=head.logit_scale, out=out)
        if head.softcap is None:
            return z, None
        z.div_(head.softcap).tanh_()
        slope = torch.addcmul(z.new_tensor(head.logit_scale), z, z, value=-head.logit_scale) if want_slope else None
        return z.mul_(head.softcap), slope

    def add_product(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        """total += a @ b, with `a` rounded to the operands' dtype."""
        if self.mixed_product:
            total.add_(torch.mm(a.to(self.operand_dtype), b, out_dtype=self.wide))
        else:
            # Not addmm_: torch's FlopCounterMode counts this spelling and not that one.
            torch.addmm(total, a, b, out=total)

    def add_target_rows(self, total: Tensor, y: Tensor, slope_y: Tensor) -> None:
        """total += f'_y W[y]."""
        total.addcmul_(self.target_rows(y), slope_y[:, None])

    def target_logits(self, h: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """z and f' at the target [C], from a row dot."""
        head = self.head
        x = (h.to(self.wide) * self.target_rows(y)).sum(1)
        if head.bias is not None:
            x += head.bias.index_select(0, y.clamp_min(0)).to(head.compute_dtype).to(self.wide)
        if head.softcap is None:
            return x * head.logit_scale, torch.full_like(x, head.logit_scale)
        bent = torch.tanh(x * (head.logit_scale / head.softcap))
        return head.softcap * bent, head.logit_scale * (1 - bent.square())


def _slopes_of_kept(math: _Products, tokens: Tokens, keep_rows: int, step: int) -> Tensor | None:
    """f' at the targets of kept tokens, whose logits are not made again; None where there are none."""
    parts = list(chunks_of(keep_rows, step))
    if not parts:
        return None
    return torch.cat([math.target_logits(math.hidden_rows(tokens, p), tokens.targets[p])[1] for p in parts])


def _kept_competitors(tile: Tensor, kept: KeptLogitGrads, chunk: slice, columns: slice, lse: Tensor) -> Tensor:
    """q f' [C, Vb] in `tile`, from what was kept. lse: [C]."""
    reference = kept.reference[chunk, columns.start // kept.columns]
    return tile.copy_(kept.tile(chunk, columns)).mul_(torch.exp(reference - _finite(lse))[:, None])


class _Factors(NamedTuple):
    """dLoss/dx = own f' at the target's x and q (level + per_nat log q) f' elsewhere, with f' less a linear head's
    scale: [N] each."""

    own: Tensor
    level: Tensor
    per_nat: Tensor | None


def _largest(coefficient: Tensor, entropy: EntropyGradient | None, math: _Products) -> Tensor | None:
    """What tiles are divided by, and their products multiplied by; None for 1.

    As fp16 operands, coefficients far below one would underflow in the stored tile; fp32 output takes the scale.
    """
    if math.operand_dtype != torch.float16 or not coefficient.numel():
        return None
    largest = torch.stack([x.abs().amax() for x in (coefficient, *(entropy or ()))]).amax()
    return largest.clamp_min(torch.finfo(math.wide).tiny)


def _factors(coefficient: Tensor, entropy: EntropyGradient | None, chunk: slice, scale: Tensor | float) -> _Factors:
    level = coefficient[chunk] * -scale
    if entropy is None:
        return _Factors(-level, level, None)
    return _Factors(entropy.own[chunk] * scale, level, entropy.per_nat[chunk] * -scale)


def _competitors(
    math: _Products,
    h: Tensor,
    w: Tensor | None,
    columns: slice,
    tile: Tensor,
    spare: Tensor | None,
    lse: Tensor,
    factors: _Factors,
    at: Tensor,
) -> tuple[Tensor, Tensor]:
    """q (level + per_nat log q) f' [C, Vb] in `tile`, from new logits, and f' at the columns `at` [C].

    spare: memory for another tile, for `per_nat`.
    """
    assert w is not None
    z, slope = math.logits(h, w, columns, tile, want_slope=True)
    if spare is None or factors.per_nat is None:
        q = z.sub_(_finite(lse)[:, None]).exp_().mul_(factors.level[:, None])
    else:
        log_q = spare[: z.numel()].view(z.shape)
        torch.sub(z, _finite(lse)[:, None], out=log_q).clamp_(min=LEAST_LOG)
        q = torch.exp(log_q, out=z).mul_(log_q.mul_(factors.per_nat[:, None]).add_(factors.level[:, None]))
    if slope is None:
        return q, torch.ones_like(lse)
    return q.mul_(slope), slope.gather(1, at).squeeze(1)


def _into_gradient(q: Tensor, own: Tensor, at: Tensor, inside: Tensor) -> None:
    """Puts `own` [C] in the place of the targets' entries of q [C, Vb], which were without bound."""
    q.scatter_(1, at, torch.where(inside[:, None], own[:, None], q.gather(1, at)))


def _empty_kept(rows: int, head: Head, block: int) -> KeptLogitGrads:
    v, device = head.weight.shape[0], head.weight.device
    reference = torch.empty(rows, -(-v // block), dtype=head.accumulation_dtype, device=device)
    return KeptLogitGrads(_parts(rows, v, block, head.compute_dtype, device), reference, block)


def _parts(rows: int, v: int, block: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Memory for [rows, v] in parts of whole blocks, each large enough to go back to the system when it is freed."""
    width = block * -(-_PART // (rows * block * dtype.itemsize))
    return [torch.empty(rows, p.stop - p.start, dtype=dtype, device=device) for p in chunks_of(v, width)]


def _follow(reference: Tensor, maximum: Tensor) -> Tensor:
    """The reference for a new block: unchanged while the maximum is within `_SLACK` of it (NaN passes on)."""
    return torch.where(maximum <= reference + _SLACK, reference, torch.maximum(maximum, reference))


def _finite(reference: Tensor) -> Tensor:
    """The reference to subtract: 0 where nothing has been seen yet, as -inf - -inf is NaN."""
    return torch.where(reference == -torch.inf, 0.0, reference)


def _target_columns(y: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Each target's column within a block ([C, 1], clamped) and whether it lies there ([C])."""
    inside = (y >= columns.start) & (y < columns.stop)
    return (y - columns.start).clamp_(0, columns.stop - columns.start - 1)[:, None], inside


def _blocks(n: int, size: int, group: int) -> Iterator[slice]:
    """Slices of at most `size` that cover [0, n) and do not straddle a multiple of `group`."""
    for start in range(0, n, group):
        for begin in range(start, min(start + group, n), size):
            yield slice(begin, min(begin + size, start + group, n))
