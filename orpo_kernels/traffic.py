"""How many bytes a schedule moves between the device's memory and its caches, about.

Operands count once for each product that does not find them in the cache, results once. On a CPU a block of the
weight, read for the logits, is still in the cache for the product after them, and so is the tile; on a GPU neither
is, and a logit costs the bytes that the passes between the two products read and write:

    torch path    fp32 written, read twice, operand written and read
    kernels       operand written and read

There a block of the weight's gradient is one product where that takes all tokens. Where they are cut, each chunk is a
product that reads and writes an fp32 sum, which is read and rounded last.
"""

from __future__ import annotations

from math import ceil


def moved(
    tokens: int,
    hidden_size: int,
    vocab_size: int,
    item: int,
    *,
    chunks: tuple[int, int],
    backward_block: int,
    keep_rows: int,
    train_hidden: bool,
    train_weight: bool,
    cpu: bool,
    full_vocab_tiles: bool,
) -> tuple[int, int]:
    """Bytes of the forward and of the backward.

    item: bytes of the compute dtype. chunks: tokens in a tile of the forward and of the backward; the rest as in
    `plan.Schedule`.
    """
    hidden, weight = tokens * hidden_size * item, vocab_size * hidden_size * item
    kept, logits = keep_rows * vocab_size * item, tokens * vocab_size
    passes = 0 if cpu else 2 * item if full_vocab_tiles else 3 * max(4, item) + 2 * item
    products = 1 if cpu else 2
    of_hidden = 2 * hidden if train_hidden else 0  # u: written once, then read for the gradient that is written

    forward = hidden + of_hidden // 2 + kept
    forward += weight * ceil(tokens / max(chunks[0], 1)) * (products if train_hidden else 1)
    forward += logits * passes if train_hidden or keep_rows else 0
    if not train_weight:
        return forward, of_hidden
    recomputed = tokens - keep_rows
    blocks = ceil(vocab_size / backward_block)
    # Kept tiles are the kernels' operand as they are.
    made = (recomputed if full_vocab_tiles else tokens) * vocab_size
    backward = of_hidden + kept + made * passes + weight * ceil(recomputed / chunks[1]) + weight  # its gradient
    backward += blocks * (hidden + recomputed * hidden_size * item * (products - 1))
    sums = ceil(keep_rows / chunks[1]) + ceil(recomputed / chunks[1])
    if item < 4 and not cpu and (sums > 1 or not full_vocab_tiles):
        backward += 4 * vocab_size * hidden_size * 2 * sums
    return forward, backward
