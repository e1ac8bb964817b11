"""This package, with three plans: the default, least memory and least time."""

from __future__ import annotations

from functools import partial

from orpo_kernels.bench.peers.interface import Found, Loss, Peer, objective
from orpo_kernels.bench.problem import Inputs, Problem
from orpo_kernels.linear_logps import linear_logps
from orpo_kernels.linear_token_stats import linear_token_stats
from orpo_kernels.plan import MIB, Plan


def _build(problem: Problem, plan: Plan) -> Loss:
    def loss(inputs: Inputs) -> Found:
        # `orpo_loss`, whose log-probabilities the judge wants to see too.
        if problem.statistics:
            found = linear_token_stats(
                inputs.hidden, inputs.weight, inputs.scored_targets, softcap=inputs.softcap, plan=plan
            )
            return Found(objective(inputs, found.logps), found.logps, [x for x in found[1:] if x is not None])
        logps = linear_logps(inputs.hidden, inputs.weight, inputs.scored_targets, softcap=inputs.softcap, plan=plan)
        return Found(objective(inputs, logps), logps)

    return loss


def _peer(name: str, label: str, logits: str, plan: Plan) -> Peer:
    return Peer(name, label, logits, partial(_build, plan=plan), statistics=True)


PEERS = (
    _peer("ours", "orpo_kernels", "a tile", Plan()),
    _peer("ours-kept", "orpo_kernels, keep_logit_grads", "a copy kept", Plan(keep_logit_grads=True)),
    _peer("ours-12mib", "orpo_kernels, 12 MiB scratch", "a tile", Plan(scratch_bytes=12 * MIB)),
)
