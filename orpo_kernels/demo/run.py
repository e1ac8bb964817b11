"""The demo's work: tune, compare with full logits, write.

Every figure is measured in the run itself. Margins are mean log-probabilities a token, chosen minus rejected, in
nats: they do not depend on beta.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, ProgressCallback, set_seed

from orpo_kernels.bench.machine import describe, versions
from orpo_kernels.commands.demo import DemoError
from orpo_kernels.demo import loss_memory
from orpo_kernels.demo.compare import Comparison
from orpo_kernels.demo.plot import plot_curves
from orpo_kernels.demo.progress import Progress
from orpo_kernels.demo.report import announce, print_results
from orpo_kernels.integration.data.files import read_pairs as read_rows
from orpo_kernels.integration.transformers import ORPOConfig, ORPOTrainer


@dataclass(frozen=True)
class Settings:
    """What the demo does.

    max_steps: optimiser steps; None for one pass over the training pairs.
    batch_size: pairs a step.
    heldout_points: evaluations on the curve, those before and after the training included.
    loss_limit: largest relative difference of the loss from full logits in fp32.
    gradient_limit: largest relative error of a gradient against float64; where full logits in fp32 are more
        than half as far off, it is twice their error.
    """

    max_steps: int | None = None
    batch_size: int = 4
    learning_rate: float = 1e-3
    beta: float = 1.0
    lora_rank: int = 16
    lora_alpha: int = 32
    max_length: int = 512
    heldout_points: int = 4
    sample_tokens: int = 60
    seed: int = 0
    loss_limit: float = 1e-5
    gradient_limit: float = 2e-5


class Stages:
    """Seconds of each named part of the work."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - start


def run(name: str, folder: str, gguf_file: str | None, output_dir: Path, settings: Settings) -> dict[str, Any]:
    """Tune the model on the bundled pairs, write all files, return what metrics.json holds.

    name: the model's, for the reader; folder, gguf_file: where to load it from.

    Raises DemoError if `output_dir` cannot be made, or the model cannot be loaded or cannot chat.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"--output-dir {output_dir}: {error.strerror}; choose another folder") from error
    stages = Stages()
    with stages("load"):
        model, tokenizer = load_model(folder, gguf_file)
    trainer = build_trainer(model, tokenizer, read_pairs(), output_dir, settings)
    machine = describe(str(trainer.args.device), torch.get_num_threads())["name"]
    announce(name, machine, trainer, settings)
    tuned = tune(trainer, read_pairs(), settings, stages)
    # The embeddings do not train; looking for their first size would ask a hub.
    trainer.model.save_pretrained(output_dir / "adapter", save_embedding_layers=False)
    tokenizer.save_pretrained(output_dir / "adapter")
    metrics = {
        "model": name,
        "machine": machine,
        "device": str(trainer.args.device),
        "dtype": "float32",
        "settings": asdict(settings),
        **tuned,
        **prove(trainer, settings, stages),
        "durations_s": stages.seconds,
        "versions": versions(),
    }
    metrics["checks"] = checks(metrics)
    title = f"ORPO on {name}: {metrics['train_pairs']} preference pairs, LoRA rank {settings.lora_rank}"
    plot_curves(output_dir / "curves.png", metrics["curves"], title, machine)
    (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    print_results(metrics, output_dir)
    return metrics


def read_pairs() -> list[dict[str, Any]]:
    """The bundled preference pairs; `split` is "train" or "heldout"."""
    with as_file(files("orpo_kernels").joinpath("demo_data/preference_pairs.jsonl")) as path:
        return read_rows(path)


def split(pairs: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [pair for pair in pairs if pair["split"] == name]


def load_model(folder: str, gguf_file: str | None) -> tuple[Any, Any]:
    """(model in fp32, tokenizer). Raises DemoError if there is no such model, or it cannot chat."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, dtype=torch.float32)
    except OSError as error:
        raise DemoError(f"--model {folder} could not be loaded: {error}") from error
    if not tokenizer.chat_template:
        raise DemoError(f"--model {folder}: its tokenizer has no chat template; choose an instruct model")
    return model, tokenizer


def build_trainer(
    model: Any, tokenizer: Any, pairs: list[dict[str, Any]], output_dir: Path, settings: Settings
) -> ORPOTrainer:
    """Our trainer, with LoRA on every linear layer but the head."""
    set_seed(settings.seed)  # of LoRA's first weights
    config = ORPOConfig(
        str(output_dir),
        beta=settings.beta,
        max_length=settings.max_length,
        max_steps=settings.max_steps or -1,
        num_train_epochs=1,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant",  # too few steps to spend any at a low rate
        seed=settings.seed,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        packing="False",  # its batches are compared with full logits
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = ORPOTrainer(
        model,
        config,
        train_dataset=split(pairs, "train"),
        eval_dataset=split(pairs, "heldout"),
        processing_class=tokenizer,
        callbacks=[Progress(settings.heldout_points)],
        peft_config=LoraConfig(
            r=settings.lora_rank,
            lora_alpha=settings.lora_alpha,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )
    for replaced in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(replaced)
    return trainer


def tune(trainer: ORPOTrainer, pairs: list[dict[str, Any]], settings: Settings, stages: Stages) -> dict[str, Any]:
    """Train; held-out figures, curves, and the answer to a held-out prompt before and after."""
    train, heldout = split(pairs, "train"), split(pairs, "heldout")
    prompt = heldout[0]["prompt"]
    sample = {"prompt": prompt[-1]["content"]}
    with stages("sample_before"):
        sample["before"] = answer(trainer, prompt, settings.sample_tokens)
    with stages("evaluate_before"):
        before = evaluate(trainer)
    with stages("train"):
        trainer.train()
    with stages("evaluate_after"):
        after = evaluate(trainer)
    with stages("sample_after"):
        sample["after"] = answer(trainer, prompt, settings.sample_tokens)
    curves = read_curves(trainer.state.log_history)
    curves["heldout"].insert(0, {"step": 0, **before})  # train() starts a new history
    return {
        "train_pairs": len(train),
        "heldout_pairs": len(heldout),
        "steps": trainer.state.global_step,
        "heldout": {"before": before, "after": after},
        "curves": curves,
        "sample": sample,
    }


def prove(trainer: ORPOTrainer, settings: Settings, stages: Stages) -> dict[str, Any]:
    """The first held-out batch through full logits and without them: loss, gradients, peak memory."""
    rows: Any = trainer.eval_dataset
    batch: Any = trainer.data_collator(rows[: settings.batch_size])
    batch = {name: tensor.to(trainer.args.device) for name, tensor in batch.items()}
    with stages("compare"):
        compared = Comparison.run(trainer, batch)
    with stages("memory"):
        reached = trainer.head_logps
        assert reached is not None
        assert reached.transform is not None
        memory = loss_memory.measure(compared.full.hidden, reached.head, reached.transform, batch, settings.beta)
    comparison = {"shape": list(batch["input_ids"].shape), **compared.figures()}
    return {"comparison": comparison, "peak_memory": memory}


def checks(metrics: dict[str, Any]) -> dict[str, bool]:
    """What decides the exit code."""
    found, settings, heldout = metrics["comparison"], metrics["settings"], metrics["heldout"]

    def good(gradient: str) -> bool:
        theirs, ours = (found[f"{gradient}_error_{way}"] for way in ("full_logits", "orpo_kernels"))
        return ours <= max(settings["gradient_limit"], 2 * theirs)

    return {
        "loss_agrees_with_full_logits": found["loss_difference"] <= settings["loss_limit"],
        "gradients_agree_with_float64": good("hidden_gradient") and good("parameter_gradient"),
        "heldout_margin_rose": heldout["after"]["margin"] > heldout["before"]["margin"],
    }


def evaluate(trainer: ORPOTrainer) -> dict[str, float]:
    """Loss, NLL, margin and accuracy over all held-out pairs."""
    return _figures(trainer.evaluate(), "eval_")


def read_curves(log_history: list[dict[str, Any]]) -> dict[str, list[dict[str, float]]]:
    """The same with its step, of every training batch and of every evaluation."""
    return {
        name: [{"step": row["step"], **_figures(row, prefix)} for row in log_history if f"{prefix}loss" in row]
        for name, prefix in (("train", ""), ("heldout", "eval_"))
    }


def _figures(logged: dict[str, float], prefix: str) -> dict[str, float]:
    return {
        "loss": logged[f"{prefix}loss"],
        "nll": logged[f"{prefix}nll_loss"],
        "margin": logged[f"{prefix}logps/chosen"] - logged[f"{prefix}logps/rejected"],
        "accuracy": logged[f"{prefix}rewards/accuracies"],
    }


@torch.no_grad()
def answer(trainer: ORPOTrainer, prompt: list[dict[str, str]], tokens: int) -> str:
    """The model's greedy answer to chat messages: at most `tokens` tokens, "..." where they did not suffice."""
    model: Any = trainer.model.eval()
    tokenizer: Any = trainer.processing_class
    collator: Any = trainer.data_collator
    inputs = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    asked = inputs["input_ids"].shape[1]
    ids = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=collator.padding_value,
    )[0, asked:]
    text = tokenizer.decode(ids, skip_special_tokens=True).strip()
    return text if len(ids) < tokens else f"{text} ..."
