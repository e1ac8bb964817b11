"""Rows with each prompt once under DDP and FSDP, in two processes, against one process on full padded logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest
from processes import Setup, check_setup, results_of, work_through
from test_wrappers import Fsdp1, ddp, fsdp1, fsdp2
from torch import Tensor, nn
from wrapping import checkpointed

from orpo_kernels.integration.lm_head import ModelLogps
from orpo_kernels.integration.packing.gate import LayoutGate, model_inputs
from orpo_kernels.integration.packing.layout import pack_pairs
from orpo_kernels.objective import orpo_objective_flat

PROMPT = 3  # tokens, in `wrapping.make_batch`

SETUPS: dict[str, Setup] = {
    "DDP": Setup(ddp()),
    "DDP, attached first, reentrant checkpoints": Setup(ddp(), checkpointed(reentrant=True), attach_first=True),
    "FSDP1": Fsdp1(fsdp1()),
    "FSDP2": Setup(fsdp2("root")),
    "FSDP2, head in its own group, checkpoints": Setup(fsdp2("own"), checkpointed(reentrant=False)),
}


def pairs_of(batch: dict[str, Tensor]) -> list[dict[str, Any]]:
    sequences = [ids[mask == 1].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    half = len(sequences) // 2
    return [
        {
            "chosen_input_ids": chosen,
            "chosen_prompt_length": PROMPT,
            "rejected_input_ids": rejected,
            "rejected_prompt_length": PROMPT,
        }
        for chosen, rejected in zip(sequences[:half], sequences[half:], strict=True)
    ]


def through_shared_rows(ours: ModelLogps) -> Callable[[nn.Module, dict[str, Tensor]], Tensor]:
    """A loss like `wrapping.through`, of the same pairs with each prompt once."""
    gate = LayoutGate(ours)

    def loss(model: nn.Module, padded: dict[str, Tensor]) -> Tensor:
        batch = gate.admit(pack_pairs(pairs_of(padded), True), model)
        layout = batch["layout"]
        assert layout.name == "shared", gate.reasons
        logps, _ = ours.logps(batch["targets"], rows=batch["rows"], model=model, use_cache=False, **model_inputs(batch))
        return orpo_objective_flat(logps, batch["pair"], batch["kind"], num_pairs=layout.num_pairs, preset="trl").loss

    return loss


def work(rank: int, names: list[str], folder: Path) -> None:
    processes.through = through_shared_rows
    work_through(SETUPS, rank, names, folder)


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return results_of(work, request, tmp_path_factory.mktemp("layouts"))


@pytest.mark.shows("Layouts", "shared rows under {name}", "2 processes (gloo, CPU) against 1 process on full logits")
@pytest.mark.parametrize("name", SETUPS)
def test_shared_rows_under(name: str, results: Any):
    check_setup(SETUPS[name], results(name))
