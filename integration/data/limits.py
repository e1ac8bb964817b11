"""What a model can take: how many positions, which token ids. Asked of its modules before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from ..head.lora import virtual_tokens
from ..head.patch import find_head, head_rows

# As transformers' families call them.
_TABLES = {"wpe", "embed_positions", "position_embeddings", "position_embedding", "embed_position"}


class Limits(NamedTuple):
    """positions, embeddings, head: the rows of the tables; None where there is no end.

    virtual: positions of the table that PEFT's prompts take.
    """

    positions: int | None = None
    embeddings: int | None = None
    head: int | None = None
    virtual: int = 0

    @classmethod
    def of(cls, model: nn.Module) -> Limits:
        embeddings = getattr(model, "get_input_embeddings", lambda: None)()
        try:
            head = head_rows(find_head(model))
        except ValueError:  # whoever attaches to it says why
            head = None
        rows = getattr(embeddings, "num_embeddings", None)
        return cls(max_positions(model), rows, head, virtual_tokens(model, cached=True))

    def check_tokenizer(self, tokenizer: Any) -> None:
        """ValueError for a tokenizer with ids that the embeddings lack."""
        if self.embeddings is not None and len(tokenizer) > self.embeddings:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens and the model {self.embeddings} embeddings: call "
                f"model.resize_token_embeddings({len(tokenizer)}), or use the model's own tokenizer"
            )

    def check(self, row: Mapping[str, Any]) -> None:
        """ValueError for a tokenised row that the model cannot take."""
        self._check_length(row["length"])
        for side in ("chosen", "rejected"):
            largest = max(row[f"{side}_input_ids"], default=0)
            if self.embeddings is not None and largest >= self.embeddings:
                raise ValueError(f"token id {largest}, and the model has {self.embeddings} embeddings")
            # The first token is predicted by nothing.
            largest = max(row[f"{side}_input_ids"][1:], default=0)
            if self.head is not None and largest >= self.head:
                raise ValueError(
                    f"token id {largest}, which the head does not score: it has {self.head} rows and the "
                    f"embeddings {self.embeddings}. Leave such tokens out of the text, or enlarge the head"
                )

    def _check_length(self, length: int) -> None:
        most = None if self.positions is None else self.positions - self.virtual
        if most is not None and length > most:
            taken = f", {self.virtual} of them for PEFT's virtual tokens" if self.virtual else ""
            raise ValueError(
                f"{length} tokens, and the model has a table of {self.positions} positions{taken}: "
                f"use max_length={most} or less"
            )


def max_positions(model: nn.Module) -> int | None:
    """The most tokens that a learned table of positions serves; None for a model without one.

    A model that computes its positions (rotary ones, say) runs past the length that it was trained for.
    """
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _TABLES:
            # OPT leaves two rows out, BERT's relatives those up to the padding id.
            offset = getattr(module, "offset", 0)
            padding = -1 if module.padding_idx is None else module.padding_idx
            found.append(module.num_embeddings - (offset or padding + 1))
    return min(found, default=None)
