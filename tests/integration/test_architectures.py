"""Models of every kind, tiny and random, trained through their own head as with full logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compatibility import measured
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CohereConfig,
    CohereForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from wrapping import (
    IGNORED,
    VOCAB,
    Trained,
    logits_loss,
    logps_of_logits,
    loss_error,
    make_batch,
    objective,
    through,
    tiny_llama,
    train,
)

from orpo_kernels.integration.head.logit_transform import Transform
from orpo_kernels.integration.lm_head import ModelLogps, attach
from orpo_kernels.integration.transformers import ORPOConfig, ORPOTrainer
from orpo_kernels.loss import merge_targets

IMAGE_TOKEN, IMAGE_PATCHES = VOCAB, 4
SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Weights larger than a real model's, so that no gradient is small beside the rounding of the others.
SIZES: dict[str, Any] = SPECIAL | {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
HEADS = {"head_dim": 8}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5}


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_positions=64,
            n_embd=32,
            n_layer=2,
            n_head=4,
            initializer_range=0.2,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def falcon_h1() -> nn.Module:
    mamba = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
    return FalconH1ForCausalLM(FalconH1Config(**SIZES, **HEADS, **mamba, lm_head_multiplier=0.5))


def mixtral(router: bool = False) -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(**SIZES, **HEADS, **EXPERTS, output_router_logits=router))


def gpt_oss(router: bool = False) -> nn.Module:
    config = GptOssConfig(**SIZES, **HEADS, **EXPERTS, sliding_window=4, output_router_logits=router)
    return GptOssForCausalLM(config)


def t5() -> nn.Module:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, **sizes, decoder_start_token_id=0))


def llava() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**sizes, image_size=16, patch_size=8, projection_dim=32, initializer_range=0.2)
    text = LlamaConfig(**SIZES | {"vocab_size": VOCAB + 1})
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, vision_feature_layer=-1)
    return LlavaForConditionalGeneration(config)


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "Llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "Mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, **HEADS, sliding_window=4)),
    "Qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, **HEADS)),
    "Gemma 2": lambda: Gemma2ForCausalLM(
        # Of a window that holds padding alone, its fp64 eager attention makes NaN.
        Gemma2Config(**SIZES, **HEADS, sliding_window=8, final_logit_softcapping=2.0, attn_implementation="eager")
    ),
    "Gemma 3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, **HEADS, sliding_window=4)),
    "Cohere": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)),
    "Granite": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0)),
    "Falcon-H1": falcon_h1,
    "Mixtral": mixtral,
    "gpt-oss": gpt_oss,
    "Mamba": lambda: MambaForCausalLM(
        MambaConfig(vocab_size=VOCAB, hidden_size=32, state_size=4, num_hidden_layers=2, pad_token_id=0)
    ),
    "GPT-2": gpt2,
    "Phi": lambda: PhiForCausalLM(PhiConfig(**SIZES)),
    "T5": t5,
    "Llava": llava,
}
TRANSFORMS = {
    "Gemma 2": Transform(softcap=2.0),
    "Cohere": Transform(0.25),
    "Granite": Transform(0.25),
    "Falcon-H1": Transform(0.5),
}


def make(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    # Without dropout, so that both ways see the same model.
    return ARCHITECTURES[name]().to(dtype).eval()


def batch_for(name: str, dtype: torch.dtype) -> Callable[[int, int], dict[str, Tensor]]:
    """Batches as `make_batch` has them, and what an architecture needs besides."""

    def batch(step: int, rank: int) -> dict[str, Tensor]:
        made = make_batch(step, rank)
        if name == "T5":
            # The encoder reads the prompt; the decoder starts from token 0.
            ids = made["input_ids"]
            made["decoder_input_ids"] = torch.cat([torch.zeros_like(ids[:, :1]), ids[:, :-1]], 1)
            made["targets"] = ids.masked_fill(ids == 0, IGNORED)
            made["nll_targets"] = made["targets"][: len(ids) // 2]
            made["input_ids"], made["attention_mask"] = ids[:, :5], made["attention_mask"][:, :5]
        if name == "Llava":
            fill = {"input_ids": IMAGE_TOKEN, "attention_mask": 1, "targets": IGNORED, "nll_targets": IGNORED}
            made = {key: F.pad(made[key], (IMAGE_PATCHES, 0), value=value) for key, value in fill.items()}
            random = torch.Generator().manual_seed(step)
            made["pixel_values"] = torch.randn(len(made["input_ids"]), 3, 16, 16, generator=random).to(dtype)
        return made

    return batch


def inputs_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name not in ("targets", "nll_targets")}


def full_logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(**inputs_of(batch)).logits
    return objective(logps_of_logits(logits, merge_targets(batch["targets"], batch["nll_targets"])), batch)


def through_the_head(ours: ModelLogps) -> Callable[[nn.Module, dict[str, Tensor]], Tensor]:
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        targets = merge_targets(batch["targets"], batch["nll_targets"])
        return objective(ours.logps(targets, **inputs_of(batch))[0], batch)

    return loss


def check_same(found: Trained, right: Trained, losses: float, gradients: float, eps: float) -> None:
    """As `wrapping.check_same`, but a gradient that is zero by symmetry (a key's bias) is rounding and no more."""
    assert torch.tensor(found.losses + right.losses).isfinite().all()
    measured(losses=loss_error(found, right))
    assert loss_error(found, right) <= losses, (found.losses, right.losses)
    assert found.gradients.keys() == right.gradients.keys()
    whole = torch.stack([gradient.norm() for gradient in right.gradients.values()]).norm()
    assert whole > 0.1
    for name, gradient in right.gradients.items():
        error = (found.gradients[name] - gradient).norm()
        if gradient.norm() > eps * whole:
            measured(gradients=float(error / gradient.norm()))
        assert error <= gradients * gradient.norm() + eps / 10 * whole, name


@pytest.mark.shows(
    "Architectures",
    "{name}",
    "2 steps and an evaluation, against full logits in fp32 and, where the model has it, fp64",
)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, id=f"{name}, {str(dtype).removeprefix('torch.')}")
        for dtype in (torch.float32, torch.float64)
        for name in ARCHITECTURES
        # The grouped products of experts have no fp64.
        if dtype == torch.float32 or name not in ("Mixtral", "gpt-oss")
    ],
)
def test_trains_as_full_logits(name: str, dtype: torch.dtype):
    model, batch = make(name, dtype), batch_for(name, dtype)
    ours = attach(model)
    found = train(model, through_the_head(ours), steps=2, batch=batch)
    right = train(make(name, dtype), full_logits, steps=2, batch=batch)
    # Mamba returns fp32 logits whatever its dtype.
    exact = dtype == torch.float64 and name != "Mamba"
    check_same(found, right, *(1e-13, 1e-12) if exact else (1e-5, 1e-4), torch.finfo(dtype).eps)
    assert ours.transform == TRANSFORMS.get(name, Transform())
    # What is frozen or unused in the one is in the other; here only what Llava does not take from its vision tower.
    without = {name for name, _ in model.named_parameters() if name not in found.gradients}
    assert all("post_layernorm" in name for name in without)


def test_images_reach_the_model():
    """Else the comparison above would not notice them missing from both."""
    batch = batch_for("Llava", torch.float32)(0, 0)
    ours = attach(make("Llava"))
    loss = through_the_head(ours)(ours.model, batch)
    batch["pixel_values"] = -batch["pixel_values"]
    assert abs(through_the_head(ours)(ours.model, batch) - loss) > 1e-3


# ---- mixtures of experts: the router's loss ----


@pytest.fixture
def trainer_of(tmp_path: Path) -> Callable[[nn.Module], ORPOTrainer]:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")), pad_token="a")

    def trainer_of(model: nn.Module) -> ORPOTrainer:
        args = ORPOConfig(str(tmp_path), use_cpu=True, report_to=[])
        return ORPOTrainer(model, args, processing_class=tokenizer)

    return trainer_of


@pytest.mark.shows(
    "Architectures", "router loss ({build.__name__})", "on and off, 2 steps against full logits with it added once"
)
@pytest.mark.parametrize("router", [True, False])
@pytest.mark.parametrize("build", [mixtral, gpt_oss])
def test_the_routers_loss_is_added_once(build: Callable[[bool], nn.Module], router: bool, trainer_of: Any):
    def full(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        outputs = model(**inputs_of(batch))
        loss = objective(logps_of_logits(outputs.logits, merge_targets(batch["targets"], batch["nll_targets"])), batch)
        if router:
            assert outputs.aux_loss > 1
            loss = loss + EXPERTS["router_aux_loss_coef"] * outputs.aux_loss
        return loss

    torch.manual_seed(0)
    model = build(router)
    trainer = trainer_of(model)
    found = train(model, lambda model, batch: trainer.orpo(model, batch)[0], steps=2)
    torch.manual_seed(0)
    check_same(found, train(build(router), full, steps=2), 1e-5, 1e-4, torch.finfo(torch.float32).eps)


# ---- what cannot be taken exactly ----


class Treated(LlamaForCausalLM):
    """Does something to its logits after the head. weight [] and offset [V] train, where `treat` uses them."""

    def __init__(self, treat: Callable[[Treated, Tensor], Tensor]) -> None:
        torch.manual_seed(0)
        super().__init__(LlamaConfig(**SIZES))
        self.weight, self.offset = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(VOCAB))
        self.treat = treat

    def forward(self, **inputs: Any) -> Any:
        outputs = super().forward(**inputs)
        outputs.logits = self.treat(self, outputs.logits)
        return outputs


UNKNOWN = {
    "a squashing": (
        lambda model, logits: logits / (1 + logits.abs()),
        r"neither a scale nor a soft-cap: \(-300.0, .*, 300.0\) became \[-0.99",
    ),
    "a logarithm": (lambda model, logits: logits.exp().log1p(), "neither a scale nor a soft-cap"),
    "log-probabilities": (lambda model, logits: logits.log_softmax(-1), r"became \[-600.0, -320.0"),
    "clamping": (lambda model, logits: logits.clamp(-50, 50), r"became \[-50.0, -20.0, .*, 50.0\]"),
    "a number added": (lambda model, logits: logits + 0.5, r"became \[-299.5, -19.5"),
    "a bias added": (lambda model, logits: logits + model.offset, r"7 placeholders and said: .*\(97\)"),
    "a token suppressed": (
        lambda model, logits: logits.index_fill(-1, torch.tensor([50]), -1e9),
        "needs a column for each entry of the vocabulary.*index 50 is out of bounds",
    ),
    "an early token suppressed": (
        lambda model, logits: logits.index_fill(-1, torch.tensor([3]), -1e9),
        "neither a scale nor a soft-cap",
    ),
    "a temperature that trains": (
        lambda model, logits: logits * model.weight,
        r"by a parameter that trains, \(\).*Freeze it",
    ),
}


@pytest.mark.shows("Architectures", "{name} after the head", "the error says what was seen", "refused")
@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_treatment_of_the_logits_is_an_error(name: str):
    treat, message = UNKNOWN[name]
    model, batch = Treated(treat), make_batch()
    loss = through(attach(model))
    with pytest.raises((ValueError, RuntimeError), match=f"(?s){message}"):
        loss(model, batch)
    # It is an error each time, not only on the first batch.
    with pytest.raises((ValueError, RuntimeError), match=f"(?s){message}"):
        loss(model, batch)
    # Nothing is left behind.
    assert model(input_ids=batch["input_ids"]).logits.shape[-1] == VOCAB


@pytest.mark.parametrize(
    ("treat", "transform"),
    [
        (lambda model, logits: 5 * logits.tanh(), Transform(5.0, 5.0)),
        (lambda model, logits: logits.tanh(), Transform(1.0, 1.0)),
        (lambda model, logits: logits * -0.5, Transform(-0.5)),
        (lambda model, logits: logits * (2 * model.weight.detach()), Transform(2.0)),
    ],
)
def test_odd_treatments_that_are_a_scale_or_a_cap(treat: Callable[[Treated, Tensor], Tensor], transform: Transform):
    model = Treated(treat)
    ours = attach(model)
    found = train(model, through(ours), steps=2)
    check_same(found, train(Treated(treat), logits_loss, steps=2), 1e-5, 1e-4, torch.finfo(torch.float32).eps)
    assert ours.transform == transform


def test_a_treatment_that_changes_is_an_error():
    model = Treated(lambda model, logits: logits * model.weight)
    model.weight.requires_grad_(False)
    loss, batch = through(attach(model)), make_batch()
    loss(model, batch)
    model.weight.fill_(1.5)
    with pytest.raises(RuntimeError, match="treats its logits otherwise than on the first batch"):
        loss(model, batch)


@pytest.mark.shows("Architectures", "a head that is no nn.Linear", "the error says what was found", "refused")
@pytest.mark.parametrize(
    ("head", "found"), [(None, "NoneType"), (nn.Conv1d(32, VOCAB, 1), "Conv1d"), (nn.Sequential(), "Sequential")]
)
def test_a_head_that_is_not_linear_is_an_error(head: nn.Module | None, found: str):
    model = tiny_llama()
    model.lm_head = head
    with pytest.raises(ValueError, match=f"the head of LlamaForCausalLM is {found}: only a plain nn.Linear"):
        attach(model)


def test_a_model_without_a_head_is_an_error():
    with pytest.raises(ValueError, match="the head of LlamaModel is NoneType"):
        attach(tiny_llama().model)
    with pytest.raises(ValueError, match=r"Linear has no get_output_embeddings\(\): give a causal language model"):
        attach(nn.Linear(2, 2))
