"""A tiny model trained with ORPO on full logits, in one process: what every wrapper has to reproduce."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from orpo_kernels.integration.lm_head import ModelLogps
from orpo_kernels.loss import merge_targets, orpo_from_logps
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 97
STEPS = 3
LEARNING_RATE = 0.3


class Trained(NamedTuple):
    """losses: one a step. gradients: those of the first step, by the parameter's name in the bare model."""

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
        # Larger than a real model's, so that no gradient is lost in the rounding of others.
        "initializer_range": 0.2,
        "use_cache": False,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(settings | changes)))


def make_batch(step: int, rank: int = 0, pairs: int = 2) -> dict[str, Tensor]:
    """Padded pairs of random tokens; every step and rank has lengths of its own."""
    random = torch.Generator().manual_seed(1000 * step + rank)
    length = 9 + 3 * step + 2 * rank
    lengths = torch.randint(6, length + 1, (2 * pairs,), generator=random)
    lengths[0] = length
    prompt = 3
    ids = torch.randint(1, VOCAB, (2 * pairs, length), generator=random)
    ids[pairs:, :prompt] = ids[:pairs, :prompt]
    place = torch.arange(length)
    inside = place < lengths[:, None]
    following = torch.cat([ids[:, 1:], torch.zeros_like(ids[:, :1])], 1)
    has_next = place + 1 < lengths[:, None]
    completion = has_next & (place + 1 >= prompt)
    return {
        "input_ids": ids * inside,
        "attention_mask": inside.long(),
        "targets": following.masked_fill(~completion, -100),
        "nll_targets": following.masked_fill(~has_next, -100)[:pairs],
    }


def batches(rank: int = 0) -> list[dict[str, Tensor]]:
    return [make_batch(step, rank) for step in range(STEPS)]


def logits_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The ORPO loss from full logits."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    targets = merge_targets(batch["targets"], batch["nll_targets"])
    wide = logits.double() if logits.dtype == torch.float64 else logits.float()
    logps = wide.log_softmax(-1).gather(-1, targets.clamp_min(0)[..., None]).squeeze(-1)
    return _objective(torch.where(targets == -100, 0.0, logps), batch)


def head_loss(ours: ModelLogps, batch: dict[str, Tensor], model: nn.Module | None = None) -> Tensor:
    """The same through the head."""
    logps, _ = ours.logps(
        merge_targets(batch["targets"], batch["nll_targets"]),
        model=model,
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
    )
    return _objective(logps, batch)


def _objective(logps: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return orpo_from_logps(logps, batch["targets"], nll_targets=batch["nll_targets"], preset="trl").loss


def train(parameters: Iterable[nn.Parameter], losses: Iterable[Callable[[], Tensor]]) -> list[float]:
    """Plain SGD; it shows a wrong gradient in proportion, where Adam would hide its size."""
    optimizer = torch.optim.SGD(list(parameters), lr=LEARNING_RATE)
    history = []
    for loss_of in losses:
        loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    return history


def reference(world: int = 1, model: nn.Module | None = None, loss: Callable = logits_loss) -> Trained:
    """One process on the batches of all ranks: the mean of the ranks' losses, full logits."""
    model = tiny_llama() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    losses, gradients = [], {}
    for step in range(STEPS):
        total = torch.stack([loss(model, make_batch(step, rank)) for rank in range(world)]).mean()
        total.backward()
        if step == 0:
            gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())
    return Trained(losses, gradients)
