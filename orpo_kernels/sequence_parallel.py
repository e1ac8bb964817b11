"""The objective of sequences that are cut over ranks (context or sequence parallelism).

Each of P ranks holds some positions of every sequence, and the log-probs of the targets there. The objective sees a
sequence only through its summed log-probs and its count of tokens, and both are sums over positions: each rank sums
its own, and one all-reduce of 6B numbers (B pairs) makes them those of the whole sequences. What follows, the loss
and every metric, is then the same on every rank, and the same as in one process.

    rank r:   s_r = sum of its log-probs of a sequence
    all:      S   = sum over r of s_r           all-reduce
              loss = L(S)                       on every rank alike

**Gradients are averaged.** The ranks' losses are P copies of one, and the all-reduce sends back the exact gradient of
their sum, `sum over ranks of dL/dS = P dL/dS`, as torch.distributed's own differentiable collectives do. So a rank's
parameters get P times what its positions contribute, and the mean over the group, which DDP and FSDP take by
themselves, is the gradient of one process. Who sums the gradients over the group, as DeepSpeed does over that of its
Ulysses below ZeRO-3, divides the loss by P.

Which positions a rank holds does not matter, so a balanced cut, as ring attention makes, serves as well as a plain
one. But a position's target lies at the next one, perhaps on another rank: shift first, then cut (`shift_and_cut`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from orpo_kernels.linear_logps import shift_labels

if TYPE_CHECKING:
    Group: TypeAlias = dist.ProcessGroup | DeviceMesh
else:
    Group = Any  # a torch that is built without torch.distributed has no ProcessGroup


def sum_over_ranks(group: Group, *tensors: Tensor) -> list[Tensor]:
    """Each of `tensors`, summed over the ranks of `group`: new tensors, the same bits on every rank.

    group: a process group, or a DeviceMesh of one dimension.
    tensors: of any shapes, the same on every rank, integers or the one float dtype of the first. All travel in one
        call, in that dtype: in fp32 integers are exact up to 2^24, a sequence of 16 million tokens.

    Differentiable: the backward sums the gradients over the ranks in turn, so every rank has to run it.
    """
    dtype = tensors[0].dtype
    total = _AllReduceSum.apply(torch.cat([tensor.reshape(-1).to(dtype) for tensor in tensors]), process_group(group))
    parts = total.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]


def cut_sequence(tensor: Tensor, group: Group, dim: int = -1) -> Tensor:
    """This rank's part of `tensor` along `dim`: P parts in order of rank, as even as can be; a view.

    Of inputs, position ids, masks, and of targets that are shifted already.
    """
    within = process_group(group)
    return tensor.tensor_split(within.size(), dim)[within.rank()]


def shift_and_cut(labels: Tensor, group: Group, ignore_index: int = -100) -> Tensor:
    """Targets of this rank's positions from the labels of the whole sequences.

    labels: [..., T] integers, the same on every rank. Returns about [..., T / P]: the part that `cut_sequence` gives,
    of what `shift_labels` makes, so that the last position of one rank predicts the first token of the next.
    """
    return cut_sequence(shift_labels(labels, ignore_index), group)


def process_group(group: Any) -> dist.ProcessGroup:
    """The process group that `group` is or holds; TypeError or ValueError where it is none."""
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"group is a mesh of {group.ndim} dimensions {group.mesh_dim_names}: give the one along which "
                "sequences are cut, as in mesh['cp']"
            )
        return group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group is {group!r}: give a torch.distributed process group that this rank belongs to, a DeviceMesh of "
            "one dimension, or None where sequences are whole"
        )
    return group


class _AllReduceSum(torch.autograd.Function):
    """values -> their sum over the ranks of `group`; the backward is the same of the gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _AllReduceSum.apply(grad.contiguous(), ctx.group), None
