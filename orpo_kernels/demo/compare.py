"""The same batch three ways: full logits, without logits, and float64 as the judge of both.

The full-logits side is what a trainer without this package does: the model's own logits [2B, T, V], cross
entropy, and the odds ratio as TRL writes it. It shares no code with the other side beyond the model. The judge
does the head and the loss in float64, so that it differs from the full-logits side in rounding only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orpo_kernels.bench.peers.full_logits import trl_objective
from orpo_kernels.integration.head.logit_transform import Transform
from orpo_kernels.integration.head.patch import find_head

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Pass:
    """One forward and backward: the loss, and what reached the head's input and every trainable parameter."""

    loss: float
    hidden: Tensor  # [2B, T, D]
    hidden_gradient: Tensor  # [2B, T, D]
    gradients: dict[str, Tensor]


def full_logits_loss(logits: Tensor, batch: Batch, beta: float) -> Tensor:
    """ORPO (arXiv 2403.07691) in plain PyTorch, on TRL's terms.

    logits: [2B, T, V]. batch: from `PreferenceCollator`, with input_ids, attention_mask and targets [2B, T];
    the NLL runs over the whole chosen sequences. Returns the loss [].
    """
    ids = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    next_ids = F.pad(ids[:, 1:], (0, 1), value=-100)  # [2B, T]
    logps = -F.cross_entropy(logits.flatten(0, 1), next_ids.flatten(), reduction="none").view(next_ids.shape)
    return trl_objective(logps, batch["targets"], next_ids[: len(next_ids) // 2], beta)


@dataclass(frozen=True)
class Comparison:
    """Three passes over one batch; trainer: an `ORPOTrainer` that has seen a batch already."""

    full: Pass
    ours: Pass
    exact: Pass

    @classmethod
    def run(cls, trainer: Any, batch: Batch) -> Comparison:
        trainer.model.eval()
        beta, inputs = trainer.args.beta, {name: batch[name] for name in ("input_ids", "attention_mask")}
        head, transform = find_head(trainer.model), trainer.head_logps.transform

        def logits() -> Tensor:
            return trainer.model(**inputs, use_cache=False).logits

        def full(hidden: list[Tensor]) -> Tensor:
            return full_logits_loss(logits(), batch, beta)

        def ours(hidden: list[Tensor]) -> Tensor:
            return trainer.orpo(trainer.model, batch)[0]

        def exact(hidden: list[Tensor]) -> Tensor:
            logits()  # for the head's input
            host_batch = {name: tensor.cpu() for name, tensor in batch.items()}
            wide = _float64_logits(hidden[0], head, transform)
            return full_logits_loss(wide, host_batch if wide.device.type == "cpu" else batch, beta)

        return cls(*(_run(trainer.model, head, loss_of) for loss_of in (full, ours, exact)))

    def figures(self) -> dict[str, Any]:
        """Losses, and relative differences: of gradients, in the Euclidean norm.

        `*_difference` is of ours from full logits, `*_error_*` of either from float64.
        """
        full, ours, exact = self.full, self.ours, self.exact
        worst, apart = _furthest(ours.gradients, full.gradients)
        return {
            "loss_full_logits": full.loss,
            "loss_orpo_kernels": ours.loss,
            "loss_float64": exact.loss,
            "loss_difference": abs(ours.loss / full.loss - 1),
            "loss_error_full_logits": abs(full.loss / exact.loss - 1),
            "loss_error_orpo_kernels": abs(ours.loss / exact.loss - 1),
            **_three("hidden_gradient", *(side.hidden_gradient for side in (full, ours, exact))),
            **_three("parameter_gradient", *(_flat(side.gradients) for side in (full, ours, exact))),
            "trained_tensors": len(full.gradients),
            "furthest_tensor": worst,
            "furthest_tensor_difference": apart,
        }


def _run(model: nn.Module, head: nn.Linear, loss_of: Callable[[list[Tensor]], Tensor]) -> Pass:
    """Forward and backward of `loss_of`, given the head's input once there is one. Clears the gradients."""
    hidden: list[Tensor] = []

    def keep(head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        inputs[0].retain_grad()
        hidden.append(inputs[0])

    model.zero_grad(set_to_none=True)
    hook = head.register_forward_pre_hook(keep)
    try:
        loss = loss_of(hidden)
        loss.backward()
    finally:
        hook.remove()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    assert hidden[0].grad is not None
    return Pass(loss.item(), hidden[0].detach(), hidden[0].grad, gradients)


def _float64_logits(hidden: Tensor, head: nn.Linear, transform: Transform) -> Tensor:
    device = torch.device("cpu") if hidden.device.type == "mps" else hidden.device  # MPS has no float64
    weight = head.weight.detach().to(device, torch.float64)
    bias = None if head.bias is None else head.bias.detach().to(device, torch.float64)
    return transform(F.linear(hidden.to(device).double(), weight, bias))


def _three(name: str, full: Tensor, ours: Tensor, exact: Tensor) -> dict[str, float]:
    return {
        f"{name}_difference": _relative(ours, full),
        f"{name}_error_full_logits": _relative(full, exact),
        f"{name}_error_orpo_kernels": _relative(ours, exact),
    }


def _furthest(ours: dict[str, Tensor], full: dict[str, Tensor]) -> tuple[str, float]:
    """The tensor whose gradients are furthest apart, and by how much."""
    if ours.keys() != full.keys():
        odd = ", ".join(sorted(ours.keys() ^ full.keys()))
        raise RuntimeError(f"a gradient reached these parameters one way only: {odd}")
    apart = {name: _relative(gradient, full[name]) for name, gradient in ours.items()}
    worst = max(apart, key=lambda name: apart[name])
    return worst, apart[worst]


def _flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients.values()])


def _relative(found: Tensor, expected: Tensor) -> float:
    off, scale = (torch.linalg.vector_norm(tensor).item() for tensor in (found - expected, expected))
    return off / scale if scale else off
