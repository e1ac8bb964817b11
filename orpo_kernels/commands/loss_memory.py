"""Peak memory of head and loss, forward and backward, by full logits and without them.

Each way runs in a process of its own, so that neither finds memory that the other has left behind. On a GPU the
peak is the allocator's; elsewhere a thread reads the process's resident set every millisecond. Only growth
counts: the hidden states, the head's weight and the libraries are in memory, and small products have been done,
before the reading starts. Both peaks include the gradient of the hidden states.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from orpo_kernels.commands.compare import full_logits_loss
from orpo_kernels.integration.transform import Transform
from orpo_kernels.loss import orpo_loss

WAYS = ("full_logits", "orpo_kernels")
_INTERVAL_S = 1e-3


def measure(
    hidden: Tensor, head: torch.nn.Linear, transform: Transform, batch: dict[str, Tensor], beta: float
) -> dict[str, Any]:
    """Peak growth in bytes of each of `WAYS`, and how it was measured.

    hidden: [2B, T, D], what the head was given for `batch`; transform: what the model does to its logits.

    Raises RuntimeError with the process's own message if one fails.
    """
    case = {
        "hidden": hidden.detach().cpu(),
        "weight": head.weight.detach().cpu(),
        "bias": None if head.bias is None else head.bias.detach().cpu(),
        "logit_scale": transform.logit_scale,
        "softcap": transform.softcap,
        "batch": {name: tensor.cpu() for name, tensor in batch.items()},
        "beta": beta,
        "device": str(hidden.device),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.pt"
        torch.save(case, path)
        peaks = {f"{way}_bytes": _in_own_process(way, path) for way in WAYS}
    what = (
        "torch.cuda.max_memory_allocated"
        if hidden.device.type == "cuda"
        else f"resident set, sampled every {_INTERVAL_S * 1e3:g} ms"
    )
    return {
        **peaks,
        "one_logits_tensor_bytes": hidden.shape[0] * hidden.shape[1] * head.weight.shape[0] * 4,
        "method": f"growth of the {what}, over head + loss, forward and backward, in a fresh process each",
    }


def _in_own_process(way: str, path: Path) -> int:
    done = subprocess.run(
        [sys.executable, "-m", "orpo_kernels.commands.loss_memory", way, str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {way} failed: {done.stderr.strip() or done.returncode}")
    return json.loads(done.stdout)


def peak_growth(way: str, case: dict[str, Any]) -> int:
    """Bytes by which memory grew at most while `way` computed loss and gradient, in this process."""
    device = torch.device(case["device"])
    batch = {name: tensor.to(device) for name, tensor in case["batch"].items()}
    hidden, weight = case["hidden"].to(device), case["weight"].to(device)
    bias = None if case["bias"] is None else case["bias"].to(device)

    def loss_and_gradient(length: int, vocab_size: int) -> None:
        part = {name: tensor[:, :length] for name, tensor in batch.items()}
        if vocab_size < len(weight):
            part = {name: tensor.clamp(max=vocab_size - 1) for name, tensor in part.items()}
        head = weight[:vocab_size], None if bias is None else bias[:vocab_size]
        _loss(way, case, hidden[:, :length].detach().requires_grad_(), *head, part).backward()

    # Thread pools, libraries and compiled kernels come with the first products.
    loss_and_gradient(2, min(64, len(weight)))
    with _Peak(device) as peak:
        loss_and_gradient(hidden.shape[1], len(weight))
    return peak.growth


def _loss(
    way: str, case: dict[str, Any], hidden: Tensor, weight: Tensor, bias: Tensor | None, batch: dict[str, Tensor]
) -> Tensor:
    if way == "full_logits":
        logits = F.linear(hidden, weight, bias)
        transform = Transform(case["logit_scale"], case["softcap"])
        if transform != Transform():
            logits = transform(logits)
        return full_logits_loss(logits, batch, case["beta"])
    return orpo_loss(
        hidden,
        weight,
        batch["targets"],
        nll_targets=batch["nll_targets"],
        beta=case["beta"],
        bias=bias,
        logit_scale=case["logit_scale"],
        softcap=case["softcap"],
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
    print(json.dumps(peak_growth(sys.argv[1], torch.load(sys.argv[2]))))
