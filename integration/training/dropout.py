"""Dropout switched off, wherever a model keeps its probability.

In modules of their own (`nn.Dropout`, PEFT's for BOFT), in numbers that a layer hands to `F.dropout` (OPT, Bloom and
others; the share of layers that some leave out in training too), in a dict of them (PEFT's LoHa and LoKr), and in the
configuration that a layer reads when it is called (Falcon). The model's own configuration, which is saved with it,
keeps its values.
"""

from __future__ import annotations

import inspect
import logging
import sys
from typing import Any

from torch import nn

logger = logging.getLogger("orpo_kernels")


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout of the model to 0; where that takes away an adapter's, a warning says so."""
    of_adapters = _modules_of_adapters(model)
    taken: set[float] = set()
    root = getattr(model, "get_base_model", lambda: model)()
    module: Any
    for module in model.modules():
        rates = _switch_off(module)
        if module in of_adapters:
            taken.update(rate for rate in rates if rate > 0)
        if module is not root and _reads_its_configuration(type(module)):
            module.config = _WithoutDropout(module.config)
    if taken:
        logger.warning(
            "disable_dropout=True sets the adapters' dropout of %s to 0 too: pass disable_dropout=False to keep it",
            ", ".join(f"{rate:g}" for rate in sorted(taken)),
        )


def _switch_off(module: Any) -> list[float]:
    """Set the module's own probabilities to 0; returns what they were."""
    is_dropout = isinstance(module, nn.modules.dropout._DropoutNd) or "Dropout" in type(module).__name__
    rates = []
    for name, value in vars(module).items():
        if is_dropout and name == "p":
            rates.append(value)
            module.p = 0.0
        elif "drop" not in name.lower():
            continue
        elif isinstance(value, float):
            rates.append(value)
            setattr(module, name, 0.0)
        elif isinstance(value, dict):  # one an adapter, as PEFT's LoHa and LoKr have them
            floats = {key: rate for key, rate in value.items() if isinstance(rate, float)}
            rates += floats.values()
            value.update(dict.fromkeys(floats, 0.0))
    return rates


def _modules_of_adapters(model: nn.Module) -> set[nn.Module]:
    """PEFT's own, without the layers that they wrap."""
    if "peft" not in sys.modules:
        return set()
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    wrapped = {inner for layer in layers for inner in layer.get_base_layer().modules()}
    return {own for layer in layers for own in layer.modules()} - wrapped


def _reads_its_configuration(kind: type[nn.Module]) -> bool:
    """Whether its forward asks the configuration for a dropout."""
    if kind.__module__.startswith("torch."):
        return False
    try:
        lines = inspect.getsource(kind.forward).splitlines()
    except (OSError, TypeError):
        return False
    return any("self.config." in line and "drop" in line for line in lines)


class _WithoutDropout:
    """A configuration as it is at any time, its dropouts 0."""

    def __init__(self, config: Any) -> None:
        object.__setattr__(self, "_config", config)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._config)

    def __getattr__(self, name: str) -> Any:
        value = getattr(object.__getattribute__(self, "_config"), name)
        return 0.0 if isinstance(value, float) and "drop" in name else value

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._config, name, value)

    def __reduce__(self) -> Any:
        return _WithoutDropout, (object.__getattribute__(self, "_config"),)
