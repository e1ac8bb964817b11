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

from dataclasses import dataclass
from functools import partial

import torch

from orpo_kernels import traffic
from orpo_kernels.fit import largest, whole_rows, whole_tokens
from orpo_kernels.kernels import torch_bytes, triton_bytes
from orpo_kernels.kernels.statistics import NO_STATISTICS, Statistics

MIB = 1 << 20

# Measured on the CPU (2 cores, fp32, D=768): products of 600 to 1200 rows by 512 to 1024 columns run fastest,
# and larger tiles leave the cache.
_CPU_BLOCK = 1024
_CPU_CHUNK = 1536
_CPU_SCRATCH = 32 * MIB
_GPU_BLOCK = 16384
# Chunks of about 1024 tokens at V=151936: on an H100 the library's products are at their best there, and 1.5 GiB, in
# chunks four times as high, made them no faster.
_GPU_SCRATCH = 384 * MIB
# The BLAS library packs operands into buffers of its own: 3.3 MiB measured (MKL, 2 cores). The budget covers them,
# up to a third of it.
_CPU_LIBRARY = 4 * MIB


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
    path: "torch", or "triton" where tiles span the vocabulary.
    moved_forward, moved_backward: bytes between the device's memory and its caches, about; see `traffic`.
    weight_copy_bytes: the whole weight in the compute dtype, where the kernels need it and it is of another (autocast):
        made by every forward, or once while the weight is frozen. It is no part of the scratch.
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
    path: str = "torch"
    moved_forward: int = 0
    moved_backward: int = 0
    weight_copy_bytes: int = 0

    def __str__(self) -> str:
        return (
            f"{self.path} path: forward {self.forward_chunk} tokens x {self.forward_block} entries, "
            f"backward {self.backward_chunk} x {self.backward_block}; "
            f"{self.units_forward:.2f} + {self.units_backward:.2f} units; "
            f"moves {self.moved_forward / MIB:,.0f} + {self.moved_backward / MIB:,.0f} MiB; "
            f"scratch {self.scratch_bytes / MIB:.1f} MiB, saved {self.saved_bytes / MIB:.1f} MiB"
            + (f", logit gradients of {self.keep_rows} tokens kept" if self.keep_rows else "")
            + (f", a copy of the weight {self.weight_copy_bytes / MIB:.1f} MiB" if self.weight_copy_bytes else "")
        )


@dataclass(frozen=True)
class Plan:
    """What a call may use.

    scratch_bytes: the budget for transient buffers, in bytes; None picks 32 MiB on a CPU, 384 MiB elsewhere.
    keep_logit_grads: keep the forward's logit gradients for the backward of a head that trains, instead of
        recomputing the logits: False (least memory), True (least time), or a number of bytes, 2 or more, to spend on
        it (1 would equal True, which is not one byte but all).
        The numbers are the same up to the rounding of one kept value.

    Raises TypeError for a number that is not an int; ValueError for a budget that is not positive, and, once the
    shapes are known, for one too small to hold a single tile.
    """

    scratch_bytes: int | None = None
    keep_logit_grads: bool | int = False

    def __post_init__(self) -> None:
        if not isinstance(self.scratch_bytes, int | None) or isinstance(self.scratch_bytes, bool):
            raise TypeError(f"Plan.scratch_bytes={self.scratch_bytes!r} must be an int, in bytes, or None")
        if self.keep_logit_grads is not True and self.keep_logit_grads == 1:
            raise ValueError("Plan.keep_logit_grads=1 is one byte, which holds nothing: give True to keep them all")
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
        full_vocab_tiles: bool = False,
        has_adapter: bool = False,
        cast: bool = False,
        in_place: bool = False,
        statistics: Statistics = NO_STATISTICS,
    ) -> Schedule:
        """The loop sizes for N=`tokens`, D=`hidden_size`, V=`vocab_size` in compute dtype `dtype`.

        has_adapter: blocks of the weight are copied to join an adapter's columns to them (D counts those too).
        full_vocab_tiles: tiles span the whole vocabulary (what the Triton kernels write).
        cast: the weight is of another dtype than the compute dtype.
        in_place: the kernels read hidden where it is: every row is scored, and in the compute dtype.
        statistics: those asked for of every token (`linear_token_stats`). With a gradient of the entropy, nothing is
            kept of the logit gradients.
        """
        device = torch.device(device)
        cpu = device.type == "cpu"
        library = min(_CPU_LIBRARY, self.budget(device) // 3) if cpu else 0
        budget = self.budget(device) - library
        item, wide, v = dtype.itemsize, 8 if dtype == torch.float64 else 4, max(vocab_size, 1)
        # Numbers of every token: log-odds, logsumexp and, for the kernels, what belongs to its target; or coefficients
        # on their way from logps to logits.
        # Statistics are put in place; the kernels' moments stay until all are finished, by a dozen numbers each.
        entropy_grad = statistics.entropy_grad and (train_hidden or train_weight)
        of_statistics = (12 if full_vocab_tiles and statistics.asked else 0) + statistics.asked + 3 * entropy_grad
        numbers = ((6 if full_vocab_tiles else 4) + of_statistics) * wide * tokens
        keep = False if entropy_grad else self.keep_logit_grads
        for_tiles, sizes = budget - numbers, (tokens, hidden_size, v, item)
        trains = {
            "train_hidden": train_hidden,
            "train_weight": train_weight,
            "cpu": cpu,
            "full_vocab_tiles": full_vocab_tiles,
        }

        if full_vocab_tiles:
            # Kept tiles are multiplied with rows that are made for it.
            gathers = (not in_place, not in_place or bool(keep))
            cost_forward, cost_whole, cost_backward = triton_bytes.tile_bytes(
                hidden_size,
                v,
                dtype,
                train_hidden=train_hidden,
                cast=cast,
                cpu=cpu,
                gathers=gathers,
                statistics=statistics.asked,
            )
            forward = whole_rows(for_tiles, cost_forward, max(tokens, 1), v)
        else:
            cost_forward, cost_backward = torch_bytes.tile_bytes(
                hidden_size, dtype, softcap=softcap, has_adapter=has_adapter, cpu=cpu, statistics=statistics
            )
            cost_whole, block = cost_backward, min(_CPU_BLOCK if cpu else _GPU_BLOCK, v)
            forward = largest(for_tiles, cost_forward, max(tokens, 1), block, _CPU_CHUNK if cpu else None)

        keep_rows = row_kept = 0
        if train_weight and keep and forward is not None:
            if full_vocab_tiles:
                row_kept = triton_bytes.kept_bytes(v, dtype)
            else:
                row_kept = torch_bytes.kept_bytes(v, dtype, forward[1])
            keep_rows = tokens if keep is True else min(tokens, int(keep) // row_kept)

        backward: tuple[int, int] | None = (0, 0)
        if train_weight and full_vocab_tiles:
            moved = partial(_moved_backward, sizes, trains)
            if 0 < keep_rows < tokens:  # two products, whatever the chunk
                cost_whole = cost_backward
            backward = whole_tokens(for_tiles, cost_whole, cost_backward, max(tokens, 1), v, moved)
        elif train_weight:
            backward = largest(for_tiles, cost_backward, max(tokens, 1), block)
        if forward is None or backward is None:
            least = max(cost_forward.of(1, v if full_vocab_tiles else 1), cost_backward.of(1, 1) if train_weight else 0)
            raise self._too_small(numbers + least, device, f"N={tokens}, D={hidden_size}, V={vocab_size}, {dtype}")
        for_backward = (cost_whole if backward[0] >= tokens else cost_backward).of(*backward)
        kept_share = keep_rows / tokens if tokens else 0.0
        row_saved = _saved_bytes(hidden_size, wide, wide if cpu else item, train_hidden, train_weight, entropy_grad)
        return Schedule(
            *forward,
            *backward,
            keep_rows,
            library + numbers + max(cost_forward.of(*forward), for_backward),
            tokens * row_saved + keep_rows * row_kept,
            (3.0 if entropy_grad else 2.0) if train_hidden else 1.0,
            (2.0 - kept_share) if train_weight else 0.0,
            "triton" if full_vocab_tiles else "torch",
            *traffic.moved(
                *sizes, chunks=(forward[0], backward[0]), backward_block=backward[1], keep_rows=keep_rows, **trains
            ),
            v * hidden_size * item if full_vocab_tiles and cast else 0,
        )

    def _too_small(self, least: int, device: torch.device, sizes: str) -> ScratchTooSmall:
        """least: bytes that tiles of one token need, without a library's buffers."""
        if device.type == "cpu":
            least += min(_CPU_LIBRARY, -(-least // 2))
        return ScratchTooSmall(
            f"Plan.scratch_bytes={self.budget(device)} cannot hold one tile for {sizes}: give at least {least} bytes"
        )


def _moved_backward(sizes: tuple[int, int, int, int], trains: dict[str, bool], chunk: int, block: int) -> int:
    return traffic.moved(*sizes, chunks=(chunk, chunk), backward_block=block, keep_rows=0, **trains)[1]


def _saved_bytes(
    hidden_size: int, wide: int, of_u: int, train_hidden: bool, train_weight: bool, entropy_grad: bool
) -> int:
    """What autograd holds of a token, kept logit gradients aside. of_u: bytes of a number of u."""
    # 1 - p, log-prob, row, and the entropy.
    row = (2 + entropy_grad) * wide + 8 if train_hidden or train_weight else 0
    vectors = (1 + entropy_grad) * hidden_size * of_u if train_hidden else 0
    slopes = 2 * wide * entropy_grad if train_weight else 0
    return row + vectors + slopes + (wide + 8 if train_weight else 0)  # logsumexp, target
