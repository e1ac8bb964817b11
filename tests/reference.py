"""Full logits in float64, the same as one writes it in PyTorch, and inputs to try both on."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from orpo_kernels import Plan
from orpo_kernels.plan import ScratchTooSmall

IGNORED = -100
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# The relative error a gradient may have whatever PyTorch's own is: four roundings, for fp32 and fp64 four dozen.
GRADIENT_BOUND = {torch.float64: 1e-14, torch.float32: 2e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@dataclass(frozen=True)
class Case:
    """Inputs of a call: hidden [..., D], weight [V, D], targets [...], bias [V] or None, and the head's options."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None = None
    rows: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def options(self) -> dict[str, Any]:
        return {"rows": self.rows, "logit_scale": self.logit_scale, "softcap": self.softcap}


@dataclass(frozen=True)
class Result:
    """Log-probs, and the gradients of sum(upstream * logps): tensors, or None for what was frozen."""

    logps: Tensor
    hidden: Any
    weight: Any
    bias: Any


def make_case(
    shape: Sequence[int],
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    bias: bool = False,
    ignored: float = 0.25,
    largest: float = 8.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    seed: int = 0,
) -> Case:
    """Normal inputs with logits of up to about `largest`, scaled but not capped.

    shape: that of the targets, of which the share `ignored` is not scored.
    """
    random = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random, dtype=torch.float64)

    hidden, weight = normal(*shape, hidden_size), normal(vocab_size, hidden_size)
    offsets = normal(vocab_size) if bias else None
    logits = F.linear(hidden, weight, offsets)
    size = largest / (abs(logit_scale) * logits.abs().max().item()) if logits.numel() else 1.0
    # Entries of the weight as in a trained head; hidden makes up for it.
    share = hidden_size**-0.5
    targets = torch.randint(vocab_size, tuple(shape), generator=random)
    targets = targets.masked_fill(torch.rand(tuple(shape), generator=random) < ignored, IGNORED)
    return Case(
        (hidden * (size / share)).to(device, dtype),
        (weight * share).to(device, dtype),
        targets.to(device),
        None if offsets is None else (offsets * size).to(device, dtype),
        logit_scale=logit_scale,
        softcap=softcap,
    )


def normal_like(x: Tensor, seed: int = 1) -> Tensor:
    """Normal numbers in the shape of x, fp64, to be an upstream gradient."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(x.shape, generator=random, dtype=torch.float64).to(x.device)


def exact_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Float64 log-probs from full logits, logsigmoid(z_y - logsumexp of the competitors); 0 where ignored.

    A target with 1 - p = 1e-10 keeps 15 digits in this form, and six in that of `log_softmax`.
    """
    double = None if bias is None else bias.double()
    z, y, scored = _target_logits(hidden.double(), weight.double(), targets, rows, double, logit_scale, softcap)
    z_y = z.gather(1, y[:, None]).squeeze(1)
    if z.shape[1] == 1:
        logps = z_y - z_y  # No competitor: the target is certain.
    else:
        competitors = z.scatter(1, y[:, None], -torch.inf)
        log_odds = z_y - competitors.logsumexp(1)
        logps = torch.nn.functional.logsigmoid(log_odds)
    return torch.where(scored, logps, 0.0).view(targets.shape)


def torch_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """The same in plain PyTorch: logits in the inputs' dtype, log_softmax in fp32 (fp64 for fp64)."""
    z, y, scored = _target_logits(hidden, weight, targets, rows, bias, logit_scale, softcap)
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    logps = z.to(wide).log_softmax(1).gather(1, y[:, None]).squeeze(1)
    return torch.where(scored, logps, 0.0).view(targets.shape)


def _target_logits(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logits [T, V], targets [T] with 0 where ignored, which are scored [T])."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    y = targets.reshape(-1).long()
    scored = y != IGNORED
    y = torch.where(scored, y, 0)
    if rows is not None:
        flat = flat[torch.where(scored, rows.reshape(-1), 0)]
    z = F.linear(flat, weight, bias) * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z, y, scored


def evaluate(
    function: Callable[..., Tensor],
    case: Case,
    upstream: Tensor | None = None,
    *,
    frozen: tuple[str, ...] = (),
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Result:
    """`function` on new leaves of `case` (in `dtype` if given), and the gradients for `upstream` (default: ones)."""
    leaves = {
        name: tensor.detach().clone().to(dtype or tensor.dtype).requires_grad_(name not in frozen)
        for name in ("hidden", "weight", "bias")
        if (tensor := getattr(case, name)) is not None
    }
    bias = leaves.get("bias")
    logps = function(leaves["hidden"], leaves["weight"], case.targets, bias=bias, **case.options, **options)
    if logps.requires_grad:
        logps.backward(torch.ones_like(logps) if upstream is None else upstream.to(logps.dtype))
    return Result(logps.detach(), leaves["hidden"].grad, leaves["weight"].grad, None if bias is None else bias.grad)


def evaluate_exact(case: Case, upstream: Tensor | None = None) -> Result:
    """`exact_logps` and all its gradients, in float64."""
    return evaluate(exact_logps, case, upstream, dtype=torch.float64)


def grad_of(x: Tensor) -> Tensor:
    """The gradient that x must have."""
    assert x.grad is not None
    return x.grad


def relative_error(found: Tensor, exact: Tensor) -> float:
    """|found - exact| / |exact| in the Frobenius norm; 0 / 0 is 0."""
    difference = (found.double() - exact).norm().item()
    return difference / exact.norm().item() if difference else 0.0


def row_errors(found: Tensor, exact: Tensor) -> Tensor:
    """`relative_error` of every row of [..., D]."""
    difference = (found.double() - exact).norm(dim=-1)
    return torch.where(difference == 0, 0.0, difference / exact.norm(dim=-1))


def largest_error(found: Tensor, exact: Tensor) -> float:
    return (found.double() - exact).abs().max().item() if found.numel() else 0.0


def largest_logit(case: Case) -> float:
    """The size of the logits, which their rounding errors grow with; at least 1."""
    hidden, weight = case.hidden.double(), case.weight.double()
    bias = None if case.bias is None else case.bias.double()
    logits, _, _ = _target_logits(hidden, weight, case.targets, bias=bias, **case.options)
    return max(1.0, logits.abs().max().item())


def assert_logps_match(case: Case, found: Tensor, bound: float = 1e-4) -> None:
    """Within `bound` (nats), and within twice the error of PyTorch on the same values in the accumulation dtype.

    Tensor cores round their fp32 sums more coarsely than a CPU: on a GPU only `bound` holds for 16-bit inputs.
    """
    wide = torch.float64 if case.hidden.dtype == torch.float64 else torch.float32
    exact = evaluate_exact(case).logps
    if case.hidden.dtype.itemsize > 2 or not case.hidden.is_cuda:
        peer = largest_error(evaluate(torch_logps, case, dtype=wide).logps, exact)
        # A peer that is right by luck is no measure: a logit cannot be known better than to its last place.
        bound = min(bound, 2 * max(peer, torch.finfo(wide).eps * largest_logit(case)))
    assert found.dtype == wide
    assert largest_error(found, exact) <= bound


def assert_gradients_match(
    case: Case,
    found: Result,
    upstream: Tensor | None = None,
    *,
    frozen: tuple[str, ...] = (),
) -> None:
    """Every gradient within `GRADIENT_BOUND` and within twice the error of PyTorch in the same dtype.

    In fp64 PyTorch computes what the reference does, so that there is no error to compare with.
    """
    dtype = case.hidden.dtype
    eps = torch.finfo(dtype).eps
    exact, peer = evaluate_exact(case, upstream), evaluate(torch_logps, case, upstream)
    for name in ("hidden", "weight", "bias"):
        gradient, truth = getattr(found, name), getattr(exact, name)
        if name in frozen or truth is None:
            assert gradient is None, name
            continue
        assert gradient.dtype == dtype, name
        bound = GRADIENT_BOUND[dtype]
        if gradient.numel() < 32:
            bound = max(bound, eps)  # Two roundings at their worst: so few do not average.
        if dtype != torch.float64:
            # An exponential cannot be known better than its argument: as above, luck is no measure.
            size = max(1.0, largest_logit(case) / 8)
            bound = min(bound, 2 * max(relative_error(getattr(peer, name), truth), eps * size))
        error = relative_error(gradient, truth)
        assert error <= bound, f"{name}: {error:.1e} > {bound:.1e}"


def least_scratch(*shapes: Any, **options: Any) -> int:
    """The number of bytes that the error for too small a plan tells to give; arguments of `Plan.schedule`."""
    with pytest.raises(ScratchTooSmall) as raised:
        Plan(scratch_bytes=1).schedule(*shapes, **options)
    found = re.search(r"give at least (\d+) bytes", str(raised.value))
    assert found is not None
    return int(found[1])
