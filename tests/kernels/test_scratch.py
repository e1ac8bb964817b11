"""The kernels' scratch: how many slices the product for u is cut into, and that all of it stays within the plan."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_memory import Allocations

from orpo_kernels import Plan, Schedule
from orpo_kernels.kernels.interface import Head, Tokens
from orpo_kernels.plan import MIB

triton_path = pytest.importorskip("orpo_kernels.kernels.triton_path", reason="Triton is not installed")

SMALL_D = (1000, 576, 49152)  # 24 tiles of 128 x 256


def plan(tokens: int, d: int, v: int, dtype: torch.dtype = torch.bfloat16, scratch: int | None = None, **o) -> Schedule:
    return Plan(scratch).schedule(tokens, d, v, dtype, "meta", full_rows=True, **o)


@pytest.mark.parametrize(
    ("sizes", "slices"),
    [
        (SMALL_D, 5),  # of 132 multiprocessors
        ((64, 4096, 128256), 8),
        ((1, 64, 128256), 128),  # no less than 1000 entries each
        ((1, 64, 1999), 1),
        ((4096, 4096, 128256), 1),  # fills the card
    ],
    ids=str,
)
def test_slices_fill_the_card(sizes: tuple[int, int, int], slices: int) -> None:
    assert plan(*sizes).u_slices == slices


def test_slices_follow_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orpo_kernels.plan._multiprocessors", lambda device: 48)
    assert plan(*SMALL_D).u_slices == 2


def test_nothing_is_sliced_but_the_kernels_product_for_u() -> None:
    assert plan(*SMALL_D, train_hidden=False, train_weight=True).u_slices == 1
    assert Plan().schedule(*SMALL_D, torch.bfloat16, "meta").u_slices == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("sizes", [SMALL_D, (300, 2048, 32000), (64, 4096, 128256)], ids=str)
def test_slices_take_a_fifth_of_the_chunk_at_most(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    tokens, d, _ = sizes
    for scratch in (4 * MIB, 8 * MIB, 32 * MIB, 128 * MIB, 512 * MIB):
        alone = plan(*sizes, dtype, scratch, train_hidden=False)
        schedule = plan(*sizes, dtype, scratch)
        assert schedule.scratch_bytes <= scratch
        # Chunks are even: as many tokens as a fifth less would give.
        least = -(-tokens // -(-tokens // max(1, 4 * alone.forward_chunk // 5 - 1)))
        assert least <= schedule.forward_chunk <= alone.forward_chunk
        sums = schedule.u_slices * schedule.forward_chunk * d * 4
        assert schedule.u_slices == 1 or sums < schedule.scratch_bytes


class Unlaunched:
    """A kernel without a card."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *args, **options: None


@pytest.fixture
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tile_kernel", "slow_kernel", "target_kernel", "sum_kernel", "maximum_kernel", "u_kernel"):
        monkeypatch.setattr(triton_path, name, Unlaunched())
    for name in ("_has_mixed_product", "_has_mixed_batch"):
        monkeypatch.setattr(triton_path, name, lambda device, dtype: True)


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
    # The watch sees the slices: they are larger than what one product would need.
    if schedule.u_slices > 1:
        assert watched.largest() >= min(schedule.u_slices * schedule.forward_chunk * d, schedule.forward_chunk * v)
