"""Peak memory of head and loss, forward and backward, by full logits and without them.

Each way runs in a process of its own, so that neither finds memory that the other has left behind. On a GPU
the peak is the allocator's; elsewhere a thread reads the process's resident set every millisecond. Only growth
counts: the hidden states, the head's weight and the libraries are in memory, and small products have been
done, before the reading starts. Both peaks include the gradient of the hidden states.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orpo_kernels.commands.compare import full_logits_loss
from orpo_kernels.integration.transform import Transform
from orpo_kernels.loss import orpo_loss

WAYS = ("full_logits", "orpo_kernels")
_INTERVAL_S = 1e-3


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
    what = (
        "the allocator's peak (torch.cuda.max_memory_allocated)"
        if hidden.device.type == "cuda"
        else f"the resident set, read every {_INTERVAL_S * 1e3:g} ms"
    )
    return {
        **peaks,
        "one_logits_tensor_bytes": 4 * hidden[..., 0].numel() * head.out_features,
        "method": f"growth of {what}, in a fresh process for each way; includes the gradient of the hidden states",
    }


def _in_own_process(way: str, path: Path) -> int:
    command = [sys.executable, "-m", "orpo_kernels.commands.loss_memory", way, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {way} failed ({done.returncode}): {done.stderr.strip()}")
    return int(done.stdout)


def peak_growth(way: str, case: dict[str, Any]) -> int:
    """Bytes by which this process's memory grew at most while `way` computed loss and gradient."""
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
    with _Peak(device) as peak:
        _loss(way, hidden, weight, bias, transform, batch, beta).backward()
    return peak.growth


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


class _Peak:
    """Memory growth over a `with` block: `growth` in bytes, at its highest."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.growth = 0
        self._process = psutil.Process()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> _Peak:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start = torch.cuda.memory_allocated(self.device)
        else:
            self._start = self._process.memory_info().rss
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.growth = torch.cuda.max_memory_allocated(self.device) - self._start
        else:
            self._stop.set()
            self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(_INTERVAL_S):
            self.growth = max(self.growth, self._process.memory_info().rss - self._start)


if __name__ == "__main__":
    print(peak_growth(sys.argv[1], torch.load(sys.argv[2])))
