"""Tokenised pairs to padded batches."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orpo_kernels.integration.data.collator import PreferenceCollator, shift_labels

EOS = 9
PAD_IS_EOS = SimpleNamespace(pad_token_id=EOS, eos_token_id=EOS)


def row(chosen: list[int], chosen_prompt: int, rejected: list[int], rejected_prompt: int) -> dict:
    return {
        "chosen_input_ids": chosen,
        "chosen_prompt_length": chosen_prompt,
        "rejected_input_ids": rejected,
        "rejected_prompt_length": rejected_prompt,
    }


# Token 0 and EOS inside an answer, EOS inside a prompt, prompts of different lengths.
ROWS = [
    row([5, EOS, 0, EOS, 7, EOS], 2, [5, EOS, 6, EOS], 3),
    row([0, 4, EOS], 1, [0, 3, 2, 1, EOS], 1),
]


def test_batch():
    batch = PreferenceCollator(PAD_IS_EOS)(ROWS)
    assert batch["input_ids"].tolist() == [
        [5, 9, 0, 9, 7, 9],
        [0, 4, 9, 9, 9, 9],
        [5, 9, 6, 9, 9, 9],
        [0, 3, 2, 1, 9, 9],
    ]
    assert batch["attention_mask"].tolist() == [
        [1, 1, 1, 1, 1, 1],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
    ]
    assert batch["targets"].tolist() == [
        [-100, 0, 9, 7, 9, -100],
        [4, 9, -100, -100, -100, -100],
        [-100, -100, 9, -100, -100, -100],
        [3, 2, 1, 9, -100, -100],
    ]
    assert batch["nll_targets"].tolist() == [
        [9, 0, 9, 7, 9, -100],
        [4, 9, -100, -100, -100, -100],
    ]
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_nll_over_the_chosen_answer_only():
    batch = PreferenceCollator(PAD_IS_EOS, nll_over="chosen")(ROWS)
    assert torch.equal(batch["nll_targets"], batch["targets"][:2])


@pytest.mark.parametrize(
    ("tokenizer", "options", "pad"),
    [
        (SimpleNamespace(pad_token_id=3, eos_token_id=EOS), {}, 3),
        (SimpleNamespace(pad_token_id=0, eos_token_id=EOS), {}, 0),
        (SimpleNamespace(pad_token_id=None, eos_token_id=EOS), {}, EOS),
        (SimpleNamespace(pad_token_id=None, eos_token_id=None), {}, 0),
        (SimpleNamespace(pad_token_id=3, eos_token_id=EOS), {"padding_value": 0}, 0),
    ],
)
def test_padding_id_changes_only_padding(tokenizer, options, pad):
    batch = PreferenceCollator(tokenizer, **options)(ROWS)
    expected = PreferenceCollator(PAD_IS_EOS)(ROWS)
    assert (batch["input_ids"][expected["attention_mask"] == 0] == pad).all()
    expected["input_ids"][expected["attention_mask"] == 0] = pad
    assert all(torch.equal(batch[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("multiple", "length"), [(None, 6), (1, 6), (6, 6), (4, 8), (64, 64)])
def test_pad_to_multiple_of(multiple, length):
    batch = PreferenceCollator(PAD_IS_EOS, pad_to_multiple_of=multiple)(ROWS)
    expected = PreferenceCollator(PAD_IS_EOS)(ROWS)
    assert {value.shape[1] for value in batch.values()} == {length}
    assert all(torch.equal(batch[name][:, :6], expected[name]) for name in expected)
    assert (batch["attention_mask"][:, 6:] == 0).all()
    assert (batch["targets"][:, 6:] == -100).all()
    assert (batch["nll_targets"][:, 6:] == -100).all()


def test_empty_answer_and_empty_prompt():
    batch = PreferenceCollator(PAD_IS_EOS)([row([5, 6], 2, [7, 8, EOS], 0)])
    assert batch["targets"].tolist() == [[-100, -100, -100], [8, EOS, -100]]
    assert batch["nll_targets"].tolist() == [[6, -100, -100]]
    batch = PreferenceCollator(PAD_IS_EOS)([row([], 0, [], 0)])
    assert batch["targets"].tolist() == [[-100], [-100]]
    assert batch["attention_mask"].tolist() == [[0], [0]]


SIDE = st.lists(st.integers(0, 20), min_size=1, max_size=12).flatmap(
    lambda ids: st.tuples(st.just(ids), st.integers(0, len(ids)))
)
PAIR = st.tuples(SIDE, SIDE).map(lambda sides: row(*sides[0], *sides[1]))


@given(rows=st.lists(PAIR, min_size=1, max_size=4), multiple=st.integers(1, 7))
def test_targets_are_the_completion_tokens_at_the_positions_that_predict_them(rows, multiple):
    batch = PreferenceCollator(PAD_IS_EOS, pad_to_multiple_of=multiple)(rows)
    pairs = len(rows)
    for index in range(2 * pairs):
        side = "chosen" if index < pairs else "rejected"
        ids, prompt = (rows[index % pairs][f"{side}_{name}"] for name in ("input_ids", "prompt_length"))
        targets, mask = batch["targets"][index].tolist(), batch["attention_mask"][index].tolist()
        assert mask == [1] * len(ids) + [0] * (len(mask) - len(ids))
        assert batch["input_ids"][index, : len(ids)].tolist() == ids
        scored = {at: target for at, target in enumerate(targets) if target != -100}
        assert scored == {at: ids[at + 1] for at in range(max(prompt - 1, 0), len(ids) - 1)}
        if prompt:
            assert len(scored) == len(ids) - prompt
        if index < pairs:
            nll = batch["nll_targets"][index]
            assert nll[nll != -100].tolist() == ids[1:]


@given(rows=st.lists(PAIR, min_size=1, max_size=4))
def test_a_pair_is_the_same_alone_and_beside_longer_ones(rows):
    together = PreferenceCollator(PAD_IS_EOS)(rows)
    for at, one in enumerate(rows):
        alone = PreferenceCollator(PAD_IS_EOS)([one])
        length = alone["input_ids"].shape[1]
        for name, value in alone.items():
            index = [at, at + len(rows)] if name != "nll_targets" else [at]
            assert torch.equal(together[name][index, :length], value)
            if name != "input_ids":
                assert (together[name][index, length:] == (0 if name == "attention_mask" else -100)).all()


def test_rows_may_hold_tensors():
    tensors = [{name: torch.tensor(value) for name, value in one.items()} for one in ROWS]
    batch, expected = (PreferenceCollator(PAD_IS_EOS)(rows) for rows in (tensors, ROWS))
    assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_shift_labels():
    labels = torch.tensor([[[-100, 1, 2], [3, 4, -100]]], dtype=torch.int32)
    before = labels.clone()
    targets = shift_labels(labels)
    assert targets.tolist() == [[[1, 2, -100], [4, -100, -100]]]
    assert targets.dtype == torch.int32
    assert torch.equal(labels, before)
    assert shift_labels(torch.tensor([1, 2]), ignore_index=-1).tolist() == [2, -1]
    assert shift_labels(torch.empty(2, 0, dtype=torch.int64)).shape == (2, 0)
    with pytest.raises(ValueError, match=r"labels has shape \(\)"):
        shift_labels(torch.tensor(1))


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"nll_over='completion': use 'prompt\+chosen' or 'chosen'"):
        PreferenceCollator(PAD_IS_EOS, nll_over="completion")
    with pytest.raises(ValueError, match="pad_to_multiple_of=0: use a positive int"):
        PreferenceCollator(PAD_IS_EOS, pad_to_multiple_of=0)
    with pytest.raises(ValueError, match="has no rows"):
        PreferenceCollator(PAD_IS_EOS)([])
    with pytest.raises(ValueError, match=r"no 'chosen_input_ids', only \['chosen', 'prompt'\].*remove_unused_columns"):
        PreferenceCollator(PAD_IS_EOS)([{"prompt": "q", "chosen": "a"}])
