"""The trainers that `training_step` times, all on the same pairs in the same order."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

_TRL = {"trl": "TRL, stock", "trl-ours": "TRL, our head"}
_LAID_OUT = _TRL | {"trl-packed": "TRL, our head, each prompt once"}
# What is timed of each of TRL's trainers.
WAYS: dict[str, dict[str, str]] = {
    "orpo": _TRL | {"ours": "our transformers trainer"},
    "sft": _TRL | {"trl-packed": "TRL, our head, packed"},
    "dpo": _LAID_OUT,
    "kto": _LAID_OUT,
}


def make_trainer(specification: dict[str, Any]) -> Any:
    """The trainer of one way, as `training_step.run` specifies it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"gguf_file": specification["gguf_file"]}
    tokenizer = AutoTokenizer.from_pretrained(specification["model"], **where)
    model: Any = AutoModelForCausalLM.from_pretrained(specification["model"], dtype=torch.float32, **where)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and specification["gguf_file"] is not None:
        # Unpacked when it was loaded, so a plain model; Trainer would refuse it by its origin.
        quantizer.remove_quantization_config(model)
    lora = None
    if specification["lora_rank"]:
        from peft import LoraConfig

        lora = LoraConfig(r=specification["lora_rank"], target_modules="all-linear", task_type="CAUSAL_LM")
    arguments: dict[str, Any] = {"processing_class": tokenizer, "peft_config": lora}
    rows = _fitting(specification, tokenizer)
    if specification["way"] == "ours":
        from orpo_kernels.integration.transformers import ORPOConfig, ORPOTrainer

        config = ORPOConfig(specification["folder"], **_common(specification))
        return ORPOTrainer(model, config, train_dataset=rows, **arguments)
    return _trl_trainer(specification, model, rows, arguments)


def _common(specification: dict[str, Any]) -> dict[str, Any]:
    on_card = specification["device"] == "cuda"
    return {
        "per_device_train_batch_size": specification["batch_size"],
        "max_steps": specification["steps"] + 1,
        "max_length": specification["max_length"],
        "train_sampling_strategy": "sequential",
        "bf16": on_card,
        "use_cpu": not on_card,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": on_card,
        "learning_rate": 1e-6,
    }


def _trl_trainer(
    specification: dict[str, Any], model: Any, rows: list[dict[str, Any]], arguments: dict[str, Any]
) -> Any:
    import datasets
    import trl

    from orpo_kernels.integration import trl as ours

    datasets.disable_progress_bars()
    kind, way, folder = (specification[name] for name in ("trainer", "way", "folder"))
    common = _common(specification)
    if kind == "orpo":
        from trl.experimental import orpo as trl_orpo

        trainer_of: Any = trl_orpo.ORPOTrainer if way == "trl" else ours.ORPOTrainer
        config = trl_orpo.ORPOConfig(folder, **common)
        return trainer_of(model, config, train_dataset=datasets.Dataset.from_list(rows), **arguments)
    if kind == "sft":
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    if kind == "kto":  # both answers of a pair in one batch
        common["per_device_train_batch_size"] *= 2
        rows = [
            {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            for row in rows
            for side in ("chosen", "rejected")
        ]
    if kind != "sft" and arguments["peft_config"] is None:
        arguments["ref_model"] = copy.deepcopy(model)
    name = kind.upper()
    config = getattr(trl, f"{name}Config")(folder, **common)
    if way != "trl":
        ours.use(packing=way == "trl-packed")
    trainer_of = getattr(trl, f"{name}Trainer")
    return trainer_of(model, args=config, train_dataset=datasets.Dataset.from_list(rows), **arguments)


def _fitting(specification: dict[str, Any], tokenizer: Any) -> list[dict[str, str]]:
    """Enough pairs of the file, shuffled, that need no cutting."""
    from orpo_kernels.integration.data.files import read_pairs
    from orpo_kernels.integration.data.tokenization import tokenize_pair

    rows = read_pairs(Path(specification["pairs"]))
    random.Random(0).shuffle(rows)
    needed = specification["batch_size"] * (specification["steps"] + 1)
    found = []
    for row in rows:
        texts = _rendered(row, tokenizer)
        tokenized = tokenize_pair(texts, tokenizer, None)
        # TRL also puts a BOS token before a prompt that has none.
        if tokenized["length"] < specification["max_length"]:
            found.append(texts)
        if len(found) == needed:
            return found
    raise ValueError(f"{len(found)} pairs of {specification['pairs']} fit max_length, and {needed} are needed")


def _rendered(row: dict[str, Any], tokenizer: Any) -> dict[str, str]:
    """Strings that end where the template's last turn does: TRL puts an EOS token behind anything else."""
    from orpo_kernels.integration.data.formats import normalize_example, shared_length

    pair = normalize_example(row)
    if isinstance(pair["prompt"], str):
        return pair
    prompt = tokenizer.apply_chat_template(pair["prompt"], add_generation_prompt=True, tokenize=False)
    texts = {"prompt": prompt}
    for side in ("chosen", "rejected"):
        whole = tokenizer.apply_chat_template(pair["prompt"] + pair[side], tokenize=False)
        if shared_length(prompt, whole) < len(prompt):
            raise ValueError("the chat template renders a prompt otherwise once an answer follows")
        texts[side] = whole[len(prompt) :].rstrip()
    return texts
