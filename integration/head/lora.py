"""Low-rank adapters on the head (PEFT's LoRA), taken into its product exactly.

    W h + b + sum_i s_i (B_i a_i + c_i)  =  [W | B_1 | B_2 ..] [h | s_1 a_1 | s_2 a_2 ..] + (b + sum_i s_i c_i)

with a_i = A_i(dropout_i(h)): the head's own product with a few more columns, whose gradients belong to the B_i.
Neither a product B_i A_i [V, D] nor logits are made; [h | s a] is a copy of the hidden states.

As in any mixed product, the operands are rounded to what the head multiplies in: fp32 adapters on a bf16 head
(PEFT's default) enter it as bf16, sums stay fp32, and the gradients come back in fp32.

The layers are called as modules, each B_i around what comes after it:

    LoRA layer(h)  ->  a_i = A_i(dropout_i(h))  ->  B_1( s_1 a_1  ->  B_2( s_2 a_2  ->  base layer(h) ) )

so that whatever wraps one (FSDP, ZeRO, offloading) has gathered its weight by then; and since the base layer's
answer passes out through all of them, their hooks gather the weights again before the head's backward.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Step(NamedTuple):
    """A layer on the way to the base layer (the last), and what to call it with. scale: of its own bias."""

    layer: nn.Module
    input: Tensor
    scale: float = 1.0


class LowRank(NamedTuple):
    """What an adapter adds to the logits: inner [..., r] times weight [V, r], and scale times bias [V]."""

    inner: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: float


def virtual_tokens(model: nn.Module, *, cached: bool = False) -> int:
    """How many positions PEFT's prompt tuning or p-tuning puts before every row; 0 without them.

    cached: count those too that prefix tuning puts into the cache, where no row grows by them.
    """
    if "peft" not in sys.modules:
        return 0
    from peft import PeftModel, PeftType

    wrapper = next((module for module in model.modules() if isinstance(module, PeftModel)), None)
    if wrapper is None or not wrapper.active_peft_config.is_prompt_learning:
        return 0
    if getattr(wrapper, "_adapters_disabled", False):
        return 0
    counted = {PeftType.PROMPT_TUNING, PeftType.P_TUNING, PeftType.MULTITASK_PROMPT_TUNING}
    counted |= {PeftType.PREFIX_TUNING} if cached else set()
    config: Any = wrapper.active_peft_config
    return config.num_virtual_tokens if config.peft_type in counted else 0


def layer_inside(layer: Any) -> nn.Module | None:
    """The layer that one of PEFT's calls in its present state; None if it is none of PEFT's.

    Raises ValueError where an active adapter is not plain LoRA.
    """
    if "peft" not in sys.modules:
        return None
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    if isinstance(layer, ModulesToSaveWrapper):
        names = layer.active_adapters
        disabled = layer.disable_adapters or not names
        return layer.original_module if disabled else layer.modules_to_save[names[0]]
    if isinstance(layer, BaseTunerLayer):
        active_adapters(layer)
        return vars(layer)["_modules"]["base_layer"]
    return None


def active_adapters(layer: Any) -> list[str]:
    """The adapters that a tuner's layer adds to its base layer; raises ValueError where one is not plain LoRA."""
    from peft.tuners.lora import Linear

    if layer.disable_adapters or layer.merged:
        return []
    present = layer._get_available_adapters()
    names = [name for name in layer.active_adapters if name in present]
    kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
    # FSDP makes a class of its own of the layer's.
    plain = isinstance(layer, Linear) and type(layer).forward is Linear.forward
    for name in names:
        if not plain or name in layer.lora_variant:
            variant = f" with {type(layer.lora_variant[name]).__name__}" if plain else ""
            raise ValueError(
                f"the head has the adapter {name!r}, a {kind}{variant}: only plain LoRA on a plain linear layer is "
                "exact here. Use that on the head, leave the head out of target_modules, train it whole "
                "(modules_to_save), or merge the adapter"
            )
    return names


def low_rank_steps(layer: Any, hidden: Tensor) -> list[Step]:
    """The calls from a LoRA layer to its base layer, the last one first; none where no adapter is active."""
    names = active_adapters(layer)
    if not names:
        return []
    steps = [Step(layer.base_layer, hidden)]
    for name in names:
        # As PEFT's own forward has it: each adapter sees what the one before it has cast.
        hidden = layer._cast_input_dtype(hidden, layer.lora_A[name].weight.dtype)
        scale = layer.scaling[name]
        inner = layer.lora_A[name](layer.lora_dropout[name](hidden)) * scale
        steps.append(Step(layer.lora_B[name], inner, scale))
    return [steps[0], *reversed(steps[1:])]


def join_adapters(
    hidden: Tensor, bias: Tensor | None, adapters: list[LowRank]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(hidden [..., D + r], bias, adapter [V, r]) of the product above; adapter is None where there are none."""
    if not adapters:
        return hidden, bias, None
    for adapter in adapters:
        if adapter.bias is not None:
            added = adapter.bias * adapter.scale
            bias = added.to(hidden.dtype) if bias is None else (bias + added).to(bias.dtype)
    joined = torch.cat([hidden, *(adapter.inner.to(hidden.dtype) for adapter in adapters)], -1)
    weights = [adapter.weight for adapter in adapters]
    return joined, bias, weights[0] if len(weights) == 1 else torch.cat(weights, 1)
