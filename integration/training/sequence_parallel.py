"""Sequences that are cut over ranks, as accelerate's `ParallelismConfig` asks a Trainer for.

`cp_size` (torch's ring attention): every rank of the group collates the same whole batch, and transformers cuts the
tensors that it knows by name for the time of a step, in place.

`sp_size` (DeepSpeed's Ulysses): an adapter around the training dataloader hands out cut batches, one after the other
those of all ranks of the group; evaluation is not cut. DeepSpeed sums gradients over this group, where others average
them; but for ZeRO-3, which reduces them by a reduce-scatter (unless that is turned off) and so averages.

Either way a rank has the log-probs of its own positions, and the objective reduces their sums over the group
(`orpo_kernels.sequence_parallel`). Rows must be padded ones, and nothing but attention may look at other positions:
what would be cut silently wrong is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from orpo_kernels.sequence_parallel import Group, sum_over_ranks

from ..data.collator import LayoutCollator
from ..head.lora import virtual_tokens
from ..packing.attention import transformers_model
from ..packing.gate import mixing, window_of


class CutSequences:
    """A trainer's part in it. `_cut` is how many ranks share a sequence."""

    args: Any
    accelerator: Any
    model: Any
    data_collator: Any

    @property
    def _cut(self) -> int:
        return self._cp_size * self._sp_size

    @property
    def _cp_size(self) -> int:
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        return 1 if parallelism is None else parallelism.cp_size

    @property
    def _sp_size(self) -> int:
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        return 1 if parallelism is None else getattr(parallelism, "sp_size", 1)

    def _sequence_group(self, training: bool) -> Group | None:
        """The ranks that share the sequences of a batch at hand; None where it is whole."""
        if self._cp_size > 1:
            return self.accelerator.torch_device_mesh["cp"]
        if self._sp_size > 1 and training:
            from deepspeed.utils import groups

            return groups._get_sequence_parallel_group()
        return None

    def _averaged(self, loss: Tensor, group: Group | None) -> Tensor:
        """The same loss, with gradients for what this trainer's engine does with them over the group."""
        if group is None or self._sp_size == 1:
            return loss
        zero = self.accelerator.state.deepspeed_plugin.deepspeed_config.get("zero_optimization", {})
        if zero.get("stage", 0) == 3 and zero.get("reduce_scatter", True):
            return loss
        return loss.detach() + (loss - loss.detach()) / self._sp_size

    def _over_whole_sequences(
        self, means: Tensor | None, inputs: Mapping[str, Any], group: Group | None
    ) -> Tensor | None:
        """Each sequence's mean logit [2B], from those over this rank's positions."""
        if means is None or group is None:
            return means
        counts = inputs["attention_mask"].sum(1).to(means)
        sums, counts = sum_over_ranks(group, means * counts, counts)
        return sums / counts

    def _padded_collator(self) -> Any:
        raise NotImplementedError

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        if self._sp_size > 1:
            # Attention is checked for as many rows as a micro-batch has by DeepSpeed's count: two a pair.
            config = self.accelerator.state.deepspeed_plugin.deepspeed_config
            rows = 2 * self.args.per_device_train_batch_size
            groups = self.accelerator.num_processes // self._sp_size
            config["train_micro_batch_size_per_gpu"] = rows
            config["train_batch_size"] = rows * self.args.gradient_accumulation_steps * groups

    def _prepare_to_cut(self, given: Any) -> None:
        """Have batches collated such that they can be cut; given: the user's own collator, if any.

        Raises ValueError for what cannot be right.
        """
        if self._cut == 1:
            return
        size = f"cp_size={self._cp_size}" if self._cp_size > 1 else f"sp_size={self._sp_size}"
        if isinstance(given, LayoutCollator) or (not self.args.packs_where_worth_it and self.args.layout != "padded"):
            raise ValueError(
                f"batches are to be laid out (packing={self.args.packing}, share_prefix={self.args.share_prefix!r}, "
                f"data_collator={type(given).__name__}) and {size} cuts rows over ranks, which must be padded ones: "
                "leave out all three"
            )
        if given is None:
            self.data_collator = self._padded_collator()
        if self._sp_size > 1 and self.args.auto_find_batch_size:
            raise ValueError(f"auto_find_batch_size=True was given with {size}: Ulysses fixes the rows of a batch")
        # Ulysses drops the mask, in which alone other attention than FlashAttention has a window.
        flash = "flash" in str(getattr(getattr(self.model, "config", None), "_attn_implementation", None))
        reason = refusal(self.model, keeps_windows=self._sp_size > 1 and flash)
        if reason is not None:
            raise ValueError(
                f"{size} cuts sequences over ranks, which {type(self.model).__name__} cannot have: {reason}"
            )
        # Ring attention gives each rank one part from the front and one from the back.
        parts = 2 * self._cp_size if self._cp_size > 1 else self._sp_size
        self.data_collator = CutCollator(self.data_collator, parts, labels=self._sp_size > 1)

    def _prepare_context_parallel_inputs(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Transformers', which cuts what it knows by name: our targets go by the names of its labels."""
        if self._cp_size == 1:
            return super()._prepare_context_parallel_inputs(model, inputs)  # type: ignore[misc]
        names = {"shift_labels": "targets", "labels": "nll_targets"}
        known = inputs | {theirs: inputs[ours] for theirs, ours in names.items() if ours in inputs}
        context, known = super()._prepare_context_parallel_inputs(model, known)  # type: ignore[misc]
        return context, {name: value for name, value in known.items() if name not in names}

    def _once_each(self, rows: Tensor) -> Tensor:
        """Rows [B, n] of all processes, without those that ranks of one batch repeat and those that even batches do."""
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        copies = 1 if parallelism is None else parallelism.tp_size * parallelism.cp_size
        if copies == 1:
            return self.accelerator.gather_for_metrics(rows)
        found = self.accelerator.gather(rows).view(-1, copies, *rows.shape)[:, 0].flatten(0, 1)
        state = self.accelerator.gradient_state
        return found[: state.remainder] if state.end_of_dataloader and state.remainder > 0 else found


class CutCollator:
    """Another collator's batches of padded rows, which divide into `parts`, with `position_ids`.

    labels: add `labels`, of which Ulysses' adapter makes `shift_labels`; nobody reads them.
    """

    def __init__(self, collator: Any, parts: int, *, labels: bool) -> None:
        self.collator, self.parts, self.labels = collator, parts, labels

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = self.collator(rows)
        length = batch["input_ids"].shape[1]
        missing = -length % self.parts
        fill = {"targets": -100, "nll_targets": -100, "attention_mask": 0}
        fill["input_ids"] = getattr(self.collator, "padding_value", 0)
        batch = {
            name: nn.functional.pad(value, (0, missing), value=fill.get(name, 0)) if missing else value
            for name, value in batch.items()
        }
        positions = torch.arange(length + missing)
        batch["position_ids"] = positions.expand(len(batch["input_ids"]), -1).contiguous()
        return batch | ({"labels": batch["targets"]} if self.labels else {})


def refusal(model: nn.Module, *, keeps_windows: bool = False) -> str | None:
    """Why a model's sequences cannot be cut over ranks, or None.

    keeps_windows: whether attention over ranks attends within a layer's sliding window.
    """
    reason = mixing(model)
    if reason is not None:
        return reason
    virtual = virtual_tokens(model, cached=True)
    if virtual:
        return f"PEFT's prefix tuning puts {virtual} positions before every part of a sequence"
    config: Any = transformers_model(model).config.get_text_config(decoder=True)
    windows = {window_of(config, layer) for layer in range(config.num_hidden_layers)} - {None}
    if windows and not keeps_windows:
        return f"its layers attend within a sliding window of {windows.pop()}, which attention over ranks leaves out"
    return None
