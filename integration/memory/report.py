"""Answers as text and as JSON."""

from __future__ import annotations

from typing import Any

from .answers import Answers, Change
from .footprint import LOSSES, PARTS, Footprint
from .run import Run

GIB = 1 << 30
LABELS = {"ours": "ours", "full": "full logits"}


def described(run: Run) -> str:
    """One line: what trains, on what batch, how."""
    if run.peft is None:
        method = "all weights train"
    else:
        rank = getattr(run.peft, "r", None)
        adapters = f"LoRA of rank {rank}" if rank else type(run.peft).__name__
        method = f"{adapters} on 4-bit weights" if run.four_bit else adapters
    parts = [
        method,
        f"{run.pairs} pair{'s' if run.pairs > 1 else ''} of {run.length} tokens a row, rows {run.layout}",
        f"{_dtype(run.dtype)} on {run.device}" + (f", weights {_dtype(run.weights_dtype)}" if run.casts else ""),
        run.optim,
        "activation checkpointing" if run.checkpointing else "no checkpointing",
    ]
    if run.shards > 1:
        parts.append(f"{run.sharded} sharded over {run.shards}")
    if run.tp > 1:
        parts.append(f"tensor-parallel over {run.tp}")
    return f"{run.name}: {'; '.join(parts)}"


def _dtype(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def table(found: Footprint) -> list[str]:
    """Lines: the parts of both peaks, GiB."""
    lines = [f"{'GiB':<14}" + "".join(f"{part:>13}" for part in (*PARTS, "peak")) + "  at"]
    for loss in LOSSES:
        peak = getattr(found, loss)
        numbers = [*(getattr(peak, part) for part in PARTS), peak.total]
        lines.append(f"{LABELS[loss]:<14}" + "".join(f"{number / GIB:>13.2f}" for number in numbers) + f"  {peak.when}")
    return lines


def verdict(answers: Answers, gpu: int) -> list[str]:
    """Lines: whether it fits, what would, and what to change."""
    run, need = answers.asked.run, answers.asked.ours.total
    left = answers.budget - need
    said = f"fits, with {left / GIB:.1f} GiB to spare" if left >= 0 else f"does not fit: {-left / GIB:.1f} GiB too much"
    lines = [
        f"A card of {gpu / GIB:.1f} GiB, {(gpu - answers.budget) / GIB:.1f} of them kept free: this run {said}.",
        "",
        f"{'':<14}{f'longest at {_pairs(run.pairs)}':>24}{f'most pairs at {run.length} tokens':>30}",
    ]
    for loss in LOSSES:
        longest, pairs = answers.longest[loss], answers.pairs[loss]
        lines.append(f"{LABELS[loss]:<14}{longest or 'none':>24,}{pairs or 'none':>30,}" if longest and pairs else
                     f"{LABELS[loss]:<14}{f'{longest:,}' if longest else 'none':>24}{pairs or 'none':>30}")  # fmt: skip
    if answers.advice:
        lines += ["", "What to change, the cheapest first:"]
        lines += [_advised(change, answers.budget) for change in answers.advice]
        if answers.together is not None:
            lines.append(_advised(answers.together, answers.budget))
    return lines


def _pairs(count: int) -> str:
    return f"{count} pair{'s' if count > 1 else ''}"


def _advised(change: Change, budget: int) -> str:
    if change.result is None:
        return f"  {change.name:<24} cannot be had with this model"
    total = change.result.ours.total
    fits = "fits" if total <= budget else "not enough alone"
    return f"  {change.name:<24}{total / GIB:>8.1f} GiB, {fits:<17} {change.costs}"


def as_json(found: Footprint, answers: Answers | None, gpu: int | None) -> dict[str, Any]:
    run = found.run
    result: dict[str, Any] = {
        "run": {
            "model": run.name,
            "pairs": run.pairs,
            "length": run.length,
            "layout": run.layout,
            "dtype": _dtype(run.dtype),
            "weights_dtype": _dtype(run.weights_dtype),
            "lora_r": getattr(run.peft, "r", None),
            "four_bit": run.four_bit,
            "optim": run.optim,
            "checkpointing": run.checkpointing,
            "sharded": run.sharded,
            "shards": run.shards,
            "tp": run.tp,
            "device": run.device,
        },
        **{loss: getattr(found, loss).as_dict() for loss in LOSSES},
    }
    if answers is not None:
        result["gpu"] = {"bytes": gpu, "usable_bytes": answers.budget, "fits": answers.fits}
        result["longest_length"], result["most_pairs"] = answers.longest, answers.pairs
        result["advice"] = [_change(change, answers.budget) for change in answers.advice]
        result["together"] = None if answers.together is None else _change(answers.together, answers.budget)
    return result


def _change(change: Change, budget: int) -> dict[str, Any]:
    total = None if change.result is None else change.result.ours.total
    return {
        "option": change.name,
        "costs": change.costs,
        "bytes": total,
        "fits": total is not None and total <= budget,
    }
