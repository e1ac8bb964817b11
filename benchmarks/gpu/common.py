"""What the stages share: inputs, the judge in float64, timing, and a record that is written as it grows."""

from __future__ import annotations

import functools
import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orpo_kernels.kernels.interface import Head, Tokens

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
BF16, FP32 = torch.bfloat16, torch.float32
# Entries of the vocabulary that the judge widens at a time.
_WIDENED = 16384


class Sizes(NamedTuple):
    n: int
    d: int
    v: int


# Qwen3-8B's head and 8192 scored tokens; without a card, something that the interpreter gets through.
HEADLINE = Sizes(8192, 4096, 151936) if CUDA else Sizes(48, 64, 300)


class Record:
    """The sections of a stage: each guarded, none begun past the limit, all written after each one."""

    def __init__(self, stage: str, file: Path, seconds: float) -> None:
        self.stage, self.file, self.limit = stage, file, seconds
        self.begun = time.monotonic()
        self.sections: dict[str, Any] = {}
        self.failed = False

    def used(self) -> float:
        return time.monotonic() - self.begun

    def section(self, name: str, function: Callable[[], Any]) -> Any:
        """Runs one; what it returns is recorded. A failure is recorded and printed, and the next one goes on."""
        if self.used() > self.limit:
            self.sections[name] = {"skipped": f"{self.used():.0f} s of {self.limit:.0f} were used"}
            print(f"## {name}: skipped, {self.used():.0f} s used", flush=True)
            return None
        begun, result, error = time.monotonic(), None, None
        try:
            result = function()
        except Exception as caught:
            error = f"{type(caught).__name__}: {str(caught)[:800]}"
            self.failed = True
            print(f"!! {name}: {error}\n{traceback.format_exc()[-1500:]}", flush=True)
        gc.collect()
        seconds = time.monotonic() - begun
        self.sections[name] = {"seconds": round(seconds, 2), "error": error, "result": result}
        print(f"## {name}: {'FAILED' if error else 'ok'} after {seconds:.1f} s, {self.used():.0f} s in all", flush=True)
        self.write()
        if CUDA and error is None:
            torch.cuda.empty_cache()
        return result

    def write(self) -> None:
        """Adds this stage to the file, beside what other stages left there."""
        found = json.loads(self.file.read_text(encoding="utf-8")) if self.file.exists() else {}
        found[self.stage] = {"seconds": round(self.used(), 1), "sections": self.sections}
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps(found, indent=1, default=str) + "\n", encoding="utf-8")
        partial.replace(self.file)


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


# Products of 8192 x 8192 matrices, about 20 ms of an H100's time, that run while the host queues a call: as a model's
# would, and at a model's power.
_LEAD = 14


def milliseconds(function: Callable[[], Any], repeats: int = 5, warm: int = 2, *, queued: bool = False) -> float:
    """The median of device times of a call, which begins on an idle device.

    queued: the host is ahead by then, as it is in a training step, where the model's kernels are still running.
    """
    for _ in range(warm if CUDA else 1):
        function()
    synchronize()
    times = []
    for _ in range(repeats if CUDA else 1):
        if CUDA:
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            for _ in range(_LEAD if queued else 0):
                torch.mm(_square(), _square())
            first.record()
            function()
            last.record()
            last.synchronize()
            times.append(first.elapsed_time(last))
        else:
            begun = time.perf_counter()
            function()
            times.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(times)


@functools.cache
def _square() -> Tensor:
    return torch.randn(8192, 8192, device=DEVICE).to(BF16)


def teraflops(operations: float, ms: float) -> float:
    return operations / ms / 1e9


def make(
    sizes: tuple[int, int, int],
    dtype: torch.dtype = BF16,
    *,
    spread: float = 3.0,
    bias: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
    rows: bool = False,
    integers: bool = False,
    seed: int | None = None,
) -> tuple[Tokens, Head]:
    """Random tokens and a head whose logits have a standard deviation of `spread` before scale and cap.

    integers: operands are whole numbers in [-8, 8], of which 512 products add up exactly in any order.
    """
    n, d, v = sizes
    random = torch.Generator(DEVICE).manual_seed(time.time_ns() % 2**31 if seed is None else seed)

    def normal(rows: int, deviation: float) -> Tensor:
        if integers:
            return torch.randint(-8, 9, (rows, d), generator=random, device=DEVICE).to(dtype)
        out = torch.empty(rows, d, dtype=dtype, device=DEVICE)
        for part in out.split(_WIDENED):
            part.copy_(torch.randn(part.shape, generator=random, device=DEVICE).mul_(deviation))
        return out

    available = n // 2 + 1 if rows else n
    hidden, weight = normal(available, 1.0), normal(v, spread / d**0.5)
    index = torch.randint(available, (n,), generator=random, device=DEVICE) if rows else None
    y = torch.randint(v, (n,), generator=random, device=DEVICE)
    own = torch.randn(v, generator=random, device=DEVICE).to(dtype) if bias else None
    return Tokens(hidden, index, y), Head(weight, own, scale, softcap, dtype)


class Truth(NamedTuple):
    """In float64, of the picked tokens: log-odds, L [P], u [P, D], g = (onehot - q) f' [P, V], hidden [P, D]."""

    log_odds: Tensor
    lse: Tensor
    u: Tensor
    g: Tensor
    hidden: Tensor


def truth(tokens: Tokens, head: Head, pick: Tensor) -> Truth:
    hidden = (tokens.hidden if tokens.rows is None else tokens.hidden[tokens.rows])[pick].double()
    y = tokens.targets[pick][:, None]
    parts = list(head.weight.split(_WIDENED))
    x = torch.cat([hidden @ part.double().T for part in parts], 1)
    if head.bias is not None:
        x += head.bias.double()
    x *= head.logit_scale
    slope = torch.full_like(x, head.logit_scale)
    if head.softcap is not None:
        slope /= torch.cosh(x / head.softcap).square()
        x = head.softcap * torch.tanh(x / head.softcap)
    others = x.scatter(1, y, -torch.inf)
    lse = torch.logsumexp(others, 1)
    g = -torch.exp(others - lse[:, None]) * slope
    g.scatter_(1, y, slope.gather(1, y))
    u = torch.zeros_like(hidden)
    for g_part, w_part in zip(g.split(_WIDENED, 1), parts, strict=True):
        u += g_part @ w_part.double()
    return Truth(x.gather(1, y)[:, 0] - lse, lse, u, g, hidden)


def relative(got: Tensor, want: Tensor) -> float:
    """Norm-wise relative error."""
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-300))
