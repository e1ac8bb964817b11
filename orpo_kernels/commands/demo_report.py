"""What the demo prints."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

_MIB = 1 << 20


def announce(name: str, machine: str, trainer: Any, settings: Any) -> None:
    """Before the work: model, machine, data, settings."""
    trained, total = trainer.model.get_nb_trainable_parameters()
    steps = trainer.args.max_steps
    pairs = len(trainer.train_dataset)
    if steps < 0:
        steps = -(-pairs // settings.batch_size)
    _section(f"ORPO on {name}")
    for label, text in (
        ("machine", f"{machine}, float32"),
        ("model", f"{total / 1e6:.1f} M parameters, {trained / 1e6:.1f} M of them trained (LoRA rank {settings.lora_rank})"),
        ("pairs", f"{pairs} to train on, {len(trainer.eval_dataset)} held out"),
        ("training", f"{steps} steps of {settings.batch_size} pairs, learning rate {settings.learning_rate:g}, "
                     f"beta {settings.beta:g}"),
    ):
        print(f"  {label:<10}{text}")
    print(flush=True)


def print_results(metrics: dict[str, Any], output_dir: Path) -> None:
    """After the work: every figure of metrics.json that a reader wants to see."""
    _print_heldout(metrics)
    _print_comparison(metrics)
    _print_memory(metrics["peak_memory"])
    _print_sample(metrics["sample"])
    _section("Checks")
    for check, passed in metrics["checks"].items():
        print(f"  {'pass' if passed else 'FAIL'}  {check.replace('_', ' ')}")
    durations = metrics["durations_s"]
    _section(f"Done in {sum(durations.values()):.0f} s")
    print("  " + ", ".join(f"{stage.replace('_', ' ')} {seconds:.0f}" for stage, seconds in durations.items()))
    for file, what in (
        ("metrics.json", "all figures, settings, versions"),
        ("curves.png", "loss and margin over the steps"),
        ("adapter", "LoRA weights for PeftModel.from_pretrained(model, folder)"),
    ):
        print(f"  {output_dir / file!s:<28}  {what}")


def _print_heldout(metrics: dict[str, Any]) -> None:
    before, after = metrics["heldout"]["before"], metrics["heldout"]["after"]
    _section(f"Held-out pairs ({metrics['data']['heldout_pairs']})")
    print(f"  {'':<32}{'before':>10}{'after':>10}{'change':>12}")
    a, b = 100 * before["accuracy"], 100 * after["accuracy"]
    print(f"  {'accuracy: chosen preferred':<32}{a:>8.1f} %{b:>8.1f} %{b - a:>+9.1f} pp")
    for key, label, unit in (
        ("margin", "margin (nats per token)", ""),
        ("loss", "ORPO loss (nats)", ""),
    ):
        a, b = before[key], after[key]
        print(f"  {label:<32}{a:>10.3f}{b:>10.3f}{b - a:>+12.3f}{unit}")


def _print_comparison(metrics: dict[str, Any]) -> None:
    found, limits = metrics["comparison"], metrics["settings"]
    rows, length = found["shape"]
    _section(f"One held-out batch ({rows // 2} pairs, {rows} x {length} tokens): full logits against orpo_kernels")
    print(f"  {'':<32}{'full logits':>16}{'orpo_kernels':>16}{'difference':>14}{'limit':>10}")
    for key, label, limit in (
        ("loss", "loss", limits["loss_limit"]),
        ("hidden_gradient", "gradient of hidden states, norm", limits["gradient_limit"]),
        ("parameter_gradient", "gradient of LoRA weights, norm", limits["gradient_limit"]),
    ):
        norm = "" if key == "loss" else "_norm"
        full, ours = found[f"{key}{norm}_full_logits"], found[f"{key}{norm}_orpo_kernels"]
        print(f"  {label:<32}{full:>16.9f}{ours:>16.9f}{found[f'{key}_relative_difference']:>14.1e}{limit:>10.0e}")
    print(
        f"  differences are relative; the furthest of the {found['parameters']} LoRA matrices is off by "
        f"{found['worst_parameter_relative_difference']:.1e}:\n  {found['worst_parameter']}"
    )


def _print_memory(memory: dict[str, Any]) -> None:
    full, ours = memory["full_logits_bytes"], memory["orpo_kernels_bytes"]
    _section("Peak memory of head and loss on that batch, forward and backward")
    print(f"  {'full logits':<16}{full / _MIB:>10,.1f} MiB   (one logits tensor: {memory['one_logits_tensor_bytes'] / _MIB:,.1f} MiB)")
    print(f"  {'orpo_kernels':<16}{ours / _MIB:>10,.1f} MiB   {full / max(ours, 1):,.1f} times less")
    print(_wrapped(memory["method"], "  "))


def _print_sample(sample: dict[str, str]) -> None:
    _section("A held-out prompt, answered greedily")
    for label in ("prompt", "before", "after"):
        print(_wrapped(sample[label], f"  {label:<8}"))


def _wrapped(text: str, label: str) -> str:
    indent = " " * len(label)
    lines = [line for part in text.splitlines() for line in textwrap.wrap(part, 96) or [""]]
    return "\n".join((label if index == 0 else indent) + line for index, line in enumerate(lines or [""]))


def _section(title: str) -> None:
    print(f"\n{title}")
