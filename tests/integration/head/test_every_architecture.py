"""Every causal language model that transformers maps, built tiny: log-probabilities and layouts against full logits."""

from __future__ import annotations

import warnings
from contextlib import suppress
from typing import Any

import pytest
import torch
from compatibility import note
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from orpo_kernels.integration.lm_head import attach
from orpo_kernels.integration.packing.gate import LayoutGate, model_inputs
from orpo_kernels.integration.packing.layout import lay_out
from orpo_kernels.linear_logps import shift_labels

VOCAB = 97
# What configurations call their sizes; each is set where a configuration has a number of that name.
TINY: dict[str, int] = (
    dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size"), VOCAB)
    | dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim", "lru_width"), 32
    )
    | dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner"), 64)
    | dict.fromkeys(("ffn_hidden_size", "d_ff", "dense_intermediate_size"), 64)
    | dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32)
    | dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2)
    | dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4)
    | dict.fromkeys(("encoder_attention_heads", "rotary_dim"), 4)
    | dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4)
    | dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "moe_k", "moe_topk", "index_n_heads"), 2)
    | dict.fromkeys(("head_dim", "attention_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8)
    | dict.fromkeys(("state_size", "mamba_d_state", "mamba_n_heads", "mamba_d_head", "index_head_dim"), 8)
    | dict.fromkeys(("q_lora_rank", "kv_lora_rank", "attention_chunk_size"), 16)
    | dict.fromkeys(("max_position_embeddings", "n_positions"), 64)
    | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "mamba_n_groups": 1, "hidden_size_per_layer_input": 8}
    | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
)
_MOST_PARAMETERS = 30_000_000
# A head whose product is not nn.Linear's, and one that is given the hidden states of two predictions a token.
REFUSED: dict[str, str] = {
    "dory": "DoryLMHead with a forward of its own",
    "prophetnet": "the head was given hidden states .* where targets call for",
}


def by_constructor(name: str, **options: int) -> Any:
    kind = CONFIG_MAPPING[name]
    usual = kind()
    return kind(**{key: value for key, value in (TINY | options).items() if type(getattr(usual, key, None)) is int})


def without_groups(name: str) -> Any:
    """Attention through a latent has as many keys as queries."""
    return by_constructor(name, num_key_value_heads=TINY["num_attention_heads"])


def by_attributes(name: str) -> Any:
    config = CONFIG_MAPPING[name]()
    for part in {id(part): part for part in (config, config.get_text_config(decoder=True))}.values():
        for key, value in TINY.items():
            if type(getattr(part, key, None)) is int:
                with suppress(AttributeError, NotImplementedError):  # a property without a setter
                    setattr(part, key, value)
        for key in ("layer_types", "layers_block_type", "mlp_layer_types"):
            kinds = getattr(part, key, None)
            if isinstance(kinds, list) and len(kinds) > 2:
                setattr(part, key, [kinds[0], kinds[-1]])
    return config


def build(name: str) -> Any:
    """The model in fp32; skipped where shrinking its configuration makes no small model that runs on text alone."""
    reasons = []
    for shrunk in (by_constructor, by_attributes, without_groups):
        try:
            config = shrunk(name)
            with torch.device("meta"):
                size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
            if size > _MOST_PARAMETERS:
                reasons.append(f"it still has {size:,} parameters")
                continue
            torch.manual_seed(0)
            model: Any = AutoModelForCausalLM.from_config(config).float().eval()
            for parameter in model.parameters():  # what starts at zero would hide a mistake
                if parameter.dim() > 1:
                    nn.init.normal_(parameter, std=0.1)
            with torch.no_grad():
                logits = model(**batch(), use_cache=False).logits
        except Exception as error:  # of any kind: the configuration is one that nobody would make
            reasons.append(f"{type(error).__name__}: {error}")
            continue
        if logits.isfinite().all():
            return model
        reasons.append("its own logits are not finite")
    pytest.skip(" | ".join(reasons))


def batch() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCAB, (2, 16), generator=random)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def full_logps(model: nn.Module, targets: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    logits = model(**inputs, use_cache=False).logits.float()
    return logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0] * (targets != -100)


def gradients(model: nn.Module, logps: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (logps * torch.linspace(-1, 2, logps.numel()).view(logps.shape)).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.exhaustive
@pytest.mark.shows(
    "Causal language models", "{name}", "log-probabilities and gradients against full logits, one batch in fp32"
)
@pytest.mark.parametrize("name", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
def test_log_probabilities(name: str) -> None:
    model, inputs = build(name), batch()
    labels = inputs["input_ids"].clone()
    labels[0, :5] = -100
    targets = shift_labels(labels)
    if name in REFUSED:
        with pytest.raises((ValueError, RuntimeError), match=REFUSED[name]):
            attach(model).logps(targets, use_cache=False, **inputs)
        note("refused, with a clear error")
        return
    right = full_logps(model, targets, inputs)
    expected = gradients(model, right)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, _ = attach(model).logps(targets, use_cache=False, **inputs)
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    reached = gradients(model, found)
    assert reached.keys() == expected.keys()
    for key, gradient in reached.items():
        assert (gradient - expected[key]).norm() <= 1e-3 * expected[key].norm() + 1e-6 * whole, key


def pair(prompt: int, chosen: int, rejected: int, seed: int) -> Any:
    ids = torch.randint(3, VOCAB, (40,), generator=torch.Generator().manual_seed(seed)).tolist()
    return {
        "chosen_input_ids": ids[: prompt + chosen],
        "chosen_prompt_length": prompt,
        "rejected_input_ids": ids[:prompt] + ids[40 - rejected :],
        "rejected_prompt_length": prompt,
    }


@pytest.mark.exhaustive
@pytest.mark.shows("Their layouts", "{name}", "the layout that the gate admits, against padded rows in fp32")
@pytest.mark.parametrize("name", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
def test_layouts(name: str) -> None:
    """What the gate admits on one batch is right on another."""
    model = build(name)
    if name in REFUSED:
        return
    logps = attach(model)
    gate = LayoutGate(logps, asked_for=False)
    gate.admit(lay_out("shared", [pair(7, 5, 9, 0), pair(5, 3, 3, 1)]))
    note(f"{gate.name} rows")
    if gate.name == "padded":
        return
    assert gate.name is not None
    others = [pair(3, 12, 4, 2), pair(9, 2, 7, 3), pair(0, 4, 3, 4)]
    padded, packed = lay_out("padded", others), lay_out(gate.name, others)
    right, found = (
        logps.logps(made["targets"], rows=made["rows"], use_cache=False, **model_inputs(made))[0]
        for made in (padded, packed)
    )
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
