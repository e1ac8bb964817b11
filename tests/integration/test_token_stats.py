"""`ModelLogps.token_stats`: statistics from inside a model's head, with their gradients, as from its logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM
from wrapping import IGNORED, VOCAB, inputs_of, logps_of_logits, make_batch, scaled, tiny_llama

from orpo_kernels import TokenStats
from orpo_kernels.integration.lm_head import attach
from orpo_kernels.loss import merge_targets

BATCH = make_batch()
TARGETS = merge_targets(BATCH["targets"], BATCH["nll_targets"])
INPUTS = inputs_of(BATCH)
TEMPERATURE = 0.7


def gemma2() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 2.0}
    return Gemma2ForCausalLM(Gemma2Config(**sizes, initializer_range=0.2, attn_implementation="eager"))


def lora_on_the_head() -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, target_modules=["lm_head", "v_proj"])
    return peft.get_peft_model(tiny_llama(), config)


def prompt_tuning() -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(tiny_llama(), peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": tiny_llama,
    "scaled": scaled,
    "soft-capped": gemma2,
    "LoRA on the head": lora_on_the_head,
    "prompt tuning": prompt_tuning,
}


def from_logits(model: nn.Module) -> TokenStats:
    logits = model(**INPUTS).logits[:, -TARGETS.shape[1] :].float() / TEMPERATURE
    logp, scored = logits.log_softmax(-1), TARGETS != IGNORED
    every = (
        -(logp.exp() * logp).sum(-1),
        (2 * logp).logsumexp(-1),
        logits.mean(-1),
        logits.argmax(-1) == TARGETS,
    )
    return TokenStats(logps_of_logits(logits, TARGETS), *(torch.where(scored, x, torch.zeros_like(x)) for x in every))


def gradients(model: nn.Module, found: TokenStats) -> dict[str, Tensor]:
    weights = torch.linspace(-1, 1, TARGETS.numel()).view(TARGETS.shape)
    model.zero_grad()
    (found.logps * weights + found.entropy * weights.flip(0)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_as_from_logits(make: Callable[[], nn.Module]) -> None:
    model: Any = make().eval()
    expected = from_logits(model)
    expected_gradients = gradients(model, expected)
    head = attach(model)
    found, outputs = head.token_stats(TARGETS, entropy_grad=True, temperature=TEMPERATURE, **INPUTS)
    assert outputs.logits.shape[-1] == 7
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    found_gradients = gradients(model, found)
    assert found_gradients.keys() == expected_gradients.keys()
    for name, gradient in found_gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-5, msg=name)


def test_what_is_not_asked_for_is_not_there_and_costs_logps_nothing() -> None:
    model = tiny_llama()
    head = attach(model)
    found, _ = head.token_stats(TARGETS, statistics=["is_top1"], **INPUTS)
    logps, _ = head.logps(TARGETS, **INPUTS)
    assert torch.equal(found.logps, logps)
    assert found.is_top1 is not None
    assert [found.entropy, found.log_sum_sq_probs, found.mean_logits] == [None] * 3
    entropy = head.token_stats(TARGETS, statistics=["entropy"], **INPUTS)[0].entropy
    assert not entropy.requires_grad


def test_rows_that_repeat() -> None:
    """Any shape of targets, several of them predicted by one row."""
    model = tiny_llama()
    batch, length = TARGETS.shape
    rows = torch.arange(batch * length).view(batch, length)
    twice, rows = torch.stack([TARGETS, TARGETS]), torch.stack([rows, rows])
    expected = from_logits(model)
    found, _ = attach(model).token_stats(twice, rows=rows, entropy_grad=True, temperature=TEMPERATURE, **INPUTS)
    torch.testing.assert_close(found.entropy, torch.stack([expected.entropy] * 2), rtol=1e-5, atol=1e-5)
    found = found._replace(logps=found.logps.sum(0), entropy=found.entropy.sum(0))
    once, both = gradients(model, expected), gradients(model, found)
    for name, gradient in both.items():
        torch.testing.assert_close(gradient, 2 * once[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_compiled_model() -> None:
    model = tiny_llama()
    expected = from_logits(model)
    expected_gradients = gradients(model, expected)
    compiled = torch.compile(model, backend="eager")
    found, _ = attach(model).token_stats(TARGETS, entropy_grad=True, temperature=TEMPERATURE, model=compiled, **INPUTS)
    torch.testing.assert_close(found.entropy, expected.entropy, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients(model, found).items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"statistics": ["perplexity"]}, "'perplexity'"), ({"temperature": -1.0}, "temperature=-1.0")],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attach(tiny_llama()).token_stats(TARGETS, **options, **INPUTS)
