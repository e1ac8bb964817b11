"""Time and peak memory of one call."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch

_LINUX = sys.platform == "linux"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """Seconds since it was made, the device's work included."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        synchronize(device)
        self._start = time.perf_counter()

    def __call__(self) -> float:
        synchronize(self._device)
        return time.perf_counter() - self._start


def watch_memory(device: torch.device) -> Callable[[], int | None]:
    """Returns a function that says by how many bytes memory has grown since, at its peak, and ends the watch.

    A GPU's allocator knows its peak, and Linux that of a resident set. Elsewhere a thread reads the resident set
    every millisecond; None where psutil, which reads it, is not installed. Memory that has been freed goes back to
    the system first, so that it counts when it is used again.
    """
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        return lambda: torch.cuda.max_memory_allocated(device) - start
    if not _LINUX:
        return _Sampled() if find_spec("psutil") is not None else lambda: None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # the GNU library's
    if trim is not None:
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    start = _resident("VmRSS")
    return lambda: max(0, _resident("VmHWM") - start)


def _resident(field: str) -> int:
    """VmRSS, or VmHWM, its peak: bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


class _Sampled:
    """The growth of the resident set, at its highest, from here to the call."""

    def __init__(self) -> None:
        import psutil

        self._read = lambda: psutil.Process().memory_info().rss
        self._start = self._highest = self._read()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._stop.wait(1e-3):
            self._highest = max(self._highest, self._read())

    def __call__(self) -> int:
        self._stop.set()
        self._thread.join()
        return max(self._highest, self._read()) - self._start
