"""The contestants of `layouts`: one loss, of the same rows of TRL's data set, by four ways of laying them out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from orpo_kernels.bench.layout_inputs import pair_of
from orpo_kernels.integration.data.collator import LayoutCollator, PreferenceCollator
from orpo_kernels.integration.lm_head import attach
from orpo_kernels.integration.packing.attention import restore_attention, transformers_model, use_packed_attention
from orpo_kernels.integration.packing.gate import LayoutGate, model_inputs
from orpo_kernels.integration.packing.layout import Name
from orpo_kernels.loss import merge_targets, orpo_from_logps
from orpo_kernels.objective import orpo_objective_flat

LABELS = {
    "trl": "TRL, full logits",
    "padded": "padded, head without logits",
    "packed": "packed",
    "shared": "shared",
}

Loss = Callable[[list[dict[str, Any]]], Tensor]


class Refused(RuntimeError):
    """The model cannot have this layout, for this reason."""


def losses_of(trainer: Any, tokenizer: Any) -> dict[str, Loss]:
    """Each contestant's loss of some rows of TRL's data set. Those of layouts raise Refused."""
    ours = attach(trainer.model)  # a head that is asked for nothing is TRL's own
    usual = transformers_model(trainer.model).config._attn_implementation

    def trl(rows: list[dict[str, Any]]) -> Tensor:
        restore_attention(trainer.model, usual)
        return trainer.get_batch_loss_metrics(trainer.model, trainer.data_collator(rows), "train")[0]

    def padded(rows: list[dict[str, Any]]) -> Tensor:
        restore_attention(trainer.model, usual)
        batch: Any = PreferenceCollator(tokenizer)([pair_of(row) for row in rows])
        targets, nll_targets = batch.pop("targets"), batch.pop("nll_targets")
        logps, _ = ours.logps(merge_targets(targets, nll_targets), use_cache=False, **batch)
        return orpo_from_logps(logps, targets, nll_targets=nll_targets, preset="trl").loss

    def laid_out(name: Name) -> Loss:
        gate = LayoutGate(ours)
        collate = LayoutCollator(tokenizer, name)

        def loss(rows: list[dict[str, Any]]) -> Tensor:
            batch = gate.admit(collate([pair_of(row) for row in rows]))
            layout = batch["layout"]
            if layout.name != name:
                raise Refused("; ".join(gate.reasons))
            use_packed_attention(trainer.model)  # the one before may have put the usual attention back
            logps, _ = ours.logps(batch["targets"], rows=batch["rows"], use_cache=False, **model_inputs(batch))
            output = orpo_objective_flat(logps, batch["pair"], batch["kind"], num_pairs=layout.num_pairs, preset="trl")
            return output.loss

        return loss

    return {"trl": trl, "padded": padded, "packed": laid_out("packed"), "shared": laid_out("shared")}
