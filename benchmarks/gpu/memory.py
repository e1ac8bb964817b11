"""Stage `memory`: whole training steps beside their estimates, by the allocator's own peak.

A Llama of 1.2 billion parameters with random weights in bf16, one pair. What is compared is growth beyond the weights,
as in `benchmarks.memory_accuracy`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks.gpu.common import CUDA, DEVICE, Record
from orpo_kernels.integration.memory.measured import measure, run_of
from orpo_kernels.integration.packing.kernels import flash_is_installed
from orpo_kernels.plan import MIB

TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4000,
}
LENGTHS = (1024, 4096) if CUDA else (64, 128)
METHODS: dict[str, dict[str, Any]] = {
    "all weights": {"lora_r": 0},
    "all weights, checkpoints": {"lora_r": 0, "checkpointing": True},
    "LoRA": {"lora_r": 16},
    "LoRA, checkpoints": {"lora_r": 16, "checkpointing": True},
    "all weights, fp32 under autocast": {"lora_r": 0, "weights_dtype": "float32", "checkpointing": True},
}


def compare(method: dict[str, Any], layout: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for length in LENGTHS:
        for loss in ("full", "ours"):
            case = {"length": length, "loss": loss, "layout": layout, "device": DEVICE.type, "dtype": "bfloat16"}
            case = {"weights_dtype": "bfloat16", **case, **method}
            try:
                found = measure(run_of({"model": "llama-3.2-1b" if CUDA else TINY, **case}), loss)
            except torch.OutOfMemoryError as error:
                rows.append({**case, "skipped": str(error)[:200]})
                continue
            finally:
                if CUDA:
                    torch.cuda.empty_cache()
            off = found["estimated"] / found["measured"] - 1
            rows.append({**case, **found, "error": off})
            print(f"   {layout:<8}{length:>6} {loss:<6}{found['measured'] / MIB:>10,.0f} MiB {off:+7.1%}", flush=True)
    largest = max((abs(row["error"]) for row in rows if "error" in row), default=0.0)
    if CUDA and largest > 0.1:
        raise RuntimeError(f"an estimate is off by {largest:.1%}: {rows}")
    return rows


def run(record: Record) -> None:
    layouts = ["padded", "equal", *(["shared"] if flash_is_installed() or not CUDA else [])]
    for layout in layouts:
        for name, method in METHODS.items():
            record.section(f"{layout}, {name}", partial(compare, method, layout))
