"""Tile shapes: what a program computes, with how many warps, for which card.

A tile of BC tokens by BV entries reads (BC + BV) D operands for BC BV D products, so it should be as large as
the accumulators (BC BV fp32 numbers in the registers of its warps) and `num_stages` buffers of operands in
shared memory allow: 128 x 256 on cards with room for it. On cards with a tensor memory unit (TMA; compute capabilities
9.0 to 11.0, as Triton 3.6 spills with it for 12.0) the kernel is persistent. On an H100 that reached 98 % of the rate
of the library's bare product, and a program a tile 83 %; 128 x 128 tiles, two programs a multiprocessor, a third less;
warps that only load gained nothing (docs/gpu.md).

Elsewhere these follow from what the kernels compile to (`benchmarks/kernel_resources.py`). Where D is small the
epilogue weighs more, and two programs of 128 x 128 on a multiprocessor hide each other's: one multiplies while the
other takes exponentials. The epilogues of a soft-cap and of a bias gradient need registers that 128 x 256 leaves only
on 9.0. Products of fp32 operands run outside the tensor cores on NVIDIA cards unless TF32 is allowed, pass through
registers, and take smaller tiles. A shape is offered only where its buffers fit the card.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

KIB = 1 << 10
# What one program may use, by compute capability.
_CUDA_SHARED = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}
_SMALL_D = 1024
_FEW_TOKENS = 64


class Target(NamedTuple):
    """A card: "cuda" and ten times its compute capability, or "hip" and its gfx name.

    shared_memory: bytes that one program may have.
    """

    backend: str
    arch: int | str
    shared_memory: int


class TileConfig(NamedTuple):
    """Shape and launch options of a tile: BC tokens, BV entries, BD hidden entries a step.

    group: blocks of tokens that go through a block of the vocabulary together.
    persistent: one program a multiprocessor goes from tile to tile, with loads and stores by the card's tensor memory
        unit (TMA), where strides and alignment allow.
    """

    block_c: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int
    group: int = 16
    persistent: bool = False

    def shared_memory(self, item: int) -> int:
        """Bytes of shared memory: the operand buffers, and the tile itself on its way to wide stores."""
        operands = self.num_stages * (self.block_c + self.block_v) * self.block_d * item
        tile = self.block_c * self.block_v * item
        # A persistent kernel stores one tile, a quarter at a time, while it loads for the next.
        return operands + tile // 4 if self.persistent else max(operands, tile)


# A shape for the interpreter, which runs programs one after another on the host.
INTERPRETER = TileConfig(32, 64, 32, 1, 1, 2)


def cuda_target(capability: int) -> Target:
    """The card of a compute capability, 90 for 9.0; an unknown one has the least shared memory of all."""
    return Target("cuda", capability, _CUDA_SHARED.get(capability, 99) * KIB)


def hip_target(arch: str) -> Target:
    return Target("hip", arch, (160 if arch.startswith("gfx95") else 64) * KIB)


def target_of(device: torch.device) -> Target | None:
    """The card behind a device; None for the interpreter's."""
    if device.type != "cuda":
        return None
    if torch.version.hip is not None:
        return hip_target(torch.cuda.get_device_properties(device).gcnArchName.split(":")[0])
    major, minor = torch.cuda.get_device_capability(device)
    return cuda_target(10 * major + minor)


def default(
    target: Target | None,
    dtype: torch.dtype,
    tokens: int,
    hidden_size: int,
    heavy_epilogue: bool,
    statistics: bool = False,
) -> TileConfig:
    """The tile for `tokens` rows of `hidden_size` numbers in the compute dtype `dtype`.

    heavy_epilogue: one with a soft-cap, a bias gradient or statistics. statistics: one with these.
    """
    if target is None:
        return INTERPRETER
    fitting = candidates(target, dtype)
    largest_c = 64 if tokens <= _FEW_TOKENS else 128
    if fitting[0].persistent:
        narrow = heavy_epilogue and target.arch != 90
    else:
        narrow = heavy_epilogue or hidden_size <= _SMALL_D
    suited = [c for c in fitting if c.block_c <= largest_c and c.block_v <= (128 if narrow else 256)]
    if statistics and target.arch != 90:
        # For 10.0, Triton 3.9 fails to compile statistics of a soft-capped tile in a persistent kernel of eight warps.
        suited = [c for c in suited if not c.persistent or c.num_warps == 4]
    return next(iter(suited), fitting[-1])


def candidates(target: Target, dtype: torch.dtype) -> list[TileConfig]:
    """Shapes that fit a card, best guess first."""
    if dtype == torch.float32:
        shapes = [
            TileConfig(128, 64, 32, 8, 2),
            TileConfig(64, 64, 32, 4, 2),
        ]
    elif target.backend == "hip":
        shapes = [
            TileConfig(128, 256, 64, 8, 2),
            TileConfig(128, 128, 64, 8, 2),
            TileConfig(128, 128, 32, 4, 2),
            TileConfig(64, 128, 64, 4, 2),
        ]
    else:
        shapes = [
            TileConfig(128, 256, 64, 8, 4),
            TileConfig(128, 256, 64, 8, 3),
            TileConfig(256, 128, 64, 8, 3),
            TileConfig(128, 128, 64, 8, 3),
            TileConfig(128, 128, 64, 4, 3),
            TileConfig(64, 128, 64, 4, 4),
            TileConfig(64, 128, 64, 4, 3),
        ]
        if isinstance(target.arch, int) and 90 <= target.arch < 120:
            shapes = [
                *(s._replace(persistent=True) for s in shapes if s.block_c >= 128 and s.num_stages == 3),
                *shapes,
            ]
    return [s for s in shapes if s.shared_memory(dtype.itemsize) <= target.shared_memory]


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Programs of a persistent kernel; an H100's where there is no card to be asked."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
