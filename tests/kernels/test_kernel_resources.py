"""What the kernels compile to, and that no tile shape asks for more than its card has."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from orpo_kernels.kernels import configs

ROOT = Path(__file__).parents[2]
TARGETS = [configs.cuda_target(c) for c in (80, 86, 89, 90, 100, 120)] + [configs.hip_target("gfx942")]
KERNELS = {
    *("target", "sum", "maximum", "u"),
    *("tile sums", "tile exponentials", "tile gradient", "slow maxima", "slow sums", "slow exponentials"),
    *("tile exponentials, stats", "slow exponentials, stats"),
}


# A process of its own: this one runs the kernels in the interpreter.
def compile_kernels(*options: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("triton", reason="Triton is not installed")
    command = [sys.executable, "-m", "benchmarks.kernel_resources", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def assert_every_kernel_is_sound(result: subprocess.CompletedProcess[str], targets: tuple[str, ...]) -> None:
    table = result.stdout
    # Triton 3.6 keeps some 50 registers of one kernel of 10.0 in memory; later ones keep none.
    old = version("triton").startswith("3.6.")
    known = re.findall(r"^ *100 .* tile sums .*  spills\n", table, re.MULTILINE) if old else []
    # A tile that is stored and leaves statistics as well: 10.0 and 12.0 keep some of it in memory.
    known += re.findall(r"^ *1[02]0 .* tile exponentials, stats .*  spills\n", table, re.MULTILINE)
    assert result.returncode == bool(known), table + result.stderr
    assert re.search(rf"^\d+ kernels, {len(known)} with faults", table, re.MULTILINE), table
    for target in targets:
        rows = [line for line in table.splitlines() if line.split()[0] == target]
        assert {name for name in KERNELS for row in rows if f" {name} " in row} == KERNELS


@pytest.mark.parametrize(
    "targets",
    [
        pytest.param(("90", "gfx942"), id="90, gfx942"),
        pytest.param(("80", "100", "120"), id="the others", marks=pytest.mark.exhaustive),
    ],
)
def test_default_tiles(targets: tuple[str, ...]) -> None:
    assert_every_kernel_is_sound(compile_kernels("--brief", "--targets", *targets), targets)


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_default_tiles_with_every_head() -> None:
    assert_every_kernel_is_sound(compile_kernels(), ("80", "90", "100", "120", "gfx942"))


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: str(t.arch))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_shapes_fit_the_card(target: configs.Target, dtype: torch.dtype) -> None:
    candidates = configs.candidates(target, dtype)
    for tokens, hidden_size, heavy in ((1, 64, False), (4096, 576, False), (4096, 8192, True), (4096, 8192, False)):
        config = configs.default(target, dtype, tokens, hidden_size, heavy)
        assert config in candidates
        assert config.block_c <= max(64, tokens)
    for config in candidates:
        assert config.shared_memory(dtype.itemsize) <= target.shared_memory
        assert config.block_c * config.block_v // (32 * config.num_warps) <= 128, "accumulators a thread"


def test_statistics_on_10_0_take_four_warps() -> None:
    """Those of a soft-capped tile do not compile in eight (Triton 3.9)."""
    shapes = [
        configs.default(configs.cuda_target(100), torch.bfloat16, 4096, d, True, statistics=True) for d in (64, 4096)
    ]
    assert [(s.persistent, s.num_warps) for s in shapes] == [(True, 4)] * 2
    hopper = configs.default(configs.cuda_target(90), torch.bfloat16, 4096, 4096, True, statistics=True)
    assert (hopper.persistent, hopper.num_warps) == (True, 8)


def test_shared_memory_of_cards() -> None:
    kib = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99, 75: 99}
    assert {c: configs.cuda_target(c).shared_memory // 1024 for c in kib} == kib
    assert configs.hip_target("gfx942").shared_memory == 64 * 1024
    assert configs.target_of(torch.device("cpu")) is None
