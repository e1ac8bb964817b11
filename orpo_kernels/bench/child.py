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
from orpo_kernels.bench.peers.interface import Loss
from orpo_kernels.bench.problem import IGNORED, Inputs, Problem, make_inputs

# What trains: (hidden, weight).
MODES = {"evaluation": (False, False), "frozen": (True, False), "trained": (True, True)}


def measure(specification: dict[str, Any]) -> dict[str, Any]:
    """{"status": "ok", "samples", "gradient_bytes", "errors"} or {"status": "skipped", "reason"}.

    specification: problem, peer, mode, repeats, exact (a file of `exact.solve`, or None for no errors).
    """
    problem, mode, peer = Problem.of(specification["problem"]), specification["mode"], PEERS[specification["peer"]]
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
        forward, total, loss, logps = _step(loss_of, inputs, mode)
        samples.append({"forward_s": forward, "total_s": total, "peak_bytes": peak()})
    return {
        "status": "ok",
        "samples": samples,
        "gradient_bytes": sum(g.nbytes for g in (inputs.hidden.grad, inputs.weight.grad) if g is not None),
        "errors": None if specification["exact"] is None else _errors(specification["exact"], inputs, loss, logps),
    }


def _leaves(problem: Problem, mode: str) -> Inputs:
    inputs = make_inputs(problem)
    train_hidden, train_weight = MODES[mode]
    inputs.hidden.requires_grad_(train_hidden)
    inputs.weight.requires_grad_(train_weight)
    return inputs


def _step(loss_of: Loss, inputs: Inputs, mode: str) -> tuple[float, float, Tensor, Tensor | None]:
    """Seconds of the forward, of all; the loss and the log-probabilities."""
    clock = Clock(inputs.hidden.device)
    with torch.no_grad() if mode == "evaluation" else nullcontext():
        loss, logps = loss_of(inputs)
    forward = total = clock()
    if mode != "evaluation":
        loss.backward()
        total = clock()
    return forward, total, loss.detach(), None if logps is None else logps.detach()


def _errors(path: str, inputs: Inputs, loss: Tensor, logps: Tensor | None) -> dict[str, float | None]:
    """Against float64: the largest of a log-probability (nats); relative ones of the loss and of gradients."""
    right = torch.load(path, mmap=True)
    scored = (inputs.scored_targets != IGNORED).cpu()
    return {
        "logps": None if logps is None else (logps.cpu().double() - right["logps"])[scored].abs().max().item(),
        "loss": abs(loss.item() / right["loss"].item() - 1),
        **{
            f"{name}_gradient": None if leaf.grad is None else exact.relative_error(leaf.grad, right[name])
            for name, leaf in (("hidden", inputs.hidden), ("weight", inputs.weight))
        },
    }


if __name__ == "__main__":
    specification = json.loads(sys.argv[1])
    torch.set_num_threads(specification["threads"])
    print(json.dumps(measure(specification)))
