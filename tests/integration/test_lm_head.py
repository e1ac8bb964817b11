"""The way into a model's head, in one process: exact, asked exactly once, and gone without a trace."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import remove_hook_from_module
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import CheckpointError, checkpoint
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput
from wrapping import (
    IGNORED,
    LEARNING_RATE,
    VOCAB,
    check_same,
    checkpointed,
    gradient_error,
    gradients_of,
    inputs_of,
    logits_loss,
    logps_of_logits,
    loss_error,
    make_batch,
    processed,
    relative_error,
    through,
    tiny_llama,
    train,
    with_a_frozen,
)

from orpo_kernels.integration.head import call as request_module
from orpo_kernels.integration.lm_head import attach, attached
from orpo_kernels.loss import merge_targets
from orpo_kernels.plan import Plan, ScratchTooSmall

BATCH = make_batch()
TARGETS = merge_targets(BATCH["targets"], BATCH["nll_targets"])
INPUTS = inputs_of(BATCH)


@pytest.fixture(autouse=True)
def nothing_is_left_asked():
    yield
    assert request_module._request is None


# What trains, and how


def biased() -> LlamaForCausalLM:
    model = tiny_llama()
    model.lm_head = nn.Linear(32, VOCAB)
    return model


def with_lora(model: nn.Module, **options: Any) -> nn.Module:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], **options))


def adapted() -> nn.Module:
    return with_lora(tiny_llama(), r=2, init_lora_weights=False)


def whole_head_trains() -> nn.Module:
    return with_lora(tiny_llama(), r=2, init_lora_weights=False, modules_to_save=["lm_head"])


MODELS = {
    "plain": tiny_llama,
    "tied": lambda: tiny_llama(tie_word_embeddings=True),
    "bias": biased,
    "frozen head": with_a_frozen("lm_head"),
    "frozen backbone": with_a_frozen("model"),
    "LoRA in the backbone": adapted,
    "LoRA and a head that trains whole": whole_head_trains,
    "reentrant checkpoints": checkpointed(True),
    "checkpoints": checkpointed(False),
    "float64": lambda: tiny_llama().double(),
}


@pytest.mark.shows("Trainers", "plain loop, {name}", "`attach`, 3 steps and an evaluation, against full logits")
@pytest.mark.parametrize("name", MODELS)
def test_trains_as_full_logits(name: str):
    model = MODELS[name]()
    check_same(train(model, through(attach(model))), train(MODELS[name]()))


@pytest.mark.parametrize("plan", [Plan(scratch_bytes=30_000), Plan(keep_logit_grads=True)])
def test_the_plan_is_followed(plan: Plan):
    model = tiny_llama()
    check_same(train(model, through(attach(model, plan))), train(tiny_llama()))
    tiny = attach(tiny_llama(), Plan(scratch_bytes=1))
    with pytest.raises(ScratchTooSmall, match="scratch_bytes=1"):
        tiny.logps(TARGETS, **INPUTS)


def test_evaluation_without_gradients():
    model = tiny_llama().eval()
    right = logps_of_logits(model(**INPUTS).logits, TARGETS)
    ours = attach(model)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            logps, outputs = ours.logps(TARGETS, **INPUTS)
        assert not logps.requires_grad
        assert outputs.logits.shape == (*TARGETS.shape, 7)
        assert relative_error(logps, right) < 1e-6


def test_no_scored_token_still_gives_every_parameter_a_gradient():
    model = tiny_llama()
    logps, _ = attach(model).logps(torch.full_like(TARGETS, IGNORED), **INPUTS)
    logps.sum().backward()
    assert logps.shape == TARGETS.shape
    assert not logps.any()
    gradients = gradients_of(model)
    assert gradients.keys() == dict(model.named_parameters()).keys()
    assert not any(g.any() for g in gradients.values())


def test_backward_twice():
    model = tiny_llama()
    loss = through(attach(model))(model, BATCH)
    loss.backward(retain_graph=True)
    once = gradients_of(model)
    model.zero_grad()
    (loss / 8).backward()
    for name, gradient in gradients_of(model).items():
        assert torch.equal(gradient, once[name] / 8), name


def test_dropout_draws_the_numbers_that_it_draws_without_us():
    def loss_of(loss: Callable, model: nn.Module) -> Tensor:
        torch.manual_seed(5)
        return loss(model.train(), BATCH)

    model = tiny_llama(attention_dropout=0.3)
    right = loss_of(logits_loss, model)
    assert relative_error(loss_of(through(attach(model)), model), right) < 1e-6


# 16 bits


def not_worse(ours: LlamaForCausalLM, theirs: LlamaForCausalLM, context: Callable = nullcontext) -> None:
    """No further from fp32 than full logits are in the same arithmetic."""

    def under(loss: Callable) -> Callable:
        def run(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            with context():
                return loss(model, batch)

        return run

    exact = train(tiny_llama())
    found = train(ours, under(through(attach(ours))))
    right = train(theirs, under(logits_loss))
    # Both carry the backbone's rounding, and the first loss shows the head's alone.
    assert loss_error(found, exact) <= 2 * loss_error(right, exact)
    assert gradient_error(found, exact) <= 2 * gradient_error(right, exact)


@pytest.mark.shows("Wrappers", "autocast (bf16)", "loss and gradients no further from float64 than twice full logits'")
def test_autocast():
    def autocast() -> Any:
        return torch.autocast("cpu", torch.bfloat16)

    model = tiny_llama()
    not_worse(model, tiny_llama(), autocast)
    # The head's parameter stays fp32 and its product runs in bf16.
    with autocast():
        in_bf16, _ = attach(model).logps(TARGETS, **INPUTS)
        hidden = model.model(**INPUTS).last_hidden_state
    weight = model.lm_head.weight.bfloat16().float()
    rounded = logps_of_logits(F.linear(hidden.bfloat16().float(), weight), TARGETS)
    assert relative_error(in_bf16, rounded) < 1e-6
    gradient = torch.autograd.grad(in_bf16.sum(), model.lm_head.weight)[0]
    assert gradient.dtype == torch.float32


def test_bf16_model():
    not_worse(tiny_llama().bfloat16(), tiny_llama().bfloat16())


@pytest.mark.shows(
    "Wrappers", "GradScaler, autocast (fp16)", "gradients no further from float64 than twice full logits'"
)
def test_a_scaled_loss_in_fp16():
    def gradients(loss: Callable, model: nn.Module) -> dict[str, Tensor]:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
        with torch.autocast("cpu", torch.float16):
            value = loss(model, BATCH)
        scaler.scale(value).backward()
        scaler.unscale_(optimizer)
        return gradients_of(model)

    exact = train(tiny_llama(), steps=1).gradients
    model = tiny_llama()
    found, right = gradients(through(attach(model)), model), gradients(logits_loss, tiny_llama())
    for name, gradient in exact.items():
        assert relative_error(found[name], gradient) <= 2 * relative_error(right[name], gradient), name


# What comes after the head


@pytest.mark.parametrize(
    ("process", "transform"),
    [
        (lambda z: z * 0.0625, (0.0625, None)),
        (lambda z: z / 7, (1 / 7, None)),
        (lambda z: 30.0 * torch.tanh(z / 30.0), (1.0, 30.0)),
        (lambda z: 7.5 * torch.tanh(2 * z / 7.5), (2.0, 7.5)),
        (lambda z: z.float(), (1.0, None)),
    ],
)
def test_scales_and_caps(process: Callable, transform: tuple[float, float | None]):
    model = processed(process)
    ours = attach(model)
    check_same(train(model, through(ours)), train(processed(process)))
    scale, softcap = transform
    assert ours.transform.softcap == softcap
    assert ours.transform.logit_scale == pytest.approx(scale, rel=1e-12)


def test_what_is_none_of_them_is_an_error():
    with pytest.raises(ValueError, match="neither a scale nor a soft-cap"):
        attach(processed(lambda z: z + 1)).logps(TARGETS, **INPUTS)
    with pytest.raises(RuntimeError, match="8 columns where the head returned 7"):
        attach(processed(lambda z: F.pad(z, (0, 1)))).logps(TARGETS, **INPUTS)


def test_a_change_after_the_first_batch_is_an_error():
    model = processed(lambda z: z * 0.5)
    ours = attach(model)
    ours.logps(TARGETS, **INPUTS)
    model.process = lambda z: z * 0.501
    with pytest.raises(RuntimeError, match=r"otherwise than on the first batch.*0\.5"):
        ours.logps(TARGETS, **INPUTS)


@pytest.mark.parametrize("bias", [False, True])
def test_mean_logits(bias: bool):
    model = processed(lambda z: z * 0.25)
    if bias:
        model.lm_head = nn.Linear(32, VOCAB)
    mask = BATCH["attention_mask"].bool()
    right = torch.stack([z[m].mean() for z, m in zip(model(**INPUTS).logits, mask, strict=True)])
    mean_logits = attach(model).sequence_scores(TARGETS, mask, **INPUTS).mean_logits
    assert mean_logits is not None
    assert not mean_logits.requires_grad
    assert relative_error(mean_logits, right) < 1e-5
    model.process = lambda z: 30 * torch.tanh(z / 30)
    assert attach(model).sequence_scores(TARGETS, mask, **INPUTS).mean_logits is None


# Layouts


@pytest.mark.parametrize("embedded", [False, True])
def test_rows_say_which_hidden_row_predicts_a_target(embedded: bool):
    model = tiny_llama()
    random = torch.Generator().manual_seed(3)
    rows = torch.randint(TARGETS.numel(), (23,), generator=random)
    assert rows.unique().numel() < 23
    targets = torch.randint(VOCAB, (23,), generator=random).masked_fill(torch.arange(23) % 4 == 0, IGNORED)
    right = logps_of_logits(model(**INPUTS).logits.flatten(0, 1)[rows], targets)
    right_gradient = torch.autograd.grad(right.square().sum(), model.model.norm.weight)[0]
    inputs: dict[str, Any] = dict(INPUTS)
    if embedded:
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
        inputs["hidden_shape"] = TARGETS.shape
    logps, _ = attach(model).logps(targets, rows=rows, **inputs)
    gradient = torch.autograd.grad(logps.square().sum(), model.model.norm.weight)[0]
    assert relative_error(logps, right) < 1e-6
    assert relative_error(gradient, right_gradient) < 1e-5


def test_another_ignore_index():
    ours = attach(tiny_llama())
    right = ours.logps(TARGETS, **INPUTS)[0]
    targets = TARGETS.masked_fill(TARGETS == IGNORED, -1)
    assert torch.equal(ours.logps(targets, ignore_index=-1, **INPUTS)[0], right)


# Calls that cannot be answered


def test_bad_arguments():
    ours = attach(tiny_llama())
    for value in (VOCAB, -5):
        with pytest.raises(ValueError, match=rf"targets holds {value} .*\[0, 97\)"):
            ours.logps(TARGETS.masked_fill(TARGETS != IGNORED, value), **INPUTS)
    with pytest.raises(ValueError, match="labels were passed"):
        ours.logps(TARGETS, labels=TARGETS, **INPUTS)
    rows = torch.zeros(5, dtype=torch.int64)
    with pytest.raises(ValueError, match="rows holds 36"):
        ours.logps(rows, rows=rows + TARGETS.numel(), **INPUTS)
    with pytest.raises(ValueError, match="give hidden_shape"):
        ours.logps(rows, rows=rows, inputs_embeds=torch.zeros(1, 5, 32))
    with pytest.raises(ValueError, match="targets has shape"):
        ours.logps(TARGETS, hidden_shape=torch.Size([4, 5]), **INPUTS)
    assert ours.logps(TARGETS, labels=None, **INPUTS)[0].shape == TARGETS.shape


def test_fewer_hidden_states_than_targets():
    ours = attach(tiny_llama())
    for _ in range(2):  # while the transform is looked for, and after
        with pytest.raises(RuntimeError, match=r"hidden states \[4, 5, D\].*\[4, 9, D\].*logits_to_keep"):
            ours.logps(TARGETS, logits_to_keep=5, **INPUTS)
        ours.logps(TARGETS, **INPUTS)
    with pytest.raises(RuntimeError, match=r"hidden states \[4, 9, D\]"):
        ours.logps(TARGETS[:, :-1], **INPUTS)


def test_no_logits_in_the_outputs():
    with pytest.raises(RuntimeError, match="returned a tuple without logits"):
        attach(tiny_llama()).logps(TARGETS, return_dict=False, **INPUTS)


@pytest.mark.shows("Wrappers", "nn.DataParallel", "the error names the replacement", "refused")
def test_data_parallel_is_refused():
    model = tiny_llama()
    ours = attach(nn.DataParallel(model))
    with pytest.raises(ValueError, match="use DistributedDataParallel"):
        ours.logps(TARGETS, **INPUTS)
    wrapper = SimpleModule(nn.DataParallel(model))
    with pytest.raises(ValueError, match="use DistributedDataParallel"):
        ours.logps(TARGETS, model=wrapper, **INPUTS)


class SimpleModule(nn.Module):
    def __init__(self, module: nn.Module, call: Callable | None = None) -> None:
        super().__init__()
        self.module = module
        self.call = call

    def forward(self, **inputs: Any) -> Any:
        return self.module(**inputs) if self.call is None else self.call(self.module, **inputs)


def test_a_bypassed_head():
    def fused(model: LlamaForCausalLM, **inputs: Any) -> Any:
        hidden = model.model(**inputs).last_hidden_state
        return SimpleNamespace(logits=F.linear(hidden, model.lm_head.weight))

    model = tiny_llama()
    ours = attach(model)
    with pytest.raises(RuntimeError, match="did not call the attached head"):
        ours.logps(TARGETS, model=SimpleModule(model, fused), **INPUTS)
    ours.logps(TARGETS, **INPUTS)


def test_a_replaced_head_is_followed():
    model = tiny_llama()
    ours = attach(model)
    ours.logps(TARGETS, **INPUTS)
    first = model.lm_head
    model.lm_head = nn.Linear(32, VOCAB)
    right = logps_of_logits(model(**INPUTS).logits, TARGETS)
    assert relative_error(ours.logps(TARGETS, **INPUTS)[0], right) < 1e-6
    ours.detach()
    assert "forward" not in vars(model.lm_head)
    assert first is not ours.head


def test_a_head_called_twice():
    def twice(model: LlamaForCausalLM, **inputs: Any) -> Any:
        outputs = model(**inputs)
        model.lm_head(model.model(**inputs).last_hidden_state)
        return outputs

    model = tiny_llama()
    with pytest.raises(RuntimeError, match="called its head twice"):
        attach(model).logps(TARGETS, model=SimpleModule(model, twice), **INPUTS)


def test_one_call_inside_another():
    model = tiny_llama()
    ours = attach(model)
    handle = model.register_forward_pre_hook(lambda *_: ours.logps(TARGETS, **INPUTS))
    with pytest.raises(RuntimeError, match="inside another such call"):
        ours.logps(TARGETS, **INPUTS)
    handle.remove()
    ours.logps(TARGETS, **INPUTS)


@pytest.mark.shows("Wrappers", "a checkpoint around the head itself", "an error, reentrant or not", "refused")
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_the_head_is_an_error(reentrant: bool):
    """It would call the head again in the backward, when nothing is asked any more."""

    def call(model: LlamaForCausalLM, **inputs: Any) -> Any:
        embeddings = model.get_input_embeddings()(inputs.pop("input_ids"))

        def logits(embeddings: Tensor) -> Tensor:
            return model(inputs_embeds=embeddings, **inputs).logits

        return SimpleNamespace(logits=checkpoint(logits, embeddings, use_reentrant=reentrant))

    model = tiny_llama()
    wrapped = SimpleModule(model, call)
    loss = through(attach(model))
    if reentrant:
        with pytest.raises(RuntimeError, match="lies in a reentrant checkpoint"):
            loss(wrapped, BATCH)
    else:
        value = loss(wrapped, BATCH)
        with pytest.raises(CheckpointError):
            value.backward()


def test_heads_that_are_not_plain():
    class Tempered(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) / 2

    model = tiny_llama()
    head = model.lm_head
    model.lm_head = Tempered(32, VOCAB)
    with pytest.raises(ValueError, match="Tempered with a forward of its own"):
        attach(model)
    model.lm_head = nn.Sequential(head, nn.Tanh())
    with pytest.raises(ValueError, match=r"head of LlamaForCausalLM is Sequential"):
        attach(model)
    model.lm_head = head
    head.forward = lambda input: input
    with pytest.raises(ValueError, match=r"replaced by .*lambda"):
        attach(model)
    with pytest.raises(ValueError, match=r"Linear has no get_output_embeddings"):
        attach(nn.Linear(2, 2))


def test_an_exchanged_weight_is_an_error():
    model = tiny_llama()
    ours = attach(model)
    model.lm_head.weight = nn.Parameter(torch.zeros(VOCAB + 3, 32))
    with pytest.raises(RuntimeError, match=r"weight has shape \(100, 32\) and the head is 32 -> 97"):
        ours.logps(TARGETS, **INPUTS)


def test_resized_embeddings():
    model = tiny_llama()
    model.resize_token_embeddings(VOCAB + 3)
    targets = TARGETS.masked_fill(TARGETS.max() == TARGETS, VOCAB + 2)
    right = logps_of_logits(model(**INPUTS).logits, targets)
    assert relative_error(attach(model).logps(targets, **INPUTS)[0], right) < 1e-6


def test_a_tied_head_that_trains_is_reported_once(caplog: pytest.LogCaptureFixture):
    model = tiny_llama(tie_word_embeddings=True)
    with caplog.at_level(logging.INFO, "orpo_kernels"):
        attach(model)
        attach(model)
        attach(tiny_llama())
    assert len([record for record in caplog.records if "tied" in record.message]) == 1


# Coming and going


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything about the head that attaching could change."""
    head = model.get_output_embeddings()
    return {"class": type(head), "attributes": dict(vars(head)), "keys": list(model.state_dict())}


def saved_bytes(model: LlamaForCausalLM, folder: Path) -> dict[str, bytes]:
    model.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.shows(
    "Trainers", "plain loop, detached again", "generation, saving, state_dict keys and forward as before"
)
def test_detach_restores_the_model(tmp_path: Path):
    model = tiny_llama().eval()
    before, files = state_of(model), saved_bytes(model, tmp_path / "before")
    prompt = BATCH["input_ids"][:1]
    text, logits = model.generate(prompt, max_new_tokens=5, do_sample=False), model(**INPUTS).logits

    ours = attach(model)
    assert attach(model).head is ours.head
    ours.logps(TARGETS, **INPUTS)
    # Until it is asked, an attached model is the model.
    assert torch.equal(model(**INPUTS).logits, logits)
    assert torch.equal(model.generate(prompt, max_new_tokens=5, do_sample=False), text)
    assert saved_bytes(model, tmp_path / "attached") == files
    assert type(model.lm_head) is nn.Linear
    assert list(model.state_dict()) == before["keys"]

    ours.detach()
    ours.detach()
    assert state_of(model) == before
    assert torch.equal(model.generate(prompt, max_new_tokens=5, do_sample=False), text)
    with pytest.raises(RuntimeError, match="did not call the attached head"):
        ours.logps(TARGETS, **INPUTS)


def test_attached_for_a_while():
    model = tiny_llama()
    before = state_of(model)

    class Stop(Exception):
        pass

    def use() -> None:
        with attached(model, Plan(keep_logit_grads=True)) as ours:
            assert ours.logps(TARGETS, **INPUTS)[0].shape == TARGETS.shape
            raise Stop

    with pytest.raises(Stop):
        use()
    assert state_of(model) == before


class TensorParallelLayer:
    """Sets a layer's forward as the class of this name in transformers does."""

    calls = 0

    def install_forward(self, module: nn.Module) -> None:
        original_forward = module.forward

        def tp_forward(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return original_forward(*args, **kwargs)

        module.forward = tp_forward


def test_a_tensor_parallel_forward_is_kept_and_given_back():
    model = tiny_llama()
    layer = TensorParallelLayer()
    layer.install_forward(model.lm_head)
    before = state_of(model)
    ours = attach(model)
    check_same(train(model, through(ours)), train(tiny_llama()))
    assert layer.calls == 0
    model(**INPUTS)
    assert layer.calls == 1
    ours.detach()
    assert state_of(model) == before


def test_a_deep_copy_has_a_head_of_its_own():
    def changed(model: LlamaForCausalLM) -> LlamaForCausalLM:
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)
        return model

    model = tiny_llama()
    ours = attach(model)
    check_same(train(changed(copy.deepcopy(model)), through(ours)), train(changed(tiny_llama())))
    check_same(train(model, through(ours)), train(tiny_llama()))


def test_a_pickled_copy_is_the_plain_model():
    model = tiny_llama()
    attach(model)
    loaded = pickle.loads(pickle.dumps(model))
    assert loaded.lm_head.forward.__func__ is nn.Linear.forward
    assert torch.equal(loaded(**INPUTS).logits, model(**INPUTS).logits)
    check_same(train(loaded, through(attach(loaded))), train(tiny_llama()))


def test_peft_copies_are_given_back_too():
    model = tiny_llama()
    attach(model)
    wrapped = with_lora(model, modules_to_save=["lm_head"])
    ours = attach(wrapped)
    assert ours.head is wrapped.base_model.model.lm_head.modules_to_save["default"]
    ours.detach()
    assert not any("forward" in vars(m) for m in wrapped.modules() if isinstance(m, nn.Linear))


# accelerate's hooks


def offloaded_head(model: LlamaForCausalLM, folder: Path) -> LlamaForCausalLM:
    """The backbone in memory, the head on disk: its weight is a meta tensor except inside its forward."""
    return dispatch_model(model, {"model": "cpu", "lm_head": "disk"}, main_device="cpu", offload_dir=folder)


@pytest.mark.shows(
    "Wrappers", "`device_map`, head offloaded to disk", "3 steps against full logits", "the offloaded head is frozen"
)
@pytest.mark.parametrize("hooked_first", [True, False])
def test_an_offloaded_head(hooked_first: bool, tmp_path: Path):
    model = with_a_frozen("lm_head")()
    if hooked_first:
        ours = attach(offloaded_head(model, tmp_path))
    else:
        ours = attach(model)
        offloaded_head(model, tmp_path)
    assert model.lm_head.weight.is_meta
    # An optimizer has nothing to do with the head's meta tensor.
    found = train(model.model, lambda _, batch: through(ours)(model, batch))
    right = train(with_a_frozen("lm_head")())
    check_same(found, right._replace(gradients={k.removeprefix("model."): g for k, g in right.gradients.items()}))
    assert model.lm_head.weight.is_meta

    ours.detach()
    assert model.lm_head._old_forward.__func__ is nn.Linear.forward
    remove_hook_from_module(model, recurse=True)
    assert model.lm_head.forward.__func__ is nn.Linear.forward


@pytest.mark.shows(
    "Wrappers", "`cpu_offload` of the whole model", "log-probabilities against full logits", "evaluation"
)
def test_everything_offloaded():
    model = tiny_llama().eval()
    right = logps_of_logits(model(**INPUTS).logits, TARGETS)
    ours = attach(cpu_offload(model, "cpu"))
    with torch.no_grad():
        assert relative_error(ours.logps(TARGETS, **INPUTS)[0], right) < 1e-6


@pytest.mark.shows("Wrappers", "`device_map`, head on another device than the labels", "3 steps against full logits")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device, a GPU")
def test_head_and_targets_on_different_devices():
    model = dispatch_model(tiny_llama(), {"model": "cpu", "lm_head": 0}, main_device="cpu")
    assert model.lm_head.weight.is_cuda
    found = train(model, through(attach(model)))
    check_same(found._replace(gradients={k: g.cpu() for k, g in found.gradients.items()}), train(tiny_llama()))


def test_hooks_taken_off_while_attached(tmp_path: Path):
    model = with_a_frozen("lm_head")()
    ours = attach(offloaded_head(model, tmp_path))
    remove_hook_from_module(model, recurse=True)
    check_same(train(model, through(ours)), train(with_a_frozen("lm_head")()))
    ours.detach()
    assert "forward" not in vars(model.lm_head)


# torch.compile


def one_layer(head_trains: bool = True) -> LlamaForCausalLM:
    model = tiny_llama(num_hidden_layers=1)
    model.lm_head.requires_grad_(head_trains)
    return model


def compiled(model: nn.Module, backend: str) -> tuple[nn.Module, CompileCounterWithBackend]:
    """In one graph from the embeddings to the head, or an error."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, backend=counter, fullgraph=True), counter


@pytest.mark.shows(
    "Wrappers",
    "`torch.compile` of the model, fullgraph",
    "6 steps of changing lengths, gradients of each against full logits; at most 4 graphs",
)
@pytest.mark.parametrize(
    ("head_trains", "backend"),
    [
        (True, "aot_eager"),
        pytest.param(False, "aot_eager", marks=pytest.mark.exhaustive),
        pytest.param(True, "inductor", marks=pytest.mark.exhaustive),
    ],
)
def test_a_compiled_model(head_trains: bool, backend: str):
    model, right = one_layer(head_trains), one_layer(head_trains)
    ours = attach(model)
    call, counter = compiled(model, backend)
    counts = []
    for step in range(6):
        batch = make_batch(step, pairs=2 + step % 2, scored=step != 4)
        found, expected = through(ours)(call, batch), logits_loss(right, batch)
        found.backward()
        expected.backward()
        assert abs(found - expected) <= 1e-5 * abs(expected)
        gradients = gradients_of(model)
        for name, gradient in gradients_of(right).items():
            assert relative_error(gradients.pop(name), gradient) <= 1e-4, name
        assert not gradients
        for each in (model, right):
            torch.optim.SGD(each.parameters(), lr=LEARNING_RATE).step()
            each.zero_grad()
        counts.append(counter.frame_count)
    # The placeholders alone, the first lengths, any length, any number of pairs.
    assert counts[-1] == counts[3] <= 4

    # Without a request, the head is itself.
    assert relative_error(call(**INPUTS).logits, right(**INPUTS).logits) < 1e-5


class Shallow(nn.Module):
    """As little of a model as has a head: it compiles in a second."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embeddings = nn.Embedding(VOCAB, 32)
        self.lm_head = nn.Linear(32, VOCAB)

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def forward(self, input_ids: Tensor, keep: int = 0) -> CausalLMOutput:
        return CausalLMOutput(logits=self.lm_head(torch.tanh(self.embeddings(input_ids))[:, -keep:]))


def test_rows_in_a_compiled_model():
    model = Shallow()
    ours = attach(model)
    call, counter = compiled(model, "aot_eager")
    for length in (7, 11, 13, 17):
        random = torch.Generator().manual_seed(length)
        ids = torch.randint(VOCAB, (1, length), generator=random)
        rows = torch.randint(length, (length + 3,), generator=random)
        targets = torch.randint(VOCAB, (length + 3,), generator=random)
        right = logps_of_logits(model(input_ids=ids).logits[0, rows], targets)
        logps, _ = ours.logps(targets, model=call, rows=rows, input_ids=ids)
        assert relative_error(logps, right) < 1e-5
        found, expected = (torch.autograd.grad(x.square().sum(), model.lm_head.weight)[0] for x in (logps, right))
        assert relative_error(found, expected) < 1e-4
    assert counter.frame_count <= 3


def test_evaluation_and_mean_logits_in_a_compiled_model():
    model = Shallow()
    ours = attach(model)
    call, counter = compiled(model, "aot_eager")
    with torch.no_grad():
        for step in range(4):
            batch = make_batch(step)
            mask, ids = batch["attention_mask"].bool(), batch["input_ids"]
            logits = model(ids).logits
            logps, mean_logits, _ = ours.sequence_scores(batch["targets"], mask, model=call, input_ids=ids)
            assert relative_error(logps, logps_of_logits(logits, batch["targets"])) < 1e-5
            means = torch.stack([z[m].mean() for z, m in zip(logits, mask, strict=True)])
            assert relative_error(mean_logits, means) < 1e-4
    assert counter.frame_count <= 3


def test_mean_logits_of_rows_in_a_compiled_model():
    model = Shallow()
    ours = attach(model)
    call, counter = compiled(model, "aot_eager")
    with torch.no_grad():
        for length in (7, 11, 13, 17):
            random = torch.Generator().manual_seed(length)
            ids = torch.randint(VOCAB, (1, length), generator=random)
            rows = torch.arange(length - 1)
            over = (torch.arange(length - 2), torch.arange(3, length))  # both in the middle
            logits = model(ids).logits[0]
            logps, mean_logits, _ = ours.sequence_scores(ids[0, 1:], over, model=call, rows=rows, input_ids=ids)
            assert relative_error(logps, logps_of_logits(logits[:-1], ids[0, 1:])) < 1e-5
            means = torch.stack([logits[places].mean() for places in over])
            assert relative_error(mean_logits, means) < 1e-4
    assert counter.frame_count <= 3


def test_too_few_hidden_states_in_a_compiled_model():
    model = Shallow()
    ours = attach(model)
    call = torch.compile(model, backend="eager")
    ours.logps(TARGETS, model=call, input_ids=INPUTS["input_ids"])
    with pytest.raises(RuntimeError, match=r"hidden states \[4, 5, D\]"):
        ours.logps(TARGETS, model=call, input_ids=INPUTS["input_ids"], keep=5)
    ours.logps(TARGETS, model=call, input_ids=INPUTS["input_ids"])
