"""A trainer's padded batches, laid out on the way to the model where that can have it.

The first batch decides, for all processes together (`gate`): a model that cannot have packed rows, or batches of more
than ids and their mask, stay padded for good, with one warning. Of the later ones a batch with something odd about it
(padding between tokens, a token scored behind padding) stays padded by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .gate import LayoutGate, model_inputs, on_device
from .layout import Name
from .sequences import lay_out_sequences, sequences_of

# What may be passed beside ids and mask: it says nothing about tokens.
_HARMLESS = {"use_cache", "return_dict"}


class BatchLayout:
    """Lays padded batches out for the model behind a gate.

    name: the layout to have. row_length: most tokens a row; None: one row a batch. padding_value: a token id.
    """

    def __init__(self, gate: LayoutGate, name: Name, row_length: int | None = None, padding_value: int = 0) -> None:
        self.gate = gate
        self.name = name
        self.row_length = row_length
        self.padding_value = padding_value

    def lay_out(
        self,
        inputs: dict[str, Any],
        targets: Tensor,
        groups: Callable[[Sequence[Tensor]], Sequence[Sequence[int]]],
        model: Any = None,
    ) -> tuple[dict[str, Any], tuple[Tensor, ...]] | None:
        """What to pass to `ModelLogps` instead of `inputs`, `rows` [B, T] among it, and each sequence's flattened
        places; None for padded rows.

        inputs: the model's arguments, `input_ids` and `attention_mask` [B, T] among them. targets: [B, T] int64,
        aligned with the hidden states, -100 where nothing is scored. groups: from the sequences to which of them
        begin alike. model: the wrapped model to call, as for `ModelLogps.logps`.
        """
        name = self.gate.name or self.name  # what was refused is not laid out again
        if name == "padded":
            return None
        reason = _odd(inputs)
        sequences = None if reason else sequences_of(inputs["input_ids"], inputs["attention_mask"])
        if sequences is None:
            reason = reason or "padding stands between tokens"
        elif bool(((targets != -100) & (inputs["attention_mask"] != 1)).any()):
            reason = "a token is scored from padding"
        if self.gate.name is None and not self.gate.everywhere(reason is None):
            self.gate.decline(name, reason or "another process has batches that cannot be laid out")
        if reason is not None or sequences is None or self.gate.name == "padded":
            return None
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        batch = lay_out_sequences(name, sequences, groups(sequences), self.row_length, self.padding_value)
        batch = self.gate.admit(on_device(batch, ids.device), model)
        if batch["layout"].name == "padded":
            return None
        rows = ids.new_zeros(ids.shape).masked_scatter(mask == 1, batch["places"])
        kept = {name: value for name, value in inputs.items() if name in _HARMLESS}
        return kept | model_inputs(batch) | {"rows": rows}, batch["places"].split([len(ids) for ids in sequences])


def _odd(inputs: dict[str, Any]) -> str | None:
    """What about a batch's arguments rules rows without padding out, or None."""
    given = {name for name, value in inputs.items() if value is not None and value is not False}
    missing = {"input_ids", "attention_mask"} - given
    more = given - {"input_ids", "attention_mask"} - _HARMLESS
    if missing:
        return f"batches come without {' and '.join(sorted(missing))}"
    return f"batches bring {', '.join(sorted(more))}" if more else None
