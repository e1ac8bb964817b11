"""Running metrics are those of all pairs, however these came in batches."""

from __future__ import annotations

import math

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st

from orpo_kernels.integration.metrics import pair_metrics
from orpo_kernels.integration.training.running import RunningMean, RunningMetrics
from orpo_kernels.presets import get_preset


@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    preset=st.sampled_from(["trl", "llama_factory", "paper"]),
    empty=st.sets(st.integers(0, 29)),
    capped=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
@pytest.mark.filterwarnings("ignore:.*empty completion")
def test_metrics_of_all_pairs(sizes: list[int], preset: str, empty: set[int], capped: bool, seed: int) -> None:
    """`empty`: pairs without a rejected completion. `capped`: logits are unknown."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(sizes)
    rows = torch.rand(count, 9, generator=generator, dtype=torch.float64)
    rows[:, [1, 3, 5]] = torch.randint(1, 9, (count, 3), generator=generator).double()
    rows[:, [0, 2, 4]] *= -rows[:, [1, 3, 5]]
    gone = [pair for pair in empty if pair < count]
    rows[gone, 2:4] = 0
    if capped:
        rows[:, 6:8] = torch.nan
    running = RunningMetrics(beta=0.3, preset=get_preset(preset))
    for batch in rows.split(sizes):
        running.add(batch)
    expected = pair_metrics(rows, beta=0.3, preset=get_preset(preset))
    del expected["loss"]
    assert running.read(Accelerator(cpu=True)) == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert running.read(Accelerator(cpu=True)) == {}


@given(values=st.lists(st.floats(-1e3, 1e3), min_size=1))
def test_a_list_of_one_mean(values: list[float]) -> None:
    mean = RunningMean()
    for value in values:
        mean.append(value)
    assert len(mean) == 1
    assert math.isclose(mean[0], sum(values) / len(values), rel_tol=1e-9, abs_tol=1e-9)
