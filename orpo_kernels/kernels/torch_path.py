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

import torch
from torch import Tensor

from orpo_kernels.kernels.interface import Forward, Head, HeadGradients, KeptLogitGrads, Tokens
from orpo_kernels.kernels.products import chunks_of, has_mixed_product
from orpo_kernels.plan import MIB, Schedule

# e^8 = 2981 fits fp16 and costs no accuracy; a larger slack would only help inputs no model produces.
_SLACK = 8.0
# The GNU allocator takes what exceeds 32 MiB from the system and gives it back at once; smaller pieces it may hold.
_PART = 33 * MIB


def forward(tokens: Tokens, head: Head, schedule: Schedule, want_u: bool) -> Forward:
    """Log-probability terms of every token; see `interface` for the symbols and shapes."""
    n, d, v = tokens.targets.numel(), head.inner_size, head.weight.shape[0]
    wide, device = head.accumulation_dtype, head.weight.device
    math = _Products(head, device)
    log_odds = torch.empty(n, dtype=wide, device=device)
    lse = torch.empty(n, dtype=wide, device=device)
    # On a CPU u is wide: the sum grows in its place, and the gradient is rounded once.
    u_dtype = wide if device.type == "cpu" else head.compute_dtype
    u = torch.empty(n, d, dtype=u_dtype, device=device) if want_u else None
    block = schedule.forward_block
    kept = _empty_kept(schedule.keep_rows, head, block) if schedule.keep_rows else None

    for chunk in chunks_of(n, schedule.forward_chunk, schedule.keep_rows):
        h = math.hidden_rows(tokens, chunk)
        y = tokens.targets[chunk]
        keep = kept is not None and chunk.start < schedule.keep_rows
        c = y.numel()
        reference = torch.full((c,), -torch.inf, dtype=wide, device=device)
        sums = torch.zeros(c, dtype=wide, device=device)
        z_y = torch.zeros(c, dtype=wide, device=device)
        slope_y = torch.full((c,), head.logit_scale, dtype=wide, device=device)
        # Where u is as wide as the sum of products, the sum grows in its place.
        total = None
        if u is not None:
            total = u[chunk] if u.dtype == wide else torch.empty(c, d, dtype=wide, device=device)
            total.zero_()
        tile = math.tile_buffer(c, min(block, v))

        for group, columns in enumerate(chunks_of(v, block)):
            w = math.weight_rows(columns)
            # Where kept values are as wide as logits, the tile is made in their place.
            own = kept.tile(chunk, columns) if keep and kept is not None and head.compute_dtype == wide else None
            z, slope = math.logits(h, w, columns, tile if own is None else own, want_slope=want_u or keep)
            at, inside = _target_columns(y, columns)
            z_at = z.gather(1, at)
            z_y = torch.where(inside, z_at.squeeze(1), z_y)
            z.scatter_(1, at, z_at.masked_fill(inside[:, None], -torch.inf))
            if slope is not None:
                slope_y = torch.where(inside, slope.gather(1, at).squeeze(1), slope_y)

            new_reference = _follow(reference, z.amax(1))
            e = z.sub_(_finite(new_reference)[:, None]).exp_()
            decay = torch.exp(reference - _finite(new_reference))
            sums = sums * decay + e.sum(1)
            if slope is not None:
                e.mul_(slope)
            if keep and kept is not None:
                if own is None:
                    kept.tile(chunk, columns).copy_(e)
                kept.reference[chunk, group] = _finite(new_reference)
            if total is not None:
                # On a GPU asking whether anything moved would wait for the device.
                if total.is_cuda or not torch.equal(reference, new_reference):
                    total.mul_(decay[:, None])
                math.add_product(total, e, w)
            reference = new_reference
            # Python would hold these until the next block's are there.
            del w, z, e, slope

        # No competitor at all (V = 1): L = -inf, the target is certain, and q is 0.
        lse[chunk] = _finite(reference) + torch.log(sums)
        # A target's logit of +inf is an overflow, not certainty.
        log_odds[chunk] = torch.where(z_y == torch.inf, torch.nan, z_y - lse[chunk])
        del h, tile
        if u is not None and total is not None:
            inverse = torch.where(sums == 0, 0.0, 1.0 / sums)
            if head.softcap is None:
                inverse = inverse * head.logit_scale
            total.mul_(inverse.neg_()[:, None])
            math.add_target_rows(total, y, slope_y)
            if u.dtype != wide:
                u[chunk] = total
        del total
    return Forward(log_odds, lse, u, kept)


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
    # fp16 operands: coefficients far below one would underflow in the stored tile; fp32 output takes the scale.
    largest = None
    if math.operand_dtype == torch.float16:
        largest = coefficient.abs().amax().clamp_min(torch.finfo(wide).tiny) if n else None
        coefficient = coefficient if largest is None else coefficient / largest
    keep_rows = kept.reference.shape[0] if kept is not None else 0
    if head.softcap is None:
        coefficient = coefficient * head.logit_scale
    # One group of kept columns shares a reference, so blocks must not straddle groups.
    block = schedule.backward_block if kept is None else min(schedule.backward_block, kept.columns)
    chunk_size = max(schedule.backward_chunk, 1)
    tile = math.tile_buffer(min(chunk_size, n), min(block, v))
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
            if kept is not None and chunk.start < keep_rows:
                slope_at = torch.ones_like(coefficient[chunk]) if slope_y is None else slope_y[chunk]
                q = _kept_competitors(math.tile(tile, h.shape[0], width), kept, chunk, columns, lse[chunk])
            else:
                q, slope_at = _competitors(math, h, w, columns, tile, lse[chunk], target[0])
            _into_gradient(q, slope_at, coefficient[chunk], *target)
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

    def target_slope(self, h: Tensor, y: Tensor) -> Tensor:
        """f' at the target's logit under a soft-cap, from a row dot."""
        head = self.head
        assert head.softcap is not None
        x = (h.to(self.wide) * self.target_rows(y)).sum(1)
        if head.bias is not None:
            x += head.bias.index_select(0, y).to(head.compute_dtype).to(self.wide)
        return head.logit_scale * (1 - torch.tanh(x * (head.logit_scale / head.softcap)).square())


def _slopes_of_kept(math: _Products, tokens: Tokens, keep_rows: int, step: int) -> Tensor | None:
    """f' at the targets of kept tokens, whose logits are not made again; None where there are none."""
    parts = list(chunks_of(keep_rows, step))
    if not parts:
        return None
    return torch.cat([math.target_slope(math.hidden_rows(tokens, p), tokens.targets[p]) for p in parts])


def _kept_competitors(tile: Tensor, kept: KeptLogitGrads, chunk: slice, columns: slice, lse: Tensor) -> Tensor:
    """q f' [C, Vb] in `tile`, from what was kept. lse: [C]."""
    reference = kept.reference[chunk, columns.start // kept.columns]
    return tile.copy_(kept.tile(chunk, columns)).mul_(torch.exp(reference - _finite(lse))[:, None])


def _competitors(
    math: _Products, h: Tensor, w: Tensor | None, columns: slice, tile: Tensor, lse: Tensor, at: Tensor
) -> tuple[Tensor, Tensor]:
    """q f' [C, Vb] in `tile`, from new logits, and f' at the columns `at` [C]; f' without the logit scale."""
    assert w is not None
    q, slope = math.logits(h, w, columns, tile, want_slope=True)
    q.sub_(_finite(lse)[:, None]).exp_()
    if slope is None:
        return q, torch.ones_like(lse)
    return q.mul_(slope), slope.gather(1, at).squeeze(1)


def _into_gradient(q: Tensor, slope_at: Tensor, c_s: Tensor, at: Tensor, inside: Tensor) -> None:
    """c s (onehot - q) f' in the place of q f' [C, Vb], whose target's entry was e^(z_y - L), without bound."""
    q.scatter_(1, at, torch.where(inside[:, None], -slope_at[:, None], q.gather(1, at)))
    q.mul_(-c_s[:, None])


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
