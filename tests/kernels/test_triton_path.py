"""The Triton kernels against float64, and against what plain torch gets in the same dtype.

On a machine without a GPU they run in Triton's interpreter. Every buffer that the backend allocates comes
filled with NaN, so that nothing it fails to write can pass.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from orpo_kernels.kernels import torch_path
from orpo_kernels.kernels.configs import TileConfig
from orpo_kernels.kernels.interface import Forward, Head, KeptLogitGrads, Tokens
from orpo_kernels.plan import Schedule

triton_path = pytest.importorskip("orpo_kernels.kernels.triton_path", reason="Triton is not installed")
triton_launch = pytest.importorskip("orpo_kernels.kernels.triton_launch", reason="Triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Small, so that small inputs still have several tiles each way and steps along D.
CONFIG = TileConfig(block_c=32, block_v=64, block_d=32, num_warps=4, num_stages=2, group=2)
DTYPES = [torch.float32, torch.bfloat16]
EMPTY = torch.empty
LOG_2 = math.log(2)


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_nan(*args: object, **kwargs: object) -> Tensor:
            out = allocate(*args, **kwargs)
            return out.fill_(torch.nan) if out.is_floating_point() else out

        return allocate_nan

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))


@pytest.fixture
def generator() -> torch.Generator:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    return torch.Generator(DEVICE).manual_seed(seed)


class Problem(NamedTuple):
    tokens: Tokens
    head: Head


class Answer(NamedTuple):
    """What the definitions give in float64 with all the logits. g: (onehot - q) f' [N, V].

    logit_error: what fp32 arithmetic may miss the worst logit of a row by [N]: four roundings of the sum before it
    is capped, and of its terms' root sum square and bias, as a sum that cancels, or is flattened by a soft-cap, is
    off by as much as one that is not. Tensor cores add 16 products at a time and cut what does not fit: one more
    rounding for each 16 of D.
    """

    logit_error: Tensor
    log_odds: Tensor
    lse: Tensor
    u: Tensor
    g: Tensor
    hidden: Tensor

    @property
    def one_minus_p(self) -> Tensor:
        return torch.sigmoid(-self.log_odds)


def make(
    generator: torch.Generator,
    n: int,
    d: int,
    v: int,
    dtype: torch.dtype,
    *,
    bias: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
    rows: bool = False,
    spread: float = 3.0,
) -> Problem:
    """Random tokens whose logits have a standard deviation of `spread` before scale and cap."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE)

    available = n // 2 + 1 if rows else n
    hidden = normal(available, d).to(dtype)
    weight = (normal(v, d) * spread / d**0.5).to(dtype)
    index = torch.randint(available, (n,), generator=generator, device=DEVICE) if rows else None
    targets = torch.randint(v, (n,), generator=generator, device=DEVICE)
    head = Head(weight, normal(v).to(dtype) if bias else None, scale, softcap, dtype)
    return Problem(Tokens(hidden, index, targets), head)


def exact(problem: Problem) -> Answer:
    tokens, head = problem
    hidden = tokens.hidden if tokens.rows is None else tokens.hidden[tokens.rows]
    hidden, weight = (x.to(head.compute_dtype).double() for x in (hidden, head.weight))
    x = hidden @ weight.T
    terms = (hidden.square() @ weight.square().T).sqrt()
    if head.bias is not None:
        bias = head.bias.to(head.compute_dtype).double()
        x, terms = x + bias, terms + bias.abs()
    cuts = hidden.shape[1] / 16 if DEVICE == "cuda" and head.compute_dtype == torch.bfloat16 else 0
    logit_error = (4 + cuts) * rounding(torch.float32) * head.logit_scale * (x.abs() + terms).amax(1)
    z = x * head.logit_scale
    slope = torch.full_like(z, head.logit_scale)
    if head.softcap is not None:
        slope = head.logit_scale / torch.cosh(z / head.softcap).square()
        z = head.softcap * torch.tanh(z / head.softcap)
    y = tokens.targets[:, None]
    onehot = torch.zeros_like(z).scatter_(1, y, 1.0)
    others = z.masked_fill(onehot.bool(), -torch.inf)
    lse = torch.logsumexp(others, 1)
    q = torch.exp(others - lse.nan_to_num(neginf=0.0)[:, None])
    g = (onehot - q) * slope
    return Answer(logit_error, z.gather(1, y)[:, 0] - lse, lse, g @ weight, g, hidden)


def schedule(problem: Problem, *, chunk: int = 33, keep: int = 0, back: tuple[int, int] = (30, 100)) -> Schedule:
    return Schedule(chunk, problem.head.weight.shape[0], *back, keep, 0, 0, 0.0, 0.0)


def run(problem: Problem, want_u: bool = True, config: TileConfig = CONFIG, **sizes: int) -> Forward:
    return triton_path.forward(*problem, schedule(problem, **sizes), want_u, config=config)


def relative(got: Tensor, want: Tensor) -> float:
    """Norm-wise relative error."""
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-300))


def rounding(dtype: torch.dtype) -> float:
    """The relative error of one number rounded to `dtype`."""
    return torch.finfo(dtype).eps / 2


def assert_as_good(
    got: Tensor, peer: Tensor, left: Tensor, right: Tensor, rounded: float, operands: int, what: str
) -> None:
    """`got` is left @ right, with at most twice plain torch's error, or that of the roundings it has to make.

    Those are one of the result, and one of each term for every operand that is kept in the narrow dtype. Terms may
    cancel, so their errors, which are independent, go with the root of the sum of the terms' squares.
    """
    want = left @ right
    terms = (left.square() @ right.square()).sqrt()
    error = float((got.double() - want).norm())
    limit = max(2 * float((peer.double() - want).norm()), rounded * float(operands * terms.norm() + want.norm()))
    assert error <= limit, f"{what}: error {error:.2e}, allowed {limit:.2e}, of {float(want.norm()):.2e}"


HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.0625, "spread": 40.0},
    "large logits": {"bias": True, "spread": 60.0},
    "softcap": {"softcap": 5.0},
    "everything": {"bias": True, "scale": 1.5, "softcap": 5.0, "rows": True},
    "beyond the cap": {"softcap": 30.0, "spread": 60.0},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", HEADS)
def test_heads(generator: torch.Generator, dtype: torch.dtype, kind: str) -> None:
    problem = make(generator, 40, 40, 150, dtype, **HEADS[kind])
    check_everything(problem, generator)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "d", "v"),
    [(1, 7, 2), (1, 96, 1000), (3, 1, 5), (33, 576, 65), (5, 96, 1280), (2, 7, 1000), (65, 64, 64), (1, 1, 2)],
)
def test_ragged_sizes(generator: torch.Generator, dtype: torch.dtype, n: int, d: int, v: int) -> None:
    check_everything(make(generator, n, d, v, dtype, bias=True), generator)


def check_everything(problem: Problem, generator: torch.Generator, config: TileConfig = CONFIG) -> None:
    """Forward and weight gradient, with no, some and all tokens kept, against float64 and plain torch."""
    tokens, head = problem
    dtype, n = head.compute_dtype, tokens.targets.numel()
    want, peer = exact(problem), torch_path.forward(*problem, schedule(problem), True)
    wide = rounding(torch.float32)
    logit_error = float(want.logit_error.max())

    sums_only = run(problem, want_u=False, config=config)
    assert sums_only.u is None
    torch.testing.assert_close(sums_only.log_odds.double(), want.log_odds, rtol=2 * wide, atol=logit_error)
    coefficient = torch.rand(n, generator=generator, device=DEVICE) * want.one_minus_p.float()
    for keep in {0, (n + 1) // 2}:
        got = run(problem, keep=keep, config=config)
        torch.testing.assert_close(got.log_odds.double(), want.log_odds, rtol=2 * wide, atol=logit_error)
        torch.testing.assert_close(got.lse.double(), want.lse, rtol=2 * wide, atol=logit_error)
        assert got.u is not None
        assert got.u.dtype == dtype
        assert peer.u is not None
        weight = head.weight.to(dtype).double()
        assert_as_good(got.u, peer.u.to(dtype), want.g, weight, max(rounding(dtype), logit_error), 1, "u")
        if keep:
            assert_kept(got.kept, problem, want, logit_error)
        check_weight_gradient(problem, want, coefficient, got, keep, logit_error, config)


def assert_kept(kept: KeptLogitGrads | None, problem: Problem, want: Answer, logit_error: float) -> None:
    assert kept is not None
    v = problem.head.weight.shape[0]
    values = torch.cat(kept.values, 1)[:, :v]
    k = values.shape[0]
    scale = 1.0 if problem.head.softcap is not None else problem.head.logit_scale
    # The kept values are (q - onehot) f' (less the scale of a linear head) times a row's own number.
    got = values.double() * torch.exp(kept.base.double() - want.lse[:k, None]) * scale
    assert relative(got, -want.g[:k]) <= max(rounding(problem.head.compute_dtype), 2 * logit_error)


def check_weight_gradient(
    problem: Problem,
    want: Answer,
    coefficient: Tensor,
    got: Forward,
    keep: int,
    logit_error: float,
    config: TileConfig,
) -> None:
    tokens, head = problem
    weighted = coefficient.double()[:, None] * want.g
    d_weight, d_bias, _ = triton_path.weight_gradient(
        tokens, head, coefficient, got.lse, got.kept, schedule(problem, keep=keep), True, True, config=config
    )
    by_torch = torch_path.weight_gradient(tokens, head, coefficient, got.lse, None, schedule(problem), True, True)
    rounded = max(rounding(head.compute_dtype), logit_error)
    # The kept exponentials leave the rows of `hidden` to be scaled, and rounded, too.
    operands = 2 if keep else 1
    assert d_weight.dtype == head.weight.dtype
    assert_as_good(d_weight, by_torch[0], weighted.T, want.hidden, rounded, operands, f"weight, {keep} kept")
    if head.bias is None:
        assert d_bias is None
    else:
        assert d_bias.dtype == head.bias.dtype
        ones = torch.ones_like(want.lse)
        assert_as_good(d_bias, by_torch[1], weighted.T, ones, rounded, operands, f"bias, {keep} kept")


PERSISTENT = CONFIG._replace(persistent=True)
FEW = [(40, 5.0, True), (7, None, True)]


@pytest.mark.parametrize(
    ("d", "softcap", "rows"),
    [
        pytest.param(d, softcap, rows, marks=[pytest.mark.exhaustive] * ((d, softcap, rows) not in FEW))
        for d in (40, 64, 7)
        for softcap in (None, 5.0)
        for rows in (False, True)
    ],
)
def test_persistent_tiles(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch, d: int, softcap: float | None, rows: bool
) -> None:
    """As good as a program a tile; with pointers where rows do not begin at multiples of 16 bytes."""
    problem = make(generator, 40, d, 300, torch.bfloat16, bias=True, softcap=softcap, rows=rows)
    made = []
    descriptor = triton_launch.TensorDescriptor

    class Watched(descriptor):  # type: ignore[misc, valid-type]
        @staticmethod
        def from_tensor(tensor: Tensor, block: list[int]) -> object:
            made.append((*tensor.shape, *block))
            return descriptor.from_tensor(tensor, block)

    monkeypatch.setattr(triton_launch, "TensorDescriptor", Watched)
    monkeypatch.setattr(triton_launch.configs, "multiprocessors", lambda device: 3)  # several tiles a program
    run(problem)
    assert not made
    check_everything(problem, generator, PERSISTENT)
    used = d % 8 == 0
    assert ((33, d, 32, 32) in made) is used  # a chunk's tokens, gathered where they are given by rows
    assert ((300, d, 64, 32) in made) is used  # the weight
    assert ((33, 320, 32, 16) in made) is used  # exponentials, stored in quarters of a tile
    assert ((100, d, 64, 32) in made) is used  # a block of the weight, for its gradient


@pytest.mark.parametrize("d", [64, 512])
def test_whole_numbers_give_the_same_bits_in_any_order(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch, d: int
) -> None:
    """Operands in [-8, 8] and D <= 512: every partial sum is a whole number below 2^24, which fp32 holds."""
    n, v = 40, 300

    def whole(*shape: int) -> Tensor:
        return torch.randint(-8, 9, shape, generator=generator, device=DEVICE).bfloat16()

    hidden, weight = whole(n, d), whole(v, d)
    y = torch.randint(v, (n,), generator=generator, device=DEVICE)
    exact_logits = hidden.double() @ weight.double().T
    assert exact_logits.abs().max() < 2**24
    head = Head(weight, None, 2.0**-9, None, torch.bfloat16)
    monkeypatch.setattr(triton_launch.configs, "multiprocessors", lambda device: 3)
    tiles = []
    for config in (CONFIG, CONFIG._replace(block_d=64), CONFIG._replace(block_c=16, block_v=128), PERSISTENT):
        launch = triton_launch.Launcher(head, config)
        base = launch.targets(hidden, None, y)[2]
        e, g = (triton_launch.tile_buffer(n, v, torch.bfloat16, torch.device(DEVICE), config) for _ in range(2))
        launch.sums(hidden, None, y, base, e)
        launch.gradient(hidden, y, torch.ones_like(base), base * LOG_2, g, None)
        tiles.append((e[:, :v], g[:, :v]))
        # With a sum of zero every row is the slow lane's, and its base becomes the largest logit itself, base-2.
        others = (exact_logits.float() * (2.0**-9 / LOG_2)).scatter(1, y[:, None], -torch.inf)
        own = (exact_logits.float() * (2.0**-9 / LOG_2)).gather(1, y[:, None])[:, 0]
        assert torch.equal(base, own)
        launch.slow_lane(
            hidden, None, y, base, torch.zeros(n, device=DEVICE), None, torch.empty(launch.n_v, n, device=DEVICE)
        )
        assert torch.equal(base, others.amax(1))
    for e, g in tiles[1:]:
        assert torch.equal(e, tiles[0][0])
        assert torch.equal(g, tiles[0][1])
    z = exact_logits * 2.0**-9
    e = torch.exp(z - z.gather(1, y[:, None])).scatter(1, y[:, None], 0.0)
    assert relative(tiles[0][0], e) <= 2 * rounding(torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_one_entry_in_the_vocabulary(generator: torch.Generator, dtype: torch.dtype) -> None:
    problem = make(generator, 3, 7, 1, dtype, bias=True)
    got = run(problem, keep=1)
    assert got.log_odds.tolist() == [torch.inf] * 3
    assert got.lse.tolist() == [-torch.inf] * 3
    assert got.u is not None
    torch.testing.assert_close(got.u, problem.head.weight.expand(3, 7))  # times s = 0
    gradients = triton_path.weight_gradient(
        *problem, torch.sigmoid(-got.log_odds), got.lse, got.kept, schedule(problem), True, True, config=CONFIG
    )
    assert not gradients[0].any()
    assert not gradients[1].any()


def confident(generator: torch.Generator, dtype: torch.dtype, log_odds: list[float]) -> tuple[Problem, Answer]:
    """Tokens whose targets have about the given log-odds."""
    problem = make(generator, len(log_odds), 96, 200, dtype)
    weight, y = problem.head.weight.double(), problem.tokens.targets
    for _ in range(8):  # Rounding and the other entries' share shift them; each turn takes out what is left.
        left = torch.tensor(log_odds, device=DEVICE) - exact(problem).log_odds
        along = weight[y] / weight[y].square().sum(1, keepdim=True)
        hidden = (problem.tokens.hidden.double() + left[:, None] * along).to(dtype)
        problem = Problem(problem.tokens._replace(hidden=hidden), problem.head)
    return problem, exact(problem)


# 1 - p from 0.9 to 1e-10, and targets that are wrong.
LOG_ODDS = [-2.0, 0.0, 1.0, 4.6, 9.2, 13.8, 18.4, 23.0, 35.0, 60.0, -30.0, -66.0]
# Rows that the first pass cannot hold.
EXTREME_LOG_ODDS = [73.0, 120.0, 200.0, -150.0, -500.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_sure_tokens(generator: torch.Generator, dtype: torch.dtype) -> None:
    problem, want = confident(generator, dtype, LOG_ODDS + EXTREME_LOG_ODDS)
    n = want.log_odds.numel()
    torch.testing.assert_close(
        want.log_odds, torch.tensor(LOG_ODDS + EXTREME_LOG_ODDS).double().to(DEVICE), rtol=0.02, atol=0.3
    )
    logit_error = want.logit_error
    for keep in (0, n):
        got = run(problem, keep=keep)
        assert got.u is not None
        assert ((got.log_odds - want.log_odds).abs() <= logit_error).all()
        # Where s underflows both are 0; where they do not, a row of the hidden gradient is s u.
        rows = torch.sigmoid(-got.log_odds)[:, None] * got.u.float()
        truth = want.one_minus_p[:, None] * want.u
        error = (rows - truth).norm(dim=1) / truth.norm(dim=1)
        representable = want.one_minus_p > torch.finfo(torch.float32).tiny
        assert (error[representable] <= (5e-3 if dtype == torch.bfloat16 else 2 * logit_error[representable])).all()
        assert (rows[~representable].abs() < 1e-37).all()

        logps = torch.nn.functional.logsigmoid(got.log_odds)
        exact_logps = torch.nn.functional.logsigmoid(want.log_odds)
        off = (logps - exact_logps).abs() / exact_logps.abs()
        assert (off[representable] <= 2 * logit_error[representable]).all()

        # One token at a time, or the wrong ones would hide the sure ones in a sum.
        for t in range(n):
            coefficient = torch.zeros(n, device=DEVICE)
            coefficient[t] = 1.0
            d_weight, _, _ = triton_path.weight_gradient(
                *problem, coefficient, got.lse, got.kept, schedule(problem), True, False, config=CONFIG
            )
            # In bf16 what is stored of a logit is rounded, the result, and a kept token's hidden row times its factor.
            allowed = (3 if keep else 2) * 2.0**-9 if dtype == torch.bfloat16 else 8 * float(logit_error[t])
            assert relative(d_weight, want.g[t, :, None] * want.hidden[t]) <= allowed, want.log_odds[t]


@pytest.mark.parametrize("dtype", DTYPES)
def test_sure_tokens_of_many_equal_competitors(generator: torch.Generator, dtype: torch.dtype) -> None:
    """Each competitor alone is too small for the first pass long before their sum is."""
    v, z_y = 100, torch.arange(20.0, 100.0, 4.0)
    weight = torch.linalg.qr(torch.randn(128, v, generator=generator, device=DEVICE))[0].T.to(dtype)
    targets = torch.randint(v, z_y.shape, generator=generator, device=DEVICE)
    hidden = (weight[targets].float() * z_y.to(DEVICE)[:, None]).to(dtype)
    problem = Problem(Tokens(hidden, None, targets), Head(weight, None, 1.0, None, dtype))
    want, got = exact(problem), run(problem)
    assert got.u is not None
    assert ((got.log_odds - want.log_odds).abs() <= want.logit_error).all()
    error = (got.u - want.u).norm(dim=1) / want.u.norm(dim=1)
    assert (error <= (5e-3 if dtype == torch.bfloat16 else 1e-5)).all()


def test_slow_lane_is_needed_and_changes_no_other_row(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, want = confident(generator, torch.bfloat16, LOG_ODDS + EXTREME_LOG_ODDS)
    with_lane = run(problem)
    monkeypatch.setattr(triton_launch.Launcher, "slow_lane", lambda *_: None)
    without = run(problem)
    off = ((without.log_odds - want.log_odds).abs() > 1e-2) | without.log_odds.isnan()
    first = len(LOG_ODDS)
    assert not off[:first].any()
    assert off[first + 1 :].all()  # -73 is where S no longer vouches for itself.
    assert with_lane.u is not None
    assert without.u is not None
    assert torch.equal(with_lane.log_odds[:first], without.log_odds[:first])
    assert torch.equal(with_lane.u[:first], without.u[:first])


def test_a_whole_chunk_in_the_slow_lane(generator: torch.Generator) -> None:
    problem, want = confident(generator, torch.float32, [60.0, -200.0] * 20)
    problem = Problem(problem.tokens, problem.head._replace(softcap=1000.0))
    want = exact(problem)
    got = run(problem, chunk=33)
    assert got.u is not None
    assert ((got.log_odds - want.log_odds).abs() <= 1000.0 * 8e-7).all()  # 4e-7 of the cap off each of two logits
    assert relative(got.u, want.u) <= 1e-3


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_is_not_finite(generator: torch.Generator, dtype: torch.dtype, value: float) -> None:
    problem = make(generator, 40, 24, 100, dtype)
    clean = run(problem)
    hidden = problem.tokens.hidden.clone()
    hidden[7, 3] = value
    broken = run(Problem(problem.tokens._replace(hidden=hidden), problem.head))
    assert not broken.log_odds[7].isfinite()
    assert clean.u is not None
    assert broken.u is not None
    others = torch.arange(40, device=DEVICE) != 7
    assert torch.equal(broken.log_odds[others], clean.log_odds[others])
    assert torch.equal(broken.u[others], clean.u[others])


def test_entries_masked_by_a_bias_of_minus_infinity(generator: torch.Generator) -> None:
    problem = make(generator, 4, 24, 70, torch.float32, bias=True)
    bias = problem.head.bias
    assert bias is not None
    bias[5:66] = -torch.inf
    problem.tokens.targets.copy_(torch.tensor([0, 5, 69, 65]))
    want, got = exact(problem), run(problem, keep=2)
    assert got.u is not None
    torch.testing.assert_close(got.log_odds.double(), want.log_odds, rtol=1e-5, atol=1e-5)  # -inf at masked targets
    assert got.log_odds[[1, 3]].tolist() == [-torch.inf] * 2
    assert relative(got.u, want.u) <= 2e-6
    # All but the target masked: certain, and nothing competes.
    bias.fill_(-torch.inf)
    bias[0] = 0.0
    got = run(problem)
    assert got.log_odds[0] == torch.inf
    d_weight, _, _ = triton_path.weight_gradient(
        *problem, torch.sigmoid(-got.log_odds) * torch.tensor([1.0, 0, 0, 0], device=DEVICE), got.lse, None,
        schedule(problem), True, False, config=CONFIG,
    )  # fmt: skip
    assert not d_weight.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(generator: torch.Generator, dtype: torch.dtype) -> None:
    plain = make(generator, 33, 40, 70, dtype)
    hidden, weight = plain.tokens.hidden, plain.head.weight
    want = run(plain)
    wider = torch.zeros(33, 3, 81, dtype=dtype, device=DEVICE)
    wider[:, 1, :80:2] = hidden
    for strided_hidden in (hidden.T.contiguous().T, wider[:, 1, :80:2]):
        assert torch.equal(strided_hidden, hidden)
        for strided_weight in (weight, weight.T.contiguous().T, torch.cat([weight, weight], 1)[:, :40]):
            tokens, head = plain.tokens._replace(hidden=strided_hidden), plain.head._replace(weight=strided_weight)
            got = run(Problem(tokens, head))
            torch.testing.assert_close(got.log_odds, want.log_odds)
            torch.testing.assert_close(got.u, want.u)
            gradients = [
                triton_path.weight_gradient(
                    *p, torch.ones(33, device=DEVICE), want.lse, None, schedule(plain), True, False, config=CONFIG
                )[0]
                for p in (plain, Problem(tokens, head))
            ]
            assert gradients[1].is_contiguous()
            torch.testing.assert_close(gradients[1], gradients[0])


@pytest.fixture
def huge(monkeypatch: pytest.MonkeyPatch) -> Callable[[Tensor], Tensor]:
    """Copies a [3, X] tensor to rows so far apart that the last begins past 2^31 elements.

    Only the pages that are written exist.
    """
    storage = EMPTY((1 << 31) + (1 << 16), dtype=torch.bfloat16, device=DEVICE)
    if DEVICE == "cpu":
        # The interpreter copies each argument's storage back, here onto itself.
        monkeypatch.setattr(torch.UntypedStorage, "copy_", lambda self, *_: self)
    return lambda x: storage.as_strided(x.shape, (1 << 30, 1)).copy_(x)


def test_hidden_rows_past_2_to_the_31(generator: torch.Generator, huge: Callable[[Tensor], Tensor]) -> None:
    # Both strides are multiples of 16: kernels are compiled, and add up, alike for them.
    problem = make(generator, 5, 48, 70, torch.bfloat16)
    tokens = problem.tokens._replace(
        hidden=problem.tokens.hidden[:3], rows=torch.tensor([2, 0, 1, 2, 2], device=DEVICE)
    )
    far = tokens._replace(hidden=huge(tokens.hidden))
    assert_same(run(Problem(far, problem.head)), run(Problem(tokens, problem.head)))


def test_weight_rows_past_2_to_the_31(generator: torch.Generator, huge: Callable[[Tensor], Tensor]) -> None:
    tokens, head = make(generator, 5, 48, 3, torch.bfloat16)
    tokens.targets.copy_(torch.tensor([2, 0, 1, 2, 2]))
    far = head._replace(weight=huge(head.weight))
    assert_same(run(Problem(tokens, far)), run(Problem(tokens, head)), same_product=False)


def test_tile_rows_past_2_to_the_31(generator: torch.Generator, huge: Callable[[Tensor], Tensor]) -> None:
    tokens, head = make(generator, 3, 40, 128, torch.bfloat16)
    launch = triton_launch.Launcher(head, CONFIG)
    base = launch.targets(tokens.hidden, None, tokens.targets)[2]
    tiles = [torch.zeros(3, 128, dtype=torch.bfloat16, device=DEVICE), huge(torch.zeros(3, 128))]
    for tile in tiles:
        launch.sums(tokens.hidden, None, tokens.targets, base, tile)
    assert tiles[0].count_nonzero() == 3 * 127
    assert torch.equal(*tiles)


def assert_same(a: Forward, b: Forward, *, same_product: bool = True) -> None:
    """The same bits, but for u where the library may choose another product for E W."""
    assert a.u is not None
    assert b.u is not None
    for x, y in ((a.log_odds, b.log_odds), (a.lse, b.lse), (a.u, b.u)):
        assert not x.isnan().any()
        if x is a.u and not same_product:
            torch.testing.assert_close(x, y, rtol=2 * rounding(x.dtype), atol=2 * rounding(x.dtype))
        else:
            assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_twice(generator: torch.Generator, dtype: torch.dtype) -> None:
    problem = make(generator, 70, 40, 200, dtype, bias=True, rows=True)
    first, second = run(problem, keep=20), run(problem, keep=20)
    assert_same(first, second)
    gradients = [
        triton_path.weight_gradient(
            *problem, torch.sigmoid(-f.log_odds), f.lse, f.kept, schedule(problem), True, True, config=CONFIG
        )
        for f in (first, second)
    ]
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert torch.equal(gradients[0][1], gradients[1][1])


def test_chunks_change_nothing_but_roundings(generator: torch.Generator) -> None:
    problem = make(generator, 70, 40, 90, torch.bfloat16, bias=True)
    want, whole = exact(problem), run(problem, chunk=70)
    cut = run(problem, chunk=7)
    if DEVICE == "cpu":
        # Interpreted, a tile is NumPy's product, which may add a row's terms in another order at another place.
        for x, y in ((cut.log_odds, whole.log_odds), (cut.lse, whole.lse)):
            assert ((x - y).abs() <= want.logit_error).all()
        cut = cut._replace(log_odds=whole.log_odds, lse=whole.lse)
    assert_same(cut, whole, same_product=False)
    coefficient = want.one_minus_p.float()
    errors = []
    for back in ((70, 90), (9, 17)):
        d_weight, _, _ = triton_path.weight_gradient(
            *problem, coefficient, whole.lse, None, schedule(problem, back=back), True, False, config=CONFIG
        )
        errors.append(relative(d_weight, (coefficient.double()[:, None] * want.g).T @ want.hidden))
    assert errors[1] <= 1.1 * errors[0]


def test_parameters_wider_than_the_operands(generator: torch.Generator) -> None:
    """Under autocast: fp32 parameters and hidden states, bf16 products, fp32 gradients."""
    tokens, head = make(generator, 30, 40, 90, torch.float32, bias=True, rows=True)
    rounded = Problem(
        tokens._replace(hidden=tokens.hidden.bfloat16()),
        head._replace(weight=head.weight.bfloat16(), bias=head.bias.bfloat16(), compute_dtype=torch.bfloat16),
    )
    mixed = Problem(tokens, head._replace(compute_dtype=torch.bfloat16))
    got = run(mixed)
    assert_same(got, run(rounded))
    coefficient = torch.ones(30, device=DEVICE)
    gradients = [
        triton_path.weight_gradient(*p, coefficient, got.lse, None, schedule(p), True, True, config=CONFIG)
        for p in (mixed, rounded)
    ]
    for wide, narrow in zip(*(g[:2] for g in gradients), strict=True):
        assert wide.dtype == torch.float32
        assert not torch.equal(wide, narrow.float())
        assert torch.equal(wide.bfloat16(), narrow)


def test_default_configuration_and_no_tokens(generator: torch.Generator) -> None:
    problem = make(generator, 5, 24, 50, torch.float32, bias=True)
    got = triton_path.forward(*problem, schedule(problem), True)
    torch.testing.assert_close(got.log_odds.double(), exact(problem).log_odds, rtol=1e-5, atol=1e-5)
    nothing = Problem(
        Tokens(problem.tokens.hidden, problem.tokens.targets[:0], problem.tokens.targets[:0]), problem.head
    )
    got = run(nothing)
    assert got.log_odds.shape == got.lse.shape == (0,)
    assert got.u is not None
    assert got.u.shape == (0, 24)
    gradients = triton_path.weight_gradient(
        *nothing, got.log_odds, got.lse, None, schedule(problem), True, True, config=CONFIG
    )
    assert gradients[0].shape == (50, 24)
    assert not gradients[0].any()
    assert not gradients[1].any()


def test_what_is_not_wanted_is_not_made(generator: torch.Generator) -> None:
    problem = make(generator, 5, 24, 50, torch.float32, bias=True)
    got, ones = run(problem), torch.ones(5, device=DEVICE)
    both = triton_path.weight_gradient(*problem, ones, got.lse, None, schedule(problem), True, True, config=CONFIG)
    for want_weight, want_bias in ((True, False), (False, True), (False, False)):
        some = triton_path.weight_gradient(
            *problem, ones, got.lse, None, schedule(problem), want_weight, want_bias, config=CONFIG
        )
        for wanted, part, full in zip((want_weight, want_bias, False), some, both, strict=True):
            assert torch.equal(part, full) if wanted else part is None


def test_refusals(generator: torch.Generator) -> None:
    problem = make(generator, 5, 24, 50, torch.float32)
    assert triton_path.supports(problem.head, torch.device(DEVICE)) is None
    for dtype in (torch.float16, torch.float64):
        refused = triton_path.supports(problem.head._replace(compute_dtype=dtype), torch.device(DEVICE))
        assert str(dtype) in str(refused)
    assert "meta" in str(triton_path.supports(problem.head, torch.device("meta")))
    adapted = problem.head._replace(adapter=torch.zeros(50, 4, device=DEVICE))
    assert "adapter" in str(triton_path.supports(adapted, torch.device(DEVICE)))
    with pytest.raises(ValueError, match=r"forward_block=49.*vocabulary of 50.*full_vocab_tiles=True"):
        triton_path.forward(*problem, Schedule(5, 49, 5, 49, 0, 0, 0, 0.0, 0.0), True)
