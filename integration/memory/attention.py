"""`scaled_dot_product_attention` as a device would run it, on fake tensors.

What torch chooses depends on the device, which is not there. So the call is met before it is dispatched, and answered
by something with the memory of the chosen kernel:

    flash       saves query, key, value, its result and a number a row and head; no mask
    efficient   the same and the mask, which torch turns into one of the query's dtype, a copy a call; as many heads of
                keys as of queries
    explicit    the scores [B, H, T, T], written out (torch's "math")

On a GPU flash and efficient need 16 bits and any dtype; on a CPU flash serves everything, masks too. (cuDNN's kernel,
which torch may choose on a GPU, keeps what flash and efficient keep.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..packing import attention as packed
from ..packing import kernels

_TORCHS_OWN = F.scaled_dot_product_attention
_HALF = (torch.float16, torch.bfloat16)
_ALIGNED = 8  # entries of a mask's rows on a GPU


class _Fused(torch.autograd.Function):
    """Query [..., H, T, E], key [..., H_kv, K, E], value [..., H_kv, K, E_v] -> [..., H, T, E_v]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, widens: bool) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, bias, out, sums)
        ctx.widens = widens
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, _, _, sums = ctx.saved_tensors
        # A GPU's kernel adds the query's gradient up in fp32, and a group's keys and values apart.
        scratch = [torch.empty_like(sums)]
        if ctx.widens:
            scratch.append(torch.empty_like(query, dtype=torch.float32))
            if key.shape[-3] != query.shape[-3]:
                scratch += [query.new_empty(*query.shape[:-2], *x.shape[-2:]) for x in (key, value)]
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None, None


def _scaled_dot_product_attention(
    device: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
    same_width = query.shape[-1] == value.shape[-1]
    grouped = query.shape[-3] != key.shape[-3]
    if device == "cpu":
        fused = same_width and dropout_p == 0.0
    else:
        flash = query.dtype in _HALF and attn_mask is None and same_width and query.shape[-1] <= 256
        fused = flash or not grouped
    if not fused:
        with sdpa_kernel(SDPBackend.MATH):
            return _TORCHS_OWN(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    bias = attn_mask
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        width = attn_mask.shape[-1]
        if device != "cpu":
            width = -(-width // _ALIGNED) * _ALIGNED
        bias = query.new_empty(*attn_mask.shape[:-1], width)
    return _Fused.apply(query, key, value, bias, device != "cpu" and query.dtype in _HALF)


def _varlen(query: Tensor, key: Tensor, value: Tensor, *places: Any, **options: Any) -> Tensor:
    """FlashAttention's variable-length function: [N, H, E], [K, H_kv, E], [K, H_kv, E] -> [N, H, E]."""
    heads_first = (x.transpose(0, 1) for x in (query, key, value))
    return _Fused.apply(*heads_first, None, True).transpose(0, 1)


def _attend_flash(
    module: Any, query: Tensor, key: Tensor, value: Tensor, segments: Any, softcap: Any, sinks: Any, options: Any
) -> Tensor:
    return kernels.flash(query, key, value, segments, 1.0, options["sliding_window"], softcap)


@contextmanager
def attention_as_run(device: str) -> Iterator[None]:
    """device: "cpu" or "cuda". Packed rows there go through FlashAttention, whether or not it is installed here."""
    with ExitStack() as stack:
        answer = partial(_scaled_dot_product_attention, device)
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", answer))
        if device != "cpu":
            module = SimpleNamespace(flash_attn_varlen_func=_varlen)
            stack.enter_context(mock.patch.dict("sys.modules", {"flash_attn": module}))
            stack.enter_context(mock.patch.object(packed, "_attend", _attend_flash))
        yield
