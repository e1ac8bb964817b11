"""Micro-benchmarks of what surrounds the head: the objective, and finding the scored tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from orpo_kernels.loss import orpo_from_logps
from orpo_kernels.tokens import select_scored

PAIRS, LENGTH, VOCAB = 8, 1024, 32000


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    targets = torch.randint(VOCAB, (2 * PAIRS, LENGTH)).masked_fill_(torch.rand(2 * PAIRS, LENGTH) < 0.25, -100)
    return targets, -torch.rand(2 * PAIRS, LENGTH) * (targets != -100)


def test_objective(benchmark: Any, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    targets, logps = batch
    logps.requires_grad_()

    def step() -> None:
        logps.grad = None
        orpo_from_logps(logps, targets, nll_targets=targets[:PAIRS], preset="trl").loss.backward()

    benchmark(step)


def test_select_scored(benchmark: Any, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    benchmark(lambda: select_scored(batch[0], VOCAB, batch[0].numel(), ignore_index=-100))
