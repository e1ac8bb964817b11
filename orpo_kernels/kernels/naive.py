"""The primitive as its definition reads, with all the logits: what kernels and loss are compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def naive_logits(hidden: Tensor, weight: Tensor, *, softcap: float | None = None) -> Tensor:
    """[..., V]: in the inputs' dtype, and then in fp32 (fp64 for fp64)."""
    logits = F.linear(hidden, weight)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def logps_of_logits(logits: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """Log-probabilities shaped like targets, 0 where ignored."""
    losses = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none", ignore_index=ignore_index)
    return -losses.view(targets.shape)


def naive_logps(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, softcap: float | None = None, ignore_index: int = -100
) -> Tensor:
    """Log-probabilities shaped like targets, 0 where ignored: logits in the inputs' dtype, their log-softmax in fp32
    (fp64 for fp64). Arguments as for `linear_logps`."""
    return logps_of_logits(naive_logits(hidden, weight, softcap=softcap), targets, ignore_index)
