"""A model's configuration by its name, its folder, or its sizes; nothing is fetched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from orpo_kernels.models import CONFIGS

_GIVE = "give a folder with a config.json, a config.json itself, or one of"


def config_of(model: str | dict[str, Any]) -> tuple[Any, str]:
    """(a transformers configuration, how to call it) of a name of `models.CONFIGS`, a folder with a config.json or such
    a file, or what such a file holds.

    Raises ValueError for anything else, and for a file that is no configuration of a causal language model.
    """
    if isinstance(model, dict):
        return _config(model, str(model.get("model_type"))), str(model.get("model_type"))
    if model.lower() in CONFIGS:
        return _config(CONFIGS[model.lower()], model), model.lower()
    path = Path(model).expanduser()
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"model={model!r} is unknown: {_GIVE} {', '.join(CONFIGS)}")
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, and no configuration: {_GIVE} {', '.join(CONFIGS)}")
    return _config(values, str(path)), path.parent.name or str(path)


def _config(values: dict[str, Any], where: str) -> Any:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    kind = values.get("model_type")
    if kind not in KNOWN:
        raise ValueError(
            f"{where} has model_type={kind!r}: use a causal language model that transformers has without remote code, "
            f"such as {', '.join(sorted({str(config['model_type']) for config in CONFIGS.values()}))}"
        )
    rest = {key: value for key, value in values.items() if key not in ("model_type", "quantization_config")}
    try:
        return AutoConfig.for_model(str(kind), **rest)
    except Exception as error:  # configurations check themselves, each in its own way
        raise ValueError(f"{where} is no configuration of {kind}: {' '.join(str(error).split())[:200]}") from error
