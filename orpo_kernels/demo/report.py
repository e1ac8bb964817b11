"""What the demo prints."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

_MIB = 1 << 20


def announce(name: str, machine: str, trainer: Any, settings: Any) -> None:
    """Before the work: machine, model, data, settings."""
    trained, total = trainer.model.get_nb_trainable_parameters()
    pairs = len(trainer.train_dataset)
    steps = settings.max_steps or -(-pairs // settings.batch_size)
    _section(f"ORPO on {name}")
    for label, text in (
        ("machine", f"{machine}, float32"),
        ("model", f"{(total - trained) / 1e6:.1f} M parameters, frozen; {trained / 1e6:.1f} M of LoRA, which train"),
        ("pairs", f"{pairs} to train on, {len(trainer.eval_dataset)} held out"),
        ("training", f"{steps} steps of {settings.batch_size} pairs"),
        ("settings", f"learning rate {settings.learning_rate:g}, beta {settings.beta:g}"),
    ):
        print(f"  {label:<10}{text}")
    print(flush=True)


def print_results(metrics: dict[str, Any], output_dir: Path) -> None:
    """After the work: the figures of metrics.json that a reader wants to see."""
    _print_heldout(metrics)
    _print_comparison(metrics["comparison"])
    _print_memory(metrics["peak_memory"])
    _print_sample(metrics["sample"])
    _section("Checks")
    for check, passed in metrics["checks"].items():
        text = check.replace("_", " ").replace("heldout", "held-out")
        print(f"  {'pass' if passed else 'FAIL'}  {text}")
    durations = metrics["durations_s"]
    _section(f"Done in {sum(durations.values()):.0f} s")
    stages = ", ".join(f"{stage.replace('_', ' ')} {seconds:.0f}" for stage, seconds in durations.items())
    print(_wrapped(stages, "  "))
    for file, what in (
        ("metrics.json", "all figures, settings, versions"),
        ("curves.png", "loss and margin over the steps"),
        ("adapter", "LoRA weights: PeftModel.from_pretrained(model, folder)"),
    ):
        print(f"  {output_dir / file!s:<28}  {what}")


def _print_heldout(metrics: dict[str, Any]) -> None:
    before, after = metrics["heldout"]["before"], metrics["heldout"]["after"]
    _section(f"Held-out pairs ({metrics['heldout_pairs']})")
    print(f"  {'':<34}{'before':>10}{'after':>10}{'change':>12}")
    a, b = 100 * before["accuracy"], 100 * after["accuracy"]
    print(f"  {'accuracy, chosen over rejected':<34}{a:>8.1f} %{b:>8.1f} %{b - a:>+10.1f} %")
    for key, label in (("margin", "margin (nats per token)"), ("loss", "ORPO loss (nats)")):
        a, b = before[key], after[key]
        print(f"  {label:<34}{a:>10.3f}{b:>10.3f}{b - a:>+12.3f}")


def _print_comparison(found: dict[str, Any]) -> None:
    rows, length = found["shape"]
    _section(f"One held-out batch, {rows // 2} pairs as {rows} x {length} tokens, both ways in fp32")
    full, ours, exact = (found[f"loss_{way}"] for way in ("full_logits", "orpo_kernels", "float64"))
    print(f"  loss {full:.8f} with full logits, {ours:.8f} with orpo_kernels, {exact:.8f} in float64")
    print(f"  {'':<34}{'difference':>12}{'error of':>14}{'error of':>14}")
    print(f"  {'relative, against float64':<34}{'of the two':>12}{'full logits':>14}{'orpo_kernels':>14}")
    for key, label in (
        ("loss", "loss"),
        ("hidden_gradient", "gradient of hidden states"),
        ("parameter_gradient", "gradient of LoRA weights"),
    ):
        apart, theirs, ours = (
            found[f"{key}_{figure}"] for figure in ("difference", "error_full_logits", "error_orpo_kernels")
        )
        print(f"  {label:<34}{apart:>12.1e}{theirs:>14.1e}{ours:>14.1e}")
    print(
        f"  of {found['trained_tensors']} LoRA matrices, the two ways differ most, by "
        f"{found['furthest_tensor_difference']:.1e}, in\n  {found['furthest_tensor']}"
    )


def _print_memory(memory: dict[str, Any]) -> None:
    full, ours, logits = (
        memory[f"{name}_bytes"] / _MIB for name in ("full_logits", "orpo_kernels", "one_logits_tensor")
    )
    _section("Peak memory of head and loss on that batch, forward and backward")
    print(f"  {'full logits':<34}{full:>10,.1f} MiB   (one logits tensor is {logits:,.1f} MiB)")
    # A tiny batch may find all it needs in memory that the process already has.
    ratio = f"{full / ours:,.0f} times less" if ours else "no growth that the reading can see"
    print(f"  {'orpo_kernels':<34}{ours:>10,.1f} MiB   {ratio}")
    print(_wrapped(memory["method"], "  "))


def _print_sample(sample: dict[str, str]) -> None:
    _section("A held-out prompt, answered greedily")
    for label in ("prompt", "before", "after"):
        print(_wrapped(sample[label], f"  {label:<10}"))


def _wrapped(text: str, label: str) -> str:
    """`text` at 100 columns, its line breaks kept, behind `label`."""
    lines = [line for part in text.splitlines() for line in textwrap.wrap(part, 100 - len(label)) or [""]]
    return label + f"\n{' ' * len(label)}".join(lines)


def _section(title: str) -> None:
    print(f"\n{title}")
