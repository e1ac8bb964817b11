"""Batches of preference pairs as layouts: padded, packed, or packed with each prompt once.

    padded   [2B, T]     a row a sequence, filled up to the longest
    packed   [rows, T]   sequences one after the other
    shared   [rows, T]   prompt, chosen, rejected one after the other; positions of rejected restart after the
                         prompt, and the prompt's last token predicts the first of both answers

A layout is known from where it puts each token of each sequence, `places` (flattened). Everything that follows
the model reads the same flat arrays, one entry a scored token, whatever the layout:

    rows     the place whose hidden state predicts it: that of the token before it in its sequence
    targets  the token
    pair     its pair in the batch
    kind     PROMPT, CHOSEN or REJECTED of `orpo_kernels.objective`

in the order chosen sequences then rejected ones, so that sums over them are of the same numbers in the same order.
`places` come in that order too, a sequence's after the other's: what is shared is in both.

What two sequences share is what their ids have in common at the start, even beyond the prompt: tokens that agree
so far have the same hidden states. A hidden state then predicts two targets, and `rows` names it twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from orpo_kernels.objective import CHOSEN, PROMPT, REJECTED

from ..batches import FlatBatch, TokenizedRow
from .placing import common_start, place, run
from .segments import Segments

Name = Literal["padded", "packed", "shared"]
NllOver = Literal["prompt+chosen", "chosen"]
_FEW = 2


@dataclass(frozen=True, eq=False)
class Layout:
    """What a batch of a layout knows beside its tensors, all on the host.

    segments: what attends to what, None for padded rows. pairs: the rows it was made of, so that they can be laid
    out otherwise. row_length, nll_over, padding_value: as for `pack_pairs`.
    """

    name: Name
    pairs: tuple[TokenizedRow, ...]
    segments: Segments | None
    row_length: int | None
    nll_over: NllOver
    padding_value: int

    @property
    def num_pairs(self) -> int:
        return len(self.pairs)

    @property
    def lengths(self) -> list[int]:
        """[2B] tokens of each sequence, chosen ones then rejected ones: what cuts `places` into theirs."""
        chosen = [len(pair["chosen_input_ids"]) for pair in self.pairs]
        return chosen + [len(pair["rejected_input_ids"]) for pair in self.pairs]

    def few(self) -> Layout:
        """The longest pairs: they are likeliest to be longer than a window."""
        longest = sorted(self.pairs, key=lambda row: -max(len(row["chosen_input_ids"]), len(row["rejected_input_ids"])))
        return replace(self, pairs=tuple(longest[:_FEW]), segments=None)

    def laid_out_as(self, name: Name) -> FlatBatch:
        """The batch of the same pairs in another layout."""
        return lay_out(
            name,
            self.pairs,
            row_length=self.row_length,
            nll_over=self.nll_over,
            padding_value=self.padding_value,
        )


class _Pair(NamedTuple):
    chosen: Tensor
    chosen_prompt: int
    rejected: Tensor
    rejected_prompt: int


def asked_for(packing: bool | str, share_prefix: bool | str, packing_length: int | None = None) -> Name:
    """The layout that a trainer's options ask for. packing="auto" asks as True does, where it is worth it;
    share_prefix="auto" shares prompts where packing is on.

    Raises ValueError for other values than "auto", True or False (or these as text), and for a `packing_length` below 1
    or for padded rows.
    """
    packs = {"auto": True, "true": True, "false": False}.get(str(packing).lower())
    if packs is None:
        raise ValueError(f"packing={packing!r}: use 'auto', True or False")
    shares = {"auto": packs, "true": True, "false": False}.get(str(share_prefix).lower())
    if shares is None:
        raise ValueError(f"share_prefix={share_prefix!r}: use 'auto', True or False")
    name: Name = "shared" if shares else "packed" if packs else "padded"
    if packing_length is not None and (packing_length < 1 or name == "padded"):
        raise ValueError(
            f"packing_length={packing_length}: use a positive int, and only with packing=True or share_prefix=True"
        )
    return name


def lay_out(
    name: Name,
    batch: Sequence[TokenizedRow],
    *,
    row_length: int | None = None,
    nll_over: NllOver = "prompt+chosen",
    padding_value: int = 0,
) -> FlatBatch:
    """`pad_pairs` or `pack_pairs`, by the layout's name."""
    if name == "padded":
        return pad_pairs(batch, nll_over=nll_over, padding_value=padding_value)
    return pack_pairs(batch, name == "shared", row_length=row_length, nll_over=nll_over, padding_value=padding_value)


def pack_pairs(
    batch: Sequence[TokenizedRow],
    share_prefix: bool,
    *,
    row_length: int | None = None,
    nll_over: NllOver = "prompt+chosen",
    padding_value: int = 0,
) -> FlatBatch:
    """B tokenised pairs (rows of `data.tokenize_pair`) in rows without padding between them.

    batch: the pairs; their order is that of `pair`.
    share_prefix: put the tokens that both sequences of a pair start with into the row once.
    row_length: most tokens a row. A sequence (with share_prefix a pair) goes into the first row with room for it,
        the longest first. None: one row.
    nll_over: "chosen" leaves the chosen sequences' prompt tokens unscored.
    padding_value: a token id to fill rows up with.

    Returns `input_ids`, `position_ids` [rows, T] int64; `rows`, `targets`, `pair`, `kind` [N] int64 and `places` [M]
    int64, M the tokens of all sequences (see above); `layout`, a `Layout`. T is the length of the fullest row.

    Raises ValueError for a batch without pairs or with rows that are not tokenised, and for a sequence or pair that
    does not fit into a row.
    """
    pairs = _read(batch)
    sequences = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    both = [[index, len(pairs) + index] for index in range(len(pairs))]
    units = both if share_prefix else [[at] for pair in both for at in pair]

    def named(unit: Sequence[int]) -> str:
        side, index = divmod(unit[0], len(pairs))
        return f"pair {index}" if share_prefix else f"{('chosen', 'rejected')[side]} sequence of pair {index}"

    places, (rows, length), segments = place(sequences, units, row_length, named)
    layout = Layout(
        "shared" if share_prefix else "packed",
        tuple(batch),
        segments,
        row_length,
        nll_over,
        padding_value,
    )
    return _batch(layout, pairs, places, (rows, length))


def pad_pairs(
    batch: Sequence[TokenizedRow], *, nll_over: NllOver = "prompt+chosen", padding_value: int = 0
) -> FlatBatch:
    """The padded rows of `PreferenceCollator` with the flat description; any model takes them.

    Returns what `pack_pairs` does, with an `attention_mask` [2B, T].
    """
    pairs = _read(batch)
    sequences = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    length = max(1, *map(len, sequences))
    places = [run(index * length, len(ids)) for index, ids in enumerate(sequences)]
    shape = (len(sequences), length)
    laid = _batch(Layout("padded", tuple(batch), None, None, nll_over, padding_value), pairs, places, shape)
    laid["attention_mask"] = torch.zeros(shape, dtype=torch.int64)
    laid["attention_mask"].view(-1)[torch.cat(places)] = 1
    return laid


def sequence_places(batch: FlatBatch) -> tuple[Tensor, ...]:
    """The flattened places of each sequence's tokens, prompt included, chosen ones then rejected ones.

    batch: as `pack_pairs` makes it.
    """
    return batch["places"].split(batch["layout"].lengths)


def tokens_a_step(rows: Sequence[TokenizedRow], batch_size: int) -> dict[Name, float]:
    """Mean tokens that a model computes for a batch of `batch_size` pairs, by layout, in the order of `rows`."""
    padded = packed = shared = batches = 0
    for start in range(0, len(rows), batch_size):
        pairs = _read([rows[index] for index in range(start, min(start + batch_size, len(rows)))])
        lengths = [len(ids) for pair in pairs for ids in (pair.chosen, pair.rejected)]
        padded += len(lengths) * max(lengths)
        packed += sum(lengths)
        shared += sum(lengths) - sum(common_start(pair.chosen, pair.rejected) for pair in pairs)
        batches += 1
    count = max(batches, 1)
    return {"padded": padded / count, "packed": packed / count, "shared": shared / count}


def sequence_of(row: Mapping[str, Any], side: str) -> tuple[Tensor, int]:
    """One side's ids, prompt + completion, and the length of its prompt; ValueError if the row is not tokenised."""
    try:
        ids, prompt_length = row[f"{side}_input_ids"], row[f"{side}_prompt_length"]
    except KeyError as error:
        raise ValueError(
            f"a row has no {error}, only {sorted(row)}: tokenise the data set with prepare_dataset, and set "
            "remove_unused_columns=False so that the trainer keeps its columns"
        ) from None
    return torch.as_tensor(ids, dtype=torch.int64), int(prompt_length)


def _read(batch: Sequence[TokenizedRow]) -> list[_Pair]:
    if not batch:
        raise ValueError("the batch has no rows: a layout needs at least one pair")
    return [_Pair(*sequence_of(row, "chosen"), *sequence_of(row, "rejected")) for row in batch]


def _batch(layout: Layout, pairs: list[_Pair], places: list[Tensor], shape: tuple[int, int]) -> FlatBatch:
    """The batch of a layout, from the flattened places of each sequence's tokens, chosen then rejected."""
    input_ids = torch.full(shape, layout.padding_value, dtype=torch.int64)
    position_ids = torch.zeros(shape, dtype=torch.int64)
    flat: dict[str, list[Tensor]] = {"rows": [], "targets": [], "pair": [], "kind": []}
    sequences = [(pair.chosen, pair.chosen_prompt, CHOSEN) for pair in pairs]
    sequences += [(pair.rejected, pair.rejected_prompt, REJECTED) for pair in pairs]
    for index, ((ids, prompt, kind), where) in enumerate(zip(sequences, places, strict=True)):
        input_ids.view(-1)[where] = ids
        position_ids.view(-1)[where] = torch.arange(len(ids))
        # Nothing predicts a sequence's first token.
        completion = max(prompt, 1)
        first = 1 if kind == CHOSEN and layout.nll_over == "prompt+chosen" else completion
        kinds = torch.full((max(len(ids) - first, 0),), kind)
        kinds[: completion - first] = PROMPT
        flat["rows"].append(where[first - 1 : -1] if len(ids) else where)
        flat["targets"].append(ids[first:])
        flat["pair"].append(torch.full_like(kinds, index % len(pairs)))
        flat["kind"].append(kinds)
    return {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "places": torch.cat(places),
        "rows": torch.cat(flat["rows"]),
        "targets": torch.cat(flat["targets"]),
        "pair": torch.cat(flat["pair"]),
        "kind": torch.cat(flat["kind"]),
        "layout": layout,
    }
