"""The ORPO objective on token log-probabilities: no logits, no kernels.

    loss = NLL + beta * mean over pairs of the odds-ratio term      (the term: odds_ratio.py)

It sees a sequence only through its summed log-probs and its token count: `orpo_from_sums` is the objective.
Two layouts lead there: a rectangle (`orpo_objective`), and flat arrays (`orpo_objective_flat`) in which
padded, packed and shared-prefix batches look alike.

An empty completion (truncated away, all ignored) takes its pair out of every mean over pairs, while NLL
tokens that remain still count. A mean over nothing is 0, with zero gradients that reach the inputs, so that
no rank of a distributed run waits for another. Weights are multiplied by 0 rather than masked out: a NaN
always shows.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from orpo_kernels.odds_ratio import check_logps, odds_ratio_loss
from orpo_kernels.presets import Preset, check_weight, get_preset

if TYPE_CHECKING:
    from orpo_kernels.sequence_parallel import Group

# Kinds of scored token: in the chosen sequence's NLL only; in the chosen completion; in the rejected one.
PROMPT, CHOSEN, REJECTED = 0, 1, 2
# Elements of the [S, N] comparison that a segment sum makes at once; beyond it, one segment at a time.
_SEGMENT_LIMIT = 1 << 20

_warned_empty = False


@dataclass(eq=False)
class OrpoOutput:
    """`loss = nll_weight * nll_loss + beta * odds_ratio_loss` and its parts, in the dtype of the log-probs.

    Attributes:
        loss: [] what to minimise.
        nll_loss: [] mean negative log-likelihood, before `nll_weight`.
        odds_ratio_loss: [] mean of the valid pairs' odds-ratio terms, at least 0, before beta.
        chosen_logps, rejected_logps: [B] mean log-prob per completion token; 0 for an empty completion.
        log_odds_ratio: [] TRL's metric of that name, the mean of log sigmoid(log odds), at most 0. Detached.
        log_odds_chosen: [] TRL's metric of that name, the mean of the log odds ratio. Detached.
        valid_pairs: [] int64, pairs with two non-empty completions: what a mean over pairs counts.
        pair_is_valid: [B] bool, which they are.
        nll_count: [] what the NLL's mean counts: tokens, or sequences with any.
        beta: the weight used.

    A given `nll_normalizer` or `pair_normalizer` divides `nll_loss` or `odds_ratio_loss` in place of the
    count; `log_odds_ratio` and `log_odds_chosen` stay means over this batch.
    """

    loss: Tensor
    nll_loss: Tensor
    odds_ratio_loss: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    log_odds_ratio: Tensor
    log_odds_chosen: Tensor
    valid_pairs: Tensor
    pair_is_valid: Tensor
    nll_count: Tensor
    beta: float

    def metrics(
        self, *, logits_chosen: Tensor | None = None, logits_rejected: Tensor | None = None
    ) -> dict[str, Tensor]:
        """TRL's metrics under TRL's names, as detached [] tensors; nothing waits for the device.

        Rewards are beta times the mean log-probs. Means over pairs run over the valid ones and are 0
        where there is none. `logits/chosen` and `logits/rejected` are there when given.
        """
        chosen, rejected = self.chosen_logps.detach(), self.rejected_logps.detach()
        per_pair = {
            "rewards/chosen": self.beta * chosen,
            "rewards/rejected": self.beta * rejected,
            "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
            "rewards/margins": self.beta * chosen - self.beta * rejected,
            "logps/chosen": chosen,
            "logps/rejected": rejected,
        }
        metrics = {name: _masked_mean(values, self.pair_is_valid) for name, values in per_pair.items()}
        metrics["nll_loss"] = self.nll_loss.detach()
        metrics["log_odds_ratio"] = self.log_odds_ratio
        metrics["log_odds_chosen"] = self.log_odds_chosen
        for name, logits in (("logits/chosen", logits_chosen), ("logits/rejected", logits_rejected)):
            if logits is not None:
                metrics[name] = logits.detach()
        return metrics

    def warn_if_empty(self) -> None:
        """Warn, once a process, if a pair has an empty completion. Waits for the device.

        The objective does so by itself on CPU tensors, where looking costs nothing. On an accelerator and
        under torch.compile, call it where the host waits anyway, as when metrics are logged.
        """
        global _warned_empty
        pairs, valid = self.pair_is_valid.numel(), int(self.valid_pairs)
        if valid < pairs and not _warned_empty:
            _warned_empty = True
            warnings.warn(
                f"{pairs - valid} of {pairs} pairs have an empty completion (truncated away or all ignored) "
                "and leave the odds-ratio mean; valid_pairs counts the rest. Said once: keep completion "
                "tokens when truncating, or drop such rows.",
                stacklevel=2,
            )


def orpo_objective(
    completion_logps: Tensor,
    completion_mask: Tensor,
    nll_logps: Tensor | None = None,
    nll_mask: Tensor | None = None,
    *,
    beta: float | None = None,
    preset: str | Preset | None = None,
    nll_normalizer: float | Tensor | None = None,
    pair_normalizer: float | Tensor | None = None,
    group: Group | None = None,
) -> OrpoOutput:
    """The objective on a rectangle of log-probs: B chosen rows, then their B rejected rows.

    Args:
        completion_logps: [2B, T] log-probs of the targets, fp32 or fp64. Unmasked places are not looked at.
        completion_mask: [2B, T] bool, tokens of the completions.
        nll_logps: [B, T'] log-probs for the NLL; by default the chosen rows of `completion_logps`.
        nll_mask: [B, T'] bool, tokens of the NLL; by default the chosen completions. A preset with
            `nll_over="prompt+chosen"` needs it, one with "chosen" refuses it.
        beta: weight of the odds-ratio term; by default the preset's, 0.1 without a preset.
        preset: a name, a Preset or None, see `get_preset`.
        nll_normalizer: divides the summed NLL in place of this batch's count (of tokens, or of sequences, as
            the preset averages): a global count makes accumulated micro-batches and ranks add up exactly.
        pair_normalizer: likewise for the summed odds-ratio terms, in place of the count of valid pairs.
        group: the ranks over which the sequences are cut (`sequence_parallel`); the log-probs are then those of
            this rank's positions, and everything that comes back is that of the whole sequences, on every rank.
            Gradients are to be averaged over it.

    Raises:
        ValueError: an odd number of rows; shapes that differ; beta or a normalizer negative or not finite; an
            unknown preset; `nll_mask` missing or refused.
        TypeError: log-probs neither fp32 nor fp64; a mask that is not bool.
    """
    preset = get_preset(preset)
    if completion_logps.dim() != 2 or completion_logps.shape[0] % 2:
        raise ValueError(
            f"completion_logps has shape {list(completion_logps.shape)}: give [2B, T], an even number of "
            "rows, the chosen ones first"
        )
    if nll_mask is None and (preset.nll_over == "prompt+chosen" or nll_logps is not None):
        raise ValueError(f"nll_mask is missing: preset {preset.name!r} or nll_logps needs it")
    if nll_mask is not None and preset.nll_over == "chosen":
        raise ValueError(f"nll_mask is given: preset {preset.name!r} takes the NLL over chosen: omit it")
    num_pairs = completion_logps.shape[0] // 2
    if nll_logps is None:
        nll_logps = completion_logps[:num_pairs]
    if nll_mask is None:
        nll_mask = completion_mask[:num_pairs]
    return orpo_from_sums(
        *_row_sums("completion", completion_logps, completion_mask),
        *_row_sums("nll", nll_logps, nll_mask),
        beta=beta,
        preset=preset,
        nll_normalizer=nll_normalizer,
        pair_normalizer=pair_normalizer,
        group=group,
    )


def orpo_objective_flat(
    logps: Tensor,
    pair: Tensor,
    kind: Tensor,
    *,
    num_pairs: int,
    beta: float | None = None,
    preset: str | Preset | None = None,
    nll_normalizer: float | Tensor | None = None,
    pair_normalizer: float | Tensor | None = None,
    group: Group | None = None,
) -> OrpoOutput:
    """The objective on flat arrays, one entry a scored token, in any order.

    Args:
        logps: [N] fp32 or fp64.
        pair: [N] int64, each token's pair, in [0, num_pairs).
        kind: [N] int64, PROMPT, CHOSEN or REJECTED. The NLL runs over CHOSEN tokens and, unless the preset
            has `nll_over="chosen"`, over PROMPT tokens.
        num_pairs: B.
        beta, preset, nll_normalizer, pair_normalizer, group: as for `orpo_objective`.

    Raises:
        ValueError: shapes that differ; a pair or kind out of range (on an accelerator, where finding out
            would wait for the device, the loss is NaN instead); and as `orpo_objective`.
        TypeError: as `orpo_objective`.
    """
    preset = get_preset(preset)
    check_logps("logps", logps)
    for name, index in (("pair", pair), ("kind", kind)):
        if logps.dim() != 1 or index.shape != logps.shape:
            raise ValueError(f"{name} has shape {list(index.shape)}, logps {list(logps.shape)}: give [N], one a token")
    fits = (pair >= 0) & (pair < num_pairs) & (kind >= PROMPT) & (kind <= REJECTED)
    if _host_can_look(fits) and not bool(fits.all()):
        at = int(torch.argmin(fits.int()))
        raise ValueError(
            f"token {at} has pair={int(pair[at])} and kind={int(kind[at])}: a pair lies in [0, {num_pairs}), "
            f"a kind is PROMPT={PROMPT}, CHOSEN={CHOSEN} or REJECTED={REJECTED}"
        )
    segment = torch.where(fits, kind * num_pairs + pair, 0)
    sums = _SegmentSum.apply(torch.where(fits.all(), logps, math.nan), segment, 3 * num_pairs)
    counts = _SegmentSum.apply(torch.ones_like(logps), segment, 3 * num_pairs)
    sums, counts = sums.view(3, num_pairs), counts.view(3, num_pairs)  # by kind

    in_nll = slice(CHOSEN if preset.nll_over == "chosen" else PROMPT, REJECTED)
    return orpo_from_sums(
        sums[CHOSEN:].flatten(),
        counts[CHOSEN:].flatten(),
        sums[in_nll].sum(0),
        counts[in_nll].sum(0),
        beta=beta,
        preset=preset,
        nll_normalizer=nll_normalizer,
        pair_normalizer=pair_normalizer,
        group=group,
    )


def orpo_from_sums(
    sums: Tensor,
    counts: Tensor,
    nll_sums: Tensor,
    nll_counts: Tensor,
    *,
    beta: float | None = None,
    preset: str | Preset | None = None,
    nll_normalizer: float | Tensor | None = None,
    pair_normalizer: float | Tensor | None = None,
    group: Group | None = None,
) -> OrpoOutput:
    """The objective on each sequence's summed log-probs and token count.

    Args:
        sums, counts: [2B] of the completions, the chosen first.
        nll_sums, nll_counts: [B] of the chosen sequences' NLL tokens.
        beta, preset, nll_normalizer, pair_normalizer, group: as for `orpo_objective`, which tells the errors too.
    """
    preset = get_preset(preset)
    beta = preset.beta if beta is None else beta
    check_weight("beta", beta)
    if sums.shape[0] != 2 * nll_sums.shape[0]:
        raise ValueError(
            f"{sums.shape[0]} completions but {nll_sums.shape[0]} sequences in the NLL: give 2B and B rows"
        )
    if group is not None:
        from orpo_kernels.sequence_parallel import sum_over_ranks

        sums, counts, nll_sums, nll_counts = sum_over_ranks(group, sums, counts, nll_sums, nll_counts)

    num_pairs = nll_sums.shape[0]
    logps = sums / counts.clamp(min=1)
    chosen_logps, rejected_logps = logps[:num_pairs], logps[num_pairs:]
    pair_is_valid = (counts[:num_pairs] > 0) & (counts[num_pairs:] > 0)
    valid_pairs = pair_is_valid.sum()
    odds_dtype = preset.odds_dtype or sums.dtype
    terms, log_odds = odds_ratio_loss(chosen_logps.to(odds_dtype), rejected_logps.to(odds_dtype))
    terms, log_odds = terms.to(sums.dtype), log_odds.to(sums.dtype)
    odds_loss = (terms * pair_is_valid).sum() / _normalizer("pair_normalizer", pair_normalizer, valid_pairs)

    if preset.nll_mean == "tokens":
        nll_sum, nll_count = -nll_sums.sum(), nll_counts.sum()
    else:
        nll_sum, nll_count = -(nll_sums / nll_counts.clamp(min=1)).sum(), (nll_counts > 0).sum()
    nll_loss = nll_sum / _normalizer("nll_normalizer", nll_normalizer, nll_count)

    output = OrpoOutput(
        loss=preset.nll_weight * nll_loss + beta * odds_loss,
        nll_loss=nll_loss,
        odds_ratio_loss=odds_loss,
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        log_odds_ratio=-_masked_mean(terms.detach(), pair_is_valid),
        log_odds_chosen=_masked_mean(log_odds, pair_is_valid),
        valid_pairs=valid_pairs,
        pair_is_valid=pair_is_valid,
        nll_count=nll_count,
        beta=beta,
    )
    if _host_can_look(valid_pairs):
        output.warn_if_empty()
    return output


class _SegmentSum(torch.autograd.Function):
    """Sums of `values` [N] over equal `segment` [N], in [0, S): [S]. The backward gathers.

    Every segment is compared with every token. Unlike index_add on a GPU this uses no atomics, so the same
    bits come back; unlike a one-hot product or differences of a running sum it leaves a NaN in its own
    segment; it sums pairwise and takes tokens in any order. Reading N numbers S times is nothing beside a
    head's product.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, segment: Tensor, num_segments: int) -> Tensor:
        ctx.save_for_backward(segment)
        if num_segments * values.shape[0] <= _SEGMENT_LIMIT:
            ids = torch.arange(num_segments, device=segment.device)
            return torch.where(segment == ids[:, None], values, 0).sum(-1)  # [S, N] -> [S]
        return torch.stack([torch.where(segment == s, values, 0).sum() for s in range(num_segments)])

    @staticmethod
    def backward(ctx: Any, grad_sums: Tensor) -> tuple[Tensor, None, None]:
        (segment,) = ctx.saved_tensors
        return grad_sums[segment], None, None


def _row_sums(name: str, logps: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    check_logps(f"{name}_logps", logps)
    if mask.dtype != torch.bool:
        raise TypeError(f"{name}_mask is {mask.dtype}: give bool, such as targets != ignore_index")
    if mask.shape != logps.shape:
        raise ValueError(f"{name}_mask has shape {list(mask.shape)}, {name}_logps {list(logps.shape)}: make them equal")
    return torch.where(mask, logps, 0).sum(-1), mask.sum(-1)


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum().clamp(min=1)


def _normalizer(name: str, given: float | Tensor | None, count: Tensor) -> float | Tensor:
    """What to divide by: `given`, else `count`; 1 in place of 0, where the dividend is 0 too."""
    if given is None:
        return count.clamp(min=1)
    if isinstance(given, Tensor):
        return torch.where(given == 0, 1, given)
    check_weight(name, given)
    return given or 1


def _host_can_look(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()
