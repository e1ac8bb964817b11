"""What the trainers tell of memory: before the first step, and where it ran out."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trainers import OWN, make, pairs

from orpo_kernels import autograd
from orpo_kernels.integration.training.memory_told import MemoryTold

KINDS = (OWN, "trl", "cpo")


@pytest.mark.parametrize(
    ("kind", "where"),
    [(OWN, "logps_forward"), (OWN, "hidden_gradient"), ("trl", "logps_forward"), ("cpo", "hidden_gradient")],
)
def test_out_of_memory_names_what_to_change(kind: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trainer = make(kind, tmp_path, pairs(8), gradient_checkpointing=False)
    real, calls = getattr(autograd, where), []

    def boom(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) > 3:  # not in what is tried on the first batch
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(*args, **options)

    monkeypatch.setattr(autograd, where, boom)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        trainer.train()
    message = str(caught.value)
    # Libraries know an out-of-memory by its first words.
    assert message.startswith("CUDA out of memory.")
    assert "in the log-probabilities of the scored tokens" in message
    assert "Estimated: about" in message
    assert "with full logits" in message
    assert "packing=True" in message or "per_device_train_batch_size=1" in message
    assert "scratch_bytes" in message


def test_out_of_memory_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trainer = make(OWN, tmp_path, pairs(4))

    def boom(*args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(trainer, "compute_loss", boom)
    with pytest.raises(torch.OutOfMemoryError, match="This was in the model") as caught:
        trainer.train()
    assert "scratch_bytes" not in str(caught.value)


def test_who_catches_an_out_of_memory_gets_it_as_it_is():
    class Base:
        def training_step(self) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    class Trainer(MemoryTold, Base):
        args = SimpleNamespace(auto_find_batch_size=True)

    with pytest.raises(torch.OutOfMemoryError) as caught:
        Trainer().training_step()
    assert str(caught.value) == "CUDA out of memory."


@pytest.mark.parametrize("kind", KINDS)
def test_an_estimate_before_the_first_step(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    trainer = make(kind, tmp_path, pairs(8))
    caplog.set_level(logging.INFO, "orpo_kernels")
    caplog.clear()
    trainer._tell_memory(1 << 40)
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith("memory: about")
    assert f"2 x {max(row['length'] for row in trainer.train_dataset)} tokens" in said
    caplog.clear()
    trainer._tell_memory(1 << 10)
    warning = next(record for record in caplog.records if record.levelno == logging.WARNING).getMessage()
    assert "0 MiB are free" in warning
    assert "Change " in warning


def test_a_gpu_is_asked(monkeypatch: pytest.MonkeyPatch):
    """What is free counts what torch holds and does not use; weights that are there already are not needed twice."""
    told: list[tuple[int, ...]] = []

    class Base:
        def train(self) -> str:
            return "trained"

    class Trainer(MemoryTold, Base):
        args = SimpleNamespace(device=torch.device("cuda"))
        model = object()

        def _tell_memory(self, free: int, held: int = 0) -> None:
            told.append((free, held))

    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 30)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    assert Trainer().train() == "trained"
    assert told == [(120, 30)]
    Trainer.args = SimpleNamespace(device=torch.device("cpu"))
    assert Trainer().train() == "trained"
    assert len(told) == 1


def test_a_model_without_an_estimate_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any):
    from orpo_kernels.integration.memory import footprint

    def refuse(run: Any) -> Any:
        raise ValueError("it reads numbers")

    monkeypatch.setattr(footprint, "footprint", refuse)
    trainer = make(OWN, tmp_path, pairs(4))
    caplog.set_level(logging.INFO, "orpo_kernels")
    trainer._tell_memory(1 << 10)
    assert "no estimate of the run's memory: it reads numbers" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_the_run_is_the_trainers(tmp_path: Path):
    batch = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    trainer = make(OWN, tmp_path, pairs(8), packing=False, scratch_bytes=1 << 20, optim="sgd", **batch)
    trainer.model.get_input_embeddings().weight.requires_grad_(False)
    run = trainer._memory_run()
    assert (run.pairs, run.layout, run.optim, run.accumulates, run.device) == (3, "padded", "sgd", True, "cpu")
    assert run.length == max(row["length"] for row in trainer.train_dataset)
    assert run.plan.scratch_bytes == 1 << 20
    assert not run.casts
    assert "model.embed_tokens.weight" not in run.trains
    assert "lm_head.weight" in run.trains
