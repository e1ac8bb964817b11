"""Statistics by the Triton kernels, in the interpreter where there is no GPU: against float64 and the torch path."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_triton_path import (  # noqa: F401  (fixtures)
    CONFIG,
    DEVICE,
    DTYPES,
    PERSISTENT,
    Problem,
    confident,
    exact,
    generator,
    make,
    poisoned_buffers,
    schedule,
)

from orpo_kernels.kernels import torch_path
from orpo_kernels.kernels.configs import TileConfig
from orpo_kernels.kernels.interface import Head, Tokens
from orpo_kernels.kernels.statistics import Statistics, TokenStatistics

triton_path = pytest.importorskip("orpo_kernels.kernels.triton_path", reason="Triton is not installed")
triton_launch = pytest.importorskip("orpo_kernels.kernels.triton_launch", reason="Triton is not installed")

ALL = Statistics(True, True, True, True)
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": {"bias": True, "scale": 1.5, "softcap": 5.0, "rows": True},
    "large logits": {"bias": True, "spread": 12.0},
}


def run(
    problem: Problem, wanted: Statistics = ALL, config: TileConfig = CONFIG, want_u: bool = True
) -> TokenStatistics:
    return triton_path.forward(*problem, schedule(problem), want_u, wanted, config=config).statistics


def logits(problem: Problem) -> torch.Tensor:
    tokens, head = problem
    hidden = tokens.hidden if tokens.rows is None else tokens.hidden[tokens.rows]
    z = hidden.double() @ head.weight.double().T
    z = (z if head.bias is None else z + head.bias.double()) * head.logit_scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def with_likely_targets(problem: Problem) -> Problem:
    y, best = problem.tokens.targets, logits(problem).argmax(1)
    every_other = torch.arange(len(y), device=DEVICE) % 2 == 0
    return problem._replace(tokens=problem.tokens._replace(targets=torch.where(every_other, best, y)))


def check(problem: Problem, found: TokenStatistics) -> None:
    z, want = logits(problem), exact(problem)
    logp = z.log_softmax(1)
    p = logp.exp()
    # A logit's error moves them by at most itself, and the entropy by as much again for its spread.
    bound = 4 * (want.logit_error + 1e-6) * (1 + logp.var(1).clamp(max=1))
    for got, true in (
        (found.entropy, -torch.where(p == 0, 0.0, p * logp).sum(1)),
        (found.log_sum_sq_probs, p.square().sum(1).log()),
        (found.mean_logits, z.mean(1)),
    ):
        assert got is not None
        assert ((got.double() - true).abs() <= bound).all()
    assert found.is_top1 is not None
    assert torch.equal(found.is_top1, z.argmax(1) == problem.tokens.targets)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", HEADS)
def test_heads(generator: torch.Generator, kind: str, dtype: torch.dtype) -> None:  # noqa: F811
    problem = with_likely_targets(make(generator, 36, 40, 150, dtype, **HEADS[kind]))
    check(problem, run(problem))


def test_persistent_tiles_that_are_stored(generator: torch.Generator) -> None:  # noqa: F811
    problem = with_likely_targets(make(generator, 36, 40, 150, torch.bfloat16, **HEADS["everything"]))
    check(problem, run(problem, config=PERSISTENT, want_u=True))


@pytest.mark.parametrize(("n", "d", "v"), [(1, 7, 2), (3, 1, 5), (33, 40, 65), (2, 7, 300), (65, 64, 64)])
def test_ragged_sizes(generator: torch.Generator, n: int, d: int, v: int) -> None:  # noqa: F811
    check(problem := with_likely_targets(make(generator, n, d, v, torch.float32, bias=True)), run(problem))


def test_as_the_torch_path(generator: torch.Generator) -> None:  # noqa: F811
    problem = with_likely_targets(make(generator, 30, 24, 150, torch.float32, bias=True))
    twin = torch_path.forward(*problem, schedule(problem), True, ALL).statistics
    for ours, theirs in zip(run(problem)[:4], twin[:4], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_slow_lane(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:  # noqa: F811
    """Rows whose competitors vanish or overflow beside the target: entropy keeps its digits, relatively."""
    log_odds = [-200.0, -100.0, -73.0, -30.0, 0.0, 10.0, 20.0, 40.0, 60.0, 75.0]
    problem, want = confident(generator, dtype, log_odds)
    found = run(problem)
    odds, z = want.log_odds, logits(problem)
    others = z.scatter(1, problem.tokens.targets[:, None], -torch.inf)
    q, s = others.softmax(1), torch.sigmoid(-odds)
    of_competitors = -torch.where(q == 0, 0.0, q * q.log()).sum(1)
    log_p, log_s = (torch.nn.functional.logsigmoid(x) for x in (odds, -odds))
    entropy = -log_p.exp() * log_p + s * (of_competitors - log_s)
    sum_sq = torch.logaddexp(2 * log_p, 2 * log_s + q.square().sum(1).log())
    assert found.entropy is not None
    assert found.log_sum_sq_probs is not None
    error = 8 * want.logit_error + 1e-5
    assert ((found.entropy - entropy).abs() <= error * entropy.clamp(max=1) + error * (odds < 0)).all()
    assert ((found.log_sum_sq_probs - sum_sq).abs() <= error).all()
    assert found.is_top1 is not None
    assert torch.equal(found.is_top1, z.argmax(1) == problem.tokens.targets)
    torch.testing.assert_close(found.mean_logits.double(), z.mean(1), rtol=1e-5, atol=float(error.max()))
    # It was needed.
    monkeypatch.setattr(triton_launch.Launcher, "slow_lane", lambda *_: None)
    without = run(problem).entropy
    assert without is not None
    off = ((without - entropy).abs() > 1e-2 * entropy.clamp(max=1)) | without.isnan()
    assert off[:2].all()
    assert not off[3:8].any()


@pytest.mark.parametrize("config", [CONFIG, PERSISTENT], ids=["a program a tile", "persistent"])
def test_the_first_of_equal_logits_is_top1(generator: torch.Generator, config: TileConfig) -> None:  # noqa: F811
    n, v = 40, 150
    hidden, weight = (
        torch.randint(-2, 3, (rows, 32), generator=generator, device=DEVICE).bfloat16() for rows in (n, v)
    )
    weight[100:] = weight[:50]
    z = hidden.double() @ weight.double().T
    first, last = z.argmax(1), v - 1 - z.flip(1).argmax(1)
    assert (first != last).sum() > 10
    for targets in (first, last):
        problem = Problem(Tokens(hidden, None, targets), Head(weight, None, 1.0, None, torch.bfloat16))
        assert torch.equal(run(problem, Statistics(is_top1=True), config).is_top1, targets == first)


def test_only_what_is_asked_for(generator: torch.Generator) -> None:  # noqa: F811
    problem = with_likely_targets(make(generator, 10, 24, 70, torch.float32))
    everything = run(problem)
    for i, name in enumerate(Statistics._fields[:4]):
        found = run(problem, Statistics(**{name: True}))
        assert [x is not None for x in found] == [i == other for other in range(5)]
        assert torch.equal(found[i], everything[i])


def test_no_competitors_no_tokens_and_nan(generator: torch.Generator) -> None:  # noqa: F811
    problem = make(generator, 3, 7, 1, torch.float32)
    found = run(problem)
    assert found.entropy.tolist() == found.log_sum_sq_probs.tolist() == [0.0] * 3
    assert found.is_top1.all()
    problem = with_likely_targets(make(generator, 5, 7, 70, torch.float32))
    problem.tokens.hidden[2] = math.nan
    found = run(problem)
    assert all(x[2].isnan() for x in found[:3])
    assert not found.is_top1[2]
    assert not any(x[[0, 1, 3, 4]].isnan().any() for x in found[:3])
    none = problem.tokens.targets[:0]
    assert run(Problem(Tokens(problem.tokens.hidden, none, none), problem.head)).entropy.shape == (0,)
