"""Padded batches of any trainer laid out: what shares a prompt, where it goes, and that nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import EXACT, backward, check, make
from test_attention import everything_in_float64 as everything_in_float64  # a fixture
from torch import Tensor
from wrapping import VOCAB, tiny_llama

from orpo_kernels.integration.lm_head import attach
from orpo_kernels.integration.packing.batch_layout import BatchLayout
from orpo_kernels.integration.packing.gate import LayoutGate
from orpo_kernels.integration.packing.sequences import groups_of, lay_out_sequences, sequences_of


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(3, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def group(prompt: int, *answers: int, seed: int = 0) -> list[Tensor]:
    start = tokens(prompt, seed)
    return [torch.tensor(start + tokens(length, seed + 10 * at + 1)) for at, length in enumerate(answers)]


# Two groups of four answers to a prompt, one of them empty and two the same, and one answer by itself.
SEQUENCES = [*group(7, 5, 0, 9, 3), *group(4, 6, 6, 1, 2, seed=500), *group(3, 4, seed=900)]
SEQUENCES[5] = SEQUENCES[4].clone()
GROUPS = [(0, 1, 2, 3), (4, 5, 6, 7), (8,)]


def padded(sequences: list[Tensor], left: int = 0) -> dict[str, Tensor]:
    """Filled up behind, and with `left` places before every other row."""
    length = max(len(ids) for ids in sequences) + left
    ids = torch.full((len(sequences), length), 2)
    mask = torch.zeros_like(ids)
    for at, row in enumerate(sequences):
        start = left * (at % 2)
        ids[at, start : start + len(row)] = row
        mask[at, start : start + len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}


# Full and sliding windows, soft-caps, sinks, latent attention, experts, learned positions.
FAMILIES = ("Llama", "Gemma 2", "gpt-oss", "Mixtral", "Qwen2", "Cohere 2", "Phi-3", "OLMo 3", "GPT-NeoX", "OPT")
FAMILIES += ("DeepSeek-V3", "Starcoder 2")


@pytest.mark.shows(
    "Layouts", "{name}, groups of answers", "log-probabilities and every gradient against each sequence alone, fp64"
)
@pytest.mark.parametrize("name", FAMILIES)
def test_groups_are_as_sequences_alone(name: str, everything_in_float64: None):
    model = make(EXACT[name])
    found = []
    for ids in SEQUENCES:
        logps = model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
        found.append(logps[:-1].gather(1, ids[1:, None])[:, 0])
    expected = torch.cat(found)
    gradients = backward(model, expected)
    for layout in ("packed", "shared"):
        batch = lay_out_sequences(layout, SEQUENCES, GROUPS)
        check(model, batch, expected.detach(), gradients, 1e-12)


def test_groups_are_those_of_one_prompt():
    sequences = [*group(3, 2, 4), *group(3, 2, seed=7), *group(0, 3)]
    mixed = [sequences[at] for at in (0, 2, 1, 3)]
    assert groups_of(mixed, [3, 3, 3, 0]) == [(0, 2), (1,), (3,)]
    # A longer prompt is another one, whatever it begins with; rows without a prompt stand by themselves.
    assert groups_of([sequences[0], sequences[0]], [3, 2]) == [(0,), (1,)]
    assert groups_of([sequences[0], sequences[0]], [0, 0]) == [(0,), (1,)]


def test_the_tokens_of_a_group():
    batch = lay_out_sequences("shared", SEQUENCES[:4], [(0, 1, 2, 3)])
    assert batch["input_ids"].shape == (1, 7 + 5 + 9 + 3)  # the prompt once
    (row,) = batch["layout"].segments.by_row
    assert [(s.length, s.prefix) for s in row] == [(12, 0), (9, 7), (3, 7)]
    few = batch["layout"].few()
    assert [len(few.sequences), few.groups] == [3, ((0, 1, 2),)]


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(
        st.tuples(st.integers(0, 4), st.lists(st.integers(0, 5), min_size=1, max_size=4)), min_size=1, max_size=4
    ),
    left=st.integers(0, 3),
    extra=st.integers(0, 9) | st.none(),
    same_start=st.booleans(),
)
def test_any_batch(lengths: list[tuple[int, list[int]]], left: int, extra: int | None, same_start: bool):
    """Every token is where `places` says, and positions count from each sequence's start."""
    made = [group(prompt, *answers, seed=100 * at) for at, (prompt, answers) in enumerate(lengths)]
    sequences = [ids if len(ids) else torch.tensor([5]) for one in made for ids in one]
    if same_start:  # those without a prompt may share what they begin with, or nothing
        sequences = [torch.cat([torch.tensor([3 + at % 2]), ids]) for at, ids in enumerate(sequences)]
    numbers = iter(range(len(sequences)))
    groups = [tuple(next(numbers) for _ in one) for one in made]
    row_length = None if extra is None else sum(map(len, sequences)) + extra
    inputs = padded(sequences, left)
    again = sequences_of(**inputs)
    assert again is not None
    for one, other in zip(again, sequences, strict=True):
        assert torch.equal(one, other)
    for name in ("padded", "packed", "shared"):
        batch = lay_out_sequences(name, sequences, groups, row_length)
        places = batch["places"].split([len(ids) for ids in sequences])
        for ids, where in zip(sequences, places, strict=True):
            assert torch.equal(batch["input_ids"].view(-1)[where], ids)
            assert torch.equal(batch["position_ids"].view(-1)[where], torch.arange(len(ids)))
        if name != "padded":
            segments = batch["layout"].segments
            used = sum(segment.length for row in segments.by_row for segment in row)
            assert used == len(set(batch["places"].tolist()))
            for row in segments.by_row:
                leader = None
                for segment in row:
                    assert segment.prefix == 0 or (leader is not None and segment.prefix <= leader.length)
                    leader = leader if segment.prefix else segment


def test_padding_between_tokens_is_no_layout():
    inputs = padded(SEQUENCES)
    inputs["attention_mask"][0, 2] = 0
    assert sequences_of(**inputs) is None


# ---- a trainer's batches ----


def scored(inputs: dict[str, Tensor]) -> Tensor:
    """Targets [B, T] of all tokens but each row's first."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"] == 1
    targets = torch.full_like(ids, -100)
    both = mask[:, 1:] & mask[:, :-1]
    targets[:, :-1][both] = ids[:, 1:][both]
    return targets


@pytest.mark.parametrize("left", [0, 3])
@pytest.mark.parametrize("row_length", [None, 30])
def test_padded_batches_come_back_as_they_were(row_length: int | None, left: int, everything_in_float64: None):
    model = tiny_llama().double()
    logps = attach(model)
    batches = BatchLayout(LayoutGate(logps), "shared", row_length)
    inputs = padded(SEQUENCES, left)
    targets = scored(inputs)
    expected, _ = logps.logps(targets, use_cache=False, **inputs)
    laid = batches.lay_out(inputs | {"use_cache": False}, targets, lambda _: GROUPS)
    assert laid is not None
    assert batches.gate.name == "shared"
    assert (len(laid[0]["input_ids"]) > 1) == (row_length is not None)
    found, _ = logps.logps(targets, **laid[0])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for ids, places in zip(SEQUENCES, laid[1], strict=True):
        assert torch.equal(laid[0]["input_ids"].view(-1)[places], ids)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"pixel_values": torch.zeros(1)}, "batches bring pixel_values"),
        ({"attention_mask": None}, "batches come without attention_mask"),
        ({"output_router_logits": True}, "batches bring output_router_logits"),
    ],
)
def test_batches_of_more_than_tokens_stay_padded(more: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture):
    batches = BatchLayout(LayoutGate(attach(tiny_llama())), "shared")
    inputs = padded(SEQUENCES)
    targets = scored(inputs)
    assert batches.lay_out(inputs | more, targets, lambda _: GROUPS) is None
    assert batches.gate.name == "padded"
    assert reason in caplog.text
    assert batches.lay_out(inputs, targets, lambda _: GROUPS) is None  # decided


def test_an_odd_batch_stays_padded_by_itself():
    batches = BatchLayout(LayoutGate(attach(tiny_llama())), "shared")
    inputs = padded(SEQUENCES, left=2)
    targets = scored(inputs)
    assert batches.lay_out(inputs, targets, lambda _: GROUPS) is not None
    targets[1, 1] = 5  # predicted by what fills the row up
    assert batches.lay_out(inputs, targets, lambda _: GROUPS) is None
    assert batches.gate.name == "shared"


def test_one_process_with_odd_batches_speaks_for_all(caplog: pytest.LogCaptureFixture):
    batches = BatchLayout(LayoutGate(attach(tiny_llama()), lambda verdict: False), "shared")
    inputs = padded(SEQUENCES)
    assert batches.lay_out(inputs, scored(inputs), lambda _: GROUPS) is None
    assert "another process has batches that cannot be laid out" in caplog.text
