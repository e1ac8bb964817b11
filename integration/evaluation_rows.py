"""Rows that a trainer is given when it evaluates or predicts: prepared as those are that it was made with."""

from __future__ import annotations

from typing import Any


class EvaluationRows:
    """`evaluate` and `predict` on rows of any shape that the trainer takes, tokenised or not."""

    def _prepared(self, name: str, rows: Any, batch_size: int) -> Any:
        """The rows as the trainer's own; raises as its constructor does."""
        raise NotImplementedError

    def evaluate(self, eval_dataset: Any = None, *args: Any, **options: Any) -> Any:
        # A string names one of the sets that the trainer has.
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._prepared("eval_dataset", eval_dataset, self.args.per_device_eval_batch_size)  # type: ignore[attr-defined]
        return super().evaluate(eval_dataset, *args, **options)  # type: ignore[misc]

    def predict(self, test_dataset: Any, *args: Any, **options: Any) -> Any:
        test_dataset = self._prepared("test_dataset", test_dataset, self.args.per_device_eval_batch_size)  # type: ignore[attr-defined]
        return super().predict(test_dataset, *args, **options)  # type: ignore[misc]
