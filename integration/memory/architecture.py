"""A model on fake tensors with as few layers as show what all of them take.

Layers are told apart by their modules, the shapes of their parameters and the configuration's entries for them. From
some layer on their kinds repeat (every one the same; local and global attention in turn): with one period, a layer
before and one behind it, every kind of neighbourhood has been seen, and the period stands for all others.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from .four_bit import quantize
from .optimizers import Weight
from .run import Run


class CannotRun(ValueError):
    """The architecture cannot be run on fake tensors."""


class Depth(NamedTuple):
    """layers: of the short model. Those from `first` to `first + period - 1` are there `repeats` times in the full
    one."""

    layers: int
    first: int
    period: int
    repeats: int


def depth_of(kinds: list[Any]) -> Depth:
    """The shortest model that shows every layer of `kinds`."""
    total = len(kinds)
    best = Depth(total, 0, total, 1)
    for period in range(1, total):
        lead = total - period
        while lead > 0 and kinds[lead - 1] == kinds[lead - 1 + period]:
            lead -= 1
        least = lead + period + 2
        layers = least + (total - least) % period
        if total > layers < best.layers:
            best = Depth(layers, lead + 1, period, 1 + (total - layers) // period)
    return best


def text_config(config: Any) -> Any:
    return config.get_text_config(decoder=True)


def layers_of(model: nn.Module, count: int) -> nn.ModuleList:
    """The decoder's layers; raises CannotRun if there is no list of so many."""
    found = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    if not found:
        raise CannotRun(f"{type(model).__name__} has no list of {count} layers")
    return max(found, key=lambda layers: sum(parameter.numel() for parameter in layers.parameters()))


def shortened(config: Any, layers: int) -> Any:
    """The configuration with that many layers."""
    found = copy.deepcopy(config)
    text = text_config(found)
    total = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == total:
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    return found


def kinds_of(config: Any, trains: frozenset[str] | None = None) -> list[Any]:
    """What tells each layer from others; no storage is made. trains: as `Run.trains`."""
    with torch.device("meta"), quiet():
        model = AutoModelForCausalLM.from_config(config)
    text = text_config(config)
    total = text.num_hidden_layers
    lists = [value for value in vars(text).values() if isinstance(value, list) and len(value) == total]
    kinds = []
    layers = layers_of(model, total)
    prefix = next(name for name, module in model.named_modules() if module is layers)
    for index, layer in enumerate(layers):
        modules = tuple((name, type(module).__name__) for name, module in layer.named_modules())
        shapes = tuple((name, parameter.shape) for name, parameter in layer.named_parameters())
        names = [f"{prefix}.{index}.{name}" for name, _ in layer.named_parameters()]
        frozen = () if trains is None else tuple(name in trains for name in names)
        kinds.append((modules, shapes, tuple(str(value[index]) for value in lists), frozen))
    return kinds


def prepared_config(run: Run) -> Any:
    """The configuration as it is to be built: what reads numbers, and is of no weight, left out; a rank's part of
    it."""
    config = copy.deepcopy(run.config)
    config.use_cache = False
    for one in {id(x): x for x in (config, text_config(config))}.values():
        rope = getattr(one, "rope_parameters", None)
        if isinstance(rope, dict) and rope.get("rope_type", "default") in ("dynamic", "longrope"):
            # The frequencies of these follow the longest position, a number that fake tensors do not have.
            one.rope_parameters = {**rope, "rope_type": "default"}
    if run.tp > 1:
        text = text_config(config)
        if getattr(text, "head_dim", None) is None:
            text.head_dim = text.hidden_size // text.num_attention_heads
        for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
            setattr(text, name, getattr(text, name) // run.tp)
    if run.attention is not None:
        config._attn_implementation = run.attention
    return config


def built(run: Run, config: Any, depth: Depth, mode: FakeTensorMode) -> nn.Module:
    """The short model on fake tensors, its adapters and 4-bit layers too."""
    with torch.device("meta"), quiet():
        model: Any = AutoModelForCausalLM.from_config(shortened(config, depth.layers), dtype=run.weights_dtype)
        model.tie_weights()
        if run.four_bit:
            quantize(model, model.get_output_embeddings())
        if run.peft is not None:
            from peft import get_peft_model

            model = get_peft_model(model, copy.deepcopy(run.peft))
    if run.trains is not None and run.peft is None:
        _freeze(model, depth, run.trains)
    with mode:
        _onto_cpu(model)
    model.train()
    if run.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def _freeze(model: nn.Module, depth: Depth, trains: frozenset[str]) -> None:
    """By the names of the full model, whose last layers are the short one's last."""
    layers = layers_of(model, depth.layers)
    prefix = next(name for name, module in model.named_modules() if module is layers) + "."
    skipped = depth.period * (depth.repeats - 1)
    for name, parameter in model.named_parameters():
        if name.startswith(prefix):
            index, _, rest = name.removeprefix(prefix).partition(".")
            behind = int(index) >= depth.first + depth.period
            name = f"{prefix}{int(index) + (skipped if behind else 0)}.{rest}"
        parameter.requires_grad_(name in trains)


def _onto_cpu(model: nn.Module) -> None:
    """Tensors of the current mode in the place of meta ones, shared where those were."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(_fake(parameter), requires_grad=parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = made.setdefault(id(buffer), _fake(buffer))
        for name, value in vars(module).items():  # tensors that are no buffers, such as Gemma's scales
            if isinstance(value, torch.Tensor):
                setattr(module, name, _fake(value))


def _fake(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


@contextmanager
def quiet() -> Iterator[None]:
    """No weight is initialised, and libraries' remarks on that are not shown."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with no_init_weights():
            yield
    finally:
        logging.disable(level)


class Weights(NamedTuple):
    """Of the full model. held: bytes of parameters and buffers. root: of those outside layers, layer: of the largest
    layer. training: what trains."""

    held: int
    root: int
    layer: int
    training: tuple[Weight, ...]


def weights_of(model: nn.Module, depth: Depth) -> Weights:
    layers = layers_of(model, depth.layers)
    index_of = {id(p): index for index, layer in enumerate(layers) for p in (*layer.parameters(), *layer.buffers())}
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    held = root = 0
    by_layer = [0] * depth.layers
    training = []
    unique = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for key, tensor in unique.items():
        index = index_of.get(key)
        repeated = index is not None and depth.first <= index < depth.first + depth.period
        count = depth.repeats if repeated else 1
        nbytes = tensor.untyped_storage().nbytes()
        held += count * nbytes
        if index is None:
            root += nbytes
        else:
            by_layer[index] += nbytes
        if tensor.requires_grad:
            training.append(Weight(tuple(tensor.shape), tensor.itemsize, key in embeddings, count))
    return Weights(held, root, max(by_layer), tuple(training))
