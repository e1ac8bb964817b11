"""The gradient of the head by plain torch.

The vocabulary is the outer loop. With L known, a tile's part of the weight's gradient is `G^T h` with
`G = c s (onehot - q) f'` and `q = exp(z - L)`; the products of one block of rows of the weight add up in fp32 and are
rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from orpo_kernels.kernels.interface import EntropyGradient, Head, HeadGradients, KeptLogitGrads, Tokens
from orpo_kernels.kernels.products import chunks_of
from orpo_kernels.kernels.torch_products import Products, finite, target_columns
from orpo_kernels.kernels.torch_statistics import LEAST_LOG
from orpo_kernels.plan import Schedule


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
    math = Products(head, device)
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
    keep_rows = kept.base.shape[0] if kept is not None else 0
    # One group of kept columns shares a base, so blocks must not straddle groups.
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
            target = target_columns(tokens.targets[chunk], columns)
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


def _slopes_of_kept(math: Products, tokens: Tokens, keep_rows: int, step: int) -> Tensor | None:
    """f' at the targets of kept tokens, whose logits are not made again; None where there are none."""
    parts = list(chunks_of(keep_rows, step))
    if not parts:
        return None
    return torch.cat([math.target_logits(math.hidden_rows(tokens, p), tokens.targets[p])[1] for p in parts])


def _kept_competitors(tile: Tensor, kept: KeptLogitGrads, chunk: slice, columns: slice, lse: Tensor) -> Tensor:
    """q f' [C, Vb] in `tile`, from what was kept. lse: [C]."""
    base = kept.base[chunk, columns.start // kept.columns]
    return tile.copy_(kept.tile(chunk, columns)).mul_(torch.exp(base - finite(lse))[:, None])


class _Factors(NamedTuple):
    """dLoss/dx = own f' at the target's x and q (level + per_nat log q) f' elsewhere, with f' less a linear head's
    scale: [N] each."""

    own: Tensor
    level: Tensor
    per_nat: Tensor | None


def _largest(coefficient: Tensor, entropy: EntropyGradient | None, math: Products) -> Tensor | None:
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
    math: Products,
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
        q = z.sub_(finite(lse)[:, None]).exp_().mul_(factors.level[:, None])
    else:
        log_q = spare[: z.numel()].view(z.shape)
        torch.sub(z, finite(lse)[:, None], out=log_q).clamp_(min=LEAST_LOG)
        q = torch.exp(log_q, out=z).mul_(log_q.mul_(factors.per_nat[:, None]).add_(factors.level[:, None]))
    if slope is None:
        return q, torch.ones_like(lse)
    return q.mul_(slope), slope.gather(1, at).squeeze(1)


def _into_gradient(q: Tensor, own: Tensor, at: Tensor, inside: Tensor) -> None:
    """Puts `own` [C] in the place of the targets' entries of q [C, Vb], which were without bound."""
    q.scatter_(1, at, torch.where(inside[:, None], own[:, None], q.gather(1, at)))


def _blocks(n: int, size: int, group: int) -> Iterator[slice]:
    """Slices of at most `size` that cover [0, n) and do not straddle a multiple of `group`."""
    for start in range(0, n, group):
        for begin in range(start, min(start + group, n), size):
            yield slice(begin, min(begin + size, start + group, n))
