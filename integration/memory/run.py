"""What is asked: a model, a batch, what trains and how it is spread."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from orpo_kernels.plan import Plan

from .optimizers import OPTIMIZERS

Layout = Literal["padded", "equal", "packed", "shared"]
_HEADS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


@dataclass(frozen=True)
class Run:
    """A training run on one of its devices.

    config: a transformers configuration of a causal language model; name: how to call it.
    pairs: B, a device's batch. length: T, the tokens of its longest row.
    layout: "padded" rows, of which some are shorter than T, as those of pairs are; "equal" ones, all of T tokens
        (then there is no mask); "packed", without padding; "shared", each prompt once too.
    ignored: share of the 2B*T positions that are not scored: the prompts of rejected rows and, in padded rows, padding.
        What is packed is taken to have no padding: its prompts are twice that share of a row.
    weights_dtype: of the weights as loaded. dtype: that of computation; where it is another, or 16 bits, autocast is
        on, as a trainer's `bf16=True` has it. autocast: whether it is; None decides so.
    peft: a PEFT configuration, None where every weight trains. four_bit: linear layers quantised by bitsandbytes.
    trains: names of the parameters that train, where that is neither all nor what `peft` leaves.
    optim: one of `optimizers.OPTIMIZERS`, by transformers' names. accumulates: gradients outlive a micro-batch.
    device: "cuda" or "cpu"; it need not be there. attention: transformers' name, None for the model's own.
    shards: processes over which `sharded` is spread: nothing, "optimizer" (ZeRO 1), "gradients" (ZeRO 2, and the
        former), "weights" (ZeRO 3, FSDP: all). tp: processes over which layers and head are cut.

    Raises ValueError that names the argument.
    """

    config: Any
    name: str = "the model"
    pairs: int = 1
    length: int = 1024
    layout: Layout = "padded"
    ignored: float = 0.25
    weights_dtype: torch.dtype = torch.bfloat16
    dtype: torch.dtype = torch.bfloat16
    autocast: bool | None = None
    peft: Any = None
    four_bit: bool = False
    trains: frozenset[str] | None = None
    optim: str = "adamw_torch_fused"
    accumulates: bool = False
    checkpointing: bool = False
    device: str = "cuda"
    attention: str | None = None
    plan: Plan = field(default_factory=Plan)
    sharded: Literal["nothing", "optimizer", "gradients", "weights"] = "nothing"
    shards: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        for name, least in (("pairs", 1), ("length", 2), ("shards", 1), ("tp", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: it must be at least {least}")
        if not 0.0 <= self.ignored < 1.0:
            raise ValueError(f"ignored={self.ignored}: use a share from 0 up to, not including, 1")
        if self.optim not in OPTIMIZERS:
            raise ValueError(f"optim={self.optim!r} is not one of {', '.join(OPTIMIZERS)}")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device={self.device!r}: use 'cpu' or 'cuda'")
        if self.four_bit and self.peft is None:
            raise ValueError("four_bit weights do not train: give adapters too")
        if self.tp > 1:
            text = self.config.get_text_config(decoder=True)
            for name in _HEADS:
                size = getattr(text, name, None)
                if not isinstance(size, int) or size % self.tp:
                    raise ValueError(f"tp={self.tp} does not divide {name}={size} of {self.name}")

    @property
    def casts(self) -> bool:
        """Whether autocast is on."""
        half = self.dtype in (torch.bfloat16, torch.float16)
        return (half or self.dtype != self.weights_dtype) if self.autocast is None else self.autocast

    @property
    def prompt(self) -> int:
        """Tokens of each packed row's prompt."""
        return min(round(2 * self.ignored * self.length), self.length - 2)

    @property
    def positions(self) -> int:
        """Tokens that the backbone computes."""
        shared = self.pairs * self.prompt if self.layout == "shared" else 0
        return 2 * self.pairs * self.length - shared

    @property
    def scored(self) -> int:
        """Tokens whose log-probability is taken."""
        if self.layout in ("packed", "shared"):
            return self.pairs * (2 * self.length - self.prompt)
        return max(1, round(2 * self.pairs * self.length * (1.0 - self.ignored)))
