"""What both paths need around their products: how tokens are cut, and what the device multiplies."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch


@functools.cache
def has_mixed_product(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this device multiplies `dtype` operands into fp32 results."""
    probe = torch.ones(16, 16, dtype=dtype, device=device)
    try:
        return torch.mm(probe, probe, out_dtype=torch.float32).dtype == torch.float32
    except (RuntimeError, NotImplementedError):
        return False


def chunks_of(n: int, size: int, boundary: int = 0) -> Iterator[slice]:
    """Slices of at most `size` that cover [0, n) and do not straddle `boundary`."""
    for start, stop in ((0, min(boundary, n)), (min(boundary, n), n)):
        for begin in range(start, stop, size):
            yield slice(begin, min(begin + size, stop))
