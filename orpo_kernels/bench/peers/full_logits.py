"""What trainers do: all logits [2B, T, V], one cross entropy over them, TRL's odds ratio; and the same compiled.

TRL runs a cross entropy and a log-softmax; one suffices for both terms, so this is TRL's mathematics at its
best. The logits are in fp32 before the cross entropy, as mixed-precision training has them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from orpo_kernels.bench.peers.interface import Found, Loss, Peer, Unavailable
from orpo_kernels.bench.problem import IGNORED, Inputs, Problem
from orpo_kernels.kernels.naive import logps_of_logits, naive_logits


def full_logits(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    nll_targets: Tensor,
    union: Tensor,
    softcap: float | None,
    beta: float,
    statistics: bool = False,
) -> Found:
    logits = naive_logits(hidden, weight, softcap=softcap)
    logps = logps_of_logits(logits, union)
    found = _statistics(logits.detach(), union) if statistics else None
    return Found(trl_objective(logps, targets, nll_targets, beta), logps, found)


def _statistics(logits: Tensor, union: Tensor) -> list[Tensor]:
    """As one writes them, on the scored positions."""
    scored = union != IGNORED
    z = logits[scored]
    logp = z.log_softmax(-1)
    every = (-(logp.exp() * logp).sum(-1), (2 * logp).logsumexp(-1), z.mean(-1), z.argmax(-1) == union[scored])
    return [torch.zeros(union.shape, device=z.device).masked_scatter(scored, x.float()) for x in every]


def trl_objective(logps: Tensor, targets: Tensor, nll_targets: Tensor, beta: float) -> Tensor:
    """ORPO as `trl.experimental.orpo` writes it, in the dtype of `logps`."""
    pairs = len(nll_targets)
    in_nll, in_answer = nll_targets != IGNORED, targets != IGNORED
    nll = -(logps[:pairs] * in_nll).sum() / in_nll.sum()
    chosen, rejected = ((logps * in_answer).sum(-1) / in_answer.sum(-1)).chunk(2)
    log_odds = (chosen - rejected) - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
    return nll - beta * F.logsigmoid(log_odds).mean()


def _of(function: Callable[..., Found], x: Inputs) -> Found:
    return function(x.hidden, x.weight, x.targets, x.nll_targets, x.scored_targets, x.softcap, x.beta)


def _build(problem: Problem) -> Loss:
    return partial(_of, partial(full_logits, statistics=problem.statistics))


def _build_compiled(problem: Problem) -> Loss:
    if problem.device == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise Unavailable("torch.compile finds no C++ compiler here") from error
    return partial(_of, torch.compile(full_logits, dynamic=False))


PEERS = (
    Peer("full", "full logits", "all", _build, statistics=True),
    Peer("full-compiled", "full logits, torch.compile", "all", _build_compiled, compiles=True),
)
