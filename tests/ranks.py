"""Runs a function in several real processes (gloo, on the CPU) and brings home what each one returns."""

from __future__ import annotations

import datetime
import functools
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Processes are forked from one that has imported what they need, which spares each of them seconds.
_PRELOADED = ["reference", "orpo_kernels.vocab_parallel", "orpo_kernels.kernels.triton_path"]


@functools.cache
def once_on_ranks(work: Callable[..., Any], ranks: int, *arguments: Any) -> list[Any] | str:
    """`run_on_ranks`, for several tests to look at: what failed, in words, will not be tried again."""
    try:
        return run_on_ranks(work, ranks, *arguments)
    except mp.ProcessRaisedException as error:
        return str(error)


def run_on_ranks(work: Callable[..., Any], ranks: int, *arguments: Any) -> list[Any]:
    """`work(*arguments)` on every rank of a process group; what they return, by rank.

    work: a module's function. Raises ProcessRaisedException with a rank's traceback where it failed.
    """
    multiprocessing.set_forkserver_preload(_PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_run, (ranks, folder, work, arguments), nprocs=ranks, start_method="forkserver")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def _run(rank: int, ranks: int, folder: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    # As torchrun has it: transformers and accelerate look here.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29551")
    timeout = datetime.timedelta(seconds=300)  # of a machine with more to do
    dist.init_process_group("gloo", f"file://{folder}/store", timeout=timeout, rank=rank, world_size=ranks)
    try:
        torch.save(work(*arguments), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()
