"""`orpo-kernels demo`, end to end: on a tiny random Llama, and SmolLM2 itself against full logits."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from orpo_kernels.__main__ import main
from orpo_kernels.commands import compare, demo, demo_run, loss_memory
from orpo_kernels.integration.transform import Transform
from orpo_kernels.integration.transformers import ORPOConfig, ORPOTrainer
from peft import LoraConfig, PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
METRICS = {
    "model", "machine", "device", "dtype", "settings", "data", "heldout", "comparison", "peak_memory", "sample",
    "checks", "curves", "durations_s", "versions",
}  # fmt: skip


def save_tiny_llama(folder: Path) -> Path:
    """A random Llama and a byte-level BPE trained on the demo's pairs, saved as a user's model would be."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|end|>", "<|start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((json.dumps(pair) for pair in demo_run.read_pairs()), trainer)
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
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """The command's run on the tiny model: its folder, metrics and what a second run's metrics are made of."""
    folder = tmp_path_factory.mktemp("demo")
    code = main(["demo", "--model", str(tiny), "--output-dir", str(folder), "--max-steps", "3"])
    metrics = json.loads((folder / "metrics.json").read_text())
    assert code == (0 if all(metrics["checks"].values()) else 1)
    return folder, metrics, tiny.name


def test_files_and_metrics(finished: tuple[Path, dict[str, Any], str]) -> None:
    folder, metrics, name = finished
    assert set(metrics) == METRICS
    assert metrics["model"] == name
    assert metrics["settings"]["steps"] == 3
    assert metrics["data"] == {"train_pairs": 88, "heldout_pairs": 24}
    assert metrics["checks"]["loss_agrees_with_full_logits"]
    assert metrics["checks"]["gradients_agree_with_full_logits"]
    assert [row["step"] for row in metrics["curves"]["train"]] == [1, 2, 3]
    held_out = metrics["curves"]["heldout"]
    assert [row["step"] for row in held_out] == [0, 1, 2, 3]
    for at, row in (("before", held_out[0]), ("after", held_out[-1])):
        assert all(metrics["heldout"][at][key] == row[key] for key in ("accuracy", "margin", "loss"))
    assert metrics["peak_memory"]["full_logits_bytes"] > metrics["peak_memory"]["one_logits_tensor_bytes"]
    assert all(metrics["sample"][key] for key in ("prompt", "before", "after"))
    assert {"load", "train", "compare", "memory"} <= set(metrics["durations_s"])
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_adapter_reloads(finished: tuple[Path, dict[str, Any], str], tiny: Path) -> None:
    """From disk, without our package: the adapted model gives the margin that the demo reported."""
    folder, metrics, _ = finished
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), folder / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "adapter")
    margins = []
    for pair in demo_run.read_pairs():
        if pair["split"] != "heldout":
            continue
        means = []
        for side in ("chosen", "rejected"):
            prompt = tokenizer.apply_chat_template(pair["prompt"], add_generation_prompt=True, tokenize=False)
            text = tokenizer.apply_chat_template(pair["prompt"] + pair[side], tokenize=False)
            start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
            ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
            with torch.no_grad():
                logps = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
            means.append(logps[start - 1 :].mean().item())
        margins.append(means[0] - means[1])
    assert sum(margins) / len(margins) == pytest.approx(metrics["heldout"]["after"]["margin"], abs=2e-5)


def test_wrong_loss_and_sinking_margin_fail(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exit code tells: a loss off by 2e-5, or a margin that fell."""
    orpo = ORPOTrainer.orpo

    def off(self: ORPOTrainer, *args: Any) -> Any:
        loss, *rest = orpo(self, *args)
        return loss * (1 + 2e-5), *rest

    monkeypatch.setattr(ORPOTrainer, "orpo", off)
    margins = iter([0.5, 0.4])
    monkeypatch.setattr(
        demo_run, "evaluate", lambda trainer: {"accuracy": 0.5, "margin": next(margins), "loss": 1.0, "nll": 1.0}
    )
    monkeypatch.setattr(demo_run, "read_pairs", few_pairs)
    monkeypatch.setattr(demo_run, "plot_curves", lambda *args: None)
    arguments = ["demo", "--model", str(tiny), "--output-dir", str(tmp_path), "--max-steps", "1"]
    assert main(arguments) == 1
    checks = json.loads((tmp_path / "metrics.json").read_text())["checks"]
    assert checks == {
        "loss_agrees_with_full_logits": False,
        "gradients_agree_with_full_logits": True,
        "heldout_margin_rose": False,
    }


def few_pairs(train: int = 4, heldout: int = 4) -> list[dict[str, Any]]:
    pairs = demo_run.read_pairs.__wrapped__() if hasattr(demo_run.read_pairs, "__wrapped__") else PAIRS
    splits = {split: [pair for pair in pairs if pair["split"] == split] for split in ("train", "heldout")}
    return splits["train"][:train] + splits["heldout"][:heldout]


PAIRS = demo_run.read_pairs()
