"""The demo's work: tune, evaluate, compare, measure, write.

Everything it reports is measured in the run itself. Margins are mean log-probabilities a token, chosen minus
rejected, in nats: they do not depend on beta.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    set_seed,
)

from orpo_kernels import __version__
from orpo_kernels.commands import compare, loss_memory
from orpo_kernels.commands.demo import DemoError
from orpo_kernels.commands.demo_plot import plot_curves
from orpo_kernels.commands.demo_report import announce, print_results
from orpo_kernels.integration.transformers import ORPOConfig, ORPOTrainer

_VERSIONED = ("torch", "triton", "transformers", "peft", "accelerate")


@dataclass(frozen=True)
class Settings:
    """What the demo does. max_steps: None for one pass over the training pairs."""

    max_steps: int | None = None
    batch_size: int = 4
    learning_rate: float = 5e-4
    beta: float = 1.0
    lora_rank: int = 16
    lora_alpha: int = 32
    max_length: int = 512
    heldout_points: int = 4  # on the curve, the first and the last included
    sample_tokens: int = 60
    seed: int = 0
    loss_limit: float = 1e-5  # relative difference from full logits
    gradient_limit: float = 1e-3


def read_pairs() -> list[dict[str, Any]]:
    """The bundled preference pairs, `split` "train" or "heldout"."""
    text = files("orpo_kernels").joinpath("demo_data/preference_pairs.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


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


def run_demo(
    name: str,
    model: Any,
    tokenizer: Any,
    pairs: list[dict[str, Any]],
    output_dir: Path,
    settings: Settings,
    load_s: float = 0.0,
) -> dict[str, Any]:
    """Tune `model` on the pairs of split "train", write all files into `output_dir`, return what metrics.json holds.

    Raises OSError if `output_dir` cannot be written.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    train, heldout = ([pair for pair in pairs if pair["split"] == split] for split in ("train", "heldout"))
    durations = {"load": load_s}

    @contextmanager
    def timed(stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        durations[stage] = time.perf_counter() - start

    set_seed(settings.seed)
    progress = Progress(settings.heldout_points)
    trainer = build_trainer(model, tokenizer, train, heldout, output_dir, settings)
    trainer.add_callback(progress)
    machine = describe_machine(trainer.args.device)
    announce(name, machine, trainer, settings)

    prompt = heldout[0]["prompt"]
    sample = {"prompt": prompt[-1]["content"]}
    with timed("sample_before"):
        sample["before"] = generate(trainer.model, tokenizer, prompt, settings.sample_tokens)
    with timed("evaluate_before"):
        before = evaluate(trainer)
    with timed("train"):
        trainer.train()
    with timed("evaluate_after"):
        after = evaluate(trainer)
    with timed("sample_after"):
        sample["after"] = generate(trainer.model, tokenizer, prompt, settings.sample_tokens)

    batch = trainer._prepare_inputs(trainer.data_collator(trainer.eval_dataset[: settings.batch_size]))
    with timed("compare"):
        trainer.model.eval()
        full = compare.run_pass(compare.with_full_logits, trainer, batch)
        ours = compare.run_pass(compare.without_logits, trainer, batch)
        agreement = compare.differences(ours, full)
    with timed("memory"):
        transform = trainer._logps.transform
        memory = loss_memory.measure(full.hidden, trainer._logps.head, transform, batch, settings.beta)

    curves = read_curves(trainer.state.log_history)
    metrics = {
        "model": name,
        "machine": machine,
        "device": str(trainer.args.device),
        "dtype": "float32",
        "settings": asdict(settings) | {"steps": trainer.state.global_step},
        "data": {"train_pairs": len(train), "heldout_pairs": len(heldout)},
        "heldout": {"before": before, "after": after},
        "comparison": {"pairs": settings.batch_size, "shape": list(batch["input_ids"].shape), **agreement},
        "peak_memory": memory,
        "sample": sample,
        "checks": {
            "loss_agrees_with_full_logits": agreement["loss_relative_difference"] <= settings.loss_limit,
            "gradients_agree_with_full_logits": max(
                agreement["hidden_gradient_relative_difference"], agreement["parameter_gradient_relative_difference"]
            )
            <= settings.gradient_limit,
            "heldout_margin_rose": after["margin"] > before["margin"],
        },
        "curves": curves,
        "durations_s": durations,
        "versions": versions(),
    }
    title = f"ORPO on {name}: {len(train)} preference pairs, LoRA rank {settings.lora_rank}"
    plot_curves(output_dir / "curves.png", curves, title, machine)
    # The embeddings are not trained, and looking for their size would ask a hub.
    trainer.model.save_pretrained(output_dir / "adapter", save_embedding_layers=False)
    tokenizer.save_pretrained(output_dir / "adapter")
    (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    print_results(metrics, output_dir)
    return metrics


def build_trainer(
    model: Any, tokenizer: Any, train: list[Any], heldout: list[Any], output_dir: Path, settings: Settings
) -> ORPOTrainer:
    """Our trainer with LoRA on every linear layer but the head."""
    config = ORPOConfig(
        str(output_dir),
        beta=settings.beta,
        max_length=settings.max_length,
        max_steps=-1 if settings.max_steps is None else settings.max_steps,
        num_train_epochs=1,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        train_sampling_strategy="group_by_length",  # less padding
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        seed=settings.seed,
    )
    trainer = ORPOTrainer(
        model,
        config,
        train_dataset=train,
        eval_dataset=heldout,
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=settings.lora_rank,
            lora_alpha=settings.lora_alpha,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )
    for theirs in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(theirs)
    return trainer


class Progress(TrainerCallback):
    """Bars for training and evaluation, and evaluations spread over the training."""

    def __init__(self, heldout_points: int) -> None:
        self.heldout_points = heldout_points
        self._train: tqdm | None = None
        self._eval: tqdm | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        parts = self.heldout_points - 1
        self._evaluate_at = {round(part * state.max_steps / parts) for part in range(1, parts)} - {0}
        self._train = tqdm(total=state.max_steps, desc="  training", unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self._train is not None
        self._train.update()
        control.should_evaluate = state.global_step in self._evaluate_at and state.global_step < state.max_steps

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if self._train is not None and "loss" in logs:
            margin = logs["logps/chosen"] - logs["logps/rejected"]
            self._train.set_postfix_str(f"loss {logs['loss']:.3f}, margin {margin:+.3f}")

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any, **kwargs: Any) -> None:
        if self._eval is None:
            self._eval = tqdm(total=len(eval_dataloader), desc="  held-out pairs", unit="batch", leave=False)
        self._eval.update()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._eval is not None:
            self._eval.close()
            self._eval = None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._train is not None:
            self._train.close()
            self._train = None


def evaluate(trainer: ORPOTrainer) -> dict[str, float]:
    """Accuracy, margin (nats a token) and loss over all held-out pairs."""
    found = trainer.evaluate()
    return {
        "accuracy": found["eval_rewards/accuracies"],
        "margin": found["eval_logps/chosen"] - found["eval_logps/rejected"],
        "loss": found["eval_loss"],
        "nll": found["eval_nll_loss"],
    }


def read_curves(log_history: list[dict[str, Any]]) -> dict[str, list[dict[str, float]]]:
    """Step, loss, margin and accuracy of every training batch and of every evaluation."""

    def rows(prefix: str) -> list[dict[str, float]]:
        return [
            {
                "step": row["step"],
                "loss": row[f"{prefix}loss"],
                "margin": row[f"{prefix}logps/chosen"] - row[f"{prefix}logps/rejected"],
                "accuracy": row[f"{prefix}rewards/accuracies"],
            }
            for row in log_history
            if f"{prefix}loss" in row
        ]

    return {"train": rows(""), "heldout": rows("eval_")}


@torch.no_grad()
def generate(model: Any, tokenizer: Any, prompt: list[dict[str, str]], tokens: int) -> str:
    """The model's greedy answer to chat messages, at most `tokens` tokens."""
    model.eval()
    inputs = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    ids = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    answer = ids[0, inputs["input_ids"].shape[1] :]
    text = tokenizer.decode(answer, skip_special_tokens=True).strip()
    ended = int(answer[-1]) in _end_ids(model, tokenizer)
    return text if ended else f"{text} ..."


def _end_ids(model: Any, tokenizer: Any) -> set[int]:
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return {*ends, tokenizer.eos_token_id} - {None}


def describe_machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {torch.get_num_threads()} threads" + ("" if device.type == "cpu" else f", {device}")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"orpo_kernels": __version__, "python": platform.python_version()}
    for package in _VERSIONED:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found
