"""`linear_logps` against float64 full logits: the numbers, every shape and dtype, and what it refuses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from reference import (
    FLOATS,
    GRADIENT_BOUND,
    IGNORED,
    Case,
    assert_gradients_match,
    assert_logps_match,
    evaluate,
    evaluate_exact,
    exact_logps,
    grad_of,
    largest_error,
    make_case,
    normal_like,
    relative_error,
    row_errors,
    torch_logps,
)
from torch import Tensor

from orpo_kernels import Plan, linear_logps, shift_labels
from orpo_kernels.kernels import torch_products
from orpo_kernels.odds_ratio import log1mexp

HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"logit_scale": 0.0625},
    "negative scale": {"logit_scale": -2.0},
    "softcap": {"softcap": 5.0},
    "bias, scale": {"bias": True, "logit_scale": 0.0625},
    "bias, softcap": {"bias": True, "softcap": 5.0},
    "scale, softcap": {"logit_scale": 0.0625, "softcap": 5.0},
    "bias, scale, softcap": {"bias": True, "logit_scale": 0.0625, "softcap": 5.0},
}


@pytest.fixture
def mixed_products(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.dtype]]:
    """A CPU that has GPUs' product of 16-bit operands with fp32 results; the dtypes it was asked for.

    The operands' rounding is what matters, so a product that was handed wider ones fails.
    """
    seen: list[torch.dtype] = []
    real = torch.mm

    def mm(a: Tensor, b: Tensor, *, out_dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        if out_dtype is None:
            return real(a, b, **options)
        assert a.dtype == b.dtype
        assert a.dtype.itemsize == 2
        seen.append(a.dtype)
        return real(a.to(out_dtype), b.to(out_dtype))

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch_products, "has_mixed_product", lambda device, dtype: True)
    yield seen
    assert seen


# ---------------------------------------------------------------------------- the reference itself


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_reference_is_log_softmax_of_the_logits(head: dict[str, Any], device: torch.device) -> None:
    case = make_case((3, 5), 16, 40, torch.float64, device, **head)
    upstream = normal_like(case.targets)
    ours, plain = evaluate_exact(case, upstream), evaluate(torch_logps, case, upstream)
    torch.testing.assert_close(ours.logps, plain.logps, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(ours.hidden, plain.hidden, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(ours.weight, plain.weight, rtol=1e-12, atol=1e-13)


# ---------------------------------------------------------------------------- every dtype and head


@pytest.mark.parametrize("keep", [False, True], ids=["recomputed", "kept"])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_logps_and_gradients(dtype: torch.dtype, head: dict[str, Any], keep: bool, device: torch.device) -> None:
    case = make_case((4, 16), 96, 1000, dtype, device, **head)
    upstream = normal_like(case.targets)
    found = evaluate(linear_logps, case, upstream, plan=Plan(keep_logit_grads=keep))
    assert_logps_match(case, found.logps)
    assert_gradients_match(case, found, upstream)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_on_a_cpu_the_hidden_gradient_is_rounded_once(dtype: torch.dtype) -> None:
    """Nearly every number is the float64 one's nearest neighbour; a second rounding would move a third of them."""
    case = make_case((4, 16), 96, 1000, dtype, torch.device("cpu"))
    upstream = normal_like(case.targets)
    nearest = evaluate_exact(case, upstream).hidden.to(dtype)
    found = evaluate(linear_logps, case, upstream).hidden
    assert (found == nearest).double().mean() > 0.99


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_frozen_head(dtype: torch.dtype, head: dict[str, Any], device: torch.device) -> None:
    case = make_case((4, 16), 96, 1000, dtype, device, **head)
    upstream = normal_like(case.targets)
    found = evaluate(linear_logps, case, upstream, frozen=("weight", "bias"))
    assert_logps_match(case, found.logps)
    assert_gradients_match(case, found, upstream, frozen=("weight", "bias"))


@pytest.mark.parametrize("keep", [False, True], ids=["recomputed", "kept"])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_of_16_bit_operands(
    dtype: torch.dtype, head: dict[str, Any], keep: bool, mixed_products: list[torch.dtype]
) -> None:
    """The way of the torch backend on GPUs: exponentials and gradient operands are rounded before a product."""
    case = make_case((4, 16), 96, 1000, dtype, torch.device("cpu"), **head)
    upstream = normal_like(case.targets)
    found = evaluate(linear_logps, case, upstream, plan=Plan(keep_logit_grads=keep))
    assert_logps_match(case, found.logps)
    assert_gradients_match(case, found, upstream)
    assert set(mixed_products) == {dtype}


# ---------------------------------------------------------------------------- cases.md, Numbers


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_bf16_logits_up_to_32(softcap: float | None, device: torch.device) -> None:
    """bf16 inputs: log-probs within 1e-4 of float64 on the same values (bf16 logits are 0.04 off)."""
    case = make_case((8, 32), 256, 2000, torch.bfloat16, device, largest=32.0, softcap=softcap)
    assert_logps_match(case, evaluate(linear_logps, case).logps, bound=1e-4)
    assert largest_error(evaluate(torch_logps, case).logps, evaluate_exact(case).logps) > 1e-2


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float16, torch.float32], ids=str)
def confident(request: pytest.FixtureRequest, device: torch.device) -> tuple[Case, Any]:
    """Hidden rows along their targets' own rows of the weight, from 1 - p about 0.5 down to 1e-10."""
    case = make_case((256,), 256, 1000, request.param, device, ignored=0.0, largest=1.0)
    own = case.weight[case.targets].double()
    length = torch.linspace(5, 36, 256, dtype=torch.float64, device=device)[:, None]
    hidden = own * length / own.square().sum(1, keepdim=True)
    case = dataclasses.replace(case, hidden=hidden.to(request.param))
    exact = evaluate_exact(case)
    one_minus_p = -torch.expm1(exact.logps)
    assert one_minus_p.max() > 0.4
    assert one_minus_p.min() < 1e-10
    return case, exact


def test_confident_tokens_hidden_gradient(confident: tuple[Case, Any]) -> None:
    """confident tokens: every row of the hidden gradient within 5e-3; fp16 as far as its range holds it."""
    case, exact = confident
    dtype = case.hidden.dtype
    found = evaluate(linear_logps, case, frozen=("weight",)).hidden
    # fp16's grid below 6e-5 has this half step, in each of D entries.
    step = 2.0**-25 * math.sqrt(found.shape[1]) if dtype == torch.float16 else 0.0
    bound = 5e-3 if dtype.itemsize == 2 else 2e-5
    error = (found.double() - exact.hidden).norm(dim=1)
    assert (error <= bound * exact.hidden.norm(dim=1) + step).all()


@pytest.mark.parametrize("keep", [False, True], ids=["recomputed", "kept"])
def test_confident_tokens_scaled_loss(confident: tuple[Case, Any], keep: bool) -> None:
    """confident tokens, each row weighted so that its gradient is of ordinary size: weight and bias too."""
    case, exact = confident
    upstream = (1 / -torch.expm1(exact.logps)).clamp(max=1e9)
    exact = evaluate_exact(case, upstream)
    found = evaluate(linear_logps, case, upstream, plan=Plan(keep_logit_grads=keep))
    bound = 5e-3 if case.hidden.dtype.itemsize == 2 else 2e-5
    assert row_errors(found.hidden, exact.hidden).max() <= bound
    assert relative_error(found.weight, exact.weight) <= bound


def test_confident_tokens_logps_and_odds(confident: tuple[Case, Any]) -> None:
    """confident tokens: the log-prob is right relatively, and the log-odds are finite and right."""
    case, exact = confident
    logps = linear_logps(case.hidden, case.weight, case.targets)
    assert ((logps.double() / exact.logps - 1).abs() <= 2e-5).all()
    log_odds = (logps - log1mexp(logps)).double()
    assert torch.isfinite(log_odds).all()
    exact_odds = exact.logps - torch.log(-torch.expm1(exact.logps))
    torch.testing.assert_close(log_odds, exact_odds, rtol=1e-5, atol=1e-5)


def test_many_chunks(device: torch.device) -> None:
    """many chunks: the bf16 weight gradient of 256 pairs in 256 chunks is as near as that of one chunk."""
    pairs, length, d, v = 256, 4, 16, 16
    case = make_case((2 * pairs, length), d, v, torch.bfloat16, device, ignored=0.0, largest=2.0)
    n = case.targets.numel()

    def chunk(plan: Plan) -> int:
        return plan.schedule(n, d, v, torch.bfloat16, device, train_weight=True).backward_chunk

    bytes_for_one = 4 << 20
    plan = Plan(scratch_bytes=bytes_for_one)
    while chunk(plan) > n // 256:
        assert plan.scratch_bytes is not None
        plan = Plan(scratch_bytes=plan.scratch_bytes * 15 // 16)
    whole = Plan(scratch_bytes=64 << 20)
    assert chunk(whole) == n

    exact = evaluate_exact(case).weight
    one = relative_error(evaluate(linear_logps, case, plan=whole).weight, exact)
    many = relative_error(evaluate(linear_logps, case, plan=plan).weight, exact)
    assert one <= GRADIENT_BOUND[torch.bfloat16]
    assert many <= 1.05 * one


@pytest.mark.parametrize("hidden_size", [64, 512, 1024, 4096])
def test_bias_at_every_hidden_size(hidden_size: int, device: torch.device) -> None:
    """bias: counted once, however many blocks the inner dimension has."""
    case = make_case((12,), hidden_size, 300, torch.float32, device, bias=True, ignored=0.0)
    upstream = normal_like(case.targets)
    found = evaluate(linear_logps, case, upstream)
    assert_logps_match(case, found.logps)
    assert_gradients_match(case, found, upstream)


RAGGED = [(v, d, n) for v in (1, 2, 1000, 1280) for d in (1, 7, 96, 576) for n in (1, 5)]
RAGGED += [(v, d, n) for v in (50257, 128256) for d in (1, 7) for n in (1, 5)] + [(50257, 96, 1)]


@pytest.mark.parametrize(("vocab_size", "hidden_size", "tokens"), RAGGED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ragged_vocabulary(
    vocab_size: int, hidden_size: int, tokens: int, dtype: torch.dtype, device: torch.device
) -> None:
    """ragged vocabulary: no entry beyond V is counted, none before it is missed."""
    case = make_case((tokens,), hidden_size, vocab_size, dtype, device, ignored=0.0, largest=4.0)
    # The last entry must be among those that can be missed.
    case.targets[0] = vocab_size - 1
    upstream = normal_like(case.targets)
    found = evaluate(linear_logps, case, upstream)
    assert_logps_match(case, found.logps)
    if vocab_size == 1:
        assert (found.logps == 0).all()
        assert (found.hidden == 0).all()
        assert (found.weight == 0).all()
        return
    if hidden_size == tokens == 1 and dtype == torch.float32:
        # The BLAS adds up a product of one entry term by term: roundings walk at random over V steps.
        exact = evaluate_exact(case, upstream)
        bound = 4 * torch.finfo(dtype).eps * vocab_size**0.5
        assert relative_error(found.hidden, exact.hidden) <= bound
        assert relative_error(found.weight, exact.weight) <= bound
        return
    assert_gradients_match(case, found, upstream)


@pytest.mark.parametrize("coefficient", [1.0, 1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("products", ["wide", "mixed"])
def test_tiny_coefficients_in_fp16(
    coefficient: float, products: str, device: torch.device, request: pytest.FixtureRequest
) -> None:
    """tiny probabilities: what fp16 can hold of a gradient is there, for coefficients down to 1e-6."""
    if products == "mixed" and device.type == "cpu":
        request.getfixturevalue("mixed_products")
    case = make_case((256,), 64, 100, torch.float16, device, ignored=0.0, bias=True, largest=4.0)
    upstream = torch.full_like(case.targets, coefficient, dtype=torch.float64)
    exact, found = evaluate_exact(case, upstream), evaluate(linear_logps, case, upstream)
    for name in ("hidden", "weight", "bias"):
        gradient, truth = getattr(found, name), getattr(exact, name)
        step = 2.0**-25 * math.sqrt(truth.numel())
        error = (gradient.double() - truth).norm()
        assert error <= GRADIENT_BOUND[torch.float16] * truth.norm() + step, name
        assert (gradient[truth.abs() > 2.0**-24] != 0).all(), name


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, 30.0), (0.0625, None), (0.0625, 30.0), (-1.0, 30.0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_softcap_and_scale_at_logits_of_100(
    dtype: torch.dtype, scale: float, softcap: float | None, bias: bool, device: torch.device
) -> None:
    """soft-cap and scale: logits of ±100 before the cap of 30."""
    case = make_case((8, 16), 64, 500, dtype, device, bias=bias, largest=100.0, logit_scale=scale, softcap=softcap)
    upstream = normal_like(case.targets)
    found = evaluate(linear_logps, case, upstream)
    assert_logps_match(case, found.logps)
    assert_gradients_match(case, found, upstream)


def test_large_offsets(device: torch.device) -> None:
    """large offsets: row index times row stride beyond 2^31, in both operands of the product.

    Only the pages that hold the rows are ever touched.
    """
    stride, d, v = (1 << 30) + 64, 32, 3
    store = torch.empty(2 * stride + 4 * d, dtype=torch.bfloat16, device=device)
    small = make_case((3,), d, v, torch.bfloat16, device, ignored=0.0, bias=True)
    hidden = store.as_strided((3, d), (stride, 1)).copy_(small.hidden)
    weight = store.as_strided((v, d), (stride, 1), 2 * d).copy_(small.weight)
    assert 2 * hidden.stride(0) > 2**31

    leaves = [x.detach().requires_grad_() for x in (hidden, weight, small.bias) if x is not None]
    logps = linear_logps(leaves[0], leaves[1], small.targets, bias=leaves[2])
    logps.sum().backward()
    expected = evaluate(linear_logps, small)
    assert torch.equal(logps.detach(), expected.logps)
    for leaf, gradient in zip(leaves, (expected.hidden, expected.weight, expected.bias), strict=True):
        assert torch.equal(grad_of(leaf), gradient)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_broken_row_shows_and_stays_in_its_row(bad: float, dtype: torch.dtype, device: torch.device) -> None:
    """NaN or inf in one row of hidden: its log-prob and gradient are NaN, and no other row's."""
    case = make_case((6, 4), 32, 50, dtype, device, ignored=0.0)
    clean = evaluate(linear_logps, case, frozen=("weight",))
    case.hidden[2, 1, 5] = bad
    found = evaluate(linear_logps, case, frozen=("weight",))
    broken = torch.zeros(6, 4, dtype=torch.bool, device=device)
    broken[2, 1] = True
    assert torch.equal(found.logps.isnan(), broken)
    assert torch.equal(found.logps[~broken], clean.logps[~broken])
    assert torch.equal(found.hidden.isnan().all(-1), broken)
    assert torch.equal(found.hidden[~broken], clean.hidden[~broken])


@pytest.mark.parametrize("vocab_size", [1, 2])
def test_an_infinite_target_logit_is_not_certainty(vocab_size: int, device: torch.device) -> None:
    """NaN or inf: +inf for the target with -inf for every competitor is broken, not p = 1."""
    hidden = torch.tensor([[math.inf, 1.0]], device=device, requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], device=device)[:vocab_size]
    logps = linear_logps(hidden, weight, torch.tensor([0], device=device))
    assert logps.isnan().all()
    logps.sum().backward()
    assert grad_of(hidden).isnan().any()


def test_entries_banned_by_an_infinite_bias(device: torch.device) -> None:
    """A bias of -inf takes an entry out of the vocabulary, also where it fills whole blocks."""
    case = make_case((20,), 16, 3000, torch.float32, device, bias=True, ignored=0.0)
    assert case.bias is not None
    keep = torch.arange(3000, device=device) >= 2500
    case.targets.clamp_(min=2500)
    case.bias[~keep] = -math.inf
    smaller = dataclasses.replace(case, weight=case.weight[keep], bias=case.bias[keep], targets=case.targets - 2500)
    exact, found = evaluate_exact(smaller), evaluate(linear_logps, case)
    assert largest_error(found.logps, exact.logps) <= 2e-6
    assert relative_error(found.hidden, exact.hidden) <= 5e-7
    assert relative_error(found.weight[keep], exact.weight) <= 5e-7
    assert (found.weight[~keep] == 0).all()


@pytest.mark.parametrize("keep", [False, True], ids=["recomputed", "kept"])
def test_every_competitor_banned(keep: bool, device: torch.device) -> None:
    """Only the target is left: log-prob 0 and no gradient, as with V = 1."""
    case = make_case((5,), 16, 6, torch.float32, device, bias=True, ignored=0.0)
    assert case.bias is not None
    case.targets.fill_(4)
    case.bias[torch.arange(6, device=device) != 4] = -math.inf
    found = evaluate(linear_logps, case, plan=Plan(keep_logit_grads=keep))
    for name in ("logps", "hidden", "weight", "bias"):
        assert (getattr(found, name) == 0).all(), name


# ---------------------------------------------------------------------------- shapes and dtypes


@pytest.mark.parametrize("shape", [(), (7,), (2, 3), (2, 3, 4), (0,), (2, 0)], ids=str)
def test_any_leading_shape(shape: tuple[int, ...], device: torch.device) -> None:
    case = make_case(shape, 8, 20, torch.float32, device)
    found = evaluate(linear_logps, case)
    assert found.logps.shape == shape
    assert_logps_match(case, found.logps) if found.logps.numel() else None
    assert found.hidden.shape == (*shape, 8)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
def test_integer_targets(dtype: torch.dtype, device: torch.device) -> None:
    case = make_case((9,), 8, 20, torch.float32, device, ignored=0.0)
    expected = linear_logps(case.hidden, case.weight, case.targets)
    assert torch.equal(linear_logps(case.hidden, case.weight, case.targets.to(dtype)), expected)


def test_ignored_places_are_zero_and_need_no_valid_hidden(device: torch.device) -> None:
    case = make_case((4, 9), 8, 20, torch.float32, device, ignored=0.5)
    expected = evaluate(linear_logps, case)
    ignored = case.targets == IGNORED
    case.hidden[ignored] = math.nan
    found = evaluate(linear_logps, case)
    assert torch.equal(found.logps, expected.logps)
    assert (found.logps[ignored] == 0).all()
    assert torch.equal(found.hidden, expected.hidden)
    assert torch.equal(found.weight, expected.weight)


def test_ignore_index_may_be_a_token(device: torch.device) -> None:
    case = make_case((50,), 8, 5, torch.float32, device, ignored=0.0)
    found = linear_logps(case.hidden, case.weight, case.targets, ignore_index=3)
    exact = exact_logps(case.hidden, case.weight, case.targets)
    assert (case.targets == 3).any()
    assert torch.equal(found == 0, case.targets == 3)
    assert largest_error(found, torch.where(case.targets == 3, 0.0, exact)) <= 2e-6


def test_rows_name_the_predicting_rows_in_any_shape(device: torch.device) -> None:
    case = make_case((2, 5), 8, 20, torch.float64, device)
    rows = torch.tensor([[9, 0, 3], [3, 3, 7]], device=device)
    targets = torch.tensor([[1, IGNORED, 19], [0, 19, 4]], device=device)
    case = dataclasses.replace(case, rows=rows, targets=targets)
    upstream = normal_like(targets)
    found = evaluate(linear_logps, case, upstream)
    assert found.logps.shape == (2, 3)
    assert_logps_match(case, found.logps)
    assert_gradients_match(case, found, upstream)
    # Rows that predict nothing scored, row 0 among them, get nothing.
    used = torch.tensor([3, 7, 9], device=device)
    unused = torch.ones(10, dtype=torch.bool, device=device).index_fill(0, used, False)
    assert (found.hidden.view(10, 8)[unused] == 0).all()


def test_rows_at_ignored_places_may_be_anything(device: torch.device) -> None:
    case = make_case((3,), 8, 20, torch.float32, device, ignored=0.0)
    rows = torch.tensor([0, 999, 2], device=device)
    case.targets[1] = IGNORED
    expected = linear_logps(case.hidden, case.weight, case.targets)
    assert torch.equal(linear_logps(case.hidden, case.weight, case.targets, rows=rows), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_inputs(dtype: torch.dtype, device: torch.device) -> None:
    """Sliced rows, transposed operands, every second column: the same numbers as contiguous ones."""
    case = make_case((6, 10), 32, 64, dtype, device, bias=True)
    expected = evaluate(linear_logps, case)
    wide_hidden = torch.stack([case.hidden, case.hidden], -1).requires_grad_()
    wide_weight = case.weight.t().contiguous().requires_grad_()
    assert case.bias is not None
    wide_bias = torch.stack([case.bias, case.bias], -1).requires_grad_()
    targets = torch.stack([case.targets, case.targets], -1)[..., 1]
    logps = linear_logps(wide_hidden[..., 1], wide_weight.t(), targets, bias=wide_bias[:, 0])
    torch.testing.assert_close(logps.detach(), expected.logps, rtol=1e-6, atol=1e-6)
    logps.sum().backward()
    tolerance: dict[str, Any] = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-6}
    torch.testing.assert_close(grad_of(wide_hidden)[..., 1], expected.hidden, **tolerance)
    torch.testing.assert_close(grad_of(wide_weight).t(), expected.weight, **tolerance)
    torch.testing.assert_close(grad_of(wide_bias)[:, 0], expected.bias, **tolerance)
    assert (grad_of(wide_hidden)[..., 0] == 0).all()


@pytest.mark.parametrize("keep", [False, True], ids=["recomputed", "kept"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_same_inputs_same_bits(dtype: torch.dtype, keep: bool, device: torch.device) -> None:
    case = make_case((8, 16), 64, 700, dtype, device, bias=True, softcap=20.0)
    case = dataclasses.replace(case, rows=torch.arange(128, device=device).view(8, 16) // 3)
    results = [evaluate(linear_logps, case, plan=Plan(keep_logit_grads=keep)) for _ in range(3)]
    for other in results[1:]:
        for name in ("logps", "hidden", "weight", "bias"):
            assert torch.equal(getattr(other, name), getattr(results[0], name)), name


def test_inputs_are_left_alone(device: torch.device) -> None:
    case = make_case((8, 16), 64, 700, torch.float32, device, bias=True, softcap=20.0)
    before = {name: getattr(case, name).clone() for name in ("hidden", "weight", "bias", "targets")}
    leaves = [x.requires_grad_() for x in (case.hidden, case.weight, case.bias) if x is not None]
    linear_logps(leaves[0], leaves[1], case.targets, bias=leaves[2], softcap=20.0).sum().backward()
    for name, value in before.items():
        assert torch.equal(getattr(case, name), value), name


# ---------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("target", [20, -5, -101, 2**40])
@pytest.mark.parametrize("with_rows", [False, True])
def test_bad_targets(target: int, with_rows: bool, device: torch.device) -> None:
    """bad targets: V, negative ones and huge ones are named, with their place and the range."""
    case = make_case((2, 5), 8, 20, torch.float32, device)
    case.targets[1, 2] = target
    rows = torch.arange(10, device=device).view(2, 5) if with_rows else None
    message = rf"targets holds {target} at flattened position 7: .*\[0, 20\).*ignore_index=-100"
    with pytest.raises(ValueError, match=message):
        linear_logps(case.hidden, case.weight, case.targets, rows=rows)


@pytest.mark.parametrize("row", [10, -1])
def test_bad_rows(row: int, device: torch.device) -> None:
    case = make_case((2, 5), 8, 20, torch.float32, device, ignored=0.0)
    rows = torch.arange(10, device=device).view(2, 5)
    rows[0, 3] = row
    message = rf"rows holds {row} at flattened position 3: it must name a row .* in \[0, 10\)"
    with pytest.raises(ValueError, match=message):
        linear_logps(case.hidden, case.weight, case.targets, rows=rows)


def _float(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


def _ids(*shape: int, dtype: torch.dtype = torch.int64, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "weight of one dimension": ({"weight": _float(20)}, ValueError, r"weight has shape \(20,\): it must be \[V, D\]"),
    "weight of three dimensions": (
        {"weight": _float(2, 20, 8)},
        ValueError,
        r"weight has shape \(2, 20, 8\): it must be",
    ),
    "hidden and weight of other D": (
        {"hidden": _float(5, 7)},
        ValueError,
        r"hidden has shape \(5, 7\) and weight \(20, 8\): the last size of hidden must be weight's D=8",
    ),
    "hidden without dimensions": ({"hidden": _float()}, ValueError, r"hidden has shape \(\) and weight \(20, 8\)"),
    "no vocabulary": ({"weight": _float(0, 8)}, ValueError, r"weight has shape \(0, 8\): V and D must be at least 1"),
    "no hidden size": (
        {"weight": _float(20, 0), "hidden": _float(5, 0)},
        ValueError,
        r"weight has shape \(20, 0\): V and D must be at least 1",
    ),
    "bias of another size": ({"bias": _float(8)}, ValueError, r"bias has shape \(8,\): it must be \[V\] = \[20\]"),
    "bias of two dimensions": ({"bias": _float(1, 20)}, ValueError, r"bias has shape \(1, 20\): it must be \[V\]"),
    "weight elsewhere": (
        {"weight": _float(20, 8, device="meta")},
        ValueError,
        r"weight is on meta and hidden on cpu: move one to the other's device",
    ),
    "bias elsewhere": (
        {"bias": _float(20, device="meta")},
        ValueError,
        r"bias is on meta and hidden on cpu: move one to the other's device",
    ),
    "targets elsewhere": (
        {"targets": _ids(5, device="meta")},
        ValueError,
        r"targets is on meta and hidden on cpu: move targets there",
    ),
    "scale of zero": ({"logit_scale": 0.0}, ValueError, r"logit_scale=0\.0 must be finite and not 0"),
    "scale of nan": ({"logit_scale": math.nan}, ValueError, r"logit_scale=nan must be finite and not 0"),
    "scale of inf": ({"logit_scale": math.inf}, ValueError, r"logit_scale=inf must be finite and not 0"),
    "softcap of zero": ({"softcap": 0.0}, ValueError, r"softcap=0\.0 must be positive and finite, or None"),
    "softcap below zero": ({"softcap": -30.0}, ValueError, r"softcap=-30\.0 must be positive and finite, or None"),
    "softcap of nan": ({"softcap": math.nan}, ValueError, r"softcap=nan must be positive and finite, or None"),
    "plan of another type": ({"plan": 1 << 20}, TypeError, r"plan=1048576 must be an orpo_kernels\.Plan, or None"),
    "hidden of integers": (
        {"hidden": _ids(5, 8)},
        TypeError,
        r"hidden has dtype torch\.int64: it must be float64, float32, bfloat16 or float16",
    ),
    "weight of 8 bits": (
        {"weight": _float(20, 8, dtype=torch.float8_e4m3fn)},
        TypeError,
        r"weight has dtype torch\.float8_e4m3fn: it must be float64, float32, bfloat16 or float16",
    ),
    "mixed dtypes": (
        {"weight": _float(20, 8, dtype=torch.bfloat16)},
        TypeError,
        r"mixed dtypes \(hidden torch\.float32, weight torch\.bfloat16\): cast them to one dtype, or run under "
        r"torch\.autocast",
    ),
    "mixed bias": (
        {"bias": _float(20, dtype=torch.float16)},
        TypeError,
        r"mixed dtypes \(.*bias torch\.float16\): cast them to one dtype",
    ),
    "targets of floats": (
        {"targets": _float(5)},
        TypeError,
        r"targets has dtype torch\.float32: it must hold integer token ids \(int64\)",
    ),
    "targets of booleans": (
        {"targets": _ids(5, dtype=torch.bool)},
        TypeError,
        r"targets has dtype torch\.bool: it must hold integer token ids",
    ),
    "targets of another shape": (
        {"targets": _ids(4)},
        ValueError,
        r"targets has shape \(4,\) and hidden \(5, 8\): without `rows`, targets must be shaped like hidden without its "
        r"last size, \(5,\)",
    ),
    "targets of hidden's whole shape": ({"targets": _ids(5, 8)}, ValueError, r"targets has shape \(5, 8\) and hidden"),
    "rows of int32": (
        {"rows": _ids(5, dtype=torch.int32)},
        ValueError,
        r"rows is torch\.int32 \(5,\) on cpu: it must be int64, shaped like targets \(5,\)",
    ),
    "rows of another shape": ({"rows": _ids(4)}, ValueError, r"rows is torch\.int64 \(4,\) on cpu: it must be int64"),
    "rows elsewhere": ({"rows": _ids(5, device="meta")}, ValueError, r"rows is torch\.int64 \(5,\) on meta: .* on cpu"),
}


@pytest.mark.parametrize(("changes", "error", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    """bad input: the error names the argument, its value and what it must be."""
    arguments: dict[str, Any] = {"hidden": _float(5, 8), "weight": _float(20, 8), "targets": _ids(5)}
    linear_logps(**arguments)
    with pytest.raises(error, match=message):
        linear_logps(**(arguments | changes))


def test_float64_has_no_autocast() -> None:
    """Autocast does not touch float64, so it cannot bring float64 and float32 together."""
    hidden, weight, targets = _float(5, 8, dtype=torch.float64), _float(20, 8), _ids(5)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=r"mixed dtypes .*torch\.float64"):
        linear_logps(hidden, weight, targets)


def test_a_plan_too_small_is_an_error(device: torch.device) -> None:
    case = make_case((4,), 64, 100, torch.float32, device)
    with pytest.raises(
        ValueError, match=r"Plan\.scratch_bytes=100 cannot hold one tile for N=\d, D=64, V=100, .*give at least"
    ):
        linear_logps(case.hidden, case.weight, case.targets, plan=Plan(scratch_bytes=100))


# ---------------------------------------------------------------------------- labels


def test_shift_labels() -> None:
    labels = torch.tensor([[5, 6, 7], [IGNORED, 8, 9]])
    kept = labels.clone()
    assert shift_labels(labels).tolist() == [[6, 7, IGNORED], [8, 9, IGNORED]]
    assert torch.equal(labels, kept)
    assert shift_labels(labels[0], ignore_index=-1).tolist() == [6, 7, -1]
    with pytest.raises(ValueError, match=r"labels has shape \(\): shift_labels needs \[\.\.\., T\]"):
        shift_labels(torch.tensor(3))


def test_shifted_labels_give_a_causal_model_s_loss(device: torch.device) -> None:
    """-mean over tokens is what a causal model computes from the same labels."""
    case = make_case((2, 7), 16, 30, torch.float64, device, ignored=0.3)
    labels = case.targets
    targets = shift_labels(labels)
    logps = linear_logps(case.hidden, case.weight, targets)
    logits = case.hidden @ case.weight.t()
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(-logps.sum() / (targets != IGNORED).sum(), expected)
