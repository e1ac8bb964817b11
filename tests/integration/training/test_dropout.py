"""No dropout in any family that keeps its probability in its own way; an adapter's is not taken away in silence."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from orpo_kernels.integration.training.dropout import disable_dropout

SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32, "layerdrop": 0.5, "dropout": 0.3, "attention_dropout": 0.3},
    "XGLM": {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4, "layerdrop": 0.5, "dropout": 0.3},
    "BioGpt": {"intermediate_size": 48, "layerdrop": 0.5, "hidden_dropout_prob": 0.3},
    "GPTBigCode": {"n_embd": 32, "n_layer": 2, "n_head": 4, "attn_pdrop": 0.3, "resid_pdrop": 0.3, "embd_pdrop": 0.3},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "attn_pdrop": 0.3, "resid_pdrop": 0.3},
    "Bloom": {"n_layer": 2, "n_head": 4, "hidden_dropout": 0.3, "attention_dropout": 0.3},
    "Falcon": {"hidden_dropout": 0.3, "attention_dropout": 0.3},
    "Starcoder2": {
        "intermediate_size": 48,
        "num_key_value_heads": 2,
        "residual_dropout": 0.3,
        "embedding_dropout": 0.3,
    },
    "Persimmon": {"intermediate_size": 48, "hidden_dropout": 0.3, "attention_dropout": 0.3},
    "Llama": {"intermediate_size": 48, "attention_dropout": 0.3},
}


def tiny(family: str) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | FAMILIES[family], pad_token_id=0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


@pytest.mark.parametrize("family", FAMILIES)
def test_training_is_evaluation(family: str) -> None:
    model, ids = tiny(family), torch.randint(3, 97, (2, 9))
    saved = model.config.to_dict()

    def passes(times: int) -> list[torch.Tensor]:
        return [model(input_ids=ids).logits.detach() for _ in range(times)]

    model.train()
    first, *others = passes(4)
    assert any(not torch.equal(first, other) for other in others)  # or there is nothing to switch off
    disable_dropout(model)
    training = passes(4)
    model.eval()
    for logits in training:
        torch.testing.assert_close(logits, passes(1)[0])
    assert model.config.to_dict() == saved  # as the model is saved with it


LAYERS = {"target_modules": ["q_proj", "v_proj"]}
ADAPTERS: dict[str, dict[str, Any]] = {
    "Lora": {"lora_dropout": 0.25},
    "AdaLora": {"lora_dropout": 0.25, "total_step": 10},
    "LoHa": {"r": 4, "rank_dropout": 0.25, "module_dropout": 0.25},
    "LoKr": {"r": 2, "rank_dropout": 0.25, "module_dropout": 0.25},
    "BOFT": {"boft_block_size": 4, "boft_dropout": 0.25},
    "Vera": {"r": 4, "vera_dropout": 0.25, "target_modules": ["q_proj"]},
    "RandLora": {"r": 4, "randlora_dropout": 0.25},
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapters_dropout_is_off_and_named(name: str, caplog: pytest.LogCaptureFixture) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=48))
    model = peft.get_peft_model(base, getattr(peft, f"{name}Config")(**LAYERS | ADAPTERS[name])).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # most begin where an adapter adds nothing
                parameter.normal_(std=0.3)
    ids = torch.randint(3, 97, (2, 9))

    def passes() -> list[torch.Tensor]:
        return [model(input_ids=ids).logits.detach() for _ in range(12)]

    first, *others = passes()
    assert any(not torch.equal(first, other) for other in others)  # or there is nothing to switch off
    with caplog.at_level(logging.WARNING, "orpo_kernels"):
        disable_dropout(model)
    assert "sets the adapters' dropout of 0.25 to 0 too: pass disable_dropout=False" in caplog.text
    training = passes()
    expected = model.eval()(input_ids=ids).logits
    for logits in training:
        torch.testing.assert_close(logits, expected)
    caplog.clear()
    disable_dropout(model)
    assert not caplog.text


def test_a_models_own_dropout_is_not_the_adapters(caplog: pytest.LogCaptureFixture) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny("GPT2"), peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    with caplog.at_level(logging.WARNING, "orpo_kernels"):
        disable_dropout(model)
    assert not caplog.text
