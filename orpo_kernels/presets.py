"""What the public ORPO implementations do differently, as data.

The paper's code, TRL and LLaMA-Factory all minimise `NLL + beta * odds-ratio term`, yet one batch gives three
losses. `Preset` has one field per difference; `PRESETS` holds each implementation's values, as read in its
source:

====================  ==================================  =================  =====  ==========
preset                NLL over                            NLL mean           beta   odds ratio
====================  ==================================  =================  =====  ==========
`trl` 1.16            prompt + chosen (encoder-decoder:   pooled tokens      0.1    fp32
                      chosen only)
`llama_factory` 0.9   chosen only                         per sequence,      0.1    fp32
                                                          then batch
`paper`               prompt + chosen                     pooled tokens      1.0    fp64
(xfactlab/orpo)       (`--disable_prompt_loss`: chosen)
====================  ==================================  =================  =====  ==========

The paper's code calls the weight `alpha`. LLaMA-Factory's `pref_ftx` adds that many further NLL terms:
`dataclasses.replace(get_preset("llama_factory"), nll_weight=1 + pref_ftx)`.

Three habits of the originals are not reproduced, because they change which tokens are scored or how a result
is rounded, not the objective: xfactlab/orpo counts the first padding token after an answer in its log-prob,
drops every token equal to the padding token (the true end of sequence too) from its NLL, and rounds the final
loss to bf16. LLaMA-Factory's `ld_alpha` (off by default) reweights tokens before the mean and has no
counterpart here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch


def check_weight(name: str, value: float) -> None:
    """Raise ValueError, calling the value `name`, unless it is a finite number of at least 0."""
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}={value}: use a finite number of at least 0")


@dataclass(frozen=True)
class Preset:
    """Every choice in which ORPO implementations differ. Vary one with `dataclasses.replace`.

    Attributes:
        name: shown in error messages.
        nll_over: "prompt+chosen" or "chosen" tokens of the chosen sequence enter the NLL. None: the caller's
            NLL mask decides, and without one it is the chosen completion.
        nll_mean: "tokens" divides the summed NLL by the batch's token count; "sequences" averages within each
            chosen sequence first, then over the sequences.
        beta: weight of the odds-ratio term where the caller names none.
        nll_weight: factor on the NLL term.
        odds_dtype: dtype of the odds-ratio arithmetic; None keeps that of the log-probs.

    Raises:
        ValueError: a field is outside the values above.
    """

    name: str
    nll_over: Literal["prompt+chosen", "chosen"] | None
    nll_mean: Literal["tokens", "sequences"] = "tokens"
    beta: float = 0.1
    nll_weight: float = 1.0
    odds_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.nll_over not in ("prompt+chosen", "chosen", None):
            raise ValueError(f"nll_over={self.nll_over!r}: use 'prompt+chosen', 'chosen' or None")
        if self.nll_mean not in ("tokens", "sequences"):
            raise ValueError(f"nll_mean={self.nll_mean!r}: use 'tokens' or 'sequences'")
        if self.odds_dtype not in (None, torch.float32, torch.float64):
            raise ValueError(f"odds_dtype={self.odds_dtype}: use torch.float32, torch.float64 or None")
        check_weight("beta", self.beta)
        check_weight("nll_weight", self.nll_weight)


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("trl", nll_over="prompt+chosen"),
        Preset("llama_factory", nll_over="chosen", nll_mean="sequences"),
        Preset("paper", nll_over="prompt+chosen", beta=1.0, odds_dtype=torch.float64),
    )
}

_UNNAMED = Preset("none", nll_over=None)


def get_preset(preset: str | Preset | None) -> Preset:
    """Return the preset of that name; a `Preset` comes back as it is; None means pooled tokens, beta 0.1.

    Raises:
        ValueError: no preset has this name.
        TypeError: `preset` is none of the three.
    """
    if preset is None:
        return _UNNAMED
    if isinstance(preset, Preset):
        return preset
    if not isinstance(preset, str):
        raise TypeError(f"preset is a {type(preset).__name__}: use a name, a Preset or None")
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r} is unknown: use one of {', '.join(map(repr, PRESETS))}")
    return PRESETS[preset]
