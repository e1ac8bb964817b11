"""Seconds of a training step by the layout of its batch: padded with full logits (TRL, stock), padded, packed, shared.

A step is the forward and backward of one micro-batch, without the optimiser, which is the same for all; a whole model
in fp32 on the CPU, all of its weights training. All contestants get the ids that TRL made of the pairs, in the same
order. Each round runs every micro-batch with every contestant, one after the other, every other round backwards, so
that a machine that slows down slows all. A step's time is its minimum over rounds; a figure is the mean over
micro-batches and, for the spread, the same of the medians.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orpo_kernels.bench import machine
from orpo_kernels.bench.layout_inputs import fitting, load, pair_of, trl_trainer
from orpo_kernels.bench.layout_losses import LABELS, Loss, Refused, losses_of
from orpo_kernels.bench.runner import Report
from orpo_kernels.integration.packing.attention import transformers_model
from orpo_kernels.integration.packing.layout import tokens_a_step


@dataclass(frozen=True)
class Settings:
    """What to measure.

    pairs: a file of preference pairs. model: a folder, or None for SmolLM2-135M from its wheel. micro_batches: pairs
    a step. count: pairs in all. length: only pairs of fewer tokens. check: compare with float64 too.
    """

    pairs: Path
    model: str | None = None
    micro_batches: tuple[int, ...] = (1, 4)
    count: int = 20
    length: int = 1024
    rounds: int = 3
    threads: int = 1
    check: bool = False

    def steps(self) -> int:
        """The most that are measured."""
        batches = sum(math.ceil(self.count / size) for size in self.micro_batches)
        return self.rounds * batches * len(LABELS)


def prepare(settings: Settings) -> tuple[Any, Any]:
    """(TRL's trainer, tokenizer). Raises ValueError for a model or pairs that cannot be used."""
    model, tokenizer = load(settings.model)
    pairs = fitting(settings.pairs, tokenizer, settings.count, settings.length)
    return trl_trainer(model, tokenizer, pairs, settings.length), tokenizer


def run(
    trainer: Any,
    tokenizer: Any,
    settings: Settings,
    command: list[str],
    report: Report = lambda _: None,
) -> dict[str, Any]:
    """The result of what `prepare` made, as its file holds it."""
    started = time.monotonic()
    torch.set_num_threads(settings.threads)
    rows = [dict(row) for row in trainer.train_dataset]
    losses, refused = _admitted(trainer.model, losses_of(trainer, tokenizer), rows[:1])
    return {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine.describe("cpu", settings.threads),
        "versions": machine.versions(),
        "settings": {**asdict(settings), "pairs": settings.pairs.name},
        "refused": refused,
        "results": [_measure(trainer.model, losses, rows, size, settings, report) for size in settings.micro_batches],
        "seconds": round(time.monotonic() - started, 1),
    }


def _admitted(
    model: nn.Module, losses: dict[str, Loss], rows: list[dict[str, Any]]
) -> tuple[dict[str, Loss], dict[str, str]]:
    """Contestants that have run once, and why the others cannot."""
    admitted, refused = {}, {}
    for name, loss_of in losses.items():
        try:
            _step(model, loss_of, rows)
            admitted[name] = loss_of
        except Refused as error:
            refused[name] = str(error)
    return admitted, refused


def _measure(
    model: nn.Module,
    losses: dict[str, Loss],
    rows: list[dict[str, Any]],
    size: int,
    settings: Settings,
    report: Report,
) -> dict[str, Any]:
    """All rounds of micro-batches of `size` pairs."""
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    seconds: dict[str, list[list[float]]] = {name: [[] for _ in batches] for name in losses}
    values: dict[str, list[float]] = {name: [] for name in losses}
    for turn in range(settings.rounds):
        for at, batch in enumerate(batches):
            for name in list(losses)[:: -1 if turn % 2 else 1]:
                report(f"{name}, {size} pairs")
                took, loss = _step(model, losses[name], batch)
                report(None)
                seconds[name][at].append(took)
                if turn == 0:
                    values[name].append(loss)
    tokens: dict[str, float] = dict(tokens_a_step([pair_of(row) for row in rows], size).items())
    tokens["trl"] = tokens["padded"]
    return {
        "pairs": size,
        "layouts": {
            name: {
                "tokens": tokens[name],
                "min_s": statistics.mean(map(min, seconds[name])),
                "median_s": statistics.mean(map(statistics.median, seconds[name])),
                "losses": values[name],
            }
            for name in losses
        },
        "errors": _errors(model, losses, batches[0]) if settings.check else None,
    }


def _step(model: nn.Module, loss_of: Loss, rows: list[dict[str, Any]]) -> tuple[float, float]:
    """(seconds, loss) of a forward and backward."""
    model.zero_grad(set_to_none=True)
    start = time.perf_counter()
    loss = loss_of(rows)
    loss.backward()
    return time.perf_counter() - start, loss.item()


def _errors(model: nn.Module, losses: dict[str, Loss], rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Relative errors against float64: of each contestant's loss, and the largest of a parameter's gradient.

    Float64 is the model's on padded rows, its layers checkpointed and its head ours: more would not fit.
    """

    def gradients() -> dict[str, Tensor]:
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    inner = transformers_model(model)
    inner.gradient_checkpointing_enable({"use_reentrant": False})
    model.double()
    _, right = _step(model, losses["padded"], rows)
    expected = gradients()
    model.float()
    inner.gradient_checkpointing_disable()
    found = {}
    for contestant, loss_of in losses.items():
        _, loss = _step(model, loss_of, rows)
        errors = [
            float((gradient - expected[name]).norm() / expected[name].norm()) for name, gradient in gradients().items()
        ]
        found[contestant] = {"loss": abs(loss / right - 1), "gradients": max(errors)}
    return found


def table(result: dict[str, Any]) -> str:
    """A block for each size of micro-batch, then the layouts that the model cannot have."""
    settings = result["settings"]
    lines = [
        f"{_pairs(settings['count'])}, forward and backward in fp32, means over micro-batches; rounds: "
        f"{settings['rounds']}\n{result['machine']['name']}; torch {result['versions']['torch']}"
    ]
    for block in result["results"]:
        checked = f"{'loss':>10}{'gradients':>11}  (relative errors against float64)" if block["errors"] else ""
        lines += ["", f"{_pairs(block['pairs'])} a step"]
        lines.append(f"  {'':<30}{'tokens':>8}{'min s':>9}{'median s':>10}{'x TRL':>7}{'loss off':>10}{checked}")
        stock = block["layouts"]["trl"]
        for name, found in block["layouts"].items():
            off = max(abs(a - b) for a, b in zip(found["losses"], stock["losses"], strict=True))
            line = f"  {LABELS[name]:<30}{found['tokens']:>8,.0f}{found['min_s']:>9.3f}{found['median_s']:>10.3f}"
            line += f"{stock['min_s'] / found['min_s']:>7.2f}{off:>10.1e}"
            if block["errors"]:
                line += f"{block['errors'][name]['loss']:>10.1e}{block['errors'][name]['gradients']:>11.1e}"
            lines.append(line)
    lines += [f"\n{LABELS[name]}: the model cannot have it ({reason})" for name, reason in result["refused"].items()]
    return "\n".join(lines)


def _pairs(count: int) -> str:
    return "1 pair" if count == 1 else f"{count} pairs"
