"""Products of the torch backend: operands rounded to the compute dtype, results wide.

16-bit operands give fp32 by `torch.mm(..., out_dtype=...)` where the device has it (CUDA), else by widening the
operands, which is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from orpo_kernels.kernels.interface import Head, Tokens
from orpo_kernels.kernels.products import has_mixed_product


class Products:
    """Products whose operands are rounded to the compute dtype and whose results are wide."""

    def __init__(self, head: Head, device: torch.device) -> None:
        self.head = head
        self.wide = head.accumulation_dtype
        mixed = head.compute_dtype != self.wide
        self.mixed_product = mixed and has_mixed_product(device, head.compute_dtype)
        self.operand_dtype = head.compute_dtype if self.mixed_product else self.wide
        self._rows: Tensor | None = None

    def _operand(self, x: Tensor) -> Tensor:
        return x.to(self.head.compute_dtype).to(self.operand_dtype)

    def hidden_rows(self, tokens: Tokens, chunk: slice) -> Tensor:
        if tokens.rows is None:
            return self._operand(tokens.hidden[chunk])
        return self._operand(tokens.hidden.index_select(0, tokens.rows[chunk]))

    def weight_rows(self, columns: slice) -> Tensor:
        """[Vb, D + r], in the memory of the last call's where operands are widened or joined."""
        parts = [part[columns] for part in (self.head.weight, self.head.adapter) if part is not None]
        if len(parts) == 1 and parts[0].dtype == self.head.compute_dtype == self.operand_dtype:
            return parts[0]
        shape = (columns.stop - columns.start, self.head.inner_size)
        if self._rows is None or len(self._rows) < shape[0]:
            self._rows = None  # never two at once
            self._rows = self.head.weight.new_empty(shape, dtype=self.operand_dtype)
        out, start = self._rows[: shape[0]], 0
        for part in parts:
            out[:, start : start + part.shape[1]] = part.to(self.head.compute_dtype)
            start += part.shape[1]
        return out

    def target_rows(self, y: Tensor) -> Tensor:
        """The targets' rows of the weight [C, D + r], rounded to the compute dtype, wide."""
        parts = [self.head.weight] + ([] if self.head.adapter is None else [self.head.adapter])
        y = y.clamp_min(0)  # -1: none of the rows; the caller has a slope of 0 for it
        rows = [part.index_select(0, y).to(self.head.compute_dtype).to(self.wide) for part in parts]
        return rows[0] if len(rows) == 1 else torch.cat(rows, 1)

    def tile_buffer(self, rows: int, columns: int) -> Tensor:
        """Memory for every tile of up to [rows, columns]; none where the product makes its own."""
        size = 0 if self.mixed_product else rows * columns
        return torch.empty(size, dtype=self.wide, device=self.head.weight.device)

    def tile(self, buffer: Tensor, rows: int, columns: int) -> Tensor:
        """[rows, columns] of the buffer, or new where there is none."""
        size = rows * columns
        return (buffer[:size] if size <= buffer.numel() else buffer.new_empty(size)).view(rows, columns)

    def _place(self, buffer: Tensor, h: Tensor, w: Tensor) -> Tensor:
        return buffer if buffer.dim() == 2 else self.tile(buffer, h.shape[0], w.shape[0])

    def logits(
        self, h: Tensor, w: Tensor, columns: slice, buffer: Tensor, *, want_slope: bool
    ) -> tuple[Tensor, Tensor | None]:
        """z [C, Vb], and its slope f' [C, Vb] where a soft-cap makes that vary (else it is logit_scale).

        buffer: memory for z, [C, Vb] or flat; not used where the product makes its own.
        """
        head = self.head
        bias = None
        if head.bias is not None:
            bias = head.bias[columns].to(head.compute_dtype).to(self.wide)
        if self.mixed_product:
            z = torch.mm(h, w.t(), out_dtype=self.wide)
            if bias is not None:
                z.add_(bias)
            if head.logit_scale != 1.0:
                z.mul_(head.logit_scale)
        elif bias is None:
            # alpha rides along with the product; beta=0 never reads the buffer.
            out = self._place(buffer, h, w)
            z = torch.addmm(out, h, w.t(), beta=0, alpha=head.logit_scale, out=out)
        else:
            out = self._place(buffer, h, w)
            z = torch.addmm(bias, h, w.t(), beta=head.logit_scale, alpha=head.logit_scale, out=out)
        if head.softcap is None:
            return z, None
        z.div_(head.softcap).tanh_()
        slope = torch.addcmul(z.new_tensor(head.logit_scale), z, z, value=-head.logit_scale) if want_slope else None
        return z.mul_(head.softcap), slope

    def add_product(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        """total += a @ b, with `a` rounded to the operands' dtype."""
        if self.mixed_product:
            total.add_(torch.mm(a.to(self.operand_dtype), b, out_dtype=self.wide))
        else:
            # Not addmm_: torch's FlopCounterMode counts this spelling and not that one.
            torch.addmm(total, a, b, out=total)

    def add_target_rows(self, total: Tensor, y: Tensor, slope_y: Tensor) -> None:
        """total += f'_y W[y]."""
        total.addcmul_(self.target_rows(y), slope_y[:, None])

    def target_logits(self, h: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """z and f' at the target [C], from a row dot."""
        head = self.head
        x = (h.to(self.wide) * self.target_rows(y)).sum(1)
        if head.bias is not None:
            x += head.bias.index_select(0, y.clamp_min(0)).to(head.compute_dtype).to(self.wide)
        if head.softcap is None:
            return x * head.logit_scale, torch.full_like(x, head.logit_scale)
        bent = torch.tanh(x * (head.logit_scale / head.softcap))
        return head.softcap * bent, head.logit_scale * (1 - bent.square())


def target_columns(y: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Each target's column within a block ([C, 1], clamped) and whether it lies there ([C])."""
    inside = (y >= columns.start) & (y < columns.stop)
    return (y - columns.start).clamp_(0, columns.stop - columns.start - 1)[:, None], inside


def finite(base: Tensor) -> Tensor:
    """The base to subtract: 0 where nothing has been seen yet, as -inf - -inf is NaN."""
    return torch.where(base == -torch.inf, 0.0, base)
