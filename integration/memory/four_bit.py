"""Linear layers of 4-bit weights as bitsandbytes runs them, on fake tensors.

The packed weight is there all the time: half a byte a number and, with double quantisation (blocks of 64 in blocks of
256), 8.127 bits more a block. A product by a forward kernel unpacks nothing; the backward makes the whole weight in
the gradient's dtype, uses it and drops it. Nothing of the input is saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_BLOCK, _NESTED = 64, 256


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, packed: Tensor, size: tuple[int, int]) -> Tensor:
        ctx.size = size
        return input.new_empty(*input.shape[:-1], size[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        weight = grad.new_empty(ctx.size)
        return grad @ weight, None, None


class FourBitLinear(nn.Linear):
    """Takes the place of a linear layer; `weight` is the packed one, uint8 [bytes, 1]."""

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        numbers = layer.in_features * layer.out_features
        blocks = -(-numbers // _BLOCK)
        self.weight = nn.Parameter(torch.empty(-(-numbers // 2), 1, dtype=torch.uint8), requires_grad=False)
        self.register_buffer("absmax", torch.empty(blocks, dtype=torch.uint8))
        self.register_buffer("absmax_of_absmax", torch.empty(-(-blocks // _NESTED), dtype=torch.float32))
        self.bias = layer.bias

    def forward(self, input: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else input.dtype
        out = _Product.apply(input.to(dtype), self.weight, (self.out_features, self.in_features))
        return (out if self.bias is None else out + self.bias.to(dtype)).clone()  # as PEFT does


def quantize(model: nn.Module, head: nn.Module) -> None:
    """Every linear layer but the head, as transformers does; experts that are no nn.Linear stay as they are."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child is not head:
                setattr(parent, name, FourBitLinear(child))
