"""The Triton backend: the same two functions as `torch_path`, on kernels that keep the logits on the chip.

Forward, for a chunk of tokens:

    target_kernel   z_y and the first base of every row, once for all chunks
    tile_kernel     exponentials E [C, V] of the competitors (only their sums where u is not wanted)
    sum_kernel      S, L and the log-odds
    slow lane       base, E and S (and moments) of rows that the first pass could not hold; see `slow_lane`
    E W             by the library, in fp32
    u_kernel        u = f'_y W[y] - (E W) / S; and where E is kept, its entry at the target becomes -S f'_y

Gradient of the head, for a block of the vocabulary: `G = c s (onehot - q) f'` [N, Vb] by tile_kernel, then `G^T H` by
the library, summed in fp32 and rounded once. Tokens whose exponentials were kept need no G: a row of it is -c s / S
times a row of E, and that factor goes to the rows of H once for all blocks, `E^T (-c s / S H)`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from orpo_kernels.kernels import configs, tuned
from orpo_kernels.kernels.configs import TileConfig
from orpo_kernels.kernels.interface import (
    EntropyGradient,
    Forward,
    Head,
    HeadGradients,
    KeptLogitGrads,
    TargetLogits,
    Tokens,
)
from orpo_kernels.kernels.products import chunks_of, has_mixed_product
from orpo_kernels.kernels.rows import maximum_kernel, scale_kernel, sum_kernel, target_kernel, u_kernel
from orpo_kernels.kernels.slow_lane import MAXIMA, slow_kernel
from orpo_kernels.kernels.statistics import NO_STATISTICS, Statistics
from orpo_kernels.kernels.tile import EXPONENTIALS, GRADIENT, INTERPRETED, SUMS, tile_kernel
from orpo_kernels.kernels.triton_bytes import DTYPES
from orpo_kernels.kernels.triton_statistics import GatheredStatistics
from orpo_kernels.plan import Schedule

# Programs of the slow lane for a block of tokens: more finish a slow block sooner, fewer return sooner.
_SLICES = 64
# How much of the inner dimension is widened at a time where no 16-bit product has an fp32 result.
_WIDENED = 2048
# Of a kept row's sum, as a logarithm: bf16 and fp32 hold e^88.
_LARGEST_SUM = 64.0
# Stated, as Triton's default changes between versions.
_OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}


def supports(head: Head, tokens_device: torch.device) -> str | None:
    """None where these kernels can serve `head` on that device; else the reason, in words."""
    if head.adapter is not None:
        return "the kernels take a plain weight, and the head has an adapter"
    if head.compute_dtype not in DTYPES:
        return f"the kernels take bf16 and fp32 operands, and the compute dtype is {head.compute_dtype}"
    if INTERPRETED.value:
        where = tokens_device.type
        return None if where == "cpu" else f"TRITON_INTERPRET is set: kernels run on the CPU, not on {where}"
    if tokens_device.type != "cuda":
        return f"the kernels run on CUDA and ROCm devices, not on {tokens_device.type}"
    if torch.version.hip is None and torch.cuda.get_device_capability(tokens_device) < (8, 0):
        return "the kernels need tensor cores that take bf16 (compute capability 8.0 or later)"
    return None


def forward(
    tokens: Tokens,
    head: Head,
    schedule: Schedule,
    want_u: bool,
    wanted: Statistics = NO_STATISTICS,
    *,
    config: TileConfig | None = None,
) -> Forward:
    """Log-probability terms of every token; see `interface` for the symbols and shapes.

    schedule: one made with `full_vocab_tiles=True`: a chunk's exponentials span the vocabulary. ValueError if not.
    config: the tile's shape; None takes the tuned one, or the device's default.

    """
    n, d, v = tokens.targets.numel(), head.weight.shape[1], head.weight.shape[0]
    device, dtype = head.weight.device, head.compute_dtype
    if schedule.forward_block < v:
        raise ValueError(
            f"schedule.forward_block={schedule.forward_block} does not span the vocabulary of {v}: make the "
            "schedule with full_vocab_tiles=True, and Plan.scratch_bytes large enough for that"
        )
    what = "exponentials" if want_u else "sums"
    config = config or _default_config(head, what, min(n, schedule.forward_chunk), bool(wanted.asked))
    launch = _Launcher(head, config)
    statistics = GatheredStatistics(wanted, n, v, device)
    log_odds = torch.empty(n, dtype=torch.float32, device=device)
    lse = torch.empty(n, dtype=torch.float32, device=device)
    u = torch.empty(n, d, dtype=dtype, device=device) if want_u else None
    keep, kept = min(schedule.keep_rows, n), None
    if schedule.keep_rows:
        reference = torch.empty(keep, 1, dtype=torch.float32, device=device)
        kept = KeptLogitGrads([_tile_buffer(keep, v, dtype, device, config)], reference, v)
    scratch = _tile_buffer(min(schedule.forward_chunk, n - keep) if want_u else 0, v, dtype, device, config)

    with _on(device):
        if tokens.known is None:
            target, slopes, bases = launch.targets(tokens.hidden, tokens.rows, tokens.targets)
        else:
            target, slopes, bases = _known_targets(tokens.known)
        for chunk in chunks_of(n, schedule.forward_chunk, keep):
            hidden, rows = _hidden_rows(tokens, chunk, dtype)
            y = tokens.targets[chunk]
            keeps = kept is not None and chunk.start < keep
            tile = None
            if kept is not None and keeps:
                tile = kept.values[0][chunk, :v]
            elif want_u:
                tile = scratch[: y.numel(), :v]
            slope_y, base, total = slopes[chunk], bases[chunk], torch.empty_like(log_odds[chunk])
            numbers = (base, target[:, chunk], total, log_odds[chunk], lse[chunk])
            planes = statistics.planes(launch.n_v, y.numel())
            partial = launch.sums(hidden, rows, y, base, tile, planes, statistics.mask)
            launch.finish_sums(partial, *numbers)
            launch.slow_lane(hidden, rows, y, base, total, tile, partial, planes, statistics.mask)
            launch.finish_sums(partial, *numbers, again=True)
            statistics.add(planes, launch.n_v, chunk, target[0, chunk], total)
            if u is not None and tile is not None:
                product = _add_product(None, tile, launch.weight, u[chunk])
                launch.finish_u(product, y, slope_y, total, u[chunk])
                del product
            if kept is not None and keeps and tile is not None:
                kept.reference[chunk, 0] = base * math.log(2)
                if tokens.known is None:  # else S is that of a slice, and `settle_kept` knows the whole
                    own = -total * (slope_y / launch.left_out)
                    tile.scatter_(1, y[:, None], own.to(dtype)[:, None])
            del hidden, partial, planes  # Before the next chunk's are made.
        return Forward(log_odds, lse, u, kept, statistics.finish(log_odds))


def weight_gradient(
    tokens: Tokens,
    head: Head,
    coefficient: Tensor,
    lse: Tensor,
    kept: KeptLogitGrads | None,
    schedule: Schedule,
    want_weight: bool,
    want_bias: bool,
    want_adapter: bool = False,
    entropy: EntropyGradient | None = None,
    *,
    config: TileConfig | None = None,
) -> HeadGradients:
    """See `interface.Backend`. A weight of another dtype than the compute dtype is cast a block at a time."""
    assert not want_adapter, "`supports` refuses a head with an adapter"
    assert entropy is None, "`dispatch` takes a gradient of the entropy to the torch path"
    n, v = tokens.targets.numel(), head.weight.shape[0]
    device, dtype, wide = head.weight.device, head.compute_dtype, torch.float32
    d_weight = torch.empty_like(head.weight, memory_format=torch.contiguous_format) if want_weight else None
    d_bias = torch.empty_like(head.bias) if want_bias and head.bias is not None else None
    if n == 0 or (d_weight is None and d_bias is None):
        return HeadGradients(*(None if d is None else d.zero_() for d in (d_weight, d_bias)))
    chunk_size, block = min(schedule.backward_chunk, n), min(schedule.backward_block, v)
    keep = kept.reference.shape[0] if kept is not None else 0
    config = config or _default_config(head, "gradient", chunk_size, d_bias is not None)
    factors = None if kept is None else _kept_factors(head, coefficient, lse, kept)
    chunks = list(chunks_of(n, chunk_size, keep))
    alone = len(chunks) == 1

    def operand(chunk: slice) -> Tensor:
        """Rows of hidden [C, D], those of kept tokens times their factors."""
        rows = _gathered(tokens, chunk, dtype)
        if factors is None or chunk.start >= keep:
            return rows
        return torch.mul(rows, factors[chunk, None], out=torch.empty(rows.shape, dtype=dtype, device=device))

    with _on(device):
        # Rows that serve every block are made once.
        ready = [operand(chunk) for chunk in chunks] if n == chunk_size else None
        buffer = _tile_buffer(min(chunk_size, n - keep), block, dtype, device, config)
        for columns in chunks_of(v, block):
            launch = _Launcher(head, config, columns) if keep < n else None
            width = columns.stop - columns.start
            dest = d_weight[columns] if d_weight is not None else None
            total: Tensor | None = None
            total_bias = None
            if d_bias is not None:
                total_bias = torch.zeros(width, dtype=wide, device=device)
            for i, chunk in enumerate(chunks):
                rows = operand(chunk) if ready is None else ready[i]
                g = buffer
                if kept is not None and factors is not None and chunk.start < keep:
                    g = kept.tile(chunk, columns)
                    if total_bias is not None:
                        total_bias += _weighted_sums(g, factors[chunk])
                elif launch is not None:
                    g = buffer[: chunk.stop - chunk.start, :width]
                    launch.gradient(rows, tokens.targets[chunk], coefficient[chunk], lse[chunk], g, total_bias)
                if dest is not None and alone:
                    _product(g.t(), rows, dest)
                elif dest is not None:
                    total = _add_product(total, g.t(), rows, dest)
            if dest is not None and total is not None and total is not dest:
                dest.copy_(total)
            if d_bias is not None and total_bias is not None:
                d_bias[columns] = total_bias
    return HeadGradients(d_weight, d_bias)


def target_logits(tokens: Tokens, head: Head, schedule: Schedule) -> TargetLogits:
    """z_y [N] in fp64 and its slope of the tokens whose target is one of the head's rows; 0 of the others."""
    launch = _Launcher(head, _default_config(head, "sums", tokens.targets.numel()))
    with _on(head.weight.device):
        (t_y, low), slopes, _ = launch.targets(tokens.hidden, tokens.rows, tokens.targets)
    absent = tokens.targets < 0
    value = (t_y.double() + low.double()) * math.log(2)
    return TargetLogits(value.masked_fill_(absent, 0.0), slopes.masked_fill(absent, 0.0))


def _known_targets(known: TargetLogits) -> tuple[Tensor, Tensor, Tensor]:
    """What `_Launcher.targets` gives, from z_y itself."""
    exact = known.value / math.log(2)
    t_y = exact.float()
    low = torch.where(t_y.isfinite(), exact - t_y, 0.0).float()
    return torch.stack([t_y, low]), known.slope, torch.where(t_y == -torch.inf, 0.0, t_y)


def settle_kept(kept: KeptLogitGrads, tokens: Tokens, head: Head, lse: Tensor) -> None:
    """Puts the targets' entries, `-S f'_y` with S over the whole vocabulary, into what a slice has kept; in place.

    S is e^(L - reference). Where that is out of range, though the slice's own sum is not, the reference is raised and
    the row falls with it.
    """
    assert tokens.known is not None
    keep, tile = len(kept.reference), kept.values[0]
    reference, y = kept.reference[:, 0], tokens.targets[:keep, None]
    logarithm = lse[:keep] - reference
    over = (logarithm - _LARGEST_SUM).clamp_(min=0.0).nan_to_num_(0.0)
    with _on(tile.device):
        scale_kernel[(triton.cdiv(keep, 16), 64)](
            tile, (-over).exp().float(), tile.stride(0), keep, kept.columns, BC=16, BV=256, **_OPTIONS
        )  # fmt: skip
    left_out = head.logit_scale if head.softcap is None else 1.0
    own = -(logarithm - over).exp() * (tokens.known.slope[:keep] / left_out)
    y_held = y.clamp_min(0)
    tile.scatter_(1, y_held, torch.where(y < 0, tile.gather(1, y_held), own[:, None].to(tile.dtype)))
    kept.reference[:, 0] = reference + over.float()


def _kept_factors(head: Head, coefficient: Tensor, lse: Tensor, kept: KeptLogitGrads) -> Tensor:
    """What kept exponentials [K, V] miss to be rows of G: -c s f' / S without a soft-cap, where f' is a number."""
    keep = len(kept.reference)
    # L is -inf where nothing competes, and the kept values are 0.
    lse = torch.where(lse[:keep] == -torch.inf, 0.0, lse[:keep])
    slope = head.logit_scale if head.softcap is None else 1.0
    return torch.exp(kept.reference[:, 0] - lse) * (-slope * coefficient[:keep])


def _weighted_sums(tile: Tensor, factors: Tensor) -> Tensor:
    """[V] fp32: the columns' sums of the tile [K, V], its rows times fp32 factors [K]."""
    parts: list[Tensor] = []
    left = factors
    while len(parts) < (1 if tile.dtype == torch.float32 else 3):  # 3 x 8 bits are all of an fp32 factor's
        parts.append(left.to(tile.dtype))
        left = left - parts[-1].float()
    weights = torch.stack(parts, 1)
    return _add_product(None, tile.t(), weights, factors.new_empty(tile.shape[1], weights.shape[1])).sum(1)


class _Launcher:
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
            **_OPTIONS,
        }

    def targets(self, hidden: Tensor, rows: Tensor | None, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z_y log2 e [2, C], rounded to fp32 and what that left; its slope f' and the first base of each row [C]."""
        numbers = torch.empty(4, y.numel(), dtype=torch.float32, device=y.device)
        target_kernel[(triton.cdiv(y.numel(), 4),)](
            hidden, rows, self.weight, self.bias, y, *numbers,
            *hidden.stride(), *self.weight.stride(), y.numel(), self.D, *self.transform,
            BC=4, BD=512, **_OPTIONS,
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
            partial, base, *target, total, log_odds, lse, c, self.V, self.n_v, AGAIN=again, BC=32, BV=64, **_OPTIONS
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
        maximum_kernel[(triton.cdiv(c, 32),)](partial, total, base, c, self.V, self.n_v, BC=32, BV=64, **_OPTIONS)
        launch(EXPONENTIALS, tile, wanted)

    def finish_u(self, product: Tensor, y: Tensor, slope_y: Tensor, total: Tensor, u: Tensor) -> None:
        """u [C, D] from the product E W [C, D] in fp32, which may be the same memory."""
        grid = (triton.cdiv(y.numel(), 8), triton.cdiv(self.D, 256))
        u_kernel[grid](
            product, self.weight, y, slope_y, total, u, *self.weight.stride(), y.numel(), self.D, self.left_out,
            BC=8, BD=256, **_OPTIONS,
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
        reference: Tensor,
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
            operands[0], rows, operands[1], self.bias, y, reference, c_s, operands[2], sums, planes,
            *hidden.stride(), *self.weight.stride(), 0 if tile is None else tile.stride(0),
            self.start, c, self.V, self.D, *self.transform,
            EPILOGUE=epilogue, WANTED=wanted, GROUP=config.group, PROGRAMS=programs, **self.shape,
        )  # fmt: skip


def _has_descriptor(x: Tensor) -> bool:
    """Whether the tensor memory unit can load blocks of a matrix."""
    row, column = x.stride()
    return column == 1 and row >= x.shape[1] and row * x.itemsize % 16 == 0 and x.data_ptr() % 16 == 0


def _tile_buffer(c: int, v: int, dtype: torch.dtype, device: torch.device, config: TileConfig) -> Tensor:
    """Memory for a tile [C, V], its rows whole tiles, so that a store needs no mask along the row and can be wide."""
    return torch.empty(c, triton.cdiv(v, config.block_v) * config.block_v, dtype=dtype, device=device)


def _hidden_rows(tokens: Tokens, chunk: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Hidden rows in the compute dtype, and which of them are the chunk's; gathered only to be cast."""
    if tokens.hidden.dtype != dtype:
        return _gathered(tokens, chunk, dtype), None
    if tokens.rows is None:
        return tokens.hidden[chunk], None
    return tokens.hidden, tokens.rows[chunk]


def _gathered(tokens: Tokens, chunk: slice, dtype: torch.dtype) -> Tensor:
    if tokens.rows is None:
        return tokens.hidden[chunk].to(dtype)
    return tokens.hidden.index_select(0, tokens.rows[chunk]).to(dtype)


def _add_product(total: Tensor | None, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """`total + a @ b` in fp32; `out` has its shape and is used where it has its dtype."""
    wide = torch.float32
    place = out if out.dtype == wide else None
    if a.dtype == wide:
        if total is None:
            return torch.mm(a, b, out=place)
        return torch.addmm(total, a, b, out=total)
    if has_mixed_product(a.device, a.dtype):
        if total is not None:
            return torch.addmm(total, a, b, out_dtype=wide, out=total)
        if place is not None:
            return torch.mm(a, b, out_dtype=wide, out=place)
        return torch.mm(a, b, out_dtype=wide)
    if total is None:
        total = torch.zeros(out.shape, dtype=wide, device=a.device)
    for part in chunks_of(a.shape[1], _WIDENED):
        torch.addmm(total, a[:, part].to(wide), b[part].to(wide), out=total)
    return total


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`a @ b`, summed in fp32 and rounded once to the dtype of `out`."""
    if out.dtype == a.dtype and has_mixed_product(a.device, a.dtype):
        with _fp32_reductions():
            torch.mm(a, b, out=out)
        return
    total = _add_product(None, a, b, out)
    if total is not out:
        out.copy_(total)


@contextlib.contextmanager
def _fp32_reductions() -> Iterator[None]:
    """Where the library cuts the inner dimension of a bf16 product, it adds the parts up before they are rounded."""
    matmul: Any = torch.backends.cuda.matmul
    # Set alone, it would also allow cuts that the user has forbidden.
    before = matmul.allow_bf16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction_split_k
    matmul.allow_bf16_reduced_precision_reduction = (False, before[1])
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before


def _default_config(head: Head, what: str, tokens: int, row_or_column_sums: bool = False) -> TileConfig:
    """The tile's shape for one of `tuned.PASSES`: the one that was tuned for it, if any.

    row_or_column_sums: the epilogue adds up more than the exponentials, for statistics or the bias's gradient.
    """
    device, dtype, hidden_size = head.weight.device, head.compute_dtype, head.weight.shape[1]
    target = configs.target_of(device)
    heavy = row_or_column_sums or head.softcap is not None
    default = configs.default(target, dtype, tokens, hidden_size, heavy)
    if target is None or device.type != "cuda":
        return default
    key = tuned.key(torch.cuda.get_device_name(device), dtype, what, tokens, hidden_size, heavy)
    return tuned.shape(key, default, configs.candidates(target, dtype))


def _precision(device: torch.device) -> str:
    """How fp32 operands are multiplied: as torch is set to."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, whatever its arguments are on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
