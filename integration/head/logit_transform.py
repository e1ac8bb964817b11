"""What a model does to its logits after the head, found out by sending seven known numbers through it.

Models scale their logits (Cohere, Granite, Falcon-H1), soft-cap them (Gemma 2), or leave them alone. A list of
model names would always be out of date; the head returns `PLACEHOLDERS` in place of logits, and what comes out at
the model's end tells which it was:

    identity      y = x
    scale         y = s x
    soft-cap      y = c tanh(s x / c)

Anything else is an error that shows the numbers. The placeholders are small integers, exact in every dtype, and reach
far enough that a cap of ordinary size saturates at the largest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

PLACEHOLDERS = (-300.0, -20.0, -1.0, 0.0, 1.0, 20.0, 300.0)


class Transform(NamedTuple):
    """f(x) = logit_scale * x, or softcap * tanh(logit_scale * x / softcap)."""

    logit_scale: float = 1.0
    softcap: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.softcap is None:
            return x * self.logit_scale
        return self.softcap * torch.tanh(x * (self.logit_scale / self.softcap))


def placeholder_values(like: Tensor, dtype: torch.dtype) -> Tensor:
    """PLACEHOLDERS on the device of `like`: [7]."""
    return torch.tensor(PLACEHOLDERS, dtype=dtype, device=like.device)


def infer_transform(seen: Sequence[float], dtype: torch.dtype) -> Transform:
    """The transform that turns PLACEHOLDERS into `seen` (7 numbers, read in `dtype`).

    Raises ValueError that shows both where none of the three does, or where a transform was rounded to 16 bits
    and so cannot be told exactly.
    """
    x = torch.tensor(PLACEHOLDERS, dtype=torch.float64)
    y = torch.tensor(list(seen), dtype=torch.float64)
    # A few operations in the output's dtype; 16-bit outputs are only trusted to say "identity".
    tolerance = 16 * torch.finfo(dtype).eps
    if torch.equal(x, y):
        return Transform()
    if dtype in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"the model changes its logits after the head and returns them in {dtype}, too coarse to tell how: "
            f"{PLACEHOLDERS} became {list(seen)}. Load the model so that its logits are fp32"
        )
    scale = float(y[-1] / x[-1])
    if scale and _agree(y, x * scale, tolerance):
        return Transform(scale)
    found = _fit_softcap(float(y[4]), float(y[5]), float(y[6]))
    if found is not None and _agree(y, found(x), tolerance):
        return found
    raise ValueError(
        f"the model changes its logits after the head in a way that is neither a scale nor a soft-cap: {PLACEHOLDERS} "
        f"became {list(seen)}. This model's loss cannot be computed without its logits"
    )


def check_untrained(logits: Tensor) -> None:
    """Raises RuntimeError where a parameter that trains had a part in making `logits` from the placeholders.

    A scale that is learned, say: no gradient would ever reach it.
    """
    nodes, seen = [logits.grad_fn], set()
    while nodes:
        node = nodes.pop()
        # Behind a function written in Python lies more than the placeholders' path: our fork, a wrapper's hook.
        if node is None or node in seen or isinstance(node, torch.autograd.function.BackwardCFunction):
            continue
        seen.add(node)
        parameter = getattr(node, "variable", None)
        if parameter is not None:
            raise RuntimeError(
                f"the model changes its logits after the head by a parameter that trains, {tuple(parameter.shape)}: "
                "its gradient needs the logits. Freeze it (requires_grad_(False)); its value is then taken exactly"
            )
        nodes.extend(following for following, _ in node.next_functions)


def _agree(y: Tensor, expected: Tensor, tolerance: float) -> bool:
    return bool(torch.allclose(y, expected, rtol=tolerance, atol=tolerance * 1e-2))


def _fit_softcap(y_1: float, y_20: float, y_300: float) -> Transform | None:
    """c and s from the values at 1, 20 and 300.

    For a given c the value at 1 fixes s = c atanh(y_1 / c); the value predicted at 300 grows with c, so c is
    found by bisection. Where the cap saturates at 300 this is c = y_300 at once.
    """
    if not (0 < y_1 < y_20 <= y_300 and math.isfinite(y_300)):
        return None

    def predicted(c: float) -> float:
        return c * math.tanh(300.0 * math.atanh(y_1 / c))

    low, high = y_300, y_300
    while predicted(high) < y_300:
        high *= 2.0
        if high > 1e8:
            return None
    for _ in range(200):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if predicted(middle) < y_300 else (low, middle)
    softcap = _short(high)
    return Transform(_short(softcap * math.atanh(y_1 / softcap)), softcap)


def _short(value: float) -> float:
    """The value with the noise of fp32 arithmetic removed: a config says 30.0, not 30.0000017."""
    nearest = float(f"{value:.4g}")
    return nearest if abs(nearest - value) <= 2e-6 * abs(value) else value
