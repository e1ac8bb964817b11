"""What one call asks for, and the tiles that follow from it: arithmetic that `orpo_kernels.plan` puts together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from orpo_kernels import traffic
from orpo_kernels.fit import Bytes, largest, whole_rows, whole_tokens
from orpo_kernels.kernels import torch_bytes, triton_bytes
from orpo_kernels.kernels.statistics import Statistics

# Measured on the CPU (2 cores, fp32, D=768): products of 600 to 1200 rows by 512 to 1024 columns run fastest,
# and larger tiles leave the cache.
_CPU_BLOCK = 1024
_CPU_CHUNK = 1536
_GPU_BLOCK = 16384


class TileCosts(NamedTuple):
    """Bytes of a tile in the forward, in a backward of all tokens at once, and in one of chunks of them."""

    forward: Bytes
    whole: Bytes
    backward: Bytes


@dataclass(frozen=True)
class CallBytes:
    """The arguments of `Plan.schedule`, the vocabulary at least 1."""

    tokens: int
    hidden_size: int
    vocab_size: int
    dtype: torch.dtype
    cpu: bool
    train_hidden: bool
    train_weight: bool
    softcap: bool
    full_vocab_tiles: bool
    has_adapter: bool
    cast: bool
    in_place: bool
    statistics: Statistics
    ranks: int

    @property
    def entropy_grad(self) -> bool:
        return self.statistics.entropy_grad and (self.train_hidden or self.train_weight)

    @property
    def wide(self) -> int:
        """Bytes of a sum."""
        return 8 if self.dtype == torch.float64 else 4

    @property
    def numbers(self) -> int:
        """Bytes of what every token has a number of, whatever the tiles."""
        # Log-odds, logsumexp and, for the kernels, what belongs to its target; or coefficients on their way from logps
        # to logits.
        each = 6 if self.full_vocab_tiles else 4
        # Statistics are put in place; the kernels' moments stay until all are finished, by a dozen numbers each.
        moments = 12 if self.full_vocab_tiles and self.statistics.asked else 0
        each += moments + self.statistics.asked + 3 * self.entropy_grad
        # In fp64: every rank's logsumexp, and what it and the target's logit become.
        of_ranks = 8 * (self.ranks + 10) if self.ranks > 1 else 0
        return (each * self.wide + of_ranks) * self.tokens

    @property
    def block(self) -> int:
        """Entries in a block of the torch path, at most."""
        return min(_CPU_BLOCK if self.cpu else _GPU_BLOCK, self.vocab_size)

    def tile_costs(self, *, keeps: bool) -> TileCosts:
        """keeps: whether logit gradients are kept."""
        if not self.full_vocab_tiles:
            forward, backward = torch_bytes.tile_bytes(
                self.hidden_size,
                self.dtype,
                softcap=self.softcap,
                has_adapter=self.has_adapter,
                cpu=self.cpu,
                statistics=self.statistics,
            )
            return TileCosts(forward, backward, backward)
        # Kept tiles are multiplied with rows that are made for it.
        gathers = (not self.in_place, not self.in_place or keeps)
        return TileCosts(
            *triton_bytes.tile_bytes(
                self.hidden_size,
                self.vocab_size,
                self.dtype,
                train_hidden=self.train_hidden,
                cast=self.cast,
                cpu=self.cpu,
                gathers=gathers,
                statistics=self.statistics.asked,
            )
        )

    def forward_tile(self, budget: int, cost: Bytes) -> tuple[int, int] | None:
        """(tokens, entries) of the largest tile within the budget; None where there is none."""
        tokens = max(self.tokens, 1)
        if self.full_vocab_tiles:
            return whole_rows(budget, cost, tokens, self.vocab_size)
        return largest(budget, cost, tokens, self.block, _CPU_CHUNK if self.cpu else None)

    def backward_tile(self, budget: int, costs: TileCosts) -> tuple[int, int] | None:
        """The same of the gradient of the weight; (0, 0) where that does not train."""
        if not self.train_weight:
            return 0, 0
        tokens = max(self.tokens, 1)
        if not self.full_vocab_tiles:
            return largest(budget, costs.backward, tokens, self.block)
        return whole_tokens(budget, costs.whole, costs.backward, tokens, self.vocab_size, self._moved_backward)

    def least(self, costs: TileCosts) -> int:
        """Bytes of the smallest tiles."""
        backward = costs.backward.of(1, 1) if self.train_weight else 0
        return max(costs.forward.of(1, self.vocab_size if self.full_vocab_tiles else 1), backward)

    def kept_bytes(self, block: int) -> int:
        """What the kept logit gradients of a token take. block: entries in a tile of the forward."""
        if self.full_vocab_tiles:
            return triton_bytes.kept_bytes(self.vocab_size, self.dtype)
        return torch_bytes.kept_bytes(self.vocab_size, self.dtype, block)

    @property
    def saved_bytes(self) -> int:
        """What autograd holds of a token, kept logit gradients aside."""
        entropy, wide = self.entropy_grad, self.wide
        of_u = wide if self.cpu else self.dtype.itemsize
        # 1 - p, log-prob, row, and the entropy.
        row = (2 + entropy) * wide + 8 if self.train_hidden or self.train_weight else 0
        vectors = (1 + entropy) * self.hidden_size * of_u if self.train_hidden else 0
        slopes = 2 * wide * entropy if self.train_weight else 0
        return row + vectors + slopes + (wide + 8 if self.train_weight else 0)  # logsumexp, target

    def moved(self, chunks: tuple[int, int], backward_block: int, keep_rows: int) -> tuple[int, int]:
        """Bytes moved in forward and backward; see `traffic`."""
        return traffic.moved(
            self.tokens,
            self.hidden_size,
            self.vocab_size,
            self.dtype.itemsize,
            chunks=chunks,
            backward_block=backward_block,
            keep_rows=keep_rows,
            train_hidden=self.train_hidden,
            train_weight=self.train_weight,
            cpu=self.cpu,
            full_vocab_tiles=self.full_vocab_tiles,
        )

    def _moved_backward(self, chunk: int, block: int) -> int:
        return self.moved((chunk, chunk), block, 0)[1]
