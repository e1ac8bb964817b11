"""Liger Kernel's fused linear ORPO: plain torch, a pair's logits at a time, gradients made in the forward.

With its own default, torch.compile, and without. It is given the frozen head as frozen, and then computes no
gradient for it. The rows of its NLL targets are halved inside to find the chosen ones: it gets [2B, T].
"""

from __future__ import annotations

from functools import partial

import torch

from orpo_kernels.bench.peers.interface import Found, Loss, Peer, refuse_softcap
from orpo_kernels.bench.problem import IGNORED, Inputs, Problem


def _build(problem: Problem, compiled: bool) -> Loss:
    refuse_softcap(problem, "Liger's ORPO")
    from liger_kernel.chunked_loss import LigerFusedLinearORPOLoss

    orpo = LigerFusedLinearORPOLoss(ignore_index=IGNORED, beta=problem.beta, compiled=compiled)

    def loss(inputs: Inputs) -> Found:
        both = torch.cat([inputs.nll_targets, torch.full_like(inputs.nll_targets, IGNORED)])
        return Found(orpo(inputs.weight, inputs.hidden, inputs.targets, nll_target=both)[0], None)

    return loss


PEERS = (
    Peer("liger", "Liger ORPO", "a pair's", partial(_build, compiled=True), compiles=True),
    Peer("liger-eager", "Liger ORPO, not compiled", "a pair's", partial(_build, compiled=False)),
)
