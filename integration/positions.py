"""How many positions a model knows: the rows of its table of position embeddings, where it has one."""

from __future__ import annotations

from torch import nn

# As transformers' families call them.
_TABLES = {"wpe", "embed_positions", "position_embeddings", "position_embedding", "embed_position"}


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
