"""The ORPO objective on token log-probabilities: no logits, no kernels.

    loss = NLL + beta * mean over pairs of the odds-ratio term      (the term: odds_ratio.py)

It sees a sequence only through its summed log-probs and its token count (`pair_sums`): `orpo_from_sums` is the
objective. Two layouts lead there: a rectangle (`orpo_objective`), and flat arrays (`orpo_objective_flat`) in which
padded, packed and shared-prefix batches look alike.

An empty completion (truncated away, all ignored) takes its pair out of every mean over pairs, while NLL
tokens that remain still count. A mean over nothing is 0, with zero gradients that reach the inputs, so that
no rank of a distributed run waits for another. Weights are multiplied by 0 rather than masked out: a NaN
always shows.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from orpo_kernels.odds_ratio import odds_ratio_loss
from orpo_kernels.pair_sums import CHOSEN, PROMPT, REJECTED, PairSums, host_can_look
from orpo_kernels.presets import Preset, check_weight, get_preset

if TYPE_CHECKING:
    from orpo_kernels.sequence_parallel import Group

__all__ = ["CHOSEN", "PROMPT", "REJECTED", "OrpoOutput", "orpo_from_sums", "orpo_objective", "orpo_objective_flat"]

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
        PairSums.of_masks(completion_logps, completion_mask, nll_logps, nll_mask).over_ranks(group),
        beta=beta,
        preset=preset,
        nll_normalizer=nll_normalizer,
        pair_normalizer=pair_normalizer,
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
    return orpo_from_sums(
        PairSums.of_flat(logps, pair, kind, num_pairs=num_pairs, preset=preset).over_ranks(group),
        beta=beta,
        preset=preset,
        nll_normalizer=nll_normalizer,
        pair_normalizer=pair_normalizer,
    )


def orpo_from_sums(
    of: PairSums,
    *,
    beta: float | None = None,
    preset: str | Preset | None = None,
    nll_normalizer: float | Tensor | None = None,
    pair_normalizer: float | Tensor | None = None,
) -> OrpoOutput:
    """The objective on each sequence's summed log-probs and token count.

    Args:
        of: the sums and counts of B pairs.
        beta, preset, nll_normalizer, pair_normalizer: as for `orpo_objective`, which tells the errors too.
    """
    preset = get_preset(preset)
    beta = preset.beta if beta is None else beta
    check_weight("beta", beta)
    if of.sums.shape[0] != 2 * of.num_pairs:
        raise ValueError(f"{of.sums.shape[0]} completions but {of.num_pairs} sequences in the NLL: give 2B and B rows")

    logps = of.sums / of.counts.clamp(min=1)
    chosen_logps, rejected_logps = logps[: of.num_pairs], logps[of.num_pairs :]
    pair_is_valid = of.pair_is_valid
    valid_pairs = pair_is_valid.sum()
    odds_dtype = preset.odds_dtype or of.sums.dtype
    terms, log_odds = odds_ratio_loss(chosen_logps.to(odds_dtype), rejected_logps.to(odds_dtype))
    terms, log_odds = terms.to(of.sums.dtype), log_odds.to(of.sums.dtype)
    odds_loss = (terms * pair_is_valid).sum() / _normalizer("pair_normalizer", pair_normalizer, valid_pairs)

    by_token = preset.nll_mean == "tokens"
    nll_sum = -(of.nll_sums if by_token else of.nll_sums / of.nll_counts.clamp(min=1)).sum()
    nll_count = of.nll_count(preset)
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
    if host_can_look(valid_pairs):
        output.warn_if_empty()
    return output


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
