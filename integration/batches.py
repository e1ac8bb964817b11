"""What a tokenised row and a batch of them hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, NotRequired, TypedDict

from torch import Tensor

if TYPE_CHECKING:
    from .packing.layout import Layout
    from .packing.sequences import SequenceLayout


class TokenizedRow(TypedDict):
    """A preference pair in tokens (`data.tokenize_pair`).

    *_input_ids: prompt and completion, as tokenised together; *_prompt_length: how many of them are prompt.
    *_cut: tokens lost to truncation. length: of the longer side.
    """

    chosen_input_ids: list[int]
    rejected_input_ids: list[int]
    chosen_prompt_length: int
    rejected_prompt_length: int
    prompt_cut: NotRequired[int]
    chosen_cut: NotRequired[int]
    rejected_cut: NotRequired[int]
    length: NotRequired[int]


class PaddedBatch(TypedDict):
    """B pairs as a rectangle (`data.PreferenceCollator`): chosen rows, then rejected ones; int64.

    input_ids, attention_mask, targets: [2B, T]. nll_targets: [B, T].
    """

    input_ids: Tensor
    attention_mask: Tensor
    targets: Tensor
    nll_targets: Tensor


class FlatBatch(TypedDict):
    """B pairs in a layout (`packing.layout`).

    input_ids, position_ids: [rows, T] int64. attention_mask: [rows, T], of padded rows only.
    places: [M] int64, where the tokens of each sequence lie (flattened), chosen sequences then rejected ones.
    rows, targets, pair, kind: [N] int64, one entry a scored token.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: NotRequired[Tensor]
    places: Tensor
    rows: Tensor
    targets: Tensor
    pair: Tensor
    kind: Tensor
    layout: Layout


class SequenceBatch(TypedDict):
    """S sequences in a layout (`packing.sequences`).

    input_ids, position_ids, attention_mask: [rows, T] int64. places: [M] int64, where the tokens of each sequence lie
    (flattened), one sequence's after the other's. rows, targets: [N] int64, of every token but a sequence's first.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    places: Tensor
    rows: Tensor
    targets: Tensor
    layout: SequenceLayout
