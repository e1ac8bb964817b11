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

import torch

from orpo_kernels.call_bytes import CallBytes
from orpo_kernels.kernels.statistics import NO_STATISTICS, Statistics

MIB = 1 << 20

_CPU_SCRATCH = 32 * MIB
# Chunks of about 1024 tokens at V=151936: on an H100 the library's products are at their best there, and 1.5 GiB, in
# chunks four times as high, made them no faster.
_GPU_SCRATCH = 384 * MIB
# The BLAS library packs operands into buffers of its own: 3.3 MiB measured (MKL, 2 cores). The budget covers them,
# up to a third of it.
CPU_LIBRARY_BYTES = 4 * MIB


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
        ranks: int = 1,
    ) -> Schedule:
        """The loop sizes for N=`tokens`, D=`hidden_size`, V=`vocab_size` in compute dtype `dtype`.

        has_adapter: blocks of the weight are copied to join an adapter's columns to them (D counts those too).
        full_vocab_tiles: tiles span the whole vocabulary (what the Triton kernels write).
        cast: the weight is of another dtype than the compute dtype.
        in_place: the kernels read hidden where it is: every row is scored, and in the compute dtype.
        statistics: those asked for of every token (`linear_token_stats`). With a gradient of the entropy, nothing is
            kept of the logit gradients.
        ranks: over how many the vocabulary is spread, of which this one has V entries.
        """
        call = CallBytes(
            tokens,
            hidden_size,
            max(vocab_size, 1),
            dtype,
            torch.device(device).type == "cpu",
            train_hidden=train_hidden,
            train_weight=train_weight,
            softcap=softcap,
            full_vocab_tiles=full_vocab_tiles,
            has_adapter=has_adapter,
            cast=cast,
            in_place=in_place,
            statistics=statistics,
            ranks=ranks,
        )
        keep = False if call.entropy_grad else self.keep_logit_grads
        library = min(CPU_LIBRARY_BYTES, self.budget(device) // 3) if call.cpu else 0
        for_tiles = self.budget(device) - library - call.numbers
        costs = call.tile_costs(keeps=bool(keep))

        forward = call.forward_tile(for_tiles, costs.forward)
        keep_rows = row_kept = 0
        if train_weight and keep and forward is not None:
            row_kept = call.kept_bytes(forward[1])
            keep_rows = tokens if keep is True else min(tokens, int(keep) // row_kept)
        if 0 < keep_rows < tokens:  # two products, whatever the chunk
            costs = costs._replace(whole=costs.backward)
        backward = call.backward_tile(for_tiles, costs)
        if forward is None or backward is None:
            least = call.numbers + call.least(costs)
            raise self._too_small(least, torch.device(device), f"N={tokens}, D={hidden_size}, V={vocab_size}, {dtype}")
        for_backward = (costs.whole if backward[0] >= tokens else costs.backward).of(*backward)
        kept_share = keep_rows / tokens if tokens else 0.0
        return Schedule(
            *forward,
            *backward,
            keep_rows,
            library + call.numbers + max(costs.forward.of(*forward), for_backward),
            tokens * call.saved_bytes + keep_rows * row_kept,
            (3.0 if call.entropy_grad else 2.0) if train_hidden else 1.0,
            (2.0 - kept_share) if train_weight else 0.0,
            "triton" if full_vocab_tiles else "torch",
            *call.moved((forward[0], backward[0]), backward[1], keep_rows),
            call.vocab_size * hidden_size * dtype.itemsize if full_vocab_tiles and cast else 0,
        )

    def _too_small(self, least: int, device: torch.device, sizes: str) -> ScratchTooSmall:
        """least: bytes that tiles of one token need, without a library's buffers."""
        if device.type == "cpu":
            least += min(CPU_LIBRARY_BYTES, -(-least // 2))
        return ScratchTooSmall(
            f"Plan.scratch_bytes={self.budget(device)} cannot hold one tile for {sizes}: give at least {least} bytes"
        )
