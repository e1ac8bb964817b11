"""A few real steps, each in a fresh process, against their estimates; `benchmarks.memory_accuracy` has them all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orpo_kernels.integration.memory.measured import compare

MODEL = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 24_000,
}
CASES: dict[str, dict[str, Any]] = {
    "all weights, full logits, padded": {"lora_r": 0, "layout": "padded", "loss": "full"},
    "all weights, ours, shared": {"lora_r": 0, "layout": "shared", "loss": "ours"},
    "LoRA, ours, padded": {"lora_r": 8, "layout": "padded", "loss": "ours"},
    "LoRA, full logits, checkpoints": {"lora_r": 8, "layout": "padded", "loss": "full", "checkpointing": True},
}
FEW = ("all weights, ours, shared",)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is Linux's high-water mark")
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=name, marks=[pytest.mark.exhaustive] * (name not in FEW)) for name, case in CASES.items()],
)
def test_an_estimate_is_within_a_tenth(case: dict[str, Any]):
    found = compare({"model": MODEL, "length": 400, "device": "cpu", **case})
    assert found["measured"] > 100 << 20
    assert found["estimated"] == pytest.approx(found["measured"], rel=0.1)
