"""This package, with three plans: the default, least memory and least time."""

from __future__ import annotations

from functools import partial

import torch

from orpo_kernels.bench.peers.interface import Loss, Peer, objective
from orpo_kernels.bench.problem import Inputs, Problem
from orpo_kernels.linear_logps import linear_logps
from orpo_kernels.plan import MIB, Plan


def _build(problem: Problem, plan: Plan) -> Loss:
    def loss(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        # `orpo_loss`, whose log-probabilities the judge wants to see too.
        logps = linear_logps(inputs.hidden, inputs.weight, inputs.scored_targets, softcap=inputs.softcap, plan=plan)
        return objective(inputs, logps), logps

    return loss


PEERS = (
    Peer("ours", "orpo_kernels", "a tile", partial(_build, plan=Plan())),
    Peer(
        "ours-kept", "orpo_kernels, keep_logit_grads", "a copy kept", partial(_build, plan=Plan(keep_logit_grads=True))
    ),
    Peer("ours-12mib", "orpo_kernels, 12 MiB scratch", "a tile", partial(_build, plan=Plan(scratch_bytes=12 * MIB))),
)
