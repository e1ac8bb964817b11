"""Metrics and counts from flat arrays: one entry a scored token, with its pair and kind (`layout`)."""

from __future__ import annotations

import torch
from torch import Tensor

from orpo_kernels.objective import PROMPT, REJECTED
from orpo_kernels.presets import Preset

from .pair_table import pair_rows


def flat_pair_rows(
    logps: Tensor,
    pair: Tensor,
    kind: Tensor,
    num_pairs: int,
    longest: int,
    preset: Preset,
    mean_logits: Tensor | None = None,
    *,
    aux_loss: Tensor | None = None,
) -> Tensor:
    """`pair_table.pair_rows` of flat log-probabilities [N] in the order of `layout`, of B = num_pairs pairs.

    longest: at least the tokens of the longest sequence. mean_logits, aux_loss: as there.
    """
    sequence = torch.where(kind == REJECTED, pair + num_pairs, pair)  # ascending
    start = torch.searchsorted(sequence, torch.arange(2 * num_pairs, device=sequence.device))
    places = (sequence, torch.arange(len(sequence), device=sequence.device) - start[sequence])
    rectangle = logps.new_zeros(2 * num_pairs, longest)
    rectangle[places] = logps.detach()
    # Only which tokens count is asked of the targets.
    targets = torch.full((2 * num_pairs, longest), -100, device=logps.device)
    nll_targets = targets.clone()
    targets[places] = torch.where(kind == PROMPT, -100, 0)
    nll_targets[places] = 0
    nll = None if preset.nll_over == "chosen" else nll_targets[:num_pairs]
    return pair_rows(rectangle, targets, nll, mean_logits, aux_loss=aux_loss)


def flat_counts(pair: Tensor, kind: Tensor, num_pairs: int, preset: Preset) -> Tensor:
    """[2] int64: the NLL's tokens (or sequences, as the preset averages), and the pairs with two completions."""
    counts = torch.zeros(3 * num_pairs, dtype=torch.int64, device=kind.device)
    counts.index_add_(0, kind * num_pairs + pair, torch.ones_like(kind))
    prompt, chosen, rejected = counts.view(3, num_pairs)
    nll = chosen if preset.nll_over == "chosen" else prompt + chosen
    nll_count = nll.sum() if preset.nll_mean == "tokens" else (nll > 0).sum()
    return torch.stack([nll_count, ((chosen > 0) & (rejected > 0)).sum()])
