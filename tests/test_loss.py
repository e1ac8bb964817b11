"""`orpo_loss` and `OrpoLoss` from hidden states, against full logits in float64."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference import GRADIENT_BOUND, IGNORED, Case, exact_logps, grad_of, make_case, relative_error
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import orpo_kernels.objective as objective
from orpo_kernels import OrpoLoss, OrpoOutput, Plan, Preset, linear_logps, orpo_loss
from orpo_kernels.loss import merge_targets, orpo_from_logps

B, T, D, V = 3, 12, 32, 60


@pytest.fixture(autouse=True)
def _no_warning_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective, "_warned_empty", False)


def make_pairs(dtype: torch.dtype, device: torch.device, **options: Any) -> tuple[Case, Tensor]:
    """A case of 2B rows whose first third is a prompt, and the NLL's targets [B, T], prompt included."""
    case = make_case((2 * B, T), D, V, dtype, device, ignored=0.0, **options)
    nll_targets = case.targets[:B].clone()
    nll_targets[0, -2:] = IGNORED
    case.targets[:, : T // 3] = IGNORED
    case.targets[:, -1] = IGNORED
    case.targets[0, -2:] = IGNORED
    case.targets[B, T // 2 :] = IGNORED
    return case, nll_targets


def exact_loss(case: Case, nll_targets: Tensor | None, beta: float, per_sequence: bool = False) -> dict[str, Tensor]:
    """The paper's formulas, pair by pair, on full logits in float64."""
    options = {"bias": case.bias, **case.options}
    logps = exact_logps(case.hidden, case.weight, case.targets, **options)
    means = [logps[row][case.targets[row] != IGNORED].mean() for row in range(2 * B)]
    terms, odds = [], []
    for chosen, rejected in zip(means[:B], means[B:], strict=True):
        log_odds = chosen - rejected - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
        terms.append(-F.logsigmoid(log_odds))
        odds.append(log_odds)
    nll_targets = case.targets[:B] if nll_targets is None else nll_targets
    options["rows"] = None
    nll = exact_logps(case.hidden[:B], case.weight, nll_targets, **options)
    counts = (nll_targets != IGNORED).sum(1)
    nll_loss = -(nll.sum(1) / counts).mean() if per_sequence else -nll.sum() / counts.sum()
    odds_ratio_loss = torch.stack(terms).mean()
    return {
        "loss": nll_loss + beta * odds_ratio_loss,
        "nll_loss": nll_loss,
        "odds_ratio_loss": odds_ratio_loss,
        "chosen_logps": torch.stack(means[:B]),
        "rejected_logps": torch.stack(means[B:]),
        "log_odds_ratio": -odds_ratio_loss,
        "log_odds_chosen": torch.stack(odds).mean(),
    }


def gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("with_prompt", [False, True])
@pytest.mark.parametrize("head", [{}, {"bias": True, "softcap": 5.0}, {"logit_scale": 0.0625}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_loss_and_gradients(dtype: torch.dtype, head: dict[str, Any], with_prompt: bool, device: torch.device) -> None:
    case, nll_targets = make_pairs(dtype, device, **head)
    nll = nll_targets if with_prompt else None
    bias = case.bias
    leaves = [x.requires_grad_() for x in (case.hidden, case.weight, bias) if x is not None]
    head = {"bias": bias, "logit_scale": case.logit_scale, "softcap": case.softcap}
    found = orpo_loss(case.hidden, case.weight, case.targets, nll_targets=nll, beta=0.3, **head)
    found_gradients = gradients(found.loss, leaves)

    doubles = [x.detach().double().requires_grad_() for x in leaves]
    exact_case = dataclasses.replace(
        case, hidden=doubles[0], weight=doubles[1], bias=doubles[2] if bias is not None else None
    )
    exact = exact_loss(exact_case, nll, beta=0.3)
    bound = 1e-13 if dtype == torch.float64 else 1e-4 if device.type == "cuda" else 5e-6
    for name, value in exact.items():
        torch.testing.assert_close(getattr(found, name).double(), value, rtol=bound, atol=bound, msg=name)
    for gradient, truth in zip(found_gradients, gradients(exact["loss"], doubles), strict=True):
        assert gradient.dtype == dtype
        assert relative_error(gradient, truth) <= GRADIENT_BOUND[dtype]
    assert found.valid_pairs == B
    assert found.beta == 0.3
    assert found.nll_count == ((case.targets[:B] if nll is None else nll) != IGNORED).sum()


@pytest.mark.parametrize(("preset", "beta"), [("trl", 0.1), ("llama_factory", 0.1), ("paper", 1.0), (None, 0.1)])
def test_presets(preset: str | None, beta: float, device: torch.device) -> None:
    """A preset chooses the mean, beta and the NLL's tokens; `beta` overrides its own."""
    case, nll_targets = make_pairs(torch.float64, device)
    nll = None if preset == "llama_factory" else nll_targets
    for given, used in ((None, beta), (0.7, 0.7)):
        found = orpo_loss(case.hidden, case.weight, case.targets, nll_targets=nll, beta=given, preset=preset)
        exact = exact_loss(case, nll, used, per_sequence=preset == "llama_factory")
        torch.testing.assert_close(found.loss, exact["loss"], rtol=1e-13, atol=0.0)
        assert found.beta == used


def test_the_union_of_targets_is_scored_once() -> None:
    """A token of both the NLL and the completion costs one product."""
    case, nll_targets = make_pairs(torch.float32, torch.device("cpu"))
    union = merge_targets(case.targets, nll_targets)
    assert torch.equal(union[:B], nll_targets)
    assert torch.equal(union[B:], case.targets[B:])
    with FlopCounterMode(display=False) as flops:
        orpo_loss(case.hidden, case.weight, case.targets, nll_targets=nll_targets)
    assert flops.get_total_flops() == 2 * int((union != IGNORED).sum()) * D * V


def test_completion_tokens_outside_the_nll(device: torch.device) -> None:
    """The NLL may leave out completion tokens: the union has them, and the two means differ."""
    case, _ = make_pairs(torch.float64, device)
    nll_targets = case.targets[:B].clone()
    nll_targets[:, ::2] = IGNORED
    found = orpo_loss(case.hidden, case.weight, case.targets, nll_targets=nll_targets, beta=0.3)
    exact = exact_loss(case, nll_targets, 0.3)
    torch.testing.assert_close(found.loss, exact["loss"], rtol=1e-13, atol=0.0)
    torch.testing.assert_close(found.chosen_logps, exact["chosen_logps"], rtol=1e-13, atol=0.0)


def test_from_logps_is_the_loss_s_second_half(device: torch.device) -> None:
    case, nll_targets = make_pairs(torch.float32, device)
    logps = linear_logps(case.hidden, case.weight, merge_targets(case.targets, nll_targets))
    one = orpo_loss(case.hidden, case.weight, case.targets, nll_targets=nll_targets, preset="trl")
    other = orpo_from_logps(logps, case.targets, nll_targets=nll_targets, preset="trl")
    for field in dataclasses.fields(OrpoOutput):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, field.name


def test_another_ignore_index(device: torch.device) -> None:
    case, nll_targets = make_pairs(torch.float32, device)
    expected = orpo_loss(case.hidden, case.weight, case.targets, nll_targets=nll_targets)
    moved = [torch.where(x == IGNORED, -1, x) for x in (case.targets, nll_targets)]
    found = orpo_loss(case.hidden, case.weight, moved[0], nll_targets=moved[1], ignore_index=-1)
    assert torch.equal(found.loss, expected.loss)


def test_module_is_the_function(device: torch.device) -> None:
    case, nll_targets = make_pairs(torch.float32, device, bias=True)
    options: dict[str, Any] = {
        "logit_scale": 0.5,
        "softcap": 4.0,
        "ignore_index": IGNORED,
        "preset": "trl",
        "plan": Plan(1 << 20),
    }
    module = OrpoLoss(0.3, **options)
    found = module(case.weight, case.hidden, case.targets, case.bias, nll_targets)
    expected = orpo_loss(
        case.hidden, case.weight, case.targets, nll_targets=nll_targets, beta=0.3, bias=case.bias, **options
    )
    assert torch.equal(found.loss, expected.loss)
    assert repr(module) == "OrpoLoss(beta=0.3, preset='trl')"
    assert not list(module.parameters())
    assert OrpoLoss(preset="paper").beta == 1.0
    assert OrpoLoss().beta == 0.1


# ---------------------------------------------------------------------------- empty and broken sequences


@pytest.mark.parametrize("train_weight", [False, True])
@pytest.mark.parametrize("empty", [[0], [B], [1, B + 1], list(range(2 * B))], ids=str)
def test_empty_completions(empty: list[int], train_weight: bool, device: torch.device) -> None:
    """empty completion: its pair leaves the odds ratio; nothing is NaN; gradients stay connected."""
    case, _ = make_pairs(torch.float32, device)
    case.targets[empty] = IGNORED
    hidden = case.hidden.requires_grad_()
    weight = case.weight.requires_grad_(train_weight)
    # On a GPU, looking would wait for the device: nothing is said there.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = orpo_loss(hidden, weight, case.targets)
    out.loss.backward()
    pairs = {row % B for row in empty}
    assert out.valid_pairs == B - len(pairs)
    for name in ("loss", "nll_loss", "odds_ratio_loss", "chosen_logps", "rejected_logps", "log_odds_ratio"):
        assert torch.isfinite(getattr(out, name)).all(), name
    assert all(torch.isfinite(value) for value in out.metrics().values())
    assert torch.isfinite(grad_of(hidden)).all()
    assert (weight.grad is not None) == train_weight
    scored = case.targets != IGNORED
    assert (grad_of(hidden)[~scored] == 0).all()
    if len(empty) == 2 * B:
        assert out.loss == 0
        assert (grad_of(hidden) == 0).all()
        assert weight.grad is None or (grad_of(weight) == 0).all()
        return
    # The rejected half of a pair without a chosen one has no part in the loss.
    for pair in pairs:
        assert (grad_of(hidden)[B + pair] == 0).all()
    # The rest is the loss of the rest.
    kept = [row for row in range(2 * B) if row % B not in pairs]
    rest = orpo_loss(case.hidden[kept], case.weight, case.targets[kept])
    torch.testing.assert_close(out.odds_ratio_loss, rest.odds_ratio_loss)


def test_no_pairs_at_all(device: torch.device) -> None:
    hidden = torch.zeros(0, T, D, device=device, requires_grad=True)
    weight = torch.ones(V, D, device=device, requires_grad=True)
    out = orpo_loss(hidden, weight, torch.zeros(0, T, dtype=torch.int64, device=device))
    out.loss.backward()
    assert out.loss == 0
    assert out.valid_pairs == 0
    assert (grad_of(weight) == 0).all()


@pytest.mark.parametrize("row", [1, B + 1])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_sequence_shows_in_its_pair(bad: float, row: int, device: torch.device) -> None:
    """NaN or inf in one row of hidden: that sequence's log-prob and the loss are NaN, the other pairs' are not."""
    case, _ = make_pairs(torch.float32, device)
    clean = orpo_loss(case.hidden, case.weight, case.targets)
    case.hidden[row, T // 2 - 1, 3] = bad
    found = orpo_loss(case.hidden, case.weight, case.targets)
    assert found.loss.isnan()
    logps = torch.cat([found.chosen_logps, found.rejected_logps])
    expected = torch.cat([clean.chosen_logps, clean.rejected_logps])
    broken = torch.arange(2 * B, device=device) == row
    assert torch.equal(logps.isnan(), broken)
    assert torch.equal(logps[~broken], expected[~broken])
    assert found.valid_pairs == B


def test_a_sure_answer_has_a_finite_loss(device: torch.device) -> None:
    """sure chosen answer: from hidden states so long that 1 - p is 1e-10, loss and gradient are finite."""
    case, _ = make_pairs(torch.float32, device, largest=1.0)
    own = case.weight[case.targets.clamp_min(0)]
    with torch.no_grad():
        case.hidden[:B] = 40 * own[:B] / own[:B].square().sum(-1, keepdim=True)
    hidden = case.hidden.requires_grad_()
    out = orpo_loss(hidden, case.weight, case.targets)
    out.loss.backward()
    assert (out.chosen_logps < 0).all()
    assert (out.chosen_logps > -1e-6).all()
    assert torch.isfinite(out.loss)
    assert torch.isfinite(out.log_odds_chosen)
    exact = exact_loss(case, None, 0.1)
    torch.testing.assert_close(out.loss.double(), exact["loss"].detach(), rtol=1e-5, atol=0.0)
    assert torch.isfinite(grad_of(hidden)).all()
    assert (grad_of(hidden)[:B][case.targets[:B] != IGNORED].norm(dim=-1) > 0).all()


# ---------------------------------------------------------------------------- bad input


def _hidden(*shape: int) -> Tensor:
    return torch.ones(shape)


def _ids(*shape: int, value: int = 1) -> Tensor:
    return torch.full(shape, value)


BAD_CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "an odd number of rows": (
        {"hidden": _hidden(3, 5, 8), "targets": _ids(3, 5)},
        ValueError,
        r"hidden has shape \(3, 5, 8\): it must be \[2B, T, D\] with an even number of rows, B chosen then B rejected",
    ),
    "hidden without a batch": (
        {"hidden": _hidden(4, 8), "targets": _ids(4)},
        ValueError,
        r"hidden has shape \(4, 8\): it must be \[2B, T, D\]",
    ),
    "targets without a batch": (
        {"targets": _ids(20)},
        ValueError,
        r"targets has shape \(20,\): it must be \[2B, T\], B chosen then B rejected",
    ),
    "an odd number of target rows": (
        {"targets": _ids(3, 5)},
        ValueError,
        r"targets has shape \(3, 5\): it must be \[2B, T\]",
    ),
    "targets of another length": (
        {"targets": _ids(4, 6)},
        ValueError,
        r"targets has shape \(4, 6\) and hidden \(4, 5, 8\): without `rows`, targets must be shaped like hidden",
    ),
    "nll_targets for all rows": (
        {"nll_targets": _ids(4, 5)},
        ValueError,
        r"nll_targets has shape \(4, 5\): it must be \[B, T\] = \[2, 5\], the chosen rows of targets",
    ),
    "nll_targets that differ": (
        {"nll_targets": _ids(2, 5, value=7)},
        ValueError,
        r"targets and nll_targets differ at \[0, 0\]: 1 and 7\. Both must name the token that follows, or -100",
    ),
    "nll_targets with a preset that has none": (
        {"nll_targets": _ids(2, 5), "preset": "llama_factory"},
        ValueError,
        r"nll_targets was given with preset 'llama_factory', whose NLL runs over the chosen completion: leave it out",
    ),
    "an unknown preset": (
        {"preset": "simpo"},
        ValueError,
        r"preset='simpo' is unknown: use one of 'trl', 'llama_factory', 'paper'",
    ),
    "a preset of another type": ({"preset": 3}, TypeError, r"preset is a int: use a name, a Preset or None"),
    "a negative beta": ({"beta": -0.1}, ValueError, r"beta=-0\.1: use a finite number of at least 0"),
    "a beta that is no number": ({"beta": math.nan}, ValueError, r"beta=nan: use a finite number of at least 0"),
    "a target beyond the vocabulary": (
        {"targets": _ids(4, 5, value=20)},
        ValueError,
        r"targets holds 20 at flattened position 0",
    ),
    "a negative target": ({"targets": _ids(4, 5, value=-5)}, ValueError, r"targets holds -5 at flattened position 0"),
    "a softcap below zero": ({"softcap": -1.0}, ValueError, r"softcap=-1\.0 must be positive and finite"),
    "a scale of zero": ({"logit_scale": 0.0}, ValueError, r"logit_scale=0\.0 must be finite and not 0"),
    "a bias of another size": ({"bias": _hidden(8)}, ValueError, r"bias has shape \(8,\): it must be \[V\] = \[20\]"),
    "a plan of another type": ({"plan": "small"}, TypeError, r"plan='small' must be an orpo_kernels\.Plan"),
}


@pytest.mark.parametrize(("changes", "error", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    """bad input: the error names the argument, its value and what it must be."""
    arguments: dict[str, Any] = {"hidden": _hidden(4, 5, 8), "weight": _hidden(20, 8), "targets": _ids(4, 5)}
    orpo_loss(**arguments)
    with pytest.raises(error, match=message):
        orpo_loss(**(arguments | changes))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"beta": -1.0}, ValueError, "beta=-1.0: use a finite number of at least 0"),
        ({"preset": "simpo"}, ValueError, "preset='simpo' is unknown"),
        ({"preset": 3}, TypeError, "preset is a int"),
    ],
    ids=str,
)
def test_a_bad_module_is_refused_when_made(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        OrpoLoss(**arguments)


def test_a_preset_of_one_s_own(device: torch.device) -> None:
    """Without a name in `PRESETS`; `nll_weight` scales the NLL alone."""
    case, nll_targets = make_pairs(torch.float64, device)
    preset = Preset("mine", nll_over="prompt+chosen", nll_mean="sequences", beta=0.25, nll_weight=2.0)
    found = orpo_loss(case.hidden, case.weight, case.targets, nll_targets=nll_targets, preset=preset)
    exact = exact_loss(case, nll_targets, 0.25, per_sequence=True)
    torch.testing.assert_close(found.loss, exact["loss"] + exact["nll_loss"], rtol=1e-13, atol=0.0)
