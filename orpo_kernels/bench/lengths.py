"""How long prompts and answers are: real pairs are uneven, and what is padded or cut decides what is saved."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

# Mean and deviation of the logarithm of the tokens of prompt, chosen and rejected. Fitted to 300 English pairs of
# a public demo set (LLaMA-Factory's dpo_en_demo, chats of several turns) in SmolLM2's tokens, whose medians are
# 189, 319 and 344.
LOGNORMAL = ((5.45, 1.19), (5.31, 1.21), (5.50, 1.04))
# Of English in SmolLM2's tokens: 4.0 to 4.6 in the pairs at hand.
CHARACTERS_A_TOKEN = 4.3

Lengths = tuple[tuple[int, int, int], ...]


def lognormal(pairs: int, seed: int = 0) -> Lengths:
    """(prompt, chosen, rejected) tokens of `pairs` pairs, each drawn from its own LOGNORMAL."""
    draw = random.Random(seed)
    return tuple(_triple(math.exp(draw.gauss(*part)) for part in LOGNORMAL) for _ in range(pairs))


def from_file(path: Path, pairs: int, seed: int = 0) -> Lengths:
    """The same, of pairs drawn without repetition from a .json (an array) or .jsonl file of rows.

    A row holds numbers of tokens, {"prompt": 120, "chosen": 80, "rejected": 95}, or texts in any shape that the
    trainers take, counted as one token for every CHARACTERS_A_TOKEN.

    Raises ValueError for a file that cannot be read, or holds too few rows.
    """
    rows = read_rows(path, f"lengths={str(path)!r}")
    if len(rows) < pairs:
        raise ValueError(f"lengths={str(path)!r} holds {len(rows)} rows, fewer than {pairs} pairs")
    return tuple(_of_row(row) for row in random.Random(seed).sample(rows, pairs))


def read_rows(path: Path, option: str) -> list[dict[str, Any]]:
    """The rows of a file that `integration.files` reads. Raises ValueError that starts with `option` if it has none."""
    from orpo_kernels.integration.files import read_pairs

    try:
        return read_pairs(path)
    except OSError as error:
        raise ValueError(f"{option}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error


def _of_row(row: dict[str, Any]) -> tuple[int, int, int]:
    from orpo_kernels.integration.shapes import normalize_example

    parts = ("prompt", "chosen", "rejected")
    if all(isinstance(row.get(part), int) for part in parts):
        return _triple(row[part] for part in parts)
    texts = normalize_example(row)
    return _triple(_characters(texts[part]) / CHARACTERS_A_TOKEN for part in parts)


def _characters(text: str | list[dict[str, Any]]) -> int:
    return len(text) if isinstance(text, str) else sum(len(turn["content"]) for turn in text)


def _triple(numbers: Any) -> tuple[int, int, int]:
    prompt, chosen, rejected = (max(1, round(number)) for number in numbers)
    return prompt, chosen, rejected
