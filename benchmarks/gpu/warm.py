"""Compiles kernels in several processes ahead of their first launch: Triton's cache on disk has them for the stages.

Triton compiles a kernel on one core, two to six seconds each, and time on a card is counted in seconds. A job is a run
of the backend's functions on few tokens and entries, with the operands' dtype, D and tile shape of the real one: what
a kernel is specialised for.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.common import BF16, CUDA, make
from orpo_kernels.kernels import triton_launch, triton_path
from orpo_kernels.kernels.configs import TileConfig
from orpo_kernels.kernels.interface import Head, Tokens
from orpo_kernels.plan import Schedule


class Job(NamedTuple):
    """d: the hidden size. options: of `common.make`. config: None for the default one.

    alone: the tile kernel, without what a whole forward launches beside it; needs a config.
    """

    d: int
    config: TileConfig | None
    dtype: torch.dtype = BF16
    options: tuple[tuple[str, Any], ...] = ()
    keep: int = 0
    alone: bool = False


def run(job: Job) -> str | None:
    """The error, if any."""
    tokens, head = make((512, job.d, 1024), job.dtype, seed=1, **dict(job.options))
    schedule = Schedule(512, 1024, 512, 1024, job.keep, 0, 0, 0.0, 0.0)
    try:
        if job.alone:
            assert job.config is not None
            tiles_alone(tokens, head, job.config)
            torch.cuda.synchronize()
            return None
        triton_path.forward(tokens, head, schedule, False, config=job.config)
        out = triton_path.forward(tokens, head, schedule, True, config=job.config)
        triton_path.weight_gradient(
            tokens, head, torch.ones_like(out.log_odds), out.lse, out.kept, schedule, True, head.bias is not None,
            config=job.config,
        )  # fmt: skip
        torch.cuda.synchronize()
    except Exception as error:  # what the compiler refuses is a finding too
        return f"{type(error).__name__}: {str(error)[:300]}"
    return None


def tiles_alone(tokens: Tokens, head: Head, config: TileConfig) -> None:
    launch = triton_launch.Launcher(head, config)
    h, y = tokens.hidden, tokens.targets
    base = launch.targets(h, None, y)[2]
    tile = triton_launch.tile_buffer(len(y), len(head.weight), head.compute_dtype, h.device, config)
    for out in (None, tile):
        launch.sums(h, None, y, base, out)
    launch.gradient(h, y, base, base, tile, None)


def warm(jobs: list[Job]) -> dict[str, Any]:
    """Seconds, and the jobs that failed with their errors. Nothing to do without a card."""
    begun = time.monotonic()
    if not CUDA:
        return {"jobs": len(jobs), "seconds": 0.0, "failed": {}}
    workers = max(1, min(len(jobs), (os.cpu_count() or 2) - 2))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        errors = list(pool.map(run, jobs))
    failed = {str(job): error for job, error in zip(jobs, errors, strict=True) if error}
    for job, error in failed.items():
        print(f"   {job}: {error}", flush=True)
    return {"jobs": len(jobs), "seconds": time.monotonic() - begun, "failed": failed}
