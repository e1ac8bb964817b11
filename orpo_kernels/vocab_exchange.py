"""What travels between the ranks of a head in slices, for N scored tokens of D numbers on P ranks.

    forward    the target's logit, from the rank that has its row        all-reduce [N]
               each rank's logsumexp over its own competitors            all-gather [N] of each
    backward   the gradient of hidden                                    all-reduce [N, D]

The numbers of a token travel in fp64: the two [N] are then as exact as what they stand for, and a hundredth of what the
backward moves. The logsumexps are gathered rather than added up, because a sum of exponentials needs a reference that
holds on every rank: their maximum, which would be one more exchange, and one that waits. Every rank combines the same
numbers in the same order, so that all have the same bits.

The gradient travels in hidden's dtype, as a column-parallel linear layer's does, and while the head's own is computed.
Only rows that are scored do, and nothing is allocated for that: they are put at the front of the gradient's own memory,
and `spread` moves them to their places afterwards.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from orpo_kernels.autograd import gradient_step, hidden_gradient
from orpo_kernels.plan import Plan
from orpo_kernels.tokens import RowGroups
from orpo_kernels.vocab_slice import VocabSlice


class Shares(NamedTuple):
    """lse: [N] fp64, L over the competitors of all ranks. own, rest: [N] fp64, the part e^(L_p - L) that this rank's
    have in their sum of exponentials, and 1 minus that."""

    lse: Tensor
    own: Tensor
    rest: Tensor


def share_target_logits(logits: Tensor, part: VocabSlice) -> None:
    """logits: [N] fp64, 0 where another rank has the target's row; in place."""
    dist.all_reduce(logits, group=part.group)


def combine(own: Tensor, part: VocabSlice) -> Shares:
    """own: [N] fp64, this rank's L_p. Raises ValueError if the ranks' slices do not make up the vocabulary."""
    n, ranks = own.numel(), part.ranks
    sent = own.new_empty(n + 2)
    sent[:n] = own
    sent[n].fill_(part.start)
    sent[n + 1].fill_(part.stop)
    found = own.new_empty(ranks, n + 2)
    dist.all_gather(list(found), sent, group=part.group)
    part.check(found[:, n:])
    lse = torch.logsumexp(found[:, :n], 0)
    # Without a competitor on any rank both are -inf.
    below = torch.where(lse == -torch.inf, -torch.inf, own - lse)
    return Shares(lse, below.exp(), -torch.expm1(below))


class HiddenGradient:
    """The gradient of hidden [R, D]: this rank's part is computed at once, and its sum over the ranks is `result`.

    rows, groups: as in `ScoredTokens`. ascending: the rows grow from token to token.
    all_reduce: False leaves this rank's part.
    """

    def __init__(
        self,
        shape: torch.Size,
        dtype: torch.dtype,
        coefficient: Tensor,
        u: Tensor,
        rows: Tensor | None,
        groups: RowGroups | None,
        *,
        ascending: bool,
        plan: Plan,
        part: VocabSlice,
        all_reduce: bool,
    ) -> None:
        self._plan, self._work = plan, None
        if not all_reduce or coefficient.numel() == 0:
            self._places = None
            self._gradient = hidden_gradient(shape, dtype, [(coefficient, u)], rows, groups, plan)
            return
        if rows is not None and groups is None and not ascending:
            groups = _groups_of_one(rows)
        self._places = rows if groups is None else groups.unique
        self._gradient = torch.empty(shape, dtype=dtype, device=u.device)
        count = shape[0] if self._places is None else self._places.numel()
        front = self._gradient[:count]
        if groups is not None:
            groups = groups._replace(unique=torch.arange(count, device=u.device))
        hidden_gradient(front.shape, dtype, [(coefficient, u)], None, groups, plan, out=front)
        self._work = dist.all_reduce(front, group=part.group, async_op=True)

    def result(self) -> Tensor:
        if self._work is not None:
            self._work.wait()
        if self._places is not None:
            gradient = self._gradient
            spread(
                gradient, self._places, gradient_step(self._plan, gradient.shape[1], gradient.dtype, gradient.device)
            )
        return self._gradient


def spread(gradient: Tensor, places: Tensor, step: int) -> None:
    """Moves row i of `gradient` [R, D] to row places[i] and fills the others with zeros, in place.

    places: [N] int64, growing, so that no row moves towards the front: what lies behind a piece is done. step: rows
    that are copied at a time.
    """
    count = places.numel()
    gradient[count:].zero_()
    for start in reversed(range(0, count, step)):
        piece = slice(start, min(start + step, count))
        moving = gradient[piece].clone()
        gradient[piece].zero_()
        gradient.index_copy_(0, places[piece], moving)


def _groups_of_one(rows: Tensor) -> RowGroups:
    unique, order = torch.sort(rows)
    return RowGroups(order, unique, torch.arange(len(rows), device=rows.device), torch.ones_like(rows), 1)
