"""Tiny runs of TRL's own trainers, and what to ask of two of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pytest
import torch
import trl
from torch import Tensor, nn
from trainers import WORDS, tokenizer
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, TrainerCallback

VOCAB = WORDS + 3
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
SIZES |= {"pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}
LORA = {"r": 4, "lora_dropout": 0.0, "init_lora_weights": False, "task_type": "CAUSAL_LM"}


def llama(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES | options))


def gemma2(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    options = {"final_logit_softcapping": 2.0, "attn_implementation": "eager"} | options
    return Gemma2ForCausalLM(Gemma2Config(**SIZES | options))


def words(start: int, count: int) -> str:
    return " ".join(f"w{(start * 7 + 11 * at) % WORDS}" for at in range(count))


def rows(kind: str) -> datasets.Dataset:
    """Uneven lengths, so that batches pad."""
    found = []
    for at in range(12):
        prompt = words(at, 2 + at % 4) + " "
        answers = words(at + 1, 1 + at % 5), words(at + 2, 2 + at % 3)
        found.append(
            {
                "SFT": {"prompt": prompt, "completion": answers[0]},
                "DPO": {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]},
                "KTO": {"prompt": prompt, "completion": answers[at % 2], "label": at % 2 == 0},
                "GRPO": {"prompt": prompt},
                "RLOO": {"prompt": prompt},
            }[kind]
        )
    return datasets.Dataset.from_list(found)


def reward(completions: list[str], **columns: Any) -> list[float]:
    """A stub: of what a completion says, so that those of a group differ."""
    return [len(set(text.split())) + 0.25 * text.count("1") for text in completions]


class FirstGradients(TrainerCallback):
    """Keeps the gradients of the first step."""

    def __init__(self) -> None:
        self.grads: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.grads:
            self.grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


class Run(NamedTuple):
    steps: list[dict[str, float]]
    grads: dict[str, Tensor]
    trainer: Any


DEFAULTS: dict[str, Any] = {"max_steps": 5, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
DEFAULTS |= {"logging_steps": 1, "bf16": False, "gradient_checkpointing": False, "use_cpu": True, "report_to": []}
# Not Adam, whose first steps are as long for a gradient that is all rounding as for any other.
DEFAULTS |= {"save_strategy": "no", "disable_tqdm": True, "optim": "sgd", "max_grad_norm": 1e9}


def make(kind: str, model: nn.Module, folder: Path, *, peft: Any = None, **options: Any) -> Any:
    """One of TRL's trainers in fp32 on the CPU, unless the options say otherwise."""
    arguments: dict[str, Any] = {name: options.pop(name) for name in ("compute_loss_func",) if name in options}
    if kind in ("DPO", "KTO") and peft is None:
        arguments["ref_model"] = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)
    if kind in ("GRPO", "RLOO"):
        arguments["reward_funcs"] = reward
        # The reference model comes from where the policy does.
        model.save_pretrained(folder / "start")
        model.config._name_or_path = str(folder / "start")
        options = {"num_generations": 4, "max_completion_length": 6, "temperature": 0.7} | options
    config = getattr(trl, f"{kind}Config")(str(folder), **DEFAULTS | options)
    return getattr(trl, f"{kind}Trainer")(
        model,
        args=config,
        train_dataset=rows(kind),
        processing_class=tokenizer(),
        peft_config=peft,
        callbacks=[FirstGradients()],
        **arguments,
    )


def run(trainer: Any) -> Run:
    trainer.train()
    first = next(c for c in trainer.callback_handler.callbacks if isinstance(c, FirstGradients))
    return Run([entry for entry in trainer.state.log_history if "loss" in entry], first.grads, trainer)


_TIMING = ("runtime", "per_second", "preparation_time", "step_time")
# What is a difference keeps the rounding, 2^-22 in fp32, of what it is a difference of: log-probabilities of tens.
_ROUNDING = 1e-5


def check_same(found: Run, expected: Run, tolerance: float = 1e-5) -> dict[str, float]:
    """Losses, gradient norms, every metric but times, and first gradients; returns the largest relative errors."""
    assert len(found.steps) == len(expected.steps) > 0
    for one, other in zip(found.steps, expected.steps, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            if not name.endswith(_TIMING):
                assert one[name] == pytest.approx(value, rel=tolerance, abs=_ROUNDING), name
    assert found.grads.keys() == expected.grads.keys() != set()
    errors = {}
    for name, grad in expected.grads.items():
        size = grad.norm().item()
        errors[name] = (found.grads[name] - grad).norm().item() / size if size else found.grads[name].norm().item()
        assert errors[name] <= tolerance, (name, errors[name])
    pairs = list(zip(found.steps, expected.steps, strict=True))
    losses = [abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in pairs if b["loss"]]
    return {"losses": max(losses, default=0.0), "gradients": max(errors.values())}
