"""What the tests against whole training frameworks share: a model on disk, pairs, and a witness of each run."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from compatibility import measured
from packaging.requirements import Requirement
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from wrapping import tiny_llama

# Uneven lengths, so that batches pad, and answers of both kinds chosen, so that some pairs are ranked wrong.
PAIRS = [
    {
        "prompt": "The answer is " * (1 + at % 2),
        "chosen": "46" + " because" * (at % 3),
        "rejected": "$46 and not"[: 3 + at],
    }
    for at in range(8)
]
for _at in (1, 4, 6):
    PAIRS[_at]["chosen"], PAIRS[_at]["rejected"] = PAIRS[_at]["rejected"], PAIRS[_at]["chosen"]

CHATML = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


def unmet(*requirements: str) -> str:
    """Why a test cannot run: the requirements that are not met; empty where all are."""
    reasons = []
    for requirement in map(Requirement, requirements):
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            found = "none"
        if found not in requirement.specifier:
            reasons.append(f"{requirement} is needed and {found} was found")
    return f"{'; '.join(reasons)}: run `make test-frameworks`" if reasons else ""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with <|end|> (id 0, EOS and padding) and <|begin|> (id 1, BOS, not added)."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>", "<|begin|>", "<|start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((text for pair in PAIRS for text in pair.values()), trainer)
    special = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|end|>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHATML, **special)


TOKENIZER = make_tokenizer()
SIZES = {"vocab_size": len(TOKENIZER), "max_position_embeddings": 256}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 0}
_MORE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_MORE |= {"num_key_value_heads": 2, "head_dim": 8}


def llama() -> PreTrainedModel:
    # As small as usual: larger weights make the later steps amplify the rounding of the first.
    return tiny_llama(**SIZES, initializer_range=0.02)


def gemma2() -> PreTrainedModel:
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, **_MORE, final_logit_softcapping=2.0, attn_implementation="eager"))


def mixtral() -> PreTrainedModel:
    torch.manual_seed(0)
    router = {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.5}
    return MixtralForCausalLM(MixtralConfig(**SIZES, **_MORE, **router))


def write_model(build: Callable[[], PreTrainedModel], folder: Path) -> str:
    """Put a model and its tokenizer into the folder, as a user would have them; the folder's name."""
    build().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


class Witness(TrainerCallback):
    """What a run of transformers' Trainer did.

    logs: every logged training step and evaluation. gradients: those of the first step. widths: of the logits that
    the model returned. trainer: the class that ran.
    """

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []
        self.gradients: dict[str, Tensor] = {}
        self.widths: set[int] = set()

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.register_forward_hook(lambda module, inputs, output: self.widths.add(output.logits.shape[-1]))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs or "eval_loss" in logs:
            self.logs.append({name: float(value) for name, value in logs.items()})

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.gradients:
            parameters = model.named_parameters()
            self.gradients = {name: p.grad.clone() for name, p in parameters if p.grad is not None}


@contextmanager
def witnessed() -> Iterator[Witness]:
    """A witness of the run inside, put among the callbacks that every Trainer has."""
    witness = Witness()
    callbacks = transformers.trainer.DEFAULT_CALLBACKS
    callbacks.append(witness)
    try:
        yield witness
    finally:
        callbacks.remove(witness)


# A difference keeps the rounding of what it is the difference of, 2^-22 in fp32; LLaMA-Factory takes the odds-ratio
# term as (loss - sft_loss) / beta, of beta >= 0.1.
DIFFERENCES = {
    "rewards/margins": ("rewards/chosen", 1.0),
    "log_odds_chosen": ("logps/chosen", 1.0),
    "odds_ratio_loss": ("sft_loss", 10.0),
}


def check_same(found: Witness, expected: Witness, left_out: tuple[str, ...] = ()) -> None:
    """Losses, gradient norms and all metrics equal to 1e-5, the first gradients to 1e-4; ours without logits."""
    assert expected.widths == {len(TOKENIZER)}
    assert found.widths == {7}
    assert len(found.logs) == len(expected.logs)
    for one, other in zip(found.logs, expected.logs, strict=True):
        one, other = (
            {name: value for name, value in logs.items() if not name.endswith(("runtime", "per_second", *left_out))}
            for logs in (one, other)
        )
        assert one.keys() == other.keys()
        for name, value in other.items():
            rounding = 1e-7 if "logits/" in name else 0.0  # a mean of logits around 1 that cancel
            for difference, (of, factor) in DIFFERENCES.items():
                if name.endswith(difference):
                    rounding = factor * abs(other[name.replace(difference, of)]) * 2**-22
            assert one[name] == pytest.approx(value, rel=1e-5, abs=rounding), name
    pairs = zip(found.logs, expected.logs, strict=True)
    measured(losses=max(abs(one["loss"] / other["loss"] - 1) for one, other in pairs if "loss" in other))
    assert found.gradients.keys() == expected.gradients.keys() != set()
    for name, gradient in expected.gradients.items():
        error = ((found.gradients[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)).item()
        measured(gradients=error)
        assert error < 1e-4, name


def fresh_import(name: str, versions: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import a module as if these were the installed versions of packages ("none" for a missing one)."""
    real = importlib.metadata.version

    def version(package: str) -> str:
        if versions.get(package) == "none":
            raise importlib.metadata.PackageNotFoundError(package)
        return versions.get(package) or real(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setitem(sys.modules, name, ModuleType(name))  # so that what is there now comes back afterwards
    del sys.modules[name]
    return importlib.import_module(name)
