"""`orpo-kernels check` and `train`, and what works with only torch and transformers installed."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from orpo_kernels.__main__ import main
from orpo_kernels.commands import check, train_with_trl
from orpo_kernels.commands.train import DataArguments, build_trainer, load_pairs, parse
from orpo_kernels.linear_logps import linear_logps

PAIRS = [{"prompt": "one two", "chosen": " three" * (1 + at % 3), "rejected": " four five"} for at in range(8)]


# ---- check ----


def test_check_passes(capsys: pytest.CaptureFixture[str]):
    assert main(["check", "--seed", "3"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert not any(line.startswith("FAIL") for line in printed)
    for name in ("torch", "transformers", "float64", "float32", "bfloat16", "float16"):
        (line,) = (line for line in printed if line.startswith("pass") and line.split()[1] == name)
        assert name in ("torch", "transformers") or "log-prob off by" in line
    # What is only for information says neither.
    assert any(line.split()[:2] == ["device", "cpu"] for line in printed)


def wrong_values(*args: Any) -> Tensor:
    return linear_logps(*args) * 1.001


def wrong_gradients(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    right = linear_logps(hidden, weight, targets)
    return right.detach() + 1.1 * (right - right.detach())


def nan_in_the_weights_gradient(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    weight = weight * 1
    weight.register_hook(lambda gradient: gradient * torch.nan)
    return linear_logps(hidden, weight, targets)


@pytest.mark.parametrize("wrong", [wrong_values, wrong_gradients, nan_in_the_weights_gradient])
def test_check_notices_what_is_wrong(
    wrong: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(check, "linear_logps", wrong)
    assert main(["check"]) == 1
    failed = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert failed == ["float64", "float32", "bfloat16", "float16"]


@pytest.mark.parametrize(("found", "said"), [("5.9.1", "5.9.1"), (None, "not installed")])
def test_check_notices_an_old_package(
    found: str | None, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    version = check.installed_version
    monkeypatch.setattr(check, "installed_version", lambda name: found if name == "transformers" else version(name))
    monkeypatch.setattr(check, "_devices", lambda: [])
    assert main(["check"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(maxsplit=2)[2] for line in lines if line.startswith("FAIL")] == [f"{said} (needs 5.17 or later)"]


def test_versions_are_compared_as_numbers():
    assert check._numbers("2.9.1+cpu") < check._numbers("2.11.0") < check._numbers("2.13.0.dev1")


# ---- the command line ----


@pytest.mark.parametrize(
    ("arguments", "code", "printed"),
    [
        (["--version"], 0, "orpo_kernels 0."),
        (["--help"], 0, "preference-tune a model on your own pairs"),
        (["check", "--help"], 0, "--seed"),
        (["bench", "--help"], 0, "--compare BEFORE AFTER"),
        (["estimate", "--help"], 0, "--vocab-size V"),
        (["check", "--bogus"], 2, "unrecognized arguments: --bogus"),
        ([], 2, "the following arguments are required: COMMAND"),
        (["bogus"], 2, "invalid choice: 'bogus'"),
    ],
)
def test_help_and_usage(arguments: list[str], code: int, printed: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == code
    captured = capsys.readouterr()
    assert printed in (captured.err if code else captured.out)


def test_train_help_names_its_arguments(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    # One of each group, its explanation and its default; and an example.
    for part in (
        "--model_name_or_path",
        "Folder or name of the model, its tokenizer beside it.",
        "--dataset_name",
        "Preference pairs: a .json, .jsonl, .csv or .parquet file, a folder, or a dataset's name.",
        "--lora_target_modules",
        "--beta",
        "Weight of the odds-ratio term",
        "--per_device_train_batch_size",
        "Longest prompt + completion in tokens",
        "(default: 1024)",
        "orpo-kernels train --model_name_or_path ./my-model --dataset_name pairs.jsonl",
    ):
        assert part in text, part


# ---- train: arguments ----

NEEDED = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o", "--use_cpu", "--report_to", "none"]


def test_arguments_reach_their_places():
    options = (
        "--dtype float32 --eval_fraction 0.25 --use_peft --lora_target_modules q_proj lm_head "
        "--beta 0.3 --preset llama_factory --max_length 77 --learning_rate 1e-3"
    )
    model, data, lora, config, _ = parse(NEEDED + options.split())
    assert (model.model_name_or_path, model.dtype) == ("m", "float32")
    assert (data.dataset_name, data.eval_fraction) == ("d", 0.25)
    assert (lora.use_peft, lora.lora_target_modules) == (True, ["q_proj", "lm_head"])
    assert (config.beta, config.preset, config.max_length, config.learning_rate) == (0.3, "llama_factory", 77, 1e-3)
    *_, lora, config, _ = parse(NEEDED)
    assert (lora.use_peft, config.beta, config.max_length) == (False, 0.1, 1024)


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_arguments_from_a_file(suffix: str, tmp_path: Path):
    values = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o", "use_cpu": True, "beta": 0.3}
    path = tmp_path / f"arguments.{suffix}"
    # JSON is YAML too.
    path.write_text(json.dumps(values))
    model, data, _, config, _ = parse([str(path)])
    assert (model.model_name_or_path, data.dataset_name, config.beta) == ("m", "d", 0.3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --model_name_or_path/--model-name-or-path, --dataset_name"),
        ([*NEEDED, "--bogus", "3"], "unknown argument --bogus"),
        ([*NEEDED, "--learningrate", "1e-4"], "unknown argument --learningrate: did you mean --learning_rate?"),
        ([*NEEDED, "extra"], "unknown argument extra"),
        ([*NEEDED, "--preset", "dpo"], "preset='dpo' is unknown: use one of 'trl'"),
        ([*NEEDED, "--beta", "-1"], "beta=-1.0: use a finite number of at least 0"),
        ([*NEEDED, "--loss_normalization", "sum"], "loss_normalization='sum': use 'batch' or 'global'"),
        ([*NEEDED, "--remove_unused_columns", "true"], "remove_unused_columns=True would drop"),
        ([*NEEDED, "--max_length", "long"], "argument --max_length/--max-length: invalid int value: 'long'"),
        ([*NEEDED, "--max_length", "1"], "max_length=1: use an int of at least 2"),
        ([*NEEDED, "--model_name_or_path", "./none"], "--model_name_or_path ./none: there is no such folder"),
        ([*NEEDED, "--output_dir", "/proc/none"], "--output_dir /proc/none cannot be made: "),
        ([*NEEDED, "--resume_from_checkpoint", "True"], "--resume_from_checkpoint True: --output_dir"),
        ([*NEEDED, "--resume_from_checkpoint", "o/none"], "--resume_from_checkpoint o/none: there is no such folder"),
        (NEEDED, "--dataset_name"),  # no such data set
        (["missing.yaml"], "missing.yaml"),
        (["missing.json"], "missing.json"),
    ],
)
def test_bad_arguments(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """One line, before anything is loaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", None)
    assert main(["train", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("orpo-kernels train: ")
    assert message in err
    assert err.count("\n") == 1


def test_traceback_on_request():
    with pytest.raises(ValueError, match="unknown argument --bogus"):
        main(["train", *NEEDED, "--bogus", "3", "--traceback"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o", "betta": 1}',
            "betta: did you mean beta?",
        ),
        ("[1]", "holds list: use arguments and their values"),
        ("{", "arguments.json: Expecting property name"),
    ],
)
def test_a_bad_file_of_arguments(content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "arguments.json"
    path.write_text(content)
    assert main(["train", str(path)]) == 2
    assert message in capsys.readouterr().err


def test_bad_rows_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", None)
    path = tmp_path / "pairs.jsonl"
    path.write_text(jsonl([*PAIRS, {"prompt": "q", "chosen": "a"}]))
    options = ["--dataset_name", str(path), "--output_dir", str(tmp_path / "out")]
    assert main(["train", *NEEDED, *options]) == 2
    assert f"pairs.jsonl, training row {len(PAIRS)}: no 'rejected' in this row" in capsys.readouterr().err


# ---- train: data ----


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "\n".join(json.dumps(row) for row in rows) + "\n\n"


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same rows in every shape that is taken."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    (tmp_path / "a.json").write_text(json.dumps(PAIRS, indent=1))
    (tmp_path / "a.jsonl").write_text(jsonl(PAIRS))
    (tmp_path / "lines.json").write_text(jsonl(PAIRS))
    rows = datasets.Dataset.from_list(PAIRS)
    rows.to_csv(tmp_path / "a.csv")
    rows.to_parquet(tmp_path / "a.parquet")
    rows.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=rows, test=rows.select([0])).save_to_disk(tmp_path / "splits")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_text(jsonl(PAIRS))
    (tmp_path / "folder" / "test.jsonl").write_text(jsonl(PAIRS[:1]))
    return tmp_path


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "lines.json", "a.csv", "a.parquet", "saved", "splits", "folder"])
def test_shapes_of_data(name: str, data: Path):
    train, held_out = load_pairs(DataArguments(str(data / name)))
    assert list(train) == PAIRS
    assert held_out is None
    # The end is held out.
    train, held_out = load_pairs(DataArguments(str(data / name), eval_fraction=0.25))
    assert (list(train), list(held_out)) == (PAIRS[:6], PAIRS[6:])
    # A share too small for a row holds none out.
    train, held_out = load_pairs(DataArguments(str(data / name), eval_fraction=0.05))
    assert (list(train), held_out) == (PAIRS, None)


@pytest.mark.parametrize("name", ["splits", "folder"])
def test_splits(name: str, data: Path):
    train, held_out = load_pairs(DataArguments(str(data / name), dataset_test_split="test"))
    assert (list(train), list(held_out)) == (PAIRS, PAIRS[:1])
    train, _ = load_pairs(DataArguments(str(data / name), dataset_train_split="test"))
    assert list(train) == PAIRS[:1]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a.json", {"eval_fraction": 1.0}, "--eval_fraction 1.0: use a share from 0 up to, not including, 1"),
        ("a.json", {"eval_fraction": -0.1}, "--eval_fraction -0.1: use a share"),
        ("saved", {"eval_fraction": 0.5, "dataset_test_split": "x"}, "were both given: use one"),
        ("a.jsonl", {"dataset_test_split": "test"}, "holds one split: use --eval_fraction"),
        ("splits", {"dataset_test_split": "validation"}, "has no split 'validation', only train, test"),
        ("splits", {"dataset_train_split": "sft"}, "has no split 'sft', only train, test"),
        ("b.jsonl", {}, r"b\.jsonl: there is no such file"),
        ("b.txt", {}, r"b\.txt: the ending is none of \.json, \.jsonl, \.csv, \.parquet"),
        ("bad.jsonl", {}, r"bad\.jsonl is not valid JSON: .*"),
        ("empty.jsonl", {}, r"empty\.jsonl leaves no rows to train on"),
        ("one.jsonl", {"eval_fraction": 0.6}, r"one\.jsonl leaves no rows to train on"),
    ],
)
def test_bad_data(name: str, options: dict[str, Any], message: str, data: Path):
    (data / "b.txt").write_text("{}")
    (data / "bad.jsonl").write_text('{"prompt": \n')
    (data / "empty.jsonl").write_text("")
    (data / "one.jsonl").write_text(jsonl(PAIRS[:1]))
    with pytest.raises(ValueError, match=message):
        load_pairs(DataArguments(str(data / name), **options))


# ---- train: a model ----


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    words = {word: index for index, word in enumerate(["<unk>", "</s>", "one", "two", "three", "four", "five"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"vocab_size": len(words), "pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, **tokens)).save_pretrained(folder)
    return folder


def training(model_folder: Path, out: Path, *more: str) -> list[str]:
    data = out.parent / "pairs.jsonl"
    data.write_text(jsonl(PAIRS))
    arguments = {"model_name_or_path": model_folder, "dataset_name": data, "output_dir": out, "report_to": "none"}
    arguments |= {"max_steps": 2, "learning_rate": 0.1, "per_device_train_batch_size": 2, "save_strategy": "no"}
    return [part for name, value in arguments.items() for part in (f"--{name}", str(value))] + ["--use_cpu", *more]


@pytest.mark.shows(
    "Trainers", "`orpo-kernels train`", "two steps from the command line on a saved model and a file of pairs"
)
def test_two_steps(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out"
    assert main(["train", *training(model_folder, out, "--eval_fraction", "0.25")]) == 0
    printed = capsys.readouterr().out
    assert "6 pairs" in printed
    assert f"saved the model and metrics.json in {out}" in printed
    metrics = json.loads((out / "metrics.json").read_text())
    assert {"train_loss", "eval_loss", "eval_rewards/accuracies"} <= metrics.keys()
    # It can be loaded as it is, tokenizer and all, and it has learned.
    before, after = (LlamaForCausalLM.from_pretrained(folder).state_dict() for folder in (model_folder, out))
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert PreTrainedTokenizerFast.from_pretrained(out)("one").input_ids == [2]
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert log[-1]["eval_loss"] == metrics["eval_loss"]


def test_two_steps_with_a_break_are_two_steps(model_folder: Path, tmp_path: Path):
    save = ["--save_strategy", "steps", "--save_steps", "1", "--lr_scheduler_type", "constant"]
    assert main(["train", *training(model_folder, tmp_path / "whole", *save)]) == 0
    assert main(["train", *training(model_folder, tmp_path / "half", *save, "--max_steps", "1")]) == 0
    resume = ["--resume_from_checkpoint", "True"]
    assert main(["train", *training(model_folder, tmp_path / "half", *save, *resume)]) == 0
    log = json.loads((tmp_path / "half/trainer_state.json").read_text())
    assert log["global_step"] == 2
    whole, half = (LlamaForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "half"))
    assert all(torch.equal(whole[name], half[name]) for name in whole)


@pytest.mark.shows("Trainers", "`orpo-kernels train --use_peft`", "two steps; the adapter is saved and loads")
def test_two_steps_with_lora(model_folder: Path, tmp_path: Path):
    """The head among the adapted layers, so that its adapter is what has been trained."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    out = tmp_path / "out"
    lora = ["--use_peft", "--lora_r", "2", "--lora_alpha", "4", "--lora_target_modules", "q_proj", "lm_head"]
    assert main(["train", *training(model_folder, out, *lora)]) == 0
    saved = json.loads((out / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"], sorted(saved["target_modules"])) == (2, 4, ["lm_head", "q_proj"])
    model = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(model_folder), out)
    b = model.get_output_embeddings().lora_B["default"].weight  # zero before training
    assert b.any()


def test_every_linear_layer_but_the_head_is_adapted_by_default(model_folder: Path, tmp_path: Path):
    pytest.importorskip("peft", reason="peft is not installed")
    trainer = build_trainer(*parse(training(model_folder, tmp_path / "out", "--use_peft")))
    layers = {name.split(".lora_")[0].split(".")[-1] for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


# ---- train: what TRL's trainers do ----


@pytest.fixture
def trl_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("datasets", "peft", "trl"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    monkeypatch.setenv("CI", "1")  # TRL sends no telemetry then


@pytest.mark.shows("Trainers", "`orpo-kernels train --loss {loss}`", "two steps; the loss is TRL's of that name")
@pytest.mark.parametrize(
    ("loss", "logged"),
    [
        ("sft", "mean_token_accuracy"),
        ("dpo", "rewards/margins"),
        ("ipo", "rewards/margins"),
        ("kto", "kl"),
        ("simpo", "rewards/margins"),
        ("cpo", "nll_loss"),
    ],
)
def test_two_steps_of_another_loss(loss: str, logged: str, model_folder: Path, tmp_path: Path, trl_quiet: None):
    out = tmp_path / "out"
    more = ["--loss", loss, "--bf16", "false", "--logging_steps", "1"]
    more += [] if loss == "sft" else ["--packing", "true"]
    assert main(["train", *training(model_folder, out, *more)]) == 0
    first, *_ = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert logged in first
    # Policy and reference are one model still.
    known = {"dpo": math.log(2), "ipo": 25.0, "kto": 0.5}
    if loss in known:
        assert first["loss"] == pytest.approx(known[loss], rel=1e-5)
    before, after = (LlamaForCausalLM.from_pretrained(folder).state_dict() for folder in (model_folder, out))
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_lora_of_another_loss_from_a_file(model_folder: Path, tmp_path: Path, trl_quiet: None):
    given = training(model_folder, tmp_path / "out", "--loss", "kto", "--use_peft", "--bf16", "false")
    named = iter(given)
    values: dict[str, Any] = {}
    for name in named:
        flag = name in ("--use_cpu", "--use_peft")
        values[name.removeprefix("--")] = True if flag else next(named)
    values |= {"max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 0.1, "bf16": False}
    path = tmp_path / "arguments.json"
    path.write_text(json.dumps(values))
    assert main(["train", str(path)]) == 0
    assert (tmp_path / "out" / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loss", "ppo"], "--loss ppo: use one of orpo, sft, dpo, ipo, kto, simpo, cpo"),
        (["--loss", "ipo", "--loss_type", "hinge"], "--loss_type ['hinge'] and --loss ipo were both given"),
        (["--loss", "dpo", "--preset", "trl"], "unknown argument --preset"),
        (["--loss", "sft", "--share_prefix", "true"], "unknown argument --share_prefix"),
        (["--loss", "dpo", "--packing_length", "8"], "packing_length=8: use a positive int, and only with packing"),
    ],
)
def test_bad_arguments_of_another_loss(
    arguments: list[str],
    message: str,
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    trl_quiet: None,
):
    capsys.readouterr()
    assert main(["train", *training(model_folder, tmp_path / "out", "--bf16", "false", *arguments)]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("orpo-kernels"))
    assert line.startswith("orpo-kernels train: ")
    assert message in line


@pytest.mark.parametrize(
    ("loss", "row", "expected"),
    [
        ("sft", {"messages": [{"role": "user", "content": "q"}], "x": 1}, {"messages"}),
        ("sft", {"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt", "completion"}),
        ("kto", {"prompt": "q", "completion": "a", "label": True, "x": 1}, {"prompt", "completion", "label"}),
        ("dpo", {"prompt": "q", "chosen": "a", "rejected": "b", "x": 1}, {"prompt", "chosen", "rejected"}),
    ],
)
def test_rows_of_another_loss(loss: str, row: dict[str, Any], expected: set[str], trl_quiet: None):
    assert set(train_with_trl.dataset(loss, [row], "rows").column_names) == expected


def test_a_bad_row_of_another_loss_is_named(trl_quiet: None):
    good = {"prompt": "q", "chosen": "a", "rejected": "b"}
    with pytest.raises(ValueError, match=r"pairs, training row 1: no 'rejected' in this row"):
        train_with_trl.dataset("dpo", [good, {"prompt": "q", "chosen": "a"}], "pairs, training row")


# ---- with little installed ----

# As if the packages named were not there: neither importable nor to be found.
HIDE = """
    import importlib.machinery, sys

    class Finder(importlib.machinery.PathFinder):
        @classmethod
        def find_spec(cls, name, path=None, target=None):
            hidden = name.partition(".")[0] in {hidden}
            return None if hidden else super().find_spec(name, path, target)

    sys.meta_path[:] = [Finder if f is importlib.machinery.PathFinder else f for f in sys.meta_path]
"""
PEERS = (
    "peft",
    "trl",
    "datasets",
    "triton",
    "liger_kernel",
    "deepspeed",
    "bitsandbytes",
    "matplotlib",
)


def run_without(packages: tuple[str, ...], code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    code = textwrap.dedent(HIDE.replace("{hidden}", repr(set(packages)))) + textwrap.dedent(code)
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_torch_and_transformers_alone():
    """Everything imports, a plain loop works, and what needs more says what."""
    done = run_without(
        (*PEERS, "accelerate"),
        """
        import torch
        import orpo_kernels
        from orpo_kernels.integration.lm_head import attach
        from orpo_kernels.integration.transformers import ORPOConfig, ORPOTrainer, PreferenceCollator
        from transformers import LlamaConfig, LlamaForCausalLM

        for name in ("peft", "trl", "datasets", "accelerate", "triton"):
            assert name not in sys.modules, name
        sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=31, **sizes))
        ids = torch.arange(12).view(2, 6)
        logps, _ = attach(model).logps(orpo_kernels.shift_labels(ids), input_ids=ids)
        logps.sum().backward()
        assert model.lm_head.weight.grad.any()
        try:
            ORPOConfig("unused")
        except ImportError as error:
            print(error)
        from orpo_kernels.__main__ import main
        assert main(["check"]) == 0
        """,
    )
    assert done.returncode == 0, done.stderr
    assert "accelerate" in done.stdout.splitlines()[0]


def test_the_trainer_needs_accelerate_and_no_more(model_folder: Path, tmp_path: Path):
    done = run_without(
        PEERS,
        """
        import contextlib, io
        from orpo_kernels.__main__ import main
        assert main(["train", *sys.argv[1:]]) == 0
        for more in (["--use_peft"], ["--dataset_name", "a_name"]):
            with contextlib.redirect_stderr(io.StringIO()) as said:
                assert main(["train", *sys.argv[1:], *more]) == 2
            print(said.getvalue().splitlines()[-1])
        from orpo_kernels.integration.transformers import ORPOConfig, ORPOTrainer
        from transformers import AutoModelForCausalLM, AutoTokenizer
        folder = sys.argv[sys.argv.index("--model_name_or_path") + 1]
        try:
            ORPOTrainer(folder, ORPOConfig("unused", use_cpu=True), peft_config=object())
        except ImportError as error:
            print(error)
        """,
        *training(model_folder, tmp_path / "out"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-3:] == [
        "orpo-kernels train: --use_peft needs the peft package: pip install 'peft>=0.18' (--traceback shows where)",
        "orpo-kernels train: --dataset_name a_name needs the datasets package: pip install datasets (--traceback shows "
        "where)",
        "peft_config was given but peft is not installed: pip install 'peft>=0.18'",
    ]
    assert (tmp_path / "out" / "model.safetensors").exists()
