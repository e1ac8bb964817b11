"""In which order a trainer reads its rows: the same in every run of the same seed, resumed or not.

Transformers' length-grouped order draws from the global generator. After a resume that stands elsewhere than it did
when the epoch began, so that some rows of the epoch would come twice and others never. Here an epoch's order follows
from the seed and the epoch alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices


class EpochGroupedSampler(Sampler[int]):
    """Random, rows of about a length together.

    lengths: of the rows, in tokens. batch_size: rows that are to be of about a length. epoch: asked when an epoch
    begins.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int, epoch: Callable[[], int]) -> None:
        self.batch_size, self.lengths, self.seed, self.epoch = batch_size, lengths, seed, epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch())
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


class RowOrder:
    """A trainer's samplers, where its rows are to be grouped by length, and where in a stream it goes on."""

    args: Any
    state: Any
    processing_class: Any
    train_dataset: Any

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows = self.train_dataset if train_dataset is None else train_dataset
        lengths = self._lengths(rows)
        if lengths is None and self.args.train_sampling_strategy == "batch_rebalance" and isinstance(rows, list):
            # Transformers' sampler needs nothing but lengths; of a list it takes them from the model's first input.
            name = self.processing_class.model_input_names[0]
            return super()._get_train_sampler([{name: range(row["length"])} for row in rows])  # type: ignore[misc]
        if lengths is None:
            return super()._get_train_sampler(train_dataset)  # type: ignore[misc]
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        # `state.epoch` counts the steps taken in it too; it is a whole number when one ends.
        return EpochGroupedSampler(batch_size, lengths, self._order_seed(), lambda: int(self.state.epoch or 0))

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        lengths = self._lengths(eval_dataset)
        if lengths is None:
            return super()._get_eval_sampler(eval_dataset)  # type: ignore[misc]
        generator = torch.Generator().manual_seed(self._order_seed())  # the same order on every process
        return LengthGroupedSampler(self.args.eval_batch_size, lengths=lengths, generator=generator)

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, resumed: Any, trial: Any
    ) -> tuple[int, int]:
        """(epochs that a resumed run has behind it, batches of the one that it is in).

        Transformers takes a stream, which has no length, for one epoch of `max_steps`. It would skip the first pass
        and then begin the second one anew, wherever the run had stopped.
        """
        position: tuple[int, int] = super()._init_training_state(  # type: ignore[misc]
            max_steps, num_update_steps_per_epoch, num_train_epochs, resumed, trial
        )
        if hasattr(self.train_dataset, "__len__") or not self.state.global_step or self.args.ignore_data_skip:
            return position
        # A step leaves `epoch + batches / batches of max_steps`, of the maximum that it had then; at least one batch.
        saved = TrainerState.load_from_json(str(Path(resumed) / TRAINER_STATE_NAME))
        batches = saved.max_steps * self.args.gradient_accumulation_steps
        epoch, before = divmod(round(saved.epoch * batches) - 1, batches)
        return epoch, before + 1

    def _order_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _lengths(self, rows: Any) -> list[int] | None:
        """Those of the rows, where they are to be grouped by them and have them."""
        if self.args.train_sampling_strategy != "group_by_length":
            return None
        if isinstance(rows, list):
            return [row["length"] for row in rows]
        columns = getattr(rows, "column_names", None)
        return list(rows["length"]) if hasattr(rows, "__len__") and columns and "length" in columns else None
