"""Metrics over examples rather than over batches.

A batch leaves one row of numbers a pair: summed log-probs and token counts, all the objective needs. Metrics
are the objective of all rows at once, so they do not depend on how the pairs were batched, and the pairs that
a distributed sampler repeats can be dropped by the usual gathering. Batches are padded, or flat: one entry a scored
token, with its pair and kind (`packing.layout`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from orpo_kernels.objective import PROMPT, REJECTED, OrpoOutput, orpo_from_sums
from orpo_kernels.presets import Preset
from orpo_kernels.sequence_parallel import Group, sum_over_ranks

# completion sum and count (chosen, rejected), NLL sum and count, mean logit (chosen, rejected), aux loss
_COLUMNS, _LOGITS = 9, 6


def pair_rows(
    logps: Tensor,
    targets: Tensor,
    nll_targets: Tensor | None,
    mean_logits: Tensor | None,
    ignore_index: int = -100,
    *,
    aux_loss: Tensor | None = None,
) -> Tensor:
    """One batch's rows, [B, 9] fp64 (fp32 where the device has no fp64), detached.

    logps: [2B, T] log-probs of the merged targets; targets [2B, T]; nll_targets [B, T] or None for the chosen
    part of targets; mean_logits [2B] or None. aux_loss: [] what the batch's loss has beside the objective (a
    router's, weighted), None for nothing.
    """
    logps = logps.detach().to(torch.float32 if logps.device.type == "mps" else torch.float64)
    pairs = targets.shape[0] // 2
    mask = targets != ignore_index
    nll_mask = mask[:pairs] if nll_targets is None else nll_targets != ignore_index
    sums = torch.where(mask, logps, 0.0).sum(-1)
    counts = mask.sum(-1)
    nll = torch.where(nll_mask, logps[:pairs], 0.0).sum(-1)
    logits = torch.full_like(sums, torch.nan) if mean_logits is None else mean_logits
    columns = (
        sums[:pairs],
        counts[:pairs],
        sums[pairs:],
        counts[pairs:],
        nll,
        nll_mask.sum(-1),
        logits[:pairs],
        logits[pairs:],
        torch.zeros_like(nll) if aux_loss is None else aux_loss.detach().expand_as(nll),
    )
    return torch.stack([column.to(logps) for column in columns], dim=1)


def whole_rows(rows: Tensor, positions: Tensor, group: Group) -> Tensor:
    """`pair_rows` [B, 9] of whole sequences, from those of the positions that this rank of `group` holds.

    positions: [2B], how many of them its mean logits were taken over.
    """
    counts = positions.view(2, -1).T.to(rows)  # [B, 2]: chosen, rejected
    before, logits, after = rows.split([_LOGITS, 2, _COLUMNS - _LOGITS - 2], 1)
    before, logits, after, counts = sum_over_ranks(group, before, logits * counts, after, counts)
    return torch.cat([before, logits / counts, after], 1)


def pair_metrics(rows: Tensor, *, beta: float, preset: Preset) -> dict[str, float]:
    """TRL's metric names, and `loss`, over all of `rows` [n, 9]. An auxiliary loss is averaged over pairs."""
    output, logits, aux_loss = objective_of(rows.cpu(), beta=beta, preset=preset)
    known = {} if any(mean.isnan() for mean in logits.values()) else logits
    metrics = {"loss": output.loss + aux_loss, **output.metrics(**known)}
    return {name: float(value) for name, value in metrics.items()}


def objective_of(rows: Tensor, *, beta: float, preset: Preset) -> tuple[OrpoOutput, dict[str, Tensor], Tensor]:
    """(the objective of `rows` [n, 9], its mean logits as `OrpoOutput.metrics` takes them, the mean auxiliary loss).

    The mean logits are NaN where a row's are unknown. Nothing waits for the device.
    """
    columns = rows.reshape(-1, _COLUMNS).unbind(1)
    chosen, chosen_count, rejected, rejected_count, nll, nll_count, logits_chosen, logits_rejected, aux_loss = columns
    output = orpo_from_sums(
        torch.cat([chosen, rejected]),
        torch.cat([chosen_count, rejected_count]),
        nll,
        nll_count,
        beta=beta,
        preset=preset,
    )
    logits = {"logits_chosen": logits_chosen.mean(), "logits_rejected": logits_rejected.mean()}
    return output, logits, aux_loss.mean()


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
    """`pair_rows` of flat log-probabilities [N] in the order of `layout`, of B = num_pairs pairs.

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
