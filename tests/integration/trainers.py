"""Tiny trainers on numbered pairs, ours and TRL's, and what to ask of their runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from orpo_kernels.integration.transformers import ORPOConfig, ORPOTrainer

WORDS = 60
OWN = "own"


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(WORDS))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def llama(vocab_size: int = WORDS + 3) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": vocab_size, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, eos_token_id=2))


def pairs(count: int) -> list[dict[str, str]]:
    """Each named by the first word of its prompt; lengths differ."""
    return [
        {"prompt": f"w{i} w1", "chosen": " w2" * (1 + i % 5), "rejected": " w3" * (1 + 3 * i % 4)} for i in range(count)
    ]


def make(kind: str, folder: Path, rows: Any, model: Any = None, **options: Any) -> Any:
    defaults = {"per_device_train_batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1, "use_cpu": True}
    defaults |= {"bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "num_train_epochs": 1}
    arguments: Any = {"train_dataset": rows, "processing_class": tokenizer()}
    if "data_collator" in options:
        arguments["data_collator"] = options.pop("data_collator")
    if kind == OWN:
        return ORPOTrainer(model or llama(), ORPOConfig(str(folder), **defaults | options), **arguments)
    name = "CPO" if kind == "cpo" else "ORPO"
    trl = pytest.importorskip(f"trl.experimental.{name.lower()}")
    datasets = pytest.importorskip("datasets")
    from orpo_kernels.integration import trl as ours

    if isinstance(rows, list):
        arguments["train_dataset"] = datasets.Dataset.from_list(rows)
    config = getattr(trl, f"{name}Config")(str(folder), **defaults | options)
    return getattr(ours, f"{name}Trainer")(model or llama(), config, **arguments)


def watch(trainer: Any) -> list[int]:
    """The names of the pairs that are trained on, in order, as they are."""
    seen: list[int] = []
    compute_loss = trainer.compute_loss

    def watched(model: Any, inputs: dict[str, Any], *args: Any, **more: Any) -> Any:
        if "layout" in inputs:
            found = [torch.tensor(pair["chosen_input_ids"]) for pair in inputs["layout"].pairs]
            seen.extend(int(ids[ids >= 3][0]) - 3 for ids in found)
            return compute_loss(model, inputs, *args, **more)
        ids: Tensor = inputs["input_ids"] if "input_ids" in inputs else inputs["chosen_input_ids"]
        first = ids[: len(ids) // 2] if "input_ids" in inputs else ids
        seen.extend(int(row[row >= 3][0]) - 3 for row in first)
        return compute_loss(model, inputs, *args, **more)

    trainer.compute_loss = watched
    return seen


def accuracy(rows: list[dict[str, str]]) -> float:
    """Of the untrained model, over all rows."""
    model, found = llama().double(), []
    tokens = tokenizer()
    for row in rows:
        logps = []
        for side in ("chosen", "rejected"):
            prompt = len(tokens(row["prompt"])["input_ids"])
            ids = torch.tensor([[*tokens(row["prompt"] + row[side])["input_ids"], 2]])
            all_logps = torch.log_softmax(model(ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None])
            logps.append(all_logps[prompt - 1 :].mean())
        found.append(float(logps[0] > logps[1]))
    return sum(found) / len(found)
