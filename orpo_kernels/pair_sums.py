"""What the objective sees of a batch: each sequence's summed log-probabilities and its number of scored tokens.

Every layout leads here, a rectangle with masks or targets and flat arrays in which padded, packed and shared-prefix
batches look alike.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from orpo_kernels.odds_ratio import check_logps
from orpo_kernels.presets import Preset

if TYPE_CHECKING:
    from orpo_kernels.sequence_parallel import Group

# Kinds of scored token: in the chosen sequence's NLL only; in the chosen completion; in the rejected one.
PROMPT, CHOSEN, REJECTED = 0, 1, 2
# Elements of the [S, N] comparison that a segment sum makes at once; beyond it, one segment at a time.
_SEGMENT_LIMIT = 1 << 20


class PairSums(NamedTuple):
    """Of B pairs; sums fp32 or fp64, counts of any numeric dtype.

    sums, counts: [2B] the completions' log-probs and tokens, chosen ones first.
    nll_sums, nll_counts: [B] those of the chosen sequences' NLL.
    """

    sums: Tensor
    counts: Tensor
    nll_sums: Tensor
    nll_counts: Tensor

    @classmethod
    def of_masks(cls, logps: Tensor, mask: Tensor, nll_logps: Tensor, nll_mask: Tensor) -> PairSums:
        """Of rectangles: [2B, T] and a bool mask, [B, T'] and a bool mask.

        Raises TypeError for log-probs neither fp32 nor fp64 and for masks that are not bool, ValueError for shapes that
        differ.
        """
        return cls(*_row_sums("completion", logps, mask), *_row_sums("nll", nll_logps, nll_mask))

    @classmethod
    def of_targets(
        cls, logps: Tensor, targets: Tensor, nll_targets: Tensor | None = None, *, ignore_index: int = -100
    ) -> PairSums:
        """Of log-probs [2B, T], those of the merged targets; targets [2B, T]; nll_targets [B, T], by default the chosen
        rows of targets."""
        pairs, mask = targets.shape[0] // 2, targets != ignore_index
        nll_mask = mask[:pairs] if nll_targets is None else nll_targets != ignore_index
        return cls.of_masks(logps, mask, logps[:pairs], nll_mask)

    @classmethod
    def of_flat(cls, logps: Tensor, pair: Tensor, kind: Tensor, *, num_pairs: int, preset: Preset) -> PairSums:
        """Of flat arrays [N], one entry a scored token, in any order; `objective.orpo_objective_flat` tells them and
        the errors."""
        check_logps("logps", logps)
        for name, index in (("pair", pair), ("kind", kind)):
            if logps.dim() != 1 or index.shape != logps.shape:
                raise ValueError(
                    f"{name} has shape {list(index.shape)}, logps {list(logps.shape)}: give [N], one a token"
                )
        fits = (pair >= 0) & (pair < num_pairs) & (kind >= PROMPT) & (kind <= REJECTED)
        if host_can_look(fits) and not bool(fits.all()):
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
        return cls(sums[CHOSEN:].flatten(), counts[CHOSEN:].flatten(), sums[in_nll].sum(0), counts[in_nll].sum(0))

    def over_ranks(self, group: Group | None) -> PairSums:
        """Those of whole sequences, from those of the positions that each rank of `group` has; None: they are whole."""
        if group is None:
            return self
        from orpo_kernels.sequence_parallel import sum_over_ranks

        return PairSums(*sum_over_ranks(group, *self))

    @property
    def num_pairs(self) -> int:
        return self.nll_sums.shape[0]

    @property
    def pair_is_valid(self) -> Tensor:
        """[B] bool, pairs with two completions: those that a mean over pairs counts."""
        return (self.counts[: self.num_pairs] > 0) & (self.counts[self.num_pairs :] > 0)

    def nll_count(self, preset: Preset) -> Tensor:
        """[] what the NLL's mean counts: tokens or, as the preset averages, sequences with any."""
        return self.nll_counts.sum() if preset.nll_mean == "tokens" else (self.nll_counts > 0).sum()


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


def host_can_look(tensor: Tensor) -> bool:
    """Whether reading its values waits for no device and breaks no graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()
