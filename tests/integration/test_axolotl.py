"""Axolotl's own ORPO run beside the one with our trainer: configuration file to last step.

Axolotl is not in the test environment: `make test-frameworks` makes one for it and runs this file there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from frameworks import PAIRS, Witness, check_same, fresh_import, gemma2, llama, mixtral, unmet, witnessed, write_model
from transformers import set_seed

NAME = "orpo_kernels.integration.axolotl"
PLUGIN, TRAINER = f"{NAME}.ORPOPlugin", f"{NAME}.ORPOTrainer"
WITHOUT = unmet("axolotl>=0.19,<0.20", "trl>=1.9,<1.13")
needs_axolotl = pytest.mark.skipif(bool(WITHOUT), reason=WITHOUT)


def train(folder: Path, **more: Any) -> Witness:
    """What `axolotl train` does with a configuration file."""
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_preference_datasets
    from axolotl.train import train as axolotl_train

    settings = {
        "rl": "orpo",
        "base_model": str(folder / "model"),
        "datasets": [{"path": str(folder / "pairs.jsonl"), "ds_type": "json", "split": "train", "type": None}],
        "dataset_prepared_path": str(folder / "prepared"),
        "dataset_num_proc": 1,
        "output_dir": str(folder / "out"),
        "sequence_len": 128,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": 5,
        "learning_rate": 0.01,
        "lr_scheduler": "constant",
        "optimizer": "adamw_torch",
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "seed": 1,
        **dict.fromkeys(("bf16", "fp16", "tf32", "flash_attention"), False),
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(settings | more))
    cfg = load_cfg(str(file))
    set_seed(1)  # An adapter is drawn before any trainer sets its seed.
    with witnessed() as witness:
        axolotl_train(cfg=cfg, dataset_meta=load_preference_datasets(cfg=cfg, cli_args=TrainerCliArgs()))
    return witness


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("AXOLOTL_DO_NOT_TRACK", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "CI"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(sys, "argv", ["axolotl"])
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    return tmp_path


LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj", "v_proj"]}


@needs_axolotl
@pytest.mark.shows(
    "Trainers", "Axolotl, {id}", "5 steps: losses, gradient norms, every metric and the first gradients against its own"
)
@pytest.mark.parametrize(
    ("build", "options"),
    [
        pytest.param(llama, {}, id="llama"),
        pytest.param(llama, {"gradient_accumulation_steps": 2, "orpo_alpha": 0.5}, id="accumulation"),
        pytest.param(llama, {"gradient_checkpointing": True}, id="checkpointing"),
        pytest.param(llama, LORA, id="LoRA"),
        pytest.param(llama, LORA | {"lora_target_modules": ["q_proj", "lm_head"]}, id="LoRA on the head"),
        pytest.param(llama, {"val_set_size": 0.5, "eval_strategy": "steps", "eval_steps": 2}, id="evaluation"),
        pytest.param(mixtral, {}, id="router loss"),
        pytest.param(gemma2, {}, id="soft-cap"),
    ],
)
def test_five_steps(build: Callable[[], Any], options: dict[str, Any], folder: Path):
    write_model(build, folder / "model")
    expected = train(folder, **options)
    found = train(folder, **options, plugins=[PLUGIN])
    assert sum("loss" in logs for logs in expected.logs) == 5
    assert any("eval_loss" in logs for logs in expected.logs) == ("val_set_size" in options)
    check_same(found, expected, ("logits/chosen", "logits/rejected") if build is gemma2 else ())


@needs_axolotl
def test_trainer_cls_alone(folder: Path):
    write_model(llama, folder / "model")
    found, expected = (train(folder, max_steps=2, **options) for options in ({"trainer_cls": TRAINER}, {}))
    check_same(found, expected)


# ---- without Axolotl ----

RIGHT = {"axolotl": "0.19.0", "trl": "1.9.0"}


@pytest.fixture
def axolotl_like(monkeypatch: pytest.MonkeyPatch) -> None:
    """As much of Axolotl as a plugin's module imports."""
    base = ModuleType("axolotl.integrations.base")
    base.BasePlugin = object
    for part in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, part, ModuleType(part))
    monkeypatch.setitem(sys.modules, base.__name__, base)


def test_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "axolotl.integrations.base", None)
    message = r"needs axolotl>=0.19,<0.20 and trl>=1.9,<1.13; found axolotl none and trl 1.9.0 \(.*pip install"
    with pytest.raises(ImportError, match=message):
        fresh_import(NAME, RIGHT | {"axolotl": "none"}, monkeypatch)


@pytest.mark.usefixtures("axolotl_like")
@pytest.mark.parametrize(
    ("versions", "found"),
    [
        ({"axolotl": "0.20.0"}, "found axolotl 0.20.0 and trl 1.9.0"),
        ({"trl": "1.16.0"}, "found axolotl 0.19.0 and trl 1.16.0"),
    ],
)
def test_other_versions(versions: dict[str, str], found: str, monkeypatch: pytest.MonkeyPatch):
    """Not at import, where Axolotl would print the error and train with its own trainer."""
    module = fresh_import(NAME, RIGHT | versions, monkeypatch)
    for use in (lambda: module.ORPOPlugin().register({"plugins": [PLUGIN], "rl": "orpo"}), lambda: module.ORPOTrainer):
        with pytest.raises(ImportError, match=f"needs axolotl>=0.19,<0.20 and trl>=1.9,<1.13; {found}"):
            use()


@pytest.mark.usefixtures("axolotl_like")
def test_the_plugin_sets_the_trainer(monkeypatch: pytest.MonkeyPatch):
    plugin = fresh_import(NAME, RIGHT, monkeypatch).ORPOPlugin()
    cfg = {"plugins": [PLUGIN], "rl": "orpo"}
    for _ in range(2):  # Axolotl may read the configuration of one process again
        plugin.register(cfg)
        assert cfg == {"plugins": [PLUGIN], "rl": "orpo", "trainer_cls": TRAINER}
    other: dict[str, Any] = {"rl": "dpo"}
    plugin.register(other)
    assert other == {"rl": "dpo"}
    with pytest.raises(ValueError, match=r"rl is 'dpo': .* set that or leave the plugin out"):
        plugin.register({"plugins": [PLUGIN], "rl": "dpo"})
    with pytest.raises(ValueError, match=r"trainer_cls is 'my.Trainer': .* leave one of them out"):
        plugin.register({"plugins": [PLUGIN], "rl": "orpo", "trainer_cls": "my.Trainer"})
