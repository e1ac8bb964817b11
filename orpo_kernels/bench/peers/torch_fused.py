"""torch's `linear_cross_entropy` under our objective: its chunked path, and its plain one, which holds the logits."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from orpo_kernels.bench.peers.interface import Loss, Peer, Unavailable, from_token_logps, refuse_softcap
from orpo_kernels.bench.problem import Problem


def _build(problem: Problem, chunked: bool) -> Loss:
    if not hasattr(F, "linear_cross_entropy"):
        raise Unavailable(f"torch {torch.__version__} has no linear_cross_entropy")
    refuse_softcap(problem, "torch's linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None
    return from_token_logps(
        lambda hidden, weight, targets: (
            -F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options),
        )
    )


PEERS = (
    Peer("torch-chunked", "torch linear_cross_entropy, chunked", "a chunk", partial(_build, chunked=True)),
    Peer("torch-plain", "torch linear_cross_entropy, plain", "all", partial(_build, chunked=False)),
)
