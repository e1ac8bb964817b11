"""Peak memory of head and loss, forward and backward, by full logits and without them.

Each way runs in a process of its own, so that neither finds memory that the other has left behind. Only growth
counts (`bench.meter`): the hidden states, the head's weight and the libraries are in memory, and small products
have been done, before the watch starts. Both peaks include the gradient of the hidden states.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orpo_kernels.bench.meter import watch_memory
from orpo_kernels.demo.compare import full_logits_loss
from orpo_kernels.integration.head.logit_transform import Transform
from orpo_kernels.loss import orpo_loss

WAYS = ("full_logits", "orpo_kernels")


def measure(
    hidden: Tensor, head: nn.Linear, transform: Transform, batch: dict[str, Tensor], beta: float
) -> dict[str, Any]:
    """Peak growth in bytes of each of `WAYS`, and how it was measured.

    hidden: [2B, T, D], what the head was given for `batch`; transform: what the model does to its logits.

    Raises RuntimeError with the process's own message if one fails.
    """
    case = {
        "hidden": hidden.detach().cpu(),
        "weight": head.weight.detach().cpu(),
        "bias": None if head.bias is None else head.bias.detach().cpu(),
        "transform": tuple(transform),
        "batch": {name: tensor.cpu() for name, tensor in batch.items()},
        "beta": beta,
        "device": str(hidden.device),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.pt"
        torch.save(case, path)
        peaks = {f"{way}_bytes": _in_own_process(way, path) for way in WAYS}
    memory = "memory allocated on the GPU" if hidden.device.type == "cuda" else "the resident set"
    method = f"growth of {memory} to its peak, in a fresh process for each way; with the gradient of the hidden states"
    return {
        **peaks,
        "one_logits_tensor_bytes": 4 * hidden[..., 0].numel() * head.out_features,
        "method": method,
    }


def _in_own_process(way: str, path: Path) -> int:
    command = [sys.executable, "-m", "orpo_kernels.demo.loss_memory", way, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {way} failed ({done.returncode}): {done.stderr.strip()}")
    return int(done.stdout)


def peak_growth(way: str, case: dict[str, Any]) -> int | None:
    """Bytes by which this process's memory grew at most while `way` computed loss and gradient; None if unknown."""
    device = torch.device(case["device"])
    batch = {name: tensor.to(device) for name, tensor in case["batch"].items()}
    hidden, weight = case["hidden"].to(device), case["weight"].to(device)
    bias = None if case["bias"] is None else case["bias"].to(device)
    transform, beta = Transform(*case["transform"]), case["beta"]

    # Thread pools, libraries and compiled kernels come with the first products.
    small = {name: torch.zeros_like(tensor[:, :2]) for name, tensor in batch.items()}
    small["attention_mask"] += 1
    few_hidden = hidden[:, :2].detach().requires_grad_()
    few_weight, few_bias = weight[:64], None if bias is None else bias[:64]
    _loss(way, few_hidden, few_weight, few_bias, transform, small, beta).backward()

    hidden.requires_grad_()
    peak = watch_memory(device)
    _loss(way, hidden, weight, bias, transform, batch, beta).backward()
    return peak()


def _loss(
    way: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    transform: Transform,
    batch: dict[str, Tensor],
    beta: float,
) -> Tensor:
    if way == "full_logits":
        logits = F.linear(hidden, weight, bias)
        if transform != Transform():  # else it would make a copy that no model makes
            logits = transform(logits)
        return full_logits_loss(logits, batch, beta)
    return orpo_loss(
        hidden,
        weight,
        batch["targets"],
        nll_targets=batch["nll_targets"],
        beta=beta,
        bias=bias,
        logit_scale=transform.logit_scale,
        softcap=transform.softcap,
        preset="trl",
    ).loss


if __name__ == "__main__":
    print(peak_growth(sys.argv[1], torch.load(sys.argv[2])))
