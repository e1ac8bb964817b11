"""Statistics of tokens' distributions against full logits in float64: values, gradients, work, errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import FLOATS, IGNORED, Case, make_case, normal_like
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from orpo_kernels import Plan, TokenStats, linear_logps, linear_token_stats
from orpo_kernels.kernels import torch_statistics
from orpo_kernels.kernels.statistics import Statistics
from orpo_kernels.linear_logps import head_options
from orpo_kernels.linear_token_stats import STATISTICS, scored_token_stats
from orpo_kernels.tokens import select_scored

CPU = torch.device("cpu")
# Several tiles each way.
SMALL = Plan(scratch_bytes=1 << 18)


@pytest.fixture(scope="module", autouse=True)
def _few_rows_at_once() -> Iterator[None]:
    """Tiles of tests are small: several parts of their rows, as large tiles have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_statistics, "ROWS_AT_ONCE", 7)
        yield


def exact(case: Case, temperature: float = 1.0) -> TokenStats:
    """Everything from full logits in float64, as it is defined."""
    z = case.hidden.double() @ case.weight.double().T
    z = (z if case.bias is None else z + case.bias.double()) * case.logit_scale
    z = z if case.softcap is None else case.softcap * torch.tanh(z / case.softcap)
    z = z / temperature
    scored = case.targets != IGNORED
    y = case.targets.clamp(min=0)
    logp = z.log_softmax(-1)
    p = logp.exp()
    every = TokenStats(
        logp.gather(-1, y[..., None]).squeeze(-1),
        -torch.where(p == 0, 0.0, p * logp).sum(-1),
        p.square().sum(-1).log(),
        z.mean(-1),
        z.argmax(-1) == y,
    )
    return TokenStats(*(torch.where(scored, x, torch.zeros_like(x)) for x in every))


def of(case: Case, **options: Any) -> TokenStats:
    return linear_token_stats(case.hidden, case.weight, case.targets, bias=case.bias, **case.options, **options)


def assert_close(found: TokenStats, expected: TokenStats, bound: float) -> None:
    for name in TokenStats._fields[:4]:
        got, want = getattr(found, name), getattr(expected, name)
        assert (got.double() - want).abs().max() <= bound, name
    assert torch.equal(found.is_top1, expected.is_top1)


def with_likely_targets(case: Case) -> Case:
    """Every other target is the argmax."""
    best = exact_argmax(case)
    targets = torch.where(torch.arange(len(best), device=best.device) % 2 == 0, best, case.targets)
    return Case(**{**vars(case), "targets": torch.where(case.targets == IGNORED, IGNORED, targets)})


def exact_argmax(case: Case) -> Tensor:
    z = case.hidden.double() @ case.weight.double().T
    z = (z if case.bias is None else z + case.bias.double()) * case.logit_scale
    return z.argmax(-1)


HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"logit_scale": 0.125},
    "softcap": {"softcap": 6.0, "bias": True, "logit_scale": 1.5},
}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_as_full_logits_have_them(
    dtype: torch.dtype, head: dict[str, Any], temperature: float, device: torch.device
) -> None:
    case = with_likely_targets(make_case((60,), 24, 1500, dtype, device, **head))
    expected = exact(case, temperature)
    assert expected.is_top1.any()
    for plan in (None, SMALL):
        found = of(case, temperature=temperature, plan=plan)
        assert all(x.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) for x in found[:4])
        assert_close(found, expected, 1e-12 if dtype == torch.float64 else 1e-5)
        assert not found.is_top1[case.targets == IGNORED].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_logits(dtype: torch.dtype, device: torch.device) -> None:
    case = with_likely_targets(make_case((200,), 64, 2000, dtype, device, largest=32.0))
    assert_close(of(case), exact(case), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sure_tokens_relatively(dtype: torch.dtype, device: torch.device) -> None:
    """1 - p from 0.5 to 1e-15: entropy keeps its digits."""
    vocab_size, log_odds = 64, torch.arange(0.0, 36.0, 2.0)
    weight = torch.eye(vocab_size)
    targets = torch.arange(len(log_odds)) * 3
    hidden = torch.rand(len(log_odds), vocab_size) * 2
    hidden[torch.arange(len(targets)), targets] = log_odds + 6
    case = Case(hidden.to(device, dtype), weight.to(device, dtype), targets.to(device))
    z = case.hidden.double() @ case.weight.double().T
    others = z.scatter(1, case.targets[:, None], -torch.inf)
    odds = z.gather(1, case.targets[:, None]).squeeze(1) - others.logsumexp(1)
    p, s, q = odds.sigmoid(), (-odds).sigmoid(), others.softmax(1)
    of_competitors = -torch.where(q == 0, 0.0, q * q.log()).sum(1)
    entropy = -p * torch.nn.functional.logsigmoid(odds) + s * (of_competitors - torch.nn.functional.logsigmoid(-odds))
    found = of(case)
    assert s.min() < 1e-14
    assert ((found.entropy - entropy).abs() / entropy).max() < 1e-5
    assert (
        (found.logps - torch.nn.functional.logsigmoid(odds)).abs() / -torch.nn.functional.logsigmoid(odds)
    ).max() < 1e-4


@pytest.mark.parametrize("plan", [None, SMALL], ids=["one tile", "small tiles"])
def test_the_first_of_equal_logits_is_top1(plan: Plan | None, device: torch.device) -> None:
    """Whole numbers make logits that tie exactly, within a tile and across tiles."""
    random = torch.Generator().manual_seed(3)
    hidden = torch.randint(-2, 3, (300, 4), generator=random).float().to(device)
    weight = torch.randint(-2, 3, (1300, 4), generator=random).float().to(device)
    z = hidden @ weight.T
    largest = z == z.amax(1, keepdim=True)
    # The first, the last and any other of the largest.
    first, last = largest.float().argmax(1), 1299 - largest.flip(1).float().argmax(1)
    other = torch.randint(1300, (300,), generator=random).to(device)
    for targets in (first, last, other):
        found = linear_token_stats(hidden, weight, targets, statistics="is_top1", plan=plan)
        assert torch.equal(found.is_top1, targets == first)
    assert (first != last).sum() > 100


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_as_trl_has_them(softcap: float | None) -> None:
    kernels = pytest.importorskip("trl.kernels", reason="TRL is not installed")
    random = torch.Generator().manual_seed(5)
    # Whole numbers: logits that tie do so exactly in both.
    hidden, weight = (torch.randint(-1, 2, (n, 4), generator=random).float() for n in (80, 700))
    bias = torch.randint(-1, 2, (700,), generator=random).float()
    z = hidden @ weight.T + bias
    targets = torch.where(torch.arange(80) % 3 == 0, z.argmax(1), 699 - z.flip(1).argmax(1))
    theirs = kernels.ChunkedLogProbFunction.apply(hidden, weight, bias, targets, 0.7, 256, softcap, 1.5, STATISTICS)
    ours = linear_token_stats(
        hidden, weight, targets, bias=bias, softcap=softcap, logit_scale=1.5, temperature=0.7, plan=SMALL
    )
    assert 20 < int(theirs[4].sum()) < 60
    for a, b in zip(ours[:4], theirs[:4], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours.is_top1, theirs[4])


def test_only_what_is_asked_for() -> None:
    case = make_case((6,), 8, 50, torch.float32, CPU)
    everything = of(case)
    for name in STATISTICS:
        found = of(case, statistics=[name])
        assert [x is not None for x in found[1:]] == [name == other for other in STATISTICS]
        assert torch.equal(getattr(found, name), getattr(everything, name))
    logps = linear_logps(case.hidden, case.weight, case.targets)
    assert torch.equal(of(case, statistics=()).logps, logps)
    assert torch.equal(everything.logps, logps)


# --------------------------------------------------------------------------------- gradients


def leaves(case: Case) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in (case.hidden, case.weight, case.bias) if x is not None]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("rows", [False, True])
def test_gradcheck(rows: bool, softcap: float | None, keep: bool) -> None:
    case = make_case((5,), 4, 9, torch.float64, CPU, bias=True, largest=3.0, ignored=0.0)
    case.targets[2] = IGNORED
    index = torch.tensor([3, 3, 0, 1, 3]) if rows else None

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        found = linear_token_stats(
            hidden, weight, case.targets, bias=bias, rows=index, softcap=softcap, logit_scale=-0.5, temperature=0.7,
            entropy_grad=True, plan=Plan(keep_logit_grads=keep),
        )  # fmt: skip
        assert not any(x.requires_grad for x in found[2:])
        return found.logps, found.entropy

    assert torch.autograd.gradcheck(function, leaves(case))
    assert torch.autograd.gradcheck(lambda *inputs: function(*inputs)[1], leaves(case))
    assert torch.autograd.gradcheck(lambda *inputs: function(*inputs)[0], leaves(case))


@pytest.mark.parametrize("softcap", [None, 6.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_several_tiles(dtype: torch.dtype, softcap: float | None, device: torch.device) -> None:
    """Logps and entropy weighed at random; no worse than twice what full logits lose in the same dtype."""
    case = make_case((90,), 48, 1700, dtype, device, bias=True, softcap=softcap)
    c, e = (normal_like(case.targets, seed) for seed in (1, 2))

    def gradients(function: Callable[..., TokenStats], dtype: torch.dtype) -> list[Tensor]:
        inputs = [x.detach().to(dtype).requires_grad_() for x in leaves(case)]
        found = function(*inputs)
        (found.logps * c + found.entropy * e).sum().backward()
        return [x.grad.double() for x in inputs]

    def full(hidden: Tensor, weight: Tensor, bias: Tensor) -> TokenStats:
        z = torch.nn.functional.linear(hidden, weight, bias)
        z = (z if softcap is None else softcap * torch.tanh(z / softcap)).to(
            torch.promote_types(z.dtype, torch.float32)
        )
        logp, scored = z.log_softmax(-1), case.targets != IGNORED
        entropy = -(logp.exp() * logp).sum(-1)
        logps = logp.gather(-1, case.targets.clamp(min=0)[:, None]).squeeze(-1)
        return TokenStats(logps * scored, entropy * scored)

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor) -> TokenStats:
        return linear_token_stats(
            hidden, weight, case.targets, bias=bias, softcap=softcap, entropy_grad=True, plan=SMALL
        )

    truth = gradients(full, torch.float64)
    for found, peer, true in zip(gradients(ours, dtype), gradients(full, dtype), truth, strict=True):
        error, of_peer = ((x - true).norm() / true.norm() for x in (found, peer))
        assert error <= 2 * max(of_peer, torch.finfo(dtype).eps)


def test_sure_tokens_gradient_of_entropy(device: torch.device) -> None:
    """1 - p = 1e-10 in fp32: full logits in fp32 would give noise."""
    hidden = torch.tensor([[23.0, 0.3, -0.4, 0.1]], device=device)
    weight = torch.eye(4, device=device)
    weight[:, 1] += 0.25
    targets = torch.tensor([0], device=device)

    def entropy_of(x: Tensor) -> Tensor:
        logp = (x @ weight.double().T).log_softmax(-1)
        return -(logp.exp() * logp).sum()

    exact_hidden = hidden.double().requires_grad_()
    entropy_of(exact_hidden).backward()
    hidden.requires_grad_()
    linear_token_stats(hidden, weight, targets, entropy_grad=True).entropy.sum().backward()
    assert exact_hidden.grad.norm() < 1e-7
    assert (hidden.grad - exact_hidden.grad).norm() / exact_hidden.grad.norm() < 1e-4


def test_with_an_adapter() -> None:
    case = make_case((7,), 6, 30, torch.float64, CPU, ignored=0.0)
    inputs = [torch.randn(*shape, dtype=torch.float64).requires_grad_() for shape in ((7, 8), (30, 6), (30, 2))]
    scored = select_scored(case.targets, 30, 7)

    def function(hidden: Tensor, weight: Tensor, adapter: Tensor) -> tuple[Tensor, ...]:
        options = head_options(hidden, weight, bias=None, logit_scale=1.0, softcap=None, plan=None, adapter=adapter)
        wanted = Statistics(entropy=True, entropy_grad=True)
        return scored_token_stats(hidden, weight, None, scored, case.targets.shape, options, adapter, wanted)[:2]

    joined = linear_token_stats(inputs[0], torch.cat(inputs[1:], 1), case.targets, statistics=["entropy"])
    torch.testing.assert_close(function(*inputs)[1], joined.entropy)
    assert torch.autograd.gradcheck(function, inputs)


def test_units() -> None:
    """Statistics cost no product; a gradient of the entropy one, in the forward; unused, its backward none."""
    n, d, v = 40, 32, 2000
    unit = 2 * n * d * v
    case = make_case((n,), d, v, torch.float32, CPU, ignored=0.0)

    def units(
        train: tuple[str, ...], loss: Callable[[TokenStats], Tensor] | None, **options: Any
    ) -> tuple[float, float]:
        inputs = {name: getattr(case, name).detach().clone() for name in ("hidden", "weight")}
        for name in train:
            inputs[name].requires_grad_()
        with FlopCounterMode(display=False) as forward:
            found = linear_token_stats(**inputs, targets=case.targets, **options)
        with FlopCounterMode(display=False) as backward:
            if loss is not None:
                loss(found).sum().backward()
        return forward.get_total_flops() / unit, backward.get_total_flops() / unit

    both = lambda found: found.logps + found.entropy  # noqa: E731
    assert units((), None) == (1, 0)
    assert units(("hidden",), lambda found: found.logps) == (2, 0)
    assert units(("hidden",), both, entropy_grad=True) == (3, 0)
    assert units(("hidden", "weight"), lambda found: found.logps) == (2, 2)
    assert units(("hidden", "weight"), both, entropy_grad=True) == (3, 2)
    assert units(("weight",), both, entropy_grad=True) == (1, 2)
    assert units(("hidden", "weight"), lambda found: found.logps, plan=Plan(keep_logit_grads=True)) == (2, 1)
    for train_hidden, train_weight in ((False, False), (True, False), (True, True), (False, True)):
        schedule = Plan().schedule(
            n, d, v, torch.float32, "cpu", train_hidden=train_hidden, train_weight=train_weight,
            statistics=Statistics(True, True, True, True, entropy_grad=True),
        )  # fmt: skip
        assert (schedule.units_forward, schedule.units_backward) == (3 if train_hidden else 1, 2 * train_weight)


# ------------------------------------------------------------------------------- edges


def test_nothing_competes() -> None:
    found = linear_token_stats(torch.ones(3, 2), torch.ones(1, 2), torch.tensor([0, -100, 0]))
    assert found.entropy.tolist() == found.log_sum_sq_probs.tolist() == [0.0] * 3
    assert found.mean_logits.tolist() == [2.0, 0.0, 2.0]
    assert found.is_top1.tolist() == [True, False, True]


@pytest.mark.parametrize("temperature", [0.01, 100.0])
def test_the_ends_of_temperature(temperature: float, device: torch.device) -> None:
    case = make_case((20,), 8, 300, torch.float32, device, ignored=0.0, largest=6.0)
    found, expected = of(case, temperature=temperature), exact(case, temperature)
    torch.testing.assert_close(found.entropy.double(), expected.entropy, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.log_sum_sq_probs.double(), expected.log_sum_sq_probs, rtol=1e-4, atol=1e-4)


def test_entries_that_a_bias_masks(device: torch.device) -> None:
    case = make_case((9,), 8, 40, torch.float32, device, bias=True, ignored=0.0)
    case.bias[10:] = -torch.inf
    case.targets.copy_(torch.arange(9) % 10)
    seen = Case(case.hidden, case.weight[:10], case.targets, case.bias[:10])
    found, expected = of(case, plan=SMALL), exact(seen)
    torch.testing.assert_close(found.entropy.double(), expected.entropy, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.log_sum_sq_probs.double(), expected.log_sum_sq_probs, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.is_top1, expected.is_top1)
    assert (found.mean_logits == -torch.inf).all()


def test_a_row_that_is_not_finite_stays_alone(device: torch.device) -> None:
    case = make_case((9,), 8, 40, torch.float32, device, ignored=0.0)
    clean = of(case)
    case.hidden[4] = torch.nan
    found = of(case)
    assert all(x[4].isnan() for x in found[:4])
    assert not found.is_top1[4]
    for x, y in zip(found, clean, strict=True):
        assert torch.equal(x[[0, 1, 2, 3, 5]], y[[0, 1, 2, 3, 5]])


def test_nothing_is_scored() -> None:
    hidden = torch.ones(3, 4, requires_grad=True)
    found = linear_token_stats(hidden, torch.ones(5, 4), torch.full((3,), IGNORED), entropy_grad=True)
    (found.logps.sum() + found.entropy.sum()).backward()
    assert not hidden.grad.any()
    assert not any(x.any() for x in found)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.floats(0.01, 60.0), vocab_size=st.integers(1, 400), n=st.integers(1, 20))
def test_bounds_that_hold_for_any_distribution(seed: int, size: float, vocab_size: int, n: int) -> None:
    """0 <= H <= log V, and the order-2 entropy -log sum p^2 lies between 0 and H and above 2 log p of any token."""
    random = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(n, 6, generator=random) * size / 6, torch.randn(vocab_size, 6, generator=random)
    targets = torch.randint(vocab_size, (n,), generator=random)
    found = linear_token_stats(hidden, weight, targets, plan=SMALL)
    slack = 2e-5
    assert (found.entropy >= 0).all()
    assert (found.entropy <= math.log(vocab_size) + slack).all()
    assert (found.log_sum_sq_probs <= slack).all()
    assert (-found.log_sum_sq_probs <= found.entropy + slack).all()
    assert (found.log_sum_sq_probs >= 2 * found.logps - slack).all()
    likely = found.logps > math.log(0.5) + slack
    assert found.is_top1[likely].all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"statistics": ["entropy", "top1"]}, "statistics holds 'top1': it must be some of 'entropy'"),
        ({"statistics": ["is_top1"], "entropy_grad": True}, "add 'entropy'"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"temperature": math.nan}, "temperature=nan must be positive"),
        ({"softcap": -1.0}, "softcap=-1.0"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_token_stats(torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 1]), **options)


def test_compiled_around() -> None:
    """A graph break, and the same numbers and gradients."""
    case = make_case((6,), 8, 50, torch.float32, CPU)

    def loss(hidden: Tensor) -> Tensor:
        found = linear_token_stats(hidden * 2, case.weight, case.targets, entropy_grad=True)
        return (found.logps - found.entropy).sum()

    gradients = []
    for function in (loss, torch.compile(loss, backend="aot_eager")):
        hidden = case.hidden.detach().clone().requires_grad_()
        function(hidden).backward()
        gradients.append(hidden.grad)
    torch.testing.assert_close(*gradients)
