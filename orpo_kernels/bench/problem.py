"""What is measured: the inputs of head and loss, like those of a trained model.

Random hidden states and weights alone would make every token improbable and every competitor equal, which
flatters no method that skips what is small. So logits of competitors are normal with deviation 3, and every
target's logit is set to be about as large as all competitors together: log-odds normal with mean 0.5 and
deviation 2.5, which is a log-probability of -0.5 in the middle and down to -7 in the tail.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

IGNORED = -100
_LOGIT_DEVIATION = 3.0
_LOG_ODDS = (0.5, 2.5)  # mean, deviation


@dataclass(frozen=True)
class Problem:
    """B pairs, rows of at most T tokens, D, V, and how they are made.

    dtype, device: names. softcap: of the logits, or None. ignored: the share of positions that nothing scores,
    all in the prompts of the rejected rows, where `lengths` is empty.
    statistics: whether those of each scored token's distribution are made too (`linear_token_stats`).
    lengths: (prompt, chosen, rejected) tokens of each pair; rows are padded to the longest, and T is the most a
    row may have.

    Raises ValueError that names the field.
    """

    pairs: int = 2
    length: int = 384
    hidden_size: int = 768
    vocab_size: int = 32768
    dtype: str = "float32"
    device: str = "cpu"
    softcap: float | None = None
    ignored: float = 0.25
    lengths: tuple[tuple[int, int, int], ...] = ()
    beta: float = 0.1
    seed: int = 0
    statistics: bool = False
    spans: tuple[tuple[int, int, int], ...] = field(init=False, repr=False, compare=False, default=())

    def __post_init__(self) -> None:
        for name, least in {"pairs": 1, "length": 2, "hidden_size": 1, "vocab_size": 2}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: it must be at least {least}")
        if not 0.0 <= self.ignored <= 0.5:
            raise ValueError(f"ignored={self.ignored}: use a share from 0 to 0.5, the rejected rows' prompts")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap={self.softcap}: it must be positive")
        if self.lengths and len(self.lengths) != self.pairs:
            raise ValueError(f"lengths has {len(self.lengths)} rows for {self.pairs} pairs")
        # Positions predict the token that follows: a row of P + C tokens has P - 1 + C of them.
        spans = tuple(_spans(*row, self.length) for row in self.lengths)
        if not spans:
            prompt = min(round(2 * self.ignored * self.length), self.length - 1)
            spans = ((prompt, self.length - prompt, self.length - prompt),) * self.pairs
        object.__setattr__(self, "spans", spans)

    @property
    def padded_length(self) -> int:
        """Positions a row."""
        return max(prompt + max(chosen, rejected) for prompt, chosen, rejected in self.spans)

    @property
    def positions(self) -> int:
        return 2 * self.pairs * self.padded_length

    @property
    def scored(self) -> int:
        """N: prompt and answer of the chosen rows, for the NLL; the answer of the rejected ones."""
        return sum(prompt + chosen + rejected for prompt, chosen, rejected in self.spans)

    def as_dict(self) -> dict[str, Any]:
        """The fields; with `of` it comes back."""
        return {name: value for name, value in asdict(self).items() if name != "spans"}

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Problem:
        return cls(**{**fields, "lengths": tuple(tuple(row) for row in fields["lengths"])})

    def small(self) -> Problem:
        """One that costs nothing, to load what the first call loads."""
        return replace(self, pairs=1, length=16, hidden_size=64, vocab_size=512, lengths=())


def _spans(prompt: int, chosen: int, rejected: int, most: int) -> tuple[int, int, int]:
    """Positions of prompt and completions, rows cut to `most` tokens as `tokenization.truncate_pair` does."""
    prompt = min(prompt, max(most - max(chosen, rejected), most // 2))
    chosen, rejected = min(chosen, most - prompt), min(rejected, most - prompt)
    return max(prompt - 1, 0), max(chosen, 1), max(rejected, 1)


@dataclass(frozen=True)
class Inputs:
    """What every peer is given.

    hidden: [2B, T, D], chosen rows first; weight: [V, D].
    targets: [2B, T], the completions'; nll_targets: [B, T], prompt and completion of the chosen rows; IGNORED
    elsewhere. scored_targets: [2B, T], the union.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    nll_targets: Tensor
    softcap: float | None
    beta: float

    @property
    def scored_targets(self) -> Tensor:
        pairs = len(self.nll_targets)
        return torch.cat([self.nll_targets, self.targets[pairs:]])


def make_inputs(problem: Problem) -> Inputs:
    """The same for the same problem on the same kind of device."""
    device, dtype = torch.device(problem.device), getattr(torch, problem.dtype)
    random = torch.Generator(device).manual_seed(problem.seed)
    rows, length, d, v = 2 * problem.pairs, problem.padded_length, problem.hidden_size, problem.vocab_size
    weight = torch.randn(v, d, generator=random, device=device, dtype=dtype).mul_(d**-0.5)
    ids = torch.randint(v, (rows, length), generator=random, device=device)
    hidden = torch.randn(rows, length, d, generator=random, device=device).mul_(_LOGIT_DEVIATION)
    mean, deviation = _LOG_ODDS
    odds = torch.randn(rows, length, generator=random, device=device).mul_(deviation).add_(mean)
    competitors = math.log(v) + _LOGIT_DEVIATION**2 / 2
    own = weight[ids].float()  # [2B, T, D]
    hidden += own * ((odds + competitors - (hidden * own).sum(-1)) / own.square().sum(-1))[..., None]

    prompt, chosen, rejected = (torch.tensor(sizes, device=device) for sizes in zip(*problem.spans, strict=True))
    place = torch.arange(length, device=device)
    start = prompt.repeat(2)[:, None]
    end = (prompt.repeat(2) + torch.cat([chosen, rejected]))[:, None]
    targets = ids.masked_fill((place < start) | (place >= end), IGNORED)
    nll_targets = ids[: problem.pairs].masked_fill(place >= end[: problem.pairs], IGNORED)
    return Inputs(hidden.to(dtype), weight, targets, nll_targets, problem.softcap, problem.beta)
