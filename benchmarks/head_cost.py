"""Time and memory of the head and the loss on the CPU, against full logits.

    python benchmarks/head_cost.py [--rounds 5] [--dtype float32] [--shape B,T,D,V]

Each contestant runs in a process of its own, the processes in interleaved rounds; the time is the minimum over
rounds of forward + backward of a sum of log-probabilities over the scored tokens (a quarter ignored). Scratch is
the growth of the resident set from before the first call to its peak, less the bytes of outputs and gradients;
a small call comes first, so
that code and the libraries' own buffers are there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

CONTESTANTS = (
    "full logits, frozen",
    "ours, frozen",
    "ours, frozen, 12 MiB",
    "full logits, trained",
    "ours, trained",
    "ours, trained, 12 MiB",
    "ours, trained, kept",
)
MIB = 1 << 20


def resident(field: str) -> int:
    """VmRSS or VmHWM (its peak) of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: this benchmark needs Linux")


def measure(contestant: str, dtype_name: str, shape: tuple[int, ...]) -> dict[str, float]:
    import torch

    from orpo_kernels import Plan, linear_logps

    pairs, length, hidden_size, vocab_size = shape
    dtype = getattr(torch, dtype_name)
    torch.manual_seed(0)
    hidden = torch.randn(2 * pairs, length, hidden_size).to(dtype).requires_grad_()
    weight = (torch.randn(vocab_size, hidden_size) * 0.02).to(dtype).requires_grad_("trained" in contestant)
    targets = torch.randint(0, vocab_size, (2 * pairs, length))
    targets[torch.rand(targets.shape) < 0.25] = -100
    plan = Plan(scratch_bytes=12 * MIB if "12 MiB" in contestant else None, keep_logit_grads="kept" in contestant)

    def step(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> None:
        if contestant.startswith("full"):
            logits = (hidden @ weight.t()).float()
            logps = torch.log_softmax(logits, -1).gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
            total = (logps * (targets != -100)).sum()
        else:
            total = linear_logps(hidden, weight, targets, plan=plan).sum()
        total.backward()

    small = torch.randn(1, 8, 256).to(dtype).requires_grad_()
    small_weight = torch.randn(512, 256).to(dtype).requires_grad_(weight.requires_grad)
    step(small, small_weight, torch.arange(8)[None])
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    step(hidden, weight, targets)
    results = sum(t.grad.nbytes for t in (hidden, weight) if t.grad is not None) + targets.numel() * 4
    scratch = resident("VmHWM") - before - results
    best = float("inf")
    for _ in range(3):
        hidden.grad = weight.grad = None
        start = time.perf_counter()
        step(hidden, weight, targets)
        best = min(best, time.perf_counter() - start)
    return {"seconds": best, "scratch_bytes": scratch}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--shape", default="2,384,768,32768", help="pairs, length, hidden size, vocabulary size")
    parser.add_argument("--only", help="substring of the contestants to run")
    parser.add_argument("--one", choices=CONTESTANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape = tuple(int(size) for size in arguments.shape.split(","))
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.dtype, shape)))
        return
    names = [name for name in CONTESTANTS if not arguments.only or arguments.only in name]
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(arguments.rounds):
        for name in names:
            command = [sys.executable, __file__, "--one", name, "--dtype", arguments.dtype, "--shape", arguments.shape]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            runs[name].append(json.loads(output.splitlines()[-1]))
    print(f"{'':24}{'seconds (min)':>15}{'scratch MiB (max)':>20}")
    for name, results in runs.items():
        seconds = min(result["seconds"] for result in results)
        scratch = max(result["scratch_bytes"] for result in results) / MIB
        print(f"{name:24}{seconds:15.3f}{scratch:20.1f}")


if __name__ == "__main__":
    main()
