"""What tiles of `torch_path` take; `orpo_kernels.plan` fits them into a budget."""

from __future__ import annotations

import torch

from orpo_kernels.fit import Bytes
from orpo_kernels.kernels.statistics import NO_STATISTICS, Statistics

# A row's own numbers (bases, sums, masks, indices) of four bytes, rounded up.
_ROW_BYTES = 128

# Rows of a tile that a CPU takes the entropy of while they are in its own cache.
ROWS_AT_ONCE = 256


def tile_bytes(
    hidden_size: int,
    dtype: torch.dtype,
    *,
    softcap: bool,
    has_adapter: bool,
    cpu: bool,
    statistics: Statistics = NO_STATISTICS,
) -> tuple[Bytes, Bytes]:
    """Of a tile in the forward and in the backward. hidden_size: the product's inner dimension, adapters included."""
    item = dtype.itemsize
    wide = 8 if dtype == torch.float64 else 4
    mixed = item < wide
    # A logit: its value, its slope, and on a GPU its copy as a product's operand.
    operand = item if mixed and not cpu else 0
    logit = wide * (2 if softcap else 1) + operand
    # A token's rows of D: hidden as an operand, the sum of products, and what is on its way to either.
    token = hidden_size * (2 * wide + item if mixed else wide) + _ROW_BYTES * wide // 4
    # A vocabulary entry's: the weight as an operand, and in the backward its gradient and what is added to that;
    # the same of the bias.
    forward = 4 * wide + (hidden_size * (wide + item) if mixed else 0)
    backward = 4 * wide + (hidden_size * (2 * wide + operand) if mixed else 0)
    if has_adapter:
        token += hidden_size * wide
        forward += hidden_size * wide
        backward += hidden_size * wide * (1 if mixed else 2)
    forward_token, forward_logit, backward_logit = token, logit, logit
    if statistics.asked:
        forward_token += _ROW_BYTES * wide // 4
        # The exponentials beside the logits; which of these are before the target, and all columns' numbers for that.
        second, before = wide * statistics.second_tile, statistics.is_top1
        if cpu:
            forward += ROWS_AT_ONCE * (before + second * (not statistics.entropy_grad)) + 8 * before
            forward_logit += second * statistics.entropy_grad
        else:
            forward_logit += second + before
    if statistics.entropy_grad:
        forward_token += hidden_size * wide * mixed
        backward_logit += wide
    return Bytes(forward_token, forward_logit, forward), Bytes(token, backward_logit, backward)


def kept_bytes(vocab_size: int, dtype: torch.dtype, block: int) -> int:
    """What the kept logit gradients of a token take, with a base for each block."""
    wide = 8 if dtype == torch.float64 else 4
    return vocab_size * dtype.itemsize + -(-vocab_size // block) * wide
