"""The forward and backward of the primitive on scored tokens, and the autograd function around them.

A token is seen by any loss only through its log-probability, so `u_t` (see `kernels.interface`), computed while
the chunk's exponentials are at hand, is all that the backward of `hidden` needs: `dL/dh_t = c_t s_t u_t` with
`c_t = dL/dlogp_t`. The gradient of the head needs `c_t` and waits for the backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from orpo_kernels.kernels.dispatch import choose, forward_head
from orpo_kernels.kernels.interface import Backend, Head, HeadGradients, KeptLogitGrads, Tokens
from orpo_kernels.plan import MIB, Plan, Schedule
from orpo_kernels.tokens import RowGroups


class HeadOptions(NamedTuple):
    """Everything about the head and the call that is not a tensor."""

    logit_scale: float
    softcap: float | None
    compute_dtype: torch.dtype
    plan: Plan

    def head(self, weight: Tensor, bias: Tensor | None, adapter: Tensor | None) -> Head:
        return Head(weight, bias, self.logit_scale, self.softcap, self.compute_dtype, adapter)


class Needs(NamedTuple):
    """Which gradients are wanted. Asked of the caller's tensors: under no_grad a leaf still says it requires
    one, and inside an autograd function nothing else is known."""

    hidden: bool
    weight: bool
    bias: bool
    adapter: bool = False

    @classmethod
    def of(cls, *inputs: Tensor | None) -> Needs:
        """Of hidden, weight, bias and adapter, as autograd sees them now."""
        grad = torch.is_grad_enabled()
        return cls(*(grad and tensor is not None and tensor.requires_grad for tensor in inputs))

    @property
    def head(self) -> bool:
        return self.weight or self.bias or self.adapter


class Saved(NamedTuple):
    """What the backward needs besides the inputs: one_minus_p = 1 - p(target) [N], lse [N], u [N, D] or None."""

    one_minus_p: Tensor
    lse: Tensor
    u: Tensor | None
    kept: KeptLogitGrads | None


def logps_forward(tokens: Tokens, head: Head, plan: Plan, needs: Needs) -> tuple[Tensor, Saved]:
    """Log-probabilities [N] of the scored tokens, and what their backward needs."""
    backend, schedule = _choose(tokens, head, plan, needs, train_weight=needs.head)
    with torch.autocast(tokens.hidden.device.type, enabled=False):
        out = backend.forward(tokens, forward_head(backend, head), schedule, needs.hidden)
        logps = F.logsigmoid(out.log_odds)
        return logps, Saved(torch.sigmoid(-out.log_odds), out.lse, out.u, out.kept)


def hidden_gradient(
    shape: torch.Size,
    dtype: torch.dtype,
    coefficient: Tensor,
    u: Tensor,
    rows: Tensor | None,
    groups: RowGroups | None,
    plan: Plan,
) -> Tensor:
    """sum over the tokens t of each row of coefficient_t * u_t: [R, D], rounded once to `dtype`.

    coefficient: [N] accumulation dtype, c_t * s_t.
    """
    wide, device = coefficient.dtype, coefficient.device
    # Pieces small enough for the cache of a CPU, and for the budget.
    step = max(
        1, min(plan.budget(device) // 8, MIB if device.type == "cpu" else 64 * MIB) // (shape[-1] * wide.itemsize)
    )
    if rows is None:
        grad = torch.empty(shape, dtype=dtype, device=device)
        for start in range(0, u.shape[0], step):
            part = slice(start, start + step)
            torch.mul(u[part], coefficient[part, None], out=grad[part])
        return grad

    grad = torch.zeros(shape, dtype=dtype, device=device)
    if groups is None:
        for start in range(0, u.shape[0], step):
            part = slice(start, start + step)
            grad.index_copy_(0, rows[part], (u[part] * coefficient[part, None]).to(dtype))
        return grad
    for start in range(0, groups.unique.numel(), step):
        part = slice(start, start + step)
        counts, starts = groups.counts[part], groups.starts[part]
        total = torch.zeros(counts.numel(), u.shape[1], dtype=wide, device=device)
        for rank in range(groups.largest):
            # A group with fewer members leaves its sum as it is, even if its first member is not finite.
            has_one = counts > rank
            member = groups.order[torch.where(has_one, starts + rank, starts)]
            term = u[member].to(wide).mul_(coefficient[member, None])
            total += term.masked_fill_(~has_one[:, None], 0.0)
        grad.index_copy_(0, groups.unique[part], total.to(dtype))
    return grad


def head_gradient(
    tokens: Tokens, head: Head, coefficient: Tensor, saved: Saved, plan: Plan, needs: Needs
) -> HeadGradients:
    """Gradients of weight [V, D], bias [V] and adapter [V, r], in their own dtypes, None where not needed."""
    backend, schedule = _choose(tokens, head, plan, needs, train_weight=True)
    with torch.autocast(coefficient.device.type, enabled=False):
        return backend.weight_gradient(
            tokens, head, coefficient, saved.lse, saved.kept, schedule, needs.weight, needs.bias, needs.adapter
        )


def _choose(tokens: Tokens, head: Head, plan: Plan, needs: Needs, *, train_weight: bool) -> tuple[Backend, Schedule]:
    return choose(
        plan,
        head,
        tokens.targets.numel(),
        train_hidden=needs.hidden,
        train_weight=train_weight,
        in_place=tokens.rows is None and tokens.hidden.dtype == head.compute_dtype,
    )


class LinearLogps(torch.autograd.Function):
    """`logps_forward`, `hidden_gradient` and `head_gradient` for autograd.

    Saves no product of its own but u: with a frozen head neither `hidden` nor `weight` is kept alive.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        rows: Tensor | None,
        groups: RowGroups | None,
        options: HeadOptions,
        needs: Needs,
        adapter: Tensor | None,
    ) -> Tensor:
        head = options.head(weight, bias, adapter)
        logps, saved = logps_forward(Tokens(hidden, rows, targets), head, options.plan, needs)
        trains_head = needs.head
        # The parameters themselves are saved, never a cast of them: sharding hooks recognise only those.
        inputs = (hidden, weight, bias, adapter, targets) if trains_head else (None,) * 5
        kept = saved.kept
        ctx.save_for_backward(
            *inputs,
            rows,
            *(groups[:4] if groups is not None else (None,) * 4),
            saved.one_minus_p,
            saved.lse if trains_head else None,
            saved.u,
            kept.reference if kept is not None else None,
            *(kept.values if kept is not None else ()),
        )
        ctx.hidden_shape, ctx.hidden_dtype = hidden.shape, hidden.dtype
        ctx.kept_columns = kept.columns if kept is not None else 0
        ctx.largest_group = groups.largest if groups is not None else 0
        ctx.options, ctx.needs = options, needs
        return logps

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Under create_graph, once_differentiable refuses a second derivative only where `grad` has a graph itself:
        # that of a plain sum would be left out silently.
        return LinearLogps._backward(ctx, grad.detach().requires_grad_() if torch.is_grad_enabled() else grad)

    @staticmethod
    @once_differentiable
    def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, adapter, targets, rows, *rest = ctx.saved_tensors
        order, unique, starts, counts, one_minus_p, lse, u, reference, *values = rest
        del rest
        if values:
            # Where the graph is not to be used again, the kept values go part by part as they are used.
            ctx.maybe_clear_saved_tensors()
        needs: Needs = ctx.needs
        coefficient = grad.to(one_minus_p.dtype) * one_minus_p
        d_hidden, d_head = None, HeadGradients(None, None)
        if needs.hidden:
            groups = None if order is None else RowGroups(order, unique, starts, counts, ctx.largest_group)
            d_hidden = hidden_gradient(
                ctx.hidden_shape, ctx.hidden_dtype, coefficient, u, rows, groups, ctx.options.plan
            )
        if needs.head:
            saved = Saved(one_minus_p, lse, u, KeptLogitGrads(values, reference, ctx.kept_columns) if values else None)
            tokens = Tokens(hidden, rows, targets)
            head = ctx.options.head(weight, bias, adapter)
            d_head = head_gradient(tokens, head, coefficient, saved, ctx.options.plan, needs)
        return d_hidden, d_head.weight, d_head.bias, None, None, None, None, None, d_head.adapter
