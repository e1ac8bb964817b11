"""`linear_logps` under autograd, autocast, torch.compile, hooks and counters: cases.md's Autograd, row by row."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import (
    IGNORED,
    Case,
    assert_gradients_match,
    assert_logps_match,
    evaluate,
    evaluate_exact,
    exact_logps,
    grad_of,
    largest_error,
    least_scratch,
    make_case,
    normal_like,
    relative_error,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from orpo_kernels import OrpoLoss, Plan, linear_logps, orpo_loss


def leaves_of(case: Case, *names: str) -> list[Tensor]:
    return [getattr(case, name).detach().clone().requires_grad_() for name in names]


# ---------------------------------------------------------------------------- what is trained


@pytest.mark.parametrize(
    "trained", [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("weight", "bias")], ids=str
)
@pytest.mark.parametrize("keep", [False, True], ids=["recomputed", "kept"])
def test_only_what_trains_gets_a_gradient(trained: tuple[str, ...], keep: bool, device: torch.device) -> None:
    """hidden needs no gradient, weight does - and every other choice: the gradients are those of the whole."""
    case = make_case((4, 9), 16, 60, torch.float32, device, bias=True, softcap=20.0)
    upstream = normal_like(case.targets)
    frozen = tuple({"hidden", "weight", "bias"} - set(trained))
    found = evaluate(linear_logps, case, upstream, frozen=frozen, plan=Plan(keep_logit_grads=keep))
    assert_gradients_match(case, found, upstream, frozen=frozen)


class Largest(TorchDispatchMode):
    """Sees the size of the largest new storage, and how many products ran."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += func._schema.name in ("aten::mm", "aten::addmm", "aten::bmm", "aten::addmv")
        known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in known:
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.itemsize)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_frozen_weight_costs_nothing(dtype: torch.dtype, device: torch.device) -> None:
    """weight frozen: no dW is computed and none allocated; the backward has no product at all."""
    d, v = 64, 4096
    case = make_case((8,), d, v, dtype, device)

    def run(train_weight: bool) -> tuple[Largest, Largest]:
        hidden, weight = leaves_of(case, "hidden", "weight")
        weight.requires_grad_(train_weight)
        with Largest() as forward:
            logps = linear_logps(hidden, weight, case.targets).sum()
        with Largest() as backward:
            logps.backward()
        assert (weight.grad is not None) == train_weight
        return forward, backward

    forward, backward = run(train_weight=False)
    assert max(forward.elements, backward.elements) < v * d
    assert forward.products > 0
    assert backward.products == 0
    # The same eyes do see it where the weight trains.
    _, backward = run(train_weight=True)
    assert backward.elements == v * d
    assert backward.products > 0


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_no_grad(context: Callable[[], Any], device: torch.device) -> None:
    """Leaves that require a gradient still cost one unit only, and nothing is saved."""
    case = make_case((4, 9), 16, 60, torch.float32, device)
    hidden, weight = leaves_of(case, "hidden", "weight")
    expected = linear_logps(hidden, weight, case.targets)
    with context(), FlopCounterMode(display=False) as flops:
        found = linear_logps(hidden, weight, case.targets)
    assert not found.requires_grad
    assert torch.equal(found, expected.detach())
    n = int((case.targets != IGNORED).sum())
    assert flops.get_total_flops() == 2 * n * 16 * 60


# ---------------------------------------------------------------------------- upstream gradients


@pytest.mark.parametrize("keep", [False, True], ids=["recomputed", "kept"])
def test_backward_twice(keep: bool, device: torch.device) -> None:
    """backward twice with retain_graph: the second adds the same again."""
    case = make_case((4, 9), 16, 60, torch.float32, device, bias=True)
    names = ("hidden", "weight", "bias")
    hidden, weight, bias = leaves_of(case, *names)
    loss = linear_logps(hidden, weight, case.targets, bias=bias, plan=Plan(keep_logit_grads=keep)).sum()
    loss.backward(retain_graph=True)
    once = [grad_of(x).clone() for x in (hidden, weight, bias)]
    loss.backward()
    for x, gradient in zip((hidden, weight, bias), once, strict=True):
        assert torch.equal(grad_of(x), 2 * gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1 / 8, 65536.0])
def test_scaled_loss(dtype: torch.dtype, scale: float, device: torch.device) -> None:
    """the loss scaled by 1/8 or by a GradScaler's 65536: powers of two, so the gradients scale to the bit."""
    case = make_case((4, 9), 16, 60, dtype, device, bias=True)
    plain = evaluate(linear_logps, case)
    scaled = evaluate(lambda *a, **k: scale * linear_logps(*a, **k), case)
    for name in ("hidden", "weight", "bias"):
        assert torch.equal(getattr(scaled, name), scale * getattr(plain, name)), name


def test_grad_scaler(device: torch.device) -> None:
    """a GradScaler's step over fp16 autocast: scaled gradients unscale to those of the plain loss."""
    case = make_case((4, 9), 16, 60, torch.float32, device)
    model = nn.Linear(16, 16, bias=False, device=device)
    head = nn.Parameter(case.weight.clone())
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**16)
    optimizer = torch.optim.SGD([*model.parameters(), head], lr=0.0)

    def loss() -> Tensor:
        with torch.autocast(device.type, torch.float16):
            return -linear_logps(model(case.hidden), head, case.targets).mean()

    loss().backward()
    expected = [grad_of(model.weight).clone(), grad_of(head).clone()]
    optimizer.zero_grad()
    scaler.scale(loss()).backward()
    scaler.unscale_(optimizer)
    for x, gradient in zip((model.weight, head), expected, strict=True):
        torch.testing.assert_close(grad_of(x), gradient, rtol=2e-3, atol=1e-7)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**16


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_any_upstream_gradient(dtype: torch.dtype, device: torch.device) -> None:
    """per-token use: a non-linear function of each log-prob; zero, negative and huge weights among them."""
    case = make_case((4, 9), 16, 60, dtype, device, bias=True)
    upstream = normal_like(case.targets)
    upstream[0], upstream[1, ::2] = 0.0, 1e4
    found = evaluate(linear_logps, case, upstream)
    assert_gradients_match(case, found, upstream)
    assert (found.hidden[0] == 0).all()

    def loss(function: Callable[..., Tensor], *arguments: Any, **options: Any) -> Tensor:
        return function(*arguments, **options).double().exp().square()

    exact = evaluate(lambda *a, **k: loss(exact_logps, *a, **k), case, dtype=torch.float64)
    found = evaluate(lambda *a, **k: loss(linear_logps, *a, **k), case)
    bound = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 4e-3}[dtype]
    for name in ("hidden", "weight", "bias"):
        assert relative_error(getattr(found, name), getattr(exact, name)) <= bound, name


def test_an_expanded_upstream_gradient(device: torch.device) -> None:
    """sum() sends an expanded [] back: a gradient whose strides are all zero."""
    case = make_case((4, 9), 16, 60, torch.float32, device)
    by_sum = evaluate(lambda *a, **k: linear_logps(*a, **k).sum(), case, torch.ones((), device=device))
    by_ones = evaluate(linear_logps, case)
    assert torch.equal(by_sum.hidden, by_ones.hidden)
    assert torch.equal(by_sum.weight, by_ones.weight)


def test_nothing_scored_still_connects(device: torch.device) -> None:
    """zero scored tokens: zeros that reach every input, so that no rank waits for another."""
    for shape in ((4, 9), (0,), (3, 0)):
        case = make_case(shape, 16, 60, torch.bfloat16, device, bias=True)
        case.targets.fill_(IGNORED)
        for keep in (False, True):
            found = evaluate(linear_logps, case, plan=Plan(keep_logit_grads=keep))
            assert (found.logps == 0).all()
            for name in ("hidden", "weight", "bias"):
                gradient = getattr(found, name)
                assert gradient is not None
                assert gradient.shape == getattr(case, name).shape
                assert (gradient == 0).all()


# ---------------------------------------------------------------------------- how hidden was made


IN_FORWARD: dict[str, Callable[[Tensor], Tensor]] = {
    "flatten": lambda h: h.flatten(0, 1),
    "view": lambda h: h.view(-1, 16),
    "transpose": lambda h: h.transpose(0, 1),
    "shift": lambda h: h[:, :-1],
    "every second": lambda h: h[:, ::2],
    "expand": lambda h: h[:1].expand(3, -1, -1),
    "gather": lambda h: h.flatten(0, 1)[torch.tensor([7, 3, 3, 0], device=h.device)],
}


@pytest.mark.parametrize("how", IN_FORWARD.values(), ids=IN_FORWARD)
def test_gradients_reach_the_backbone(how: Callable[[Tensor], Tensor], device: torch.device) -> None:
    """gradients under an in-forward flatten or view: the backbone gets its gradient."""
    case = make_case((4, 9), 16, 60, torch.float64, device)
    (backbone,) = leaves_of(dataclasses.replace(case, weight=torch.eye(16, device=device).double()), "weight")

    def gradients(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        hidden = how(case.hidden @ backbone)
        targets = torch.arange(math.prod(hidden.shape[:-1]), device=device).view(hidden.shape[:-1]) % 60
        weight = case.weight.clone().requires_grad_()
        return torch.autograd.grad(function(hidden, weight, targets).sum(), (backbone, weight))

    torch.testing.assert_close(gradients(linear_logps), gradients(exact_logps), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing(reentrant: bool, device: torch.device) -> None:
    case = make_case((4, 9), 16, 60, torch.float32, device)
    expected = evaluate(linear_logps, case)
    hidden, weight = leaves_of(case, "hidden", "weight")
    checkpoint(linear_logps, hidden, weight, case.targets, use_reentrant=reentrant).sum().backward()
    assert torch.equal(grad_of(hidden), expected.hidden)
    assert torch.equal(grad_of(weight), expected.weight)


def test_saved_tensors_go_through_hooks(device: torch.device) -> None:
    """Everything that is saved passes autograd's hooks: offloading to the CPU, and packing, work."""
    case = make_case((4, 9), 16, 60, torch.bfloat16, device, bias=True)
    case = dataclasses.replace(case, rows=torch.arange(36, device=device).view(4, 9) // 2)
    expected = evaluate(linear_logps, case, plan=Plan(keep_logit_grads=True))
    packed: list[int] = []

    def pack(x: Tensor) -> Tensor:
        packed.append(x.nbytes)
        return x.clone()

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x.clone())
    for context in (torch.autograd.graph.save_on_cpu(), hooks):
        with context:
            found = evaluate(linear_logps, case, plan=Plan(keep_logit_grads=True))
        for name in ("logps", "hidden", "weight", "bias"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert packed


def test_a_changed_weight_is_noticed(device: torch.device) -> None:
    """The weight that the backward needs is saved: changing it in between is an error, not a wrong gradient."""
    case = make_case((4, 9), 16, 60, torch.float32, device)
    hidden, weight = leaves_of(case, "hidden", "weight")
    logps = linear_logps(hidden, weight, case.targets)
    with torch.no_grad():
        weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logps.sum().backward()


def test_a_changed_frozen_weight_does_not_matter(device: torch.device) -> None:
    """With a frozen head the backward needs neither weight nor hidden, and keeps neither alive."""
    case = make_case((4, 9), 16, 60, torch.float32, device)
    expected = evaluate(linear_logps, case, frozen=("weight",))
    (hidden,) = leaves_of(case, "hidden")
    between = hidden * 1.0
    weight = case.weight.clone()
    logps = linear_logps(between, weight, case.targets)
    with torch.no_grad():
        weight.zero_()
        between.zero_()
    logps.sum().backward()
    assert torch.equal(grad_of(hidden), expected.hidden)


@pytest.mark.parametrize("linear", [True, False])
def test_double_backward_is_refused(linear: bool, device: torch.device) -> None:
    """A second derivative raises, also where the upstream gradient is a constant, and leaves the first alone."""
    case = make_case((4, 9), 16, 60, torch.float32, device)
    hidden, weight = leaves_of(case, "hidden", "weight")
    logps = linear_logps(hidden, weight, case.targets)
    loss = logps.sum() if linear else logps.square().sum()
    expected = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    gradients = torch.autograd.grad(loss, (hidden, weight), create_graph=True)
    for gradient, first in zip(gradients, expected, strict=True):
        assert torch.equal(gradient, first)
        with pytest.raises(RuntimeError, match=r"differentiate twice a function .* @once_differentiable"):
            (gradient.square().sum() + logps.sum()).backward(retain_graph=True)


def test_a_module_copies() -> None:
    """No state hides outside a module: a deepcopy computes the same and trains its own parameters."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(20, 8))
            self.loss = OrpoLoss(plan=Plan(scratch_bytes=1 << 20), softcap=30.0)

        def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
            return self.loss(self.weight, hidden, targets).loss

    head = Head()
    other = copy.deepcopy(head)
    hidden, targets = torch.randn(4, 5, 8), torch.randint(20, (4, 5))
    loss = other(hidden, targets)
    assert torch.equal(loss, head(hidden, targets))
    loss.backward()
    assert head.weight.grad is None
    assert other.weight.grad is not None


# ---------------------------------------------------------------------------- repeated rows


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("train_weight", [False, True])
def test_repeated_rows_sum_their_gradients(dtype: torch.dtype, train_weight: bool, device: torch.device) -> None:
    """rows with duplicates: once, twice and twenty times; summed in fp32, always in one order."""
    case = make_case((3, 10), 16, 60, dtype, device, ignored=0.2)
    rows = torch.randint(12, (3, 10), generator=torch.Generator().manual_seed(3)).to(device)
    rows[0] = 5
    case = dataclasses.replace(case, rows=rows)
    frozen = () if train_weight else ("weight",)
    upstream = normal_like(case.targets)
    found = evaluate(linear_logps, case, upstream, frozen=frozen)
    assert_logps_match(case, found.logps)
    assert_gradients_match(case, found, upstream, frozen=frozen)
    again = evaluate(linear_logps, case, upstream, frozen=frozen)
    assert torch.equal(again.hidden, found.hidden)


def test_a_broken_repeated_row_stays_by_itself(device: torch.device) -> None:
    case = make_case((4,), 16, 60, torch.float32, device, ignored=0.0)
    rows = torch.tensor([1, 2, 2, 3], device=device)
    case.hidden[2] = math.nan
    found = evaluate(linear_logps, dataclasses.replace(case, rows=rows), frozen=("weight",))
    assert found.logps.isnan().tolist() == [False, True, True, False]
    assert found.hidden.isnan().any(1).tolist() == [False, False, True, False]


# ---------------------------------------------------------------------------- gradcheck


@pytest.mark.parametrize(
    ("repeated", "keep", "small"),
    [(False, False, False), (True, False, True), (False, True, True), (True, True, False)],
    ids=["plain", "repeated rows, small tiles", "kept, small tiles", "repeated rows, kept"],
)
@pytest.mark.parametrize(
    "head", [{}, {"logit_scale": -0.5}, {"softcap": 1.5}, {"logit_scale": 2.0, "softcap": 3.0}], ids=str
)
def test_gradcheck(head: dict[str, Any], repeated: bool, keep: bool, small: bool, device: torch.device) -> None:
    case = make_case((2, 2), 3, 5, torch.float64, device, bias=True, ignored=0.0, largest=3.0)
    case.targets[1, 0] = IGNORED
    rows = torch.tensor([[2, 0], [1, 2]], device=device) if repeated else None
    scratch = None
    if small:
        # Twice what holds one token by one entry: a handful of tiles.
        sizes = (3, 3, 5, torch.float64, device)
        scratch = 2 * least_scratch(*sizes, train_weight=True, softcap=True)
        schedule = Plan(scratch).schedule(*sizes, train_weight=True, softcap=True)
        assert schedule.forward_chunk * schedule.forward_block < 3 * 5
        assert schedule.backward_chunk * schedule.backward_block < 3 * 5
    plan = Plan(scratch, keep_logit_grads=keep)

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_logps(hidden, weight, case.targets, bias=bias, rows=rows, plan=plan, **head)

    assert torch.autograd.gradcheck(function, leaves_of(case, "hidden", "weight", "bias"))


# ---------------------------------------------------------------------------- operations


@pytest.mark.parametrize("rows", [False, True], ids=["in place", "rows"])
@pytest.mark.parametrize(
    ("train", "keep", "units"),
    [
        ((), False, 1.0),
        (("hidden",), False, 2.0),
        (("hidden", "weight"), False, 4.0),
        (("hidden", "weight"), True, 3.0),
    ],
    ids=["evaluation", "frozen head", "trained head", "trained head, kept"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_flops(
    train: tuple[str, ...],
    keep: bool,
    units: float,
    dtype: torch.dtype,
    rows: bool,
    device: torch.device,
) -> None:
    """1, 2, 4 and 3 units of 2*N*D*V operations, N counting scored tokens only.

    Triton's kernels are invisible to the counter: it is the torch backend's products that are counted.
    """
    n, d, v = 300, 48, 2500
    case = make_case((400,), d, v, dtype, torch.device("cpu"), ignored=0.0)
    case.targets[n:] = IGNORED
    if rows:
        case = dataclasses.replace(case, rows=torch.arange(400) // 2)
    frozen = tuple({"hidden", "weight"} - set(train))
    plan = Plan(scratch_bytes=1 << 20, keep_logit_grads=keep)
    with FlopCounterMode(display=False) as flops:
        evaluate(linear_logps, case, frozen=frozen, plan=plan)
    assert flops.get_total_flops() / (2 * n * d * v) == pytest.approx(units, rel=0.03)
    schedule = plan.schedule(n, d, v, dtype, "cpu", train_hidden="hidden" in train, train_weight="weight" in train)
    assert schedule.units_forward + schedule.units_backward == units


# ---------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("frozen", [(), ("weight", "bias"), ("hidden",)], ids=str)
def test_autocast(low: torch.dtype, frozen: tuple[str, ...], device: torch.device) -> None:
    """autocast over fp32 parameters: computed as from rounded operands, with fp32 gradients."""
    case = make_case((4, 9), 32, 60, torch.float32, device, bias=True)
    upstream = normal_like(case.targets)
    rounded = dataclasses.replace(
        case,
        hidden=case.hidden.to(low),
        weight=case.weight.to(low),
        bias=case.bias.to(low) if case.bias is not None else None,
    )
    exact = evaluate_exact(rounded, upstream)
    with torch.autocast(device.type, low):
        found = evaluate(linear_logps, case, upstream, frozen=frozen)
    assert found.logps.dtype == torch.float32
    assert largest_error(found.logps, exact.logps) <= (1e-4 if device.type == "cuda" else 4e-6)
    assert largest_error(found.logps, evaluate_exact(case).logps) > 1e-4, "not computed in the low dtype"
    for name in ("hidden", "weight", "bias"):
        gradient = getattr(found, name)
        if name in frozen:
            assert gradient is None
            continue
        assert gradient.dtype == torch.float32
        assert relative_error(gradient, getattr(exact, name)) <= torch.finfo(low).eps / 2


def test_autocast_joins_different_dtypes(device: torch.device) -> None:
    """An fp32 head after a bf16 backbone, as k-bit preparation leaves it."""
    case = make_case((4, 9), 32, 60, torch.bfloat16, device)
    head = case.weight.float().requires_grad_()
    (hidden,) = leaves_of(case, "hidden")
    expected = evaluate(linear_logps, case)
    with torch.autocast(device.type, torch.bfloat16):
        logps = linear_logps(hidden, head, case.targets)
    logps.sum().backward()
    assert torch.equal(logps.detach(), expected.logps)
    assert torch.equal(grad_of(hidden), expected.hidden)
    assert grad_of(head).dtype == torch.float32
    assert torch.equal(grad_of(head).to(torch.bfloat16), expected.weight)


def test_autocast_off_inside_on(device: torch.device) -> None:
    case = make_case((4, 9), 32, 60, torch.float32, device)
    expected = linear_logps(case.hidden, case.weight, case.targets)
    with torch.autocast(device.type, torch.bfloat16), torch.autocast(device.type, enabled=False):
        assert torch.equal(linear_logps(case.hidden, case.weight, case.targets), expected)


def test_backward_outside_autocast(device: torch.device) -> None:
    """A training loop leaves autocast before backward; some stay inside. The gradients are the same."""
    case = make_case((4, 9), 32, 60, torch.float32, device)
    gradients = []
    for inside in (False, True):
        hidden, weight = leaves_of(case, "hidden", "weight")
        with torch.autocast(device.type, torch.bfloat16):
            logps = linear_logps(hidden, weight, case.targets)
        with torch.autocast(device.type, torch.bfloat16, enabled=inside):
            logps.sum().backward()
        gradients.append((grad_of(hidden), grad_of(weight)))
    for outside, within in zip(*gradients, strict=True):
        assert torch.equal(outside, within)


# ---------------------------------------------------------------------------- torch.compile


@pytest.fixture
def counter() -> CompileCounterWithBackend:
    torch._dynamo.reset()
    return CompileCounterWithBackend("aot_eager")


COMPILED: dict[str, dict[str, Any]] = {
    "trained head": {},
    "kept": {"plan": Plan(keep_logit_grads=True)},
    "some kept": {"plan": Plan(keep_logit_grads=3 * 4 * 70)},
    "frozen head": {"frozen": ("weight", "bias")},
    "frozen hidden": {"frozen": ("hidden",)},
    "repeated rows": {"rows": True},
    "softcap": {"softcap": 5.0},
}


@pytest.mark.parametrize("variant", COMPILED.values(), ids=COMPILED)
def test_compile_with_changing_lengths(
    variant: dict[str, Any], counter: CompileCounterWithBackend, device: torch.device
) -> None:
    """torch.compile around the caller: eager's numbers, no graph break, two graphs for all lengths and fillings."""
    variant = dict(variant)
    with_rows = variant.pop("rows", False)
    softcap = variant.pop("softcap", None)

    def step(*arguments: Any, **options: Any) -> Tensor:
        return linear_logps(*arguments, **options) * 2

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for length in (9, 5, 12, 17, 30):
        # From none ignored to all of them.
        ignored = {9: 0.3, 5: 0.0, 12: 0.5, 17: 1.1}.get(length, 0.3)
        case = make_case((3, length), 16, 60, torch.float32, device, bias=True, ignored=ignored, softcap=softcap)
        if with_rows:
            case = dataclasses.replace(case, rows=torch.arange(3 * length, device=device).view(3, length) // 2)
        upstream = normal_like(case.targets)
        eager = evaluate(step, case, upstream, **variant)
        found = evaluate(compiled, case, upstream, **variant)
        for name in ("logps", "hidden", "weight", "bias"):
            one, other = getattr(found, name), getattr(eager, name)
            assert (one is None) == (other is None), name
            assert one is None or torch.equal(one, other), name
    assert counter.frame_count <= 2


def test_compile_no_grad(counter: CompileCounterWithBackend, device: torch.device) -> None:
    case = make_case((3, 9), 16, 60, torch.float32, device)
    compiled = torch.compile(linear_logps, backend=counter, fullgraph=True)
    with torch.no_grad():
        expected = linear_logps(case.hidden, case.weight, case.targets)
        assert torch.equal(compiled(case.hidden, case.weight, case.targets), expected)


def test_compile_under_autocast(counter: CompileCounterWithBackend, device: torch.device) -> None:
    case = make_case((3, 9), 16, 60, torch.float32, device)

    def step(*arguments: Any, **options: Any) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return linear_logps(*arguments, **options)

    eager = evaluate(step, case)
    found = evaluate(torch.compile(step, backend=counter, fullgraph=True), case)
    for name in ("logps", "hidden", "weight"):
        assert torch.equal(getattr(found, name), getattr(eager, name)), name
    assert found.hidden.dtype == torch.float32


def test_compile_bad_targets(counter: CompileCounterWithBackend, device: torch.device) -> None:
    case = make_case((3, 9), 16, 60, torch.float32, device, ignored=0.0)
    case.targets[2, 0] = 60
    compiled = torch.compile(linear_logps, backend=counter, fullgraph=True)
    with pytest.raises(ValueError, match=r"targets holds 60 at flattened position 18"):
        compiled(case.hidden, case.weight, case.targets)


def test_compiled_operators_pass_opcheck(device: torch.device) -> None:
    """The operators' schemas, fake tensors and autograd registrations are consistent."""
    case = make_case((9,), 16, 60, torch.float32, device, bias=True)
    hidden, weight, bias = leaves_of(case, "hidden", "weight", "bias")
    torch.library.opcheck(
        torch.ops.orpo_kernels.linear_logps.default,
        (
            hidden,
            weight,
            bias,
            case.targets,
            None,
            IGNORED,
            1.0,
            None,
            torch.float32,
            None,
            0,
            [True, True, True, False],
            None,
        ),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_compile_orpo_loss_with_inductor(device: torch.device) -> None:
    """The whole loss under the default compiler, forward and backward, at two lengths.

    A fresh process compiles for about 10 s.
    """
    torch._dynamo.reset()

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return orpo_loss(hidden, weight, targets, softcap=20.0).loss

    compiled = torch.compile(loss, fullgraph=True)
    for length in (7, 11):
        case = make_case((4, length), 16, 60, torch.float32, device)
        results = []
        for function in (loss, compiled):
            hidden, weight = leaves_of(case, "hidden", "weight")
            value = function(hidden, weight, case.targets)
            value.backward()
            results.append((value.detach(), grad_of(hidden), grad_of(weight)))
        torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
