"""Full-logits references in float64, the same in plain PyTorch, and inputs to try both on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
# What a relative error of gradients may be in each dtype, whatever PyTorch's own is.
GRADIENT_BOUND = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}


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

    def options(self) -> dict[str, Any]:
        return {"rows": self.rows, "logit_scale": self.logit_scale, "softcap": self.softcap}

    def with_(self, **changes: Any) -> Case:
        return replace(self, **changes)


@dataclass(frozen=True)
class Result:
    """Log-probs, and the gradients of sum(upstream * logps); None for what was frozen."""

    logps: Tensor
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def make_case(
    *shape: int,
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype,
    device: torch.device,
    bias: bool = False,
    ignored: float = 0.25,
    largest: float = 8.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    seed: int = 0,
) -> Case:
    """Normal inputs whose largest logit, scaled but not capped, has about the size `largest`.

    shape: that of the targets; `ignored`: the share of them that is not scored.
    """
    random = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random, dtype=torch.float64)

    hidden, weight = normal(*shape, hidden_size), normal(vocab_size, hidden_size)
    offsets = normal(vocab_size) if bias else None
    x = F.linear(hidden, weight, offsets)
    size = largest / (abs(logit_scale) * x.abs().max().item())
    # The head's share is what keeps its entries at the size of a trained one's.
    share = hidden_size**-0.5
    targets = torch.randint(vocab_size, shape, generator=random)
    targets = targets.masked_fill(torch.rand(shape, generator=random) < ignored, IGNORED)
    return Case(
        (hidden * (size / share)).to(device, dtype),
        (weight * share).to(device, dtype),
        targets.to(device),
        None if offsets is None else (offsets * size).to(device, dtype),
        logit_scale=logit_scale,
        softcap=softcap,
    )


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
    """Float64 log-probs from full logits, -softplus(logsumexp of the competitors - z_y); 0 where ignored.

    In this form a target with 1 - p = 1e-10 keeps 15 digits; in `log_softmax`'s it has six left.
    """
    z, y, scored = _target_logits(
        hidden.double(), weight.double(), targets, rows, None if bias is None else bias.double(), logit_scale, softcap
    )
    competitors = z.masked_fill(F.one_hot(y, z.shape[1]).bool(), -torch.inf)
    largest = competitors.detach().amax(1).clamp_min(torch.finfo(z.dtype).min)  # V = 1 has no competitor
    z_y = z.gather(1, y[:, None]).squeeze(1)
    gap = largest + (competitors - largest[:, None]).exp().sum(1).log() - z_y
    # Where the only entry is the target, the gap is -inf, and softplus and its slope are 0.
    logps = -torch.logaddexp(gap, torch.zeros_like(gap)) if z.shape[1] > 1 else (z_y - z_y)
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
    """The same as one writes it in PyTorch: logits in the inputs' dtype, log_softmax in fp32 (fp64 for fp64)."""
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
    """(logits [T, V], targets [T] with 0 where ignored, scored [T])."""
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
    """`function` on fresh leaves of `case` (in `dtype` if given) and the gradients for `upstream` (default: ones)."""
    leaves = {
        name: tensor.detach().clone().to(dtype or tensor.dtype).requires_grad_(name not in frozen)
        for name in ("hidden", "weight", "bias")
        if (tensor := getattr(case, name)) is not None
    }
    logps = function(
        leaves["hidden"],
        leaves["weight"],
        case.targets,
        bias=leaves.get("bias"),
        **case.options(),
        **options,
    )
    upstream = torch.ones_like(logps) if upstream is None else upstream.to(logps)
    if logps.requires_grad:
        logps.backward(upstream)
    grads = {name: leaf.grad for name, leaf in leaves.items()}
    return Result(logps.detach(), grads["hidden"], grads["weight"], grads.get("bias"))


def evaluate_exact(case: Case, upstream: Tensor | None = None) -> Result:
    """`exact_logps` and its gradients: all of them, in float64."""
    return evaluate(exact_logps, case, upstream, dtype=torch.float64)


def relative_error(found: Tensor, exact: Tensor) -> float:
    """|found - exact| / |exact| in the Frobenius norm; 0 / 0 is 0."""
    difference = (found.double() - exact).norm().item()
    return difference / exact.norm().item() if difference else 0.0


def row_errors(found: Tensor, exact: Tensor) -> Tensor:
    """`relative_error` of every row of [..., D]."""
    difference = (found.double() - exact).norm(dim=-1)
    return torch.where(difference == 0, 0.0, difference / exact.norm(dim=-1))
