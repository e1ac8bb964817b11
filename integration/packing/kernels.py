"""Segment attention by one kernel for the whole batch: FlashAttention's variable-length function, flex_attention.

Both take what `segments.Segments` derives: FlashAttention the places of each segment's keys, gathered so that a
prefix stands before every segment that sees it, and causal at the bottom right; flex_attention a mask by places.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from .segments import Segments


@cache
def flash_is_installed() -> bool:
    try:
        importlib.import_module("flash_attn")
    except ImportError:  # missing, or built for another torch
        return False
    return True


def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """query [rows, H, T, E], key, value [rows, H_kv, T, E] -> [rows, T, H, E], zeros where a row is filled up."""
    from flash_attn import flash_attn_varlen_func

    rows, heads, length, width = query.shape
    plan = segments.varlen(query.device)
    flat_query, flat_key, flat_value = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    out = flash_attn_varlen_func(
        flat_query.index_select(0, plan.queries),
        flat_key.index_select(0, plan.keys),
        flat_value.index_select(0, plan.keys),
        plan.cu_queries,
        plan.cu_keys,
        plan.max_queries,
        plan.max_keys,
        softmax_scale=scaling,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        softcap=softcap or 0.0,
    )
    whole = out.new_zeros(rows * length, heads, width).index_copy(0, plan.queries, out)
    return whole.view(rows, length, heads, width)


def flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """The same; sinks: [H]. What fills a row up attends to itself, and is set to zero."""
    table = segments.ranges(query.device)
    block_mask = segments.once(("block mask", query.device, window), lambda: _block_mask(table, window))

    def capped(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    out, aux = _flex(query.is_cuda)(
        query,
        key,
        value,
        score_mod=None if softcap is None else capped,
        block_mask=block_mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    if sinks is not None:
        # A sink takes exp(s) of the softmax's sum: what is left is 1 / (1 + exp(s - lse)).
        out = out * torch.sigmoid(aux.lse - sinks[:, None].to(aux.lse))[..., None].to(out.dtype)
    return out.masked_fill(_is_fill(segments, query.device)[:, None, :, None], 0).transpose(1, 2)


def _is_fill(segments: Segments, device: torch.device) -> Tensor:
    """[rows, T] bool."""

    def make() -> Tensor:
        used = torch.tensor([sum(segment.length for segment in row) for row in segments.by_row])
        return (torch.arange(segments.length) >= used[:, None]).to(device)

    return segments.once(("fill", device), make)


def _block_mask(table: Tensor, window: int | None) -> BlockMask:
    start, prefix_start, prefix_stop, shift = table.unbind(0)

    def mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own = (k >= start[b, q]) & (k <= q)
        prefix = (k >= prefix_start[b, q]) & (k < prefix_stop[b, q])
        seen = own | prefix
        if window is None:
            return seen
        # A key's place among the query's keys: the prefix first, then the segment.
        place = torch.where(own, k - shift[b, q], k - prefix_start[b, q])
        return seen & (q - shift[b, q] - place < window)

    rows, length = start.shape
    return create_block_mask(mask, rows, None, length, length, device=str(table.device))


@cache
def _flex(compiled: bool) -> Any:
    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention
