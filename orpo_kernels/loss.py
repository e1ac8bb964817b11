"""ORPO on hidden states: the primitive `linear_logps` and the objective joined.

The chosen rows are scored for two purposes, the NLL (often prompt + chosen) and the odds ratio (completion
only). Both look at the same log-probabilities, so the union of their targets is scored once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from orpo_kernels.linear_logps import linear_logps
from orpo_kernels.objective import OrpoOutput, orpo_objective
from orpo_kernels.plan import Plan
from orpo_kernels.presets import Preset, check_weight, get_preset

if TYPE_CHECKING:
    from orpo_kernels.sequence_parallel import Group


def orpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    nll_targets: Tensor | None = None,
    beta: float | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    preset: str | Preset | None = None,
    plan: Plan | None = None,
    group: Group | None = None,
) -> OrpoOutput:
    """The ORPO loss of B pairs, without the logits.

    hidden: [2B, T, D], the B chosen rows first, then their rejected ones in the same order.
    weight: [V, D], the head; bias: [V] or None.
    targets: [2B, T] int64, aligned with hidden (already shifted, see `shift_labels`): completion tokens,
        `ignore_index` elsewhere.
    nll_targets: [B, T] for the chosen rows, the tokens of the NLL; by default those of `targets`. A preset
        with `nll_over="chosen"` takes none.
    beta: weight of the odds-ratio term; by default the preset's, 0.1 without a preset.
    preset: "trl", "llama_factory", "paper", a `Preset`, or None.
    logit_scale, softcap, ignore_index, plan: as for `linear_logps`.
    group: the ranks over which the sequences are cut, T then being this rank's positions (`sequence_parallel`): the
        output is that of the whole sequences on every rank, and gradients are to be averaged over the group.

    Returns `OrpoOutput`; `.loss` is differentiable in hidden, weight and bias.

    Raises ValueError or TypeError that names the argument, its value and what it must be.
    """
    if hidden.dim() != 3 or hidden.shape[0] % 2:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)}: it must be [2B, T, D] with an even number of rows, B chosen "
            "then B rejected"
        )
    logps = linear_logps(
        hidden,
        weight,
        merge_targets(targets, nll_targets, ignore_index=ignore_index),
        bias=bias,
        logit_scale=logit_scale,
        softcap=softcap,
        ignore_index=ignore_index,
        plan=plan,
    )
    return orpo_from_logps(
        logps,
        targets,
        nll_targets=nll_targets,
        beta=beta,
        preset=preset,
        ignore_index=ignore_index,
        group=group,
    )


class OrpoLoss(nn.Module):
    """`orpo_loss` as a module, called as `module(weight, hidden, targets, bias=None, nll_targets=None)`.

    The arguments are those of `orpo_loss`.
    """

    def __init__(
        self,
        beta: float | None = None,
        *,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        ignore_index: int = -100,
        preset: str | Preset | None = None,
        plan: Plan | None = None,
        group: Group | None = None,
    ) -> None:
        super().__init__()
        self.preset = get_preset(preset)
        self.beta = self.preset.beta if beta is None else beta
        check_weight("beta", self.beta)
        self.logit_scale = logit_scale
        self.softcap = softcap
        self.ignore_index = ignore_index
        self.plan = plan
        self.group = group

    def forward(
        self,
        weight: Tensor,
        hidden: Tensor,
        targets: Tensor,
        bias: Tensor | None = None,
        nll_targets: Tensor | None = None,
    ) -> OrpoOutput:
        return orpo_loss(
            hidden,
            weight,
            targets,
            nll_targets=nll_targets,
            beta=self.beta,
            bias=bias,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            ignore_index=self.ignore_index,
            preset=self.preset,
            plan=self.plan,
            group=self.group,
        )

    def extra_repr(self) -> str:
        return f"beta={self.beta}, preset={self.preset.name!r}"


def merge_targets(targets: Tensor, nll_targets: Tensor | None, *, ignore_index: int = -100) -> Tensor:
    """The union [2B, T] of the completion's targets [2B, T] and the NLL's [B, T] in the chosen rows.

    Raises ValueError for shapes that do not fit, and where both name a token and the two differ.
    """
    if targets.dim() != 2 or targets.shape[0] % 2:
        raise ValueError(f"targets has shape {tuple(targets.shape)}: it must be [2B, T], B chosen then B rejected")
    if nll_targets is None:
        return targets
    pairs, length = targets.shape[0] // 2, targets.shape[1]
    if nll_targets.shape != (pairs, length):
        raise ValueError(
            f"nll_targets has shape {tuple(nll_targets.shape)}: it must be [B, T] = [{pairs}, {length}], the "
            "chosen rows of targets"
        )
    chosen = targets[:pairs]
    differs = (chosen != nll_targets) & (chosen != ignore_index) & (nll_targets != ignore_index)
    message = "targets and nll_targets name different tokens for the same place"
    if differs.device.type == "cuda":
        torch._assert_async(~differs.any(), message)  # no wait for the device
    elif not torch.compiler.is_compiling() and bool(differs.any()):
        row, place = differs.nonzero()[0].tolist()
        raise ValueError(
            f"targets and nll_targets differ at [{row}, {place}]: {int(chosen[row, place])} and "
            f"{int(nll_targets[row, place])}. Both must name the token that follows, or {ignore_index}"
        )
    return torch.cat([torch.where(chosen != ignore_index, chosen, nll_targets), targets[pairs:]])


def orpo_from_logps(
    logps: Tensor,
    targets: Tensor,
    *,
    nll_targets: Tensor | None = None,
    beta: float | None = None,
    preset: str | Preset | None = None,
    ignore_index: int = -100,
    nll_normalizer: float | Tensor | None = None,
    pair_normalizer: float | Tensor | None = None,
    group: Group | None = None,
) -> OrpoOutput:
    """The objective on per-token log-probabilities [2B, T] of `merge_targets(targets, nll_targets)`.

    The normalizers and group are those of `orpo_objective`; the rest as for `orpo_loss`.
    """
    preset = get_preset(preset)
    pairs = targets.shape[0] // 2
    mask = targets != ignore_index
    nll_logps = nll_mask = None
    if preset.nll_over != "chosen":
        nll_logps = logps[:pairs]
        nll_mask = mask[:pairs] if nll_targets is None else nll_targets != ignore_index
    elif nll_targets is not None:
        raise ValueError(
            f"nll_targets was given with preset {preset.name!r}, whose NLL runs over the chosen completion: leave "
            "it out"
        )
    return orpo_objective(
        logps,
        mask,
        nll_logps,
        nll_mask,
        beta=beta,
        preset=preset,
        nll_normalizer=nll_normalizer,
        pair_normalizer=pair_normalizer,
        group=group,
    )
