"""What the head and the loss of an ORPO step take, by arithmetic alone: no tensor is made.

Full logits, over all 2B*T positions, padding and prompts included. At the peak of a forward without gradient
there are two numbers a logit, the logits in fp32 and their log-softmax. With gradient it comes in the
backward, with three: the log-softmax that was saved, its gradient, and that of the logits; a soft-cap adds its
tanh, saved in the compute dtype. All but that are fp32 whatever the compute dtype (fp64 for fp64). That is one
cross entropy over everything and no copy: what a trainer does beyond it comes on top.

Ours, over the N scored tokens: `Plan.schedule`'s scratch and saved bytes.

Gradients of the hidden states and of the weight are results, the same for both, and are counted apart. A unit
is 2*N*D*V floating-point operations; full logits do theirs for every position, scored or not.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from orpo_kernels.kernels.dispatch import fitting
from orpo_kernels.kernels.triton_bytes import DTYPES
from orpo_kernels.models import CONFIGS
from orpo_kernels.plan import Plan, Schedule


@dataclass(frozen=True)
class HeadSize:
    """A language-model head: logits [V] = f(W [V, D] h [D]), f a soft-cap or nothing.

    dtype: the weight's, where it is known.
    """

    hidden_size: int
    vocab_size: int
    softcap: float | None = None
    dtype: torch.dtype | None = None


def _head(config: dict[str, Any]) -> HeadSize:
    softcap = config.get("final_logit_softcapping")
    return HeadSize(config["hidden_size"], config["vocab_size"], softcap, getattr(torch, config["dtype"]))


MODELS = {name: _head(config) for name, config in CONFIGS.items()}

# What trains: (hidden, weight), and whether logit gradients are kept.
SETTINGS = {
    "evaluation": (False, False, False),
    "frozen head": (True, False, False),
    "trained head": (True, True, False),
    "trained head, logit gradients kept": (True, True, True),
}
_FULL_UNITS = {"evaluation": 1.0, "frozen head": 2.0}  # 3 where the head trains


@dataclass(frozen=True)
class Estimate:
    """One of SETTINGS. Bytes, and units of 2*N*D*V operations.

    full_bytes: peak of full logits, as at the module's top. gradient_bytes: results, on top of either.
    schedule: what a call to `linear_logps` does; its scratch and saved bytes are ours. tokens: those scored.
    """

    setting: str
    tokens: int
    full_bytes: int
    full_units: float
    schedule: Schedule
    gradient_bytes: int

    @property
    def our_bytes(self) -> int:
        return self.schedule.scratch_bytes + self.schedule.saved_bytes

    @property
    def our_units(self) -> float:
        return self.schedule.units_forward + self.schedule.units_backward


def estimate(
    head: HeadSize,
    pairs: int,
    length: int,
    *,
    dtype: torch.dtype,
    device: str = "cuda",
    ignored: float = 0.25,
    scratch_bytes: int | None = None,
) -> list[Estimate]:
    """What B=`pairs` pairs of T=`length` tokens a row take, for each of SETTINGS.

    dtype: the compute dtype. device: "cuda" or "cpu"; it need not be there. ignored: share of the 2B*T positions
    that are not scored (prompts of rejected rows, padding). scratch_bytes: as for `Plan`.

    Raises ValueError that names the argument: sizes below 1, a share outside [0, 1), a budget too small.
    """
    sizes = {"pairs": pairs, "length": length, "hidden_size": head.hidden_size, "vocab_size": head.vocab_size}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size}: it must be at least 1")
    if not 0.0 <= ignored < 1.0:
        raise ValueError(f"ignored={ignored}: use a share from 0 up to, not including, 1")
    positions = 2 * pairs * length
    scored = max(1, round(positions * (1.0 - ignored)))
    return [
        estimate_call(head, setting, positions, scored, dtype=dtype, device=device, plan=Plan(scratch_bytes, keep))
        for setting, (_, _, keep) in SETTINGS.items()
    ]


def estimate_call(
    head: HeadSize, setting: str, positions: int, scored: int, *, dtype: torch.dtype, device: str, plan: Plan
) -> Estimate:
    """One of SETTINGS, for as many hidden states and scored tokens; the plan says what is kept of logit gradients."""
    train_hidden, train_weight, _ = SETTINGS[setting]
    logits = positions * head.vocab_size
    wide, item = max(4, dtype.itemsize), dtype.itemsize
    capped = head.softcap is not None
    return Estimate(
        setting,
        scored,
        logits * (3 * wide + (item if capped else 0)) if train_hidden else logits * 2 * wide,
        _FULL_UNITS.get(setting, 3.0) * positions / scored,
        _schedule(plan, head, scored, dtype, device, train_hidden=train_hidden, train_weight=train_weight),
        item * head.hidden_size * ((positions if train_hidden else 0) + (head.vocab_size if train_weight else 0)),
    )


def _schedule(plan: Plan, head: HeadSize, tokens: int, dtype: torch.dtype, device: str, **trains: Any) -> Schedule:
    """The loop sizes that a call would choose (`kernels.dispatch.choose`): the kernels' where they serve the dtype."""
    sizes: Any = (tokens, head.hidden_size, head.vocab_size, dtype, device)
    softcap = head.softcap is not None
    return fitting(
        lambda kernels: plan.schedule(*sizes, softcap=softcap, full_vocab_tiles=kernels, **trains),
        kernels=device != "cpu" and dtype in DTYPES,
    )


def head_of_model(name: str) -> HeadSize:
    """The head of one of MODELS, or of the model whose config.json is in the folder `name`.

    Raises ValueError for a name that is neither, or a config.json without the sizes.
    """
    if name in MODELS:
        return MODELS[name]
    path = Path(name) / "config.json"
    if not path.is_file():
        known = ", ".join(MODELS)
        raise ValueError(f"model={name!r} is neither one of {known} nor a folder with a config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    text = config.get("text_config", config)  # of a multimodal model
    missing = [key for key in ("hidden_size", "vocab_size") if not isinstance(text.get(key), int)]
    if missing:
        raise ValueError(f"{path} has no {' and no '.join(missing)}: give the sizes themselves")
    stored = str(text.get("dtype") or text.get("torch_dtype") or config.get("dtype") or config.get("torch_dtype"))
    dtype = getattr(torch, stored.removeprefix("torch."), None)
    return HeadSize(
        text["hidden_size"],
        text["vocab_size"],
        text.get("final_logit_softcapping"),
        dtype if isinstance(dtype, torch.dtype) else None,
    )
