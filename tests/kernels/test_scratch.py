"""The kernels' scratch stays within the plan: the backend's own functions on tensors without memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_memory import Allocations

from orpo_kernels import Plan, Schedule
from orpo_kernels.kernels.interface import Head, Tokens
from orpo_kernels.kernels.statistics import Statistics
from orpo_kernels.plan import MIB

triton_path = pytest.importorskip("orpo_kernels.kernels.triton_path", reason="Triton is not installed")
triton_launch = pytest.importorskip("orpo_kernels.kernels.triton_launch", reason="Triton is not installed")

SMALL_D = (1000, 576, 49152)  # 24 tiles of 128 x 256


def plan(tokens: int, d: int, v: int, dtype: torch.dtype = torch.bfloat16, scratch: int | None = None, **o) -> Schedule:
    return Plan(scratch).schedule(tokens, d, v, dtype, "meta", full_vocab_tiles=True, **o)


class Unlaunched:
    """A kernel without a card."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *args, **options: None


@pytest.fixture
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tile_kernel", "slow_kernel", "target_kernel", "sum_kernel", "maximum_kernel", "u_kernel"):
        monkeypatch.setattr(triton_launch, name, Unlaunched())
    monkeypatch.setattr(triton_path, "has_mixed_product", lambda device, dtype: True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("cast", [False, True], ids=["same dtype", "cast"])
@pytest.mark.parametrize("scratch", [None, 24 * MIB])
@pytest.mark.parametrize(
    "sizes", [SMALL_D, (1000, 576, 50257), (64, 4096, 32000), (1, 64, 20000), (2048, 2048, 32000)], ids=str
)
def test_forward_stays_within_the_budget(
    sizes: tuple[int, int, int], scratch: int | None, cast: bool, dtype: torch.dtype, no_card: None
) -> None:
    tokens, d, v = sizes
    schedule = plan(*sizes, dtype, scratch)

    def meta(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device="meta")

    hidden = meta(2 * tokens, d, dtype=torch.float32 if cast else dtype)
    rows, targets = (meta(tokens, dtype=torch.int64) for _ in range(2))
    head = Head(meta(v, d), None, 1.0, None, dtype)
    with Allocations(hidden, rows, targets, head.weight) as watched:
        out = triton_path.forward(Tokens(hidden, rows, targets), head, schedule, True)
    assert watched.scratch() <= schedule.scratch_bytes <= Plan(scratch).budget("meta")
    assert out.u is not None


@pytest.mark.parametrize("want_u", [False, True])
def test_statistics_stay_within_the_budget(want_u: bool, no_card: None) -> None:
    tokens, d, v = SMALL_D
    wanted = Statistics(True, True, True, True)
    schedule = plan(*SMALL_D, scratch=24 * MIB, train_hidden=want_u, statistics=wanted)
    hidden, weight = (torch.zeros(n, d, dtype=torch.bfloat16, device="meta") for n in (tokens, v))
    targets = torch.zeros(tokens, dtype=torch.int64, device="meta")
    with Allocations(hidden, weight, targets) as watched:
        out = triton_path.forward(
            Tokens(hidden, None, targets), Head(weight, None, 1.0, None, torch.bfloat16), schedule, want_u, wanted
        )
    assert watched.scratch() <= schedule.scratch_bytes
    without = plan(*SMALL_D, scratch=24 * MIB, train_hidden=want_u)
    assert schedule.forward_chunk < without.forward_chunk or schedule.scratch_bytes > without.scratch_bytes
    assert out.statistics.is_top1 is not None


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("sizes", [SMALL_D, (1000, 576, 50257), (2048, 2048, 32000)], ids=str)
def test_rows_that_are_read_in_place_take_no_scratch(sizes: tuple[int, int, int], keep: bool, no_card: None) -> None:
    tokens, d, v = sizes
    schedule = Plan(24 * MIB, keep_logit_grads=keep).schedule(
        *sizes, torch.bfloat16, "meta", full_vocab_tiles=True, train_weight=True, in_place=True
    )
    hidden, weight = (torch.zeros(n, d, dtype=torch.bfloat16, device="meta") for n in (tokens, v))
    targets = torch.zeros(tokens, dtype=torch.int64, device="meta")
    coefficient = torch.zeros(tokens, device="meta")
    head = Head(weight, None, 1.0, None, torch.bfloat16)
    tokens_of = Tokens(hidden, None, targets)
    with Allocations(hidden, weight, targets, coefficient) as watched:
        out = triton_path.forward(tokens_of, head, schedule, True)
    kept = sum(part.numel() * part.element_size() for part in out.kept.values) if out.kept is not None else 0
    assert watched.scratch() <= schedule.scratch_bytes + kept
    watching = [hidden, weight, targets, coefficient, out.lse, *(out.kept.values if out.kept is not None else ())]
    with Allocations(*watching) as watched:
        results = triton_path.weight_gradient(tokens_of, head, coefficient, out.lse, out.kept, schedule, True, False)
    assert watched.scratch() <= schedule.scratch_bytes
    assert results[0] is not None
