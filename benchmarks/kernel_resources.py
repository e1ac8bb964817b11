"""What the Triton kernels compile to, card by card, without a card.

    python -m benchmarks.kernel_resources [--targets 90 gfx942] [--brief | --sweep] [--jobs 2]

Compiles every kernel as the launcher asks for it: the backend's own functions run on tensors without memory
(torch's "meta" device), with Triton told to compile for the target and not to launch. So dtypes, strides,
alignment and options are those of a real call, and what is read off the machine code is what will run:

    registers a thread (of 255; AMD: vector registers of 512); stack and spills, of which there should be none
    shared memory, and how much of it the target has
    tensor-core instructions, without which bf16 crawls: on each target its own (_PRODUCTS), as older ones run too
    widths, in bits, of a load of operands and of a store to global memory
    instructions a warp runs for a logit after its tile's last product (`epilogue_length`)

Exit status 1 if a kernel spills, needs more shared memory than there is, multiplies bf16 by other instructions than
its target's, or moves bf16 operands or tiles in pieces below what the target allows: 128 bits, though 64 for AMD's
stores, whose compiler writes the 4 numbers that an accumulator holds in a row rather than exchange them first. The same
if a persistent kernel has loads or stores that are not the tensor memory unit's (UTMALDG, UTMASTG), or, on 90 in bf16
without bias and soft-cap, an epilogue of more instructions than _LONGEST.
Covered are the tiles that the launcher picks for a large head, a small one and few tokens, in bf16 and fp32;
`--brief` takes only the large head, with a bias, in bf16; `--sweep` every shape in `configs.candidates`.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

# Triton reads it on import, and the interpreter compiles nothing.
os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from benchmarks.epilogue_length import instructions_a_logit
from orpo_kernels.kernels import configs, triton_path
from orpo_kernels.kernels.configs import Target, TileConfig
from orpo_kernels.kernels.interface import Head, Tokens
from orpo_kernels.kernels.slow_lane import MAXIMA
from orpo_kernels.kernels.statistics import NO_STATISTICS, Statistics
from orpo_kernels.kernels.tile import EXPONENTIALS, GRADIENT, SUMS
from orpo_kernels.plan import Schedule

TARGETS = {
    name: configs.cuda_target(int(name)) if name.isdigit() else configs.hip_target(name)
    for name in ("80", "90", "100", "120", "gfx942")
}
# N, D and V of Llama 3's head, a small model's, and a handful of tokens.
PROBLEMS = ((1024, 4096, 128256), (1024, 576, 49152), (32, 4096, 128256))
# What a head may have, and the tokens' row indices: nothing; bias and scale; and a soft-cap as well.
HEADS = ("plain", "bias", "capped")
EPILOGUES = {
    SUMS.value: "sums",
    EXPONENTIALS.value: "exponentials",
    GRADIENT.value: "gradient",
    MAXIMA.value: "maxima",
}
# The matrix instruction of a target's own generation.
_PRODUCTS = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA", "gfx942": "v_mfma"}
_LOAD_BITS, _STORE_BITS = 128, {"cuda": 128, "hip": 64}
_LONGEST = {"tile sums": 7.0, "tile exponentials": 8.0, "tile gradient": 9.0}
_ALL_STATISTICS, _AND_STATISTICS = Statistics(True, True, True, True), ", stats"
NVIDIA_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Work(NamedTuple):
    """One run of the backend's functions, with one of PROBLEMS and of HEADS; config None for the defaults."""

    target: Target
    dtype: torch.dtype
    head: str
    problem: tuple[int, int, int]
    config: TileConfig | None = None


class Usage(NamedTuple):
    """What a compiled kernel uses. stack, shared: bytes.

    load: bits of the narrowest load that goes to shared memory, as operands do; of the widest where none does.
    store: bits of the widest store. copies: instructions of the tensor memory unit. epilogue: instructions a logit.
    """

    registers: int
    stack: int
    spills: int
    shared: int
    products: list[str]
    load: int
    store: int
    copies: set[str]
    epilogue: float | None = None


class Compiled(NamedTuple):
    """A kernel of a run, the shape of its tile and the options it was launched with, and what that takes."""

    work: Work
    kernel: str
    tile: str
    usage: Usage

    @property
    def faults(self) -> list[str]:
        """What makes this kernel unfit for its target."""
        target, usage, bf16 = self.work.target, self.usage, self.work.dtype == torch.bfloat16
        multiplies = self.kernel.startswith(("tile", "slow"))
        reads_rows = multiplies or self.kernel in ("target", "u")
        stores_rows = self.kernel.removesuffix(_AND_STATISTICS) in (
            "tile exponentials",
            "tile gradient",
            "slow exponentials",
            "u",
        )
        product = _PRODUCTS[target.arch]
        wanted = {"UTMALDG"} | ({"UTMASTG"} if stores_rows else set()) if "persistent" in self.tile else set()
        longest = _LONGEST.get(self.kernel) if target.arch == 90 and bf16 and self.work.head == "plain" else None
        found = {
            "spills": usage.spills or usage.stack,
            "shared memory": usage.shared > target.shared_memory,
            f"no {product}": bf16 and multiplies and product not in usage.products,
            "narrow loads": bf16 and reads_rows and usage.load < _LOAD_BITS,
            "narrow stores": bf16 and stores_rows and usage.store < _STORE_BITS[target.backend],
            f"no {' '.join(sorted(wanted))}": bool(wanted - usage.copies),
            "long epilogue": longest is not None and (usage.epilogue is None or usage.epilogue > longest),
        }
        return [fault for fault, is_so in found.items() if is_so]


def works(target: Target, extent: str) -> Iterator[Work]:
    """The runs of a target: its default tiles ("default"), those of one head ("brief"), or all ("sweep")."""
    large, small, few = PROBLEMS
    bf16, fp32 = torch.bfloat16, torch.float32
    if extent == "brief":
        yield Work(target, bf16, "bias", large)
    elif extent == "default":
        yield from (Work(target, bf16, head, large) for head in HEADS)
        yield from (Work(target, bf16, "capped", problem) for problem in (small, few))
        yield from (Work(target, fp32, "capped", problem) for problem in (large, few))
    else:
        for dtype, head in itertools.product((bf16, fp32), HEADS):
            for config in configs.candidates(target, dtype):
                yield Work(target, dtype, head, large, config)


class _NoCard:
    """Stands in for a driver: tells Triton what to compile for."""

    def __init__(self, target: Target) -> None:
        self.target = GPUTarget(target.backend, target.arch, 64 if target.backend == "hip" else 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> tuple[str, int | str]:
        return self.target.backend, self.target.arch

    def get_current_stream(self, device: object) -> int:
        return 0


def compile_kernels(work: Work) -> list[Compiled]:
    """Every kernel of forwards without and with gradient, of one with statistics, and of a weight gradient."""
    n, d, v = work.problem
    meta = functools.partial(torch.empty, device="meta")
    plain, capped = work.head == "plain", work.head == "capped"
    rows = None if plain else meta(n, dtype=torch.int64)
    bias = None if plain else meta(v, dtype=work.dtype)
    tokens = Tokens(meta(n, d, dtype=work.dtype), rows, meta(n, dtype=torch.int64))
    weight = meta(v, d, dtype=work.dtype)
    head = Head(weight, bias, 1.0 if plain else 0.5, 30.0 if capped else None, work.dtype)
    schedule = Schedule(n, v, n, min(v, 16384), 0, 0, 0, 0.0, 0.0)
    numbers = meta(n, dtype=torch.float32)

    launched: dict[tuple[str, str], Any] = {}
    run, target_of = triton.JITFunction.run, configs.target_of

    def compile_only(self: Any, *args: Any, grid: object, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        logits = kwargs.get("BC", 0) * kwargs.get("BV", 0) // (32 * kwargs.get("num_warps", 4))
        launched[_kernel_name(self, args, kwargs), _tile(kwargs)] = (compiled, logits)
        return compiled

    triton.JITFunction.run = compile_only
    configs.target_of = lambda device: work.target
    driver.set_active(_NoCard(work.target))
    try:
        # Statistics of tiles that are not stored take less than of those that are.
        for want_u, wanted in ((False, NO_STATISTICS), (True, NO_STATISTICS), (True, _ALL_STATISTICS)):
            triton_path.forward(tokens, head, schedule, want_u, wanted, config=work.config)
        triton_path.weight_gradient(tokens, head, numbers, numbers, None, schedule, True, True, config=work.config)
    finally:
        triton.JITFunction.run, configs.target_of = run, target_of
    return [Compiled(work, *what, _usage(work.target, *kernel)) for what, kernel in launched.items()]


def _kernel_name(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    name = kernel.fn.__name__.removesuffix("_kernel")
    if "EPILOGUE" not in kwargs:
        return name
    epilogue = EPILOGUES[kwargs["EPILOGUE"].value]
    stores = args[kernel.arg_names.index("p_tile")] is not None
    what = epilogue if stores or epilogue != "exponentials" else "sums"
    return f"{name} {what}" + (_AND_STATISTICS if kwargs["WANTED"] else "")


def _tile(launch: dict[str, Any]) -> str:
    shape = "x".join(str(launch[size]) for size in ("BC", "BV", "BD") if size in launch)
    stages = f" {launch['num_stages']}s" if "num_stages" in launch else ""
    return f"{shape} {launch.get('num_warps', 4)}w{stages}" + (" persistent" if launch.get("PROGRAMS") else "")


def _usage(target: Target, kernel: Any, logits: int) -> Usage:
    """logits: those of a thread in a tile."""
    return _nvidia_usage(kernel, logits) if target.backend == "cuda" else _amd_usage(kernel)


def _nvidia_usage(kernel: Any, logits: int) -> Usage:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        resources = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    return Usage(
        int(_first(r"REG:(\d+)", resources)),
        int(_first(r"STACK:(\d+)", resources)),
        len(re.findall(r"\b(?:STL|LDL)\b", code)),
        kernel.metadata.shared,
        re.findall(r"\b(HGMMA|HMMA|UTCHMMA|OMMA|QMMA)\b", code),
        min(_widths(r"\b(?:LDGSTS|UTMALDG)\.[\w.]*", code), default=0)
        or max(_widths(r"\bLDG\.[\w.]*", code), default=0),
        max(_widths(r"\b(?:STG|UTMASTG)\.[\w.]*", code), default=0),
        set(re.findall(r"\b(UTMALDG|UTMASTG)\b", code)),
        instructions_a_logit(code, logits),
    )


def _amd_usage(kernel: Any) -> Usage:
    code = kernel.asm["amdgcn"]
    return Usage(
        int(_first(r"\.vgpr_count:\s+(\d+)", code)),
        int(_first(r"\.private_segment_fixed_size:\s+(\d+)", code)),
        int(_first(r"\.vgpr_spill_count:\s+(\d+)", code)),
        kernel.metadata.shared,
        re.findall(r"\b(v_mfma)_", code),
        max(_widths(r"\b(?:buffer|global)_load_\w+", code), default=0),
        max(_widths(r"\b(?:buffer|global)_store_\w+", code), default=0),
        set(),
    )


def _widths(instruction: str, code: str) -> list[int]:
    """Bits of each access among instructions such as LDG.E.128 or buffer_load_dwordx4."""
    widths = []
    for found in re.findall(instruction, code):
        amd = re.search(r"dword(?:x(\d))?", found)
        nvidia = re.search(r"\.(64|128|256)\b", found)
        if found.startswith("UTMA"):
            widths.append(128)  # By the tensor memory unit, in its own pieces.
        else:
            widths.append(32 * int(amd[1] or 1) if amd else int(nvidia[1]) if nvidia else 32)
    return widths


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"nothing like {pattern} in the compiler's output: {text[:500]}")
    return found[1]


def _tool(name: str, *args: str) -> str:
    """Output of one of the CUDA tools that come with Triton."""
    return subprocess.run([NVIDIA_BIN / name, *args], check=True, capture_output=True, text=True).stdout


def line(compiled: Compiled) -> str:
    work, usage = compiled.work, compiled.usage
    dtype = {torch.bfloat16: "bf16", torch.float32: "fp32"}[work.dtype]
    products = f"{len(usage.products)} {usage.products[0]}" if usage.products else "-"
    tile = compiled.kernel.startswith("tile")
    length = f"{usage.epilogue:.1f}" if tile and usage.epilogue is not None else "-"
    shared = f"{usage.shared / configs.KIB:.0f}/{work.target.shared_memory // configs.KIB}"
    return (
        f"{work.target.arch!s:>7} {dtype} {work.head:<6} {compiled.tile:<28}"
        f"{compiled.kernel:<25} {usage.registers:>4} {usage.stack:>5} {usage.spills:>6} {shared:>8} "
        f"{products:>12} {usage.load:>5} {usage.store:>5} {length:>6}  {', '.join(compiled.faults)}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="TARGET")
    extent = parser.add_mutually_exclusive_group()
    for name, meaning in (("brief", "one default tile a target"), ("sweep", "every candidate shape")):
        extent.add_argument(f"--{name}", dest="extent", action="store_const", const=name, help=meaning)
    parser.set_defaults(extent="default")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()

    work = [w for name in args.targets for w in works(TARGETS[name], args.extent)]
    print(
        f"{'target':>7} {'operands':<11} {'tile':<28}{'kernel':<25} {'regs':>4} {'stack':>5} "
        f"{'spills':>6} {'KiB':>8} {'products':>12} {'load':>5} {'store':>5} {'instr':>6}  faults"
    )
    seen: set[str] = set()
    faulty = 0
    # Fresh processes: Triton's state for one target does not meet another's.
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        for compiled in itertools.chain.from_iterable(pool.map(compile_kernels, work)):
            row = line(compiled)
            if row not in seen:
                seen.add(row)
                faulty += bool(compiled.faults)
                print(row, flush=True)
    print(f"{len(seen)} kernels, {faulty} with faults; triton {triton.__version__}")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
