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

from orpo_kernels.bench.peers.interface import Loss, Peer, Unavailable
from orpo_kernels.bench.problem import IGNORED, Inputs, Problem
from orpo_kernels.kernels.naive import naive_logps


def full_logits(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    nll_targets: Tensor,
    union: Tensor,
    softcap: float | None,
    beta: float,
) -> tuple[Tensor, Tensor]:
    """(loss [], log-probabilities [2B, T])."""
    logps = naive_logps(hidden, weight, union, softcap=softcap)
    return trl_objective(logps, targets, nll_targets, beta), logps


def trl_objective(logps: Tensor, targets: Tensor, nll_targets: Tensor, beta: float) -> Tensor:
    """ORPO as `trl.experimental.orpo` writes it, in the dtype of `logps`."""
    pairs = len(nll_targets)
    in_nll, in_answer = nll_targets != IGNORED, targets != IGNORED
    nll = -(logps[:pairs] * in_nll).sum() / in_nll.sum()
    chosen, rejected = ((logps * in_answer).sum(-1) / in_answer.sum(-1)).chunk(2)
    log_odds = (chosen - rejected) - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
    return nll - beta * F.logsigmoid(log_odds).mean()


def _of(function: Callable[..., tuple[Tensor, Tensor]], x: Inputs) -> tuple[Tensor, Tensor]:
    return function(x.hidden, x.weight, x.targets, x.nll_targets, x.scored_targets, x.softcap, x.beta)


def _build(problem: Problem) -> Loss:
    return partial(_of, full_logits)


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
    Peer("full", "full logits", "all", _build),
    Peer("full-compiled", "full logits, torch.compile", "all", _build_compiled, compiles=True),
)
