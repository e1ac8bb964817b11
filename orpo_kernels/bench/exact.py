"""The judge: loss, log-probabilities and gradients of a problem in float64, from the same rounded inputs.

It shares no code with the package: log-softmax over chunks of full rows, the odds ratio as TRL writes it, and
the gradient of logits `c (onehot - softmax) f'` with `c` from autograd on the log-probabilities.

    python -m orpo_kernels.bench.exact SPECIFICATION FILE     (used by the runner)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from orpo_kernels.bench.peers.full_logits import trl_objective
from orpo_kernels.bench.peers.interface import STATISTICS
from orpo_kernels.bench.problem import IGNORED, Inputs, Problem, make_inputs

_CHUNK_BYTES = 256 << 20


def solve(inputs: Inputs, *, with_weight: bool) -> dict[str, Tensor]:
    """loss [], logps and statistics [2B, T], hidden [2B, T, D] and, `with_weight`, weight [V, D]: values and gradients
    in float64."""
    union = inputs.scored_targets
    places = (union.flatten() != IGNORED).nonzero().squeeze(1)
    hidden = inputs.hidden.flatten(0, 1)[places].double()  # [N, D]
    weight, targets = inputs.weight.double(), union.flatten()[places]
    step = max(1, _CHUNK_BYTES // (8 * len(weight)))
    chunks = [slice(start, start + step) for start in range(0, len(places), step)]

    parts = [_of_tokens(_logits(hidden[c], weight, inputs.softcap)[0], targets[c]) for c in chunks]
    found = {
        name: torch.zeros(union.numel(), dtype=torch.float64, device=union.device)
        .index_copy(0, places, torch.cat([part[name] for part in parts]))
        .view(union.shape)
        for name in ("logps", *STATISTICS)
    }
    logps = found["logps"].requires_grad_()
    loss = trl_objective(logps, inputs.targets, inputs.nll_targets, inputs.beta)
    (coefficient,) = torch.autograd.grad(loss, logps)
    coefficient = coefficient.flatten()[places]

    d_hidden = torch.zeros_like(inputs.hidden, dtype=torch.float64).flatten(0, 1)
    d_weight = torch.zeros_like(weight) if with_weight else None
    for c in chunks:
        logits, slope = _logits(hidden[c], weight, inputs.softcap)
        gradient = logits.softmax(-1).neg_()
        gradient.scatter_add_(-1, targets[c, None], torch.ones_like(gradient[:, :1]))
        gradient *= coefficient[c, None]
        if slope is not None:
            gradient *= slope
        d_hidden[places[c]] = gradient @ weight
        if d_weight is not None:
            d_weight.addmm_(gradient.t(), hidden[c])
    solution = found | {"loss": loss.detach(), "logps": logps.detach(), "hidden": d_hidden.view_as(inputs.hidden)}
    return solution if d_weight is None else {**solution, "weight": d_weight}


def _of_tokens(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Log-probabilities and statistics [C], fp64."""
    logps = logits.log_softmax(-1)
    p = logps.exp()
    return {
        "logps": logps.gather(-1, targets[:, None]).squeeze(-1),
        "entropy": -(p * logps).sum(-1),
        "log_sum_sq_probs": p.square().sum(-1).log(),
        "mean_logits": logits.mean(-1),
        "is_top1": (logits.argmax(-1) == targets).double(),
    }


def _logits(hidden: Tensor, weight: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """Logits [C, V] and their slope f' (None for 1)."""
    logits = F.linear(hidden, weight)
    if softcap is None:
        return logits, None
    bent = torch.tanh(logits / softcap)
    return softcap * bent, 1.0 - bent.square()


def relative_error(found: Tensor, exact: Tensor, rows: int = 4096) -> float:
    """|found - exact| / |exact| in the Euclidean norm; a block of rows at a time, as `exact` may be a large file."""
    found, exact = found.flatten(0, -2), exact.flatten(0, -2)
    off = size = 0.0
    for start in range(0, len(found), rows):
        part = exact[start : start + rows].to(found.device)
        off += (found[start : start + rows].double() - part).square().sum().item()
        size += part.square().sum().item()
    return (off / size) ** 0.5


if __name__ == "__main__":
    specification = json.loads(sys.argv[1])
    torch.set_num_threads(specification["threads"])
    problem = Problem.of(specification["problem"])
    solution = solve(make_inputs(problem), with_weight=specification["with_weight"])
    torch.save({name: tensor.cpu() for name, tensor in solution.items()}, Path(sys.argv[2]))
