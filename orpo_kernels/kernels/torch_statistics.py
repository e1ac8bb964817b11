"""Statistics of a chunk's tokens in `torch_path`, carried from tile to tile.

    T  = T + sum z                                                   mean_logits = T / V
    M1 = e^(r_old - r) (M1 + (r_old - r) S_old) + sum e (z - r)      to the entropy, with S (see `statistics`)
    M2 = e^2(r_old - r) M2 + sum e^2                                 to log sum p^2

`is_top1` takes two maxima: the target is the argmax if no logit before it is as large and none behind it is larger. The
first of equal logits is the argmax for torch, and for TRL's fused head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from orpo_kernels.kernels import statistics
from orpo_kernels.kernels.statistics import Statistics

# Exponentials are 0 from here down, in fp64 too, and 0 times this is 0, as it is not times -inf.
LEAST_LOG = -1e4


class RunningStatistics:
    """wanted: the statistics asked for. like: [C] zeros in the accumulation dtype. tile: memory for a tile [C, Vb]."""

    def __init__(self, wanted: Statistics, like: Tensor, tile: Tensor | None) -> None:
        self.wanted = wanted
        self.tile = tile
        self.total, self.first, self.second = (torch.zeros_like(like) for _ in range(3))
        self.largest, self.before = (torch.full_like(like, -torch.inf) for _ in range(2))

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
            assert self.tile is not None
            place = self.tile[: z.numel()].view(z.shape)
            torch.where(torch.arange(z.shape[1], device=z.device) < at, z, z.new_full((), -torch.inf), out=place)
            before = torch.where(tied, place.amax(1), before)
        self.before = torch.maximum(self.before, before)

    def exponentials(self, z: Tensor, reference: Tensor) -> tuple[Tensor, Tensor | None]:
        """e = exp(z - r) in the place of z [C, Vb], and z - r where the entropy needs it. reference: [C], finite."""
        if not self.wanted.entropy:
            return z.sub_(reference[:, None]).exp_(), None
        assert self.tile is not None
        above = self.tile[: z.numel()].view(z.shape)
        torch.sub(z, reference[:, None], out=above).clamp_(min=LEAST_LOG)
        return torch.exp(above, out=z), above

    def see_exponentials(self, e: Tensor, above: Tensor | None, decay: Tensor, moved: Tensor, sums: Tensor) -> None:
        """above: z - r, which becomes e (z - r). decay: e^moved. moved: r_old - r; sums: S_old. [C] each."""
        if above is not None:
            self.first = decay * (self.first + moved * sums) + above.mul_(e).sum(1)
        if self.wanted.log_sum_sq_probs:
            self.second = decay.square() * self.second + torch.linalg.vector_norm(e, dim=1).square()

    def entropy(self, log_odds: Tensor, sums: Tensor) -> Tensor:
        return statistics.entropy(log_odds, sums, self.first)

    def log_sum_sq_probs(self, log_odds: Tensor, sums: Tensor) -> Tensor:
        return statistics.log_sum_sq_probs(log_odds, sums, self.second)

    def is_top1(self, z_y: Tensor) -> Tensor:
        return (z_y >= self.largest) & (z_y > self.before)
