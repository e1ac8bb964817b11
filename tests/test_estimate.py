"""`estimate` against the arithmetic it stands for, and against the plan of a real call."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from orpo_kernels.__main__ import main
from orpo_kernels.bench.child import measure
from orpo_kernels.bench.problem import Problem
from orpo_kernels.estimate import MODELS, HeadSize, estimate, head_of_model
from orpo_kernels.plan import Plan

HEAD = HeadSize(64, 1000)


def test_full_logits_are_three_tensors_and_three_units():
    found = {one.setting: one for one in estimate(HEAD, 2, 50, dtype=torch.float32, device="cpu", ignored=0.25)}
    logits = 2 * 2 * 50 * 1000 * 4
    assert found["evaluation"].full_bytes == 2 * logits
    assert found["frozen head"].full_bytes == found["trained head"].full_bytes == 3 * logits
    # Full logits work on all 200 positions, of which 150 are scored.
    assert found["trained head"].full_units == pytest.approx(3 * 200 / 150)
    assert found["evaluation"].gradient_bytes == 0
    assert found["trained head"].gradient_bytes == 4 * 64 * (200 + 1000)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is Linux's high-water mark")
@pytest.mark.parametrize(("mode", "setting"), [("evaluation", "evaluation"), ("frozen", "frozen head")])
def test_full_logits_take_what_is_measured(mode: str, setting: str):
    problem = Problem(pairs=1, length=200, hidden_size=8, vocab_size=30000)
    found = measure({"problem": problem.as_dict(), "peer": "full", "mode": mode, "repeats": 1, "exact": None})
    (e,) = [e for e in estimate(HeadSize(8, 30000), 1, 200, dtype=torch.float32, device="cpu") if e.setting == setting]
    assert found["samples"][0]["peak_bytes"] == pytest.approx(e.full_bytes + e.gradient_bytes, rel=0.05)


def test_ours_is_the_schedule_of_a_call():
    (found,) = [one for one in estimate(HEAD, 2, 50, dtype=torch.float32, device="cpu") if one.setting == "frozen head"]
    schedule = Plan().schedule(150, 64, 1000, torch.float32, "cpu", train_hidden=True, train_weight=False)
    assert found.schedule == schedule
    assert found.our_bytes == schedule.scratch_bytes + schedule.saved_bytes
    assert found.our_units == 2.0


def test_units_of_every_setting():
    found = {one.setting: one.our_units for one in estimate(HEAD, 2, 50, dtype=torch.float32, device="cpu")}
    assert found == {
        "evaluation": 1.0,
        "frozen head": 2.0,
        "trained head": 4.0,
        "trained head, logit gradients kept": 3.0,
    }


def test_a_soft_cap_keeps_one_more_tensor():
    plain, capped = (
        estimate(HeadSize(64, 1000, softcap=cap), 1, 10, dtype=torch.bfloat16, device="cpu")[1] for cap in (None, 30.0)
    )
    assert capped.full_bytes - plain.full_bytes == 2 * 10 * 1000 * 2


@pytest.mark.parametrize("name", MODELS)
def test_scratch_does_not_grow_with_length(name: str):
    for one, more in zip(*(estimate(MODELS[name], 4, t, dtype=torch.bfloat16) for t in (1024, 8192)), strict=True):
        assert more.full_bytes == 8 * one.full_bytes
        assert more.schedule.scratch_bytes <= Plan().budget("cuda")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pairs": 0}, "pairs=0: it must be at least 1"),
        ({"length": -3}, "length=-3"),
        ({"ignored": 1.0}, "ignored=1.0"),
        ({"scratch_bytes": 10}, "scratch_bytes=10 cannot hold one tile"),
    ],
)
def test_bad_arguments(arguments: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        estimate(HEAD, **{"pairs": 1, "length": 10, "dtype": torch.float32, "device": "cpu"} | arguments)


def test_a_models_folder(tmp_path: Path):
    config = {"text_config": {"hidden_size": 8, "vocab_size": 30, "final_logit_softcapping": 5.0, "dtype": "bfloat16"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert head_of_model(str(tmp_path)) == HeadSize(8, 30, 5.0, torch.bfloat16)
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8}))
    with pytest.raises(ValueError, match="has no vocab_size"):
        head_of_model(str(tmp_path))
    with pytest.raises(ValueError, match="neither one of smollm2-135m"):
        head_of_model(str(tmp_path / "none"))


def test_the_command(capsys: pytest.CaptureFixture[str]):
    assert main(["estimate", "--head-only", "--model", "llama-3-8b", "--pairs", "4", "--length", "4096"]) == 0
    printed = capsys.readouterr().out
    assert "frozen head" in printed
    assert "128256" in printed.replace(",", "")
    assert main(["estimate", "--head-only", "--model", "nobody"]) == 2
    assert "nobody" in capsys.readouterr().err
