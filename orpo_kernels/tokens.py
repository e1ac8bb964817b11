"""Which tokens are scored, found once per call.

Ignored positions leave before any matrix product. Counting the scored ones and checking their range is one
read from the device; everything that needs it is asked for here, so that a caller can do it before the model's
kernels are queued.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RowGroups(NamedTuple):
    """Tokens grouped by the row of `hidden` that predicts them, where rows repeat.

    Their gradients are summed group by group, rank by rank, in a fixed order: no atomics.

    order: [N] token indices sorted by row (stable). unique: [U] the rows. starts, counts: [U] each group's
    place in `order`. largest: the largest count.
    """

    order: Tensor
    unique: Tensor
    starts: Tensor
    counts: Tensor
    largest: int


class ScoredTokens(NamedTuple):
    """positions: [N] int64 places in the flattened targets, None when every one is scored. targets: [N] int64.
    rows: [N] int64 rows of the flattened hidden, None when N == R and they correspond. groups: None when
    no row repeats."""

    positions: Tensor | None
    targets: Tensor
    rows: Tensor | None
    groups: RowGroups | None


def select_scored(
    targets: Tensor, vocab_size: int, num_rows: int, *, ignore_index: int = -100, rows: Tensor | None = None
) -> ScoredTokens:
    """The scored tokens among `targets` (any shape, int64) for `num_rows` rows of hidden.

    Raises ValueError that names the first target outside [0, vocab_size), or the first of `rows` outside
    [0, num_rows).
    """
    flat = targets.reshape(-1).long()
    scored = flat != ignore_index
    bad = scored & ((flat < 0) | (flat >= vocab_size))
    flat_rows = None
    bad_rows = bad
    if rows is not None:
        flat_rows = rows.reshape(-1)
        bad_rows = scored & ((flat_rows < 0) | (flat_rows >= num_rows))
    count, any_bad, any_bad_rows = torch.stack([scored.sum(), bad.sum(), bad_rows.sum()]).tolist()
    if any_bad:
        place = int(bad.nonzero()[0])
        raise ValueError(
            f"targets holds {int(flat[place])} at flattened position {place}: a target must lie in "
            f"[0, {vocab_size}) (the rows of weight) or be ignore_index={ignore_index}"
        )
    if any_bad_rows and flat_rows is not None:
        place = int(bad_rows.nonzero()[0])
        raise ValueError(
            f"rows holds {int(flat_rows[place])} at flattened position {place}: it must name a row of the "
            f"flattened hidden, in [0, {num_rows})"
        )

    if count == flat.numel():
        positions, chosen = None, flat
        if flat_rows is None:
            return ScoredTokens(None, flat, None, None)
        chosen_rows = flat_rows
    else:
        # The size is known, so a GPU need not be waited for again.
        positions = torch.nonzero_static(scored, size=count).squeeze(1)
        chosen = flat.index_select(0, positions)
        if flat_rows is None:
            return ScoredTokens(positions, chosen, positions, None)
        chosen_rows = flat_rows.index_select(0, positions)
    return ScoredTokens(positions, chosen, chosen_rows, group_rows(chosen_rows))


def group_rows(rows: Tensor) -> RowGroups | None:
    order = torch.argsort(rows, stable=True)
    unique, counts = torch.unique_consecutive(rows.index_select(0, order), return_counts=True)
    if unique.numel() == rows.numel():
        return None
    starts = counts.cumsum(0) - counts
    return RowGroups(order, unique, starts, counts, int(counts.max()))
