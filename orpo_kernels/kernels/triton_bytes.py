"""What tiles of `triton_path` take, and which heads it serves: facts that need no Triton.

`orpo_kernels.plan` fits the tiles into a budget.
"""

from __future__ import annotations

import torch

from orpo_kernels.fit import Bytes

# What the kernels' products take.
DTYPES = (torch.bfloat16, torch.float32)
# A row's own numbers (bases, sums, masks, indices), rounded up.
_ROW_BYTES = 128
# Tiles have from 64 to 256 columns: rows are as long as whole tiles, and each tile leaves a sum a row, and a number for
# each statistic.
_TILE_COLUMNS = (64, 256)


def tile_bytes(
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype,
    *,
    train_hidden: bool,
    cast: bool,
    cpu: bool,
    gathers: tuple[bool, bool],
    statistics: int = 0,
) -> tuple[Bytes, Bytes, Bytes]:
    """Of a tile in the forward, in a backward of all tokens at once, and in one of chunks of them.

    cast: the weight is of another dtype than `dtype`, the products'.
    gathers: whether forward and backward copy the rows of hidden.
    statistics: how many the forward is asked for.
    """
    item, wide = dtype.itemsize, 4
    mixed = item < wide
    narrowest, widest = _TILE_COLUMNS
    # A token's row of hidden as an operand, its tiles' sums, and in the forward its product E W before it becomes u.
    forward_row, backward_row = (_ROW_BYTES + (hidden_size * item if copies else 0) for copies in gathers)
    ends = (widest - 1) * item + wide * (1 + statistics) * -(-vocab_size // narrowest)
    product = hidden_size * wide if mixed and train_hidden else 0
    forward = Bytes(forward_row + ends + product, item if train_hidden else 0, 0)
    # An entry's gradient in fp32 before it is rounded, where a product does not round it; the weight's row where it is
    # cast. The same of the bias.
    entry = 4 * wide + (hidden_size * item if cast else 0)
    rounded = not mixed if cast else mixed and cpu
    tile = (backward_row + (widest - 1) * item, item)
    return (
        forward,
        Bytes(*tile, entry + hidden_size * wide * rounded),
        Bytes(*tile, entry + hidden_size * wide * (mixed != cast)),
    )


def kept_bytes(vocab_size: int, dtype: torch.dtype) -> int:
    """What the kept logit gradients of a token take, in rows of whole tiles, with its one base."""
    widest = _TILE_COLUMNS[1]
    return -(-vocab_size // widest) * widest * dtype.itemsize + 4
