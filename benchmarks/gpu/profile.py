"""Stage `profile`: where the time of a whole forward and backward goes, and other sizes than the headline's.

A call's device time is that of its kernels and of the gaps between them; a host that launches more slowly than the
device works shows as gaps.
"""

from __future__ import annotations

import cProfile
import pstats
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import warm
from benchmarks.gpu.common import BF16, CUDA, HEADLINE, Record, milliseconds, synchronize
from benchmarks.gpu.smoke import WAYS, step_of, whole
from orpo_kernels.estimate import MODELS


def kernels() -> dict[str, Any]:
    """Milliseconds and calls of each device kernel of a call, and the gaps between them."""
    from torch.profiler import ProfilerActivity, profile

    found: dict[str, Any] = {}
    for name in list(WAYS)[1:] if CUDA else []:
        step, _ = step_of(HEADLINE, *WAYS[name])
        ms, queued = milliseconds(step, 3), milliseconds(step, 3, queued=True)
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            step()
            synchronize()
        rows = sorted(
            ((e.key[:80], e.count, e.self_device_time_total / 1e3) for e in profiler.key_averages()),
            key=lambda row: -row[2],
        )
        rows = [row for row in rows if row[2] > 0]
        busy = sum(row[2] for row in rows)
        found[name] = {"ms": ms, "queued_ms": queued, "busy_ms": busy, "gaps_ms": ms - busy, "kernels": rows[:20]}
        print(f"   {name}: {ms:.2f} ms, queued {queued:.2f}, {busy:.2f} in kernels", flush=True)
        for key, calls, total in rows[:10]:
            print(f"      {total:8.3f} ms {calls:5d} x {key}", flush=True)
    return found


def host() -> dict[str, Any]:
    """Where the host's time goes: the functions that most of a call's is spent in, themselves."""
    found: dict[str, Any] = {}
    for name in list(WAYS)[1:3]:
        step, _ = step_of(HEADLINE, *WAYS[name])
        step()
        synchronize()
        profiler = cProfile.Profile()
        # A backward runs in the thread that asks for it, where the profiler sees it.
        with torch.autograd.set_multithreading_enabled(False):
            begun = time.perf_counter()
            step()
            alone = 1e3 * (time.perf_counter() - begun)
            synchronize()
            profiler.runcall(step)
        synchronize()
        stats: dict[Any, Any] = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
        rows = sorted(
            ((f"{Path(key[0]).name}:{key[1]} {key[2]}", calls, 1e3 * own, 1e3 * total)
             for key, (_, calls, own, total, _) in stats.items()),
            key=lambda row: -row[2],
        )  # fmt: skip
        found[name] = {"ms": alone, "functions": rows[:40]}
        print(
            f"   {name}: {alone:.2f} ms on the host; calls, ms of its own, ms in all, under the profiler:", flush=True
        )
        for key, calls, own, total in rows[:25]:
            print(f"      {calls:6d} {own:8.3f} {total:8.3f}  {key}", flush=True)
    return found


def heads() -> dict[str, Any]:
    """Whole calls on popular models' heads, 4096 scored tokens; the schedule's choices, tried."""
    found = {}
    for name, head in MODELS.items() if CUDA else []:
        if head.softcap is None:
            print(f"   {name}", flush=True)
            found[name] = whole((4096, head.hidden_size, head.vocab_size))
    return found


def budgets() -> dict[str, Any]:
    """Frozen and trained by scratch budget: what more memory buys."""
    from orpo_kernels.plan import MIB, Plan

    found = {}
    for mib in (96, 192, 384, 768, 1536) if CUDA else (4,):
        for name, trains in (("frozen", False), ("trained", True)):
            step, _ = step_of(HEADLINE, True, trains, Plan(scratch_bytes=mib * MIB))
            found[f"{name} {mib} MiB"] = milliseconds(step, 3, 1)
            print(f"   {name} {mib} MiB: {found[f'{name} {mib} MiB']:.2f} ms", flush=True)
            del step, _
            if CUDA:
                torch.cuda.empty_cache()
    return found


def run(record: Record) -> None:
    sizes = {head.hidden_size for head in MODELS.values()} | {HEADLINE.d}
    record.section("compile", lambda: warm.warm([warm.Job(d, None, BF16) for d in sorted(sizes)]))
    record.section("kernels", kernels)
    record.section("host", host)
    record.section("budgets", budgets)
    record.section("heads", heads)
