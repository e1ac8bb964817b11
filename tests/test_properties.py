"""What must not matter does not: plans, padding, order, batch splits, shifts of all logits.

Each property is checked against the same call done otherwise, in fp32, fp64 and bf16, to the rounding of what is
computed; that the numbers are right is for the other files.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from reference import IGNORED, Case, Result, evaluate, evaluate_exact, largest_error, make_case, normal_like
from torch import Tensor

from orpo_kernels import Plan, linear_logps, orpo_loss
from orpo_kernels.plan import ScratchTooSmall

# Session fixtures do not change between examples.
SETTINGS = settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
# Two ways to the same gradient may differ by a few roundings of what is stored, and of fp32 sums.
ROUNDINGS = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 1.6e-2}
LOGP_ROUNDINGS = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-5}


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = tuple(ROUNDINGS)) -> dict[str, Any]:
    """Arguments of `make_case` but the device."""
    head: dict[str, Any] = {"bias": draw(st.booleans())}
    if draw(st.booleans()):
        head["softcap"] = draw(st.sampled_from([2.0, 30.0]))
    if draw(st.booleans()):
        head["logit_scale"] = draw(st.sampled_from([0.0625, 3.0, -1.0]))
    return {
        "shape": (draw(st.integers(1, 5)), draw(st.integers(1, 12))),
        "hidden_size": draw(st.integers(1, 40)),
        "vocab_size": draw(st.integers(1, 300)),
        "dtype": draw(st.sampled_from(dtypes)),
        "ignored": draw(st.sampled_from([0.0, 0.3, 0.9])),
        "largest": draw(st.sampled_from([0.1, 4.0, 12.0])),
        "seed": draw(st.integers(0, 1000)),
        **head,
    }


def build(arguments: dict[str, Any], device: torch.device) -> tuple[Case, Tensor]:
    case = make_case(**arguments, device=device)
    return case, normal_like(case.targets)


def assert_same(found: Result, expected: Result, dtype: torch.dtype) -> None:
    """Equal up to rounding, measured against the size of each gradient as a whole."""
    assert largest_error(found.logps, expected.logps.double()) <= LOGP_ROUNDINGS[dtype]
    for name in ("hidden", "weight", "bias"):
        one, other = getattr(found, name), getattr(expected, name)
        assert (one is None) == (other is None), name
        if one is None or not one.numel():
            continue
        # An entry that cancels keeps the rounding of its terms: they are of the size of the largest entries.
        size = max(other.double().abs().max().item(), 1e-3)
        assert largest_error(one, other.double()) <= ROUNDINGS[dtype] * size, name


@SETTINGS
@given(arguments=cases(), scratch=st.integers(1 << 13, 1 << 17), keep=st.sampled_from([0, 3000, True]))
def test_the_plan_changes_nothing(arguments: dict[str, Any], scratch: int, keep: int, device: torch.device) -> None:
    """Chunk size, block size, what is kept: the same numbers beyond rounding."""
    case, upstream = build(arguments, device)
    expected = evaluate(linear_logps, case, upstream)
    try:
        found = evaluate(linear_logps, case, upstream, plan=Plan(scratch, keep_logit_grads=keep))
    except ScratchTooSmall:
        assume(False)
    assert_same(found, expected, case.hidden.dtype)


@SETTINGS
@given(arguments=cases(), padding=st.integers(1, 7), left=st.booleans())
def test_padding_changes_nothing(arguments: dict[str, Any], padding: int, left: bool, device: torch.device) -> None:
    """Ignored places, to the left or right, whatever stands in them."""
    case, upstream = build(arguments, device)
    batch, length = case.targets.shape
    total = length + padding
    place = slice(padding, None) if left else slice(0, length)
    hidden = case.hidden.new_full((batch, total, case.hidden.shape[-1]), torch.nan)
    targets = case.targets.new_full((batch, total), IGNORED)
    wide_upstream = upstream.new_ones(batch, total)
    hidden[:, place], targets[:, place], wide_upstream[:, place] = case.hidden, case.targets, upstream
    padded = evaluate(linear_logps, dataclasses.replace(case, hidden=hidden, targets=targets), wide_upstream)
    outside = torch.ones(total, dtype=torch.bool, device=device)
    outside[place] = False
    assert (padded.logps[:, outside] == 0).all()
    assert (padded.hidden[:, outside] == 0).all()
    found = dataclasses.replace(padded, logps=padded.logps[:, place], hidden=padded.hidden[:, place])
    assert_same(found, evaluate(linear_logps, case, upstream), case.hidden.dtype)


@SETTINGS
@given(arguments=cases(), seed=st.integers(0, 1000))
def test_token_order_changes_nothing(arguments: dict[str, Any], seed: int, device: torch.device) -> None:
    case, upstream = build(arguments, device)
    hidden, targets, flat = case.hidden.flatten(0, 1), case.targets.flatten(), upstream.flatten()
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed)).to(device)
    back = order.argsort()
    shuffled = evaluate(
        linear_logps, dataclasses.replace(case, hidden=hidden[order], targets=targets[order]), flat[order]
    )
    found = dataclasses.replace(
        shuffled,
        logps=shuffled.logps[back].view_as(case.targets),
        hidden=shuffled.hidden[back].view_as(case.hidden),
    )
    assert_same(found, evaluate(linear_logps, case, upstream), case.hidden.dtype)


@SETTINGS
@given(arguments=cases((torch.float32, torch.float64)), seed=st.integers(0, 1000))
def test_rows_are_a_gather(arguments: dict[str, Any], seed: int, device: torch.device) -> None:
    """`rows` is what indexing hidden first would be, gradients summed. (In bf16, indexing sums in bf16.)"""
    case, _ = build(arguments, device)
    random = torch.Generator().manual_seed(seed)
    rows = torch.randint(case.targets.numel(), (17,), generator=random).to(device)
    targets = torch.randint(case.weight.shape[0], (17,), generator=random).to(device)
    targets[3] = IGNORED
    upstream = normal_like(targets)
    case = dataclasses.replace(case, targets=targets)

    def gathered(hidden: Tensor, *arguments: Any, rows: Tensor, **options: Any) -> Tensor:
        return linear_logps(hidden.flatten(0, 1)[rows], *arguments, **options)

    found = evaluate(linear_logps, dataclasses.replace(case, rows=rows), upstream)
    expected = evaluate(gathered, dataclasses.replace(case, rows=rows), upstream)
    assert_same(found, expected, case.hidden.dtype)


@SETTINGS
@given(arguments=cases(), at=st.integers(0, 5))
def test_a_batch_may_be_split(arguments: dict[str, Any], at: int, device: torch.device) -> None:
    """Parts give the parts' log-probs, and gradients that add up."""
    case, upstream = build(arguments, device)
    whole = evaluate(linear_logps, case, upstream)
    parts = [
        evaluate(
            linear_logps,
            dataclasses.replace(case, hidden=case.hidden[part], targets=case.targets[part]),
            upstream[part],
        )
        for part in (slice(0, at), slice(at, None))
    ]

    def sum_of(name: str) -> Tensor | None:
        one, other = (getattr(part, name) for part in parts)
        return None if one is None else one.double() + other.double()

    found = Result(
        torch.cat([part.logps for part in parts]),
        torch.cat([part.hidden for part in parts if part.hidden is not None]),
        sum_of("weight"),
        sum_of("bias"),
    )
    # Each part's sum is rounded, and they may cancel: the sizes are those of the parts.
    size = max(1.0, max(part.weight.abs().max().item() for part in parts if part.weight is not None))
    dtype = case.hidden.dtype
    assert largest_error(whole.weight, found.weight) <= ROUNDINGS[dtype] * size
    assert_same(dataclasses.replace(found, weight=whole.weight, bias=whole.bias), whole, dtype)


@SETTINGS
@given(arguments=cases((torch.float32, torch.float64)), shift=st.sampled_from([-20.0, -0.5, 3.0, 64.0]))
def test_a_constant_on_every_logit_changes_nothing(
    arguments: dict[str, Any], shift: float, device: torch.device
) -> None:
    """softmax does not see it: given by the bias, with or without a scale. (A soft-cap does see it.)"""
    arguments = arguments | {"bias": True, "softcap": None}
    case, upstream = build(arguments, device)
    expected = evaluate(linear_logps, case, upstream)
    assert case.bias is not None
    found = evaluate(linear_logps, dataclasses.replace(case, bias=case.bias + shift), upstream)
    # The logits are rounded at their new size.
    eps = torch.finfo(case.hidden.dtype).eps
    bound = 16 * eps * (1 + abs(shift) * abs(case.logit_scale))
    assert largest_error(found.logps, expected.logps.double()) <= bound + LOGP_ROUNDINGS[case.hidden.dtype]
    for name in ("hidden", "weight", "bias"):
        one, other = getattr(found, name), getattr(expected, name).double()
        assert largest_error(one, other) <= (bound + ROUNDINGS[case.hidden.dtype]) * max(other.abs().max().item(), 1e-3)


@SETTINGS
@given(arguments=cases())
def test_logps_are_those_of_probabilities(arguments: dict[str, Any], device: torch.device) -> None:
    """Never above 0, and over all targets their exponentials add up to 1; gradients over all add up to 0."""
    case, _ = build(arguments, device)
    v = case.weight.shape[0]
    hidden = case.hidden.flatten(0, 1)[:1].expand(v, -1)
    everything = dataclasses.replace(case, hidden=hidden, targets=torch.arange(v, device=device))
    found = evaluate(linear_logps, everything)
    assert (found.logps <= 0).all()
    total = found.logps.double().exp().sum().item()
    assert total == pytest.approx(1.0, abs=1e-12 if case.hidden.dtype == torch.float64 else 2e-5)
    # sum_y p_y dlogp_y/dh = 0.
    weighted = evaluate(linear_logps, everything, found.logps.double().exp())
    size = found.hidden.double().abs().max().item() if found.hidden is not None else 0.0
    bound = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1.6e-2}[case.hidden.dtype]
    assert weighted.hidden.double().sum(0).abs().max().item() <= bound * size + 1e-12


@SETTINGS
@given(arguments=cases((torch.float32, torch.bfloat16)), power=st.integers(-6, 6))
def test_scaling_hidden_is_scaling_the_logits(arguments: dict[str, Any], power: int, device: torch.device) -> None:
    """logit_scale=s equals s times hidden and bias, to the bit for powers of two; so does its gradient, times s."""
    arguments = arguments | {"largest": 1.0}
    case, upstream = build(arguments, device)
    scale = 2.0**power
    by_scale = evaluate(linear_logps, dataclasses.replace(case, logit_scale=case.logit_scale * scale), upstream)
    scaled = dataclasses.replace(
        case, hidden=case.hidden * scale, bias=None if case.bias is None else case.bias * scale
    )
    by_hidden = evaluate(linear_logps, scaled, upstream)
    expected = dataclasses.replace(by_hidden, hidden=by_hidden.hidden * scale)
    if case.bias is not None and by_hidden.bias is not None:
        expected = dataclasses.replace(expected, bias=by_hidden.bias * scale)
    assert_same(by_scale, expected, case.hidden.dtype)


@SETTINGS
@given(arguments=cases(), seed=st.integers(0, 1000))
def test_vocabulary_order_changes_nothing(arguments: dict[str, Any], seed: int, device: torch.device) -> None:
    """Rows of the weight in another order, with the targets renamed: the weight gradient moves along."""
    case, upstream = build(arguments, device)
    order = torch.randperm(case.weight.shape[0], generator=torch.Generator().manual_seed(seed)).to(device)
    back = order.argsort()
    renamed = torch.where(case.targets == IGNORED, IGNORED, back[case.targets.clamp_min(0)])
    moved = dataclasses.replace(
        case, weight=case.weight[order], targets=renamed, bias=None if case.bias is None else case.bias[order]
    )
    shuffled = evaluate(linear_logps, moved, upstream)
    found = dataclasses.replace(
        shuffled,
        weight=shuffled.weight[back],
        bias=None if shuffled.bias is None else shuffled.bias[back],
    )
    assert_same(found, evaluate(linear_logps, case, upstream), case.hidden.dtype)


@SETTINGS
@given(arguments=cases(), keep=st.booleans())
def test_twice_the_same_bits(arguments: dict[str, Any], keep: bool, device: torch.device) -> None:
    case, upstream = build(arguments, device)
    rows = torch.arange(case.targets.numel(), device=device).view_as(case.targets) // 2
    case = dataclasses.replace(case, rows=rows)
    one, other = (evaluate(linear_logps, case, upstream, plan=Plan(keep_logit_grads=keep)) for _ in range(2))
    for name in ("logps", "hidden", "weight", "bias"):
        a, b = getattr(one, name), getattr(other, name)
        assert a is b is None or torch.equal(a, b), name


@SETTINGS
@given(arguments=cases((torch.float64, torch.float32)), seed=st.integers(0, 1000), padding=st.integers(0, 4))
def test_pairs_in_any_order_and_padding_give_the_same_loss(
    arguments: dict[str, Any], seed: int, padding: int, device: torch.device
) -> None:
    """`orpo_loss` of shuffled, padded pairs."""
    pairs, length = arguments["shape"]
    case = make_case(**(arguments | {"shape": (2 * pairs, length), "ignored": 0.0}), device=device)
    options: dict[str, Any] = {"bias": case.bias, "logit_scale": case.logit_scale, "softcap": case.softcap}
    order = torch.randperm(pairs, generator=torch.Generator().manual_seed(seed)).to(device)
    rows = torch.cat([order, order + pairs])
    hidden = torch.nn.functional.pad(case.hidden[rows], (0, 0, 0, padding), value=1.0)
    targets = torch.nn.functional.pad(case.targets[rows], (0, padding), value=IGNORED)
    expected = orpo_loss(case.hidden, case.weight, case.targets, **options)
    found = orpo_loss(hidden, case.weight, targets, **options)
    # V = 1: every answer is sure, and the bounded odds are of a size of their own.
    rtol = 1e-10 if case.hidden.dtype == torch.float64 else 2e-4
    torch.testing.assert_close(found.loss, expected.loss, rtol=rtol, atol=1e-6)
    torch.testing.assert_close(found.chosen_logps, expected.chosen_logps[order], rtol=1e-5, atol=1e-5)


@SETTINGS
@given(arguments=cases((torch.float32,)))
def test_fp32_is_near_float64(arguments: dict[str, Any], device: torch.device) -> None:
    """Any shape and head: log-probs as near as their logits' rounding lets them be.

    Of a cap that is far exceeded, the slope 1 - tanh^2 keeps few digits, here as in PyTorch.
    """
    if "softcap" in arguments:
        arguments = arguments | {"softcap": 30.0}
    case, upstream = build(arguments, device)
    exact, found = evaluate_exact(case, upstream), evaluate(linear_logps, case, upstream)
    assert largest_error(found.logps, exact.logps) <= LOGP_ROUNDINGS[torch.float32]
    for name in ("hidden", "weight", "bias"):
        truth = getattr(exact, name)
        if truth is not None:
            size = max(truth.abs().max().item(), 1e-3)
            assert largest_error(getattr(found, name), truth) <= 2e-5 * size, name
