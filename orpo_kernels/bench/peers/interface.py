"""What a peer is, and what those that give log-probabilities per token share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from orpo_kernels.bench.problem import IGNORED, Inputs, Problem
from orpo_kernels.loss import orpo_from_logps

# In the order in which `Found.statistics` has them.
STATISTICS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


class Found(NamedTuple):
    """loss: []. logps: [2B, T] of the scored targets, or None where the peer does not give them.

    statistics: four of [2B, T], where the problem asks for them.
    """

    loss: Tensor
    logps: Tensor | None
    statistics: Sequence[Tensor] | None = None


Loss = Callable[[Inputs], Found]


class Unavailable(Exception):
    """The peer cannot run this problem here; the message says why."""


class Peer(NamedTuple):
    """A way to compute the loss.

    logits: how many it holds at once, in words: "all", "a pair's", "a chunk", "none".
    statistics: whether it gives those of a problem that asks for them.
    build: makes the loss function for a problem. Imports what it needs; raises ImportError or Unavailable.
    compiles: its first call on new shapes costs more than the others.
    """

    name: str
    label: str
    logits: str
    build: Callable[[Problem], Loss]
    compiles: bool = False
    statistics: bool = False


def refuse_softcap(problem: Problem, name: str) -> None:
    if problem.softcap is not None:
        raise Unavailable(f"{name} has no soft-cap")


def from_token_logps(logps_of: Callable[[Tensor, Tensor, Tensor], Sequence[Tensor]]) -> Loss:
    """Our objective on `logps_of(hidden [N, D], weight [V, D], targets [N])`, given the scored rows only.

    It gives log-probabilities [N], and behind them the statistics, if any.
    """

    def loss(inputs: Inputs) -> Found:
        union = inputs.scored_targets
        places = (union.flatten() != IGNORED).nonzero().squeeze(1)
        hidden = inputs.hidden.reshape(-1, inputs.hidden.shape[-1]).index_select(0, places)
        found, *statistics = logps_of(hidden, inputs.weight, union.flatten()[places])

        def placed(x: Tensor) -> Tensor:
            return torch.zeros(union.numel(), device=x.device).index_copy(0, places, x.float()).view(union.shape)

        logps = placed(found)
        return Found(objective(inputs, logps), logps, [placed(x) for x in statistics] or None)

    return loss


def objective(inputs: Inputs, logps: Tensor) -> Tensor:
    """ORPO on TRL's terms from log-probabilities [2B, T]."""
    return orpo_from_logps(logps, inputs.targets, nll_targets=inputs.nll_targets, beta=inputs.beta, preset="trl").loss
