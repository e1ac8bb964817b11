"""Whether a model may have packed rows, or rows with each prompt once: asked of the model, not of a list of names.

A layout is admitted when nothing but attention looks at other tokens (what the configuration and the modules tell),
and when a trial on the first batch shows that the attention function is reached once a layer, with the window that
the configuration gives that layer, and that log-probabilities are those of padded rows. A model that fails falls
back from shared to packed to padded rows, and one warning says why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ..batches import FlatBatch, SequenceBatch
from ..head.lora import virtual_tokens
from ..lm_head import ModelLogps
from .attention import UnsupportedLayout, restore_attention, stand_in_mask, transformers_model, use_packed_attention
from .layout import Layout, Name
from .sequences import SequenceLayout

logger = logging.getLogger("orpo_kernels")

ORDER: tuple[Name, ...] = ("shared", "packed", "padded")
Batch = TypeVar("Batch", FlatBatch, SequenceBatch)
_LAYERS = {"full_attention", "sliding_attention", "attention"}
# Mean difference of a token's log-probability, nats: several times what another order of the same sums makes of it.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 3e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def model_inputs(batch: FlatBatch | SequenceBatch) -> dict[str, Any]:
    """What the model is called with for a batch of a layout, beside `use_cache=False`."""
    layout: Layout | SequenceLayout = batch["layout"]
    if layout.segments is None:
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    return {
        "input_ids": batch["input_ids"],
        "position_ids": batch["position_ids"],
        "attention_mask": stand_in_mask(batch["input_ids"].device),
        "segments": layout.segments,
    }


class LayoutGate:
    """Admits batches of layouts to the model behind `logps`.

    everywhere: turns this process's verdict into that of all of them; by default there is only one.
    asked_for: whether the user chose the layout, and is to be warned where it cannot be had.

    name: the layout decided on, None before the first batch. reasons: why more demanding ones were refused.
    """

    def __init__(self, logps: ModelLogps, everywhere: Callable[[bool], bool] = bool, *, asked_for: bool = True) -> None:
        self.logps = logps
        self.everywhere = everywhere
        self.asked_for = asked_for
        self.name: Name | None = None
        self.reasons: list[str] = []

    def admit(self, batch: Batch, model: Callable[..., Any] | None = None) -> Batch:
        """The batch, in a layout that the model can have; the first one decides.

        batch: as `layout.pack_pairs` or `sequences.lay_out_sequences` makes it.
        model: the wrapped model to call, as for `ModelLogps.logps`.

        Where processes share the work, all of them make the call.
        """
        layout: Any = batch["layout"]
        if self.name is None:
            self.name = self._decide(batch, model)
        if ORDER.index(layout.name) >= ORDER.index(self.name):
            return batch
        return on_device(layout.laid_out_as(self.name), batch["input_ids"].device)

    def decline(self, wanted: Name, reason: str) -> None:
        """Decide on padded rows, for a reason that no model has."""
        self.reasons.append(f"{wanted}: {reason}")
        self.name = self._fall_back(wanted, "padded")

    def _decide(self, batch: FlatBatch | SequenceBatch, model: Callable[..., Any] | None) -> Name:
        wanted: Name = batch["layout"].name
        if wanted == "padded":
            return "padded"
        reason = refusal(self.logps.model)
        if reason is not None:
            self.decline(wanted, reason)
            return "padded"
        for name in ORDER[ORDER.index(wanted) : -1]:
            reason = self._trial(batch, name, model)
            if self.everywhere(reason is None):
                use_packed_attention(self.logps.model)
                return self._fall_back(wanted, name)
            self.reasons.append(f"{name}: {reason or 'refused by another process'}")
        return self._fall_back(wanted, "padded")

    def _fall_back(self, wanted: Name, name: Name) -> Name:
        if name != wanted:
            reasons = "; ".join(self.reasons)
            level = logging.WARNING if self.asked_for else logging.INFO
            logger.log(level, "batches are %s, not %s: the model does not allow it (%s)", name, wanted, reasons)
        return name

    def _trial(self, batch: FlatBatch | SequenceBatch, name: Name, model: Callable[..., Any] | None) -> str | None:
        """Why the model cannot have this layout, or None. It attends as before afterwards."""
        device = batch["input_ids"].device
        few: Any = batch["layout"].few()
        right: Any = on_device(few.laid_out_as("padded"), device)
        laid: Any = on_device(few.laid_out_as(name), device)
        calls: list[tuple[int | None, int | None]] = []
        laid["layout"] = replace(laid["layout"], segments=replace(laid["layout"].segments, calls=calls))
        inner = transformers_model(self.logps.model)
        before = inner.config._attn_implementation
        try:
            use_packed_attention(self.logps.model)
            found = self._logps_of(laid, model)
        except torch.OutOfMemoryError:
            raise
        except UnsupportedLayout as error:
            return str(error)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            # A model that was not written for such rows may stumble over them anywhere.
            return f"{type(error).__name__}: {error}"
        finally:
            restore_attention(self.logps.model, before)
        expected = self._logps_of(right, model)
        return _wrong_calls(calls, inner.config.get_text_config(decoder=True)) or _disagreement(found, expected, inner)

    def _logps_of(self, batch: FlatBatch | SequenceBatch, model: Callable[..., Any] | None) -> Tensor:
        with torch.no_grad():
            logps, _ = self.logps.logps(
                batch["targets"], rows=batch["rows"], model=model, use_cache=False, **model_inputs(batch)
            )
        return logps


def refusal(model: nn.Module) -> str | None:
    """Why a model's configuration and modules rule packed rows out, or None."""
    reason = mixing(model)
    if reason is None and any(_drops(module) for module in model.modules()):
        return "dropout is on: it would fall otherwise on a prompt that is there once"
    return reason


def mixing(model: nn.Module) -> str | None:
    """What beside attention looks at other tokens than a position's own, or None; and why that cannot be known."""
    with suppress(UnsupportedLayout):
        inner = transformers_model(model)
        config: Any = inner.config.get_text_config(decoder=True)
        if inner.config.is_encoder_decoder:
            return "an encoder reads the prompt"
        kinds = {*(getattr(config, "layer_types", None) or ()), *(getattr(config, "layers_block_type", None) or ())}
        if kinds - _LAYERS:
            return f"its layers are {', '.join(sorted(kinds))}"
        if any(getattr(module, "_is_stateful", False) for module in inner.modules()):
            return "it carries a state from token to token"
        if any(isinstance(module, nn.Conv1d) for module in inner.modules()):
            return "it convolves over tokens"
        if getattr(config, "output_router_logits", False):
            return "its router's loss counts tokens, which each layout has another number of"
        virtual = virtual_tokens(model)
        if virtual:
            return f"PEFT's prompt tuning puts {virtual} positions of its own before every row"
        return None
    return "it is not a transformers model"


def _drops(module: nn.Module) -> bool:
    rate = module.p if isinstance(module, nn.Dropout) else getattr(module, "attention_dropout", 0.0)
    return isinstance(rate, float) and rate > 0


def _wrong_calls(calls: list[tuple[int | None, int | None]], config: Any) -> str | None:
    layers: int = config.num_hidden_layers
    if not calls or len(calls) % layers:
        return f"its {layers} layers called the attention function {len(calls)} times"
    for at, (index, window) in enumerate(calls):
        layer = at % layers if index is None else index
        expected = window_of(config, layer)
        if layer != at % layers:
            return f"layer {layer} called the attention function in the place of layer {at % layers}"
        if window != expected:
            return f"layer {layer} attends within a window of {window} where the configuration says {expected}"
    return None


def window_of(config: Any, layer: int) -> int | None:
    """How far back a layer attends, by a model's configuration; None for all the way."""
    window: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return window if kinds[layer] == "sliding_attention" else None
    return window if getattr(config, "use_sliding_window", True) else None


def _disagreement(found: Tensor, expected: Tensor, inner: Any) -> str | None:
    device = found.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else inner.dtype
    if dtype == torch.float32 and found.is_cuda and torch.get_float32_matmul_precision() != "highest":
        dtype = torch.float16  # TF32 has as many bits
    error = float((found - expected).abs().mean()) if found.numel() else 0.0
    if error <= _TOLERANCE.get(dtype, _TOLERANCE[torch.bfloat16]):
        return None
    return f"log-probabilities differ from padded rows by {error:.2g} nats a token"


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`."""
    tensors = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    return cast(Batch, tensors)
