"""Metrics of the steps between two logs, in memory that does not grow with their number.

They stay on their device until they are read: no step waits for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from orpo_kernels.presets import Preset

from ..metrics import objective_of


class RunningMetrics:
    """`metrics.pair_metrics`, without `loss`, of all pairs since the last reading, over all processes."""

    def __init__(self, *, beta: float, preset: Preset) -> None:
        self.beta, self.preset = beta, preset
        self._names: list[str] = []
        self._totals: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Count one batch of this process. rows: [B, 9] of `metrics.pair_table`."""
        output, logits, _ = objective_of(rows, beta=self.beta, preset=self.preset)
        means = output.metrics(**logits)
        # What each is a mean over; a batch may have none of it.
        counts = dict.fromkeys(means, output.valid_pairs) | {"nll_loss": output.nll_count}
        pairs = torch.full_like(output.valid_pairs, len(rows))
        counts |= {name: pairs for name in means if name.startswith("logits/")}
        weights = torch.stack([counts[name] for name in means]).to(rows.dtype)
        totals = torch.stack([torch.stack(list(means.values())) * weights, weights])
        self._names = list(means)
        self._totals = totals if self._totals is None else self._totals + totals

    def clear(self) -> None:
        """Begin anew."""
        self._totals = None

    def read(self, accelerator: Any) -> dict[str, float]:
        """What has been counted, and begin anew; {} where nothing has. All processes make the call."""
        if self._totals is None:
            return {}
        sums, counts = accelerator.reduce(self._totals, "sum").cpu()
        self.clear()
        metrics = dict(zip(self._names, (sums / counts.clamp(min=1)).tolist(), strict=True))
        # NaN where the model has no mean logit.
        return {name: value for name, value in metrics.items() if value == value or not name.startswith("logits/")}


@contextmanager
def whole_batches(accelerator: Any) -> Iterator[None]:
    """Let `gather_for_metrics` cut nothing: a step's micro-batches are fetched ahead, and it would cut each one to what
    the epoch's last holds."""
    accelerator.gather_for_metrics = accelerator.gather
    try:
        yield
    finally:
        del accelerator.gather_for_metrics


class RunningMean(list[Any]):
    """A list that keeps the mean of what was appended, for code that appends a number a step and takes the mean."""

    def __init__(self) -> None:
        super().__init__()
        self._count = 0

    def append(self, value: Any) -> None:
        self._count += 1
        self[:] = [value if self._count == 1 else self[0] + (value - self[0]) / self._count]
