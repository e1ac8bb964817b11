"""Micro-benchmarks of the head: `pytest benchmarks --benchmark-only`; sizes by ORPO_BENCH_SIZES=N,D,V.

Small by default, so that they run in seconds on a CPU; on a GPU, give real ones. `--benchmark-compare` tells what
a change did.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from orpo_kernels import Plan, linear_logps
from orpo_kernels.bench.meter import synchronize
from orpo_kernels.plan import MIB

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
N, D, V = (int(size) for size in os.environ.get("ORPO_BENCH_SIZES", "128,128,4096").split(","))
PLANS = {"default": Plan(), "kept": Plan(keep_logit_grads=True), "4 MiB": Plan(scratch_bytes=4 * MIB)}


def run(benchmark: Any, function: Any) -> None:
    def call() -> None:
        function()
        synchronize(DEVICE)

    benchmark(call)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def tensors(request: pytest.FixtureRequest) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(N, D, device=DEVICE, dtype=request.param)
    weight = torch.randn(V, D, device=DEVICE, dtype=request.param) * D**-0.5
    return hidden, weight, torch.randint(V, (N,), device=DEVICE)


def test_evaluation(benchmark: Any, tensors: tuple[torch.Tensor, ...]) -> None:
    run(benchmark, lambda: linear_logps(*tensors))


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
def test_forward_and_backward(benchmark: Any, tensors: tuple[torch.Tensor, ...], trains: bool, plan: Plan) -> None:
    hidden, weight, targets = tensors
    hidden.requires_grad_()
    weight.requires_grad_(trains)

    def step() -> None:
        hidden.grad = weight.grad = None
        linear_logps(hidden, weight, targets, plan=plan).sum().backward()

    run(benchmark, step)


def test_repeated_rows(benchmark: Any, tensors: tuple[torch.Tensor, ...]) -> None:
    """Two targets for each row, whose gradients are summed."""
    hidden, weight, targets = tensors
    hidden.requires_grad_()
    rows = torch.arange(N, device=DEVICE) // 2

    def step() -> None:
        hidden.grad = None
        linear_logps(hidden, weight, targets, rows=rows).sum().backward()

    run(benchmark, step)
