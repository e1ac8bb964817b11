"""Tile shapes that were timed on this machine's card, kept from run to run.

`orpo-kernels tune` times the shapes of `configs.candidates` and keeps here, in a JSON file, those that beat the
default; the launcher takes them from then on. Nothing is timed in a call of the loss, as an autotuner would:
a tile's shape sets the order in which sums are added, and so their last bits, and the same inputs must give the
same bits in the first run and in the tenth. They change when the user says so.

An entry is found by the card's name, Triton's version, the operands' dtype, the pass (one of PASSES), classes of the
number of tokens in a chunk and of D, and whether the epilogue is a heavy one (`configs.default`). It holds the
shape, what was the default, and the seconds of both. It is used only where the default is still that one and was
slower by more than `_NOISE`, and where the shape is a candidate for the card.

The file is `tiles.json` in $ORPO_KERNELS_CACHE, or else in orpo_kernels below $XDG_CACHE_HOME or ~/.cache; it is read
once a process. Without it the defaults serve; with a broken one too, and one warning names it.
"""

from __future__ import annotations

import functools
import json
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from orpo_kernels.kernels.configs import TileConfig

PASSES = ("sums", "exponentials", "gradient")
# Upper ends of the classes; the first of each are where `configs.default` takes smaller tiles.
TOKEN_CLASSES = (64, 512)
HIDDEN_CLASSES = (1024, 3072)
_NOISE = 0.03


class Entry(NamedTuple):
    """The fastest shape, the default beside it, and the seconds of a call with each."""

    config: TileConfig
    default: TileConfig
    seconds: float
    default_seconds: float


def key(card: str, dtype: torch.dtype, what: str, tokens: int, hidden_size: int, heavy_epilogue: bool) -> str:
    """The name of an entry.

    card: `torch.cuda.get_device_name`. what: one of PASSES. tokens: in a chunk.
    """
    return " | ".join(
        (
            card,
            f"triton {triton.__version__}",
            str(dtype).removeprefix("torch."),
            what,
            f"tokens {_class(tokens, TOKEN_CLASSES)}",
            f"D {_class(hidden_size, HIDDEN_CLASSES)}",
            "heavy" if heavy_epilogue else "plain",
        )
    )


def _class(size: int, ends: tuple[int, ...]) -> str:
    return next((f"<= {end}" for end in ends if size <= end), f"> {ends[-1]}")


def shape(name: str, default: TileConfig, candidates: list[TileConfig]) -> TileConfig:
    """The tile shape to use where `default` is the launcher's own choice and `name` the entry's."""
    entry = entries().get(name)
    if (
        entry is None
        or entry.default != default
        or entry.config not in candidates
        or entry.default_seconds <= (1 + _NOISE) * entry.seconds
    ):
        return default
    return entry.config


def path() -> Path:
    """Of the file; it need not be there."""
    folder = os.environ.get("ORPO_KERNELS_CACHE")
    if folder:
        return Path(folder) / "tiles.json"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "orpo_kernels" / "tiles.json"


@functools.cache
def entries() -> dict[str, Entry]:
    """What the file holds. A broken file is as good as none, after a warning."""
    file = path()
    try:
        return {name: _entry(fields) for name, fields in json.loads(file.read_text(encoding="utf-8")).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        warnings.warn(
            f"{file} is not what `orpo-kernels tune` writes ({type(error).__name__}: {error}): tile shapes are the "
            "defaults. Delete it, or run the command again",
            stacklevel=2,
        )
        return {}


def _entry(fields: dict[str, Any]) -> Entry:
    return Entry(
        TileConfig(**fields["config"]),
        TileConfig(**fields["default"]),
        float(fields["seconds"]),
        float(fields["default_seconds"]),
    )


def save(found: dict[str, Entry]) -> Path:
    """Adds entries to the file, in place of those of the same name; returns its path. Raises OSError."""
    file = path()
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = {
        name: {**entry._asdict(), "config": entry.config._asdict(), "default": entry.default._asdict()}
        for name, entry in {**entries(), **found}.items()
    }
    # Written whole, then renamed: a process that reads meanwhile sees the old file or the new one.
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(lines, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(file)
    entries.cache_clear()
    return file
