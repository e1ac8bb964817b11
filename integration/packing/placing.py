"""Where sequences go in rows without padding, what those of a unit begin with alike once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .segments import Segment, Segments


def place(
    sequences: Sequence[Tensor],
    units: Sequence[Sequence[int]],
    row_length: int | None,
    named: Callable[[Sequence[int]], str],
) -> tuple[list[Tensor], tuple[int, int], Segments]:
    """Each sequence's flattened places, the rows' shape, and what attends to what.

    sequences: token ids, [L] int64 each. units: of which each stays in one piece, its sequences (by number) one after
    the other; what one begins with as the unit's first does is there once. row_length: most tokens a row; a unit goes
    into the first row with room for it, the longest first. None: one row. named: a unit in words.

    Raises ValueError for a unit that does not fit into a row.
    """
    units = [_leader_first(unit, sequences) for unit in units]
    shared = [[0, *(common_start(sequences[unit[0]], sequences[at]) for at in unit[1:])] for unit in units]
    own = [
        [len(sequences[at]) - common for at, common in zip(unit, commons, strict=True)]
        for unit, commons in zip(units, shared, strict=True)
    ]
    sizes = [sum(lengths) for lengths in own]
    for unit, tokens in zip(units, sizes, strict=True):
        if row_length is not None and tokens > row_length:
            raise ValueError(
                f"the {named(unit)} has {tokens} tokens and row_length={row_length}: raise row_length, or lower "
                "max_length so that longer ones are cut (a trainer's packing_length is the row_length)"
            )
    starts, used = _first_fit(sizes, row_length)
    rows, length = len(used), max(1, *used)
    places = [torch.empty(0, dtype=torch.int64)] * len(sequences)
    segments = []
    for unit, commons, lengths, (row, start) in zip(units, shared, own, starts, strict=True):
        for at, common, tokens in zip(unit, commons, lengths, strict=True):
            places[at] = torch.cat([places[unit[0]][:common], run(row * length + start, tokens)])
            if tokens:
                segments.append(Segment(row, start, tokens, prefix=common))
            start += tokens
    return places, (rows, length), Segments.of(rows, length, segments)


def common_start(first: Tensor, second: Tensor) -> int:
    """Length of the longest common beginning."""
    shorter = min(len(first), len(second))
    differs = (first[:shorter] != second[:shorter]).nonzero()
    return int(differs[0]) if len(differs) else shorter


def _leader_first(unit: Sequence[int], sequences: Sequence[Tensor]) -> list[int]:
    """The unit in an order in which none that shares nothing comes between the first and one that does."""
    first, *others = unit
    alone = [at for at in others if not common_start(sequences[first], sequences[at])]
    return [first, *(at for at in others if at not in alone), *alone]


def _first_fit(sizes: list[int], row_length: int | None) -> tuple[list[tuple[int, int]], list[int]]:
    """(row, start) of each, and how full each row is; the longest goes first, each into the first row with room."""
    used = [0]
    places = [(0, 0)] * len(sizes)
    order = range(len(sizes)) if row_length is None else sorted(range(len(sizes)), key=lambda at: -sizes[at])
    for at in order:
        fits = (row for row, full in enumerate(used) if row_length is None or full + sizes[at] <= row_length)
        row = next(fits, len(used))
        used += [0] * (row == len(used))
        places[at] = (row, used[row])
        used[row] += sizes[at]
    return places, used


def run(start: int, length: int) -> Tensor:
    return torch.arange(start, start + length)
