"""Padded batches of any trainer as layouts: of pairs, of groups of answers to one prompt, of sequences by themselves.

A trainer hands over [B, T] ids, their mask and labels, and wants [B, T] back. `SequenceLayout` puts the sequences in
them into rows without padding; where each token went, [B, T], is all that is needed to score it there:

    places[b, t]    the flattened place of token t of sequence b
    rows=places     of `ModelLogps`: what predicts the token after it
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..batches import SequenceBatch
from .layout import Name
from .placing import place, run
from .segments import Segments

# What the gate tries a layout on: of two groups, three members each.
_GROUPS, _MEMBERS = 2, 3


@dataclass(frozen=True, eq=False)
class SequenceLayout:
    """A batch of sequences in one layout.

    sequences: token ids, [L] int64 each, on the host. groups: which of them (by number) begin alike, each in one.
    segments: what attends to what, None for padded rows. row_length: most tokens a row; None: one row.
    """

    name: Name
    sequences: tuple[Tensor, ...]
    groups: tuple[tuple[int, ...], ...]
    segments: Segments | None = None
    row_length: int | None = None
    padding_value: int = 0

    def laid_out_as(self, name: Name) -> SequenceBatch:
        """The batch of the same sequences in another layout."""
        return lay_out_sequences(name, self.sequences, self.groups, self.row_length, self.padding_value)

    def few(self) -> SequenceLayout:
        """A few of the longest sequences, with what they share."""
        groups = sorted(self.groups, key=lambda group: -max(len(self.sequences[at]) for at in group))
        taken = [group[:_MEMBERS] for group in groups[:_GROUPS]]
        sequences = tuple(self.sequences[at] for group in taken for at in group)
        numbers = iter(range(len(sequences)))
        renumbered = tuple(tuple(next(numbers) for _ in group) for group in taken)
        return SequenceLayout(self.name, sequences, renumbered, None, self.row_length, self.padding_value)


def lay_out_sequences(
    name: Name,
    sequences: Sequence[Tensor],
    groups: Sequence[Sequence[int]],
    row_length: int | None = None,
    padding_value: int = 0,
) -> SequenceBatch:
    """`input_ids` and `position_ids` [rows, T] int64 (padded: `attention_mask` too), `places` [M] int64, a sequence's
    after the other's, M the tokens of all; `rows` and `targets` [N] of every token but a sequence's first; `layout`.

    Raises ValueError for a sequence (or group, where it is shared) of more than `row_length` tokens.
    """
    segments = None
    if name == "padded":
        rows, length = len(sequences), max(1, *map(len, sequences))
        places = [run(at * length, len(ids)) for at, ids in enumerate(sequences)]
    else:
        units = list(groups) if name == "shared" else [(at,) for group in groups for at in group]
        places, (rows, length), segments = place(sequences, units, row_length, _named)
    input_ids = torch.full((rows, length), padding_value, dtype=torch.int64)
    position_ids, attention_mask = (torch.zeros((rows, length), dtype=torch.int64) for _ in range(2))
    for ids, where in zip(sequences, places, strict=True):
        input_ids.view(-1)[where] = ids
        position_ids.view(-1)[where] = torch.arange(len(ids))
        attention_mask.view(-1)[where] = 1
    kept = tuple(map(tuple, groups))
    return {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "attention_mask": attention_mask,
        "places": torch.cat(places),
        "rows": torch.cat([where[:-1] for where in places]),
        "targets": torch.cat([ids[1:] for ids in sequences]),
        "layout": SequenceLayout(name, tuple(sequences), kept, segments, row_length, padding_value),
    }


def sequences_of(input_ids: Tensor, attention_mask: Tensor) -> list[Tensor] | None:
    """The tokens of each row [B, T] that are not padding; None where padding stands between them."""
    mask = attention_mask.cpu() == 1
    if bool((mask[:, 1:] & ~mask[:, :-1]).sum(1).add(mask[:, 0]).gt(1).any()):
        return None
    return [ids[kept] for ids, kept in zip(input_ids.cpu(), mask, strict=True)]


def groups_of(sequences: Sequence[Tensor], prompts: Sequence[int]) -> list[tuple[int, ...]]:
    """The sequences (by number) that have one prompt, its first `prompts` tokens, in groups; those without by
    themselves."""
    groups: dict[Any, list[int]] = {}
    for at, (ids, length) in enumerate(zip(sequences, prompts, strict=True)):
        groups.setdefault(tuple(ids[:length].tolist()) or at, []).append(at)
    return [tuple(group) for group in groups.values()]


def _named(unit: Sequence[int]) -> str:
    return f"sequence {unit[0]} of the batch" if len(unit) == 1 else f"group of sequences {', '.join(map(str, unit))}"
