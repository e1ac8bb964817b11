"""What the Triton kernels compile to, card by card, without a card.

    python benchmarks/kernel_resources.py [--targets 90 gfx942] [--sweep] [--jobs 2]

Compiles every kernel as the launcher asks for it: the backend's own functions run on tensors without memory
(torch's "meta" device), with Triton told to compile for the target and not to launch. So dtypes, strides,
alignment and options are those of a real call, and what is read off the machine code is what will run:

    registers a thread (of 255; AMD: vector registers of 512)   stack and spill instructions, which should be none
    shared memory, and what the target has                      tensor-core instructions, without which bf16 crawls
    the widest load and store from global memory, in bits

Exit status 1 if a kernel spills, needs more shared memory than there is, or multiplies bf16 without tensor cores.
`--sweep` goes through every shape in `configs.candidates` instead of the default ones.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

# Triton reads it on import, and the interpreter compiles nothing.
os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from orpo_kernels.kernels import configs, triton_path
from orpo_kernels.kernels.configs import Target, TileConfig
from orpo_kernels.kernels.interface import Head, Tokens
from orpo_kernels.plan import Schedule

TARGETS = {
    name: configs.cuda_target(int(name)) if name.isdigit() else configs.hip_target(name)
    for name in ("80", "90", "100", "120", "gfx942")
}
# Llama 3's head, a small model's, and a handful of tokens: each kind of shape has its default tile.
PROBLEMS = ((1024, 4096, 128256), (1024, 576, 49152), (32, 4096, 128256))
TENSOR_CORE = re.compile(r"\b(HGMMA|HMMA|UTCHMMA|v_mfma)[\w.]*")
NVIDIA_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Work(NamedTuple):
    """One run of the backend's functions. full: with row indices, bias, scale and soft-cap; else with none."""

    target: Target
    config: TileConfig
    dtype: torch.dtype
    full: bool
    problem: tuple[int, int, int]


class Usage(NamedTuple):
    """What one compiled kernel uses. spills: instructions; shared: bytes; widest: bits of a load and a store."""

    registers: int
    stack: int
    spills: int
    shared: int
    tensor_core: str
    products: int
    widest: tuple[int, int]


class Compiled(NamedTuple):
    """A kernel of a run: its name and variant, and its use of the target."""

    work: Work
    kernel: str
    usage: Usage

    @property
    def faults(self) -> list[str]:
        multiplies = self.kernel.startswith(("tile", "slow"))
        found = {
            "spills": self.usage.spills > 0,
            "shared memory": self.usage.shared > self.work.target.shared_memory,
            "no tensor cores": multiplies and self.work.dtype == torch.bfloat16 and not self.usage.products,
        }
        return [fault for fault, is_so in found.items() if is_so]


def works(target: Target, sweep: bool) -> Iterator[Work]:
    """The runs that cover a target: every default tile, bf16 with and without what a head may have."""
    for dtype in (torch.bfloat16, torch.float32):
        if sweep:
            for config, full in itertools.product(configs.candidates(target, dtype), (False, True)):
                yield Work(target, config, dtype, full, PROBLEMS[0])
            continue
        seen = set()
        for tokens, hidden_size, vocab_size in PROBLEMS:
            config = configs.default(target, dtype, tokens, hidden_size)
            if config not in seen:
                seen.add(config)
                for full in (True,) if dtype == torch.float32 else (False, True):
                    yield Work(target, config, dtype, full, (tokens, hidden_size, vocab_size))


class _NoDriver:
    """Stands in for a card: tells Triton what to compile for."""

    def __init__(self, target: Target) -> None:
        self.target = GPUTarget(target.backend, target.arch, 64 if target.backend == "hip" else 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> tuple[str, int | str]:
        return self.target.backend, self.target.arch

    def get_current_stream(self, device: object) -> int:
        return 0


def compile_all(work: Work) -> list[Compiled]:
    """Every kernel that a forward with and without gradient and a weight gradient launch."""
    n, d, v = work.problem
    meta = partial(torch.empty, device="meta")
    rows = meta(n, dtype=torch.int64) if work.full else None
    tokens = Tokens(meta(n, d, dtype=work.dtype), rows, meta(n, dtype=torch.int64))
    bias = meta(v, dtype=work.dtype) if work.full else None
    head = Head(meta(v, d, dtype=work.dtype), bias, 0.5 if work.full else 1.0, 30.0 if work.full else None, work.dtype)
    schedule = Schedule(n, v, n, min(v, 16384), 0, 0, 0, 0.0, 0.0)
    wide = meta(n, dtype=torch.float32)

    launched: dict[str, Any] = {}
    run = triton.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: object, warmup: bool, **kwargs: Any) -> Any:
        name = self.fn.__name__
        epilogue = kwargs.get("EPILOGUE")
        if epilogue is not None:
            name += " " + EPILOGUES[epilogue.value] + ("" if name == "tile_kernel" or args[7] is not None else ", no tile")
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        launched[name] = compiled
        return compiled

    triton.JITFunction.run = compile_only
    driver.set_active(_NoDriver(work.target))
    try:
        for want_u in (False, True):
            triton_path.forward(tokens, head, schedule, want_u, config=work.config)
        triton_path.weight_gradient(
            tokens, head, wide, wide, None, schedule, True, work.full, config=work.config
        )
    finally:
        triton.JITFunction.run = run
    read = nvidia_usage if work.target.backend == "cuda" else amd_usage
    return [Compiled(work, name, read(kernel)) for name, kernel in launched.items()]


EPILOGUES = {0: "sums", 1: "exponentials", 2: "gradient", 3: "maxima"}


def nvidia_usage(kernel: Any) -> Usage:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        resources = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    return Usage(
        _largest(r"REG:(\d+)", resources),
        _largest(r"STACK:(\d+)", resources),
        len(re.findall(r"\b(?:STL|LDL)\b", code)),
        kernel.metadata.shared,
        *_products(code),
        (_width(code, r"\b(?:LDG|LDGSTS)\b[\w.]*?(?:\.(64|128|256))?\b[^.\w]"), _width(code, r"\bSTG\b[\w.]*")),
    )
