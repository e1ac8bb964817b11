"""`orpo-kernels check`: what this machine will use, why, and the proof that it is right.

The self-test computes log-probabilities and gradients with the backend a call would choose, on every device and
dtype, and compares them with float64 on the same inputs. The limits are the package's promises, except where
PyTorch's own full logits in that dtype are more than half as far off: then it is twice their error. (Not so for
log-probabilities of 16-bit inputs: full logits lose there what is kept here.)
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from orpo_kernels.bench.machine import installed_version
from orpo_kernels.kernels.dispatch import why_not_triton
from orpo_kernels.kernels.interface import Head
from orpo_kernels.kernels.naive import naive_logps
from orpo_kernels.linear_logps import linear_logps

# Largest absolute error of a log-probability, largest relative error (norm) of a gradient.
_PROMISED = {
    torch.float64: (1e-11, 1e-11),
    torch.float32: (1e-4, 2e-5),
    torch.bfloat16: (1e-4, 4e-3),
    torch.float16: (1e-4, 4e-3),
}
_NEEDED = {"torch": "2.11", "transformers": "5.17"}
_OPTIONAL = ("triton", "accelerate", "peft", "trl", "datasets", "liger-kernel", "deepspeed", "bitsandbytes")


class Line(NamedTuple):
    passed: bool | None  # None: for information
    name: str
    text: str


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "check",
        help="show what this machine will use and prove it against float64",
        description="Show devices, backends and versions, and compare every dtype's results with float64. "
        "Exit code 1 if a line fails.",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the self-test's random inputs (default: 0)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    failed = False
    for line in lines(args.seed):
        mark = {True: "pass", False: "FAIL", None: "    "}[line.passed]
        print(f"{mark}  {line.name:28}{line.text}", flush=True)
        failed |= line.passed is False
    return int(failed)


def lines(seed: int = 0) -> Iterator[Line]:
    """Everything `check` says, line by line."""
    threads = torch.get_num_threads()
    yield Line(None, "python", f"{platform.python_version()} on {platform.machine()}, {threads} threads")
    for package, least in _NEEDED.items():
        found = installed_version(package)
        right = found is not None and _numbers(found) >= _numbers(least)
        yield Line(right, package, f"{found or 'not installed'} (needs {least} or later)")
    for package in _OPTIONAL:
        yield Line(None, package, installed_version(package) or "not installed (optional)")
    for device in _devices():
        yield Line(None, f"device {device}", _device_name(device))
        for dtype in _PROMISED:
            if dtype == torch.float64 and device.type == "mps":
                continue
            yield _self_test(device, dtype, seed)


def _self_test(device: torch.device, dtype: torch.dtype, seed: int) -> Line:
    generator = torch.Generator().manual_seed(seed)
    tokens, hidden_size, vocab_size = 96, 128, 1999
    hidden = torch.randn(tokens, hidden_size, generator=generator).to(device, dtype)
    weight = (torch.randn(vocab_size, hidden_size, generator=generator) * 0.3).to(device, dtype)
    targets = torch.randint(vocab_size, (tokens,), generator=generator).to(device)
    targets[::5] = -100
    upstream = torch.randn(tokens, generator=generator).to(device)

    exact = _results(naive_logps, hidden.cpu().double(), weight.cpu().double(), targets.cpu(), upstream.cpu().double())
    torch_own = _errors(_results(naive_logps, hidden, weight, targets, upstream), exact)
    ours = _errors(_results(linear_logps, hidden, weight, targets, upstream), exact)
    limits = [max(promised, 2 * own) for promised, own in zip(_PROMISED[dtype], torch_own, strict=True)]
    if dtype.itemsize == 2:
        limits[0] = _PROMISED[dtype][0]
    why = why_not_triton(Head(weight, None, 1.0, None, dtype))
    name = str(dtype).removeprefix("torch.")
    return Line(
        all(error <= limit for error, limit in zip(ours, limits, strict=True)),
        f"  {name} {'triton' if why is None else 'torch'}",
        f"log-prob off by {ours[0]:.1e} (full logits {torch_own[0]:.1e}), gradients by {ours[1]:.1e} "
        f"({torch_own[1]:.1e})" + ("" if why is None else f"; {why}"),
    )


def _results(function, hidden: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor) -> list[Tensor]:
    """Log-probabilities, gradients of hidden and weight."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logps = function(hidden, weight, targets)
    return [logps.detach(), *torch.autograd.grad((logps * upstream).sum(), (hidden, weight))]


def _errors(found: list[Tensor], exact: list[Tensor]) -> tuple[float, float]:
    logps, *gradients = (tensor.cpu().double() for tensor in found)
    relative = [torch.linalg.norm(g - e) / torch.linalg.norm(e) for g, e in zip(gradients, exact[1:], strict=True)]
    # Tensors' own max, which a NaN does not pass by.
    return float((logps - exact[0]).abs().max()), float(torch.stack(relative).max())


def _devices() -> list[torch.device]:
    found = [torch.device("cpu")]
    if torch.cuda.is_available():
        found += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append(torch.device("mps"))
    return found


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return platform.processor() or platform.machine()


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
