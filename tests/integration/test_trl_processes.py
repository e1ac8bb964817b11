"""DPO with our head in two processes (gloo, CPU), by TRL's own trainer, against stock TRL in one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import results_of
from torch import Tensor, nn
from wrapping import Trained, check_same

for name in ("datasets", "peft", "trl"):
    pytest.importorskip(name, reason=f"{name} is not installed")
from accelerate.state import AcceleratorState  # noqa: E402
from peft import LoraConfig  # noqa: E402
from trl_runs import LORA, llama, make, run  # noqa: E402

from orpo_kernels.integration.trl import use  # noqa: E402

OPTIONS = {"max_steps": 3, "learning_rate": 0.1}
FSDP2 = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "reshard_after_forward": True}
SETUPS: dict[str, dict[str, Any]] = {
    "DDP": {},
    "DDP, LoRA": {"peft": LoraConfig(**LORA, target_modules=["q_proj"])},
    "DDP, shared rows": {"packing": True},
    "FSDP2": {"fsdp": "full_shard auto_wrap", "fsdp_config": FSDP2},
    "FSDP2, shared rows": {"fsdp": "full_shard auto_wrap", "fsdp_config": FSDP2, "packing": True},
}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def trained(trainer: Any) -> Trained:
    """Its losses, and what all steps together took off the weights."""
    before = weights(trainer.model)
    losses = [step["loss"] for step in run(trainer).steps]
    after = weights(trainer.accelerator.unwrap_model(trainer.model))
    return Trained(losses, {name: start - after[name] for name, start in before.items()})


def work(rank: int, names: list[str], folder: Path) -> None:
    """One set-up after the other: a process takes longer to start than to train."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", CI="1")
    clean = dict(os.environ)
    for at, name in enumerate(names):
        os.environ["MASTER_PORT"] = str(29547 + at)  # the one before may still listen
        options = dict(SETUPS[name])
        with use(packing=options.pop("packing", False)):
            trainer = make(
                "DPO", llama(), folder / f"{rank} {name}", per_device_train_batch_size=2, **OPTIONS, **options
            )
        found = trained(trainer)
        if rank == 0:
            torch.save({"ours": tuple(found)}, folder / f"{name}.pt")
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.end_training()
        AcceleratorState._reset_state(True)
        os.environ.clear()  # transformers leaves FSDP's configuration there
        os.environ.update(clean)


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return results_of(work, request, tmp_path_factory.mktemp("trl"))


@pytest.mark.shows(
    "Trainers",
    "TRL `DPOTrainer` under {name}",
    "2 processes (gloo, CPU), 3 steps, against stock TRL in 1 process: losses and weights",
)
@pytest.mark.parametrize("name", SETUPS)
def test_two_processes_are_one(name: str, results: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CI", "1")
    peft = SETUPS[name].get("peft")
    right = trained(make("DPO", llama(), tmp_path, per_device_train_batch_size=4, **OPTIONS, peft=peft))
    check_same(results(name)["ours"], right)
