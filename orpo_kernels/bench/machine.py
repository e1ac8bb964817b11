"""What a result was measured on and with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from orpo_kernels import __version__

_PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "trl", "liger-kernel", "cut-cross-entropy")


def describe(device: str, threads: int) -> dict[str, Any]:
    """name of the processor that computes, and what belongs to it."""
    found: dict[str, Any] = {"device": device, "cpu": _cpu_name(), "threads": threads, "system": platform.platform()}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if torch.device(device).type != "cuda":
        name = f"{found['cpu']}, {threads} thread{'s' * (threads > 1)}"
        return {"name": name if device == "cpu" else f"{name}, {device}", **found}
    card = torch.cuda.get_device_properties(device)
    return {
        "name": card.name,
        **found,
        "card_memory_bytes": card.total_memory,
        "capability": f"{card.major}.{card.minor}",
        "cuda": torch.version.cuda or torch.version.hip,
    }


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"orpo_kernels": __version__, "python": platform.python_version()}
    return found | {package: installed_version(package) for package in _PACKAGES}


def installed_version(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
