"""Statistics of a chunk's tokens in `torch_path`, carried from tile to tile.

    T  = T + sum z                                                   mean_logits = T / V
    M1 = e^(r_old - r) (M1 + (r_old - r) S_old) + sum e (z - r)      to the entropy, with S (see `statistics`)
    M2 = e^2(r_old - r) M2 + sum e^2                                 to log sum p^2

`is_top1` takes two maxima: the target is the argmax if no logit before it is as large and none behind it is larger. The
first of equal logits is the argmax for torch, and for TRL's fused head.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from orpo_kernels.kernels import statistics
from orpo_kernels.kernels.products import chunks_of
from orpo_kernels.kernels.statistics import Statistics
from orpo_kernels.kernels.torch_bytes import ROWS_AT_ONCE

# Exponentials are 0 from here down, in fp64 too, and 0 times this is 0, as it is not times -inf.
LEAST_LOG = -1e4


class RunningStatistics:
    """Of a chunk of tokens.

    wanted: the statistics asked for. like: [C] zeros in the accumulation dtype. block: columns of a tile.
    keeps_products: whether the entropy's gradient needs e (z - r) of a whole tile.
    """

    def __init__(self, wanted: Statistics, like: Tensor, block: int, *, keeps_products: bool) -> None:
        self.wanted = wanted
        self.keeps_products = keeps_products
        self.total, self.first, self.second = (torch.zeros_like(like) for _ in range(3))
        self.largest, self.before = (torch.full_like(like, -torch.inf) for _ in range(2))
        # A GPU takes a whole tile at once.
        self.rows = max(1, len(like) if like.is_cuda else min(len(like), ROWS_AT_ONCE))
        held = len(like) if keeps_products else self.rows
        self.tile = like.new_empty(held * block) if wanted.second_tile else None

    def _parts(self, shape: torch.Size) -> Iterator[tuple[slice, Tensor]]:
        """Some rows of a tile [C, Vb] after another, and memory for as many."""
        assert self.tile is not None
        for rows in chunks_of(shape[0], self.rows):
            start = rows.start * shape[1] if self.keeps_products else 0
            yield rows, self.tile[start : start + (rows.stop - rows.start) * shape[1]].view(-1, shape[1])

    def see_logits(self, z: Tensor) -> None:
        """z: [C, Vb], targets included."""
        if self.wanted.mean_logits:
            self.total += z.sum(1)

    def see_competitors(
        self, z: Tensor, maximum: Tensor, z_at: Tensor, at: Tensor, inside: Tensor, behind: Tensor
    ) -> None:
        """z: [C, Vb], -inf at targets; maximum: [C], of its rows.

        z_at: [C], the target's logit where it is `inside` the tile [C], in column `at` [C, 1]. behind: [C], whether it
        lies behind.
        """
        if not self.wanted.is_top1:
            return
        self.largest = torch.maximum(self.largest, maximum)
        before = torch.where(behind, maximum, -torch.inf)
        tied = inside & (z_at == maximum)
        # On a GPU asking would wait for the device.
        if z.is_cuda or not torch.equal(tied, torch.zeros_like(tied)):
            columns, nothing = torch.arange(z.shape[1], device=z.device), z.new_full((), -torch.inf)
            for rows, place in self._parts(z.shape):
                torch.where(columns < at[rows], z[rows], nothing, out=place)
                before[rows] = torch.where(tied[rows], place.amax(1), before[rows])
        self.before = torch.maximum(self.before, before)

    def take_exponentials(
        self, z: Tensor, base: Tensor, decay: Tensor, shift: Tensor, old: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """e = exp(z - r) in the place of z [C, Vb]; returns its rows' sums [C] and, where kept, e (z - r) [C, Vb].

        base: r, finite. shift: r_old - r. decay: e^shift. old: S_old. [C] each.
        """
        sums, first, second = (torch.empty_like(base) for _ in range(3))
        if self.wanted.entropy:
            for rows, above in self._parts(z.shape):
                part = z[rows]
                torch.sub(part, base[rows, None], out=above).clamp_(min=LEAST_LOG)
                torch.exp(above, out=part)
                self._sum(part, sums[rows], second[rows])
                torch.sum(above.mul_(part), 1, out=first[rows])
            self.first = decay * (self.first + shift * old) + first
        else:
            self._sum(z.sub_(base[:, None]).exp_(), sums, second)
        if self.wanted.log_sum_sq_probs:
            self.second = decay.square() * self.second + second.square_()
        kept = self.tile[: z.numel()].view(z.shape) if self.keeps_products and self.tile is not None else None
        return sums, kept

    def _sum(self, e: Tensor, sums: Tensor, norms: Tensor) -> None:
        """Writes the sums of e's rows, and their Euclidean norms where they are asked for."""
        torch.sum(e, 1, out=sums)
        if self.wanted.log_sum_sq_probs:
            torch.linalg.vector_norm(e, dim=1, out=norms)

    def entropy(self, log_odds: Tensor, sums: Tensor) -> Tensor:
        return statistics.entropy(log_odds, sums, self.first)

    def log_sum_sq_probs(self, log_odds: Tensor, sums: Tensor) -> Tensor:
        return statistics.log_sum_sq_probs(log_odds, sums, self.second)

    def is_top1(self, z_y: Tensor) -> Tensor:
        return (z_y >= self.largest) & (z_y > self.before)
