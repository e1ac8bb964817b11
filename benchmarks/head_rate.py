"""How much of the card's own matrix rate the loss reaches.

    python benchmarks/head_rate.py [--tokens 8192] [--hidden-size 4096] [--vocab-size 151936] [--dtype bfloat16]

First bare products of the same operands: the logits' shape, and that of the gradient of W, a few chunk heights,
the fastest counts. Then `linear_logps` on tokens that are all scored, forward and backward. Its share is

    units * 2 N D V / seconds / measured rate

with the units of its schedule (2 with a frozen head, 4 with one that trains, 3 with logit gradients kept).
Without a GPU, sizes shrink unless given: a rehearsal.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orpo_kernels import Plan, linear_logps
from orpo_kernels.bench import machine
from orpo_kernels.bench.meter import Clock, watch_memory
from orpo_kernels.bench.problem import Problem, make_inputs
from orpo_kernels.plan import MIB

SIZES = {"tokens": 8192, "hidden_size": 4096, "vocab_size": 151936}
SMALL = {"tokens": 64, "hidden_size": 64, "vocab_size": 1000}
WAYS = {
    "evaluation": (False, Plan()),
    "frozen head": (False, Plan()),
    "trained head": (True, Plan()),
    "trained head, kept": (True, Plan(keep_logit_grads=True)),
}
_CHUNKS = (1024, 2048, 4096, 8192)


def seconds(function: Callable[[], Any], device: torch.device, repeats: int) -> list[float]:
    """Of each call after two to warm up."""
    function()
    function()
    found = []
    for _ in range(repeats):
        clock = Clock(device)
        function()
        found.append(clock())
    return found


def matrix_rate(hidden: Tensor, weight: Tensor, repeats: int) -> dict[str, float]:
    """Operations a second of `hidden [C, D] @ weight.T [D, V]` and of `[V, C] @ [C, D]`, the best C of each."""
    found = {"logits": 0.0, "gradient": 0.0}
    for rows in sorted({min(chunk, len(hidden)) for chunk in _CHUNKS}):
        h = hidden[:rows]
        logits = torch.empty(rows, len(weight), dtype=h.dtype, device=h.device)
        d_weight = torch.empty_like(weight)
        operations = 2 * rows * weight.numel()
        for name, product in (
            ("logits", lambda h=h, out=logits: torch.mm(h, weight.t(), out=out)),
            ("gradient", lambda h=h, g=logits, out=d_weight: torch.mm(g.t(), h, out=out)),
        ):
            median = statistics.median(seconds(product, h.device, repeats))
            found[name] = max(found[name], operations / median)
    return found


def measure(problem: Problem, repeats: int) -> dict[str, Any]:
    """Rates in operations a second; for each of WAYS: samples, median, units, share, memory."""
    inputs = make_inputs(problem)
    device = inputs.hidden.device
    hidden, targets = inputs.hidden.flatten(0, 1), inputs.scored_targets.flatten()
    rates = matrix_rate(hidden, inputs.weight, repeats)
    best = max(rates.values())
    n, (v, d) = len(hidden), inputs.weight.shape
    upstream = torch.full((n,), -1.0 / n, device=device)
    ways = {}
    for name, (trains, plan) in WAYS.items():
        evaluation = name == "evaluation"
        leaves = [hidden.detach().requires_grad_(not evaluation), inputs.weight.detach().requires_grad_(trains)]

        def step(leaves: list[Tensor] = leaves, plan: Plan = plan, evaluation: bool = evaluation) -> None:
            leaves[0].grad = leaves[1].grad = None
            logps = linear_logps(leaves[0], leaves[1], targets, plan=plan)
            if not evaluation:
                logps.backward(upstream)

        samples = seconds(step, device, repeats)
        leaves[0].grad = leaves[1].grad = None
        peak = watch_memory(device)
        step()
        grown = peak()
        full_rows = device.type == "cuda"
        schedule = plan.schedule(
            n, d, v, hidden.dtype, device, train_hidden=not evaluation, train_weight=trains, full_rows=full_rows
        )
        units = schedule.units_forward + schedule.units_backward
        median = statistics.median(samples)
        results = sum(leaf.grad.nbytes for leaf in leaves if leaf.grad is not None)
        ways[name] = {
            "samples_s": samples,
            "median_s": median,
            "units": units,
            "share": units * 2 * n * d * v / median / best,
            "above_gradients_bytes": None if grown is None else grown - results,
            "planned_scratch_bytes": schedule.scratch_bytes,
            "planned_saved_bytes": schedule.saved_bytes,
        }
    return {"rates": rates, "ways": ways}


def table(result: dict[str, Any]) -> str:
    p, rates = result["problem"], result["rates"]
    lines = [
        f"N={p['tokens']}, D={p['hidden_size']}, V={p['vocab_size']}, {p['dtype']}; {result['machine']['name']}",
        f"bare products: {rates['logits'] / 1e12:.1f} TFLOP/s to the logits, {rates['gradient'] / 1e12:.1f} to the "
        "gradient of W",
        f"{'':<22}{'ms':>10}{'units':>8}{'share':>8}{'MiB above gradients':>21}",
    ]
    for name, way in result["ways"].items():
        above = way["above_gradients_bytes"]
        lines.append(
            f"{name:<22}{1e3 * way['median_s']:>10.2f}{way['units']:>8.2f}{way['share']:>8.0%}"
            f"{'-' if above is None else f'{above / MIB:,.0f}':>21}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in SIZES:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32", "float16"))
    parser.add_argument("--repeats", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="a .json file to write")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    defaults = SIZES if device == "cuda" else SMALL
    sizes = {name: getattr(args, name) or default for name, default in defaults.items()}
    if sizes["tokens"] % 2 or sizes["tokens"] < 4:
        parser.error(f"--tokens {sizes['tokens']}: use an even number of at least 4")
    problem = Problem(1, sizes["tokens"] // 2, sizes["hidden_size"], sizes["vocab_size"], args.dtype, device, ignored=0)
    result = {
        "command": sys.argv,
        "machine": machine.describe(device, torch.get_num_threads()),
        "versions": machine.versions(),
        "problem": {**sizes, "dtype": args.dtype},
        **measure(problem, args.repeats),
    }
    print(table(result))
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
