"""Live bytes against known allocations; a few layers against all of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import AutoConfig

from orpo_kernels.integration.memory import step
from orpo_kernels.integration.memory.architecture import Depth, depth_of
from orpo_kernels.integration.memory.footprint import footprint
from orpo_kernels.integration.memory.live import LiveBytes, Segment
from orpo_kernels.integration.memory.run import Run
from orpo_kernels.integration.memory.timeline import Timeline

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 500,
}
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def llama(layers: int = 4, **more: Any) -> Any:
    return AutoConfig.for_model("llama", num_hidden_layers=layers, **SIZES | more)


def gemma(layers: int = 8) -> Any:
    """Every third layer sees everything."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * layers
    return AutoConfig.for_model(
        "gemma3_text", num_hidden_layers=layers, layer_types=kinds[:layers], sliding_window=32, **SIZES
    )


def mixture(layers: int = 5) -> Any:
    """The first layer has no experts."""
    return AutoConfig.for_model(
        "qwen3_moe", num_hidden_layers=layers, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        mlp_only_layers=[0], **SIZES,
    )  # fmt: skip


def test_live_bytes_of_known_allocations():
    there = torch.zeros(100)
    with LiveBytes([there]) as live:
        kept = torch.empty(250)  # 1000 bytes
        dropped = torch.empty(1000)  # 4000
        view = dropped[:10]
        del dropped
        live.mark("one")
        there.add_(1.0)
        kept.mul_(2.0)
        del view
        live.mark("two")
        del kept
        live.mark("three")
    assert live.segments[0] == Segment("one", 5000, 5000)
    assert live.segments[1][1:3] == (-4000, 0)
    assert live.segments[2][1:3] == (-1000, 0)
    assert live.segments[2].shared == -1000  # from before the first mark


def test_a_granule_rounds_up():
    with LiveBytes([], granule=512) as live:
        kept = torch.empty(1)
        live.mark("one")
    assert live.segments[0].change == 512
    del kept


def test_a_stretch_that_is_repeated():
    forward = (Segment("before", 10, 15), Segment("layer 0", 5, 8), Segment("layer 1", 7, 9), Segment("layer 2", 1, 1))
    backward = (Segment("layer 2", -1, 2), Segment("layer 1", -7, 3, 4, 1, -2), Segment("layer 0", -5, 0))
    found = Timeline(forward, (), backward).extended(1, 1, 3)
    assert found.at_loss().live == 10 + 5 + 3 * 7 + 1
    # What all share goes once, with the last of them.
    assert [s.change for s in found.backward] == [-1, -5, -5, -7, -5]
    assert found.end().gradients == 3 * 4
    highest = found.peaks()[1]
    assert highest.live == 37 + 2


@given(st.lists(st.sampled_from("abc"), max_size=4), st.lists(st.sampled_from("abc"), min_size=1, max_size=4),
       st.integers(1, 6), st.integers(0, 3))  # fmt: skip
def test_the_short_model_shows_every_layer(lead: list[str], period: list[str], times: int, rest: int):
    kinds = lead + period * times + period[:rest]
    depth = depth_of(kinds)
    assert depth.layers <= len(kinds)
    # The short model is the full one's first layers, and its last ones are the full one's too.
    short = kinds[: depth.layers]
    stretch = short[depth.first : depth.first + depth.period]
    whole = short[: depth.first] + stretch * depth.repeats + short[depth.first + depth.period :]
    assert whole == kinds


def test_how_short():
    assert depth_of(["a"] * 80) == Depth(3, 1, 1, 78)
    assert depth_of(["x"] + ["a"] * 26) == Depth(4, 2, 1, 24)
    assert depth_of(["a", "b"]) == Depth(2, 0, 2, 1)


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "all weights": (llama, {}),
    "tied, fp32 under autocast": (lambda: llama(tie_word_embeddings=True), {"weights_dtype": torch.float32}),
    "LoRA, checkpoints": (llama, {"peft": LORA, "checkpointing": True}),
    "LoRA on 4 bits, shared": (llama, {"peft": LORA, "four_bit": True, "layout": "shared"}),
    "windows, checkpoints": (gemma, {"checkpointing": True}),
    "windows, packed on a CPU": (gemma, {"layout": "packed", "device": "cpu", "dtype": torch.float32}),
    "experts": (mixture, {"optim": "adamw_torch"}),
}


@pytest.mark.parametrize(("config", "fields"), CASES.values(), ids=CASES)
def test_a_few_layers_stand_for_all(config: Any, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    run = Run(config(), pairs=2, length=64, **fields)
    short = footprint(run)
    assert step.depth_of(step.kinds_of(run.config)).layers < run.config.num_hidden_layers
    monkeypatch.setattr(step, "depth_of", lambda kinds: Depth(len(kinds), 0, len(kinds), 1))
    assert footprint(run) == short


def test_frozen_weights_make_a_layer_another():
    """The first layers of a model that is trained from the middle on."""
    config = llama(6, tie_word_embeddings=False)
    run = Run(config, length=64)
    whole = footprint(run).ours
    names = _names(config)
    trained = frozenset(
        name for name in names if not name.startswith(("model.layers.0.", "model.layers.1.", "model.embed"))
    )
    found = footprint(dataclasses.replace(run, trains=trained)).ours
    assert footprint(dataclasses.replace(run, trains=frozenset(names))).ours == whole
    share = sum(names[name] for name in trained) / sum(names.values())
    assert found.optimizer == pytest.approx(whole.optimizer * share, rel=1e-9)
    assert found.activations < whole.activations


def _names(config: Any) -> dict[str, int]:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: parameter.numel() for name, parameter in model.named_parameters()}
