"""Numbers that a YAML file gives as text, and arguments that ORPO has no use for."""

from __future__ import annotations

from pathlib import Path

import pytest
from trainers import make, pairs

from orpo_kernels.commands.train import checkpoint_of, parse
from orpo_kernels.integration.transformers import ORPOConfig

YAML = """
model_name_or_path: model
dataset_name: pairs.jsonl
output_dir: {folder}
learning_rate: 5e-6
beta: 1e-1
weight_decay: 1e-2
eval_fraction: 1e-1
lora_dropout: 5e-2
max_length: "512"
report_to: none
"""


def test_numbers_of_a_yaml_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(YAML.format(folder=tmp_path))
    _, data, lora, config, _ = parse([str(file)])
    assert (config.learning_rate, config.beta, config.weight_decay, config.max_length) == (5e-6, 0.1, 0.01, 512)
    assert (data.eval_fraction, lora.lora_dropout) == (0.1, 0.05)


def test_numbers_inside_a_dict_of_a_yaml_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    more = "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1e-7, num_cycles: 0.5, name: e5}\n"
    file.write_text(YAML.format(folder=tmp_path) + more)
    config = parse([str(file)]).config
    assert config.lr_scheduler_kwargs == {"min_lr": 1e-7, "num_cycles": 0.5, "name": "e5"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("learning_rate: fast", r"learning_rate='fast': it must be a number"),
        ("beta: 1e-", r"beta='1e-': it must be a number"),
        ('max_length: "5e-1"', r"max_length='5e-1': it must be an int"),
        ("lora_dropout: none at all", r"lora_dropout='none at all': it must be a number"),
    ],
)
def test_what_is_no_number_is_named(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    key = line.partition(":")[0]
    kept = [other for other in YAML.format(folder=tmp_path).splitlines() if not other.startswith(key)]
    file.write_text("\n".join([*kept, line]))
    with pytest.raises(ValueError, match=message):
        parse([str(file)])


def test_label_smoothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"label_smoothing_factor=0\.1: the loss is one of pairs, which it does not smooth"
    ):
        ORPOConfig(str(tmp_path), label_smoothing_factor=0.1)


def test_label_smoothing_is_refused_by_the_drop_in(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0\.1: the loss is one of pairs"):
        make("trl", tmp_path, pairs(2), label_smoothing_factor=0.1)


@pytest.mark.parametrize(
    ("given", "meant"), [("True", True), ("true", True), ("False", None), (None, None), ("out/checkpoint-3",) * 2]
)
def test_which_checkpoint(given: str | None, meant: str | bool | None) -> None:
    assert checkpoint_of(given) == meant
