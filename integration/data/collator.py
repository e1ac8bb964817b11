"""From tokenised pairs to one padded batch: chosen rows first, rejected second.

Masks go by position, never by token id: where the padding token is the EOS token, the true end of an answer
is scored and padding is not, and token 0 is a token like any other.

`targets` are aligned with the model's hidden states: position t holds the token at t + 1, the one that the
hidden state at t predicts, if that token is to be scored, and -100 otherwise.

    ids          p0   p1   c0   c1   eos  pad          p prompt, c completion
    targets     -100  c0   c1   eos -100 -100          completion tokens
    nll_targets  p1   c0   c1   eos -100 -100          nll_over="prompt+chosen"; nothing predicts p0
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from orpo_kernels.linear_logps import shift_labels

from ..batches import FlatBatch, PaddedBatch, TokenizedRow
from ..packing.layout import Name, NllOver, lay_out, sequence_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PreferenceCollator:
    """Pads B tokenised pairs (rows of `data.tokenize_pair`) on the right into one batch of 2B rows.

    Args:
        tokenizer: gives the padding id: its pad token, without one its EOS token, without either 0. Any id
            will do, since padding is masked by position. The tokenizer is neither kept nor changed.
        padding_value: a padding id to use instead.
        pad_to_multiple_of: round the length T up to a multiple of this.
        nll_over: which tokens of the chosen sequence are in `nll_targets`: "prompt+chosen", or "chosen" for
            its completion only.

    Raises:
        ValueError: an argument has none of these values.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        padding_value: int | None = None,
        pad_to_multiple_of: int | None = None,
        nll_over: NllOver = "prompt+chosen",
    ) -> None:
        _check_nll_over(nll_over)
        if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of={pad_to_multiple_of}: use a positive int or None")
        self.padding_value = _padding_id(tokenizer, padding_value)
        self.pad_to_multiple_of = pad_to_multiple_of or 1
        self.nll_over = nll_over

    def __call__(self, rows: Sequence[TokenizedRow]) -> PaddedBatch:
        """Collate.

        Returns:
            `input_ids`, `attention_mask`, `targets` `[2B, T]` and `nll_targets` `[B, T]`, all int64.

        Raises:
            ValueError: no rows, or rows that are not tokenised.
        """
        if not rows:
            raise ValueError("the batch has no rows: a collator needs at least one pair")
        sequences = [sequence_of(row, side) for side in ("chosen", "rejected") for row in rows]
        multiple = self.pad_to_multiple_of
        longest = max(1, *(len(ids) for ids, _ in sequences))
        shape = (len(sequences), -(-longest // multiple) * multiple)  # [2B, T]
        input_ids = torch.full(shape, self.padding_value, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, -100, dtype=torch.int64)
        for index, (ids, prompt_length) in enumerate(sequences):
            input_ids[index, : len(ids)] = ids
            attention_mask[index, : len(ids)] = 1
            labels[index, prompt_length : len(ids)] = ids[prompt_length:]

        pairs = len(rows)
        nll_labels = labels[:pairs]
        if self.nll_over == "prompt+chosen":
            nll_labels = input_ids[:pairs].masked_fill(attention_mask[:pairs] == 0, -100)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "targets": shift_labels(labels),
            "nll_targets": shift_labels(nll_labels),
        }


class LayoutCollator:
    """Lays B tokenised pairs (rows of `data.tokenize_pair`) out: packed into rows, or each prompt once.

    Args:
        tokenizer: gives the id that fills rows up, as for `PreferenceCollator`.
        name: "shared", "packed" or "padded", see `layout`.
        row_length: most tokens a row, or None for one row a batch.
        padding_value, nll_over: as for `PreferenceCollator`.

    Called with rows, it returns what `layout.pack_pairs` does, whose errors it raises.

    Raises:
        ValueError: an argument has none of these values.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        name: Name = "shared",
        *,
        row_length: int | None = None,
        padding_value: int | None = None,
        nll_over: NllOver = "prompt+chosen",
    ) -> None:
        if name not in ("shared", "packed", "padded"):
            raise ValueError(f"name={name!r}: use 'shared', 'packed' or 'padded'")
        if row_length is not None and row_length < 1:
            raise ValueError(f"row_length={row_length}: use a positive int, or None for one row a batch")
        _check_nll_over(nll_over)
        self.name: Name = name
        self.row_length = row_length
        self.padding_value = _padding_id(tokenizer, padding_value)
        self.nll_over: NllOver = nll_over

    def __call__(self, rows: Sequence[TokenizedRow]) -> FlatBatch:
        return lay_out(
            self.name, rows, row_length=self.row_length, nll_over=self.nll_over, padding_value=self.padding_value
        )


def _check_nll_over(nll_over: str) -> None:
    if nll_over not in ("prompt+chosen", "chosen"):
        raise ValueError(f"nll_over={nll_over!r}: use 'prompt+chosen' or 'chosen'")


def _padding_id(tokenizer: PreTrainedTokenizerBase, padding_value: int | None) -> int:
    candidates = (padding_value, tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(value for value in candidates if value is not None)
