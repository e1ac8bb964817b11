"""The kernels behind the public function: as on a GPU, but in the interpreter where there is none."""

from __future__ import annotations

import pytest
import torch

from orpo_kernels import Plan, linear_logps
from orpo_kernels.kernels import dispatch as backend
from orpo_kernels.kernels import triton_path

TOKENS, D, V = 40, 32, 100  # V is no multiple of a tile


@pytest.fixture(scope="module")
def device() -> torch.device:
    """The kernels' own: compiled, they take no CPU tensors."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def served_by_triton(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the kernels serve CPU tensors too; the calls they get are listed."""
    calls: list[str] = []
    for name in ("forward", "weight_gradient"):
        original = getattr(triton_path, name)

        def counted(*args, name=name, original=original, **options):
            calls.append(name)
            return original(*args, **options)

        monkeypatch.setattr(triton_path, name, counted)
    monkeypatch.setattr(backend, "why_not_triton", lambda head: triton_path.supports(head, head.weight.device))
    return calls


@pytest.fixture
def inputs(device: torch.device) -> tuple[torch.Tensor, ...]:
    hidden = torch.randn(TOKENS, D, device=device, requires_grad=True)
    weight = torch.randn(V, D, device=device, requires_grad=True)
    targets = torch.randint(V, (TOKENS,), device=device)
    targets[::5] = -100
    return hidden, weight, targets, torch.randn(TOKENS, device=device)


def gradients(function, hidden, weight, targets, upstream):
    logps = function(hidden, weight, targets)
    return logps, *torch.autograd.grad((logps.double() * upstream.double()).sum(), (hidden, weight))


def reference(hidden, weight, targets):
    logps = torch.log_softmax(hidden @ weight.t(), -1).gather(-1, targets.clamp(min=0)[:, None]).squeeze(-1)
    return logps * (targets != -100)


def exact(hidden, weight, targets, upstream):
    hidden, weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    return gradients(reference, hidden, weight, targets, upstream)


def error(found: torch.Tensor, right: torch.Tensor) -> float:
    return float(torch.linalg.norm(found.detach().double() - right.detach()) / torch.linalg.norm(right.detach()))


@pytest.mark.parametrize("plan", [Plan(), Plan(keep_logit_grads=True)], ids=["recomputed", "kept"])
def test_fp32(inputs, plan, served_by_triton):
    found = gradients(lambda *tensors: linear_logps(*tensors, plan=plan), *inputs)
    for mine, right in zip(found, exact(*inputs), strict=True):
        assert error(mine, right) < 2e-6
    assert served_by_triton == ["forward", "weight_gradient"]


def test_under_autocast_the_gradient_of_an_fp32_weight_is_not_rounded_to_bf16(inputs, device):
    hidden, weight, targets, upstream = inputs
    with torch.autocast(device.type, dtype=torch.bfloat16):
        _, d_hidden, d_weight = gradients(linear_logps, hidden, weight, targets, upstream)
    rounded = [tensor.detach().bfloat16() for tensor in (hidden, weight)]
    _, right_hidden, right_weight = exact(*rounded, targets, upstream)
    assert d_hidden.dtype == d_weight.dtype == torch.float32
    assert error(d_hidden, right_hidden) < 4e-3
    assert error(d_weight, right_weight) < 4e-3
    assert not torch.equal(d_weight, d_weight.bfloat16().float())


def test_a_budget_below_a_row_of_the_vocabulary_goes_to_the_torch_path(inputs, served_by_triton):
    hidden, _, targets, upstream = inputs
    weight = torch.randn(100 * V, D, device=hidden.device, requires_grad=True)
    plan = Plan(scratch_bytes=20_000)  # a row of fp32 exponentials is 40,000 bytes
    found = gradients(lambda *tensors: linear_logps(*tensors, plan=plan), hidden, weight, targets, upstream)
    for mine, right in zip(found, exact(hidden, weight, targets, upstream), strict=True):
        assert error(mine, right) < 2e-6
    assert served_by_triton == []


def test_compiled_with_kept_gradients(inputs):
    plan = Plan(keep_logit_grads=True)
    compiled = torch.compile(
        # inductor checks that an operator's outputs are laid out as it was told.
        lambda *tensors: linear_logps(*tensors, plan=plan),
        backend="inductor",
        fullgraph=True,
    )
    for mine, right in zip(gradients(compiled, *inputs), exact(*inputs), strict=True):
        assert error(mine, right) < 2e-6


@pytest.mark.parametrize("setting", [(True, True), (False, True), (False, False)])
def test_the_users_setting_of_reductions_is_left_as_it_was(setting: tuple[bool, bool]) -> None:
    """Of bf16 products whose inner dimension a library cuts: no reduced precision in ours, and cuts as allowed."""
    matmul = torch.backends.cuda.matmul

    def now() -> tuple[bool, bool]:
        return (
            matmul.allow_bf16_reduced_precision_reduction,
            matmul.allow_bf16_reduced_precision_reduction_split_k,
        )

    before = now()
    matmul.allow_bf16_reduced_precision_reduction = setting
    try:
        with triton_path._fp32_reductions():
            assert now() == (False, setting[1])
        assert now() == setting
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before
