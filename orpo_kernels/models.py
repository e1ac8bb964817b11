"""Sizes of much-used models, as in their public config.json files, so that their names work without a network.

Each entry is what `transformers.AutoConfig.for_model` takes: what decides memory, and no more. A test checks every one
by its number of parameters.
"""

from __future__ import annotations

from typing import Any


def _sizes(
    model_type: str,
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    heads: tuple[int, int],
    vocab_size: int,
    *,
    tied: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """heads: those of queries, those of keys and values."""
    return {
        "model_type": model_type,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "vocab_size": vocab_size,
        "tie_word_embeddings": tied,
        "dtype": "bfloat16",
        **more,
    }


_GEMMA_2: dict[str, Any] = {
    "head_dim": 256,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
    "sliding_window": 4096,
    "tied": True,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "smollm2-135m": _sizes("llama", 576, 1536, 30, (9, 3), 49152, tied=True),
    "smollm2-360m": _sizes("llama", 960, 2560, 32, (15, 5), 49152, tied=True),
    "qwen2.5-0.5b": _sizes("qwen2", 896, 4864, 24, (14, 2), 151936, tied=True),
    "qwen3-0.6b": _sizes("qwen3", 1024, 3072, 28, (16, 8), 151936, tied=True, head_dim=128),
    "gemma-3-1b": _sizes(
        "gemma3_text", 1152, 6912, 26, (4, 1), 262144, tied=True, head_dim=256, sliding_window=512
    ),
    "llama-3.2-1b": _sizes("llama", 2048, 8192, 16, (32, 8), 128256, tied=True),
    "qwen2.5-1.5b": _sizes("qwen2", 1536, 8960, 28, (12, 2), 151936, tied=True),
    "smollm2-1.7b": _sizes("llama", 2048, 8192, 24, (32, 32), 49152, tied=True),
    "gemma-2-2b": _sizes("gemma2", 2304, 9216, 26, (8, 4), 256000, **_GEMMA_2),
    "llama-3.2-3b": _sizes("llama", 3072, 8192, 28, (24, 8), 128256, tied=True),
    "phi-3-mini": _sizes("phi3", 3072, 8192, 32, (32, 32), 32064, sliding_window=2047, pad_token_id=32000),
    "qwen3-4b": _sizes("qwen3", 2560, 9728, 36, (32, 8), 151936, tied=True, head_dim=128),
    "olmoe-1b-7b": _sizes(
        "olmoe", 2048, 1024, 16, (16, 16), 50304, num_experts=64, num_experts_per_tok=8, pad_token_id=1
    ),
    "mistral-7b-v0.3": _sizes("mistral", 4096, 14336, 32, (32, 8), 32768, sliding_window=None),
    "qwen2.5-7b": _sizes("qwen2", 3584, 18944, 28, (28, 4), 152064),
    "llama-3-8b": _sizes("llama", 4096, 14336, 32, (32, 8), 128256),
    "llama-3.1-8b": _sizes("llama", 4096, 14336, 32, (32, 8), 128256),
    "qwen3-8b": _sizes("qwen3", 4096, 12288, 36, (32, 8), 151936, head_dim=128),
    "gemma-2-9b": _sizes("gemma2", 3584, 14336, 42, (16, 8), 256000, **_GEMMA_2),
    "mistral-nemo-12b": _sizes("mistral", 5120, 14336, 40, (32, 8), 131072, head_dim=128, sliding_window=None),
    "phi-4": _sizes("phi3", 5120, 17920, 40, (40, 10), 100352, pad_token_id=100257),
    "qwen3-14b": _sizes("qwen3", 5120, 17408, 40, (40, 8), 151936, head_dim=128),
    "qwen3-30b-a3b": _sizes(
        "qwen3_moe", 2048, 6144, 48, (32, 4), 151936,
        head_dim=128, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
    ),
    "qwen2.5-32b": _sizes("qwen2", 5120, 27648, 64, (40, 8), 152064),
    "qwen3-32b": _sizes("qwen3", 5120, 25600, 64, (64, 8), 151936, head_dim=128),
    "mixtral-8x7b": _sizes("mixtral", 4096, 14336, 32, (32, 8), 32000, num_local_experts=8, num_experts_per_tok=2),
    "llama-3-70b": _sizes("llama", 8192, 28672, 80, (64, 8), 128256),
    "llama-3.1-70b": _sizes("llama", 8192, 28672, 80, (64, 8), 128256),
    "qwen2.5-72b": _sizes("qwen2", 8192, 29568, 80, (64, 8), 152064),
}  # fmt: skip
