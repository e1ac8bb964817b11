"""Statistics of all tokens from the planes that tiles leave (`tile_statistics`)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from orpo_kernels.kernels import statistics
from orpo_kernels.kernels.statistics import Statistics, TokenStatistics

_LOG_2 = math.log(2)
# The planes' squares are those of exponentials times 2^-40.
_SQUARES_EXPONENT = 80 * _LOG_2


class GatheredStatistics:
    """Those `wanted` of N tokens on a device, chunk by chunk.

    mask: which they are, in the bits of `tile_statistics`.
    """

    def __init__(self, wanted: Statistics, n: int, vocab_size: int, device: torch.device) -> None:
        def numbers(asked: bool, dtype: torch.dtype = torch.float32) -> Tensor | None:
            return torch.empty(n, dtype=dtype, device=device) if asked else None

        self.vocab_size = vocab_size
        self.mask = sum(1 << bit for bit, asked in enumerate(wanted[:4]) if asked)
        # S, and the first and second moments relative to the same base.
        self.sums = numbers(wanted.entropy or wanted.log_sum_sq_probs)
        self.first, self.second = numbers(wanted.entropy), numbers(wanted.log_sum_sq_probs)
        self.mean, self.is_top1 = numbers(wanted.mean_logits), numbers(wanted.is_top1, torch.bool)

    def planes(self, n_v: int, c: int) -> Tensor | None:
        """Memory for the planes of a chunk of `c` tokens in `n_v` tiles a row."""
        if not self.mask:
            return None
        # One row more for the targets' own logits.
        size = self.mask.bit_count() * n_v * c + c
        return torch.empty(size, dtype=torch.float32, device=self._any().device)

    def add(self, planes: Tensor | None, n_v: int, chunk: slice, t_y: Tensor, sums: Tensor) -> None:
        """planes: as the tiles, and after them the slow lane, left them.

        t_y: [C], z_y log2 e. sums: [C], S.
        """
        if planes is None:
            return
        c = sums.numel()
        parts = iter(planes[: planes.numel() - c].view(-1, n_v, c))
        if self.sums is not None:
            self.sums[chunk] = sums
        if self.first is not None:
            self.first[chunk] = next(parts).sum(0) * _LOG_2
        if self.second is not None:
            self.second[chunk] = next(parts).sum(0)
        if self.mean is not None:
            # Relative to the first base: the slow lane has not touched these.
            base = torch.where(t_y == -torch.inf, 0.0, t_y)
            self.mean[chunk] = (base + (next(parts).sum(0) + (t_y - base)) / self.vocab_size) * _LOG_2
        if self.is_top1 is not None:
            # A maximum on a GPU passes over NaN; their sum does not.
            self.is_top1[chunk] = (planes[-c:] >= next(parts).amax(0)) & ~sums.isnan()

    def finish(self, log_odds: Tensor) -> TokenStatistics:
        entropy = log_sum_sq_probs = None
        if self.sums is not None and self.first is not None:
            entropy = statistics.entropy(log_odds, self.sums, self.first)
        if self.sums is not None and self.second is not None:
            log_sum_sq_probs = statistics.log_sum_sq_probs(log_odds, self.sums, self.second, _SQUARES_EXPONENT)
        return TokenStatistics(entropy, log_sum_sq_probs, self.mean, self.is_top1)

    def _any(self) -> Tensor:
        return next(x for x in (self.sums, self.mean, self.is_top1) if x is not None)
