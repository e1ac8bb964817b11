"""TRL's fused head (`trl.kernels`, what `add_fused_lm_head` puts into its trainers) under our objective.

Triton epilogues on a GPU, torch's on a CPU. TRL hands it the scored rows on a GPU and every position elsewhere;
here it gets the scored ones everywhere.
"""

from __future__ import annotations

from orpo_kernels.bench.peers.interface import STATISTICS, Loss, Peer, from_token_logps
from orpo_kernels.bench.problem import Problem

# What its trainers pass: entries of the vocabulary in a tile of at most 4,096 tokens.
_CHUNK = 32768


def _build(problem: Problem) -> Loss:
    from trl.kernels import ChunkedLogProbFunction

    statistics = STATISTICS if problem.statistics else ()
    return from_token_logps(
        lambda hidden, weight, targets: [
            x
            for x in ChunkedLogProbFunction.apply(
                hidden, weight, None, targets, 1.0, _CHUNK, problem.softcap, 1.0, statistics
            )
            if x is not None
        ]
    )


PEERS = (Peer("trl-fused", "TRL fused head", "a chunk", _build, statistics=True),)
