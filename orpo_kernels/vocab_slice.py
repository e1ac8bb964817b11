"""Which entries of the vocabulary a rank has, and how that is told: by numbers, or by a DTensor's placements."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from orpo_kernels.kernels.interface import Head


class VocabSlice(NamedTuple):
    """A rank's part of a head: its first `stop - start` rows are entries [start, stop) of a vocabulary of `vocab_size`.

    Rows beyond are padding: they are no entry, take no part in any sum and get gradients of zero. The ranks of `group`
    have the slices in their order.
    """

    group: Any
    start: int
    stop: int
    vocab_size: int

    @property
    def held(self) -> int:
        return self.stop - self.start

    @property
    def ranks(self) -> int:
        return dist.get_world_size(self.group)

    def local(self, targets: Tensor) -> Tensor:
        """Targets counted from this rank's first entry, -1 where another rank has the row."""
        return torch.where((targets >= self.start) & (targets < self.stop), targets - self.start, -1)

    def without_padding(self, head: Head) -> Head:
        bias, adapter = (None if x is None else x[: self.held] for x in (head.bias, head.adapter))
        return head._replace(weight=head.weight[: self.held], bias=bias, adapter=adapter)

    def check(self, ranges: Tensor) -> None:
        """Raises ValueError unless the ranks' ranges [P, 2], in order, make up the vocabulary.

        On a GPU the assertion is left to the device.
        """
        starts, stops = ranges.unbind(1)
        right = (starts[0] == 0) & (stops[-1] == self.vocab_size) & (starts[1:] == stops[:-1]).all()
        message = f"vocab_range of the ranks does not make up [0, {self.vocab_size})"
        if ranges.is_cuda:
            torch._assert_async(right, message)
        elif not bool(right):
            found = ", ".join(f"[{start:.0f}, {stop:.0f})" for start, stop in ranges.tolist())
            raise ValueError(f"{message}: they are {found}. Give each rank's own, one after the other by rank")


def slice_of_rows(
    rows: int, group: Any = None, vocab_size: int | None = None, vocab_range: tuple[int, int] | None = None
) -> VocabSlice:
    """The slice of a rank whose weight is a plain tensor of `rows` rows.

    vocab_range: as for `vocab_parallel_logps`; by default every rank has as many rows and the last of them are padding.

    Raises ValueError that names what is missing or does not fit, RuntimeError without a process group.
    """
    if not dist.is_initialized():
        raise RuntimeError(
            "a head in slices needs a process group: call torch.distributed.init_process_group first, or "
            "orpo_kernels.linear_logps with the whole weight"
        )
    group = dist.group.WORLD if group is None else group
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise ValueError(f"group={group!r} does not hold this process (rank {dist.get_rank()}): give its own group")
    if vocab_size is None:
        raise ValueError(
            "vocab_size is None: a plain weight does not say how many entries all ranks have together; give V, "
            "padding left out"
        )
    if vocab_range is None:
        if vocab_size > rows * ranks:
            raise ValueError(
                f"vocab_size={vocab_size} is more than {ranks} ranks of {rows} rows have: give vocab_range where "
                "they have different numbers of rows"
            )
        vocab_range = (min(rank * rows, vocab_size), min((rank + 1) * rows, vocab_size))
    start, stop = vocab_range
    if not 0 <= start <= stop <= vocab_size or stop - start > rows:
        raise ValueError(
            f"vocab_range={tuple(vocab_range)}: it must be (start, stop) within [0, {vocab_size}], for at most the "
            f"{rows} rows of weight"
        )
    return VocabSlice(group, start, stop, vocab_size)


def is_dtensor(tensor: Any) -> bool:
    return hasattr(tensor, "full_tensor")


def sharded_dimension(weight: Any) -> int | None:
    """The one dimension of its mesh over which a DTensor [V, D] is cut, by rows; None where it is cut otherwise."""
    cut = [i for i, placement in enumerate(weight.placements) if not placement.is_replicate()]
    if len(cut) != 1 or not weight.placements[cut[0]].is_shard(0):
        return None
    return cut[0] if type(weight.placements[cut[0]]).__name__ == "Shard" else None


def slice_of_dtensor(weight: Any, vocab_size: int | None = None) -> VocabSlice:
    """The slice that a DTensor [V, D] has on this rank. vocab_size: V without padding rows at its end, if there are.

    Raises ValueError where it is not cut by rows, over one dimension of its mesh.
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    dimension = sharded_dimension(weight)
    if dimension is None:
        raise ValueError(
            f"weight is a DTensor with placements {tuple(weight.placements)}: it must be Shard(0) over one dimension "
            "of its mesh and Replicate() over the others"
        )
    mesh, rows = weight.device_mesh, weight.shape[0]
    vocab_size = rows if vocab_size is None else vocab_size
    if not 0 < vocab_size <= rows:
        raise ValueError(f"vocab_size={vocab_size}: it must lie in [1, {rows}], the rows of weight")
    shape, offset = compute_local_shape_and_global_offset(weight.shape, mesh, weight.placements)
    start, stop = offset[0], offset[0] + shape[0]
    return VocabSlice(mesh.get_group(dimension), min(start, vocab_size), min(stop, vocab_size), vocab_size)
