"""The same batch through full logits and without them: loss and gradients side by side.

The full-logits side is what a trainer without this package does: the model's own logits [2B, T, V], cross
entropy, and the odds ratio as TRL writes it. It shares no code with the other side beyond the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orpo_kernels.integration.patch import find_head


@dataclass(frozen=True)
class Pass:
    """One forward and backward: the loss, and what reached the head's input and every trainable parameter."""

    loss: float
    hidden: Tensor  # [2B, T, D]
    hidden_gradient: Tensor  # [2B, T, D]
    gradients: dict[str, Tensor]


def full_logits_loss(logits: Tensor, inputs: dict[str, Tensor], beta: float) -> Tensor:
    """ORPO (arXiv 2403.07691) in plain PyTorch, on TRL's terms.

    logits: [2B, T, V]. inputs: a batch of `PreferenceCollator`, with input_ids, attention_mask and targets
    [2B, T]; the NLL runs over the whole chosen sequences. Returns the loss [].
    """
    ids = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    next_ids = F.pad(ids[:, 1:], (0, 1), value=-100)  # [2B, T]
    logps = -F.cross_entropy(logits.float().flatten(0, 1), next_ids.flatten(), reduction="none")
    logps = logps.view(next_ids.shape)
    pairs = len(logps) // 2
    nll = -logps[:pairs].sum() / (next_ids[:pairs] != -100).sum()

    completion = inputs["targets"] != -100
    chosen, rejected = ((logps * completion).sum(-1) / completion.sum(-1)).chunk(2)
    log_odds = (chosen - rejected) - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
    return nll - beta * F.logsigmoid(log_odds).mean()


def with_full_logits(trainer: Any, batch: dict[str, Tensor]) -> Tensor:
    """The batch's loss through `model(...).logits`."""
    logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    return full_logits_loss(logits, batch, trainer.args.beta)


def without_logits(trainer: Any, batch: dict[str, Tensor]) -> Tensor:
    """The batch's loss as the trainer computes it."""
    return trainer.orpo(trainer.model, batch)[0]


def run_pass(loss_of: Callable[[Any, dict[str, Tensor]], Tensor], trainer: Any, batch: dict[str, Tensor]) -> Pass:
    """Forward and backward of one of the two above; the model's gradients are cleared before and after."""
    model: nn.Module = trainer.model
    seen: list[Tensor] = []

    def keep(head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].requires_grad:  # not so when the head is probed
            inputs[0].retain_grad()
            seen.append(inputs[0])

    model.zero_grad(set_to_none=True)
    hook = find_head(model).register_forward_pre_hook(keep)
    try:
        loss = loss_of(trainer, batch)
        loss.backward()
    finally:
        hook.remove()
    (hidden,) = seen
    assert hidden.grad is not None
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return Pass(loss.item(), hidden.detach(), hidden.grad, gradients)


def differences(ours: Pass, full: Pass) -> dict[str, Any]:
    """How far `ours` is from `full`, relative to `full`; tensors by their Euclidean norms."""
    if ours.gradients.keys() != full.gradients.keys():
        odd = sorted(ours.gradients.keys() ^ full.gradients.keys())
        raise RuntimeError(f"a gradient reached these parameters one way only: {', '.join(odd)}")
    each = {name: _relative(grad, full.gradients[name]) for name, grad in ours.gradients.items()}
    worst = max(each, key=lambda name: each[name])
    all_ours = torch.cat([gradient.flatten() for gradient in ours.gradients.values()])
    all_full = torch.cat([gradient.flatten() for gradient in full.gradients.values()])
    return {
        "loss_full_logits": full.loss,
        "loss_orpo_kernels": ours.loss,
        "loss_relative_difference": abs(ours.loss - full.loss) / abs(full.loss),
        "hidden_gradient_norm_full_logits": _norm(full.hidden_gradient),
        "hidden_gradient_norm_orpo_kernels": _norm(ours.hidden_gradient),
        "hidden_gradient_relative_difference": _relative(ours.hidden_gradient, full.hidden_gradient),
        "parameters": len(each),
        "parameter_gradient_norm_full_logits": _norm(all_full),
        "parameter_gradient_norm_orpo_kernels": _norm(all_ours),
        "parameter_gradient_relative_difference": _relative(all_ours, all_full),
        "worst_parameter": worst,
        "worst_parameter_relative_difference": each[worst],
    }


def _norm(tensor: Tensor) -> float:
    return torch.linalg.vector_norm(tensor).item()


def _relative(found: Tensor, expected: Tensor) -> float:
    scale = _norm(expected)
    off = _norm(found - expected)
    return off / scale if scale else off
