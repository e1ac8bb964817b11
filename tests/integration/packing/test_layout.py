"""Pairs laid out in rows, and what follows the model reading any layout alike."""

from __future__ import annotations

import copy
import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_transformers import PAIRS as TEXTS
from test_transformers import config, losses, model, tokenizer  # noqa: F401  (fixtures)
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from orpo_kernels.integration.data.collator import LayoutCollator, PreferenceCollator
from orpo_kernels.integration.lm_head import attach
from orpo_kernels.integration.metrics import for_metrics, pair_table
from orpo_kernels.integration.packing.attention import restore_attention
from orpo_kernels.integration.packing.gate import LayoutGate, model_inputs
from orpo_kernels.integration.packing.layout import lay_out, pack_pairs, pad_pairs, tokens_a_step
from orpo_kernels.integration.packing.layout import sequence_places as sides_of
from orpo_kernels.integration.packing.segments import Segment
from orpo_kernels.integration.transformers import ORPOTrainer
from orpo_kernels.loss import merge_targets, orpo_from_logps
from orpo_kernels.objective import CHOSEN, PROMPT, REJECTED, orpo_objective_flat
from orpo_kernels.pair_sums import PairSums
from orpo_kernels.presets import get_preset

LAYOUTS = ("padded", "packed", "shared")
PAD = SimpleNamespace(pad_token_id=0, eos_token_id=2)


def row(chosen: list[int], chosen_prompt: int, rejected: list[int], rejected_prompt: int) -> dict[str, Any]:
    return {
        "chosen_input_ids": chosen,
        "chosen_prompt_length": chosen_prompt,
        "rejected_input_ids": rejected,
        "rejected_prompt_length": rejected_prompt,
    }


TWO = [row([5, 6, 7, 8], 2, [5, 6, 9], 2), row([3, 4], 0, [1, 1, 1], 1)]


def lists(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value.tolist() for name, value in batch.items() if name != "layout"}


def test_shared():
    batch = pack_pairs(TWO, True, padding_value=99)
    assert lists(batch) == {
        "input_ids": [[5, 6, 7, 8, 9, 3, 4, 1, 1, 1]],
        "position_ids": [[0, 1, 2, 3, 2, 0, 1, 0, 1, 2]],
        # The prompt's last token, at place 1, predicts the first of both answers.
        "rows": [0, 1, 2, 5, 1, 7, 8],
        "places": [0, 1, 2, 3, 5, 6, 0, 1, 4, 7, 8, 9],
        "targets": [6, 7, 8, 4, 9, 1, 1],
        "pair": [0, 0, 0, 1, 0, 1, 1],
        "kind": [PROMPT, CHOSEN, CHOSEN, CHOSEN, REJECTED, REJECTED, REJECTED],
    }
    assert batch["layout"].segments.by_row == (
        (Segment(0, 0, 4), Segment(0, 4, 1, prefix=2), Segment(0, 5, 2), Segment(0, 7, 3)),
    )


def test_packed():
    batch = pack_pairs(TWO, False)
    assert lists(batch) == {
        "input_ids": [[5, 6, 7, 8, 5, 6, 9, 3, 4, 1, 1, 1]],
        "position_ids": [[0, 1, 2, 3, 0, 1, 2, 0, 1, 0, 1, 2]],
        "rows": [0, 1, 2, 7, 5, 9, 10],
        "places": [0, 1, 2, 3, 7, 8, 4, 5, 6, 9, 10, 11],
        "targets": [6, 7, 8, 4, 9, 1, 1],
        "pair": [0, 0, 0, 1, 0, 1, 1],
        "kind": [PROMPT, CHOSEN, CHOSEN, CHOSEN, REJECTED, REJECTED, REJECTED],
    }
    assert batch["layout"].segments.by_row == (
        (Segment(0, 0, 4), Segment(0, 4, 3), Segment(0, 7, 2), Segment(0, 9, 3)),
    )


def test_rows_of_a_length():
    batch = pack_pairs(TWO, False, row_length=6, padding_value=99)
    # The longest first, each where it still fits: 4 + 2, 3 + 3.
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 3, 4], [5, 6, 9, 1, 1, 1]]
    batch = pack_pairs(TWO, True, row_length=7, padding_value=99)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [3, 4, 1, 1, 1]]
    batch = pack_pairs([*TWO, row([7], 1, [7], 0)], True, row_length=6, padding_value=99)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 7], [3, 4, 1, 1, 1, 99]]
    assert batch["pair"].tolist() == [0, 0, 0, 1, 0, 1, 1]  # in the batch's order wherever they lie


def test_what_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match=r"the pair 0 has 5 tokens and row_length=4: raise row_length, or lower max_l"):
        pack_pairs(TWO, True, row_length=4)
    with pytest.raises(ValueError, match=r"the chosen sequence of pair 0 has 4 tokens and row_length=3"):
        pack_pairs(TWO, False, row_length=3)
    with pytest.raises(ValueError, match=r"no 'chosen_input_ids'.*remove_unused_columns"):
        pack_pairs([{"prompt": "a"}], True)
    for call in (pad_pairs, lambda rows: pack_pairs(rows, True)):
        with pytest.raises(ValueError, match="has no rows"):
            call([])


def test_edges():
    same = [4, 5, 6, 7]
    batch = pack_pairs([row(same, 2, same, 2)], True)
    assert batch["input_ids"].tolist() == [same]  # identical answers cost nothing
    assert batch["rows"].tolist() == [0, 1, 2, 1, 2]
    batch = pack_pairs([row([4], 0, [5], 0)], True)  # nothing predicts a first token
    assert batch["targets"].tolist() == []
    batch = pack_pairs([row([4, 5], 1, [4, 6], 1)], True)
    assert (batch["rows"].tolist(), batch["targets"].tolist()) == ([0, 0], [5, 6])
    # A prompt that is longer than the other sequence, and an answer that goes on with the other.
    batch = pack_pairs([row([4, 5], 1, [4, 5, 6, 7], 3)], True)
    assert batch["input_ids"].tolist() == [[4, 5, 6, 7]]
    assert (batch["rows"].tolist(), batch["targets"].tolist()) == ([0, 2], [5, 7])
    batch = pack_pairs([row([], 0, [], 0)], True)
    assert batch["input_ids"].shape == (1, 1)
    assert batch["layout"].segments.by_row == ((),)


SIDE = st.lists(st.integers(1, 4), min_size=0, max_size=8).flatmap(
    lambda ids: st.tuples(st.just(ids), st.integers(0, len(ids)))
)
BATCH = st.lists(st.tuples(SIDE, SIDE).map(lambda sides: row(*sides[0], *sides[1])), min_size=1, max_size=5)


@settings(deadline=None)
@given(rows=BATCH, name=st.sampled_from(LAYOUTS), extra=st.one_of(st.none(), st.integers(0, 9)), over=st.booleans())
def test_any_batch(rows: list[dict[str, Any]], name: Any, extra: int | None, over: bool):
    nll_over: Any = "prompt+chosen" if over else "chosen"
    sides = [(index, side) for side in ("chosen", "rejected") for index in range(len(rows))]
    row_length = None if extra is None else max(1, *(2 * len(rows[i][f"{s}_input_ids"]) for i, s in sides)) + extra
    batch = lay_out(name, rows, row_length=row_length, nll_over=nll_over, padding_value=9)
    ids, positions = batch["input_ids"].view(-1), batch["position_ids"].view(-1)
    if row_length is not None and name != "padded":
        assert batch["input_ids"].shape[1] <= row_length

    # Each scored token, in order: predicted by the place that holds the token before it, at its position.
    expected = []
    for index, side in sides:
        one, prompt = rows[index][f"{side}_input_ids"], max(rows[index][f"{side}_prompt_length"], 1)
        first = 1 if side == "chosen" and over else prompt
        for at in range(first, len(one)):
            kind = REJECTED if side == "rejected" else PROMPT if at < prompt else CHOSEN
            expected.append((one[at - 1], at - 1, one[at], index, kind))
    found = zip(
        ids[batch["rows"]].tolist(),
        positions[batch["rows"]].tolist(),
        *(batch[key].tolist() for key in ("targets", "pair", "kind")),
        strict=True,
    )
    assert list(found) == expected

    # The places of each sequence hold its tokens, in order.
    whole = [rows[index][f"{side}_input_ids"] for index, side in sides]
    assert [ids[places].tolist() for places in sides_of(batch)] == whole

    # The keys of each segment's last token spell a whole sequence, and all sequences are there.
    if name == "padded":
        spelled = [ids.view(len(sides), -1)[at][batch["attention_mask"][at] == 1].tolist() for at in range(len(sides))]
    else:
        plan = batch["layout"].segments.varlen(torch.device("cpu")) if any(batch["layout"].segments.by_row) else None
        cuts = [] if plan is None else plan.cu_keys[1:-1].tolist()
        spelled = [] if plan is None else [part.tolist() for part in ids[plan.keys].tensor_split(cuts)]
        assert sum(len(segment) for segment in batch["layout"].segments.by_row) == len(spelled)
    for one in whole:
        # A sequence that the other side begins with is in that one.
        assert any(part[: len(one)] == one for part in spelled) or not one
    if name != "shared":
        assert sorted(filter(None, spelled)) == sorted(filter(None, whole))


def test_the_same_tokens_a_step():
    expected = {"padded": (16 + 12) / 2, "packed": (7 + 4 + 5) / 2, "shared": (5 + 4 + 5) / 2}
    rows = [TWO[0], row([1, 2], 1, [3, 4], 1), TWO[1]]
    expected = {"padded": (16 + 6) / 2, "packed": (11 + 5) / 2, "shared": (9 + 5) / 2}
    assert tokens_a_step(rows, 2) == expected
    assert tokens_a_step([], 2) == dict.fromkeys(LAYOUTS, 0.0)


# ---- what follows the model ----

# A pair without a completion, P = 0, C = 1, R = 1, and ordinary ones.
ROWS = [
    *TWO,
    row([5, 6], 2, [5, 6, 7], 2),
    row([4, 5, 1], 2, [4, 5, 2], 2),
    row([1, 2, 3, 4, 5, 6], 3, [1, 2, 3, 9], 3),
]


@pytest.mark.parametrize("normalizers", [{}, {"nll_normalizer": 7.0, "pair_normalizer": 3.0}])
@pytest.mark.parametrize("preset", ["trl", "llama_factory", "paper"])
@pytest.mark.filterwarnings("ignore:.*empty completion")
def test_the_flat_objective_is_the_padded_one(preset: str, normalizers: dict[str, float]):
    over: Any = "chosen" if get_preset(preset).nll_over == "chosen" else "prompt+chosen"
    padded = PreferenceCollator(PAD, nll_over=over)(ROWS)
    targets = padded["targets"]
    nll_targets = None if over == "chosen" else padded["nll_targets"]
    # One number a hidden state and target: those of a place in a sequence are the same wherever it lies.
    scores = torch.randn(10, 10, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).abs().neg()
    longest = targets.shape[1]
    found = {}
    for name in ("rectangle", *LAYOUTS):
        source = scores.clone().requires_grad_()
        if name == "rectangle":
            merged = merge_targets(targets, nll_targets)
            logps = source[:, :longest].gather(2, merged.clamp(min=0)[..., None])[..., 0] * (merged != -100)
            output = orpo_from_logps(logps, targets, nll_targets=nll_targets, preset=preset, **normalizers)
            of = PairSums.of_targets(for_metrics(logps), targets, nll_targets)
        else:
            batch = lay_out(name, ROWS, nll_over=over)
            sequence = batch["pair"] + len(ROWS) * (batch["kind"] == REJECTED)
            position = batch["position_ids"].view(-1)[batch["rows"]]
            logps = source[sequence, position, batch["targets"]]
            tokens = (logps, batch["pair"], batch["kind"])
            output = orpo_objective_flat(*tokens, num_pairs=len(ROWS), preset=preset, **normalizers)
            flat = (for_metrics(logps), *tokens[1:])
            of = PairSums.of_flat(*flat, num_pairs=len(ROWS), preset=get_preset(preset))
        assert int(of.nll_count(get_preset(preset))) == int(output.nll_count)
        assert int(of.pair_is_valid.sum()) == int(output.valid_pairs)
        table = pair_table(of, None)
        output.loss.backward()
        found[name] = (output, table, source.grad)
    right, right_table, right_gradient = found.pop("rectangle")
    for output, table, gradient in found.values():
        for field in dataclasses.fields(right):
            torch.testing.assert_close(
                getattr(output, field.name), getattr(right, field.name), rtol=1e-14, atol=1e-15, check_dtype=False
            )
        torch.testing.assert_close(table, right_table, rtol=1e-14, atol=0, equal_nan=True)
        torch.testing.assert_close(gradient, right_gradient, rtol=1e-13, atol=1e-16)


def biased_and_scaled() -> GraniteForCausalLM:
    made = GraniteForCausalLM(GraniteConfig(**TINY, logits_scaling=4.0))
    made.lm_head = torch.nn.Linear(32, 22)
    return made


def soft_capped() -> Gemma2ForCausalLM:
    return Gemma2ForCausalLM(Gemma2Config(**TINY, head_dim=8, final_logit_softcapping=2.0))


TINY = {"vocab_size": 22, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 2}


@pytest.mark.parametrize("row_length", [None, 12])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("build", [lambda: LlamaForCausalLM(LlamaConfig(**TINY)), biased_and_scaled, soft_capped])
def test_mean_logits_are_those_of_separate_rows(build: Any, name: Any, row_length: int | None):
    torch.manual_seed(0)
    made = build().double()
    ours = attach(made)
    gate = LayoutGate(ours)
    batch = gate.admit(LayoutCollator(PAD, name, row_length=row_length)(ROWS))
    assert batch["layout"].name == name, gate.reasons
    mean_logits = ours.sequence_scores(
        batch["targets"], sides_of(batch), rows=batch["rows"], use_cache=False, **model_inputs(batch)
    ).mean_logits
    if build is soft_capped:
        assert mean_logits is None
        return
    sequences = [one[f"{side}_input_ids"] for side in ("chosen", "rejected") for one in ROWS]
    assert not mean_logits.requires_grad
    restore_attention(made, "sdpa")  # the eager attention takes its softmax in fp32
    with torch.no_grad():
        expected = torch.stack([made(torch.tensor([ids])).logits.mean() for ids in sequences])
    torch.testing.assert_close(mean_logits, expected, rtol=1e-12, atol=1e-15)


def test_the_mean_logit_of_no_tokens_is_zero():
    ours = attach(LlamaForCausalLM(LlamaConfig(**TINY)))
    batch = pad_pairs([row([4, 5], 1, [], 0)])
    mean_logits = ours.sequence_scores(
        batch["targets"], sides_of(batch), rows=batch["rows"], **model_inputs(batch)
    ).mean_logits
    chosen, rejected = mean_logits.tolist()
    assert chosen != 0 == rejected


def test_collator_arguments():
    for options, message in (
        ({"name": "dense"}, "name='dense': use 'shared', 'packed' or 'padded'"),
        ({"row_length": 0}, "row_length=0: use a positive int"),
        ({"nll_over": "prompt"}, "nll_over='prompt': use"),
    ):
        with pytest.raises(ValueError, match=message):
            LayoutCollator(PAD, **options)
    batch = LayoutCollator(PAD, "packed", row_length=6, nll_over="chosen")(TWO)
    assert batch["input_ids"].shape == (2, 6)
    assert PROMPT not in batch["kind"].tolist()


# ---- training ----

ASKED = {
    "padded": {},
    "packed": {"packing": True, "share_prefix": False},
    "shared": {"packing": True},
    "shared, rows": {"share_prefix": True, "packing_length": 24},
}


@pytest.mark.shows(
    "Layouts", "transformers `ORPOTrainer`, packed and shared rows", "30 steps: losses and metrics as padded"
)
def test_thirty_steps_are_the_same_in_each_layout(tmp_path, tokenizer, model):  # noqa: F811
    found = {}
    for name, options in ASKED.items():
        args = config(tmp_path, max_steps=30, per_device_train_batch_size=2, learning_rate=3e-3, **options)
        args.train_sampling_strategy = "random"
        trainer = ORPOTrainer(
            copy.deepcopy(model), args, train_dataset=TEXTS, eval_dataset=TEXTS, processing_class=tokenizer
        )
        trainer.train()
        evaluation = {key: value for key, value in trainer.evaluate().items() if "per_second" not in key}
        found[name] = (losses(trainer), evaluation, trainer.state.log_history[-3])
        if name != "padded":
            assert trainer._gate.name == name.split(",")[0]
    right, evaluation, logged = found.pop("padded")
    assert len(right) == 30
    assert right[-1] < 0.8 * right[0]
    for others, other_evaluation, other_logged in found.values():
        assert others == pytest.approx(right, rel=2e-5)
        for ours, theirs in ((other_evaluation, evaluation), (other_logged, logged)):
            common = {key for key in ours if key in theirs and not key.endswith(("runtime", "time", "grad_norm"))}
            names = ("logits/", "logps/", "rewards/", "nll_loss")
            assert {key for key in theirs if any(name in key for name in names)} <= common
            assert {key: ours[key] for key in common} == pytest.approx(
                {key: theirs[key] for key in common}, rel=1e-4, abs=1e-6
            )


def test_global_normalization_and_presets(tmp_path, tokenizer, model):  # noqa: F811
    for preset in ("llama_factory", "paper"):
        found = []
        for batch_size, accumulation, options in ((4, 1, {}), (1, 4, {"packing": True}), (2, 2, {"packing": True})):
            args = config(
                tmp_path,
                preset=preset,
                per_device_train_batch_size=batch_size,
                gradient_accumulation_steps=accumulation,
                loss_normalization="global",
                **options,
            )
            trainer = ORPOTrainer(copy.deepcopy(model), args, train_dataset=TEXTS[:4], processing_class=tokenizer)
            trainer.train()
            found.append(losses(trainer))
        for other in found[1:]:
            assert other == pytest.approx(found[0], rel=1e-5)


def test_a_model_that_cannot_have_it_trains_padded(tmp_path, tokenizer, model, caplog):  # noqa: F811
    found = []
    for options in ({}, {"packing": True}):
        other = copy.deepcopy(model)
        # Looks beyond attention: a mean of the tokens so far.
        other.model.layers[0].mlp.register_forward_hook(
            lambda module, args, out: out + out.cumsum(1) / torch.arange(1, out.shape[1] + 1)[:, None]
        )
        trainer = ORPOTrainer(other, config(tmp_path, **options), train_dataset=TEXTS, processing_class=tokenizer)
        trainer.train()
        found.append(losses(trainer))
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    (record,) = [record for record in caplog.records if "batches are padded, not shared" in record.message]
    assert "nats a token" in record.message


def test_the_summary_names_the_layouts(tmp_path, tokenizer, model, caplog):  # noqa: F811
    with caplog.at_level("INFO", "orpo_kernels"):
        ORPOTrainer(model, config(tmp_path, packing=True), train_dataset=TEXTS, processing_class=tokenizer)
    (record,) = [record for record in caplog.records if "tokens a batch of 4 pairs" in record.message]
    rows = pack_pairs(
        [
            dict(one)
            for one in ORPOTrainer(
                model, config(tmp_path), train_dataset=TEXTS, processing_class=tokenizer
            ).train_dataset
        ],
        True,
    )
    shared = rows["input_ids"].numel() / math.ceil(len(TEXTS) / 4)
    assert f"{shared:,.0f} shared; rows are shared, which computes " in record.message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share_prefix": "never"}, "share_prefix='never': use 'auto', True or False"),
        ({"packing_length": 64}, "packing_length=64: use a positive int, and only with packing=True"),
        ({"packing_length": 0, "packing": True}, "packing_length=0: use a positive int"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_options_as_text(tmp_path):
    assert config(tmp_path, share_prefix="False", packing=True).layout == "packed"
    assert config(tmp_path, share_prefix="true").layout == "shared"
    assert config(tmp_path).layout == "padded"
    assert config(tmp_path, share_prefix=False).layout == "padded"


def test_a_collator_of_ones_own_is_no_layout(tmp_path, tokenizer, model):  # noqa: F811
    args = config(tmp_path, packing=True)
    with pytest.raises(ValueError, match="a PreferenceCollator was given with packing=True"):
        ORPOTrainer(model, args, PreferenceCollator(tokenizer), TEXTS, processing_class=tokenizer)
    ORPOTrainer(model, args, LayoutCollator(tokenizer, "packed"), TEXTS, processing_class=tokenizer)
