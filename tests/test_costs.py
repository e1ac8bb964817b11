"""Predicted times against the arithmetic by hand, and against what a card gave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from orpo_kernels import Plan
from orpo_kernels.__main__ import main
from orpo_kernels.costs import CARDS, Prediction, predict
from orpo_kernels.estimate import MODELS

HEADLINE = (8192, 4096, 151936)
WAYS = {
    "evaluation": {"train_hidden": False},
    "frozen head": {},
    "trained head": {"train_weight": True},
    "trained head, kept": {"train_weight": True},
}
MEASURED = Path(__file__).parents[1] / "benchmarks" / "results" / "nvidia-h200.json"


def on(card: str, way: str, sizes: tuple[int, int, int] = HEADLINE) -> Prediction:
    return predict(Plan(keep_logit_grads=way.endswith("kept")), *sizes, card, **WAYS[way])


def test_a_large_products_time_is_its_operations() -> None:
    unit = 2 * 8192 * 4096 * 151936 / 750e12 * 1e3
    parts = {part.name: part.ms for part in on("h100", "frozen head").parts}
    assert parts["logits"] == pytest.approx(unit, rel=0.02)  # its last wave of tiles is not full
    assert parts["u: exponentials x weight"] == pytest.approx(unit)
    assert "gradients x hidden" not in parts


@pytest.mark.parametrize(
    ("way", "ms", "gib"),
    [("frozen head", 28.0, 0.5), ("trained head", 56.0, 1.8), ("trained head, kept", 43.0, 3.9)],
)
def test_the_goals_on_paper(way: str, ms: float, gib: float) -> None:
    """For an H100; memory with the weight's gradient."""
    found = on("h100", way)
    assert found.ms <= ms
    gradient = 2 * 4096 * 151936 if way != "frozen head" else 0
    assert found.schedule.scratch_bytes + found.schedule.saved_bytes + gradient <= gib * 2**30


@pytest.mark.parametrize("way", WAYS)
def test_within_a_sixth_of_what_a_card_measured(way: str) -> None:
    """Device times of an H200, the host ahead: the parts without the host's. Small heads and large ones."""
    found = json.loads(MEASURED.read_text(encoding="utf-8"))
    cases = {HEADLINE: found["smoke"]["sections"]["whole"]["result"]}
    for name, rows in found["profile"]["sections"]["heads"]["result"].items():
        cases[4096, MODELS[name].hidden_size, MODELS[name].vocab_size] = rows
    for sizes, rows in cases.items():
        predicted = sum(part.ms for part in on("h200", way, sizes).parts)
        assert predicted == pytest.approx(rows[way]["queued_ms"], rel=1 / 6), sizes


def test_a_card_of_more_is_never_slower() -> None:
    for way in WAYS:
        times = [on(card, way).ms for card in ("a100", "h100", "h200", "b200")]
        assert times == sorted(times, reverse=True)


def test_few_tokens_wait_for_the_weight_to_arrive() -> None:
    parts = {part.name: part.ms for part in on("h100", "frozen head", (16, 4096, 151936)).parts}
    assert parts["u: exponentials x weight"] >= 2 * 4096 * 151936 / CARDS["h100"].bandwidth / 1e9


@pytest.mark.parametrize(
    ("card", "dtype", "message"),
    [
        ("h800", torch.bfloat16, r"card='h800': rates are known of a100"),
        ("h100", torch.float32, r"dtype=torch\.float32"),
    ],
)
def test_what_is_not_known_is_refused(card: str, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predict(Plan(), *HEADLINE, card, dtype=dtype)


def test_estimate_names_a_card(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "--head-only", "--model", "qwen3-8b", "--device", "h100"]) == 0
    out = capsys.readouterr().out
    assert "frozen head, predicted for H100 SXM at 750 TFLOP/s and 3 TB/s:" in out
    assert "u: exponentials x weight" in out
    assert main(["estimate", "--head-only", "--model", "qwen3-8b", "--device", "h100", "--dtype", "float32"]) == 2
    assert "dtype=torch.float32" in capsys.readouterr().err
