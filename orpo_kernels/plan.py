"""How a call is cut into pieces: how much memory it may use, and what it keeps.

The loss is computed in tiles of `chunk` tokens by `block` vocabulary entries. A *plan* is what the user
chooses, a byte budget and what to keep; a *schedule* is what follows from it for given shapes. Nothing here
touches a tensor.

Memory has two names. *Scratch* is what a call allocates and frees again: it stays within
`Plan.scratch_bytes` whatever the number of tokens or the size of the vocabulary. *Saved* is what autograd
holds between forward and backward: `u` [N, D] in the compute dtype (on a CPU as wide as sums are), up to five
numbers a token, and whatever `keep_logit_grads` keeps.

A unit is 2*N*D*V floating-point operations, one pass of the big product:

    nothing trains          1 forward
    hidden only             2 forward                 (u comes with the chunk at hand; the backward scales it)
    hidden and head         2 forward, 2 backward     (the backward recomputes the logits)
    the same, all kept      2 forward, 1 backward
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from orpo_kernels import traffic

MIB = 1 << 20

# Measured on the CPU (2 cores, fp32, D=768): products of 600 to 1200 rows by 512 to 1024 columns run fastest,
# and larger tiles leave the cache.
_CPU_BLOCK = 1024
_CPU_CHUNK = 1536
_CPU_SCRATCH = 32 * MIB
_GPU_BLOCK = 16384
_GPU_SCRATCH = 384 * MIB
# The BLAS library packs operands into buffers of its own: 3.3 MiB measured (MKL, 2 cores). The budget covers them,
# up to a third of it.
_CPU_LIBRARY = 4 * MIB
# The bytes of a row's own numbers (references, sums, masks, indices), rounded up.
_ROW_BYTES = 128
# Fewer rows than this make a product that waits for the weight to arrive from memory.
_MIN_CHUNK = 64
# A GPU's library makes [C, D] products in tiles of about this size, one a multiprocessor at a time.
_PRODUCT_TILE = (128, 256)
_MULTIPROCESSORS = 132  # Of a GPU that is not there to be asked.
# A slice of the product's inner dimension is longer than this: about what a card multiplies in the time that the
# slice's sums take to be written and read, 8 bytes each, at 250 operations a byte.
_LEAST_SLICE = 1000


class ScratchTooSmall(ValueError):
    """The budget does not hold a single tile."""


@dataclass(frozen=True)
class Schedule:
    """The loop sizes of one call and what they cost.

    forward_chunk, forward_block: tokens and vocabulary entries in a tile of the forward.
    backward_chunk, backward_block: the same for the gradient of the weight.
    keep_rows: tokens whose logit gradients are kept from the forward.
    scratch_bytes: upper bound of the transient buffers.
    saved_bytes: bytes held between forward and backward, the inputs themselves aside. Where every token is scored
        it is less, by up to 24 bytes a token; rows that repeat add up to 40.
    units_forward, units_backward: floating-point operations in units of 2*N*D*V.
    u_slices: parts of the vocabulary that the kernels' product for u is cut into, so that it fills the card.
    path: "torch", or "triton" where tiles span the vocabulary.
    moved_forward, moved_backward: bytes between the device's memory and its caches, about; see `traffic`.
    """

    forward_chunk: int
    forward_block: int
    backward_chunk: int
    backward_block: int
    keep_rows: int
    scratch_bytes: int
    saved_bytes: int
    units_forward: float
    units_backward: float
    u_slices: int = 1
    path: str = "torch"
    moved_forward: int = 0
    moved_backward: int = 0

    def __str__(self) -> str:
        return (
            f"{self.path} path: forward {self.forward_chunk} tokens x {self.forward_block} entries, "
            f"backward {self.backward_chunk} x {self.backward_block}; "
            f"{self.units_forward:.2f} + {self.units_backward:.2f} units; "
            f"moves {self.moved_forward / MIB:,.0f} + {self.moved_backward / MIB:,.0f} MiB; "
            f"scratch {self.scratch_bytes / MIB:.1f} MiB, saved {self.saved_bytes / MIB:.1f} MiB"
            + (f", logit gradients of {self.keep_rows} tokens kept" if self.keep_rows else "")
        )


@dataclass(frozen=True)
class Plan:
    """What a call may use.

    scratch_bytes: the budget for transient buffers, in bytes; None picks 32 MiB on a CPU, 384 MiB elsewhere.
    keep_logit_grads: keep the forward's logit gradients for the backward of a head that trains, instead of
        recomputing the logits: False (least memory), True (least time), or a number of bytes to spend on it.
        The numbers are the same up to the rounding of one kept value.

    Raises TypeError for a number that is not an int; ValueError for a budget that is not positive, and, once the
    shapes are known, for one too small to hold a single tile.
    """

    scratch_bytes: int | None = None
    keep_logit_grads: bool | int = False

    def __post_init__(self) -> None:
        if not isinstance(self.scratch_bytes, int | None) or isinstance(self.scratch_bytes, bool):
            raise TypeError(f"Plan.scratch_bytes={self.scratch_bytes!r} must be an int, in bytes, or None")
        if not isinstance(self.keep_logit_grads, int):
            raise TypeError(f"Plan.keep_logit_grads={self.keep_logit_grads!r} must be True, False or an int, in bytes")
        if self.scratch_bytes is not None and self.scratch_bytes <= 0:
            raise ValueError(f"Plan.scratch_bytes={self.scratch_bytes} must be a positive number of bytes")
        if self.keep_logit_grads < 0:
            raise ValueError(
                f"Plan.keep_logit_grads={self.keep_logit_grads} must be True, False or a number of bytes >= 0"
            )

    def __str__(self) -> str:
        if self.scratch_bytes is None:
            scratch = f"{_CPU_SCRATCH / MIB:.0f} MiB on a CPU, {_GPU_SCRATCH / MIB:.0f} MiB elsewhere"
        else:
            scratch = f"{self.scratch_bytes / MIB:.1f} MiB"
        if self.keep_logit_grads is True:
            backward = "1 unit, logit gradients kept"
        elif self.keep_logit_grads:
            backward = f"1 to 2 units, logit gradients kept as far as {self.keep_logit_grads / MIB:.1f} MiB go"
        else:
            backward = "2 units, logits recomputed"
        return (
            f"scratch {scratch}; forward 2 units; backward none with a frozen head, else {backward}. "
            "Plan.schedule(N, D, V, dtype, device) tells more of a call."
        )

    def budget(self, device: torch.device | str) -> int:
        """The bytes of scratch a call on `device` may use."""
        default = _CPU_SCRATCH if torch.device(device).type == "cpu" else _GPU_SCRATCH
        return default if self.scratch_bytes is None else self.scratch_bytes

    def schedule(
        self,
        tokens: int,
        hidden_size: int,
        vocab_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        train_hidden: bool = True,
        train_weight: bool = False,
        softcap: bool = False,
        full_rows: bool = False,
        joined: bool = False,
    ) -> Schedule:
        """The loop sizes for N=`tokens`, D=`hidden_size`, V=`vocab_size` in compute dtype `dtype`.

        joined: blocks of the weight are copied to join an adapter's columns to them (D counts those too).
        full_rows: tiles span the whole vocabulary (what the Triton kernels write).
        """
        device = torch.device(device)
        cpu = device.type == "cpu"
        library = min(_CPU_LIBRARY, self.budget(device) // 3) if cpu else 0
        budget = self.budget(device) - library
        item = dtype.itemsize
        wide = 8 if dtype == torch.float64 else 4
        mixed = item < wide
        # A logit: its value, its slope, and on a GPU its copy as a product's operand; Triton's tiles are that alone.
        operand = item if mixed and not cpu else 0
        tile = item if full_rows else wide * (2 if softcap else 1) + operand
        # A token's rows of D: hidden as an operand, the sum of products, and what is on its way to either.
        row = hidden_size * (2 * wide + item if mixed else wide) + _ROW_BYTES * wide // 4
        # A vocabulary entry's: the weight as an operand, and in the backward its gradient and what is added to that;
        # the same of the bias.
        column_forward = 4 * wide + (hidden_size * (wide + item) if mixed and not full_rows else 0)
        column_backward = 4 * wide + (hidden_size * (2 * wide + operand) if mixed else 0)
        if full_rows:
            # Tiles of up to 256 columns reach past the vocabulary; each, of 64 or more, leaves a sum.
            row += 255 * item + 4 * -(-vocab_size // 64)
        if joined:
            row += hidden_size * wide
            column_forward += hidden_size * wide
            column_backward += hidden_size * wide * (1 if mixed else 2)
        # Numbers of every token: gap and logsumexp, or coefficients on their way from logps to logits.
        numbers = 4 * wide * tokens

        v = max(vocab_size, 1)
        block_goal = _CPU_BLOCK if cpu else _GPU_BLOCK
        chunk_goal = min(max(tokens, 1), _CPU_CHUNK) if cpu else max(tokens, 1)
        for_tiles = budget - numbers
        block, least_block = (v, v) if full_rows else (min(block_goal, v), 1)
        forward = _fit(for_tiles, row, tile, column_forward, chunk_goal, block, least_block)
        backward = _fit(for_tiles, row, tile, column_backward, max(tokens, 1), min(block_goal, v))
        u_slices, row_forward = 1, row
        if forward is not None and full_rows and train_hidden:
            # Slices have sums [C, D] each, as has what is left of the vocabulary. All of them together get the room
            # that the chunk leaves, or a fifth of it.
            whole = row + v * tile
            room = max(whole // 4, (for_tiles - v * column_forward) // forward[0] - whole)
            wanted = _slices(forward[0], hidden_size, v, _multiprocessors(device))
            slices = min(wanted, room // (hidden_size * wide) - 1)
            sliced_row = row + (slices + 1) * hidden_size * wide
            sliced = _fit(for_tiles, sliced_row, tile, column_forward, chunk_goal, block, least_block)
            if slices > 1 and sliced is not None:
                u_slices, row_forward, forward = slices, sliced_row, sliced
        if forward is None or (train_weight and backward is None):
            least = (
                numbers
                + row
                + max(least_block * (tile + column_forward), tile + column_backward if train_weight else 0)
            )
            if cpu:
                least += min(_CPU_LIBRARY, -(-least // 2))
            raise ScratchTooSmall(
                f"Plan.scratch_bytes={self.budget(device)} cannot hold one tile for N={tokens}, D={hidden_size}, "
                f"V={vocab_size}, {dtype}: give at least {least} bytes"
            )
        assert forward is not None
        if not train_weight or backward is None:
            backward = (0, 0)

        keep_rows = 0
        if train_weight and self.keep_logit_grads:
            row_kept = v * item + (-(-v // forward[1])) * wide
            keep_rows = tokens if self.keep_logit_grads is True else min(tokens, int(self.keep_logit_grads) // row_kept)
        kept_share = keep_rows / tokens if tokens else 0.0
        saved = 0
        if train_hidden or train_weight:
            saved += tokens * (2 * wide + 8)  # 1 - p, log-prob, row
        if train_hidden:
            saved += tokens * hidden_size * (wide if cpu else item)  # u
        if train_weight:
            saved += tokens * (wide + 8)  # logsumexp, target
            saved += keep_rows * (v * item + (-(-v // forward[1])) * wide)
        used = numbers + max(
            _bytes(forward, row_forward, tile, column_forward),
            _bytes(backward, row, tile, column_backward) if train_weight else 0,
        )
        return Schedule(
            *forward,
            *backward,
            keep_rows,
            used + library,
            saved,
            2.0 if train_hidden else 1.0,
            (2.0 - kept_share) if train_weight else 0.0,
            u_slices,
            "triton" if full_rows else "torch",
            *traffic.moved(
                tokens,
                hidden_size,
                v,
                item,
                chunks=(forward[0], backward[0]),
                backward_block=backward[1],
                keep_rows=keep_rows,
                train_hidden=train_hidden,
                train_weight=train_weight,
                cpu=cpu,
                full_rows=full_rows,
            ),
        )


def _slices(chunk: int, hidden_size: int, vocab_size: int, multiprocessors: int) -> int:
    """Parts of the vocabulary that E [C, V] times W [V, D] takes to give every multiprocessor a tile."""
    tiles = -(-chunk // _PRODUCT_TILE[0]) * -(-hidden_size // _PRODUCT_TILE[1])
    return max(1, min(multiprocessors // tiles, vocab_size // _LEAST_SLICE))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(device).multi_processor_count
    return _MULTIPROCESSORS


def _bytes(shape: tuple[int, int], row: int, tile: int, column: int) -> int:
    chunk, block = shape
    return chunk * row + chunk * block * tile + block * column


def _fit(
    budget: int, row: int, tile: int, column: int, chunk: int, block: int, least_block: int = 1
) -> tuple[int, int] | None:
    """The largest tile in the budget: the chunk shrinks to `_MIN_CHUNK` before the block does."""
    goal = chunk
    while True:
        chunk = (budget - block * column) // (row + block * tile)
        if chunk >= min(goal, _MIN_CHUNK) or block <= least_block:
            break
        block = -(-block // 2)
    if chunk < 1:
        return None
    chunk = min(chunk, goal)
    # Even chunks: 1153 tokens in chunks of 1152 would make a second one of a single row.
    return -(-goal // -(-goal // chunk)), block
