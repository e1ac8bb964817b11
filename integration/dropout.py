"""Dropout switched off, wherever a model keeps its probability.

In modules of their own (`nn.Dropout`), in numbers that a layer hands to `F.dropout` (OPT, Bloom and others; the share
of layers that some leave out in training too), and in the configuration that a layer reads when it is called
(Falcon). The model's own configuration, which is saved with it, keeps its values.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

from torch import nn

logger = logging.getLogger("orpo_kernels")


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout of the model to 0; where that takes away an adapter's, a warning says so."""
    adapters = set()
    root = getattr(model, "get_base_model", lambda: model)()
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            if "lora_dropout" in name.split("."):
                adapters.add(module.p)
            module.p = 0.0
        for attribute, value in vars(module).items():
            if isinstance(value, float) and "drop" in attribute.lower():
                setattr(module, attribute, 0.0)
        if module is not root and _reads_its_configuration(type(module)):
            module.config = _WithoutDropout(module.config)
    if adapters:
        logger.warning(
            "disable_dropout=True sets the adapters' dropout of %s to 0 too: pass disable_dropout=False to keep it",
            ", ".join(f"{p:g}" for p in sorted(adapters)),
        )


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
