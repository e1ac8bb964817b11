"""Times every tile shape that fits this card, with real launches, beside the one that the launcher would take.

    python benchmarks/tune.py [--minutes 3] [--output tune.json]

The shapes are those of `kernels.configs.candidates`: never one beyond the card's shared memory. Three passes for
each of a few heads: sums (evaluation), exponentials (forward with gradient, its product with W included) and the
gradient of W (likewise). Without a GPU it rehearses itself: tiny sizes in Triton's interpreter, whose times mean
nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    # Triton reads it on import.
    os.environ["TRITON_INTERPRET"] = "1"

from triton.runtime.errors import OutOfResources, PTXASError

from orpo_kernels.bench import machine
from orpo_kernels.bench.meter import Clock
from orpo_kernels.bench.problem import IGNORED, Problem, make_inputs
from orpo_kernels.kernels import configs, triton_path
from orpo_kernels.kernels.configs import TileConfig
from orpo_kernels.kernels.interface import Head, Tokens
from orpo_kernels.plan import Plan

# A large head, a small one, one with a soft-cap, and few tokens.
PROBLEMS = {
    "llama-3-8b": Problem(pairs=2, length=1024, hidden_size=4096, vocab_size=128256, dtype="bfloat16"),
    "smollm2-135m": Problem(pairs=4, length=1024, hidden_size=576, vocab_size=49152, dtype="bfloat16"),
    "gemma-2-2b": Problem(pairs=1, length=1024, hidden_size=2304, vocab_size=256000, softcap=30.0, dtype="bfloat16"),
    "few tokens": Problem(pairs=1, length=32, hidden_size=4096, vocab_size=128256, dtype="bfloat16"),
}
TINY = {"tiny": Problem(pairs=1, length=16, hidden_size=32, vocab_size=160, dtype="float32")}


def passes(problem: Problem) -> Iterator[tuple[str, Callable[[TileConfig], Any], TileConfig]]:
    """Name, function of a tile shape, and the shape that it takes by default."""
    inputs = make_inputs(problem)
    flat = inputs.scored_targets.flatten()
    rows = (flat != IGNORED).nonzero().squeeze(1)
    tokens = Tokens(inputs.hidden.flatten(0, 1), rows, flat[rows])
    dtype, n, (v, d) = inputs.weight.dtype, len(rows), inputs.weight.shape
    head = Head(inputs.weight, None, 1.0, problem.softcap, dtype)
    schedule = Plan().schedule(
        n, d, v, dtype, problem.device, train_weight=True, softcap=problem.softcap is not None, full_rows=True
    )
    target = configs.target_of(inputs.weight.device)
    coefficient = torch.full((n,), 1.0 / n, device=inputs.weight.device)
    lse = triton_path.forward(tokens, head, schedule, False).lse
    heavy = problem.softcap is not None
    forward = configs.default(target, dtype, min(n, schedule.forward_chunk), d, heavy)
    backward = configs.default(target, dtype, min(n, schedule.backward_chunk), d, heavy)
    yield "sums", lambda c: triton_path.forward(tokens, head, schedule, False, config=c), forward
    yield "exponentials", lambda c: triton_path.forward(tokens, head, schedule, True, config=c), forward
    yield (
        "gradient of W",
        lambda c: triton_path.weight_gradient(tokens, head, coefficient, lse, None, schedule, True, False, config=c),
        backward,
    )


def seconds(function: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """The median, after one call that compiles."""
    function()
    found = []
    for _ in range(repeats):
        clock = Clock(device)
        function()
        found.append(clock())
    return statistics.median(found)


def tune(problems: dict[str, Problem], device: torch.device, minutes: float, repeats: int) -> list[dict[str, Any]]:
    """Rows of problem, pass, config, default (is it?), seconds, reason."""
    stop = time.monotonic() + 60 * minutes
    target = configs.target_of(device)
    rows = []
    for name, problem in problems.items():
        fitting = [configs.INTERPRETER] if target is None else configs.candidates(target, getattr(torch, problem.dtype))
        for what, function, default in passes(problem):
            for config in fitting:
                row: dict[str, Any] = {"problem": name, "pass": what, "config": config._asdict()}
                row |= {"default": config == default, "seconds": None, "reason": None}
                if time.monotonic() > stop:
                    row["reason"] = f"the limit of {minutes:g} minutes came first"
                else:
                    try:
                        row["seconds"] = seconds(partial(function, config), device, repeats)
                    except (OutOfResources, PTXASError) as error:
                        row["reason"] = str(error).splitlines()[0]
                rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'problem':<14}{'pass':<15}{'default ms':>11}{'best ms':>9}{'gain':>7}  best shape"]
    for name, what in dict.fromkeys((row["problem"], row["pass"]) for row in rows):
        timed = [r for r in rows if (r["problem"], r["pass"]) == (name, what) and r["seconds"] is not None]
        if not timed:
            lines.append(f"{name:<14}{what:<15}not timed")
            continue
        best = min(timed, key=lambda row: row["seconds"])
        default = next((row["seconds"] for row in timed if row["default"]), None)
        before, gain = (
            ("-", "") if default is None else (f"{1e3 * default:.2f}", f"{default / best['seconds'] - 1:.0%}")
        )
        shape = "x".join(str(best["config"][f"block_{size}"]) for size in "cvd")
        lines.append(
            f"{name:<14}{what:<15}{before:>11}{1e3 * best['seconds']:>9.2f}{gain:>7}  {shape}, "
            f"{best['config']['num_warps']} warps, {best['config']['num_stages']} stages"
        )
    refused = {row["reason"] for row in rows if row["reason"]}
    return "\n".join([*lines, *(f"not timed: {reason}" for reason in sorted(refused))])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0, help="start nothing after this (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="a .json file to write")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    problems = TINY if device.type == "cpu" else PROBLEMS
    problems = {name: Problem.of({**problem.as_dict(), "device": device.type}) for name, problem in problems.items()}
    rows = tune(problems, device, args.minutes, args.repeats)
    print(table(rows))
    if args.output:
        result = {
            "machine": machine.describe(device.type, torch.get_num_threads()),
            "versions": machine.versions(),
            "problems": {name: asdict(problem) for name, problem in problems.items()},
            "rehearsal": device.type == "cpu",
            "rows": rows,
        }
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
