"""LLaMA-Factory's own ORPO run beside the one with our trainer: arguments to last step.

It needs an older TRL than the test environment has: `make test-frameworks` makes one for it and runs this file there.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from frameworks import PAIRS, Witness, check_same, fresh_import, gemma2, llama, unmet, witnessed, write_model

NAME = "orpo_kernels.integration.llama_factory"
WITHOUT = unmet("llamafactory>=0.9.5,<0.9.6", "trl>=0.27,<0.29", "transformers<5.23")
needs_llama_factory = pytest.mark.skipif(bool(WITHOUT), reason=WITHOUT)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("DISABLE_VERSION_CHECK", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    rows = [{"instruction": pair["prompt"], "input": ""} | pair for pair in PAIRS]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    columns = {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}
    dataset = {"pairs": {"file_name": "pairs.json", "ranking": True, "columns": columns}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(dataset))
    return tmp_path


def arguments(folder: Path, **more: Any) -> dict[str, Any]:
    settings = {
        "stage": "dpo",
        "pref_loss": "orpo",
        "do_train": True,
        "finetuning_type": "full",
        "model_name_or_path": str(folder / "model"),
        "dataset": "pairs",
        "dataset_dir": str(folder),
        "template": "default",
        "cutoff_len": 128,
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 2,
        "max_steps": 5,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "seed": 1,
    }
    return settings | more


@pytest.fixture
def runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Witness, Witness]]:
    """Trains twice: with the trainer that importing our module puts in place, and with LLaMA-Factory's own."""
    ours = importlib.import_module(NAME)
    dpo = importlib.import_module("llamafactory.train.dpo.trainer")
    tuner = importlib.import_module("llamafactory.train.tuner")
    assert dpo.CustomDPOTrainer is ours.ORPOTrainer

    def both(**options: Any) -> tuple[Witness, Witness]:
        witnesses = []
        for at, trainer in enumerate(ours.ORPOTrainer.__mro__[:2]):
            monkeypatch.setattr(dpo, "CustomDPOTrainer", trainer)
            with witnessed() as witness:
                tuner.run_exp(arguments(folder, output_dir=str(folder / f"out{at}"), **options))
            witnesses.append(witness)
        return witnesses[0], witnesses[1]

    return both


LORA = {"finetuning_type": "lora", "lora_rank": 4, "lora_target": "q_proj,v_proj"}


@needs_llama_factory
@pytest.mark.shows(
    "Trainers",
    "LLaMA-Factory, {id}",
    "5 steps: losses, gradient norms, every metric and the first gradients against its own",
)
@pytest.mark.parametrize(
    ("build", "options"),
    [
        pytest.param(llama, {}, id="llama"),
        pytest.param(llama, {"gradient_accumulation_steps": 2, "pref_beta": 0.5}, id="accumulation"),
        pytest.param(llama, {"disable_gradient_checkpointing": True}, id="no checkpointing"),
        pytest.param(llama, LORA, id="LoRA"),
        pytest.param(llama, LORA | {"additional_target": "lm_head"}, id="LoRA, head saved by PEFT"),
        pytest.param(llama, {"val_size": 0.5, "eval_strategy": "steps", "eval_steps": 2}, id="evaluation"),
        pytest.param(llama, {"pref_ftx": 0.5}, id="pref_ftx"),
        pytest.param(gemma2, {}, id="soft-cap"),
    ],
)
def test_five_steps(build: Callable[[], Any], options: dict[str, Any], runs: Any, folder: Path):
    write_model(build, folder / "model")
    found, expected = runs(**options)
    assert sum("loss" in logs for logs in expected.logs) == 5
    assert any("eval_loss" in logs for logs in expected.logs) == ("val_size" in options)
    left_out = ("logits/chosen", "logits/rejected") if build is gemma2 else ()
    # LLaMA-Factory's has pref_ftx / pref_beta times the SFT loss in it.
    check_same(found, expected, ("odds_ratio_loss",) if "pref_ftx" in options else left_out)


@needs_llama_factory
def test_other_losses_stay(runs: Any, folder: Path):
    write_model(llama, folder / "model")
    found, expected = runs(pref_loss="simpo", max_steps=2)
    assert found.widths == expected.widths != {7}
    assert [logs["loss"] for logs in found.logs] == [logs["loss"] for logs in expected.logs]


@needs_llama_factory
def test_length_weights_are_refused(runs: Any, folder: Path):
    write_model(llama, folder / "model")
    with pytest.raises(ValueError, match=r"ld_alpha is 0.5: .* leave it out"):
        runs(ld_alpha=0.5)


@needs_llama_factory
def test_the_command(runs: Any, folder: Path):
    write_model(llama, folder / "model")
    _, expected = runs(max_steps=2)
    file = folder / "train.yaml"
    file.write_text(yaml.safe_dump(arguments(folder, max_steps=2, output_dir=str(folder / "command"))))
    subprocess.run([sys.executable, "-m", NAME, str(file)], check=True, timeout=300)
    logs = json.loads((folder / "command" / "trainer_state.json").read_text())["log_history"]
    for found, other in zip(logs, expected.logs, strict=False):
        assert found["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert found["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)


# ---- without LLaMA-Factory ----

RIGHT = {"llamafactory": "0.9.5", "trl": "0.28.0"}


@pytest.mark.parametrize(
    ("versions", "found"),
    [
        ({"llamafactory": "none"}, "found llamafactory none and trl 0.28.0"),
        ({"llamafactory": "0.9.4"}, "found llamafactory 0.9.4 and trl 0.28.0"),
        ({"trl": "1.16.0"}, "found llamafactory 0.9.5 and trl 1.16.0"),
        ({}, r"found llamafactory 0.9.5 and trl 0.28.0 \(.*llamafactory"),
    ],
    ids=["missing", "older", "newer TRL", "cannot be imported"],
)
def test_versions(versions: dict[str, str], found: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "llamafactory.train", None)
    message = f"needs llamafactory>=0.9.5,<0.9.6 and trl>=0.27,<0.29, weave, .*{found}.*pip install"
    with pytest.raises(ImportError, match=message):
        fresh_import(NAME, RIGHT | versions, monkeypatch)
