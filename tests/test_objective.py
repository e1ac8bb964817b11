"""The odds ratio against mpmath, the objective against a loop in float64, empty and broken sequences."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from dataclasses import fields

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from orpo_kernels import pair_sums
from orpo_kernels.objective import (
    CHOSEN,
    PROMPT,
    REJECTED,
    OrpoOutput,
    orpo_from_sums,
    orpo_objective,
    orpo_objective_flat,
)
from orpo_kernels.odds_ratio import ROUNDING, SURE, log1mexp, odds_ratio_loss
from orpo_kernels.pair_sums import PairSums
from orpo_kernels.presets import Preset, get_preset

TRL_METRICS = {
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "nll_loss",
    "log_odds_ratio",
    "log_odds_chosen",
}


@pytest.fixture(autouse=True)
def _no_warning_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orpo_kernels.objective._warned_empty", False)


def odds_ratio_mpmath(chosen: float, rejected: float) -> tuple[mpmath.mpf, ...]:
    """term, log odds ratio, d/dl_w, d/dl_l, from the definition with 80 digits."""
    with mpmath.workdps(80):
        l_w, l_l = mpmath.mpf(chosen), mpmath.mpf(rejected)
        q_w, q_l = -mpmath.expm1(l_w), -mpmath.expm1(l_l)
        log_odds = (l_w - mpmath.log(q_w)) - (l_l - mpmath.log(q_l))
        lost = 1 / (1 + mpmath.exp(log_odds))  # sigmoid(-log_odds)
        return mpmath.log1p(mpmath.exp(-log_odds)), log_odds, -lost / q_w, lost / q_l


def odds_ratio_ours(chosen: float, rejected: float, dtype: torch.dtype) -> tuple[float, ...]:
    l_w = torch.tensor([chosen], dtype=dtype, requires_grad=True)
    l_l = torch.tensor([rejected], dtype=dtype, requires_grad=True)
    term, log_odds = odds_ratio_loss(l_w, l_l)
    term.sum().backward()
    assert l_w.grad is not None
    assert l_l.grad is not None
    return term.item(), log_odds.item(), l_w.grad.item(), l_l.grad.item()


def assert_matches_mpmath(chosen: float, rejected: float, dtype: torch.dtype) -> None:
    """An exponential of x can be no better than x's own rounding: allow some units of it, and no more.

    `term`, and both slopes contain e^(l_w - l_l) and e^(log odds), so their relative error scales with these.
    """
    info = torch.finfo(dtype)
    term, log_odds, slope_w, slope_l = odds_ratio_mpmath(chosen, rejected)
    # The log odds add four numbers of this size.
    size = abs(chosen - rejected) + 2 * (1 + abs(math.log(-math.expm1(chosen))) + abs(math.log(-math.expm1(rejected))))
    for name, ours, exact in zip(
        ("term", "log_odds", "d/dl_w", "d/dl_l"),
        odds_ratio_ours(chosen, rejected, dtype),
        (term, log_odds, slope_w, slope_l),
        strict=True,
    ):
        error = float(abs(mpmath.mpf(ours) - exact))
        bound = info.eps * size if name == "log_odds" else 2 * info.eps * size * float(abs(exact))
        # Below the smallest normal number there is no relative precision left.
        assert error <= bound + info.tiny, f"{name} at ({chosen}, {rejected}): {ours} against {exact}"


# --- one pair -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chosen", [0.0, -1e-8, -1e-4])
def test_sure_chosen_answer_is_finite(chosen: float, dtype: torch.dtype) -> None:
    term, log_odds, slope_w, slope_l = odds_ratio_ours(chosen, -1.0, dtype)
    assert all(map(math.isfinite, (term, log_odds, slope_w, slope_l)))
    assert term >= 0
    assert log_odds > 0
    assert slope_l >= 0
    # Towards l_w = 0 the slope is -p_l / q_l = -0.58198 (to first order in l_w).
    assert slope_w == pytest.approx(-math.exp(-1) / (1 - math.exp(-1)), rel=5 * abs(chosen) + 1e-6)
    assert slope_w == pytest.approx(-0.58198, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rejected", [-1e-4, -1e-8, -1e-20])
def test_sure_rejected_answer_is_large_finite_and_of_the_right_sign(rejected: float, dtype: torch.dtype) -> None:
    rejected = torch.tensor(rejected, dtype=dtype).item()
    term, log_odds, slope_w, slope_l = odds_ratio_ours(-1.0, rejected, dtype)
    assert term == pytest.approx(-math.log(-rejected), rel=0.1)
    assert log_odds == pytest.approx(-term, rel=1e-3)
    assert slope_w == pytest.approx(-1 / (1 - math.exp(-1)), rel=1e-3)
    assert slope_l == pytest.approx(-1 / rejected, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_beyond_the_bound_the_term_and_its_slopes_stay_those_at_the_bound(dtype: torch.dtype) -> None:
    """Where the term diverges (rejected) or is undefined (both): the documented finite value."""
    at_bound = odds_ratio_ours(-1.0, -SURE, dtype)
    assert odds_ratio_ours(-1.0, 0.0, dtype) == odds_ratio_ours(-1.0, ROUNDING / 2, dtype) == at_bound
    assert at_bound[0] <= 1 + 100 * math.log(2)
    assert at_bound[3] == pytest.approx(2.0**100)
    assert odds_ratio_ours(0.0, 0.0, dtype) == pytest.approx((math.log(2), 0, -(2.0**99), 2.0**99))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf, 1.0])
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_value_that_is_no_log_prob_shows_in_its_pair_and_in_no_other(
    side: str, broken: float, dtype: torch.dtype
) -> None:
    values = {name: torch.tensor([-1.0, -2.0, -3.0], dtype=dtype) for name in ("chosen", "rejected")}
    values[side][1] = broken
    l_w, l_l = (values[name].requires_grad_() for name in ("chosen", "rejected"))
    term, log_odds = odds_ratio_loss(l_w, l_l)
    term.sum().backward()
    for tensor in (term, log_odds, l_w.grad, l_l.grad):
        assert tensor is not None
        assert tensor.isnan().tolist() == [False, True, False]


# Through a float32, so that both dtypes get the very value the reference gets.
log_prob = st.floats(-3, 9).map(lambda e: -torch.tensor(1e3 * 10.0**-e, dtype=torch.float32).item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(chosen=log_prob, rejected=log_prob)
@settings(deadline=None, max_examples=150)
def test_odds_ratio_is_exact(dtype: torch.dtype, chosen: float, rejected: float) -> None:
    assert_matches_mpmath(chosen, rejected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("chosen", "rejected"), [(-24.0, -1.0), (-1.0, -24.0), (-300.0, -0.5), (-0.5, -60.0)])
def test_odds_ratio_is_exact_where_the_answers_differ(chosen: float, rejected: float, dtype: torch.dtype) -> None:
    assert_matches_mpmath(chosen, rejected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chosen", [-1e3, -90.0, -1.0, -math.log(2), -1e-6, -1e-25])
@pytest.mark.parametrize("apart", [0.0, 1e-3, -1e-3])
def test_odds_ratio_is_exact_where_the_answers_are_alike(chosen: float, apart: float, dtype: torch.dtype) -> None:
    chosen, rejected = torch.tensor([chosen, chosen * (1 + apart)], dtype=torch.float32).tolist()
    assert_matches_mpmath(chosen, rejected, dtype)


@given(chosen=log_prob, rejected=log_prob)
@settings(deadline=None, max_examples=50)
def test_swapping_the_answers_negates_the_log_odds(chosen: float, rejected: float) -> None:
    term, log_odds, *_ = odds_ratio_ours(chosen, rejected, torch.float64)
    other_term, other_log_odds, *_ = odds_ratio_ours(rejected, chosen, torch.float64)
    assert other_log_odds == -log_odds
    # softplus(x) - softplus(-x) = x
    assert other_term - term == pytest.approx(log_odds, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log1mexp_is_exact_on_both_sides_of_its_split(dtype: torch.dtype) -> None:
    x = -torch.logspace(-30, 1.9, 400, dtype=torch.float64).to(dtype)
    for value, ours in zip(x.tolist(), log1mexp(x).tolist(), strict=True):
        with mpmath.workdps(60):
            exact = mpmath.log(-mpmath.expm1(mpmath.mpf(value)))
        assert abs(ours - exact) <= 2 * torch.finfo(dtype).eps * abs(exact) + torch.finfo(dtype).tiny


def test_odds_ratio_gradcheck() -> None:
    l_w = torch.tensor([-0.01, -0.3, -0.7, -5.0, -40.0], dtype=torch.float64, requires_grad=True)
    l_l = torch.tensor([-1.0, -0.3, -0.02, -6.0, -35.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: odds_ratio_loss(a, b)[0], (l_w, l_l))


def test_odds_ratio_upstream_gradient_scales_each_pair() -> None:
    l_w = torch.tensor([-0.5, -1.0], requires_grad=True)
    term, _ = odds_ratio_loss(l_w, torch.tensor([-1.0, -2.0]))
    (ones,) = torch.autograd.grad(term, l_w, torch.ones(2), retain_graph=True)
    (scaled,) = torch.autograd.grad(term, l_w, torch.tensor([0.125, -2.0]))
    assert torch.equal(scaled, ones * torch.tensor([0.125, -2.0]))


@pytest.mark.parametrize(
    ("chosen", "rejected", "error", "names"),
    [
        (torch.zeros(2).bfloat16(), torch.zeros(2).bfloat16(), TypeError, "chosen_logps is torch.bfloat16"),
        (torch.zeros(2), torch.zeros(2).double(), TypeError, "rejected_logps is torch.float64"),
        (torch.zeros(2), torch.zeros(3), ValueError, r"rejected_logps has shape \[3\], chosen_logps \[2\]"),
    ],
)
def test_odds_ratio_bad_input(chosen: Tensor, rejected: Tensor, error: type[Exception], names: str) -> None:
    with pytest.raises(error, match=names):
        odds_ratio_loss(chosen, rejected)


# --- a batch ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Batch:
    """Log-probs with three tokens' worth of prompt in the chosen rows' NLL."""

    logps: Tensor  # [2B, T]
    completion_mask: Tensor  # [2B, T]
    nll_mask: Tensor  # [B, T]

    @property
    def flat(self) -> tuple[Tensor, Tensor, Tensor, int]:
        """logps, pair, kind, num_pairs: the scored tokens, in the rectangle's order."""
        num_pairs = len(self.nll_mask)
        row = torch.arange(2 * num_pairs)[:, None].expand_as(self.completion_mask)
        kind = torch.where(row >= num_pairs, REJECTED, torch.where(self.completion_mask, CHOSEN, PROMPT))
        scored = self.completion_mask.clone()
        scored[:num_pairs] |= self.nll_mask
        return self.logps[scored], (row % num_pairs)[scored], kind[scored], num_pairs


def make_batch(seed: int = 0, num_pairs: int = 3, dtype: torch.dtype = torch.float64, length: int = 9) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    logps = -3 * torch.rand(2 * num_pairs, length, generator=generator, dtype=torch.float64)
    position = torch.arange(length)
    start = torch.randint(1, length - 2, (num_pairs, 1), generator=generator).repeat(2, 1)
    end = torch.minimum(start + torch.randint(1, length, (2 * num_pairs, 1), generator=generator), torch.tensor(length))
    return Batch(
        logps.to(dtype).requires_grad_(),
        (position >= start) & (position < end),
        position < end[:num_pairs],
    )


def by_loop(batch: Batch, preset: Preset, beta: float) -> dict[str, float]:
    """The objective in Python floats, pair by pair, token by token."""
    num_pairs = len(batch.nll_mask)
    logps = batch.logps.tolist()

    def tokens(row: int, mask: Tensor) -> list[float]:
        return [x for x, scored in zip(logps[row], mask.tolist(), strict=True) if scored]

    nll_mask = batch.completion_mask[:num_pairs] if preset.nll_over == "chosen" else batch.nll_mask
    nll = [tokens(row, nll_mask[row]) for row in range(num_pairs)]
    if preset.nll_mean == "tokens":
        nll_loss = -sum(map(sum, nll)) / sum(map(len, nll))
    else:
        nll_loss = -sum(sum(row) / len(row) for row in nll) / num_pairs
    pairs = []
    for row in range(num_pairs):
        chosen = tokens(row, batch.completion_mask[row])
        rejected = tokens(row + num_pairs, batch.completion_mask[row + num_pairs])
        l_w, l_l = sum(chosen) / len(chosen), sum(rejected) / len(rejected)
        term, log_odds, *_ = map(float, odds_ratio_mpmath(l_w, l_l))
        pairs.append((l_w, l_l, term, log_odds))
    mean_w, mean_l, mean_term, mean_log_odds = (sum(column) / num_pairs for column in zip(*pairs, strict=True))
    return {
        "loss": preset.nll_weight * nll_loss + beta * mean_term,
        "rewards/chosen": beta * mean_w,
        "rewards/rejected": beta * mean_l,
        "rewards/accuracies": sum(l_w > l_l for l_w, l_l, *_ in pairs) / num_pairs,
        "rewards/margins": beta * (mean_w - mean_l),
        "logps/chosen": mean_w,
        "logps/rejected": mean_l,
        "nll_loss": nll_loss,
        "log_odds_ratio": -mean_term,
        "log_odds_chosen": mean_log_odds,
    }


def rectangle(batch: Batch, preset: str | Preset | None = None, **options: object) -> OrpoOutput:
    nll_mask = None if get_preset(preset).nll_over == "chosen" else batch.nll_mask
    return orpo_objective(batch.logps, batch.completion_mask, None, nll_mask, preset=preset, **options)


def flat(batch: Batch, preset: str | Preset | None = None, **options: object) -> OrpoOutput:
    logps, pair, kind, num_pairs = batch.flat
    return orpo_objective_flat(logps, pair, kind, num_pairs=num_pairs, preset=preset, **options)


LAYOUTS = pytest.mark.parametrize("layout", [rectangle, flat])
Layout = Callable[..., OrpoOutput]


@LAYOUTS
@pytest.mark.parametrize(
    "preset",
    ["trl", "llama_factory", "paper", None, Preset("mine", "chosen", "tokens", nll_weight=1.5)],
    ids=str,
)
@given(seed=st.integers(0, 999), num_pairs=st.integers(1, 5), beta=st.floats(0, 2))
@settings(deadline=None, max_examples=20)
def test_objective_and_metrics_equal_a_loop(
    layout: Layout, preset: str | Preset | None, seed: int, num_pairs: int, beta: float
) -> None:
    batch = make_batch(seed, num_pairs)
    output = layout(batch, preset, beta=beta)
    expected = by_loop(batch, get_preset(preset), beta)
    ours = {"loss": output.loss, **output.metrics()}
    assert {name: value.item() for name, value in ours.items()} == pytest.approx(expected, rel=1e-12, abs=1e-14)
    assert torch.equal(output.odds_ratio_loss, -output.log_odds_ratio)
    assert int(output.valid_pairs) == num_pairs


@LAYOUTS
@pytest.mark.parametrize("preset", ["trl", "llama_factory", "paper"])
def test_objective_gradcheck(layout: Layout, preset: str) -> None:
    batch = make_batch(5)

    def loss(logps: Tensor) -> Tensor:
        return layout(dataclasses.replace(batch, logps=logps), preset).loss

    assert torch.autograd.gradcheck(loss, batch.logps)


@LAYOUTS
def test_fp32_is_no_worse_than_twice_plain_pytorch_in_fp32(layout: Layout) -> None:
    """The judge is fp64 on the same values; the other party is autograd over the textbook formula."""
    ours, plain = 0.0, 0.0
    for seed in range(50):
        batch = make_batch(seed, num_pairs=8, dtype=torch.float32, length=200)
        exact = dataclasses.replace(batch, logps=batch.logps.detach().double().requires_grad_())
        (reference,) = torch.autograd.grad(rectangle(exact, "trl").loss, exact.logps)
        (gradient,) = torch.autograd.grad(layout(batch, "trl").loss, batch.logps)
        mean = torch.where(batch.completion_mask, batch.logps, 0).sum(-1) / batch.completion_mask.sum(-1)
        log_odds = mean - torch.log1p(-torch.exp(mean))
        term = -torch.nn.functional.logsigmoid(log_odds[:8] - log_odds[8:]).mean()
        nll = -torch.where(batch.nll_mask, batch.logps[:8], 0).sum() / batch.nll_mask.sum()
        (textbook,) = torch.autograd.grad(nll + 0.1 * term, batch.logps)
        ours = max(ours, float((gradient - reference).norm() / reference.norm()))
        plain = max(plain, float((textbook - reference).norm() / reference.norm()))
    assert ours <= 2 * plain, (ours, plain)


@given(seed=st.integers(0, 999))
@settings(deadline=None, max_examples=20)
def test_flat_tokens_may_come_in_any_order(seed: int) -> None:
    logps, pair, kind, num_pairs = make_batch(seed).flat
    order = torch.randperm(len(logps), generator=torch.Generator().manual_seed(seed))
    output = orpo_objective_flat(logps, pair, kind, num_pairs=num_pairs, preset="trl")
    shuffled = orpo_objective_flat(logps[order], pair[order], kind[order], num_pairs=num_pairs, preset="trl")
    torch.testing.assert_close(shuffled.loss, output.loss, rtol=1e-14, atol=0)


def test_flat_sums_segment_by_segment_beyond_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch(3)
    (at_once,) = torch.autograd.grad(flat(batch, "trl").loss, batch.logps)
    monkeypatch.setattr(pair_sums, "_SEGMENT_LIMIT", 0)
    output = flat(batch, "trl")
    torch.testing.assert_close(output.loss, rectangle(batch, "trl").loss, rtol=1e-14, atol=0)
    torch.testing.assert_close(torch.autograd.grad(output.loss, batch.logps)[0], at_once, rtol=1e-14, atol=0)


@LAYOUTS
def test_same_inputs_same_bits(layout: Layout) -> None:
    batch = make_batch(1, num_pairs=4, dtype=torch.float32)
    first, second = layout(batch, "trl"), layout(batch, "trl")
    assert torch.equal(first.loss, second.loss)
    gradients = [torch.autograd.grad(output.loss, batch.logps)[0] for output in (first, second)]
    assert torch.equal(*gradients)


def test_what_stands_outside_the_masks_is_not_looked_at() -> None:
    batch = make_batch(2)
    scored = batch.completion_mask.clone()
    scored[:3] |= batch.nll_mask
    assert not scored.all()
    polluted = batch.logps.detach().masked_fill(~scored, math.nan).requires_grad_()
    output = orpo_objective(polluted, batch.completion_mask, None, batch.nll_mask)
    assert torch.equal(output.loss, rectangle(batch).loss)
    (gradient,) = torch.autograd.grad(output.loss, polluted)
    assert torch.equal(gradient != 0, scored)


def test_nll_logps_of_their_own() -> None:
    batch, nll = make_batch(2), make_batch(7)
    output = orpo_objective(batch.logps, batch.completion_mask, nll.logps[:3], nll.nll_mask)
    assert torch.equal(output.nll_loss, rectangle(nll).nll_loss)
    assert torch.equal(output.odds_ratio_loss, rectangle(batch).odds_ratio_loss)


def test_without_an_nll_mask_or_a_preset_the_nll_is_that_of_the_chosen_completions() -> None:
    batch = make_batch(4)
    output = orpo_objective(batch.logps, batch.completion_mask)
    assert output.beta == 0.1
    chosen_only = dataclasses.replace(batch, nll_mask=batch.completion_mask[:3])
    assert torch.equal(output.loss, rectangle(chosen_only, "trl").loss)


@pytest.mark.parametrize("preset", ["trl", "llama_factory"])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_normalizers_make_micro_batches_add_up_exactly(preset: str, as_tensor: bool) -> None:
    parts = [make_batch(seed) for seed in range(4)]
    whole = Batch(
        torch.cat([part.logps[:3] for part in parts] + [part.logps[3:] for part in parts]),
        torch.cat([part.completion_mask[:3] for part in parts] + [part.completion_mask[3:] for part in parts]),
        torch.cat([part.nll_mask for part in parts]),
    )
    expected = rectangle(whole, preset)
    nll_count, pairs = expected.nll_count, expected.valid_pairs
    normalizers = (nll_count, pairs) if as_tensor else (int(nll_count), int(pairs))
    outputs = [rectangle(part, preset, nll_normalizer=normalizers[0], pair_normalizer=normalizers[1]) for part in parts]
    total = torch.stack([output.loss for output in outputs]).sum()
    torch.testing.assert_close(total, expected.loss, rtol=1e-14, atol=0)
    # The metric remains a mean over its own batch.
    assert torch.equal(outputs[0].log_odds_ratio, rectangle(parts[0], preset).log_odds_ratio)


def test_metrics_are_detached_and_take_mean_logits_when_given() -> None:
    output = rectangle(make_batch(0), "trl")
    assert set(output.metrics()) == TRL_METRICS
    logits = torch.tensor(0.25, requires_grad=True)
    metrics = output.metrics(logits_chosen=logits, logits_rejected=2 * logits)
    assert set(metrics) == TRL_METRICS | {"logits/chosen", "logits/rejected"}
    assert float(metrics["logits/rejected"]) == 0.5
    assert not any(value.requires_grad for value in metrics.values())


# --- empty and broken sequences -----------------------------------------------------------------------------


def numbers(output: OrpoOutput) -> dict[str, Tensor]:
    held = {field.name: getattr(output, field.name) for field in fields(output) if field.name != "beta"}
    return {**held, **output.metrics()}


def empty_rows(batch: Batch, *rows: int) -> Batch:
    mask = batch.completion_mask.clone()
    mask[list(rows)] = False
    # The chosen row's NLL loses its completion too; its prompt stays.
    completion = batch.completion_mask & ~mask
    return dataclasses.replace(
        batch, completion_mask=mask, nll_mask=batch.nll_mask & ~completion[: len(batch.nll_mask)]
    )


@LAYOUTS
@pytest.mark.parametrize("preset", ["trl", "llama_factory", "paper"])
@pytest.mark.parametrize(
    ("num_pairs", "rows", "valid"),
    [
        (2, (0,), [False, True]),
        (2, (2,), [False, True]),
        (2, (0, 1, 2, 3), [False, False]),
        (1, (0,), [False]),
        (1, (1,), [False]),
    ],
    ids=[
        "one chosen of 4",
        "one rejected of 4",
        "all 4",
        "chosen of the only pair",
        "rejected of the only pair",
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_empty_completion_takes_its_pair_out(
    layout: Layout, preset: str, num_pairs: int, rows: tuple[int, ...], valid: list[bool], dtype: torch.dtype
) -> None:
    batch = empty_rows(make_batch(3, num_pairs, dtype), *rows)
    with pytest.warns(UserWarning, match="empty completion"):
        output = layout(batch, preset)
    for name, value in numbers(output).items():
        assert torch.isfinite(value).all(), name
    assert output.pair_is_valid.tolist() == valid
    assert int(output.valid_pairs) == sum(valid)

    (gradient,) = torch.autograd.grad(output.loss, batch.logps, retain_graph=True)
    (odds_gradient,) = torch.autograd.grad(output.odds_ratio_loss, batch.logps)
    assert torch.isfinite(gradient).all()
    pair_in_odds = (odds_gradient != 0).any(-1).view(2, num_pairs)
    assert pair_in_odds.tolist() == [valid, valid]
    if not any(valid):
        assert output.odds_ratio_loss.item() == 0
        assert float(output.metrics()["log_odds_ratio"]) == 0
    else:
        survivors = [row for row in range(2 * num_pairs) if valid[row % num_pairs]]
        kept = dataclasses.replace(
            batch,
            logps=batch.logps[survivors],
            completion_mask=batch.completion_mask[survivors],
            nll_mask=batch.nll_mask[survivors[: sum(valid)]],
        )
        expected = layout(kept, preset)
        torch.testing.assert_close(output.odds_ratio_loss, expected.odds_ratio_loss)
        for name in TRL_METRICS - {"nll_loss"}:
            torch.testing.assert_close(output.metrics()[name], expected.metrics()[name])

    # NLL tokens that remain still count: the mean over them, whichever rows they are in.
    by_rows = batch.completion_mask[:num_pairs] if preset == "llama_factory" else batch.nll_mask
    row_nll = -torch.where(by_rows, batch.logps[:num_pairs], 0).sum(-1)
    counts = by_rows.sum(-1)
    if preset == "llama_factory":
        expected_nll = sum(row_nll[counts > 0] / counts[counts > 0]) / max(int((counts > 0).sum()), 1)
    else:
        expected_nll = row_nll.sum() / counts.sum().clamp(min=1)
    torch.testing.assert_close(output.nll_loss, torch.as_tensor(expected_nll, dtype=dtype))


@pytest.mark.parametrize("num_pairs", [0, 2])
def test_nothing_scored_gives_zero_and_a_connected_zero_gradient(num_pairs: int) -> None:
    logps = torch.full((2 * num_pairs, 5), -1.0, requires_grad=True)
    tokens = torch.zeros(0, requires_grad=True)
    nothing = torch.zeros(0, dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outputs = [
            (orpo_objective(logps, torch.zeros(2 * num_pairs, 5, dtype=torch.bool)), logps),
            (orpo_objective_flat(tokens, nothing, nothing, num_pairs=num_pairs), tokens),
        ]
    for output, leaf in outputs:
        assert all(torch.isfinite(value).all() for value in numbers(output).values())
        assert output.loss.item() == 0
        output.loss.backward()
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_empty_completions_warn_once() -> None:
    batch = empty_rows(make_batch(0), 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first = rectangle(batch)
        rectangle(batch)
        flat(batch)
        first.warn_if_empty()
    assert len(caught) == 1
    assert "1 of 3 pairs have an empty completion" in str(caught[0].message)


@LAYOUTS
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row", [1, 4])
@pytest.mark.parametrize("partner_is_empty", [False, True])
def test_a_broken_sequence_shows_in_its_pair_and_in_the_loss(
    layout: Layout, row: int, broken: float, partner_is_empty: bool
) -> None:
    batch = make_batch(6)
    place = int(batch.completion_mask[row].nonzero()[0])
    logps = batch.logps.detach().clone()
    logps[row, place] = broken
    batch = dataclasses.replace(batch, logps=logps.requires_grad_())
    if partner_is_empty:
        batch = empty_rows(batch, (row + 3) % 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = layout(batch, "trl")
    assert not math.isfinite(output.loss.item())
    assert math.isnan(output.odds_ratio_loss.item())
    assert math.isnan(output.metrics()["log_odds_chosen"])
    for side, broken_pair in ((output.chosen_logps, row == 1), (output.rejected_logps, row == 4)):
        assert torch.isfinite(side).tolist() == [True, not broken_pair, True]


# --- bad input ----------------------------------------------------------------------------------------------

ROWS = torch.full((4, 5), -1.0)
MASK = torch.ones(4, 5, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "names"),
    [
        ((ROWS[:3], MASK[:3]), {}, ValueError, r"completion_logps has shape \[3, 5\]"),
        ((ROWS[0], MASK[0]), {}, ValueError, r"completion_logps has shape \[5\]"),
        (
            (ROWS, MASK[:, :4]),
            {},
            ValueError,
            r"completion_mask has shape \[4, 4\], completion_logps \[4, 5\]",
        ),
        ((ROWS, MASK.int()), {}, TypeError, "completion_mask is torch.int32"),
        ((ROWS.bfloat16(), MASK), {}, TypeError, "completion_logps is torch.bfloat16"),
        ((ROWS, MASK, None, MASK), {}, ValueError, r"nll_mask has shape \[4, 5\], nll_logps \[2, 5\]"),
        (
            (ROWS, MASK, ROWS[:2], MASK[:2, :1]),
            {},
            ValueError,
            r"nll_mask has shape \[2, 1\], nll_logps \[2, 5\]",
        ),
        ((ROWS, MASK, ROWS[:3], MASK[:3]), {}, ValueError, "4 completions but 3 sequences in the NLL"),
        ((ROWS, MASK, ROWS[:2]), {}, ValueError, "nll_mask is missing"),
        ((ROWS, MASK), {"preset": "trl"}, ValueError, "nll_mask is missing: preset 'trl'"),
        ((ROWS, MASK, None, MASK[:2]), {"preset": "llama_factory"}, ValueError, "nll_mask is given"),
        ((ROWS, MASK), {"preset": "dpo"}, ValueError, "preset='dpo' is unknown: use one of 'trl'"),
        ((ROWS, MASK), {"beta": -0.1}, ValueError, "beta=-0.1"),
        ((ROWS, MASK), {"beta": math.nan}, ValueError, "beta=nan"),
        ((ROWS, MASK), {"beta": math.inf}, ValueError, "beta=inf"),
        ((ROWS, MASK), {"nll_normalizer": -1}, ValueError, "nll_normalizer=-1"),
        ((ROWS, MASK), {"pair_normalizer": math.nan}, ValueError, "pair_normalizer=nan"),
    ],
)
def test_rectangle_bad_input(
    arguments: tuple[Tensor, ...], options: dict[str, object], error: type[Exception], names: str
) -> None:
    with pytest.raises(error, match=names):
        orpo_objective(*arguments, **options)


@pytest.mark.parametrize(
    ("pair", "kind", "names"),
    [
        ([0, 2, 0], [0, 1, 2], r"token 1 has pair=2 and kind=1: a pair lies in \[0, 2\)"),
        ([0, 1, -1], [0, 1, 2], "token 2 has pair=-1"),
        ([0, 1, 0], [3, 1, 2], "token 0 has pair=0 and kind=3"),
        ([0, 1], [0, 1, 2], r"pair has shape \[2\], logps \[3\]"),
        ([0, 1, 0], [[0, 1, 2]], r"kind has shape \[1, 3\], logps \[3\]"),
    ],
)
def test_flat_bad_input(pair: list[int], kind: list[int], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        orpo_objective_flat(torch.full((3,), -1.0), torch.tensor(pair), torch.tensor(kind), num_pairs=2)


def test_where_the_host_does_not_look_a_pair_out_of_range_makes_the_loss_nan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pair_sums, "host_can_look", lambda tensor: False)
    pair, kind = torch.tensor([0, 0, 1]), torch.tensor([CHOSEN, REJECTED, CHOSEN])
    assert math.isnan(orpo_objective_flat(torch.full((3,), -1.0), pair, kind, num_pairs=1).loss.item())


# --- torch.compile ------------------------------------------------------------------------------------------


@LAYOUTS
def test_compiles_into_one_graph_for_all_lengths(layout: Layout) -> None:
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def compiled(batch_logps: Tensor, *rest: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if layout is rectangle:
            output = orpo_objective(batch_logps, rest[0], None, rest[1], preset="trl")
        else:
            output = orpo_objective_flat(batch_logps, *rest, num_pairs=3, preset="trl")
        return output.loss, output.metrics()

    for length in (6, 8, 9, 12, 17):
        batch = make_batch(length, dtype=torch.float32, length=length)
        arguments = (batch.logps, batch.completion_mask, batch.nll_mask) if layout is rectangle else batch.flat[:3]
        loss, metrics = compiled(*arguments)
        expected = layout(batch, "trl")
        assert torch.equal(loss, expected.loss)
        assert all(torch.equal(value, metrics[name]) for name, value in expected.metrics().items())
        gradients = [torch.autograd.grad(value, batch.logps)[0] for value in (loss, expected.loss)]
        assert torch.equal(*gradients)
    # The first length, then one graph with the length left open.
    assert counter.frame_count <= 2


def test_from_sums_is_what_both_layouts_end_in() -> None:
    batch = make_batch(8)
    sums = torch.where(batch.completion_mask, batch.logps, 0).sum(-1)
    nll_sums = torch.where(batch.nll_mask, batch.logps[:3], 0).sum(-1)
    of = PairSums(sums, batch.completion_mask.sum(-1), nll_sums, batch.nll_mask.sum(-1))
    output = orpo_from_sums(of, preset="trl")
    assert torch.equal(output.loss, rectangle(batch, "trl").loss)
