"""Plans and schedules: units, bytes, limits, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import (
    FLOATS,
    assert_gradients_match,
    assert_logps_match,
    evaluate,
    least_scratch,
    make_case,
    normal_like,
)

from orpo_kernels import Plan, Schedule, linear_logps
from orpo_kernels.plan import MIB, ScratchTooSmall

SIZES = (1000, 768, 32768)


@pytest.mark.parametrize(
    ("train_hidden", "train_weight", "keep", "units"),
    [
        (False, False, False, (1.0, 0.0)),
        (True, False, False, (2.0, 0.0)),
        (False, True, False, (1.0, 2.0)),
        (True, True, False, (2.0, 2.0)),
        (True, True, True, (2.0, 1.0)),
        (True, False, True, (2.0, 0.0)),
    ],
)
def test_units(train_hidden: bool, train_weight: bool, keep: bool, units: tuple[float, float]) -> None:
    """A unit is one pass of the big product; the table of the module's docstring."""
    schedule = Plan(keep_logit_grads=keep).schedule(
        *SIZES, torch.float32, "cpu", train_hidden=train_hidden, train_weight=train_weight
    )
    assert (schedule.units_forward, schedule.units_backward) == units


def test_keeping_some_costs_its_share() -> None:
    n, _, v = SIZES
    # fp32: V values and one reference for each of the 32 groups of columns.
    row = 4 * v + 4 * 32
    schedule = Plan(keep_logit_grads=250 * row + row - 1).schedule(*SIZES, torch.float32, "cpu", train_weight=True)
    assert schedule.forward_block == v // 32
    assert schedule.keep_rows == 250
    assert schedule.units_backward == 1.75
    none = Plan().schedule(*SIZES, torch.float32, "cpu", train_weight=True)
    assert schedule.saved_bytes - none.saved_bytes == 250 * row
    everything = Plan(keep_logit_grads=True).schedule(*SIZES, torch.float32, "cpu", train_weight=True)
    assert everything.keep_rows == n


def test_nothing_is_kept_of_a_frozen_head() -> None:
    schedule = Plan(keep_logit_grads=True).schedule(*SIZES, torch.float32, "cpu")
    assert schedule.keep_rows == 0


def test_saved_bytes() -> None:
    n, d, _ = SIZES

    def saved(dtype: torch.dtype, **train: bool) -> int:
        return Plan().schedule(*SIZES, dtype, "cpu", **train).saved_bytes

    assert saved(torch.float32, train_hidden=False) == 0
    # u, 1 - p, the log-prob and a row index; a head that trains adds the logsumexp and the target.
    assert saved(torch.float32) == n * (4 * d + 4 + 4 + 8)
    # On a CPU u is fp32 for 16-bit inputs too.
    assert saved(torch.bfloat16) == n * (4 * d + 4 + 4 + 8)
    on_gpu = Plan().schedule(*SIZES, torch.bfloat16, "cuda", full_vocab_tiles=True)
    assert on_gpu.saved_bytes == n * (2 * d + 4 + 4 + 8)
    assert saved(torch.float64, train_weight=True) == n * (8 * d + 8 + 8 + 8 + 8 + 8)
    assert saved(torch.float32, train_hidden=False, train_weight=True) == n * (4 + 4 + 8 + 4 + 8)


def test_str_tells_what_it_costs() -> None:
    schedule = Schedule(
        512, 1024, 1000, 2048, 0, 32 * MIB, 3 * MIB // 2, 2.0, 2.0, moved_forward=1500 * MIB, moved_backward=7 * MIB
    )
    assert str(schedule) == (
        "torch path: forward 512 tokens x 1024 entries, backward 1000 x 2048; 2.00 + 2.00 units; "
        "moves 1,500 + 7 MiB; scratch 32.0 MiB, saved 1.5 MiB"
    )
    kept = dataclasses.replace(schedule, keep_rows=250, units_backward=1.75)
    assert "; 2.00 + 1.75 units; " in str(kept)
    assert str(kept).endswith("; scratch 32.0 MiB, saved 1.5 MiB, logit gradients of 250 tokens kept")


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (Plan(), ("32 MiB on a CPU, 384 MiB elsewhere", "2 units, logits recomputed")),
        (Plan(scratch_bytes=MIB // 2), ("scratch 0.5 MiB",)),
        (Plan(keep_logit_grads=True), ("else 1 unit, logit gradients kept.",)),
        (Plan(keep_logit_grads=3 * MIB), ("1 to 2 units", "as far as 3.0 MiB go")),
    ],
    ids=["default", "budget", "kept", "some kept"],
)
def test_str_of_a_plan_explains_it(plan: Plan, words: tuple[str, ...]) -> None:
    for word in words:
        assert word in str(plan)


def test_bytes_moved() -> None:
    """By hand, for products that each read their operands from memory once."""
    n, d, v = 2000, 64, 5000

    def moved(
        plan: Plan | None = None, device: str = "cuda", full_vocab_tiles: bool = True, **trains: bool
    ) -> tuple[int, int]:
        schedule = (plan or Plan()).schedule(
            n, d, v, torch.bfloat16, device, full_vocab_tiles=full_vocab_tiles, **trains
        )
        assert schedule.path == ("triton" if full_vocab_tiles else "torch")
        assert (schedule.forward_chunk, schedule.forward_block) == (n, v) or device == "cpu"
        return schedule.moved_forward, schedule.moved_backward

    hidden, weight, tile = 2 * n * d, 2 * v * d, 2 * n * v
    assert moved(train_hidden=False) == (hidden + weight, 0)
    # Frozen: u is written, and the weight and the tile cross twice; the backward reads u and writes its multiple.
    assert moved() == (2 * hidden + 2 * weight + 2 * tile, 2 * hidden)
    forward, backward = moved(train_weight=True)
    assert forward == moved()[0]
    # Recomputed: logits from hidden and weight, the tile out and in, hidden again, and the gradient.
    assert backward == 2 * hidden + (hidden + weight) + 2 * tile + hidden + weight
    # Kept tiles are read where they lie.
    kept = moved(Plan(keep_logit_grads=True), train_weight=True)
    assert kept == (forward + tile, backward - hidden - weight - tile)
    # Plain torch passes fp32 logits around; a CPU keeps them in its cache, and the weight's block.
    assert moved(full_vocab_tiles=False)[0] == 2 * hidden + 2 * weight + (3 * 4 + 2 * 2) * n * v
    chunks = -(-n // Plan().schedule(n, d, v, torch.bfloat16, "cpu").forward_chunk)
    assert chunks > 1
    assert moved(device="cpu", full_vocab_tiles=False)[0] == 2 * hidden + chunks * weight


def test_default_budgets_and_an_explicit_one() -> None:
    assert Plan().budget("cpu") == 32 * MIB
    assert Plan().budget("cuda") == Plan().budget(torch.device("cuda", 1)) == 384 * MIB
    assert Plan(scratch_bytes=5).budget("cpu") == Plan(scratch_bytes=5).budget("cuda") == 5


def test_a_plan_is_a_value() -> None:
    plan = Plan(scratch_bytes=1 << 20, keep_logit_grads=True)
    assert plan == Plan(1 << 20, True)
    assert hash(plan) == hash(Plan(1 << 20, True))
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.scratch_bytes = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"scratch_bytes": 0}, ValueError, r"Plan\.scratch_bytes=0 must be a positive number of bytes"),
        ({"scratch_bytes": -5}, ValueError, r"Plan\.scratch_bytes=-5 must be a positive number of bytes"),
        ({"scratch_bytes": 1e9}, TypeError, r"Plan\.scratch_bytes=1000000000\.0 must be an int, in bytes, or None"),
        ({"scratch_bytes": True}, TypeError, r"Plan\.scratch_bytes=True must be an int, in bytes, or None"),
        ({"scratch_bytes": "32MiB"}, TypeError, r"Plan\.scratch_bytes='32MiB' must be an int, in bytes, or None"),
        (
            {"keep_logit_grads": -1},
            ValueError,
            r"Plan\.keep_logit_grads=-1 must be True, False or a number of bytes >= 0",
        ),
        ({"keep_logit_grads": 1}, ValueError, r"Plan\.keep_logit_grads=1 is one byte.*give True"),
        ({"keep_logit_grads": 0.5}, TypeError, r"Plan\.keep_logit_grads=0\.5 must be True, False or an int, in bytes"),
        ({"keep_logit_grads": None}, TypeError, r"Plan\.keep_logit_grads=None must be True, False or an int, in bytes"),
    ],
    ids=str,
)
def test_bad_plans(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    """bad input: named with its value and what it must be, when the plan is made."""
    with pytest.raises(error, match=message):
        Plan(**arguments)


@pytest.mark.parametrize("where", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"train_weight": True},
        {"train_weight": True, "softcap": True},
        {"full_vocab_tiles": True},
        {"has_adapter": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(1, 64, 100), (5000, 256, 5000), (3, 4096, 128256)], ids=str)
def test_too_small_names_what_is_enough(
    size: tuple[int, int, int], options: dict[str, bool], dtype: torch.dtype, where: str
) -> None:
    """The number of bytes in the error works, and a little less does not."""
    least = least_scratch(*size, dtype, where, **options)
    schedule = Plan(scratch_bytes=least).schedule(*size, dtype, where, **options)
    assert schedule.forward_chunk == 1
    assert schedule.scratch_bytes <= least
    with pytest.raises(
        ScratchTooSmall, match=rf"Plan\.scratch_bytes={least - 2} cannot hold one tile .* at least {least} "
    ):
        Plan(scratch_bytes=least - 2).schedule(*size, dtype, where, **options)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_least_budget_computes_the_same(dtype: torch.dtype, device: torch.device) -> None:
    """Tiles of one token by one entry, or a few: slow, and right."""
    case = make_case((3, 4), 16, 30, dtype, device, bias=True, softcap=6.0)
    upstream = normal_like(case.targets)
    n = int((case.targets >= 0).sum())
    plan = Plan(least_scratch(n, 16, 30, dtype, device, train_weight=True, softcap=True))
    found = evaluate(linear_logps, case, upstream, plan=plan)
    assert_logps_match(case, found.logps)
    assert_gradients_match(case, found, upstream)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "size", [(4096, 4096, 128256), (8192, 2048, 32000), (16384, 8192, 256000), (1, 64, 1000)], ids=str
)
def test_full_rows_span_the_vocabulary(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    """What the Triton kernels need, within the default budget: no block may be cut."""
    schedule = Plan().schedule(*size, dtype, "cuda", train_weight=True, full_vocab_tiles=True)
    assert schedule.forward_block == size[2]
    assert schedule.forward_chunk >= min(size[0], 128)
    assert schedule.scratch_bytes <= 384 * MIB


@settings(deadline=None)
@given(
    tokens=st.integers(0, 200_000),
    hidden_size=st.integers(1, 8192),
    vocab_size=st.integers(1, 300_000),
    dtype=st.sampled_from(FLOATS),
    where=st.sampled_from(["cpu", "cuda"]),
    scratch=st.none() | st.integers(1 << 16, 1 << 32),
    train_hidden=st.booleans(),
    train_weight=st.booleans(),
    softcap=st.booleans(),
    full_vocab_tiles=st.booleans(),
)
def test_schedules_hold_what_they_promise(
    tokens: int, hidden_size: int, vocab_size: int, dtype: torch.dtype, where: str, scratch: int | None, **options: bool
) -> None:
    """In the budget; tiles not beyond the shapes; as few chunks as the chunk size allows, and even ones."""
    plan = Plan(scratch)
    try:
        schedule = plan.schedule(tokens, hidden_size, vocab_size, dtype, where, **options)
    except ScratchTooSmall:
        return  # The error is the subject of tests above.
    assert 0 < schedule.scratch_bytes <= plan.budget(where)
    assert 1 <= schedule.forward_block <= vocab_size
    assert not options["full_vocab_tiles"] or schedule.forward_block == vocab_size
    assert 1 <= schedule.forward_chunk <= max(tokens, 1)
    if not options["train_weight"]:
        assert schedule.backward_chunk == schedule.backward_block == 0
        return
    assert 1 <= schedule.backward_block <= vocab_size
    assert 1 <= schedule.backward_chunk <= max(tokens, 1)
    for chunk in (schedule.forward_chunk, schedule.backward_chunk):
        if tokens and not (options["full_vocab_tiles"] and chunk % 128 == 0):
            assert chunk == math.ceil(tokens / math.ceil(tokens / chunk))


HEADS_OF_MODELS = {
    "Llama-3-8B": (4096, 128256),
    "Qwen3-8B": (4096, 151936),
    "Gemma-2-9B": (3584, 256000),
    "Gemma-2-2B": (2304, 256000),
    "Phi-4": (5120, 100352),
    "Llama-3.2-1B": (2048, 128256),
    "SmolLM2-135M": (576, 49152),
    "Mistral-7B": (4096, 32768),
    "Qwen2.5-3B": (2048, 151936),
}


@pytest.mark.parametrize("tokens", [2048, 4096, 8192, 16384])
@pytest.mark.parametrize("model", HEADS_OF_MODELS)
def test_the_kernels_schedule_of_popular_heads(model: str, tokens: int) -> None:
    """Heights that a library multiplies at its full rate, and a weight's gradient that is added up in no buffer."""
    d, v = HEADS_OF_MODELS[model]
    schedule = Plan().schedule(tokens, d, v, torch.bfloat16, "cuda", train_weight=True, full_vocab_tiles=True)
    assert schedule.forward_chunk % 256 == 0
    assert schedule.forward_chunk >= min(tokens, 512)
    assert schedule.backward_chunk == tokens
    assert schedule.backward_block >= 4096
    assert schedule.scratch_bytes <= 384 * MIB
    # The tile kernel's 128 x 256 tiles on 132 multiprocessors, and what of the last chunk is empty.
    tiles = [
        math.ceil(min(schedule.forward_chunk, tokens - start) / 128) * math.ceil(v / 256)
        for start in range(0, tokens, schedule.forward_chunk)
    ]
    whole = tokens * v / (128 * 256 * 132)
    assert sum(math.ceil(count / 132) for count in tiles) <= 1.1 * whole


@pytest.mark.parametrize("tokens", [2048, 4096, 8192, 16384])
@pytest.mark.parametrize("model", HEADS_OF_MODELS)
def test_the_backward_moves_little_more_than_it_must(model: str, tokens: int) -> None:
    """Where the rows of hidden are read in place: operands, the tile and the gradient once each, and 30 %."""
    d, v = HEADS_OF_MODELS[model]
    schedule = Plan().schedule(
        tokens, d, v, torch.bfloat16, "cuda", train_weight=True, full_vocab_tiles=True, in_place=True
    )
    assert schedule.backward_chunk == tokens
    assert schedule.scratch_bytes <= 384 * MIB
    hidden, weight, tile = 2 * tokens * d, 2 * v * d, 2 * tokens * v
    # u is read for the gradient of hidden; hidden for the logits and for the gradient of the weight.
    assert schedule.moved_backward <= 1.3 * (2 * hidden + 2 * hidden + 2 * weight + 2 * tile)


def test_many_tokens_are_cut_where_they_must_be() -> None:
    schedule = Plan().schedule(100_000, 4096, 128256, torch.bfloat16, "cuda", train_weight=True, full_vocab_tiles=True)
    assert 4096 <= schedule.backward_chunk < 100_000
    assert schedule.backward_chunk % 256 == 0
    assert schedule.scratch_bytes <= 384 * MIB


def test_a_weight_of_another_dtype_is_copied() -> None:
    def schedule(**options: bool) -> Schedule:
        return Plan().schedule(1000, 64, 5000, torch.bfloat16, "cuda", train_weight=True, **options)

    assert schedule(full_vocab_tiles=True).weight_copy_bytes == 0
    assert schedule(full_vocab_tiles=True, cast=True).weight_copy_bytes == 2 * 5000 * 64
    assert schedule(cast=True).weight_copy_bytes == 0  # The torch path casts blocks, within its scratch.
    assert "a copy of the weight 0.6 MiB" in str(schedule(full_vocab_tiles=True, cast=True))


@settings(deadline=None, max_examples=50)
@given(
    tokens=st.integers(1, 5000),
    hidden_size=st.integers(1, 4096),
    vocab_size=st.integers(1, 60_000),
    dtype=st.sampled_from(FLOATS),
    scratch=st.integers(1 << 21, 1 << 28),
)
def test_a_larger_budget_is_never_worse(
    tokens: int, hidden_size: int, vocab_size: int, dtype: torch.dtype, scratch: int
) -> None:
    """Twice the bytes: at least as many logits a tile, in the backward."""
    areas = []
    for budget in (scratch, 2 * scratch):
        try:
            schedule = Plan(budget).schedule(tokens, hidden_size, vocab_size, dtype, "cpu", train_weight=True)
        except ScratchTooSmall:
            areas.append(0)
        else:
            areas.append(min(schedule.backward_chunk, tokens) * schedule.backward_block)
    assert areas[1] >= areas[0]
