"""Launches of the Triton kernels: their arguments, grids and tile shapes."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from orpo_kernels.kernels import configs, tuned
from orpo_kernels.kernels.configs import TileConfig
from orpo_kernels.kernels.interface import Head
from orpo_kernels.kernels.rows import maximum_kernel, sum_kernel, target_kernel, u_kernel
from orpo_kernels.kernels.slow_lane import MAXIMA, slow_kernel
from orpo_kernels.kernels.tile import EXPONENTIALS, GRADIENT, SUMS, tile_kernel

# Programs of the slow lane for a block of tokens: more finish a slow block sooner, fewer return sooner.
_SLICES = 64
# Stated, as Triton's default changes between versions.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}


class Launcher:
    """Launches the kernels for a head, or for some rows of its weight, with one tile shape."""

    def __init__(self, head: Head, config: TileConfig, columns: slice | None = None) -> None:
        columns = columns or slice(0, head.weight.shape[0])
        dtype = head.compute_dtype
        self.head, self.config, self.start = head, config, columns.start
        self.weight = head.weight[columns].to(dtype)
        self.bias = None if head.bias is None else head.bias[columns].to(dtype)
        self.V, self.D = self.weight.shape
        self.n_v = triton.cdiv(self.V, config.block_v)
        self.transform = (head.logit_scale, head.softcap)
        # The part of f' that stored exponentials do not have.
        self.left_out = head.logit_scale if head.softcap is None else 1.0
        self.shape = {
            "BC": config.block_c,
            "BV": config.block_v,
            "BD": config.block_d,
            "EVEN_D": self.D % config.block_d == 0,
            "PRECISION": _precision(self.weight.device),
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            **OPTIONS,
        }

    def targets(self, hidden: Tensor, rows: Tensor | None, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z_y log2 e [2, C], rounded to fp32 and what that left; its slope f' and the first base of each row [C]."""
        numbers = torch.empty(4, y.numel(), dtype=torch.float32, device=y.device)
        target_kernel[(triton.cdiv(y.numel(), 4),)](
            hidden, rows, self.weight, self.bias, y, *numbers,
            *hidden.stride(), *self.weight.stride(), y.numel(), self.D, *self.transform,
            BC=4, BD=512, **OPTIONS,
        )  # fmt: skip
        return numbers[:2], numbers[2], numbers[3]

    def sums(
        self,
        hidden: Tensor,
        rows: Tensor | None,
        y: Tensor,
        base: Tensor,
        tile: Tensor | None,
        planes: Tensor | None = None,
        wanted: int = 0,
    ) -> Tensor:
        """Each tile's row sums [n_v, C], and the exponentials in `tile` [C, V] where it is not None.

        planes, wanted: where each tile's statistics go, and which (`tile_statistics`).
        """
        partial = torch.empty(self.n_v, y.numel(), dtype=torch.float32, device=y.device)
        epilogue = SUMS if tile is None else EXPONENTIALS
        self._tiles(epilogue, hidden, rows, y, base, None, tile, partial, planes, wanted)
        return partial

    def finish_sums(
        self,
        partial: Tensor,
        base: Tensor,
        target: Tensor,
        total: Tensor,
        log_odds: Tensor,
        lse: Tensor,
        again: bool = False,
    ) -> None:
        """Writes S, log_odds and lse [C]; again: of abnormal rows only, in place of the first ones."""
        c = total.numel()
        sum_kernel[(triton.cdiv(c, 32),)](
            partial, base, *target, total, log_odds, lse, c, self.V, self.n_v, AGAIN=again, BC=32, BV=64, **OPTIONS
        )  # fmt: skip

    def slow_lane(
        self,
        hidden: Tensor,
        rows: Tensor | None,
        y: Tensor,
        base: Tensor,
        total: Tensor,
        tile: Tensor | None,
        partial: Tensor,
        planes: Tensor | None = None,
        wanted: int = 0,
    ) -> None:
        """Replaces the base [C], tile [C, V], partial sums [n_v, C] and statistics' moments of abnormal rows."""
        c = y.numel()
        slices = min(_SLICES, self.n_v)

        # A loop around the tile needs registers: tiles are half as tall, down to the 64 rows that sm_90 multiplies.
        block_c = max(self.config.block_c // 2, min(self.config.block_c, 64))
        shape = {**self.shape, "BC": block_c, "num_warps": 8}

        def launch(epilogue: Any, stored: Tensor | None, wanted: int) -> None:
            slow_kernel[(triton.cdiv(c, shape["BC"]), slices)](
                hidden, rows, self.weight, self.bias, y, base, total, stored, partial, planes,
                *hidden.stride(), *self.weight.stride(), 0 if stored is None else stored.stride(0),
                c, self.V, self.D, *self.transform, EPILOGUE=epilogue, WANTED=wanted, SLICES=slices, **shape,
            )  # fmt: skip

        launch(MAXIMA, None, 0)
        maximum_kernel[(triton.cdiv(c, 32),)](partial, total, base, c, self.V, self.n_v, BC=32, BV=64, **OPTIONS)
        launch(EXPONENTIALS, tile, wanted)

    def finish_u(self, product: Tensor, y: Tensor, slope_y: Tensor, total: Tensor, u: Tensor) -> None:
        """u [C, D] from the product E W [C, D] in fp32, which may be the same memory."""
        grid = (triton.cdiv(y.numel(), 8), triton.cdiv(self.D, 256))
        u_kernel[grid](
            product, self.weight, y, slope_y, total, u, *self.weight.stride(), y.numel(), self.D, self.left_out,
            BC=8, BD=256, **OPTIONS,
        )  # fmt: skip

    def gradient(
        self, hidden: Tensor, y: Tensor, c_s: Tensor, lse: Tensor, g: Tensor, column_sums: Tensor | None
    ) -> None:
        """c s (onehot - q) f' [C, Vb] into `g`; adds its column sums."""
        partial = None
        if column_sums is not None:
            n_c = triton.cdiv(y.numel(), self.config.block_c)
            partial = torch.empty(n_c, self.n_v * self.config.block_v, dtype=torch.float32, device=y.device)
        self._tiles(GRADIENT, hidden, None, y, lse, c_s, g, partial)
        if column_sums is not None and partial is not None:
            column_sums += partial[:, : self.V].sum(0)

    def _tiles(
        self,
        epilogue: Any,
        hidden: Tensor,
        rows: Tensor | None,
        y: Tensor,
        base: Tensor,
        c_s: Tensor | None,
        tile: Tensor | None,
        sums: Tensor | None,
        planes: Tensor | None = None,
        wanted: int = 0,
    ) -> None:
        config, c = self.config, y.numel()
        tiles, programs = triton.cdiv(c, config.block_c) * self.n_v, 0
        operands: list[Any] = [hidden, self.weight, tile]
        if config.persistent and _has_descriptor(self.weight):
            if rows is not None:
                hidden, rows = hidden.index_select(0, rows), None
            if _has_descriptor(hidden):
                programs = configs.multiprocessors(hidden.device)
                operands[0] = TensorDescriptor.from_tensor(hidden, [config.block_c, config.block_d])
                operands[1] = TensorDescriptor.from_tensor(self.weight, [config.block_v, config.block_d])
        if programs and tile is not None:
            # The buffer's rows hold whole tiles.
            whole = tile.as_strided((c, self.n_v * config.block_v), tile.stride())
            operands[2] = TensorDescriptor.from_tensor(whole, [config.block_c, config.block_v // 4])
        tile_kernel[(min(tiles, programs or tiles),)](
            operands[0], rows, operands[1], self.bias, y, base, c_s, operands[2], sums, planes,
            *hidden.stride(), *self.weight.stride(), 0 if tile is None else tile.stride(0),
            self.start, c, self.V, self.D, *self.transform,
            EPILOGUE=epilogue, WANTED=wanted, GROUP=config.group, PROGRAMS=programs, **self.shape,
        )  # fmt: skip


def _has_descriptor(x: Tensor) -> bool:
    """Whether the tensor memory unit can load blocks of a matrix."""
    row, column = x.stride()
    return column == 1 and row >= x.shape[1] and row * x.itemsize % 16 == 0 and x.data_ptr() % 16 == 0


def tile_buffer(c: int, v: int, dtype: torch.dtype, device: torch.device, config: TileConfig) -> Tensor:
    """Memory for a tile [C, V], its rows whole tiles, so that a store needs no mask along the row and can be wide."""
    return torch.empty(c, triton.cdiv(v, config.block_v) * config.block_v, dtype=dtype, device=device)


def default_config(
    head: Head, what: str, tokens: int, *, bias_gradient: bool = False, statistics: bool = False
) -> TileConfig:
    """The tile's shape for one of `tuned.PASSES`: the one that was tuned for it, if any; none is for statistics.

    bias_gradient, statistics: whether the epilogue adds these up too.
    """
    device, dtype, hidden_size = head.weight.device, head.compute_dtype, head.weight.shape[1]
    target = configs.target_of(device)
    heavy = bias_gradient or statistics or head.softcap is not None
    default = configs.default(target, dtype, tokens, hidden_size, heavy, statistics)
    if target is None or device.type != "cuda" or statistics:
        return default
    key = tuned.key(torch.cuda.get_device_name(device), dtype, what, tokens, hidden_size, heavy)
    return tuned.shape(key, default, configs.candidates(target, dtype))


def _precision(device: torch.device) -> str:
    """How fp32 operands are multiplied: as torch is set to."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def device_guard(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, whatever its arguments are on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
