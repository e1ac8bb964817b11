"""The primitive on a head whose rows are spread over ranks: nothing gathers the weight, no rank does another's work.

Rank p has the rows W_p of some entries of the vocabulary, and every rank has the same hidden states. With *competitors*,
the entries other than the target (docs/how-it-works.md), all that a token needs of the other ranks is two numbers:

    z_y    the target's logit, from the rank that has its row
    L      = log sum_p e^(L_p),  L_p over the competitors that rank p has

from which log p = -softplus(L - z_y) and s = 1 - p follow everywhere. A rank runs the same kernels as one process does, on
its slice: relative to z_y, and with a target that none of its rows matches where another rank has it. They give L_p and

    u_p = [y in p] f'_y W[y] - (q_p f') W_p            q_p over the rank's own competitors

The whole vocabulary's q is e^(L_p - L) q_p there, so with the share e^(L_p - L) in the place of 1 before the second
term u = sum_p u_p, and

    dL/dh = c s sum_p u_p                   one sum over the ranks, while
    dL/dW_p = c s (onehot - q) f' (outer) h  is computed, which needs L and no one else's rows

What travels is in `vocab_exchange`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from orpo_kernels.autograd import HeadOptions, Needs, Saved, gradient_step, head_gradient
from orpo_kernels.kernels import torch_path
from orpo_kernels.kernels.dispatch import choose, forward_head
from orpo_kernels.kernels.interface import Head, Kept, Tokens
from orpo_kernels.linear_logps import check_targets, head_options, needs_of
from orpo_kernels.plan import Plan
from orpo_kernels.tokens import RowGroups, ScoredTokens, select_scored
from orpo_kernels.vocab_exchange import HiddenGradient, combine, share_target_logits
from orpo_kernels.vocab_slice import VocabSlice, is_dtensor, slice_of_dtensor, slice_of_rows


def vocab_parallel_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    group: Any = None,
    vocab_size: int | None = None,
    vocab_range: tuple[int, int] | None = None,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    plan: Plan | None = None,
    reduce_hidden_grad: bool = True,
) -> Tensor:
    """`linear_logps` under a head whose rows are spread over the ranks of a process group, all of which make the call.

    hidden: [..., D], the same on every rank of the group, as are targets and rows.
    weight: [V_p, D], this rank's rows, or a DTensor [V, D] that is Shard(0) over one dimension of its mesh. bias: [V_p],
        or a DTensor cut alike.
    group: a torch.distributed process group; by default the one of all ranks. A DTensor brings its own.
    vocab_size: V, the entries that all ranks have together, padding left out. A DTensor need not be told.
    vocab_range: (start, stop), the entries that this rank's first stop - start rows are; rows beyond are padding.
        By default every rank has as many rows, one rank after the other, and what exceeds V is padding.
    targets: ids in [0, V), whoever has their rows.
    plan: of what this rank does; its numbers are those of a vocabulary of V_p entries.
    reduce_hidden_grad: False leaves the gradient of hidden as this rank's part of a sum over the group, for a caller
        who reduce-scatters it (tokens that were gathered for this call). True sums it up.

    Returns log-probabilities as `linear_logps` does, with the same bits on every rank. Gradients of weight and bias are
    of this rank's rows, and zero for padding.

    Elements that a rank gives away for N scored tokens: N + (N + 2) in fp64 in the forward, N * D in hidden's dtype in the
    backward.

    Raises what `linear_logps` does; ValueError too where the ranks' rows do not make up the vocabulary.
    """
    if is_dtensor(weight):
        if group is not None or vocab_range is not None:
            raise ValueError(
                "group or vocab_range was given beside a DTensor weight, which has its own: leave them out"
            )
        part = slice_of_dtensor(weight, vocab_size)
        weight = local_rows(weight)
        bias = local_rows(bias)
    else:
        part = slice_of_rows(weight.shape[0], group, vocab_size, vocab_range)
    options = head_options(
        hidden, weight, bias=bias, logit_scale=logit_scale, softcap=softcap, plan=plan, is_slice=True
    )
    check_targets(hidden, targets, rows)
    num_rows = math.prod(hidden.shape[:-1])
    scored = select_scored(targets, part.vocab_size, num_rows, ignore_index=ignore_index, rows=rows)
    return scored_slice_logps(
        hidden, weight, bias, scored, targets.shape, options, part, reduce_hidden_grad=reduce_hidden_grad
    )


def local_rows(tensor: Any) -> Any:
    """This rank's rows of a DTensor; anything else as it is."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def scored_slice_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scored: ScoredTokens,
    shape: torch.Size,
    options: HeadOptions,
    part: VocabSlice,
    adapter: Tensor | None = None,
    *,
    reduce_hidden_grad: bool = True,
) -> Tensor:
    """`scored_logps` of a slice: weight [V_p, D], bias [V_p] and adapter [V_p, r] are this rank's rows."""
    logps = VocabParallelLogps.apply(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        scored,
        options,
        needs_of(hidden, weight, bias, adapter),
        adapter,
        part,
        reduce_hidden_grad,
    )
    if scored.positions is None:
        return logps.view(shape)
    return logps.new_zeros(math.prod(shape)).index_copy(0, scored.positions, logps).view(shape)


def slice_forward(
    tokens: Tokens, head: Head, options: HeadOptions, needs: Needs, part: VocabSlice
) -> tuple[Tensor, Saved]:
    """Log-probabilities [N], and what their backward needs of this rank.

    tokens: with targets as `VocabSlice.local` has them. head: without padding.
    """
    n, wide, device = tokens.targets.numel(), head.accumulation_dtype, tokens.hidden.device
    if part.held == 0:
        return _forward_without_rows(tokens, head, needs, part)
    backend, schedule = choose(
        options.plan,
        head,
        n,
        train_hidden=needs.hidden,
        train_weight=needs.head,
        in_place=tokens.rows is None and tokens.hidden.dtype == options.compute_dtype,
    )
    with torch.autocast(device.type, enabled=False):
        forward = forward_head(backend, head)
        known = backend.target_logits(tokens, forward, schedule)
        share_target_logits(known.value, part)
        tokens = tokens._replace(known=known)
        out = backend.forward(tokens, forward, schedule, needs.hidden)
        # gap is more exact than L_p where it is small beside that.
        shares = combine(torch.where(known.value.isfinite(), known.value + out.gap, out.lse), part)
        if out.u is not None:
            step = gradient_step(options.plan, head.inner_size, wide, device)
            torch_path.settle_u(out.u, tokens, forward, shares.own, shares.rest, step)
        if out.kept is not None:
            backend.settle_kept(out.kept, tokens, forward, shares.lse)
    logps, sure_not = _finish(known.value, shares.lse, wide)
    return logps, Saved(sure_not, shares.lse.to(wide), out.u, out.kept)


def _forward_without_rows(tokens: Tokens, head: Head, needs: Needs, part: VocabSlice) -> tuple[Tensor, Saved]:
    """Of a rank that has nothing but padding: it takes part in the exchange."""
    n, wide, device = tokens.targets.numel(), head.accumulation_dtype, tokens.hidden.device
    z_y = torch.zeros(n, dtype=torch.float64, device=device)
    share_target_logits(z_y, part)
    lse = combine(torch.full_like(z_y, -torch.inf), part).lse
    logps, sure_not = _finish(z_y, lse, wide)
    u = torch.zeros(n, head.inner_size, dtype=wide, device=device) if needs.hidden else None
    return logps, Saved(sure_not, lse.to(wide), u, None)


def _finish(z_y: Tensor, lse: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """log p and 1 - p [N]."""
    # A target's logit of +inf is an overflow, not certainty.
    gap = torch.where(z_y == torch.inf, torch.nan, lse - z_y)
    # softplus(x) = x beyond the threshold: e^-40 is below fp64's rounding.
    return -F.softplus(gap, threshold=40.0).to(wide), torch.sigmoid(gap).to(wide)


class VocabParallelLogps(torch.autograd.Function):
    """`slice_forward` and its backward for autograd. Saves no product of its own but u."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scored: ScoredTokens,
        options: HeadOptions,
        needs: Needs,
        adapter: Tensor | None,
        part: VocabSlice,
        reduce_hidden_grad: bool,
    ) -> Tensor:
        targets = part.local(scored.targets)
        head = _head(weight, bias, adapter, options, part)
        logps, saved = slice_forward(Tokens(hidden, scored.rows, targets), head, options, needs, part)
        inputs = (hidden, weight, bias, adapter, targets) if needs.head else (None,) * 5
        kept, groups = saved.kept, scored.groups
        ctx.save_for_backward(
            *inputs,
            scored.rows,
            *(groups[:4] if groups is not None else (None,) * 4),
            saved.sure_not,
            saved.lse if needs.head else None,
            saved.u,
            kept.reference if kept is not None else None,
            *(kept.values if kept is not None else ()),
        )
        ctx.hidden_shape, ctx.hidden_dtype = hidden.shape, hidden.dtype
        ctx.kept_columns = kept.columns if kept is not None else 0
        ctx.largest_group = groups.largest if groups is not None else 0
        ctx.ascending = scored.rows is scored.positions
        ctx.options, ctx.needs, ctx.part, ctx.reduces = options, needs, part, reduce_hidden_grad
        return logps

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # As in `autograd.LinearLogps`: a second derivative is refused.
        return VocabParallelLogps._backward(ctx, grad.detach().requires_grad_() if torch.is_grad_enabled() else grad)

    @staticmethod
    @once_differentiable
    def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, adapter, targets, rows, *rest = ctx.saved_tensors
        order, unique, starts, counts, sure_not, lse, u, reference, *values = rest
        del rest
        if values:
            # Where the graph is not to be used again, the kept values go part by part as they are used.
            ctx.maybe_clear_saved_tensors()
        needs, part = ctx.needs, ctx.part
        coefficient = grad.to(sure_not.dtype) * sure_not
        d_hidden = d_weight = d_bias = d_adapter = None
        if needs.hidden:
            groups = None if order is None else RowGroups(order, unique, starts, counts, ctx.largest_group)
            travelling = HiddenGradient(
                ctx.hidden_shape,
                ctx.hidden_dtype,
                coefficient,
                u,
                rows,
                groups,
                ascending=ctx.ascending,
                plan=ctx.options.plan,
                part=part,
                all_reduce=ctx.reduces,
            )
        if needs.head:
            saved = Saved(sure_not, lse, u, Kept(values, reference, ctx.kept_columns) if values else None)
            tokens = Tokens(hidden, rows, targets)
            d_weight, d_bias, d_adapter = _head_gradient(
                tokens, weight, bias, adapter, coefficient, saved, ctx.options, needs, part
            )
        if needs.hidden:
            d_hidden = travelling.result()
        return d_hidden, d_weight, d_bias, None, None, None, d_adapter, None, None


def _head(weight: Tensor, bias: Tensor | None, adapter: Tensor | None, options: HeadOptions, part: VocabSlice) -> Head:
    """This rank's head without padding."""
    bias, adapter = (None if x is None else x[: part.held] for x in (bias, adapter))
    return Head(weight[: part.held], bias, options.logit_scale, options.softcap, options.compute_dtype, adapter)


def _head_gradient(
    tokens: Tokens,
    weight: Tensor,
    bias: Tensor | None,
    adapter: Tensor | None,
    coefficient: Tensor,
    saved: Saved,
    options: HeadOptions,
    needs: Needs,
    part: VocabSlice,
) -> tuple[Tensor | None, ...]:
    """`autograd.head_gradient` of the rows that are held, and zeros for the padding."""
    all_rows = (weight, bias, adapter)
    if part.held == 0:
        return tuple(
            torch.zeros_like(x) if x is not None and needed else None
            for x, needed in zip(all_rows, needs[1:], strict=True)
        )
    held = [None if x is None else x[: part.held] for x in all_rows]
    assert held[0] is not None
    found = head_gradient(tokens, held[0], held[1], coefficient, saved, options, needs, held[2])
    padding = weight.shape[0] - part.held
    if not padding:
        return found
    return tuple(None if x is None else torch.cat([x, x.new_zeros(padding, *x.shape[1:])]) for x in found)
