"""PEFT set-ups that put positions before the rows, or another weight in the head's place, against full logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trainers import OWN, WORDS, make, pairs
from transformers import LlamaConfig, LlamaForCausalLM

from orpo_kernels.integration.lm_head import attach
from orpo_kernels.linear_logps import shift_labels

peft = pytest.importorskip("peft")
IDS = torch.randint(3, 97, (3, 9))
LORA = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
TIED = {"tie_word_embeddings": True}


def llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes | options, num_attention_heads=4, num_key_value_heads=2))


def full_logits(model: nn.Module) -> Tensor:
    logits = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits[:, -IDS.shape[1] :]
    return torch.log_softmax(logits[:, :-1].double(), -1).gather(-1, IDS[:, 1:, None])[..., 0]


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (lambda: peft.LoraConfig(**LORA, modules_to_save=["embed_tokens"], ensure_weight_tying=True), TIED),
        (lambda: peft.LoraConfig(**LORA, modules_to_save=["lm_head"], ensure_weight_tying=True), TIED),
        (lambda: peft.LoraConfig(**LORA, modules_to_save=["embed_tokens"]), {}),
        (lambda: peft.LoraConfig(**LORA, trainable_token_indices=[3, 4]), {}),
        (lambda: peft.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"), {}),
        (lambda: peft.PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=16, task_type="CAUSAL_LM"), {}),
        (lambda: peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"), {}),
    ],
    ids=["tied embeddings saved", "tied head saved", "embeddings saved", "tokens", "prompt", "p-tuning", "prefix"],
)
def test_like_full_logits(config: Any, options: dict[str, Any]) -> None:
    model: Any = peft.get_peft_model(llama(**options), config())
    weights = torch.rand(3, 8)
    (full_logits(model) * weights).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    over = torch.ones_like(IDS, dtype=torch.bool)
    logps, mean_logits, _ = attach(model).sequence_scores(
        shift_labels(IDS), over, input_ids=IDS, attention_mask=torch.ones_like(IDS)
    )
    assert logps.shape == IDS.shape
    torch.testing.assert_close(logps[:, :-1].double(), full_logits(model), rtol=1e-5, atol=1e-5)
    assert mean_logits is not None
    assert mean_logits.shape == (3,)
    (logps[:, :-1] * weights).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() != set()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize(("indices", "options"), [([3, 4], TIED), ({"lm_head": [3, 4]}, {})], ids=["tied", "head"])
def test_single_tokens_of_the_head_are_refused_with_a_way_out(indices: Any, options: dict[str, Any]) -> None:
    model = peft.get_peft_model(llama(**options), peft.LoraConfig(**LORA, trainable_token_indices=indices))
    with pytest.raises(ValueError, match=r"trainable_token_indices reach the head .* ensure_weight_tying=True"):
        attach(model)


@pytest.mark.parametrize("kind", ["mask", "places"])
def test_rows_behind_positions_of_its_own(kind: str) -> None:
    model = peft.get_peft_model(llama(), peft.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"))
    length = IDS.shape[1]
    kept = torch.ones_like(IDS, dtype=torch.bool)
    over: Any = kept if kind == "mask" else torch.arange(IDS.numel()).split(length)
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    targets = shift_labels(IDS)
    at = torch.randperm(IDS.numel())
    logps, mean_logits, _ = attach(model).sequence_scores(targets.flatten()[at], over, rows=at, **inputs)
    whole = torch.zeros(IDS.numel()).index_put((at,), logps.detach()).view_as(IDS)
    torch.testing.assert_close(whole[:, :-1].double(), full_logits(model).detach(), rtol=1e-5, atol=1e-5)
    means = model(**inputs).logits[:, -length:].mean((1, 2))
    torch.testing.assert_close(mean_logits, means, rtol=1e-4, atol=1e-5)


PROMPTS = {
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    "p-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=16, task_type="CAUSAL_LM"),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("packing", ["auto", "True"])
@pytest.mark.parametrize("name", PROMPTS)
def test_our_trainer_trains_prompts(name: str, packing: str, tmp_path: Path) -> None:
    """Its first step's loss is that of padded rows."""

    def first(packing: str) -> float:
        model = peft.get_peft_model(llama(vocab_size=WORDS + 3), PROMPTS[name]())
        trainer = make(OWN, tmp_path, pairs(8), model, packing=packing, max_steps=1, per_device_train_batch_size=8)
        trainer.train()
        return trainer.state.log_history[0]["loss"]

    assert first(packing) == pytest.approx(first("False"), rel=1e-5)
