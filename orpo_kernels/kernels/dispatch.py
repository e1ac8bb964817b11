"""Which implementation serves a call: the backend follows the device."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from orpo_kernels.kernels import torch_path
from orpo_kernels.kernels.interface import Backend, Head
from orpo_kernels.kernels.statistics import NO_STATISTICS, Statistics
from orpo_kernels.plan import Plan, Schedule, ScratchTooSmall


def choose(
    plan: Plan,
    head: Head,
    tokens: int,
    *,
    train_hidden: bool,
    train_weight: bool,
    in_place: bool = False,
    statistics: Statistics = NO_STATISTICS,
    ranks: int = 1,
) -> tuple[Backend, Schedule]:
    """The backend and the loop sizes. in_place, statistics, ranks: as for `Plan.schedule`."""
    vocab_size = head.weight.shape[0]

    def schedule(full_vocab_tiles: bool) -> Schedule:
        return plan.schedule(
            tokens,
            head.inner_size,
            vocab_size,
            head.compute_dtype,
            head.weight.device,
            train_hidden=train_hidden,
            train_weight=train_weight,
            softcap=head.softcap is not None,
            full_vocab_tiles=full_vocab_tiles,
            has_adapter=head.adapter is not None,
            cast=head.weight.dtype != head.compute_dtype,
            in_place=in_place,
            statistics=statistics,
            ranks=ranks,
        )

    # The kernels have no epilogue for a gradient of the entropy.
    chosen = fitting(schedule, kernels=why_not_triton(head) is None and not statistics.entropy_grad)
    if chosen.path == "torch":
        return torch_path, chosen
    from orpo_kernels.kernels import triton_path

    return triton_path, chosen


def fitting(schedule: Callable[[bool], Schedule], *, kernels: bool) -> Schedule:
    """The loop sizes of the kernels where they serve and fit the budget, else of the torch path.

    schedule: `Plan.schedule` of its `full_vocab_tiles`. The torch path cuts the vocabulary too, where a budget does not
    hold a row of it.
    """
    if kernels:
        try:
            return schedule(True)
        except ScratchTooSmall:
            pass
    return schedule(False)


def forward_head(backend: Backend, head: Head) -> Head:
    """The head as the backend's forward takes it: the kernels read the whole weight in the compute dtype.

    Not for the gradient of the weight, which would be rounded to that dtype: there, blocks are cast.
    """
    if backend is torch_path:
        return head
    return head._replace(weight=_cast_weight(head.weight, head.compute_dtype))


def why_not_triton(head: Head) -> str | None:
    """None where the Triton kernels serve this head, else the reason in words."""
    device = head.weight.device
    if device.type != "cuda":
        return f"the kernels run on GPUs, and the head is on {device.type}"
    if not has_triton():
        return "triton is not installed"
    from orpo_kernels.kernels import triton_path

    return triton_path.supports(head, device)


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


_casts = WeakTensorKeyDictionary()


def _cast_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in the compute dtype; made once while a frozen weight does not change."""
    if weight.dtype == dtype:
        return weight
    if weight.requires_grad:
        return weight.to(dtype)
    entry = _casts.get(weight)
    if entry is None or entry[0] != (weight._version, weight.data_ptr(), dtype):
        entry = ((weight._version, weight.data_ptr(), dtype), weight.detach().to(dtype))
        _casts[weight] = entry
    return entry[1]
