"""Trains a list of set-ups in real processes (gloo, on the CPU) and brings home what each one arrived at."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from compatibility import measured
from torch import Tensor, nn
from wrapping import (
    LEARNING_RATE,
    STEPS,
    Trained,
    check_same,
    gradient_error,
    logits_loss,
    loss_error,
    make_batch,
    through,
    tiny_llama,
    train,
)

from orpo_kernels.integration.lm_head import ModelLogps, attach

WORLD = 2


@dataclass(frozen=True)
class Setup:
    """One way to train a tiny model in several processes.

    wrap: from the bare model, as `model` makes it, to what is called. attach_first: attach before wrapping.
    same_data: every rank works on the same batch (tensor parallelism). batch: (step, rank) -> batch.
    rounded: it computes in 16 bits, so full logits under the same wrapper set the measure.
    """

    wrap: Callable[[nn.Module], nn.Module]
    model: Callable[[], nn.Module] = tiny_llama
    attach_first: bool = False
    same_data: bool = False
    batch: Callable[[int, int], dict[str, Tensor]] = make_batch
    rounded: bool = False

    def loss_of(self, ours: ModelLogps | None, wrapped: nn.Module) -> Callable[[nn.Module, dict[str, Tensor]], Tensor]:
        return through(ours or attach(wrapped))

    def optimizer(self, wrapped: nn.Module) -> Any:
        return torch.optim.SGD(wrapped.parameters(), lr=LEARNING_RATE)

    def backward(self, wrapped: nn.Module, loss: Tensor) -> None:
        loss.backward()

    def step(self, wrapped: nn.Module, optimizer: Any) -> None:
        optimizer.step()
        optimizer.zero_grad()

    def parameters(self, wrapped: nn.Module) -> dict[str, Tensor]:
        """Whole copies of all parameters, by the names that they have in the bare model."""
        return {
            bare_name(name): (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
            for name, p in wrapped.named_parameters()
        }

    def train(self, rank: int, full_logits: bool = False) -> Trained:
        """Train as one rank. The gradients are what SGD took off the parameters in the first step."""
        model = self.model()
        ours = attach(model) if self.attach_first else None
        wrapped = self.wrap(model)
        loss_of = logits_loss if full_logits else self.loss_of(ours, wrapped)
        optimizer = self.optimizer(wrapped)
        before = self.parameters(wrapped)
        losses, gradients = [], {}

        def note(loss: Tensor) -> None:
            mean = loss.detach().double()
            dist.all_reduce(mean)
            losses.append(mean.item() / WORLD)

        for step in range(STEPS):
            loss = loss_of(wrapped, self.batch(step, 0 if self.same_data else rank))
            self.backward(wrapped, loss)
            self.step(wrapped, optimizer)
            if step == 0:
                after = self.parameters(wrapped)
                gradients = {name: (p - after[name]) / LEARNING_RATE for name, p in before.items()}
            note(loss)
        with torch.no_grad():
            note(loss_of(wrapped, self.batch(0, 0 if self.same_data else rank)))
        return Trained(losses, gradients)

    def expected(self) -> Trained:
        """One process on full logits; a parameter without a gradient does not move."""
        model = self.model()
        trained = train(model, ranks=1 if self.same_data else WORLD, batch=self.batch)
        still = {n: torch.zeros_like(p) for n, p in model.named_parameters() if n not in trained.gradients}
        return trained._replace(gradients=trained.gradients | still)


def bare_name(name: str) -> str:
    for part in ("module.", "_fsdp_wrapped_", "_orig_mod."):
        name = name.replace(part, "")
    return name


def results_of(work: Callable, request: pytest.FixtureRequest, folder: Path) -> Callable[[str], Any]:
    """Start the processes once, through all set-ups that the tests of this module ask for.

    work: a module's function (rank, names, folder) that calls `work_through`.
    Returns a look-up by name, which fails with the processes' error for a set-up that they did not get through.
    """
    names = [
        item.callspec.params["name"]
        for item in request.session.items
        if item.module is request.module and hasattr(item, "callspec")
    ]
    failure = ""
    try:
        mp.spawn(work, (names, folder), nprocs=WORLD)
    except mp.ProcessRaisedException as error:
        failure = str(error)

    def result(name: str) -> dict[str, Trained]:
        file = folder / f"{name}.pt"
        assert file.exists(), failure
        return {kind: Trained(*values) for kind, values in torch.load(file).items()}

    return result


def check_setup(setup: Setup, found: dict[str, Trained]) -> None:
    right = setup.expected()
    if setup.rounded:
        errors = {"losses": loss_error(found["head"], right), "gradients": gradient_error(found["head"], right)}
        measured(**errors)
        assert errors["losses"] <= 2 * loss_error(found["logits"], right)
        assert errors["gradients"] <= 2 * gradient_error(found["logits"], right)
    else:
        check_same(found["head"], right)


def work_through(setups: Mapping[str, Setup], rank: int, names: Sequence[str], folder: Path) -> None:
    """Train the named set-ups one after the other; rank 0 writes `folder/NAME.pt` as each one ends."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29512")
    dist.init_process_group(
        "gloo", f"file://{folder}/store", timeout=datetime.timedelta(seconds=60), rank=rank, world_size=WORLD
    )
    for name in names:
        setup = setups[name]
        results = {"head": setup.train(rank)}
        if setup.rounded:
            results["logits"] = setup.train(rank, full_logits=True)
        if rank == 0:
            torch.save({kind: tuple(trained) for kind, trained in results.items()}, folder / f"{name}.pt")
    dist.destroy_process_group()
