"""`orpo-kernels train`: preference-tune a model with ORPO from the command line.

Arguments are parsed by transformers' own parser, so everything `TrainingArguments` knows is here under its usual
name, beside the model, the data and LoRA; names follow TRL's scripts. A .json or .yaml file in place of arguments
is read the same way.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

EXAMPLE = """example:
  orpo-kernels train --model_name_or_path ./my-model --dataset_name pairs.jsonl --eval_fraction 0.05 \\
      --use_peft --lora_r 16 --output_dir ./tuned --num_train_epochs 1 --per_device_train_batch_size 4
rows: {prompt, chosen, rejected} as strings or message lists, {chosen, rejected} message lists that share their
first turns, or {conversations, chosen, rejected}."""


@dataclass
class _Arguments:
    def __post_init__(self) -> None:
        from orpo_kernels.integration.training.arguments import numbers_from_text

        numbers_from_text(self)


@dataclass
class ModelArguments(_Arguments):
    model_name_or_path: str = field(metadata={"help": "Folder or name of the model, its tokenizer beside it."})
    gguf_file: str | None = field(default=None, metadata={"help": "Name of a .gguf file in that folder to load."})
    dtype: str = field(
        default="auto", metadata={"help": "Weights' dtype: auto (as stored), float32, bfloat16 or float16."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention, e.g. sdpa or flash_attention_2. Default: the model's."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that the model brings along."})


@dataclass
class DataArguments(_Arguments):
    dataset_name: str = field(
        metadata={"help": "Preference pairs: a .json, .jsonl, .csv or .parquet file, a folder, or a dataset's name."}
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str | None = field(default=None, metadata={"help": "Split to evaluate on."})
    eval_fraction: float = field(
        default=0.0, metadata={"help": "Share of the training rows to hold out for evaluation, from their end."}
    )


@dataclass
class LoraArguments(_Arguments):
    use_peft: bool = field(default=False, metadata={"help": "Train LoRA adapters instead of the whole model."})
    lora_r: int = field(default=16, metadata={"help": "Rank."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale: the update is multiplied by alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapters."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of the layers to adapt. Default: every linear layer but the head."}
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Names of layers to train whole, e.g. lm_head."}
    )


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The example as it is written, and every argument's default."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "train", help="preference-tune a model on your own pairs", add_help=False, prefix_chars="\0"
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    arguments = [argument for argument in args.arguments if argument != "--traceback"]
    try:
        trainer = build_trainer(*parse(arguments))
    except (ValueError, TypeError, OSError, ImportError) as error:
        if len(arguments) < len(args.arguments):
            raise
        # Libraries go on for lines; what is wrong is in the first.
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        print(f"orpo-kernels train: {first} (--traceback shows where)", file=sys.stderr)
        return 2
    train(trainer)
    return 0


def train(trainer: Any) -> None:
    """The run itself: an error from here on is no typing error, and shows its traceback."""
    config = trainer.args
    if trainer.data_summary is None:
        print("streaming data: no summary", flush=True)
    result = trainer.train(resume_from_checkpoint=checkpoint_of(config.resume_from_checkpoint))
    trainer.save_model()
    metrics = dict(result.metrics)
    if trainer.eval_dataset is not None:
        metrics.update(trainer.evaluate())
    trainer.save_state()
    if trainer.is_world_process_zero():
        path = Path(config.output_dir) / "metrics.json"
        path.write_text(json.dumps(metrics, indent=2) + "\n")
        print(f"saved the model and {path.name} in {config.output_dir}")
    trainer.accelerator.end_training()


def checkpoint_of(value: str | bool | None) -> str | bool | None:
    """What `--resume_from_checkpoint` names: a folder, or with True the last one of the output folder."""
    return {"true": True, "false": None, "none": None, "": None}.get(str(value).lower(), value)


def check_checkpoint(value: str | bool | None, output: Path) -> None:
    """ValueError where there is none of what `--resume_from_checkpoint` names, before anything is loaded."""
    from transformers.trainer_utils import get_last_checkpoint

    named = checkpoint_of(value)
    if named is True and get_last_checkpoint(str(output)) is None:
        raise ValueError(f"--resume_from_checkpoint {value}: --output_dir {output} holds no checkpoint")
    if isinstance(named, str) and not Path(named).is_dir():
        raise ValueError(f"--resume_from_checkpoint {named}: there is no such folder")


def parse(arguments: list[str]) -> Any:
    """(ModelArguments, DataArguments, LoraArguments, ORPOConfig). Raises ValueError for bad ones."""
    from transformers import HfArgumentParser

    from orpo_kernels.integration.transformers import ORPOConfig

    groups: Any = (ModelArguments, DataArguments, LoraArguments, ORPOConfig)
    parser = HfArgumentParser(
        groups,
        prog="orpo-kernels train",
        description="Preference-tune a causal language model with ORPO, without its logits.",
        epilog=EXAMPLE,
        formatter_class=_HelpFormatter,
    )
    parser.error = _refuse  # type: ignore[method-assign]
    if len(arguments) == 1 and arguments[0].endswith((".json", ".yaml", ".yml")):
        values = _read_arguments(Path(arguments[0]))
        _refuse_unknown(values, [field.name for group in groups for field in fields(group)])
        return parser.parse_dict(values)
    *found, rest = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    _refuse_unknown([word for word in rest if word.startswith("-")] or rest, list(parser._option_string_actions))
    return tuple(found)


def _refuse(message: str) -> NoReturn:
    """In place of argparse's own, which prints some hundred arguments first."""
    raise ValueError(message)


def _refuse_unknown(given: Iterable[str], known: list[str]) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise ValueError(f"unknown argument {name}" + (f": did you mean {near[0]}?" if near else ""))


def _read_arguments(path: Path) -> dict[str, Any]:
    import yaml

    text = path.read_text(encoding="utf-8-sig")
    try:
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}: use arguments and their values, one each")
    return values


def build_trainer(model_args: ModelArguments, data_args: DataArguments, lora_args: LoraArguments, config: Any) -> Any:
    """The trainer that the arguments describe."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from orpo_kernels.integration.transformers import ORPOTrainer

    check_folders(model_args.model_name_or_path, Path(config.output_dir))
    check_checkpoint(config.resume_from_checkpoint, Path(config.output_dir))
    train_rows, eval_rows = load_pairs(data_args)
    for name, rows in (("training", train_rows), ("evaluation", eval_rows)):
        check_shapes(rows, f"{data_args.dataset_name}, {name} row")
    common = {"gguf_file": model_args.gguf_file, "trust_remote_code": model_args.trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, **common)
    model = AutoModelForCausalLM.from_pretrained(
        model_args.model_name_or_path,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
        **common,
    )
    return ORPOTrainer(
        model,
        config,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        peft_config=lora_config(lora_args) if lora_args.use_peft else None,
    )


def check_folders(model: str, output: Path) -> None:
    """Before anything is loaded: the model's folder is there, where it is a path, and the output's can be written."""
    if not Path(model).exists() and (model.startswith((".", "/", "~")) or model.count("/") > 1):
        raise ValueError(f"--model_name_or_path {model}: there is no such folder")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output_dir {output} cannot be made: {error.strerror}") from error
    if not os.access(output, os.W_OK):
        raise ValueError(f"--output_dir {output} cannot be written to")


def check_shapes(rows: Any, what: str) -> None:
    """ValueError for a row of none of the accepted shapes, before the model is loaded."""
    from orpo_kernels.integration.data.formats import normalize_example
    from orpo_kernels.integration.data.tokenization import REQUIRED_COLUMNS

    for index in range(len(rows) if isinstance(rows, list) else 0):
        if not all(column in rows[index] for column in REQUIRED_COLUMNS):
            try:
                normalize_example(rows[index])
            except ValueError as error:
                raise ValueError(f"{what} {index}: {error}") from error


def lora_config(lora_args: LoraArguments) -> Any:
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("--use_peft needs the peft package: pip install 'peft>=0.18'") from error
    return LoraConfig(
        r=lora_args.lora_r,
        lora_alpha=lora_args.lora_alpha,
        lora_dropout=lora_args.lora_dropout,
        target_modules=lora_args.lora_target_modules or "all-linear",
        modules_to_save=lora_args.lora_modules_to_save,
        task_type="CAUSAL_LM",
    )


def load_pairs(data_args: DataArguments) -> tuple[Any, Any]:
    """(training rows, evaluation rows or None). A JSON file needs no other package; the rest needs `datasets`."""
    if not 0.0 <= data_args.eval_fraction < 1.0:
        raise ValueError(f"--eval_fraction {data_args.eval_fraction}: use a share from 0 up to, not including, 1")
    if data_args.eval_fraction and data_args.dataset_test_split:
        raise ValueError("--eval_fraction and --dataset_test_split were both given: use one")
    train, held_out = _load(data_args)
    if len(train) == 0:
        raise ValueError(f"--dataset_name {data_args.dataset_name} leaves no rows to train on")
    return train, held_out


def _load(data_args: DataArguments) -> tuple[Any, Any]:
    from orpo_kernels.integration.data.files import ENDINGS, ending_of, read_pairs, read_splits

    path = Path(data_args.dataset_name)
    if ending_of(path) in ENDINGS and not path.exists():
        raise ValueError(f"--dataset_name {path}: there is no such file")
    if path.is_file() and ending_of(path) not in ENDINGS:
        raise ValueError(f"--dataset_name {path}: the ending is none of {', '.join(ENDINGS)}")
    if path.is_file() and path.suffix != ".parquet":
        try:
            rows: Any = read_pairs(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"--dataset_name {error}") from error
        if data_args.dataset_test_split:
            raise ValueError(f"--dataset_test_split was given, but {path} holds one split: use --eval_fraction")
        return _cut(rows, data_args.eval_fraction)

    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"--dataset_name {path} needs the datasets package: pip install datasets") from error
    if path.is_file():
        loaded: Any = datasets.load_dataset("parquet", data_files=str(path))
    elif (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        loaded = datasets.load_from_disk(str(path))
    else:
        try:
            builder = datasets.load_dataset_builder(data_args.dataset_name)
            # The cells of a .csv and the strings of a .json file stay what they are; Arrow makes numbers, dates and
            # nulls of some.
            loaded = read_splits(builder.config.data_files or {"": ["."]})
            loaded = datasets.load_dataset(data_args.dataset_name) if loaded is None else loaded
        except (OSError, ValueError, RuntimeError) as error:
            first = str(error).partition("\n")[0]
            raise ValueError(f"--dataset_name {path} is no file or folder here, and no data set: {first}") from error
    if isinstance(loaded, datasets.Dataset):
        loaded = datasets.DatasetDict({data_args.dataset_train_split: loaded})
    for split in filter(None, (data_args.dataset_train_split, data_args.dataset_test_split)):
        if split not in loaded:
            raise ValueError(f"{data_args.dataset_name} has no split {split!r}, only {', '.join(loaded)}")
    train = loaded[data_args.dataset_train_split]
    if data_args.dataset_test_split:
        return train, loaded[data_args.dataset_test_split]
    return _cut(train, data_args.eval_fraction)


def _cut(rows: Any, eval_fraction: float) -> tuple[Any, Any]:
    """(rows but the last ones, the last ones or None)."""
    kept = len(rows) - round(len(rows) * eval_fraction)
    if isinstance(rows, list):
        return rows[:kept], rows[kept:] or None
    return rows.select(range(kept)), rows.select(range(kept, len(rows))) if kept < len(rows) else None
