"""What attends to what in a batch of packed rows.

A row is a run of segments. A segment's tokens attend causally to one another and, before that, to their prefix: the
leading tokens of the leader, the last segment before it that has no prefix of its own:

    packed   | chosen 1 | rejected 1 | chosen 2 | rejected 2 | fill      no prefixes
    shared   | prompt 1, chosen 1 | rejected 1 | ...         | fill      rejected 1 has prompt 1 as its prefix
    a group  | prompt, answer 1 | answer 2 | answer 3 | ...  | fill      answers 2 and 3 have the prompt

So the keys of a segment are [prefix | segment] and the mask is causal at the bottom right. Counted along these
keys, distances are those of a row of its own: a sliding window stays exact. What fills a row up is in no segment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Segment(NamedTuple):
    """row; start, length: its tokens in that row; prefix: leading tokens of the leader that it sees."""

    row: int
    start: int
    length: int
    prefix: int = 0


class Varlen(NamedTuple):
    """A batch as FlashAttention's variable-length functions take it.

    queries, keys: int64 flattened places of the tokens, segment after segment. cu_queries, cu_keys: int32 [S + 1]
    where each segment starts in them. max_queries, max_keys: the longest.
    """

    queries: Tensor
    keys: Tensor
    cu_queries: Tensor
    cu_keys: Tensor
    max_queries: int
    max_keys: int


# Not frozen: torch 2.11 takes a frozen one for a constant, and compiles anew for each batch's numbers.
@dataclass(eq=False)
class Segments:
    """The segments of a batch [rows, length], by row and, in a row, from its start on without gaps.

    calls: a list to note each layer's (index, window) in, see `gate`; None outside its trial.
    """

    rows: int
    length: int
    by_row: tuple[tuple[Segment, ...], ...]
    calls: list[tuple[int | None, int | None]] | None = None
    _made: dict[Any, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, rows: int, length: int, segments: Iterable[Segment]) -> Segments:
        by_row: list[list[Segment]] = [[] for _ in range(rows)]
        for segment in segments:
            by_row[segment.row].append(segment)
        return cls(rows, length, tuple(tuple(sorted(row, key=lambda segment: segment.start)) for row in by_row))

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """make(), kept for the batch's other layers."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def varlen(self, device: torch.device) -> Varlen:
        return self.once(("varlen", device), lambda: self._varlen(device))

    def _varlen(self, device: torch.device) -> Varlen:
        queries, keys, cu_queries, cu_keys = [], [], [0], [0]
        for row in self.by_row:
            leader = None
            for segment in row:
                start = segment.row * self.length + segment.start
                own = torch.arange(start, start + segment.length)
                queries.append(own)
                if segment.prefix and leader is not None:
                    prefix_start = leader.row * self.length + leader.start
                    keys.append(torch.arange(prefix_start, prefix_start + segment.prefix))
                keys.append(own)
                cu_queries.append(cu_queries[-1] + segment.length)
                cu_keys.append(cu_keys[-1] + segment.prefix + segment.length)
                leader = leader if segment.prefix else segment
        return Varlen(
            torch.cat(queries).to(device),
            torch.cat(keys).to(device),
            torch.tensor(cu_queries, dtype=torch.int32, device=device),
            torch.tensor(cu_keys, dtype=torch.int32, device=device),
            max(segment.length for row in self.by_row for segment in row),
            max(segment.prefix + segment.length for row in self.by_row for segment in row),
        )

    def ranges(self, device: torch.device) -> Tensor:
        """[4, rows, length] int64 of each token: where its segment starts, where its prefix starts and stops, and
        how far its own place in its row is beyond its place among its keys. What fills up is its own segment."""
        return self.once(("ranges", device), lambda: self._ranges().to(device))

    def _ranges(self) -> Tensor:
        place = torch.arange(self.length).expand(self.rows, -1)
        table = torch.stack([place, torch.zeros_like(place), torch.zeros_like(place), place])
        for row in self.by_row:
            leader = 0
            for segment in row:
                inside = slice(segment.start, segment.start + segment.length)
                values = (segment.start, leader, leader + segment.prefix, segment.start - segment.prefix)
                table[:, segment.row, inside] = torch.tensor(values)[:, None]
                leader = leader if segment.prefix else segment.start
        return table
