"""Metrics over examples rather than over batches.

A batch leaves one row of numbers a pair: summed log-probs and token counts (`PairSums`), all the objective needs.
Metrics are the objective of all rows at once, so they do not depend on how the pairs were batched or laid out, and the
pairs that a distributed sampler repeats can be dropped by the usual gathering.
"""

from __future__ import annotations

import torch
from torch import Tensor

from orpo_kernels.objective import OrpoOutput, orpo_from_sums
from orpo_kernels.pair_sums import PairSums
from orpo_kernels.presets import Preset

# completion sum and count (chosen, rejected), NLL sum and count, mean logit (chosen, rejected), aux loss
_COLUMNS = 9


def for_metrics(logps: Tensor) -> Tensor:
    """Log-probs as `pair_table` adds them up: detached, fp64 (fp32 where the device has no fp64)."""
    return logps.detach().to(torch.float32 if logps.device.type == "mps" else torch.float64)


def pair_table(of: PairSums, mean_logits: Tensor | None, *, aux_loss: Tensor | None = None) -> Tensor:
    """One batch's rows [B, 9], in the dtype of its sums, those of `for_metrics`.

    mean_logits: [2B] of each sequence, None where unknown. aux_loss: [] what the batch's loss has beside the objective
    (a router's, weighted), None for nothing.
    """
    logits = torch.full_like(of.sums, torch.nan) if mean_logits is None else mean_logits
    (chosen, rejected), (chosen_count, rejected_count), (logits_chosen, logits_rejected) = (
        column.split(of.num_pairs) for column in (of.sums, of.counts, logits)
    )
    aux = torch.zeros_like(of.nll_sums) if aux_loss is None else aux_loss.detach().expand_as(of.nll_sums)
    columns = (chosen, chosen_count, rejected, rejected_count, *of[2:], logits_chosen, logits_rejected, aux)
    return torch.stack([column.to(of.sums) for column in columns], dim=1)


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
    of = PairSums(torch.cat([chosen, rejected]), torch.cat([chosen_count, rejected_count]), nll, nll_count)
    output = orpo_from_sums(of, beta=beta, preset=preset)
    logits = {"logits_chosen": logits_chosen.mean(), "logits_rejected": logits_rejected.mean()}
    return output, logits, aux_loss.mean()
