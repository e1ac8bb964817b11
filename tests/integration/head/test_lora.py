"""PEFT's adapters off the head and on it: trained as with full logits, or refused with what was found."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Gemma2Config, Gemma2ForCausalLM
from wrapping import (
    VOCAB,
    check_same,
    gradients_of,
    inputs_of,
    logits_loss,
    logps_of_logits,
    make_batch,
    relative_error,
    through,
    tiny_llama,
    train,
)

from orpo_kernels.integration.lm_head import ModelLogps, attach
from orpo_kernels.loss import merge_targets

peft = pytest.importorskip("peft", reason="peft is not installed")
LoraConfig, PeftModel, get_peft_model = peft.LoraConfig, peft.PeftModel, peft.get_peft_model
BATCH = make_batch()
INPUTS = inputs_of(BATCH)
TARGETS = merge_targets(BATCH["targets"], BATCH["nll_targets"])


def lora(base: Callable[[], nn.Module] = tiny_llama, on: tuple[str, ...] = ("lm_head",), **options: Any) -> PeftModel:
    """A tiny model with LoRA on the layers named `on`; A and B are both random, so that both have gradients."""
    settings = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "target_modules": list(on)}
    return get_peft_model(base(), LoraConfig(**settings | options))


def two_adapters(**second: Any) -> PeftModel:
    """Both active, with ranks and scales of their own; only the second has a dropout."""
    model = lora()
    settings = {"r": 3, "lora_alpha": 2, "lora_dropout": 0.5, "target_modules": ["lm_head", "v_proj"]}
    model.add_adapter("second", LoraConfig(init_lora_weights=False, **settings | second))
    model.base_model.set_adapter(["default", "second"])
    return model


def biased() -> nn.Module:
    model = tiny_llama()
    model.lm_head = nn.Linear(32, VOCAB)
    return model


def gemma2() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 2.0}
    return Gemma2ForCausalLM(Gemma2Config(**sizes, initializer_range=0.2, attn_implementation="eager"))


def tied() -> nn.Module:
    return tiny_llama(tie_word_embeddings=True)


def head_gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: gradient for name, gradient in gradients_of(model).items() if ".lm_head." in name}


def loss_of(model: nn.Module, ours: ModelLogps | None = None) -> float:
    """The first batch's loss as evaluation has it, through `ours` or by full logits."""
    with torch.no_grad():
        return (logits_loss if ours is None else through(ours))(model, BATCH).item()


# ---- trained as full logits ----

MODELS = {
    "off the head": lambda: lora(on=("q_proj", "down_proj")),
    "on the head": lora,
    "on both": lambda: lora(on=("q_proj", "lm_head")),
    "on a tied head": lambda: lora(tied),
    "on a head with a bias": lambda: lora(biased),
    "on a soft-capped head": lambda: lora(gemma2),
    "with a bias of its own": lambda: lora(lora_bias=True),
    "biases on both": lambda: two_adapters(lora_bias=True, lora_dropout=0.0),
    "another bias": lambda: lora(biased, lora_bias=True),
    "rank-stabilised": lambda: lora(use_rslora=True),
    "dropout": lambda: lora(on=("q_proj", "lm_head"), lora_dropout=0.3),
    "several adapters": two_adapters,
    "a head that trains whole": lambda: lora(on=("q_proj",), modules_to_save=["lm_head"]),
    "a tied head that trains whole": lambda: lora(tied, on=("q_proj",), modules_to_save=["lm_head"]),
    "in float64": lambda: two_adapters().double(),
}


@pytest.mark.shows(
    "Adapters", "LoRA {name}", "3 steps against full logits; every gradient of the head's adapters not zero"
)
@pytest.mark.filterwarnings("ignore:.*lora_bias=True.*", "ignore:Model has .tie_word_embeddings=True.")
@pytest.mark.parametrize("name", MODELS)
def test_trains_as_full_logits(name: str):
    model, same = MODELS[name](), MODELS[name]()
    ours = attach(model)
    torch.manual_seed(1)  # for the dropout
    found = train(model, through(ours))
    torch.manual_seed(1)
    right = train(same)
    check_same(found, right, *(1e-12, 1e-9) if name == "in float64" else ())
    of_head = [gradient for parameter, gradient in found.gradients.items() if ".lm_head." in parameter]
    assert len(of_head) == 0 if name == "off the head" else all(gradient.any() for gradient in of_head)


@pytest.mark.shows("Adapters", "LoRA put on after `attach`", "3 steps against full logits")
def test_adapters_put_on_after_attach():
    model = tiny_llama()
    ours = attach(model)
    loss_of(model, ours)  # the first batch goes through the bare head
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False))
    same = copy.deepcopy(adapted)
    attach(same).detach()
    check_same(train(adapted, through(ours)), train(same))


def test_a_head_made_trainable_after_attach():
    model = tiny_llama()
    ours = attach(model)
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, modules_to_save=["lm_head"])
    adapted = get_peft_model(model, config)
    found = train(adapted, through(ours))
    check_same(found, train(lora(on=("q_proj",), r=8, lora_alpha=8, modules_to_save=["lm_head"])))
    assert any("lm_head" in name for name in found.gradients)


def test_the_dropout_is_the_adapters_own():
    """Else the comparison above would not notice it missing from both."""
    model = lora(lora_dropout=0.5)
    ours = attach(model)
    losses = [loss_of(model, ours) for _ in range(2)]
    assert losses[0] != losses[1]
    model.eval()
    assert loss_of(model, ours) == loss_of(model, ours) == pytest.approx(loss_of(model), rel=1e-6)


def test_hooks_of_the_adapters_layers_fire():
    model = two_adapters()
    ours, called = attach(model), []
    head = model.get_output_embeddings()
    for name, layer in head.named_modules():
        if isinstance(layer, (nn.Linear, nn.Dropout)) or layer is head:
            layer.register_forward_hook(lambda *_, name=name: called.append(name))
    model(**INPUTS)
    as_peft_calls, called[:] = set(called), []
    ours.logps(TARGETS, **INPUTS)
    assert set(called) == as_peft_calls
    assert len(as_peft_calls) == 7


def test_mean_logits():
    model = two_adapters(lora_bias=True)
    model.eval()
    over = INPUTS["attention_mask"].bool()
    with torch.no_grad():
        logits = model(**INPUTS).logits.mean(-1)
        found = attach(model).sequence_scores(TARGETS, over, **INPUTS).mean_logits
    right = (logits * over).sum(-1) / over.sum(-1)
    assert torch.allclose(found, right, rtol=1e-4, atol=1e-6)


# ---- switched, merged, saved ----


@pytest.mark.shows("Adapters", "switching adapters", "losses as with full logits for each")
def test_switching_adapters():
    model = two_adapters(lora_dropout=0.0)
    ours = attach(model)
    losses = []
    for active in (["default"], ["second"], ["second", "default"]):
        model.base_model.set_adapter(active)
        losses.append(loss_of(model, ours))
        assert losses[-1] == pytest.approx(loss_of(model), rel=1e-6)
    with model.disable_adapter():
        losses.append(loss_of(model, ours))
        assert losses[-1] == pytest.approx(loss_of(tiny_llama()), rel=1e-6)
    model.get_output_embeddings().set_scale("default", 3.0)
    losses.append(loss_of(model, ours))
    assert losses[-1] == pytest.approx(loss_of(model), rel=1e-6)
    model.delete_adapter("second")
    assert loss_of(model, ours) == pytest.approx(loss_of(model), rel=1e-6)
    assert len({round(loss, 4) for loss in losses}) == 5


def test_switching_heads_that_train_whole():
    options: dict[str, Any] = {"target_modules": ["q_proj"], "init_lora_weights": False}
    model = get_peft_model(tiny_llama(), LoraConfig(**options, modules_to_save=["lm_head"]))
    model.add_adapter("second", LoraConfig(**options, modules_to_save=["lm_head"]))
    ours = attach(model)
    with torch.no_grad():
        model.get_output_embeddings().modules_to_save["second"].weight.neg_()
    losses = []
    for active in ("default", "second"):
        model.set_adapter(active)
        losses.append(loss_of(model, ours))
        assert losses[-1] == pytest.approx(loss_of(model), rel=1e-6)
    with model.disable_adapter():
        losses.append(loss_of(model, ours))
        assert losses[-1] == pytest.approx(loss_of(tiny_llama()), rel=1e-6)
    assert len(set(losses)) == 3


@pytest.mark.shows("Adapters", "merging and unmerging", "losses as with full logits in each state")
def test_merging():
    model = lora(on=("q_proj", "lm_head"))
    ours = attach(model)
    right = loss_of(model)
    model.merge_adapter()
    assert loss_of(model, ours) == pytest.approx(loss_of(model), rel=1e-6)
    assert loss_of(model, ours) == pytest.approx(right, rel=1e-5)
    with model.disable_adapter():  # which takes the adapter out of the weight again
        assert loss_of(model, ours) == pytest.approx(loss_of(tiny_llama()), rel=1e-5)
    model.merge_adapter()
    model.unmerge_adapter()
    check_same(train(model, through(ours)), train(lora(on=("q_proj", "lm_head"))))
    right = loss_of(model)
    merged = model.merge_and_unload()
    assert type(merged.lm_head) is nn.Linear
    assert loss_of(merged, ours) == pytest.approx(right, rel=1e-5)


@pytest.mark.shows("Adapters", "saving and loading", "the loaded model's loss is the saved one's")
@pytest.mark.parametrize(
    "options", [{"on": ("q_proj", "lm_head")}, {"on": ("q_proj",), "modules_to_save": ["lm_head"]}]
)
def test_saving_and_loading(options: dict[str, Any], tmp_path: Path):
    model = lora(**options)
    train(model, through(attach(model)))
    right = loss_of(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert loss_of(loaded, attach(loaded)) == pytest.approx(right, rel=1e-6)
    merged = loaded.merge_and_unload()
    assert loss_of(merged, attach(merged)) == pytest.approx(right, rel=1e-5)


def test_detach_leaves_no_trace():
    def state(model: nn.Module) -> list[tuple[str, type, list[str]]]:
        return [(name, type(layer), sorted(vars(layer))) for name, layer in model.named_modules()]

    model = two_adapters()
    before, logits = state(model), model.eval()(**INPUTS).logits
    ours = attach(model)
    ours.logps(TARGETS, **INPUTS)
    assert torch.equal(model(**INPUTS).logits, logits)
    assert list(model.state_dict()) == list(two_adapters().state_dict())
    ours.detach()
    assert state(model) == before
    assert torch.equal(model(**INPUTS).logits, logits)


def test_copies_have_adapters_of_their_own():
    model = lora()
    ours = attach(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        right, gradients = loss_of(model), train(lora(), steps=1).gradients
        check_same(train(twin, through(attach(twin)), steps=1), train(lora(), steps=1))
        assert loss_of(model, ours) == pytest.approx(right, rel=1e-6)
        assert all(parameter.grad is None for parameter in model.parameters())
        assert gradients


# ---- refused ----

REFUSED = {
    "DoRA": ("DoraLinearVariant", lambda: lora(use_dora=True)),
    "aLoRA": ("ALoraLinearVariant", lambda: lora(alora_invocation_tokens=[3], task_type="CAUSAL_LM")),
    "IA3": ("ia3", lambda: with_config(peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[]))),
    "LoHa": ("loha", lambda: with_config(peft.LoHaConfig(target_modules=["lm_head"]))),
    "LoKr": ("lokr", lambda: with_config(peft.LoKrConfig(target_modules=["lm_head"]))),
    "VeRA": ("vera", lambda: with_config(peft.VeraConfig(target_modules=["lm_head"], r=4))),
    "OFT": ("oft", lambda: with_config(peft.OFTConfig(target_modules=["lm_head"], oft_block_size=4))),
    "FourierFT": ("fourierft", lambda: with_config(peft.FourierFTConfig(target_modules=["lm_head"], n_frequency=10))),
    "AdaLoRA": ("adalora", lambda: with_config(peft.AdaLoraConfig(target_modules=["lm_head"], total_step=10))),
    "second is DoRA": ("'second'.*DoraLinearVariant", lambda: two_adapters(use_dora=True)),
    "trained tokens": ("no plain nn.Linear", lambda: lora(tied, ("q_proj",), trainable_token_indices=[1])),
}


def with_config(config: peft.PeftConfig) -> PeftModel:
    return get_peft_model(tiny_llama(), config)


@pytest.mark.shows("Adapters", "{name} on the head", "the error names what was found", "refused")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::peft.utils.warning.PeftWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_other_adapters_on_the_head_are_refused(name: str):
    found, make = REFUSED[name]
    with pytest.raises(ValueError, match=f"the head.*{found}"):
        attach(make())


def test_other_adapters_put_on_later_are_refused():
    model = tiny_llama()
    ours = attach(model)
    adapted = get_peft_model(model, LoraConfig(target_modules=["lm_head"], use_dora=True))
    with pytest.raises(ValueError, match=r"'default'.*DoraLinearVariant.*modules_to_save"):
        ours.logps(TARGETS, model=adapted, **INPUTS)


def test_other_adapters_are_taken_once_they_are_merged_or_off():
    model = lora(use_dora=True)
    right = loss_of(model)
    with model.disable_adapter():
        ours = attach(model)
        assert loss_of(model, ours) == pytest.approx(loss_of(tiny_llama()), rel=1e-6)
    model.merge_adapter()
    assert loss_of(model, ours) == pytest.approx(right, rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"on": ("q_proj",), "modules_to_save": ["lm_head"]}])
def test_batches_that_mix_the_heads_adapters_are_refused(options: dict[str, Any]):
    model = lora(**options).eval()
    with pytest.raises(ValueError, match=r"adapter_names was passed.*set_adapter"):
        attach(model).logps(TARGETS, adapter_names=["default", "__base__"] * 2, **INPUTS)


def test_batches_that_mix_other_adapters():
    model = lora(on=("q_proj",)).eval()
    names = {"adapter_names": ["default", "__base__"] * 2}
    right = logps_of_logits(model(**INPUTS, **names).logits, TARGETS)
    found, _ = attach(model).logps(TARGETS, **INPUTS, **names)
    assert relative_error(found, right) < 1e-6
    assert relative_error(found, logps_of_logits(model(**INPUTS).logits, TARGETS)) > 1e-3


# ---- dtypes ----


def in_bf16(model: nn.Module) -> nn.Module:
    """The base in bf16, the adapters in fp32: what `get_peft_model` makes of a bf16 model."""
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    return model


def first_step(
    model: nn.Module, ours: ModelLogps | None = None, autocast: bool = False
) -> tuple[float, dict[str, Tensor]]:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = (logits_loss if ours is None else through(ours))(model, BATCH)
    loss.backward()
    return loss.item(), gradients_of(model)


@pytest.mark.parametrize("autocast", [False, True])
def test_fp32_adapters_on_a_bf16_head(autocast: bool):
    """No further from float64 on the same values than twice PEFT's own arithmetic."""
    cast = (lambda model: model) if autocast else in_bf16
    exact = first_step(in_bf16(lora()).double() if not autocast else lora().double())
    of_peft = first_step(cast(lora()), autocast=autocast)
    model = cast(lora())
    found = first_step(model, attach(model), autocast)
    assert abs(found[0] - exact[0]) <= 2 * max(abs(of_peft[0] - exact[0]), 2e-3 * exact[0])
    for name, gradient in found[1].items():
        assert gradient.dtype == torch.float32
        assert relative_error(gradient, exact[1][name]) <= 2 * relative_error(of_peft[1][name], exact[1][name])


def test_bf16_base_is_what_peft_makes():
    """That the test above tries PEFT's default."""
    model = get_peft_model(tiny_llama().bfloat16(), LoraConfig(target_modules=["lm_head"]))
    head = model.get_output_embeddings()
    assert head.base_layer.weight.dtype == torch.bfloat16
    assert head.lora_B["default"].weight.dtype == torch.float32


def test_an_fp32_head_in_a_bf16_model():
    """Refused as the model's own head refuses it, right under autocast."""

    def make() -> nn.Module:
        model = lora(base=lambda: tiny_llama().bfloat16(), on=("q_proj",))
        model.get_output_embeddings().float()
        return model

    model = make()
    ours = attach(model)
    with pytest.raises(RuntimeError, match="same dtype"):
        model(**INPUTS)
    with pytest.raises(TypeError, match=r"mixed dtypes \(hidden torch.bfloat16, weight torch.float32\).*autocast"):
        ours.logps(TARGETS, **INPUTS)
    loss, gradients = first_step(model, ours, autocast=True)
    right, expected = first_step(make(), autocast=True)
    assert loss == pytest.approx(right, rel=5e-3)
    for name, gradient in expected.items():
        assert relative_error(gradients[name], gradient) < 5e-2, name


@pytest.mark.shows("Adapters", "`prepare_model_for_kbit_training` (fp32 head)", "against full logits")
@pytest.mark.parametrize("on", [("q_proj",), ("q_proj", "lm_head")])
def test_after_the_preparation_for_k_bit_training(on: tuple[str, ...]):
    """It leaves everything that is not packed in fp32, the head too."""

    def make() -> nn.Module:
        base = peft.prepare_model_for_kbit_training(tiny_llama().bfloat16(), use_gradient_checkpointing=False)
        assert base.lm_head.weight.dtype == torch.float32
        return lora(lambda: base, on)

    model = make()
    check_same(train(model, through(attach(model))), train(make()))


@pytest.fixture(scope="module")
def bf16_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    # Quantised in blocks of 64 entries.
    tiny_llama(hidden_size=64, intermediate_size=64).bfloat16().save_pretrained(folder)
    return folder


def bitsandbytes_model(folder: Path, compute: torch.dtype, **options: Any) -> nn.Module:
    """The model in 4 bits as QLoRA prepares it: the rest is fp32, the head too, and layers are checkpointed."""
    pytest.importorskip("bitsandbytes", reason="QLoRA: pip install bitsandbytes, which runs on the CPU, to test it")
    packed = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute, **options)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=packed, device_map={"": "cpu"})
    torch.manual_seed(0)
    return peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})


@pytest.mark.shows("Adapters", "QLoRA (bitsandbytes on the CPU)", "nf4 backbone, against full logits")
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"on": ("q_proj", "up_proj")},
        {"on": ("q_proj", "lm_head")},
        {"on": ("q_proj",), "modules_to_save": ["lm_head"]},
    ],
)
def test_qlora(options: dict[str, Any], compute: torch.dtype, bf16_folder: Path):
    def make() -> nn.Module:
        return lora(lambda: bitsandbytes_model(bf16_folder, compute), **options).train()

    model = make()
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
    assert type(layer).__name__ == "Linear4bit"
    assert model.get_output_embeddings().weight.dtype == torch.float32
    if compute == torch.float32:
        check_same(train(model, through(attach(model))), train(make()))
    else:  # The layers round what reaches them to bf16: the last digit of a gradient may move it by 2^-8.
        check_same(train(model, through(attach(model)), steps=1), train(make(), steps=1), gradients=2**-8)


@pytest.mark.shows("Adapters", "a 4-bit head", "the error names it", "refused")
def test_a_packed_head_is_refused(bf16_folder: Path):
    model = bitsandbytes_model(bf16_folder, torch.float32, llm_int8_skip_modules=["none"])
    with pytest.raises(ValueError, match=r"the head is a Linear4bit with a forward of its own.*quantised"):
        attach(model)
    with pytest.raises(ValueError, match=r"the head has the adapter 'default', a peft.tuners.lora.bnb.Linear4bit"):
        attach(lora(lambda: model))


# ---- wrappers ----


def test_compiled():
    """No graph break at the head; four graphs for any number of lengths: placeholders, first, others, evaluation."""
    torch._dynamo.reset()
    model, same = two_adapters(), two_adapters()
    counter = CompileCounterWithBackend("eager")
    compiled, loss = torch.compile(model.eval(), backend=counter, fullgraph=True), through(attach(model))
    found = train(model, lambda _, batch: loss(compiled, batch), steps=5)
    check_same(found, train(same.eval(), steps=5))
    assert counter.frame_count == 4


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_adapters_that_are_sharded_by_themselves():
    """Each of the adapters' layers gathers its own weight, and frees it after the forward."""
    model = two_adapters(lora_dropout=0.0)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    head = model.get_output_embeddings()
    for layer in (*head.lora_A.values(), *head.lora_B.values(), head.base_layer, head, model):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    found = train(model, through(attach(model)))
    gradients = {name: gradient.full_tensor() for name, gradient in found.gradients.items()}
    check_same(found._replace(gradients=gradients), train(two_adapters(lora_dropout=0.0)))


# ---- said ----


@pytest.mark.shows("Adapters", "a tied head that trains unnoticed", "one warning")
def test_a_tied_head_that_trains_unnoticed_is_said_once(caplog: pytest.LogCaptureFixture):
    model = lora(tied, on=("q_proj",))
    with caplog.at_level(logging.WARNING, "orpo_kernels"):
        ours = attach(model)
        ours.logps(TARGETS, **INPUTS)
        assert not caplog.records  # frozen
        model.get_input_embeddings().weight.requires_grad_()
        model = model.base_model.model
        for _ in range(2):
            ours = attach(model)
            ours.logps(TARGETS, **INPUTS)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "tied to the input embeddings and trains with them" in caplog.records[0].message
