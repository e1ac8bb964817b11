"""One measurement: a peer, a mode, some repeats. Its process ends with it, so nothing is left for the next.

    python -m orpo_kernels.bench.child SPECIFICATION     (used by the runner; prints a line of JSON)

Before the clock starts, everything has run once: at full size where that compiles or tunes kernels, else on a
small problem, which loads the same code. Each repeat starts without gradients.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from orpo_kernels.bench import exact
from orpo_kernels.bench.meter import Clock, watch_memory
from orpo_kernels.bench.peers import PEERS, Unavailable
from orpo_kernels.bench.peers.interface import STATISTICS, Found, Loss
from orpo_kernels.bench.problem import IGNORED, Inputs, Problem, make_inputs

# What trains: (hidden, weight).
MODES = {"evaluation": (False, False), "frozen": (True, False), "trained": (True, True)}


def measure(specification: dict[str, Any]) -> dict[str, Any]:
    """{"status": "ok", "samples", "gradient_bytes", "errors"} or {"status": "skipped", "reason"}.

    specification: problem, peer, mode, repeats, exact (a file of `exact.solve`, or None for no errors).
    """
    problem, mode, peer = Problem.of(specification["problem"]), specification["mode"], PEERS[specification["peer"]]
    if problem.statistics and not peer.statistics:
        return {"status": "skipped", "reason": "it gives no statistics"}
    try:
        loss_of = peer.build(problem)
    except Unavailable as error:
        return {"status": "skipped", "reason": str(error)}
    except ImportError as error:
        return {"status": "skipped", "reason": f"not installed: {error.name or error}"}
    device = torch.device(problem.device)
    inputs = _leaves(problem, mode)
    full_size = peer.compiles or device.type != "cpu"
    _step(loss_of, inputs if full_size else _leaves(problem.small(), mode), mode)

    samples = []
    for _ in range(specification["repeats"]):
        inputs.hidden.grad = inputs.weight.grad = None
        peak = watch_memory(device)
        forward, total, found = _step(loss_of, inputs, mode)
        samples.append({"forward_s": forward, "total_s": total, "peak_bytes": peak()})
    return {
        "status": "ok",
        "samples": samples,
        "gradient_bytes": sum(g.nbytes for g in (inputs.hidden.grad, inputs.weight.grad) if g is not None),
        "errors": None if specification["exact"] is None else _errors(specification["exact"], inputs, found),
    }


def _leaves(problem: Problem, mode: str) -> Inputs:
    inputs = make_inputs(problem)
    train_hidden, train_weight = MODES[mode]
    inputs.hidden.requires_grad_(train_hidden)
    inputs.weight.requires_grad_(train_weight)
    return inputs


def _step(loss_of: Loss, inputs: Inputs, mode: str) -> tuple[float, float, Found]:
    """Seconds of the forward, of all; and what was found."""
    clock = Clock(inputs.hidden.device)
    with torch.no_grad() if mode == "evaluation" else nullcontext():
        found = loss_of(inputs)
    forward = total = clock()
    if mode != "evaluation":
        found.loss.backward()
        total = clock()
    return forward, total, found


def _errors(path: str, inputs: Inputs, found: Found) -> dict[str, float | None]:
    """Against float64: the largest of a log-probability (nats) and of the statistics; relative ones of the loss and of
    gradients."""
    right = torch.load(path, mmap=True)
    scored = (inputs.scored_targets != IGNORED).cpu()

    def largest(x: Tensor, name: str) -> float:
        return (x.detach().cpu().double() - right[name])[scored].abs().max().item()

    statistics = None
    if found.statistics is not None:
        statistics = max(largest(x, name) for x, name in zip(found.statistics, STATISTICS, strict=True))
    return {
        "logps": None if found.logps is None else largest(found.logps, "logps"),
        "statistics": statistics,
        "loss": abs(found.loss.item() / right["loss"].item() - 1),
        **{
            f"{name}_gradient": None if leaf.grad is None else exact.relative_error(leaf.grad, right[name])
            for name, leaf in (("hidden", inputs.hidden), ("weight", inputs.weight))
        },
    }


if __name__ == "__main__":
    specification = json.loads(sys.argv[1])
    torch.set_num_threads(specification["threads"])
    print(json.dumps(measure(specification)))
