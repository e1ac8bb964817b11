"""Cut Cross-Entropy (the `cut-cross-entropy` package) under our objective.

Its Triton kernels, exact and with its default filter, which leaves out the gradient of improbable entries; and
the torch.compile fallback that it ships for machines without Triton: that one holds the logits.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from orpo_kernels.bench.peers.interface import Found, Loss, Peer, Unavailable, objective
from orpo_kernels.bench.problem import IGNORED, Inputs, Problem


def _build(problem: Problem, **options: Any) -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    if options["impl"] == "cce" and problem.device == "cpu":
        raise Unavailable("its kernels are Triton's and need a GPU")

    def loss(inputs: Inputs) -> Found:
        # It leaves ignored targets out itself.
        logps = -linear_cross_entropy(
            inputs.hidden,
            inputs.weight,
            inputs.scored_targets,
            ignore_index=IGNORED,
            softcap=inputs.softcap,
            reduction="none",
            **options,
        ).float()
        return Found(objective(inputs, logps), logps)

    return loss


PEERS = (
    Peer("cce-exact", "CCE, exact", "none", partial(_build, impl="cce", filter_eps=None), compiles=True),
    Peer("cce", "CCE, filtered", "none", partial(_build, impl="cce", filter_eps="auto"), compiles=True),
    Peer("cce-torch", "CCE's torch.compile fallback", "all", partial(_build, impl="torch_compile"), compiles=True),
)
