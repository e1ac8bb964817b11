"""Predicted exchanges against the arithmetic by hand, and what must hold of any layout."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orpo_kernels import Plan
from orpo_kernels.__main__ import main
from orpo_kernels.costs import predict
from orpo_kernels.scale import LATENCY_FABRIC, LATENCY_NODE, Layout, OnRanks, layouts_of, predict_layout, tokens_to_hide

N, D, V = 4096, 4096, 128256


def on(layout: Layout, train_weight: bool = False, tokens: int = N) -> OnRanks:
    return predict_layout(layout, tokens, D, V, "h100", pairs=2, train_weight=train_weight)


def by_name(found: OnRanks) -> dict[str, tuple[float, float, float]]:
    return {exchange.name: tuple(exchange[1:]) for exchange in found.exchanges}


def test_tensor_parallelism_by_hand():
    """8 ranks on 8 n tokens: two exchanges of a number a token, one of a hidden state, by rings over NVLink."""
    found, tokens = by_name(on(Layout(tp=8))), 8 * N
    assert found["targets' logits"][0] == 2 * 7 / 8 * 8 * tokens
    assert found["competitors' logsumexps"][0] == 7 * 8 * tokens
    assert found["gradient of hidden"] == pytest.approx(
        (2 * 7 / 8 * 2 * tokens * D, LATENCY_NODE + 2 * 7 / 8 * 2 * tokens * D / 450e9 * 1e3, 0.0)
    )
    moved, ms, hidden = by_name(on(Layout(tp=8), train_weight=True))["gradient of hidden"]
    assert moved == found["gradient of hidden"][0]
    assert hidden == ms  # the weight's gradient takes longer


def test_fsdp_by_hand():
    whole = 2 * V * D
    layer = 24 * D * D * N / 0.75 / 750e12 * 1e3
    found = by_name(on(Layout(fsdp=512), train_weight=True))
    gathered = LATENCY_FABRIC + whole * 511 / 512 / 400e9 * 1e3  # 8 network cards a node
    assert found["weight"] == pytest.approx((whole * 511 / 512, gathered, min(gathered, layer)))
    assert found["gradient of weight"] == pytest.approx((whole * 511 / 512, gathered, min(gathered, 2 * layer)))
    # One of a group's ranks in a node: one network card, for an eighth of the weight.
    moved, ms, _ = by_name(on(Layout(tp=8, fsdp=64)))["weight"]
    assert moved == pytest.approx(whole / 8 * 63 / 64)
    assert ms == pytest.approx(LATENCY_FABRIC + whole / 8 * 63 / 64 / 50e9 * 1e3)


def test_sequences_over_ranks_by_hand():
    found = by_name(on(Layout(fsdp=8, cp=8)))
    # Sums and counts in fp32 of 2 completions and a chosen sequence a pair; a group has 8 x 2 pairs.
    assert found["sums of sequences"][0] == found["their gradients"][0] == 2 * 7 / 8 * 4 * 6 * 16
    assert found["weight"] == by_name(on(Layout(fsdp=8)))["weight"]


@pytest.mark.parametrize("layout", [Layout(fsdp=8), Layout(tp=8, fsdp=64)])
def test_the_tokens_that_hide_a_gather(layout: Layout):
    enough = tokens_to_hide(layout, D, V, "h100")
    for tokens, hides in ((enough, True), (enough - 1, False)):
        _, ms, hidden = by_name(on(layout, tokens=tokens))["weight"]
        assert (hidden == ms) == hides


def test_a_card_alone_is_the_prediction_of_costs():
    alone = predict(Plan(), N, D, V, "h100")
    found = on(Layout())
    assert (found.ms, found.moved, found.weight_bytes) == (alone.ms, 0, 2 * V * D)


@given(
    tp=st.sampled_from([1, 2, 4, 8, 16]),
    fsdp=st.sampled_from([1, 2, 8, 64]),
    tokens=st.integers(1, 40000),
    train=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_what_holds_of_any_layout(tp: int, fsdp: int, tokens: int, train: bool):
    found = on(Layout(tp=tp, fsdp=fsdp), train, tokens)
    assert found.compute.ms <= found.ms <= found.compute.ms + found.link_ms
    for exchange in found.exchanges:
        assert 0 <= exchange.hidden <= exchange.ms
        assert exchange.moved > 0
    assert found.weight_bytes * tp >= 2 * V * D
    more = on(Layout(tp=tp, fsdp=2 * fsdp), train, tokens)
    assert more.moved > found.moved
    assert more.weight_bytes == found.weight_bytes


def test_layouts_fill_the_cards():
    for cards in (8, 64, 512):
        found = layouts_of(4, cards)
        assert {layout.cards for layout in found} == {cards}
        assert len(found) == len(set(found))
        assert {layout.tp for layout in found} == {1, 2, 4}
    with pytest.raises(ValueError, match="tp=3: on 8 cards use one of 2, 4, 8"):
        layouts_of(3, 8)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(tp=0), "tp=0"),
        (Layout(fsdp=4, cp=8), "cp=8 does not divide fsdp=4"),
        (Layout(tp=V + 1), "rows to share"),
    ],
)
def test_layouts_that_cannot_be(layout: Layout, message: str):
    with pytest.raises(ValueError, match=message):
        on(layout)


def test_the_command(capsys: pytest.CaptureFixture[str]):
    assert main(["estimate", "--model", "llama-3-70b", "--tp", "2", "--device", "h100"]) == 0
    out = capsys.readouterr().out
    assert "Predicted, not measured: H100 SXM at 750 TFLOP/s, NVLink 450 GB/s, fabric 50 GB/s" in out
    assert out.count("| 512 | FSDP 256 x TP 2 |") == 2
    tokens = 2 * 2 * 1024 * 3 // 4
    row = next(line for line in out.splitlines() if line.startswith("| 8 | FSDP 4 x TP 2 |"))
    options = {"pairs": 2, "train_weight": False}
    expected = predict_layout(Layout(tp=2, fsdp=4), tokens, 8192, 128256, "h100", **options)
    assert row.endswith(f"| {expected.compute.ms:.2f} | {expected.ms:.2f} |")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--tp", "3"], "tp=3: on 8 cards"), (["--tp", "2", "--dtype", "float32"], "--dtype bfloat16")],
)
def test_the_command_refuses(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["estimate", "--head-only", "--model", "llama-3-8b", *arguments]) == 2
    assert message in capsys.readouterr().err
