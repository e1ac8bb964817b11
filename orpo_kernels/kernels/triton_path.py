"""The Triton backend: the same two functions as `torch_path`, on kernels that keep the logits on the chip.

Forward, for a chunk of tokens:

    target_kernel   z_y and the first base of every row
    tile_kernel     exponentials E [C, V] of the competitors (only their sums where u is not wanted)
    sum_kernel      S, L and gap
    slow lane       base, E and S of rows that the first pass could not hold; see `slow_lane`
    E W             by the library, in fp32, in slices of the vocabulary where C D alone would not fill the card
    u_kernel        u = f'_y W[y] - (E W) / S, the slices added in order

Gradient of the head, for a block of the vocabulary: `G = c s (onehot - q) f'` [N, Vb] by tile_kernel (rows
whose exponentials were kept need no product for it), then `G^T H` by the library, in fp32, rounded once.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from orpo_kernels.kernels import configs, tuned
from orpo_kernels.kernels.configs import TileConfig
from orpo_kernels.kernels.interface import Forward, Head, Kept, Tokens
from orpo_kernels.kernels.rows import maximum_kernel, sum_kernel, target_kernel, u_kernel
from orpo_kernels.kernels.slow_lane import MAXIMA, slow_kernel
from orpo_kernels.kernels.tile import EXPONENTIALS, GRADIENT, INTERPRETED, SHIFT, SUMS, tile_kernel
from orpo_kernels.kernels.torch_path import _chunks, _has_mixed_product
from orpo_kernels.plan import Schedule

# Programs of the slow lane for a block of tokens: more finish a slow block sooner, fewer return sooner.
_SLICES = 64
# How much of the inner dimension is widened at a time where no 16-bit product has an fp32 result.
_WIDENED = 2048
# Slices of the vocabulary begin at multiples of this, which keeps a library's loads wide.
_ALIGNED = 64
# Stated, as Triton's default changes between versions.
_OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}


def supports(head: Head, tokens_device: torch.device) -> str | None:
    """None where these kernels can serve `head` on that device; else the reason, in words."""
    if head.adapter is not None:
        return "the kernels take a plain weight, and the head has an adapter"
    if head.compute_dtype not in (torch.bfloat16, torch.float32):
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
    tokens: Tokens, head: Head, schedule: Schedule, want_u: bool, *, config: TileConfig | None = None
) -> Forward:
    """Log-probability terms of every token; see `interface` for the symbols and shapes.

    schedule: one made with `full_rows=True`: a chunk's exponentials span the vocabulary. ValueError if not.
    config: the tile's shape; None takes the tuned one, or the device's default.

    What is kept are the exponentials of `tile`, relative to their base and 2^-60 small: the constant would cost
    a reference of its own size the last digits that a sum in fp32 leaves.
    """
    n, d, v = tokens.targets.numel(), head.weight.shape[1], head.weight.shape[0]
    device, dtype = head.weight.device, head.compute_dtype
    if schedule.forward_block < v:
        raise ValueError(
            f"schedule.forward_block={schedule.forward_block} does not span the vocabulary of {v}: make the "
            "schedule with full_rows=True, and Plan.scratch_bytes large enough for that"
        )
    what = "exponentials" if want_u else "sums"
    config = config or _default_config(head, what, min(n, schedule.forward_chunk))
    launch = _Launcher(head, config)
    gap = torch.empty(n, dtype=torch.float32, device=device)
    lse = torch.empty(n, dtype=torch.float32, device=device)
    u = torch.empty(n, d, dtype=dtype, device=device) if want_u else None
    keep, kept = min(schedule.keep_rows, n), None
    if schedule.keep_rows:
        reference = torch.empty(keep, 1, dtype=torch.float32, device=device)
        kept = Kept([_tile_buffer(keep, v, dtype, device, config)], reference, v)
    scratch = _tile_buffer(min(schedule.forward_chunk, n - keep) if want_u else 0, v, dtype, device, config)

    with _on(device):
        for chunk in _chunks(n, schedule.forward_chunk, keep):
            hidden, rows = _hidden_rows(tokens, chunk, dtype)
            y = tokens.targets[chunk]
            tile = None
            if chunk.start < keep and kept is not None:
                tile = kept.values[0][chunk]
            elif want_u:
                tile = scratch[: y.numel()]
            z_y, slope_y, base = launch.targets(hidden, rows, y)
            partial = launch.sums(hidden, rows, y, base, tile)
            total = launch.total(partial, base, z_y, gap[chunk], lse[chunk])
            launch.slow_lane(hidden, rows, y, base, total, tile, partial)
            total = launch.total(partial, base, z_y, gap[chunk], lse[chunk])
            if chunk.start < keep and kept is not None:
                kept.reference[chunk, 0] = base
            if u is not None and tile is not None:
                products = _slice_products(tile, launch.weight, schedule.u_slices, u[chunk])
                launch.finish_u(products, y, slope_y, total, u[chunk])
                del products
            del hidden, partial  # Before the next chunk's are made.
    return Forward(gap, lse, u, kept)


def weight_gradient(
    tokens: Tokens,
    head: Head,
    coefficient: Tensor,
    lse: Tensor,
    kept: Kept | None,
    schedule: Schedule,
    want_weight: bool,
    want_bias: bool,
    *,
    config: TileConfig | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the weight [V, D] and the bias [V], in their own dtypes.

    coefficient: [N] fp32, `c_t s_t`: the gradient of the loss with respect to each log-probability times
    1 - p(target). head.weight may be of another dtype than the compute dtype: a block at a time is cast.
    """
    n, v = tokens.targets.numel(), head.weight.shape[0]
    device = head.weight.device
    d_weight = torch.zeros_like(head.weight, memory_format=torch.contiguous_format) if want_weight else None
    d_bias = torch.zeros_like(head.bias) if want_bias and head.bias is not None else None
    if n == 0 or (d_weight is None and d_bias is None):
        return d_weight, d_bias
    dtype, wide = head.compute_dtype, torch.float32
    keep = kept.reference.shape[0] if kept is not None else 0
    chunk_size, block = min(schedule.backward_chunk, n), min(schedule.backward_block, v)
    config = config or _default_config(head, "gradient", chunk_size, d_bias is not None)
    whole = _gathered(tokens, slice(0, n), dtype) if chunk_size == n else None
    buffer = _tile_buffer(chunk_size, block, dtype, device, config)

    with _on(device):
        for columns in _chunks(v, block):
            launch = _Launcher(head, config, columns)
            dest = d_weight[columns] if d_weight is not None else None
            total: Tensor | None = None
            total_bias = None
            if d_bias is not None:
                total_bias = torch.zeros(columns.stop - columns.start, dtype=wide, device=device)
            for chunk in _chunks(n, chunk_size):
                hidden = _gathered(tokens, chunk, dtype) if whole is None else whole
                g = buffer[: hidden.shape[0], : columns.stop - columns.start]
                for part in _chunks(chunk.stop - chunk.start, chunk_size, max(keep - chunk.start, 0)):
                    t = slice(chunk.start + part.start, chunk.start + part.stop)
                    about = (hidden[part], tokens.targets[t], coefficient[t], lse[t], g[part], total_bias)
                    if kept is not None and t.start < keep:
                        launch.kept_gradient(kept.at(t, columns), kept.reference[t, 0], *about)
                    else:
                        launch.gradient(*about)
                if dest is not None:
                    total = _add_product(total, g.t(), hidden, dest)
            if dest is not None and total is not None and total is not dest:
                dest.copy_(total)
            if d_bias is not None and total_bias is not None:
                d_bias[columns] = total_bias
    return d_weight, d_bias


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
        """z_y, its slope f' and the first base of each row, each [C]."""
        z_y, slope_y, base = torch.empty(3, y.numel(), dtype=torch.float32, device=y.device)
        target_kernel[(triton.cdiv(y.numel(), 4),)](
            hidden, rows, self.weight, self.bias, y, z_y, slope_y, base,
            *hidden.stride(), *self.weight.stride(), y.numel(), self.D, *self.transform,
            BC=4, BD=512, **_OPTIONS,
        )  # fmt: skip
        return z_y, slope_y, base

    def sums(self, hidden: Tensor, rows: Tensor | None, y: Tensor, base: Tensor, tile: Tensor | None) -> Tensor:
        """Each tile's row sums [n_v, C], and the exponentials in `tile` [C, V] where it is not None."""
        partial = torch.empty(self.n_v, y.numel(), dtype=torch.float32, device=y.device)
        epilogue = SUMS if tile is None else EXPONENTIALS
        self._tiles(epilogue, hidden, rows, y, base, None, tile, partial)
        return partial

    def total(self, partial: Tensor, base: Tensor, z_y: Tensor, gap: Tensor, lse: Tensor) -> Tensor:
        """S [C]; writes gap and lse [C]."""
        total = torch.empty_like(base)
        c = total.numel()
        sum_kernel[(triton.cdiv(c, 32),)](partial, base, z_y, total, gap, lse, c, self.n_v, BC=32, BV=64, **_OPTIONS)
        return total

    def slow_lane(
        self,
        hidden: Tensor,
        rows: Tensor | None,
        y: Tensor,
        base: Tensor,
        total: Tensor,
        tile: Tensor | None,
        partial: Tensor,
    ) -> None:
        """Replaces the base [C], tile [C, V] and partial sums [n_v, C] of abnormal rows."""
        c = y.numel()
        slices = min(_SLICES, self.n_v)

        # A loop around the tile needs registers: tiles are half as tall, down to the 64 rows that sm_90 multiplies.
        block_c = max(self.config.block_c // 2, min(self.config.block_c, 64))
        shape = {**self.shape, "BC": block_c, "num_warps": 8}

        def launch(epilogue: Any, stored: Tensor | None) -> None:
            slow_kernel[(triton.cdiv(c, shape["BC"]), slices)](
                hidden, rows, self.weight, self.bias, y, base, total, stored, partial,
                *hidden.stride(), *self.weight.stride(), 0 if stored is None else stored.stride(0),
                c, self.V, self.D, *self.transform, EPILOGUE=epilogue, SLICES=slices, **shape,
            )  # fmt: skip

        launch(MAXIMA, None)
        maximum_kernel[(triton.cdiv(c, 32),)](partial, total, base, c, self.V, self.n_v, BC=32, BV=64, **_OPTIONS)
        launch(EXPONENTIALS, tile)

    def finish_u(self, products: Tensor, y: Tensor, slope_y: Tensor, total: Tensor, u: Tensor) -> None:
        """u [C, D] from products [P, C, D] in fp32 that add up to E W; a single one may be the same memory."""
        grid = (triton.cdiv(y.numel(), 8), triton.cdiv(self.D, 256))
        u_kernel[grid](
            products, self.weight, y, slope_y, total, u, *self.weight.stride(), y.numel(), self.D, len(products),
            self._left_out, BC=8, BD=256, **_OPTIONS,
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

    def kept_gradient(
        self,
        values: Tensor,
        base: Tensor,
        hidden: Tensor,
        y: Tensor,
        c_s: Tensor,
        lse: Tensor,
        g: Tensor,
        column_sums: Tensor | None,
    ) -> None:
        """The same as `gradient`, from kept exponentials [C, Vb] and their base [C]."""
        # L is -inf where nothing competes, and the kept values are 0.
        root = torch.exp(0.5 * (base - torch.where(lse == -torch.inf, 0.0, lse)))
        inverse = (root / SHIFT.value) * root
        torch.mul(values, (-self._left_out * c_s * inverse)[:, None], out=g)
        at = (y - self.start).clamp_(0, self.V - 1)
        slope_y = self.targets(hidden, None, at)[1]
        is_here = at == y - self.start
        own = torch.where(is_here, (c_s * slope_y).to(g.dtype), g.gather(1, at[:, None])[:, 0])
        g.scatter_(1, at[:, None], own[:, None])
        if column_sums is not None:
            column_sums += g.sum(0, dtype=torch.float32)

    @property
    def _left_out(self) -> float:
        """The part of f' that stored exponentials do not have."""
        return self.head.logit_scale if self.head.softcap is None else 1.0

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
    ) -> None:
        n_c = triton.cdiv(y.numel(), self.config.block_c)
        operands: list[Any] = [hidden, self.weight]
        described = [self.config.descriptors and _has_descriptor(x) for x in operands]
        described[0] = described[0] and rows is None
        for i, block in enumerate((self.config.block_c, self.config.block_v)):
            if described[i]:
                operands[i] = TensorDescriptor.from_tensor(operands[i], [block, self.config.block_d])
        tile_kernel[(n_c * self.n_v,)](
            operands[0], rows, operands[1], self.bias, y, reference, c_s, tile, sums,
            *hidden.stride(), *self.weight.stride(), 0 if tile is None else tile.stride(0),
            self.start, y.numel(), self.V, self.D, *self.transform,
            EPILOGUE=epilogue, GROUP=self.config.group, DESCRIBED_H=described[0], DESCRIBED_W=described[1],
            **self.shape,
        )  # fmt: skip


def _has_descriptor(x: Tensor) -> bool:
    """Whether the tensor memory unit can load blocks of a matrix."""
    row, column = x.stride()
    return column == 1 and row >= x.shape[1] and row * x.itemsize % 16 == 0 and x.data_ptr() % 16 == 0


def _tile_buffer(c: int, v: int, dtype: torch.dtype, device: torch.device, config: TileConfig) -> Tensor:
    """[C, V] with rows that hold whole tiles, so that a store needs no mask along the row and can be wide."""
    return torch.empty(c, triton.cdiv(v, config.block_v) * config.block_v, dtype=dtype, device=device)[:, :v]


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
    if a.dtype == wide:
        if total is None:
            return torch.mm(a, b, out=out if out.dtype == wide else None)
        return torch.addmm(total, a, b, out=total)
    if _has_mixed_product(a.device, a.dtype):
        product = torch.mm(a, b, out_dtype=wide)
        return product if total is None else total.add_(product)
    if total is None:
        total = torch.zeros(out.shape, dtype=wide, device=a.device)
    for part in _chunks(a.shape[1], _WIDENED):
        torch.addmm(total, a[:, part].to(wide), b[part].to(wide), out=total)
    return total


def _slice_products(tile: Tensor, weight: Tensor, slices: int, out: Tensor) -> Tensor:
    """[P, C, D] fp32 that add up to `tile @ weight`: the products of P parts of the vocabulary.

    slices: how many equal parts; what is left of the vocabulary is one more. A product of few rows and columns has
    work for few multiprocessors, and a batch of several has it for all. One part, where `out` [C, D] may be used,
    on a device without such a batch.
    """
    wide = torch.float32
    length = tile.shape[1] // (slices * _ALIGNED) * _ALIGNED
    if slices == 1 or length == 0 or not (tile.dtype == wide or _has_mixed_batch(tile.device, tile.dtype)):
        return _add_product(None, tile, weight, out)[None]
    whole = slices * length
    has_rest = tile.shape[1] > whole
    products = torch.empty(slices + has_rest, *out.shape, dtype=wide, device=out.device)
    to_fp32: dict[str, Any] = {} if tile.dtype == wide else {"out_dtype": wide}
    parts = tile[:, :whole].unflatten(1, (slices, length)).transpose(0, 1)  # [slices, C, length]
    torch.bmm(parts, weight[:whole].unflatten(0, (slices, length)), out=products[:slices], **to_fp32)
    if has_rest:
        torch.mm(tile[:, whole:], weight[whole:], out=products[slices], **to_fp32)
    return products


@functools.cache
def _has_mixed_batch(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this device multiplies batches of `dtype` operands, and single ones, into given fp32 results."""
    probe = torch.ones(1, 16, 16, dtype=dtype, device=device)
    out = torch.zeros(1, 16, 16, dtype=torch.float32, device=device)
    try:
        torch.bmm(probe, probe, out_dtype=torch.float32, out=out)
        torch.mm(probe[0], probe[0], out_dtype=torch.float32, out=out[0])
    except (RuntimeError, NotImplementedError):
        return False
    return True


def _default_config(head: Head, what: str, tokens: int, bias_gradient: bool = False) -> TileConfig:
    """The tile's shape for one of `tuned.PASSES`: the one that was tuned for it, if any."""
    device, dtype, hidden_size = head.weight.device, head.compute_dtype, head.weight.shape[1]
    target = configs.target_of(device)
    heavy = bias_gradient or head.softcap is not None
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
