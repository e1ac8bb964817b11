"""Stage `race`: every peer that is installed, on one problem in one process, with frozen and with trained head.

The problem is the headline's: 8192 scored tokens of 4 rows, D = 4096, V = 151936, bf16. Times are medians of device
times of forward and backward; peaks are above the inputs, gradients included; errors are the largest of a
log-probability against float64 at 64 tokens. Peers that compile come last: what the limit cuts off is theirs.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks.gpu.common import CUDA, DEVICE, HEADLINE, Record, milliseconds, synchronize, truth
from orpo_kernels.bench import child
from orpo_kernels.bench.peers import PEERS, Peer, Unavailable
from orpo_kernels.bench.problem import Inputs, Problem
from orpo_kernels.kernels.interface import Head, Tokens
from orpo_kernels.plan import MIB


def problem() -> Problem:
    return Problem(
        pairs=2, length=HEADLINE.n // 4, hidden_size=HEADLINE.d, vocab_size=HEADLINE.v, dtype="bfloat16",
        device=DEVICE.type, ignored=0.0,
    )  # fmt: skip


def right_logps(inputs: Inputs, pick: torch.Tensor) -> torch.Tensor:
    """In float64, of the picked positions."""
    hidden, targets = inputs.hidden.detach().flatten(0, 1), inputs.scored_targets.flatten()
    head = Head(inputs.weight.detach(), None, 1.0, inputs.softcap, inputs.weight.dtype)
    return torch.nn.functional.logsigmoid(truth(Tokens(hidden, None, targets), head, pick).log_odds)


def measure(peer: Peer, mode: str, right: torch.Tensor, pick: torch.Tensor) -> dict[str, Any]:
    try:
        loss_of = peer.build(problem())
    except Unavailable as error:
        return {"skipped": str(error)}
    except ImportError as error:
        return {"skipped": f"not installed: {error.name or error}"}
    inputs = child._leaves(problem(), mode)
    found: dict[str, Any] = {}

    def step() -> None:
        inputs.hidden.grad = inputs.weight.grad = None
        loss, logps, _ = loss_of(inputs)
        loss.backward()
        found["logps"] = None if logps is None else logps.detach().flatten()[pick]

    try:
        found["ms"] = milliseconds(step, 5, 2)
        if CUDA:
            inputs.hidden.grad = inputs.weight.grad = None
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step()
            synchronize()
            found["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    except Exception as error:  # a peer that fails, or lacks a package, is a finding; the others go on
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    logps = found.pop("logps")
    found["logps_error"] = None if logps is None else float((logps.double() - right).abs().max())
    return found


def race(mode: str, compiling: bool) -> dict[str, Any]:
    inputs = child._leaves(problem(), "evaluation")
    pick = torch.arange(0, HEADLINE.n, max(1, HEADLINE.n // 64), device=DEVICE)
    right = right_logps(inputs, pick)
    del inputs
    found = {}
    for name, peer in PEERS.items():
        if ((peer.compiles and not name.startswith("cce")) or name == "cce-torch") != compiling:
            continue
        if CUDA and name == "ours-12mib":  # the budget of a CPU: hundreds of chunks
            continue
        found[name] = measure(peer, mode, right, pick)
        if CUDA:
            torch.cuda.empty_cache()
        row = found[name]
        if "ms" in row:
            error = row["logps_error"]
            print(
                f"   {mode:<8}{peer.label:<34}{row['ms']:9.2f} ms {row.get('peak_bytes', 0) / MIB:10,.0f} MiB"
                + ("" if error is None else f"  log-probs {error:.1e}"),
                flush=True,
            )
        else:
            print(f"   {mode:<8}{peer.label:<34}{row.get('skipped') or row.get('error')}", flush=True)
    return found


def run(record: Record) -> None:
    for compiling in (False, True):
        for mode in ("frozen", "trained"):
            record.section(f"{mode}{', compiled' if compiling else ''}", partial(race, mode, compiling))
