"""Putting a function in the place of a head's forward, and taking it out again without a trace.

The function is set as a bound method on the one module, in the slot that whatever wraps the head calls last:
`forward`, or `_old_forward` beneath accelerate's hook (offloaded weights have arrived there). The class stays
what it was, so that FSDP2, which makes a class of its own, and code that compares types see a plain nn.Linear.
A deep copy binds the method to the copy; a pickled copy falls back to the class's forward.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .lora import active_adapters, layer_inside

# In the order in which they are called: beneath accelerate's hook, `forward` is the hook's.
_SLOTS = ("_old_forward", "forward")
# What stood in the slot, where it was more than the class's own forward.
_DISPLACED = "_forward_without_orpo"
_LAYERS_INSIDE = ("_orig_mod", "_fsdp_wrapped_module")


def bare_model(model: nn.Module) -> Any:
    """The model beneath its wrappers; raises ValueError if none of them has `get_output_embeddings`."""
    bare: Any = model
    while not hasattr(bare, "get_output_embeddings"):
        inner = getattr(bare, "_orig_mod", None) or getattr(bare, "module", None)
        if not isinstance(inner, nn.Module):
            raise ValueError(f"{type(model).__name__} has no get_output_embeddings(): give a causal language model")
        bare = inner
    return bare


def find_head(model: nn.Module) -> nn.Linear:
    """The linear layer that makes the logits, beneath whatever wraps it; raises ValueError if there is none."""
    return head_and_adapters(model)[0]


def head_and_adapters(model: nn.Module) -> tuple[nn.Linear, list[nn.Module]]:
    """The same, and PEFT's layers around it, the outermost first."""
    bare = bare_model(model)
    layer = found = bare.get_output_embeddings()
    adapters = []
    while not isinstance(layer, nn.Linear):
        inner = layer_inside(layer)
        if inner is not None:
            adapters.append(layer)
        elif isinstance(layer, nn.Module):
            inner = _inside_wrapper(layer)
        if inner is None and type(layer).__name__ == "TrainableTokensWrapper":
            raise ValueError(
                "trainable_token_indices reach the head (its own, or the embeddings' that it is tied to), which would "
                "then be no plain nn.Linear: untie it (tie_word_embeddings=False), or train all rows with "
                "modules_to_save=['embed_tokens'] and ensure_weight_tying=True"
            )
        if inner is None:
            raise ValueError(
                f"the head of {type(bare).__name__} is {type(found).__name__}: only a plain nn.Linear head is exact "
                "here. Put adapters and checkpoint wrappers on other layers than the head"
            )
        layer = inner
    return layer, adapters


def patch_adapters(layers: list[nn.Module], forward: Callable[..., Tensor]) -> None:
    """`patch` the LoRA layers among PEFT's around a head, and what their active adapters end in."""
    for layer in layers:
        factors: Any = getattr(layer, "lora_B", None)
        for name in [] if factors is None else active_adapters(layer):
            factor = factors[name]
            while (inner := _inside_wrapper(factor)) is not None:
                factor = inner
            patch(factor, forward)
            patch(layer, forward)


def _inside_wrapper(layer: nn.Module) -> nn.Module | None:
    return next((layer._modules[name] for name in _LAYERS_INSIDE if name in layer._modules), None)


def is_tensor_parallel(head: nn.Linear) -> bool:
    """Whether transformers' `tp_plan` shards the head: every rank gives it the same hidden states."""
    return _is_tp_forward(vars(head).get(_DISPLACED))


def patch(head: nn.Module, forward: Callable[..., Tensor]) -> None:
    """Let `forward(head, input)` stand in for the head's own; nothing happens if it does already.

    Raises ValueError where the head has a forward whose product is not known to be nn.Linear's.
    """
    slot = "_old_forward" if "_old_forward" in vars(head) else "forward"
    present = vars(head).get(slot)
    function = getattr(present, "__func__", None)
    if function is forward:
        return
    if isinstance(head, nn.Linear) and type(head).forward is not nn.Linear.forward:
        raise ValueError(
            f"the head is a {type(head).__name__} with a forward of its own: only nn.Linear's product is exact "
            "here. Leave a quantised model's head as it was (llm_int8_skip_modules)"
        )
    if _is_tp_forward(present) or _is_fp32_forward(present):
        setattr(head, _DISPLACED, present)
    elif present is not None and function is not type(head).forward:
        raise ValueError(f"the head's forward has been replaced by {present!r}: remove that patch before attaching")
    setattr(head, slot, types.MethodType(forward, head))


def unpatch(head: nn.Module, forward: Callable[..., Tensor]) -> None:
    """Undo `patch`, whatever has been wrapped around the head or taken off it since."""
    attributes = vars(head)
    for slot in _SLOTS:
        if getattr(attributes.get(slot), "__func__", None) is not forward:
            continue
        if _DISPLACED in attributes:
            setattr(head, slot, attributes.pop(_DISPLACED))
        elif slot == "forward":
            delattr(head, slot)
        else:
            setattr(head, slot, types.MethodType(type(head).forward, head))


def plain_forward(head: nn.Module, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What the head does when nothing is asked of it."""
    displaced = getattr(head, _DISPLACED, None)
    return type(head).forward(head, input, *args, **kwargs) if displaced is None else displaced(input)


def _is_fp32_forward(function: Any) -> bool:
    """TRL's, of `cast_lm_head_to_fp32`."""
    return getattr(function, "__qualname__", "").endswith("_cast_lm_head_to_fp32.<locals>.cast_forward_to_fp32")


def _is_tp_forward(function: Any) -> bool:
    return getattr(function, "__qualname__", "") == "TensorParallelLayer.install_forward.<locals>.tp_forward"


def head_rows(head: nn.Linear) -> int:
    """V, from the weight where it is whole: adapters replace it without the layer's description following.

    It may be sharded or elsewhere until the model calls it; then the description counts.
    """
    shape = getattr(head.weight, "ds_shape", head.weight.shape)
    return shape[0] if len(shape) == 2 and shape[0] > 0 else head.out_features
