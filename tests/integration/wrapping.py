"""A tiny model trained with ORPO on full logits in one process: what every wrapper has to reproduce."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from compatibility import measured
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from orpo_kernels.integration.lm_head import ModelLogps
from orpo_kernels.loss import merge_targets, orpo_from_logps

VOCAB = 97
STEPS = 3
LEARNING_RATE = 0.3
IGNORED = -100


class Trained(NamedTuple):
    """losses: one a step, and one after the last, of the first batch without gradients. gradients: those of the
    first step, by the parameter's name in the bare model."""

    losses: list[float]
    gradients: dict[str, Tensor]


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        # Larger than a real model's, so that no gradient is small beside the rounding of the others.
        "initializer_range": 0.2,
        "use_cache": False,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(settings | changes)))


class Processed(LlamaForCausalLM):
    """A model that does something to its logits after the head."""

    process: Callable[[Tensor], Tensor]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        outputs.logits = self.process(outputs.logits)
        return outputs


def processed(process: Callable[[Tensor], Tensor]) -> Processed:
    model = tiny_llama()
    model.__class__ = Processed
    model.process = process
    return model


def scaled() -> Processed:
    return processed(lambda logits: logits * 0.5)


def checkpointed(reentrant: bool) -> Callable[[], LlamaForCausalLM]:
    """Makes the model with gradient checkpoints around its layers."""

    def make() -> LlamaForCausalLM:
        model = tiny_llama().train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        return model

    return make


def with_a_frozen(part: str) -> Callable[[], LlamaForCausalLM]:
    def make() -> LlamaForCausalLM:
        model = tiny_llama()
        model.get_submodule(part).requires_grad_(False)
        return model

    return make


def make_batch(step: int = 0, rank: int = 0, pairs: int = 2, scored: bool = True) -> dict[str, Tensor]:
    """Padded pairs of random tokens. Every step and rank has lengths of its own; scored: False for no targets."""
    random = torch.Generator().manual_seed(1000 * step + rank)
    longest, prompt = 9 + 3 * step + 2 * rank, 3
    lengths = torch.randint(prompt + 3, longest + 1, (2 * pairs,), generator=random)
    lengths[0] = longest
    ids = torch.randint(1, VOCAB, (2 * pairs, longest), generator=random)
    ids[pairs:, :prompt] = ids[:pairs, :prompt]
    place = torch.arange(longest)
    inside = place < lengths[:, None]
    following = torch.cat([ids[:, 1:], ids[:, :1]], 1)
    predicts = (place + 1 < lengths[:, None]) & scored
    return {
        "input_ids": ids * inside,
        "attention_mask": inside.long(),
        "targets": following.masked_fill(~(predicts & (place + 1 >= prompt)), IGNORED),
        "nll_targets": following.masked_fill(~predicts, IGNORED)[:pairs],
    }


def inputs_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def logits_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The ORPO loss from full logits."""
    logits = model(**inputs_of(batch)).logits
    targets = merge_targets(batch["targets"], batch["nll_targets"])
    return objective(logps_of_logits(logits, targets), batch)


def logps_of_logits(logits: Tensor, targets: Tensor) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    logps = wide.log_softmax(-1).gather(-1, targets.clamp_min(0)[..., None]).squeeze(-1)
    return torch.where(targets == IGNORED, 0.0, logps)


def objective(logps: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return orpo_from_logps(logps, batch["targets"], nll_targets=batch["nll_targets"], preset="trl").loss


def through(ours: ModelLogps) -> Callable[[nn.Module, dict[str, Tensor]], Tensor]:
    """A loss like `logits_loss`, through the head."""

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        targets = merge_targets(batch["targets"], batch["nll_targets"])
        return objective(ours.logps(targets, model=model, **inputs_of(batch))[0], batch)

    return loss


def train(
    model: nn.Module,
    loss: Callable = logits_loss,
    *,
    ranks: int = 1,
    steps: int = STEPS,
    batch: Callable[[int, int], dict[str, Tensor]] = make_batch,
) -> Trained:
    """Train one process on the batches of all ranks: each step's loss is the mean of theirs.

    Plain SGD shows a wrong gradient in proportion, where Adam would hide its size.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    losses, gradients = [], {}

    def mean_loss(step: int) -> Tensor:
        mean = torch.stack([loss(model, batch(step, rank)) for rank in range(ranks)]).mean()
        losses.append(mean.item())
        return mean

    for step in range(steps):
        mean_loss(step).backward()
        if step == 0:
            gradients = gradients_of(model)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        mean_loss(0)
    return Trained(losses, gradients)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def loss_error(found: Trained, right: Trained) -> float:
    """The largest relative error of a step's loss."""
    assert len(found.losses) == len(right.losses)
    errors = [abs(a - b) / abs(b) for a, b in zip(found.losses, right.losses, strict=True)]
    return float(torch.tensor(errors, dtype=torch.float64).max())  # unlike Python's, this max lets a NaN through


def gradient_error(found: Trained, right: Trained) -> float:
    """The largest relative error of a parameter's gradient, in the Frobenius norm."""
    assert found.gradients.keys() == right.gradients.keys()
    return max(relative_error(found.gradients[name], gradient) for name, gradient in right.gradients.items())


def relative_error(found: Tensor, right: Tensor) -> float:
    """|found - right| / |right|; 0 / 0 is 0."""
    difference = (found.double() - right.double()).norm().item()
    return difference / right.double().norm().item() if difference else 0.0


def check_same(found: Trained, right: Trained, losses: float = 1e-5, gradients: float = 1e-4) -> None:
    errors = {"losses": loss_error(found, right), "gradients": gradient_error(found, right)}
    measured(**errors)
    assert errors["losses"] <= losses, (found.losses, right.losses)
    assert errors["gradients"] <= gradients
