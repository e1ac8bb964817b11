"""TRL's trainers beside ours: the same losses, gradients and metrics; where TRL is wrong, the right ones."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import math
import subprocess
import sys
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from compatibility import measured
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
)

from orpo_kernels import Plan
from orpo_kernels.integration.data import DataSummary

for name in ("datasets", "peft", "trl"):
    pytest.importorskip(name, reason=f"{name} is not installed")
import datasets  # noqa: E402
import trl.experimental.cpo as trl_cpo  # noqa: E402
import trl.experimental.orpo as trl_orpo  # noqa: E402
from peft import LoraConfig  # noqa: E402
from trl.experimental.utils import DPODataCollatorWithPadding  # noqa: E402

import orpo_kernels.integration.trl as ours  # noqa: E402

SENTENCES = [
    "The answer is 46 because the question asks for it.",
    "The answer is $46 and not 64.",
    "xyz yz yz",
] * 3
CHATML = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
EOS, BOS = 0, 1


def make_tokenizer(**special: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE with <|end|> (id 0, EOS and padding) and <|begin|> (id 1, BOS, not added)."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end|>", "<|begin|>", "<|start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    special = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|end|>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHATML, **special)


TOKENIZER = make_tokenizer()
VOCAB = len(TOKENIZER)
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256}
SIZES |= {"pad_token_id": EOS, "bos_token_id": BOS, "eos_token_id": EOS}
# Uneven lengths, so that batches pad.
ANSWERS = [("46" + " because" * (at % 3), "$46 and not"[: 3 + at]) for at in range(8)]
PAIRS = [
    {"prompt": "The answer is " * (1 + at % 2), "chosen": chosen, "rejected": rejected}
    for at, (chosen, rejected) in enumerate(ANSWERS)
]
# Answers of both kinds are chosen, so that some pairs are ranked right and some wrong.
MIXED = [
    pair | ({"chosen": pair["rejected"], "rejected": pair["chosen"]} if at in (1, 4) else {})
    for at, pair in enumerate(PAIRS[:5])
]


def llama(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **options))


def gemma2() -> nn.Module:
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=2.0, attn_implementation="eager"))


def mixtral(router: bool) -> nn.Module:
    torch.manual_seed(0)
    config = MixtralConfig(**SIZES, num_local_experts=4, output_router_logits=router, router_aux_loss_coef=0.5)
    return MixtralForCausalLM(config)


def t5() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, **sizes, decoder_start_token_id=0, pad_token_id=0))


class FirstGradients(TrainerCallback):
    """Keeps the gradients of the first step."""

    def __init__(self) -> None:
        self.grads: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.grads:
            self.grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def make(trainer: type, model: nn.Module, folder: Any, **options: Any) -> Any:
    """A trainer of two pairs a batch and five steps, in fp32 on the CPU, unless the options say otherwise."""
    names = {*inspect.signature(trl_orpo.ORPOTrainer).parameters, "plan", "packing", "share_prefix", "packing_length"}
    arguments = {name: options.pop(name) for name in names & set(options)}
    defaults = {"max_steps": 5, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1}
    defaults |= {"bf16": False, "gradient_checkpointing": False, "use_cpu": True, "max_length": 128}
    defaults |= {"report_to": [], "save_strategy": "no", "disable_tqdm": True}
    config = trl_cpo.CPOConfig if "CPO" in trainer.__name__ else trl_orpo.ORPOConfig
    args = config(str(folder), **defaults | options)
    defaults = {"train_dataset": datasets.Dataset.from_list(PAIRS), "processing_class": TOKENIZER}
    return trainer(model, args, **defaults | arguments)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setenv("CI", "1")  # TRL sends no telemetry then
    datasets.disable_progress_bars()


def steps(trainer: Any) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


# Differences keep the rounding, 2^-22 in fp32, of what they are the difference of: TRL's own are no better.
SIZE_OF = {"rewards/margins": "rewards/chosen", "log_odds_chosen": "logps/chosen"}


def assert_same(found: dict[str, float], expected: dict[str, float], left_out: tuple[str, ...] = ()):
    """Every metric equal to 1e-5, those about time and those whose names end as in left_out aside."""
    timing = ("runtime", "per_second", "preparation_time")
    found, expected = (
        {name: value for name, value in one.items() if not name.endswith((*timing, *left_out))}
        for one in (found, expected)
    )
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        rounding = 1e-7 if "logits/" in name else 0.0  # a mean of logits around 1 that cancel
        for difference, size in SIZE_OF.items():
            if name.endswith(difference):
                rounding = abs(expected[name.replace(difference, size)]) * 2**-22
        assert found[name] == pytest.approx(value, rel=1e-5, abs=rounding), name


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (found.double() - expected.double()).norm().item()
    return difference / expected.double().norm().item() if difference else 0.0


LORA = {"r": 4, "lora_dropout": 0.0, "init_lora_weights": False, "task_type": "CAUSAL_LM"}


# ---- the same as TRL's ----


@pytest.mark.shows(
    "Trainers",
    "TRL `{name}`, {id}",
    "5 steps: losses, gradient norms, every logged metric and the first gradients against stock TRL",
)
@pytest.mark.parametrize(
    ("name", "build", "options"),
    [
        pytest.param("ORPOTrainer", llama, {}, id="llama"),
        pytest.param("ORPOTrainer", llama, {"beta": 0.5, "gradient_accumulation_steps": 2}, id="accumulation"),
        pytest.param("ORPOTrainer", llama, {"gradient_checkpointing": True}, id="checkpointing"),
        pytest.param("ORPOTrainer", lambda: mixtral(True), {}, id="router loss"),
        pytest.param("ORPOTrainer", lambda: mixtral(False), {}, id="no router loss"),
        pytest.param("ORPOTrainer", gemma2, {}, id="soft-cap"),
        pytest.param("ORPOTrainer", t5, {"max_completion_length": 12}, id="encoder-decoder"),
        pytest.param(
            "ORPOTrainer",
            llama,
            {"peft_config": LoraConfig(**LORA, target_modules=["q_proj"]), "gradient_checkpointing": True},
            id="LoRA",
        ),
        pytest.param(
            "ORPOTrainer",
            llama,
            {"peft_config": LoraConfig(**LORA, target_modules=["lm_head"])},
            id="LoRA on the head",
        ),
        pytest.param(
            "ORPOTrainer",
            llama,
            {"peft_config": LoraConfig(**LORA, target_modules=["q_proj"], modules_to_save=["lm_head"])},
            id="head saved by PEFT",
        ),
        pytest.param("CPOTrainer", llama, {}, id="CPO"),
        pytest.param("CPOTrainer", lambda: mixtral(True), {"loss_type": "ipo"}, id="IPO, router loss"),
        pytest.param("CPOTrainer", llama, {"loss_type": "simpo", "cpo_alpha": 0.0}, id="SimPO"),
        pytest.param("CPOTrainer", t5, {"max_completion_length": 12}, id="CPO, encoder-decoder"),
    ],
)
def test_five_steps(name, build, options, tmp_path):
    runs = []
    for module in (ours, trl_cpo if name == "CPOTrainer" else trl_orpo):
        first = FirstGradients()
        # Not Adam, whose first steps are as long for a gradient that is all rounding as for any other.
        trainer = make(getattr(module, name), build(), tmp_path, callbacks=[first], optim="sgd", **options)
        trainer.train()
        runs.append((steps(trainer), first.grads))
    (found, grads), (expected, expected_grads) = runs
    assert len(found) == len(expected) == 5
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other, ("logits/chosen", "logits/rejected") if build is gemma2 else ())
    assert ("logits/chosen" in found[0]) == (build is not gemma2)
    assert grads.keys() == expected_grads.keys() != set()
    measured(losses=max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(found, expected, strict=True)))
    for parameter, grad in expected_grads.items():
        measured(gradients=relative_error(grads[parameter], grad))
        assert relative_error(grads[parameter], grad) < 1e-4, parameter


@pytest.mark.shows(
    "Trainers", "TRL `{name}`, packed and shared rows", "3 steps: losses, metrics and first gradients against stock TRL"
)
@pytest.mark.parametrize("share_prefix", [False, "auto"])
@pytest.mark.parametrize(
    ("name", "build", "options", "admitted"),
    [
        ("ORPOTrainer", llama, {}, True),
        ("ORPOTrainer", gemma2, {"gradient_accumulation_steps": 2}, True),
        ("ORPOTrainer", llama, {"peft_config": LoraConfig(**LORA, target_modules=["q_proj", "v_proj"])}, True),
        ("ORPOTrainer", lambda: mixtral(True), {}, False),
        ("ORPOTrainer", t5, {"max_completion_length": 12}, None),
        ("CPOTrainer", llama, {"loss_type": "simpo"}, True),
    ],
    ids=["llama", "soft-cap", "LoRA", "router loss", "encoder-decoder", "SimPO"],
)
def test_rows_without_padding(name, build, options, admitted, share_prefix, tmp_path, caplog):
    runs = []
    for module in (ours, trl_cpo if name == "CPOTrainer" else trl_orpo):
        first, layout = FirstGradients(), {"packing": True, "share_prefix": share_prefix} if module is ours else {}
        trainer = make(getattr(module, name), build(), tmp_path, callbacks=[first], max_steps=3, **options, **layout)
        trainer.train()
        runs.append((trainer, steps(trainer), first.grads))
    (trainer, found, grads), (_, expected, expected_grads) = runs
    wanted = "packed" if share_prefix is False else "shared"
    assert trainer.layout_gate.name == {True: wanted, False: "padded", None: None}[admitted]
    assert sum("batches are padded" in record.message for record in caplog.records) == (admitted is False)
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other, () if not admitted else ("logits/chosen", "logits/rejected"))
    for parameter, grad in expected_grads.items():
        measured(gradients=relative_error(grads[parameter], grad))
        assert relative_error(grads[parameter], grad) < 1e-4, parameter


@pytest.mark.parametrize("share_prefix", [False, True])
@pytest.mark.parametrize("name", ["ORPOTrainer", "CPOTrainer"])
def test_mean_logits_without_padding(name, share_prefix, tmp_path):
    """Each sequence's own tokens count, whatever they are padded with elsewhere."""
    options = {"packing": True, "share_prefix": share_prefix}
    trainer = make(getattr(ours, name), llama().double(), tmp_path, **options)
    rows = list(trainer.train_dataset)[:3]
    _, metrics = trainer.get_batch_loss_metrics(trainer.model, trainer.data_collator(rows))
    assert trainer.layout_gate.name == ("shared" if share_prefix else "packed")
    reference = llama().double()
    for side in ("chosen", "rejected"):
        with torch.no_grad():
            means = [reference(torch.tensor([row[f"{side}_input_ids"]])).logits.mean() for row in rows]
        assert float(metrics[f"logits/{side}"]) == pytest.approx(float(torch.stack(means).mean()), rel=1e-12)


@pytest.mark.parametrize("share_prefix", [False, True])
def test_packing_length(share_prefix, tmp_path):
    """Rows of at most so many tokens, and TRL's losses."""
    shapes = []
    runs = []
    for module in (ours, trl_orpo):
        model = llama()
        options = {"packing": True, "share_prefix": share_prefix, "packing_length": 18} if module is ours else {}
        trainer = make(module.ORPOTrainer, model, tmp_path, max_steps=3, **options)
        if module is ours:
            model.model.embed_tokens.register_forward_hook(lambda layer, args, out: shapes.append(tuple(out.shape)))
        trainer.train()
        runs.append(steps(trainer))
    for found, expected in zip(*runs, strict=True):
        assert_same(found, expected, ("logits/chosen", "logits/rejected"))
    steps_of_ours = shapes[-3:]  # after the trial and the look for the transform
    assert all(height > 1 and width <= 18 for height, width, _ in steps_of_ours)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing_length": 64}, "packing_length=64: use a positive int, and only with packing=True"),
        ({"packing_length": 0, "packing": True}, "packing_length=0: use a positive int"),
        ({"packing": True, "share_prefix": "never"}, "share_prefix='never': use 'auto', True or False"),
    ],
)
@pytest.mark.parametrize("name", ["ORPOTrainer", "CPOTrainer"])
def test_bad_layouts(name, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(getattr(ours, name), llama(), tmp_path, **options)


def test_a_pair_that_is_longer_than_a_row(tmp_path):
    trainer = make(ours.ORPOTrainer, llama(), tmp_path, packing=True, packing_length=8)
    with pytest.raises(
        ValueError, match=r"the group of sequences \d, \d has \d+ tokens and row_length=8: raise .* packing_length"
    ):
        trainer.train()


def test_the_router_loss_counts(tmp_path):
    """Else the comparison above would not notice it missing from both, nor twice in both."""
    with_it, without = (
        steps(trainer)[0]["loss"]
        for router in (True, False)
        if (trainer := make(ours.ORPOTrainer, mixtral(router), tmp_path, max_steps=1)) and trainer.train()
    )
    assert with_it - without > 0.5


def test_no_logits(tmp_path):
    """What the model returns while it trains and is evaluated has the placeholders' seven columns."""
    model = llama()
    widths = set()
    model.register_forward_hook(lambda module, args, output: widths.add(output.logits.shape[-1]))
    plan = Plan(scratch_bytes=1 << 20)
    trainer = make(ours.ORPOTrainer, model, tmp_path, eval_dataset=datasets.Dataset.from_list(PAIRS[:2]), plan=plan)
    trainer.train()
    trainer.evaluate()
    assert widths == {7}
    assert trainer.head_logps.plan is plan


@pytest.mark.shows("Trainers", "TRL, bf16", "first gradients no further from float64 than twice stock TRL's")
def test_bf16(tmp_path):
    """Autocast: gradients no further from float64 than twice TRL's."""

    def first(trainer: type, model: nn.Module, **options: Any) -> torch.Tensor:
        callback = FirstGradients()
        made = make(trainer, model, tmp_path, callbacks=[callback], max_steps=1, max_grad_norm=0.0, **options)
        made.train()
        assert all(parameter.dtype == next(model.parameters()).dtype for parameter in model.parameters())
        assert math.isfinite(steps(made)[0]["loss"])
        return torch.cat([grad.flatten().double() for grad in callback.grads.values()])

    exact = first(ours.ORPOTrainer, llama().double())
    found, stock = (first(t, llama(), bf16=True) for t in (ours.ORPOTrainer, trl_orpo.ORPOTrainer))
    assert 1e-5 < relative_error(found, exact) < 2 * relative_error(stock, exact)


@pytest.mark.shows("Trainers", "TRL, `use_liger_kernel=True` beside us", "5 steps against stock TRL")
def test_liger_kernels_beside_us(tmp_path):
    """Liger replaces the model's forward, whose head stays ours. (Its layers need a GPU.)"""
    off = {"rope": False, "rms_norm": False, "swiglu": False}
    runs = []
    for module, options in ((ours, {"use_liger_kernel": True, "liger_kernel_config": off}), (trl_orpo, {})):
        trainer = make(module.ORPOTrainer, llama(), tmp_path, **options)
        trainer.train()
        runs.append(steps(trainer))
        assert ("liger" in trainer.model.forward.__module__) == (module is ours)
    for found, expected in zip(*runs, strict=True):
        assert_same(found, expected)


@pytest.mark.shows("Trainers", "TRL, resume from a checkpoint", "the resumed run's losses are the whole run's")
def test_resume_from_a_checkpoint(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 1}
    whole = make(ours.ORPOTrainer, llama(), tmp_path, max_steps=3, **options | {"lr_scheduler_type": "constant"})
    whole.train()
    runs = []
    for checkpoint in (None, f"{tmp_path}/checkpoint-3"):
        trainer = make(ours.ORPOTrainer, llama(), tmp_path / "more", lr_scheduler_type="constant")
        trainer.train(resume_from_checkpoint=checkpoint)
        runs.append(trainer)
    assert [entry["step"] for entry in steps(runs[1])] == [1, 2, 3, 4, 5]
    for entry, expected in zip(steps(runs[1])[3:], steps(runs[0])[3:], strict=True):
        assert_same(entry, expected)
    for found, expected in zip(runs[1].model.parameters(), runs[0].model.parameters(), strict=True):
        torch.testing.assert_close(found, expected)


# ---- evaluation ----


@pytest.mark.shows(
    "Trainers",
    "TRL, evaluation",
    "the same metrics at any batch size",
    "differs from stock TRL, which takes means of batch means",
)
@pytest.mark.parametrize("build", [llama, lambda: mixtral(True)], ids=["llama", "mixtral"])
def test_evaluation_over_examples(build, tmp_path):
    rows = datasets.Dataset.from_list(MIXED)

    def evaluate(module: Any, batch_size: int) -> dict[str, float]:
        options = {"per_device_eval_batch_size": batch_size, "eval_dataset": rows}
        return make(module.ORPOTrainer, build(), tmp_path, **options).evaluate()

    expected = evaluate(trl_orpo, 5)  # one batch: its mean is the mean
    assert expected["eval_rewards/accuracies"] not in (0, 1)
    assert_same(evaluate(ours, 5), expected)
    for size in (4, 1):
        # Padding counts in TRL's mean logit and a router's loss is a batch's: those do depend on the batches.
        by_batch = ("logits/chosen", "logits/rejected", *(() if build is llama else ("loss",)))
        assert_same(evaluate(ours, size), expected, by_batch)
    at_four = evaluate(trl_orpo, 4)
    assert abs(at_four["eval_rewards/accuracies"] - expected["eval_rewards/accuracies"]) > 0.05


@pytest.mark.shows("Trainers", "TRL, a dict of evaluation sets", "metrics of each")
def test_dict_of_evaluation_sets(tmp_path):
    parts = {"a": datasets.Dataset.from_list(PAIRS[:2]), "b": datasets.Dataset.from_list(PAIRS[2:5])}
    sets = {"a": parts["a"], "b": parts["b"].to_iterable_dataset()}
    options = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 1, "learning_rate": 0.0}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_b_rewards/margins"}
    trainer = make(ours.ORPOTrainer, llama(), tmp_path, eval_dataset=sets, save_strategy="best", **options)
    trainer.train()
    together = trainer.evaluate()
    assert not any(name.startswith("eval_rewards") for name in together)
    assert {name for entry in trainer.state.log_history for name in entry} >= set(together) - {"epoch"}
    for name, part in parts.items():
        alone = make(ours.ORPOTrainer, llama(), tmp_path, eval_dataset=part).evaluate()
        mine = {key.replace(f"eval_{name}_", "eval_"): value for key, value in together.items() if f"_{name}_" in key}
        assert_same(mine, alone, ("epoch",))


def test_predictions_reach_compute_metrics(tmp_path):
    def run(module: Any, model: nn.Module) -> tuple[Any, dict[str, float]]:
        seen = []
        trainer = make(
            module.ORPOTrainer,
            model,
            tmp_path,
            eval_dataset=datasets.Dataset.from_list(PAIRS),
            compute_metrics=lambda prediction: seen.append(prediction) or {"mine": 1.0},
        )
        return trainer.evaluate(), seen[0]

    (metrics, found), (_, expected) = (run(module, llama()) for module in (ours, trl_orpo))
    assert metrics["eval_mine"] == 1.0
    assert found.predictions == pytest.approx(expected.predictions, rel=1e-5, abs=1e-7)
    metrics, found = run(ours, gemma2())
    assert all(math.isnan(value) for value in found.predictions)
    assert "eval_logits/chosen" not in metrics


@pytest.mark.shows("Trainers", "TRL, generation during evaluation", "the prompts are continued")
def test_generation_during_evaluation(tmp_path, monkeypatch):
    options = {"generate_during_eval": True, "per_device_eval_batch_size": 3, "max_length": 24}
    options |= {"eval_dataset": datasets.Dataset.from_list(PAIRS)}
    with pytest.raises(ValueError, match="requires Weights and Biases or Comet to be installed"):
        make(ours.ORPOTrainer, llama(), tmp_path, **options)
    monkeypatch.setattr(f"{trl_orpo.ORPOTrainer.__module__}.is_wandb_available", lambda: True)
    trainer = make(ours.ORPOTrainer, llama(), tmp_path, **options)
    calls = []
    generate = trainer.generate_from_model

    def spy(self, model, batch):
        calls.append((batch, generate(model, batch)))
        return calls[-1][1]

    trainer.generate_from_model = MethodType(spy, trainer)
    trainer.train()
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    ((batch, texts),) = calls
    for prompt, ids, text in zip(batch["prompt"], batch["prompt_input_ids"].tolist(), texts, strict=True):
        assert ids[-1] != EOS  # padded on the left
        assert prompt.startswith(TOKENIZER.decode(ids, skip_special_tokens=True))
        assert text.startswith(TOKENIZER.decode(ids, skip_special_tokens=True))


# ---- streams and collators ----


class Rows(torch.utils.data.IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


@pytest.mark.shows("Trainers", "TRL, streaming data", "the steps of a data set of the same rows")
@pytest.mark.parametrize(
    "stream",
    [datasets.Dataset.from_list(PAIRS).to_iterable_dataset(num_shards=2), Rows(PAIRS)],
    ids=["datasets", "torch"],
)
def test_streams(stream, tmp_path):
    options = {"eval_dataset": datasets.Dataset.from_list(PAIRS[:3]), "max_steps": 6}  # into a second epoch
    in_order = make(ours.ORPOTrainer, llama(), tmp_path, train_sampling_strategy="sequential", **options)
    in_order.train()
    trainer = make(ours.ORPOTrainer, llama(), tmp_path, train_dataset=stream, **options)
    assert trainer.data_summary is None
    trainer.train()
    trainer.evaluate()
    for found, expected in zip(steps(trainer), steps(in_order), strict=True):
        assert_same(found, expected, ("epoch",))


@pytest.mark.parametrize("name", ["datasets", "torch"])
def test_a_bad_row_of_a_stream_is_named(name, tmp_path):
    rows = [*PAIRS[:2], {**PAIRS[2], "chosen": None}]
    stream = Rows(rows) if name == "torch" else datasets.Dataset.from_list(rows).to_iterable_dataset()
    trainer = make(ours.ORPOTrainer, llama(), tmp_path, train_dataset=stream, max_steps=6)
    with pytest.raises(ValueError, match=r"^train_dataset, row 2: .*chosen"):
        trainer.train()


def test_own_collator(tmp_path):
    """A user's collator gets the columns of TRL's rows."""
    collate = DPODataCollatorWithPadding(pad_token_id=7)
    runs = []
    for collator in (
        None,
        lambda rows: {k: v for k, v in collate(rows).items() if isinstance(v, torch.Tensor)},
    ):
        trainer = make(ours.ORPOTrainer, llama(), tmp_path, data_collator=collator, remove_unused_columns=False)
        trainer.train()
        runs.append(steps(trainer))
    for found, expected in zip(*runs, strict=True):  # the padding id shows in the mean logits only
        assert_same(found, expected, ("logits/chosen", "logits/rejected"))


@pytest.mark.shows(
    "Trainers", "TRL, empty completions", "finite losses and weights", "differs from stock TRL, whose weights turn NaN"
)
def test_empty_completions(tmp_path):
    """TRL's weights turn NaN."""
    collate = DPODataCollatorWithPadding(pad_token_id=EOS)

    def emptied(rows: list[dict]) -> dict[str, Any]:
        batch = collate(rows)
        batch["chosen_labels"][0] = -100
        return batch

    runs = {}
    for module in (ours, trl_orpo):
        options = {"data_collator": emptied, "remove_unused_columns": False, "max_steps": 2}
        runs[module] = make(module.ORPOTrainer, llama(), tmp_path, **options)
        runs[module].train()
    assert not any(p.isfinite().all() for p in runs[trl_orpo].model.parameters())
    assert all(p.isfinite().all() for p in runs[ours].model.parameters())
    assert all(math.isfinite(value) for entry in steps(runs[ours]) for value in entry.values())
    first = steps(runs[ours])[0]
    assert first["nll_loss"] == pytest.approx(steps(runs[trl_orpo])[0]["nll_loss"], rel=1e-5)
    # The other pair of the batch alone makes the odds-ratio term.
    assert first["loss"] == pytest.approx(first["nll_loss"] - 0.1 * first["log_odds_ratio"], rel=1e-5)
    assert first["log_odds_ratio"] < 0


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ({"train_dataset": PAIRS}, r"train_dataset is a list: use a datasets\.Dataset \(Dataset\.from_list"),
        ({"eval_dataset": {"a": PAIRS}}, r"eval_dataset\['a'\] is a list"),
        ({"train_dataset": {"train": 1}}, r"train_dataset is a dict of train: give one of these"),
    ],
)
def test_data_sets_of_another_kind(dataset, message, tmp_path):
    with pytest.raises(TypeError, match=message):
        make(ours.ORPOTrainer, llama(), tmp_path, **dataset)


PRINTS = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
TURNS = {"chosen": [{"role": "assistant", "content": "46"}], "rejected": [{"role": "assistant", "content": "$46"}]}
PART = [{"type": "image", "text": None}, {"type": "text", "text": "What is it?"}]


@pytest.mark.shows("Trainers", "TRL, images", "the error names where they are", "refused")
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([PAIRS[0] | {"images": None}, PAIRS[1] | {"images": [Image.new("RGB", (2, 2))]}], "in its column 'images'"),
        ([PAIRS[0] | {"image": ""}, PAIRS[1] | {"image": "a.png"}], "in its column 'image'"),
        # This chat template prints a list of parts as Python does.
        (
            [TURNS | {"prompt": [{"role": "user", "content": [part]}]} for part in (PART[1], PART[0])],
            "in 'prompt', a content part of type 'image'",
        ),
    ],
    ids=["images", "image", "content"],
)
def test_images_are_refused(rows, message, stream, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = PRINTS
    dataset = datasets.Dataset.from_list(rows)
    if stream:
        trainer = make(
            ours.ORPOTrainer,
            llama(),
            tmp_path,
            train_dataset=dataset.to_iterable_dataset(),
            processing_class=tokenizer,
        )
        with pytest.raises(ValueError, match=message):
            trainer.train()
        return
    for name, given in (("train_dataset", dataset), ("eval_dataset", {"a": dataset})):
        where = name if given is dataset else r"eval_dataset\['a'\]"
        with pytest.raises(ValueError, match=f"{where}, row 1: .*{message}"):
            make(ours.ORPOTrainer, llama(), tmp_path, **{name: given}, processing_class=tokenizer)


def test_columns_without_images_are_taken(tmp_path):
    rows = [pair | {"images": [], "image": None} for pair in PAIRS]
    assert len(tokenized(ours.ORPOTrainer, rows, tmp_path)) == len(PAIRS)


# ---- rows ----


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def tokenized(trainer: type, rows: list[dict], tmp_path: Any, **options: Any) -> list[dict]:
    return list(
        make(trainer, llama(), tmp_path, train_dataset=datasets.Dataset.from_list(rows), **options).train_dataset
    )


ORDINARY = {
    "strings": PAIRS,
    "boundary inside a token": [
        {"prompt": "The answer is ", "chosen": "46", "rejected": "$46"},
        {"prompt": "The answer is ", "chosen": "7", "rejected": "46"},  # its space is a token, or part of one
    ],
    "specials inside": [{"prompt": "<|begin|>The<|end|>", "chosen": "a<|end|> b", "rejected": "46<|end|>"}],
    "empty parts": [
        {"prompt": "", "chosen": "46", "rejected": "$46"},
        {"prompt": "The", "chosen": "", "rejected": "a"},
    ],
    "messages": [{"prompt": [user("q")], "chosen": [assistant("46")], "rejected": [assistant("$46")]}],
    "implied prompt": [{"chosen": [user("q"), assistant("46")], "rejected": [user("q"), assistant("$46")]}],
    "prompt inside the answers": [
        {"prompt": "q", "chosen": [user("q"), assistant("46")], "rejected": [user("q"), assistant("$46")]}
    ],
    "implied prompt, strings": [{"chosen": "The answer is 46", "rejected": "The answer is $46"}],
}


@pytest.mark.parametrize("special", [{}, {"bos_token": None}], ids=["BOS", "no BOS"])
@pytest.mark.parametrize("name", ORDINARY)
def test_rows_that_fit_are_as_trl_has_them(name, special, tmp_path):
    tokenizer = make_tokenizer(**special)
    found, expected = (
        tokenized(module.ORPOTrainer, ORDINARY[name], tmp_path, processing_class=tokenizer)
        for module in (ours, trl_orpo)
    )
    for one, other in zip(found, expected, strict=True):
        assert {column: one[column] for column in other} == other


def test_several_tokens_that_merge_across_the_boundary(tmp_path):
    """`x`, `y` and `z` are one token, `xyz`; TRL refuses the row."""
    rows = [{"prompt": "is xy", "chosen": "z", "rejected": "zz"}]
    with pytest.raises(ValueError, match="should have the same length"):
        tokenized(trl_orpo.ORPOTrainer, rows, tmp_path)
    (row,) = tokenized(ours.ORPOTrainer, rows, tmp_path)
    completion = [label for label in row["chosen_labels"] if label != -100]
    assert TOKENIZER.convert_ids_to_tokens(completion) == ["xyz", "<|end|>"]
    assert TOKENIZER.decode(row["prompt_input_ids"]) == "<|begin|>is "


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "longest", "expected"),
    [
        (40, 10, 5, 32, (22, 10, 5)),
        (200, 1000, 500, 1024, (200, 824, 500)),
        (200, 2000, 500, 1024, (200, 824, 500)),
    ],
)
def test_rows_that_are_too_long_keep_their_completions(prompt, chosen, rejected, longest, expected, tmp_path):
    """Counts of tokens, the prompt's BOS and the completion's EOS included."""
    texts = {"prompt": "5" * (prompt - 1), "chosen": "7" * (chosen - 1), "rejected": "7" * (rejected - 1)}
    trainer = make(
        ours.ORPOTrainer,
        llama(),
        tmp_path,
        train_dataset=datasets.Dataset.from_list([texts]),
        max_length=longest,
    )
    (row,) = trainer.train_dataset
    kept = [sum(label != -100 for label in row[f"{side}_labels"]) for side in ("chosen", "rejected")]
    assert (len(row["prompt_input_ids"]), *kept) == expected
    for side, length, count in (("chosen", chosen, kept[0]), ("rejected", rejected, kept[1])):
        assert row[f"{side}_input_ids"][: expected[0]] == row["prompt_input_ids"]
        assert row["prompt_input_ids"][0] == BOS
        assert (row[f"{side}_labels"][-1] == EOS) == (count == length)
        assert len(row[f"{side}_labels"]) == len(row[f"{side}_attention_mask"]) == expected[0] + count <= longest
    assert trainer.data_summary == DataSummary.from_rows([row], longest, 2)
    assert trainer.data_summary.overlong_prompts == (prompt > longest)


def test_padding_that_is_the_end_token(tmp_path):
    """The true end is scored, padding never, and token 0 inside an answer is a token like any other."""
    rows = [
        {"prompt": "The", "chosen": "46<|end|> 46", "rejected": "$46"},
        {"prompt": "The answer is", "chosen": " 46", "rejected": " because the question asks"},
    ]
    trainer = make(ours.ORPOTrainer, llama(), tmp_path, train_dataset=datasets.Dataset.from_list(rows))
    batch = trainer.data_collator(list(trainer.train_dataset))
    _, targets, nll_targets = trainer._score(trainer.model, batch, EOS, prompt_nll=True)
    assert (targets == EOS).sum(1).tolist() == [2, 1, 1, 1]
    for side, part in zip(("chosen", "rejected"), targets.split(2), strict=True):
        for row, target in zip(trainer.train_dataset, part.tolist(), strict=True):
            labels = [label for label in row[f"{side}_labels"] if label != -100]
            assert [label for label in target if label != -100] == labels
            assert labels[-1] == EOS
    assert (nll_targets != -100).sum(1).tolist() == [len(r["chosen_input_ids"]) - 1 for r in trainer.train_dataset]


def test_summary_and_rows_with_nothing_to_score(tmp_path, caplog):
    tokenizer = make_tokenizer(eos_token=None)
    rows = [*PAIRS[:3], {"prompt": "The", "chosen": "", "rejected": ""}]
    options = {"processing_class": tokenizer, "train_sampling_strategy": "group_by_length"}
    with caplog.at_level("INFO", "orpo_kernels"):
        trainer = make(
            ours.ORPOTrainer,
            llama(),
            tmp_path,
            train_dataset=datasets.Dataset.from_list(rows),
            max_steps=1,
            **options,
        )
    summary = trainer.data_summary
    assert (summary.pairs, summary.dropped) == (len(trainer.train_dataset), 1) == (3, 1)
    assert summary.tokens == sum(
        len(row[f"{side}_input_ids"]) for row in trainer.train_dataset for side in ("chosen", "rejected")
    )
    assert "3 pairs" in caplog.text
    assert list(trainer._get_train_sampler().lengths) == trainer.train_dataset["length"][:]
    trainer.train()


def test_processes(tmp_path):
    rows, expected = (tokenized(ours.ORPOTrainer, PAIRS, tmp_path, dataset_num_proc=n) for n in (2, None))
    assert rows == expected


# ---- versions ----


def missing(name: str) -> str:
    raise importlib.metadata.PackageNotFoundError(name)


@pytest.mark.shows("Trainers", "TRL of another version, or none", "the error names the version needed", "refused")
@pytest.mark.parametrize(
    ("version", "hidden", "found"),
    [
        (lambda name: "1.17.0", False, "found trl 1.17.0"),
        (lambda name: "0.24.0", True, r"found trl 0.24.0 \(.*trl.trainer"),
        (missing, True, r"found trl none \("),
    ],
    ids=["newer", "older", "missing"],
)
def test_versions(version: Callable[[str], str], hidden: bool, found: str, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.delitem(sys.modules, ours.__name__)
    if hidden:
        monkeypatch.setitem(sys.modules, "trl.trainer.utils", None)
    with pytest.raises(ImportError, match=rf"needs trl>=1.16,<1.17 .*{found}.*pip install 'trl>=1.16,<1.17'"):
        importlib.import_module(ours.__name__)


def test_the_rest_needs_no_trl():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('trl', 'peft', 'datasets'))); "
        "import orpo_kernels, orpo_kernels.integration.transformers"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
