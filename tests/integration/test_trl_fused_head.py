"""`model(..., fused_lm_head=True)` with our head: TRL's answer, field by field, and what TRL's own cannot do."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

for name in ("datasets", "peft", "trl"):
    pytest.importorskip(name, reason=f"{name} is not installed")
import transformers  # noqa: E402
import trl.trainer.utils as trl_utils  # noqa: E402
from peft import LoraConfig, PromptTuningConfig, get_peft_model  # noqa: E402
from trl_runs import LORA, SIZES, VOCAB, gemma2, llama, make, run  # noqa: E402

from orpo_kernels.integration.trl import restore, use  # noqa: E402
from orpo_kernels.integration.trl.fused_head import head_on  # noqa: E402

ALL = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
FIELDS = ("loss", *ALL, "label_mask", "aux_loss")
add_stock = trl_utils.add_fused_lm_head


def add_ours(model: nn.Module, *args: Any, entropy_grad: bool = True, **options: Any) -> None:
    with use(entropy_grad=entropy_grad):
        trl_utils.add_fused_lm_head(model, *args, **options)


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    restore()


def batch(rows: int = 3, length: int = 9) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (rows, length), generator=random)
    labels = ids.clone()
    labels[0, :4] = labels[1, 6:] = -100
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4, router_aux_loss_coef=0.5)
    return transformers.MixtralForCausalLM(config)


def weighted(output: Any) -> Tensor:
    """A scalar of all that may have a gradient."""
    total = output.loss
    for at, name in enumerate(("log_probs", "entropy")):
        value = getattr(output, name)
        if value is not None and value.requires_grad:
            total = total + (value * torch.linspace(at - 1, 2, value.numel()).view(value.shape)).sum()
    return total


def check(found: nn.Module, expected: nn.Module, tolerance: float = 1e-5, **inputs: Any) -> None:
    """Outputs and gradients of two models that are the same but for their heads."""
    one, other = (model(**inputs, fused_lm_head=True) for model in (found, expected))
    for name in FIELDS:
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=name)
    for model, output in ((found, one), (expected, other)):
        model.zero_grad()
        weighted(output).backward()
    for (name, p), q in zip(found.named_parameters(), expected.parameters(), strict=True):
        if q.grad is not None and q.requires_grad:
            torch.testing.assert_close(p.grad, q.grad, rtol=tolerance, atol=tolerance * float(q.grad.norm()), msg=name)


CASES: dict[str, dict[str, Any]] = {
    "labels": {},
    "temperature": {"temperature": 0.7},
    "log-probs alone": {"outputs": ("log_probs",)},
    "some": {"outputs": ("log_probs", "is_top1", "mean_logits")},
}


@pytest.mark.parametrize("build", [llama, gemma2, mixtral], ids=["llama", "gemma2", "mixtral"])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_the_answer_is_trls(options: dict[str, Any], build: Any):
    models = build(), build()
    for model, add in zip(models, (add_ours, add_stock), strict=True):
        add(model, **{"outputs": ALL} | options)
    check(*models, **batch())


@pytest.mark.parametrize(
    "more",
    [
        {"num_items_in_batch": 7},
        {"num_items_in_batch": torch.tensor(7)},
        {"output_router_logits": True},
        {"shift_labels": True},
    ],
    ids=["a number of items", "a tensor of items", "router loss", "shifted labels"],
)
def test_arguments_are_trls(more: dict[str, Any]):
    models = mixtral(), mixtral()
    for model, add in zip(models, (add_ours, add_stock), strict=True):
        add(model, outputs=ALL)
    inputs = batch()
    if "shift_labels" in more:
        more = {"shift_labels": inputs.pop("labels").roll(-1, 1)}
    check(*models, **inputs, **more)


def test_positional_arguments():
    model = llama()
    add_ours(model, outputs=ALL)
    inputs = batch()
    found = model(inputs["input_ids"], inputs["attention_mask"], labels=inputs["labels"], fused_lm_head=True)
    torch.testing.assert_close(found.log_probs, model(**inputs, fused_lm_head=True).log_probs)


def test_nothing_to_score_is_a_zero_with_gradients():
    model = llama()
    add_ours(model, outputs=ALL)
    inputs = batch()
    inputs["labels"].fill_(-100)
    output = model(**inputs, fused_lm_head=True)
    assert output.loss == 0
    assert not output.label_mask.any()
    (output.loss + output.log_probs.sum()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_without_labels_is_an_error():
    model = llama()
    add_ours(model)
    with pytest.raises(ValueError, match="without labels: there is nothing to score; pass labels"):
        model(input_ids=batch()["input_ids"], fused_lm_head=True)


def test_other_calls_are_the_models_own():
    model, plain = llama(), llama()
    add_ours(model)
    inputs = batch()
    found, expected = model(**inputs, num_items_in_batch=5), plain(**inputs, num_items_in_batch=5)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(inputs["input_ids"], **options), plain.generate(inputs["input_ids"], **options))


def test_a_copy_has_a_head_of_its_own():
    model = llama()
    add_ours(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    assert head_on(other).logps.model is other
    inputs = batch()
    expected = torch.log_softmax(other(input_ids=inputs["input_ids"]).logits[:, :-1], -1)
    inputs |= {"labels": inputs["input_ids"], "attention_mask": torch.ones_like(inputs["input_ids"])}
    found = other(**inputs, fused_lm_head=True).log_probs
    torch.testing.assert_close(found, expected.gather(-1, inputs["input_ids"][:, 1:, None])[..., 0])
    other(**inputs, fused_lm_head=True).loss.backward()
    assert model.lm_head.weight.grad is None


def test_a_second_trainer_of_one_model_changes_the_arguments():
    model = llama()
    add_ours(model, temperature=0.5)
    add_ours(model, temperature=2.0, outputs=ALL)
    assert (head_on(model).temperature, len(vars(model)["_orpo_fused_heads"])) == (2.0, 1)
    add_stock(model)  # over ours
    add_ours(model, temperature=3.0)
    plain = llama()
    add_stock(plain, temperature=3.0)
    check(model, plain, **batch())


def test_entropies_in_a_loss_that_was_not_to_hold_them_are_an_error():
    model = llama()
    add_ours(model, outputs=ALL, entropy_grad=False)
    output = model(**batch(), fused_lm_head=True)
    output.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"the loss holds the entropies.*entropy_grad=True"):
        output.entropy.sum().backward()


# ---- adapters, precision, offloading ----


def test_prompt_tuning():
    models = []
    for add in (add_ours, add_stock):
        model = llama()
        add(model, outputs=ALL)
        models.append(get_peft_model(model, PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")))
        torch.manual_seed(3)
        nn.init.normal_(models[-1].prompt_encoder["default"].embedding.weight)
    check(*models, **batch())


def test_lora_on_the_head_is_in_the_answer():
    """TRL's leaves it out."""
    model = get_peft_model(llama(), LoraConfig(**LORA, target_modules=["lm_head"]))
    add_ours(model.get_base_model(), outputs=ALL)
    inputs = batch()
    z = model(**inputs).logits[:, :-1]
    scored = inputs["labels"][:, 1:] != -100
    expected = z.log_softmax(-1).gather(-1, inputs["labels"][:, 1:].clamp(min=0)[..., None])[..., 0] * scored
    output = model(**inputs, fused_lm_head=True)
    torch.testing.assert_close(output.log_probs, expected, rtol=1e-5, atol=1e-5)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    output.log_probs.sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected.sum().backward()
    assert found.keys() == names
    for n, p in model.named_parameters():
        if n in names:
            torch.testing.assert_close(found[n], p.grad, rtol=1e-4, atol=1e-5 * float(p.grad.norm()))


@pytest.mark.parametrize("autocast", [False, True])
def test_a_bf16_head_in_fp32(autocast: bool):
    models = llama().bfloat16(), llama().bfloat16()
    for model, add in zip(models, (add_ours, add_stock), strict=True):
        add(model, cast_lm_head_to_fp32=True, outputs=ALL)
    inputs = batch()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        one, other = (model(**inputs, fused_lm_head=True) for model in models)
    assert one.log_probs.dtype == torch.float32
    for name in ("log_probs", "entropy", "mean_logits"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-5, atol=1e-5)


def test_grpo_with_its_head_in_fp32(tmp_path: Any):
    with use():
        trainer = make("GRPO", llama().bfloat16(), tmp_path, cast_lm_head_to_fp32=True, max_steps=2, bf16=True)
    found = run(trainer)
    stock = run(make("GRPO", llama().bfloat16(), tmp_path, cast_lm_head_to_fp32=True, max_steps=2, bf16=True))
    assert found.steps[0]["entropy"] == pytest.approx(stock.steps[0]["entropy"], rel=1e-5)


def test_offloaded_weights():
    from accelerate import cpu_offload

    plain = llama()
    add_stock(plain, outputs=ALL)
    model = cpu_offload(llama(), execution_device="cpu")
    add_ours(model, outputs=ALL)
    inputs = batch()
    with torch.no_grad():
        found, expected = (m(**inputs, fused_lm_head=True) for m in (model, plain))
    torch.testing.assert_close(found.log_probs, expected.log_probs)


# ---- where TRL's reads the head by itself and is wrong ----

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TINY |= {"vocab_size": VOCAB, "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}


def of(family: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **TINY | options)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {"is_decoder": True},
    "roberta": {"is_decoder": True},
    "modernbert-decoder": {"cls_token_id": 1, "sep_token_id": 2},
    "recurrent_gemma": {"num_key_value_heads": 1, "lru_width": 32, "head_dim": 8, "attention_window_size": 16},
    "llama4_text": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_local_experts": 2,
        "intermediate_size_mlp": 48,
        "attn_temperature_tuning": False,
    },
    "xlstm": {"num_heads": 4, "num_blocks": 2, "output_logit_soft_cap": 5.0},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_trl_gets_wrong(family: str):
    model = of(family, **FAMILIES[family])
    ids = batch()["input_ids"]
    z = model(input_ids=ids, use_cache=False).logits[:, :-1].double()
    expected = z.log_softmax(-1)
    add_ours(model, outputs=ALL)
    found = model(input_ids=ids, labels=ids, fused_lm_head=True)
    target = expected.gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(found.log_probs.double(), target, rtol=1e-5, atol=1e-5)
    entropy = -(expected.exp() * expected).sum(-1)
    torch.testing.assert_close(found.entropy.double(), entropy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.mean_logits.double(), z.mean(-1), rtol=1e-5, atol=1e-5)
