"""The ORPO objective on log-probabilities: no logits, no kernels.

    Loss = NLL + beta * mean over pairs of -log sigmoid(logodds(l_w) - logodds(l_l)),
    logodds(l) = l - log(1 - e^l),  l_w, l_l = mean log-prob per completion token, chosen and rejected

(Hong, Lee, Thorne: "ORPO: Monolithic Preference Optimization without Reference Model", arXiv 2403.07691.)

With `p = e^l` and `q = 1 - p` one pair's term is `log(1 + p_l q_w / (p_w q_l))`, and its derivatives have a
denominator that is a sum of positive terms, so nothing cancels and nothing is 0/0 however sure a sequence is:

    D = p_w q_l + p_l q_w,    d/dl_w = -p_l / D,    d/dl_l = (p_l q_w / D) / q_l

`p` and `D` are taken relative to the larger of the two probabilities, so that very improbable sequences do not
underflow. Autograd on the textbook form gives NaN at l_w = 0; this gives -p_l / q_l (l_l = -1: -0.58198).

As l_l approaches 0 the term truly diverges (-log|l_l|, derivative 1/|l_l|), and where both do it is undefined.
So both enter as at most `-SURE = -2^-100`: values nearer to 0 give the term and the derivatives of -SURE, at
most 101 ln 2 and 2^100, which fp32 holds even after a GradScaler's factor. The bound is this small because a
token's own factor `1 - p` shrinks with |l_l|: gradients of the logits stay exact down to it.

A sequence is seen only through its summed log-probs and its token count (`orpo_from_sums`). Two layouts get
there: a rectangle (`orpo_objective`) and flat arrays (`orpo_objective_flat`), for which padded, packed and
shared-prefix batches look alike.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from orpo_kernels.presets import Preset, check_weight, get_preset

SURE = 2.0**-100
# A log-prob above 0 is rounding (bf16 logits are off by 0.03 to 0.04 nats) or not a log-prob at all.
ROUNDING = 0.05
# The kinds of a scored token: of the chosen sequence, but in the NLL only; of the chosen, of the rejected answer.
PROMPT, CHOSEN, REJECTED = 0, 1, 2
# Elements of the [3B, N] comparison that a flat sum makes at once; beyond it goes segment by segment.
_SEGMENT_LIMIT = 1 << 20

_warned_empty = False


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, split at -ln 2 so that neither branch cancels (Maechler, "log1mexp-note", 2012)."""
    return torch.where(x < -math.log(2), torch.log1p(-torch.exp(x)), torch.log(-torch.expm1(x)))


def odds_ratio_loss(chosen_logps: Tensor, rejected_logps: Tensor) -> tuple[Tensor, Tensor]:
    """Each pair's odds-ratio term and log odds ratio, with the closed-form gradient of this module's top.

    Args:
        chosen_logps: [B] mean log-prob per completion token, fp32 or fp64.
        rejected_logps: [B], likewise.

    Returns:
        `-log sigmoid(log_odds)` [B], at least 0, differentiable once; `log_odds = logodds(l_w) - logodds(l_l)`
        [B], without gradient. Both finite for every l in [-inf, ROUNDING] exclusive of -inf; a NaN, an inf or a
        larger l (not a log-prob) gives NaN for its pair and no other.

    Raises:
        TypeError: a dtype other than fp32 or fp64, or two dtypes.
        ValueError: two shapes.
    """
    _check_logps("chosen_logps", chosen_logps)
    _check_like("rejected_logps", rejected_logps, "chosen_logps", chosen_logps)
    return _OddsRatio.apply(chosen_logps, rejected_logps)


class _OddsRatio(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
        l_w, l_l = _bounded(chosen), _bounded(rejected)
        log_odds = (l_w - l_l) + (log1mexp(l_l) - log1mexp(l_w))
        larger = torch.maximum(l_w, l_l)
        p_w, p_l = torch.exp(l_w - larger), torch.exp(l_l - larger)
        q_w, q_l = -torch.expm1(l_w), -torch.expm1(l_l)
        d = p_w * q_l + p_l * q_w
        ctx.save_for_backward(-p_l / d, p_l * q_w / d / q_l)
        ctx.mark_non_differentiable(log_odds)
        return -F.logsigmoid(log_odds), log_odds

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        grad_w, grad_l = ctx.saved_tensors
        return grad_loss * grad_w, grad_loss * grad_l


def _bounded(logps: Tensor) -> Tensor:
    log_prob = (logps > -math.inf) & (logps < ROUNDING)  # false for NaN
    return torch.where(log_prob, logps.clamp(max=-SURE), math.nan)


@dataclass(eq=False)
class OrpoOutput:
    """`loss = nll_weight * nll_loss + beta * odds_ratio_loss`. Tensors; [] scalars; in the dtype of the log-probs.

    Attributes:
        loss: [] what to minimise.
        nll_loss: [] mean negative log-likelihood, without `nll_weight`.
        odds_ratio_loss: [] mean of the pairs' `-log sigmoid(log_odds)`, at least 0, without beta.
        chosen_logps, rejected_logps: [B] mean log-prob per completion token; 0 for an empty completion.
        log_odds_ratio: [] TRL's metric of this name: mean of `log sigmoid(log_odds)`, at most 0. Detached.
        log_odds_chosen: [] TRL's metric of this name: mean of `log_odds`. Detached.
        valid_pairs: [] int64, pairs with two non-empty completions: what the means over pairs count.
        pair_is_valid: [B] bool, which pairs these are.
        nll_count: [] what the NLL's mean counts here: tokens, or sequences that have any.
        beta: the weight used.
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
        """TRL's metrics under TRL's names, detached [] tensors: nothing waits for the device.

        `rewards/*` are beta times the mean log-probs. Means over pairs run over the valid ones, 0 where none
        is. `logits/chosen|rejected` appear when given.
        """
        chosen, rejected = self.chosen_logps.detach(), self.rejected_logps.detach()

        def mean(values: Tensor) -> Tensor:
            return _masked_mean(values, self.pair_is_valid)

        metrics = {
            "rewards/chosen": mean(self.beta * chosen),
            "rewards/rejected": mean(self.beta * rejected),
            "rewards/accuracies": mean((self.beta * chosen > self.beta * rejected).to(chosen.dtype)),
            "rewards/margins": mean(self.beta * chosen - self.beta * rejected),
            "logps/chosen": mean(chosen),
            "logps/rejected": mean(rejected),
            "nll_loss": self.nll_loss.detach(),
            "log_odds_ratio": self.log_odds_ratio,
            "log_odds_chosen": self.log_odds_chosen,
        }
        if logits_chosen is not None:
            metrics["logits/chosen"] = logits_chosen.detach()
        if logits_rejected is not None:
            metrics["logits/rejected"] = logits_rejected.detach()
        return metrics

    def warn_if_empty(self) -> None:
        """Warn, once a process, that some pair has an empty completion. Waits for the device.

        The objective calls it by itself for CPU tensors, where it costs nothing; on an accelerator call it
        where the host waits anyway, as when metrics are logged.
        """
        global _warned_empty
        pairs, valid = self.pair_is_valid.numel(), int(self.valid_pairs)
        if valid < pairs and not _warned_empty:
            _warned_empty = True
            warnings.warn(
                f"{pairs - valid} of {pairs} pairs have an empty completion (all its tokens truncated away or "
                "ignored) and leave the odds-ratio mean; valid_pairs counts the others. Shown once: keep "
                "completion tokens when truncating, or drop such rows.",
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
) -> OrpoOutput:
    """The objective on a rectangle of per-token log-probs, chosen rows first, rejected second.

    Args:
        completion_logps: [2B, T] log-prob of each target, fp32 or fp64. What stands where no mask is set is
            never read.
        completion_mask: [2B, T] bool, the completions' tokens.
        nll_logps: [B, T'] log-probs for the NLL; by default the chosen rows of `completion_logps`.
        nll_mask: [B, T'] bool, the NLL's tokens; by default the chosen completions. A preset with
            `nll_over="prompt+chosen"` asks for it, one with "chosen" excludes it.
        beta: weight of the odds-ratio term; by default the preset's (0.1 without a preset).
        preset: see `presets.get_preset`.
        nll_normalizer: divides the summed NLL in place of this batch's own count of tokens (of sequences where
            the preset averages these), as for an exact mean over accumulated micro-batches or ranks.
        pair_normalizer: likewise for the summed odds-ratio terms, in place of the count of valid pairs.

    An empty completion takes its pair out of the means over pairs; its NLL tokens, if any, still count. A mean
    over nothing is 0 with a connected zero gradient.

    Raises:
        ValueError: odd number of rows, shapes that do not fit, beta or a normalizer negative or not finite,
            unknown preset, a mask the preset asks for or excludes.
        TypeError: log-probs not fp32 or fp64, a mask not bool.
    """
    preset = get_preset(preset)
    _check_logps("completion_logps", completion_logps)
    if completion_logps.dim() != 2 or completion_logps.shape[0] % 2:
        raise ValueError(
            f"completion_logps has shape {list(completion_logps.shape)}: give [2B, T], B chosen rows then their B "
            "rejected rows"
        )
    _check_mask("completion_mask", completion_mask, "completion_logps", completion_logps)
    num_pairs = completion_logps.shape[0] // 2
    if nll_mask is None and preset.nll_over == "prompt+chosen":
        raise ValueError(f"preset {preset.name!r} takes the NLL over prompt and chosen tokens: give nll_mask")
    if nll_mask is not None and preset.nll_over == "chosen":
        raise ValueError(f"preset {preset.name!r} takes the NLL over chosen tokens only: leave nll_mask out")
    if nll_logps is None:
        nll_logps = completion_logps[:num_pairs]
    elif nll_mask is None:
        raise ValueError("nll_logps is given without nll_mask: give both")
    if nll_mask is None:
        nll_mask = completion_mask[:num_pairs]
    _check_logps("nll_logps", nll_logps)
    _check_mask("nll_mask", nll_mask, "nll_logps", nll_logps)

    return orpo_from_sums(
        torch.where(completion_mask, completion_logps, 0).sum(-1),
        completion_mask.sum(-1),
        torch.where(nll_mask, nll_logps, 0).sum(-1),
        nll_mask.sum(-1),
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
) -> OrpoOutput:
    """The objective on flat arrays, one entry a scored token in any order: every batch layout looks like this.

    Args:
        logps: [N] fp32 or fp64.
        pair: [N] int64, the token's pair, in [0, num_pairs).
        kind: [N] int64, PROMPT (a prompt token, in the NLL only), CHOSEN or REJECTED (its completion's tokens).
            The NLL runs over CHOSEN and, unless the preset says "chosen", over PROMPT.
        num_pairs: B.
        beta, preset, nll_normalizer, pair_normalizer: as in `orpo_objective`.

    Raises:
        ValueError: a shape, a pair or a kind out of range (on an accelerator, where looking would wait for
            the device, the loss is NaN instead), and as `orpo_objective`.
        TypeError: as `orpo_objective`.
    """
    preset = get_preset(preset)
    _check_logps("logps", logps)
    for name, index in (("pair", pair), ("kind", kind)):
        if logps.dim() != 1 or index.shape != logps.shape:
            raise ValueError(
                f"{name} has shape {list(index.shape)}, logps {list(logps.shape)}: give both as [N], one entry a "
                "scored token"
            )
    fits = (pair >= 0) & (pair < num_pairs) & (kind >= PROMPT) & (kind <= REJECTED)
    if _host_can_look(fits) and not bool(fits.all()):
        at = int(torch.argmin(fits.int()))
        raise ValueError(
            f"token {at} has pair={int(pair[at])}, kind={int(kind[at])}: pair must lie in [0, {num_pairs}) and "
            f"kind be PROMPT={PROMPT}, CHOSEN={CHOSEN} or REJECTED={REJECTED}"
        )
    segment = torch.where(fits, kind * num_pairs + pair, 0)
    poison = torch.where(fits.all(), 0.0, math.nan).to(logps.dtype)
    sums = _SegmentSum.apply(logps, segment, 3 * num_pairs) + poison
    counts = _SegmentSum.apply(torch.ones_like(logps), segment, 3 * num_pairs)

    in_nll = slice(num_pairs if preset.nll_over == "chosen" else 0, 2 * num_pairs)
    return orpo_from_sums(
        sums[num_pairs:],
        counts[num_pairs:],
        sums[in_nll].view(-1, num_pairs).sum(0),
        counts[in_nll].view(-1, num_pairs).sum(0),
        beta=beta,
        preset=preset,
        nll_normalizer=nll_normalizer,
        pair_normalizer=pair_normalizer,
    )


class _SegmentSum(torch.autograd.Function):
    """Sums of `values` [N] by `segment` [N] -> [S]; the backward gathers.

    By comparison with every segment number, which is deterministic where index_add on a GPU is not (atomics),
    keeps a NaN in its own segment where a one-hot product or a difference of running sums spreads it, sums
    pairwise, in any order of tokens, and waits for no length. It reads N numbers S times: nothing beside a head.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, segment: Tensor, num_segments: int) -> Tensor:
        ctx.save_for_backward(segment)
        if num_segments * values.numel() <= _SEGMENT_LIMIT:
            ids = torch.arange(num_segments, device=segment.device)
            return torch.where(segment == ids[:, None], values, 0).sum(-1)
        return torch.stack([torch.where(segment == s, values, 0).sum() for s in range(num_segments)])

    @staticmethod
    def backward(ctx: Any, grad_sums: Tensor) -> tuple[Tensor, None, None]:
        (segment,) = ctx.saved_tensors
        return grad_sums[segment], None, None


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
) -> OrpoOutput:
    """The objective on each sequence's summed log-probs and token counts; what every layout ends in.

    Args:
        sums, counts: [2B] of the completions, chosen first.
        nll_sums, nll_counts: [B] of the chosen sequences' NLL tokens.
        beta, preset, nll_normalizer, pair_normalizer: as in `orpo_objective`.
    """
    preset = get_preset(preset)
    beta = preset.beta if beta is None else beta
    check_weight("beta", beta)

    filled = counts > 0
    logps = sums / counts.clamp(min=1)
    chosen_logps, rejected_logps = logps.chunk(2)
    pair_is_valid = torch.logical_and(*filled.chunk(2))
    odds_dtype = preset.odds_dtype or sums.dtype
    terms, log_odds = odds_ratio_loss(chosen_logps.to(odds_dtype), rejected_logps.to(odds_dtype))
    terms, log_odds = terms.to(sums.dtype), log_odds.to(sums.dtype)

    # An empty completion's term is finite, so times 0 takes it out, keeps its graph and still shows a NaN.
    odds_sum = (terms * pair_is_valid).sum()
    valid_pairs = pair_is_valid.sum()
    if preset.nll_mean == "tokens":
        nll_sum, nll_count = -nll_sums.sum(), nll_counts.sum()
    else:
        nll_sum, nll_count = -(nll_sums / nll_counts.clamp(min=1)).sum(), (nll_counts > 0).sum()
    nll_loss = _divide("nll_normalizer", nll_sum, nll_count if nll_normalizer is None else nll_normalizer)
    odds_loss = _divide("pair_normalizer", odds_sum, valid_pairs if pair_normalizer is None else pair_normalizer)

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


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum().clamp(min=1)


def _divide(name: str, total: Tensor, by: float | Tensor) -> Tensor:
    """total / by, and `total` (which is 0) where nothing was counted."""
    if isinstance(by, Tensor):
        return total / torch.where(by == 0, 1, by)
    check_weight(name, by)
    return total / (by or 1)


def _host_can_look(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_logps(name: str, logps: Tensor) -> None:
    if logps.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} is {logps.dtype}: give float32 or float64 log-probs")


def _check_like(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    if tensor.shape != like.shape:
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}, {like_name} {list(like.shape)}: they must be equal"
        )
    if tensor.dtype != like.dtype:
        raise TypeError(f"{name} is {tensor.dtype}, {like_name} {like.dtype}: they must be equal")


def _check_mask(name: str, mask: Tensor, like_name: str, like: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} is {mask.dtype}: give a bool tensor, such as targets != ignore_index")
    if mask.shape != like.shape:
        raise ValueError(
            f"{name} has shape {list(mask.shape)}, {like_name} {list(like.shape)}: they must be equal"
        )
