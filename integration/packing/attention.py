"""Attention over packed rows, for any model that reaches its attention through transformers' `AttentionInterface`.

`use_packed_attention(model)` puts this function in the place of the model's attention. A call that brings `segments`
(a keyword argument of the model's forward, which hands it on) attends within segments; any other call does what
the model did before, generation included, so the exchange can stay. The layout travels with the call, not with the
model: a checkpointed layer that is computed again in the backward finds it in its own arguments.

Models build a mask before their first layer. `MASK`, an empty 4-D tensor, stands in for one: a mask of four
dimensions is taken to be finished and handed down as it is, so no [T, T] mask is ever made, and an attention that
is given it without `segments` knows that they have been lost on the way.

Backends, all with sliding windows and grouped heads:

    sdpa      a `scaled_dot_product_attention` a segment; any device and dtype
    explicit  the same with the scores written out, for a soft-cap or sinks (a learned score that attends to nothing)
    flash     FlashAttention's variable-length function: CUDA, fp16 and bf16, where flash_attn is installed; no sinks
    flex      `flex_attention` with a block mask: CUDA, where the explicit scores would need [T, T] memory
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .kernels import flash, flash_is_installed, flex
from .segments import Segments

# By what stands behind them for calls without segments. Neither holds the word "sdpa" or "flash", by which
# transformers would take it for one of its own.
SCALED, EAGER = "orpo_segments", "orpo_segments_eager"
NAMES = (SCALED, EAGER)


class UnsupportedLayout(RuntimeError):
    """The model does something that segments of packed rows cannot have exactly."""


def stand_in_mask(device: torch.device | str | None = None) -> Tensor:
    """What to pass as `attention_mask` beside `segments`."""
    return torch.empty(1, 1, 0, 0, dtype=torch.bool, device=device)


def use_packed_attention(model: nn.Module) -> str:
    """Let `model`, under whatever wraps it, attend through this function; returns what `restore` needs.

    Raises UnsupportedLayout where its attention does not go through transformers' interface.
    """
    inner = transformers_model(model)
    before: str = inner.config._attn_implementation
    if before in NAMES:
        return before
    name = EAGER if before == "eager" or not inner._supports_sdpa else SCALED
    if inner._can_set_attn_implementation():
        inner.set_attn_implementation(name)
    if inner.config._attn_implementation != name:
        raise UnsupportedLayout(f"the attention of {type(inner).__name__} does not go through AttentionInterface")
    return before


def restore_attention(model: nn.Module, before: str) -> None:
    """Let `model` attend as `use` found it."""
    inner = transformers_model(model)
    if inner.config._attn_implementation != before:
        inner.set_attn_implementation(before)


def transformers_model(model: nn.Module) -> PreTrainedModel:
    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if inner is None:
        raise UnsupportedLayout(f"{type(model).__name__} is not a transformers model")
    return inner


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Any]:
    """An attention function as transformers calls them.

    query [rows, H, T, E], key [rows, H_kv, T, E], value [rows, H_kv, T, E_v]; returns [rows, T, H, E_v], zeros where
    a row is filled up, and None. sliding_window: keys a query sees, itself included. softcap: c in
    c tanh(score / c). s_aux: [H], each head's sink.

    Raises UnsupportedLayout for what it cannot do exactly.
    """
    if segments is None:
        if attention_mask is not None and attention_mask.dim() == 4 and not attention_mask.numel():
            raise UnsupportedLayout(f"{type(module).__name__} is not handed the model's keyword arguments")
        options |= {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window}
        options |= {"softcap": softcap} if softcap is not None else {}
        options |= {"s_aux": s_aux} if s_aux is not None else {}
        return _usual(module)(module, query, key, value, attention_mask, **options)
    given = options | {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window}
    return _attend(module, query, key, value, segments, softcap, s_aux, given), None


# Lengths are data: a graph of them would be of use for one batch.
@torch.compiler.disable
def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    softcap: float | None,
    sinks: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    _check(module, query, key, segments, options)
    window: int | None = options["sliding_window"]
    if segments.calls is not None:
        segments.calls.append((getattr(module, "layer_idx", None), window))
    scaling: float = query.shape[-1] ** -0.5 if options["scaling"] is None else options["scaling"]
    half = query.dtype in (torch.float16, torch.bfloat16)
    fits = query.shape[-1] == value.shape[-1] <= 256 and sinks is None
    if query.is_cuda and half and fits and flash_is_installed():
        return flash(query, key, value, segments, scaling, window, softcap)
    if query.is_cuda and (softcap is not None or sinks is not None):
        return flex(query, key, value, segments, scaling, window, softcap, sinks)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = _mask(q.shape[1], k.shape[1], window, segments, q.device)
        if softcap is None and sinks is None:
            return _scaled(q, k, v, mask, scaling)
        return _explicit(q, k, v, mask, scaling, softcap, sinks)

    return _by_segment(query, key, value, segments, attend)


def _check(module: nn.Module, query: Tensor, key: Tensor, segments: Segments, options: dict[str, Any]) -> None:
    if options["dropout"]:
        raise UnsupportedLayout(f"attention dropout is on ({options['dropout']})")
    if not getattr(module, "is_causal", True) or options.get("is_causal") is False:
        raise UnsupportedLayout(f"{type(module).__name__} is not causal")
    places = (segments.rows, segments.length)
    if (query.shape[0], query.shape[2]) != places or (key.shape[0], key.shape[2]) != places:
        raise UnsupportedLayout(
            f"{type(module).__name__} attends from {list(query.shape)} to {list(key.shape)}, not within rows of "
            f"{list(places)}: a cache, a virtual prompt, or another sequence"
        )
    biases = [name for name, value in options.items() if isinstance(value, Tensor) and value.is_floating_point()]
    if biases:
        raise UnsupportedLayout(f"{type(module).__name__} adds {', '.join(biases)} to its attention")


def _usual(module: nn.Module) -> Callable[..., tuple[Tensor, Any]]:
    """What the model's attention would have called without us."""
    if module.config._attn_implementation == SCALED:  # type: ignore[union-attr]
        return ALL_ATTENTION_FUNCTIONS["sdpa"]
    # A wrapper (FSDP2) may have put a class of its own over the model's.
    homes = [sys.modules[cls.__module__] for cls in type(module).__mro__]
    eager = next((home.eager_attention_forward for home in homes if hasattr(home, "eager_attention_forward")), None)
    if eager is None:
        raise UnsupportedLayout(f"{type(module).__name__} has no eager attention to go back to")
    return eager


def _by_segment(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """attend([H, L, E], [H_kv, K, E], [H_kv, K, E_v]) -> [H, L, E_v] on every segment: [rows, T, H, E_v]."""
    rows = []
    # Split rather than slice: its backward joins the parts, where that of every slice would fill a whole row.
    for q, k, v, row in zip(query.unbind(0), key.unbind(0), value.unbind(0), segments.by_row, strict=True):
        sizes = [segment.length for segment in row]
        fill = segments.length - sum(sizes)
        (*queries, _), (*keys, _), (*values, _) = (part.split([*sizes, fill], dim=1) for part in (q, k, v))
        parts, leader = [], 0
        for at, segment in enumerate(row):
            own_keys, own_values = keys[at], values[at]
            if segment.prefix:
                own_keys = torch.cat([keys[leader][:, : segment.prefix], own_keys], dim=1)
                own_values = torch.cat([values[leader][:, : segment.prefix], own_values], dim=1)
            else:
                leader = at
            parts.append(attend(queries[at], own_keys, own_values).transpose(0, 1))  # [L, H, E_v]
        parts.append(value.new_zeros(fill, query.shape[1], value.shape[-1]))
        rows.append(torch.cat(parts))
    return rows[0][None] if len(rows) == 1 else torch.stack(rows)


def _mask(queries: int, keys: int, window: int | None, segments: Segments, device: torch.device) -> Tensor | None:
    """[queries, keys] bool, causal at the bottom right within the window; None for plain causal."""
    if window is not None and window >= keys:
        window = None
    if queries == keys and window is None:
        return None

    def make() -> Tensor:
        place = torch.arange(keys, device=device)
        own = place[keys - queries :, None]
        mask = place <= own
        return mask if window is None else mask & (place > own - window)

    return segments.once((queries, keys, window, device), make)


def _scaled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    groups = q.shape[0] // k.shape[0]
    half = q.dtype in (torch.float16, torch.bfloat16)
    if groups > 1 and q.device.type != "cpu" and (mask is not None or not half):
        # Only the kernels of 16 bits without a mask know groups there; else all scores would be written out.
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    grouped = q.shape[0] != k.shape[0]
    return F.scaled_dot_product_attention(
        q[None], k[None], v[None], attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
    )[0]


def _explicit(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    heads, length, _ = q.shape
    grouped = q.unflatten(0, (k.shape[0], -1))  # [H_kv, H / H_kv, L, E]
    scores = (grouped @ k[:, None].transpose(-1, -2)) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    wide = torch.promote_types(q.dtype, torch.float32)
    if mask is None:
        mask = scores.new_ones(length, length, dtype=torch.bool).tril()
    scores = scores.to(wide).masked_fill(~mask, -torch.inf)
    if sinks is not None:
        column = sinks.to(wide).view(k.shape[0], -1, 1, 1).expand(-1, -1, length, 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(-1)[..., : k.shape[1]].to(v.dtype)
    return (weights @ v[:, None]).reshape(heads, length, -1)


AttentionInterface.register(SCALED, segment_attention)
AttentionInterface.register(EAGER, segment_attention)
# For calls without segments; with them no mask is made.
AttentionMaskInterface.register(SCALED, sdpa_mask)
AttentionMaskInterface.register(EAGER, eager_mask)
