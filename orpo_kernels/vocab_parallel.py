"""The primitive on a head whose rows are spread over ranks: nothing gathers the weight, no rank does another's work.

Rank p has the rows W_p of some entries of the vocabulary, and every rank has the same hidden states. With
*competitors*, the entries other than the target (docs/how-it-works.md), a token needs two numbers of all ranks:

    z_y    the target's logit, from the rank that has its row
    L      = log sum_p e^(L_p),  L_p over the competitors that rank p has

from which log p = logsigmoid(z_y - L) and s = 1 - p follow everywhere. A rank runs the same kernels as one process
does, on its slice: relative to z_y, and with a target that none of its rows matches where another rank has it. They
give L_p and

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

from orpo_kernels.autograd import HeadOptions, Needs, Saved, choose_for, gradient_step, head_gradient, restore, save
from orpo_kernels.kernels import torch_path
from orpo_kernels.kernels.dispatch import forward_head
from orpo_kernels.kernels.interface import Head, HeadGradients, Tokens
from orpo_kernels.linear_logps import check_targets, head_options
from orpo_kernels.plan import Plan
from orpo_kernels.tokens import ScoredTokens, select_scored
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
    weight: [V_p, D], this rank's rows, or a DTensor [V, D] that is Shard(0) over one dimension of its mesh.
    bias: [V_p], or a DTensor cut alike.
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

    For N scored tokens a rank gives away N + (N + 2) fp64 numbers in the forward, and N * D in hidden's dtype in the
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


# Its sizes are data and its exchanges wait: a compiled model leaves its graph for it.
@torch.compiler.disable
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
        Needs.of(hidden, weight, bias, adapter),
        adapter,
        part,
        reduce_hidden_grad,
    )
    if scored.positions is None:
        return logps.view(shape)
    return logps.new_zeros(math.prod(shape)).index_copy(0, scored.positions, logps).view(shape)


def slice_forward(tokens: Tokens, head: Head, plan: Plan, needs: Needs, part: VocabSlice) -> tuple[Tensor, Saved]:
    """Log-probabilities [N], and what their backward needs of this rank.

    tokens: with targets as `VocabSlice.local` has them. head: without padding.
    """
    if part.held == 0:
        return _forward_without_rows(tokens, head, needs, part)
    wide, device = head.accumulation_dtype, tokens.hidden.device
    backend, schedule = choose_for(tokens, head, plan, needs, train_weight=needs.head, ranks=part.ranks)
    with torch.autocast(device.type, enabled=False):
        head = forward_head(backend, head)
        known = backend.target_logits(tokens, head, schedule)
        share_target_logits(known.value, part)
        tokens = tokens._replace(known=known)
        out = backend.forward(tokens, head, schedule, needs.hidden)
        # The odds are more exact than L_p where they are small beside that.
        own = torch.where(known.value.isfinite(), known.value - out.log_odds, out.lse)
        shares = combine(own, part)
        if out.u is not None:
            step = gradient_step(plan, head.inner_size, wide, device)
            torch_path.settle_u(out.u, tokens, head, shares.own, shares.rest, step)
        if out.kept is not None:
            backend.settle_kept(out.kept, tokens, head, shares.lse)
    logps, one_minus_p = _finish(known.value, shares.lse, wide)
    return logps, Saved(one_minus_p, shares.lse.to(wide), out.u, out.kept)


def _forward_without_rows(tokens: Tokens, head: Head, needs: Needs, part: VocabSlice) -> tuple[Tensor, Saved]:
    """Of a rank that has nothing but padding: it takes part in the exchange."""
    n, wide, device = tokens.targets.numel(), head.accumulation_dtype, tokens.hidden.device
    z_y = torch.zeros(n, dtype=torch.float64, device=device)
    share_target_logits(z_y, part)
    lse = combine(torch.full_like(z_y, -torch.inf), part).lse
    logps, one_minus_p = _finish(z_y, lse, wide)
    u = torch.zeros(n, head.inner_size, dtype=wide, device=device) if needs.hidden else None
    return logps, Saved(one_minus_p, lse.to(wide), u, None)


def _finish(z_y: Tensor, lse: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """log p and 1 - p [N]."""
    # A target's logit of +inf is an overflow, not certainty.
    log_odds = torch.where(z_y == torch.inf, torch.nan, z_y - lse)
    return F.logsigmoid(log_odds).to(wide), torch.sigmoid(-log_odds).to(wide)


class VocabParallelLogps(torch.autograd.Function):
    """`slice_forward` and its backward for autograd, as `autograd.LinearLogps` is for one process."""

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
        tokens, head = Tokens(hidden, scored.rows, part.local(scored.targets)), options.head(weight, bias, adapter)
        logps, saved = slice_forward(tokens, part.without_padding(head), options.plan, needs, part)
        save(ctx, tokens, head, scored.groups, options, needs, saved)
        ctx.ascending = scored.rows is scored.positions
        ctx.part, ctx.reduces = part, reduce_hidden_grad
        return logps

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # As in `autograd.LinearLogps`: a second derivative is refused.
        return VocabParallelLogps._backward(ctx, grad.detach().requires_grad_() if torch.is_grad_enabled() else grad)

    @staticmethod
    @once_differentiable
    def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tokens, head, groups, saved = restore(ctx)
        part, plan = ctx.part, ctx.options.plan
        coefficient = grad.to(saved.one_minus_p.dtype) * saved.one_minus_p
        travelling, d_head = None, HeadGradients(None, None)
        if saved.u is not None:
            travelling = HiddenGradient(
                ctx.hidden_shape,
                ctx.hidden_dtype,
                coefficient,
                saved.u,
                tokens.rows,
                groups,
                ascending=ctx.ascending,
                plan=plan,
                part=part,
                all_reduce=ctx.reduces,
            )
        if ctx.needs.head:
            d_head = _slice_gradient(tokens, head, coefficient, saved, plan, ctx.needs, part)
        d_hidden = None if travelling is None else travelling.result()
        return d_hidden, d_head.weight, d_head.bias, None, None, None, d_head.adapter, None, None


def _slice_gradient(
    tokens: Tokens, head: Head, coefficient: Tensor, saved: Saved, plan: Plan, needs: Needs, part: VocabSlice
) -> HeadGradients:
    """`autograd.head_gradient` of the rows that are held, and zeros for the padding."""
    if part.held == 0:
        rows = (head.weight, head.bias, head.adapter)
        return HeadGradients(
            *(
                torch.zeros_like(x) if x is not None and needed else None
                for x, needed in zip(rows, needs[1:], strict=True)
            )
        )
    found = head_gradient(tokens, part.without_padding(head), coefficient, saved, plan, needs)
    padding = head.weight.shape[0] - part.held
    if not padding:
        return found
    return HeadGradients(*(None if x is None else torch.cat([x, x.new_zeros(padding, *x.shape[1:])]) for x in found))
