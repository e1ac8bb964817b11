"""A head whose weight is a DTensor: served on its own rows where it is cut by rows, gathered where it is cut otherwise.

Cut by rows (`Shard(0)` over one dimension of its mesh) are the heads of transformers' `tp_plan`, of `ColwiseParallel`,
and of either within FSDP2, which has gathered its own dimension of the mesh by the time the head is called. Every rank
of that dimension has the same hidden states and computes what belongs to its rows (`orpo_kernels.vocab_parallel`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from orpo_kernels.vocab_slice import VocabSlice, is_dtensor, sharded_dimension, slice_of_dtensor

from .lora import LowRank
from .patch import is_tensor_parallel


class HeadTensors(NamedTuple):
    """What this rank multiplies. part: which rows weight and bias are, None where they are all."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    part: VocabSlice | None


def head_tensors(head: nn.Linear, input: Any) -> HeadTensors:
    """Hidden states, weight and bias as plain tensors; raises RuntimeError where the head could not multiply them."""
    weight: Any = head.weight
    bias: Any = head.bias
    if is_dtensor(weight) and not (is_dtensor(input) or is_tensor_parallel(head)):
        raise RuntimeError(
            f"the head's weight is a DTensor {weight.placements} and its input a plain tensor, so nn.Linear "
            "could not multiply them either: call the FSDP model rather than the one inside it, or shard the "
            "head with a parallel style that turns its input into a DTensor (ColwiseParallel)"
        )
    # PEFT makes the copy of a tied head from the embeddings' description: its two sizes are exchanged.
    sizes = {(head.out_features, head.in_features), (head.in_features, head.out_features)}
    hidden = gathered(input)
    if weight.shape not in sizes or weight.shape[-1] != hidden.shape[-1]:
        raise RuntimeError(
            f"the head's weight has shape {tuple(weight.shape)} and the head is {head.in_features} -> "
            f"{head.out_features}: the weight was exchanged by hand, or is sharded by something that does not "
            "gather it for the head's forward"
        )
    if not is_dtensor(weight) or sharded_dimension(weight) is None:
        return HeadTensors(hidden, gathered(weight), gathered(bias), None)
    part = slice_of_dtensor(weight)
    return HeadTensors(hidden, weight.to_local(), None if bias is None else own_rows(bias, part), part)


def own_adapter(adapter: LowRank, part: VocabSlice | None) -> LowRank:
    """The adapter of a head's rows, from layers of the whole."""
    if part is None:
        return adapter._replace(weight=gathered(adapter.weight), bias=gathered(adapter.bias))
    bias = None if adapter.bias is None else own_rows(adapter.bias, part)
    return adapter._replace(weight=own_rows(adapter.weight, part), bias=bias)


def own_rows(tensor: Any, part: VocabSlice) -> Tensor:
    """This rank's rows of a parameter [V, ...]: of a DTensor cut like the weight, or of one that every rank has whole.

    The gradient of the latter is that of all rows, on every rank. Raises RuntimeError where it has not as many.
    """
    if tensor.shape[0] != part.vocab_size:
        raise RuntimeError(
            f"the head is cut over {part.ranks} ranks, and an adapter on it has {tensor.shape[0]} rows where the head "
            f"has {part.vocab_size} (PEFT makes it so on a model of tp_plan, whose own forward then fails too): leave "
            "the head out of target_modules, or put the adapter on before the head is cut (parallelize_module)"
        )
    if is_dtensor(tensor) and sharded_dimension(tensor) is not None and slice_of_dtensor(tensor) == part:
        return tensor.to_local()
    return _OwnRows.apply(gathered(tensor), part)


class _OwnRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, part: VocabSlice) -> Tensor:
        ctx.part, ctx.shape = part, whole.shape
        return whole[part.start : part.stop].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        whole = grad.new_zeros(ctx.shape)
        whole[ctx.part.start : ctx.part.stop] = grad
        dist.all_reduce(whole, group=ctx.part.group)
        return whole, None


def gathered(tensor: Any) -> Any:
    """The whole of a DTensor, whose gradient is the same on every rank; anything else as it is."""
    if not is_dtensor(tensor):
        return tensor
    from torch.distributed.tensor import Replicate

    return tensor.full_tensor(grad_placements=[Replicate()] * tensor.device_mesh.ndim)


def as_output(placeholders: Tensor, layer: nn.Module, input: Any) -> tuple[Tensor, int]:
    """What stands in for the output of the head, or of a LoRA layer's B; and how many sets of placeholders it has if it
    is gathered.

    A DTensor where the layer was given one, since what follows such a head expects one; in the placements that the
    layer's own output would have, so that what gathers it, or takes the local part, finds whole sets of placeholders.
    """
    if not is_dtensor(input):
        return placeholders, 1
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh = input.device_mesh
    placements: list[Any] = [Replicate()] * mesh.ndim
    weight: Any = layer.weight
    dimension = sharded_dimension(weight) if is_dtensor(weight) and weight.device_mesh == mesh else None
    if dimension is not None:
        placements[dimension] = Shard(placeholders.dim() - 1)
    copies = 1 if dimension is None else mesh.size(dimension)
    return DTensor.from_local(placeholders, mesh, placements, run_check=False), copies
