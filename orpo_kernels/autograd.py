"""The forward and backward of the primitive on scored tokens, and the autograd function around them.

A token is seen by any loss only through its log-probability, so `u_t` (see `kernels.interface`), computed while
the chunk's exponentials are at hand, is all that the backward of `hidden` needs: `dL/dh_t = c_t s_t u_t` with
`c_t = dL/dlogp_t`. The gradient of the head needs `c_t` and waits for the backward. A gradient of the entropy has a
vector of its own beside `u_t` (see `kernels.statistics`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from orpo_kernels.kernels.dispatch import choose, forward_head
from orpo_kernels.kernels.interface import Backend, EntropyGradient, Head, HeadGradients, KeptLogitGrads, Tokens
from orpo_kernels.kernels.statistics import NO_STATISTICS, Statistics, entropy_slopes
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


class TokenStats(NamedTuple):
    """Of every target's distribution softmax(z), in fp32 (fp64 for fp64 inputs), shaped like the targets.

    All are 0 (False) where a target is ignored, and None where not asked for.

    logps: log p(target), nats.
    entropy: -sum p log p, nats.
    log_sum_sq_probs: log sum p^2 (minus the Renyi entropy of order 2), without gradient.
    mean_logits: the mean of z over the vocabulary, without gradient.
    is_top1: bool, whether the target is argmax z: of equal logits it is the first, as torch and TRL have it.
    """

    logps: Tensor
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> TokenStats:
        """The same with `function` applied to all that is there."""
        logps, *others = self
        return TokenStats(function(logps), *(None if x is None else function(x) for x in others))


class SavedEntropy(NamedTuple):
    """What the entropy's gradient needs: u [N, D] or None, and for the head's the slopes' own and level [N] or None."""

    u: Tensor | None
    own: Tensor | None
    level: Tensor | None


class Saved(NamedTuple):
    """What the backward needs besides the inputs: one_minus_p = 1 - p(target) [N], lse [N], u [N, D] or None."""

    one_minus_p: Tensor
    lse: Tensor
    u: Tensor | None
    kept: KeptLogitGrads | None
    entropy: SavedEntropy | None = None


def logps_forward(
    tokens: Tokens, head: Head, plan: Plan, needs: Needs, wanted: Statistics = NO_STATISTICS
) -> tuple[TokenStats, Saved]:
    """Log-probabilities and statistics of the scored tokens, and what their backward needs."""
    if not any(needs):
        wanted = wanted._replace(entropy_grad=False)
    backend, schedule = choose_for(tokens, head, plan, needs, wanted, train_weight=needs.head)
    with torch.autocast(tokens.hidden.device.type, enabled=False):
        out = backend.forward(tokens, forward_head(backend, head), schedule, needs.hidden, wanted)
        logps, found = F.logsigmoid(out.log_odds), out.statistics
        entropy = None
        if wanted.entropy_grad and found.entropy is not None:
            slopes = entropy_slopes(out.log_odds, found.entropy) if needs.head else (None, None)
            entropy = SavedEntropy(found.entropy_u, *slopes)
        saved = Saved(torch.sigmoid(-out.log_odds), out.lse, out.u, out.kept, entropy)
        return TokenStats(logps, *found[:4]), saved


def gradient_step(plan: Plan, hidden_size: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many rows of D to take at a time: pieces small enough for the cache of a CPU, and for the budget."""
    most = min(plan.budget(device) // 8, MIB if device.type == "cpu" else 64 * MIB)
    return max(1, most // (hidden_size * dtype.itemsize))


def hidden_gradient(
    shape: torch.Size,
    dtype: torch.dtype,
    terms: Sequence[tuple[Tensor, Tensor]],
    rows: Tensor | None,
    groups: RowGroups | None,
    plan: Plan,
    out: Tensor | None = None,
) -> Tensor:
    """sum over the tokens t of each row of the terms' coefficient_t * u_t: [R, D], rounded once to `dtype`.

    terms: pairs of coefficients [N] in the accumulation dtype (c_t s_t of the log-probability's) and u [N, D].
    out: memory for it; every row must then be some token's.
    """
    (coefficient, u), *others = terms
    wide, device = coefficient.dtype, coefficient.device
    step = gradient_step(plan, shape[-1], wide, device)

    def weighted(part: slice | Tensor) -> Tensor:
        total = u[part] * coefficient[part, None]
        for factor, vectors in others:
            total.addcmul_(vectors[part].to(wide), factor[part, None])
        return total

    if rows is None and groups is None:
        grad = torch.empty(shape, dtype=dtype, device=device) if out is None else out
        for start in range(0, u.shape[0], step):
            part = slice(start, start + step)
            if others:
                grad[part] = weighted(part)
            else:
                torch.mul(u[part], coefficient[part, None], out=grad[part])
        return grad

    grad = torch.zeros(shape, dtype=dtype, device=device) if out is None else out
    if groups is None:
        assert rows is not None
        for start in range(0, u.shape[0], step):
            part = slice(start, start + step)
            grad.index_copy_(0, rows[part], weighted(part).to(dtype))
        return grad
    for start in range(0, groups.unique.numel(), step):
        part = slice(start, start + step)
        counts, starts = groups.counts[part], groups.starts[part]
        total = torch.zeros(counts.numel(), u.shape[1], dtype=wide, device=device)
        for rank in range(groups.largest):
            # A group with fewer members leaves its sum as it is, even if its first member is not finite.
            has_one = counts > rank
            member = groups.order[torch.where(has_one, starts + rank, starts)]
            total += weighted(member).masked_fill_(~has_one[:, None], 0.0)
        grad.index_copy_(0, groups.unique[part], total.to(dtype))
    return grad


def head_gradient(
    tokens: Tokens,
    head: Head,
    coefficient: Tensor,
    saved: Saved,
    plan: Plan,
    needs: Needs,
    entropy: EntropyGradient | None = None,
) -> HeadGradients:
    """Gradients of weight [V, D], bias [V] and adapter [V, r], in their own dtypes, None where not needed."""
    wanted = Statistics(entropy=True, entropy_grad=True) if saved.entropy is not None else NO_STATISTICS
    backend, schedule = choose_for(tokens, head, plan, needs, wanted, train_weight=True)
    with torch.autocast(coefficient.device.type, enabled=False):
        return backend.weight_gradient(
            tokens, head, coefficient, saved.lse, saved.kept, schedule, needs.weight, needs.bias, needs.adapter, entropy
        )


def choose_for(
    tokens: Tokens,
    head: Head,
    plan: Plan,
    needs: Needs,
    wanted: Statistics = NO_STATISTICS,
    *,
    train_weight: bool,
    ranks: int = 1,
) -> tuple[Backend, Schedule]:
    """The backend and the loop sizes of a call."""
    return choose(
        plan,
        head,
        tokens.targets.numel(),
        train_hidden=needs.hidden,
        train_weight=train_weight,
        in_place=tokens.rows is None and tokens.hidden.dtype == head.compute_dtype,
        statistics=wanted,
        ranks=ranks,
    )


def save(
    ctx: Any,
    tokens: Tokens,
    head: Head,
    groups: RowGroups | None,
    options: HeadOptions,
    needs: Needs,
    saved: Saved,
) -> None:
    """What `restore` gives back in the backward. Without a head that trains, neither it nor hidden is kept alive."""
    # The parameters themselves are saved, never a cast of them: sharding hooks recognise only those.
    inputs = (tokens.hidden, head.weight, head.bias, head.adapter, tokens.targets) if needs.head else (None,) * 5
    kept = saved.kept
    ctx.save_for_backward(
        *inputs,
        tokens.rows,
        *(groups[:4] if groups is not None else (None,) * 4),
        saved.one_minus_p,
        saved.lse if needs.head else None,
        saved.u,
        *(saved.entropy or (None,) * 3),
        kept.base if kept is not None else None,
        *(kept.values if kept is not None else ()),
    )
    ctx.hidden_shape, ctx.hidden_dtype = tokens.hidden.shape, tokens.hidden.dtype
    ctx.kept_columns = kept.columns if kept is not None else 0
    ctx.largest_group = groups.largest if groups is not None else 0
    ctx.options, ctx.needs = options, needs


def restore(ctx: Any) -> tuple[Tokens, Head, RowGroups | None, Saved]:
    """What `save` was given."""
    hidden, weight, bias, adapter, targets, rows, *rest = ctx.saved_tensors
    order, unique, starts, counts, one_minus_p, lse, u, entropy_u, own, level, base, *values = rest
    if values:
        # Where the graph is not to be used again, the kept values go part by part as they are used.
        ctx.maybe_clear_saved_tensors()
    kept = KeptLogitGrads(values, base, ctx.kept_columns) if values else None
    groups = None if order is None else RowGroups(order, unique, starts, counts, ctx.largest_group)
    entropy = None if entropy_u is None and own is None else SavedEntropy(entropy_u, own, level)
    saved = Saved(one_minus_p, lse, u, kept, entropy)
    return Tokens(hidden, rows, targets), ctx.options.head(weight, bias, adapter), groups, saved


class LinearLogps(torch.autograd.Function):
    """`logps_forward`, `hidden_gradient` and `head_gradient` for autograd. Saves no product of its own but u."""

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
        wanted: Statistics,
    ) -> tuple[Tensor | None, ...]:
        tokens, head = Tokens(hidden, rows, targets), options.head(weight, bias, adapter)
        answer, saved = logps_forward(tokens, head, options.plan, needs, wanted)
        save(ctx, tokens, head, groups, options, needs, saved)
        # Entropy that no loss was made of costs its backward nothing.
        ctx.set_materialize_grads(False)
        without = answer[1:] if saved.entropy is None else answer[2:]
        ctx.mark_non_differentiable(*(x for x in without if x is not None))
        return tuple(answer)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # Under create_graph, once_differentiable refuses a second derivative only where a gradient has a graph itself:
        # that of a plain sum would be left out silently.
        if torch.is_grad_enabled():
            grads = tuple(None if grad is None else grad.detach().requires_grad_() for grad in grads)
        return LinearLogps._backward(ctx, *grads)

    @staticmethod
    @once_differentiable
    def _backward(ctx: Any, grad: Tensor | None, of_entropy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        tokens, head, groups, saved = restore(ctx)
        needs, plan, one_minus_p = ctx.needs, ctx.options.plan, saved.one_minus_p
        if grad is None and of_entropy is None:
            grad = torch.zeros_like(one_minus_p)  # Hooks and other ranks wait for a gradient.
        coefficient = torch.zeros_like(one_minus_p) if grad is None else grad.to(one_minus_p.dtype) * one_minus_p
        d_hidden, d_head = None, HeadGradients(None, None)
        if needs.hidden:
            terms: list[Any] = [(coefficient, saved.u)] if grad is not None else []
            if of_entropy is not None and saved.entropy is not None:
                terms.append((of_entropy, saved.entropy.u))
            d_hidden = hidden_gradient(ctx.hidden_shape, ctx.hidden_dtype, terms, tokens.rows, groups, plan)
        if needs.head:
            entropy = None
            if of_entropy is not None and saved.entropy is not None:
                own, level = saved.entropy.own, saved.entropy.level
                assert own is not None
                assert level is not None
                entropy = EntropyGradient(coefficient + of_entropy * own, of_entropy * one_minus_p)
                coefficient = coefficient + of_entropy * level
            d_head = head_gradient(tokens, head, coefficient, saved, plan, needs, entropy)
        return d_hidden, d_head.weight, d_head.bias, None, None, None, None, None, d_head.adapter, None
