"""`orpo-kernels train`: preference-tune a model from the command line, with ORPO or what `train_with_trl` offers.

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
from typing import Any, NamedTuple, NoReturn

from orpo_kernels.commands import train_with_trl
from orpo_kernels.commands.train_data import Arguments, DataArguments, check_shapes, load_pairs

EXAMPLE = """example:
  orpo-kernels train --model_name_or_path ./my-model --dataset_name pairs.jsonl --eval_fraction 0.05 \\
      --use_peft --lora_r 16 --output_dir ./tuned --num_train_epochs 1 --per_device_train_batch_size 4
rows: {prompt, chosen, rejected} as strings or message lists, {chosen, rejected} message lists that share their
first turns, or {conversations, chosen, rejected}."""


@dataclass
class _ModelArguments(Arguments):
    model_name_or_path: str = field(metadata={"help": "Folder or name of the model, its tokenizer beside it."})
    loss: str = field(
        default="orpo",
        metadata={
            "help": "What to train with. All but orpo hand over to TRL's trainer of that name and take its arguments.",
            "choices": ["orpo", *train_with_trl.LOSSES],
        },
    )
    gguf_file: str | None = field(default=None, metadata={"help": "Name of a .gguf file in that folder to load."})
    dtype: str = field(
        default="auto", metadata={"help": "Weights' dtype: auto (as stored), float32, bfloat16 or float16."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention, e.g. sdpa or flash_attention_2. Default: the model's."}
    )


@dataclass
class ModelArguments(_ModelArguments):
    # Some of TRL's configurations have it too.
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that the model brings along."})


@dataclass
class LoraArguments(Arguments):
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
    if getattr(trainer, "data_summary", ...) is None:
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


class Parsed(NamedTuple):
    """config: ORPOConfig, or of the loss TRL's. layout: how TRL's batches are laid out, None for what it is not for."""

    model: _ModelArguments
    data: DataArguments
    lora: LoraArguments
    config: Any
    layout: Any = None


def parse(arguments: list[str]) -> Parsed:
    """Raises ValueError for bad arguments, ImportError for a loss that needs what is not there."""
    from transformers import HfArgumentParser

    values = None
    if len(arguments) == 1 and arguments[0].endswith((".json", ".yaml", ".yml")):
        values = _read_arguments(Path(arguments[0]))
    loss = _loss_of(arguments, values)
    if loss in train_with_trl.LOSSES:
        config, *layout = train_with_trl.groups(loss)
    else:
        from orpo_kernels.integration.transformers import ORPOConfig

        config, layout = ORPOConfig, []
    trusts = "trust_remote_code" in (field.name for field in fields(config))
    groups: Any = [_ModelArguments if trusts else ModelArguments, DataArguments, LoraArguments, config, *layout]
    parser = HfArgumentParser(
        groups,
        prog="orpo-kernels train",
        description="Preference-tune a causal language model with ORPO (or another --loss), without its logits.",
        epilog=EXAMPLE,
        formatter_class=_HelpFormatter,
    )
    parser.error = _refuse  # type: ignore[method-assign]
    settings = train_with_trl.LOSSES[loss].settings if loss in train_with_trl.LOSSES else {}
    if values is not None:
        _refuse_unknown(values, [field.name for group in groups for field in fields(group)])
        found = Parsed(*parser.parse_dict(settings | values))
    else:
        parser.set_defaults(**settings)
        *parts, rest = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
        _refuse_unknown([word for word in rest if word.startswith("-")] or rest, list(parser._option_string_actions))
        found = Parsed(*parts)
    if settings:
        train_with_trl.check(loss, found.config)
    return found


def _loss_of(arguments: list[str], values: dict[str, Any] | None) -> str:
    """`--loss`, which decides what other arguments there are."""
    known = ["orpo", *train_with_trl.LOSSES]
    if values is None:
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--loss", default="orpo")
        parser.error = _refuse  # type: ignore[method-assign]
        loss = parser.parse_known_args(arguments)[0].loss
    else:
        loss = values.get("loss", "orpo")
    if loss not in known:
        raise ValueError(f"--loss {loss}: use one of {', '.join(known)}")
    return loss


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


def build_trainer(
    model_args: _ModelArguments, data_args: DataArguments, lora_args: LoraArguments, config: Any, layout: Any = None
) -> Any:
    """The trainer that the arguments describe."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loss = model_args.loss
    check_folders(model_args.model_name_or_path, Path(config.output_dir))
    check_checkpoint(config.resume_from_checkpoint, Path(config.output_dir))
    rows = load_pairs(data_args)
    named = [f"{data_args.dataset_name}, {name} row" for name in ("training", "evaluation")]
    if loss in train_with_trl.LOSSES:
        rows = tuple(train_with_trl.dataset(loss, part, what) for part, what in zip(rows, named, strict=True))
    else:
        for part, what in zip(rows, named, strict=True):
            check_shapes(part, what)
    trust = (model_args if hasattr(model_args, "trust_remote_code") else config).trust_remote_code
    common = {"gguf_file": model_args.gguf_file, "trust_remote_code": trust}
    arguments = {
        "processing_class": AutoTokenizer.from_pretrained(model_args.model_name_or_path, **common),
        "peft_config": lora_config(lora_args) if lora_args.use_peft else None,
    }

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(
            model_args.model_name_or_path,
            dtype=model_args.dtype,
            attn_implementation=model_args.attn_implementation,
            **common,
        )

    if loss in train_with_trl.LOSSES:
        return train_with_trl.make_trainer(loss, load, config, layout, rows, **arguments)
    from orpo_kernels.integration.transformers import ORPOTrainer

    return ORPOTrainer(load(), config, train_dataset=rows[0], eval_dataset=rows[1], **arguments)


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
