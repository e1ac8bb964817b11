"""The demo's progress bars."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback


class Progress(TrainerCallback):
    """Bars for training and evaluation; also spreads evaluations over the training, for the curve.

    heldout_points: evaluations in all, with those before and after the training, which are the caller's.
    """

    def __init__(self, heldout_points: int) -> None:
        self._parts = heldout_points - 1
        self._evaluate_at: set[int] = set()
        self._train: tqdm | None = None
        self._eval: tqdm | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        inner = {round(part * state.max_steps / self._parts) for part in range(1, self._parts)}
        self._evaluate_at = inner - {0, state.max_steps}
        self._train = tqdm(total=state.max_steps, desc="  training", unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._train is not None:
            self._train.update()
        control.should_evaluate = state.global_step in self._evaluate_at

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if self._train is not None and "loss" in logs:
            margin = logs["logps/chosen"] - logs["logps/rejected"]
            self._train.set_postfix_str(f"loss {logs['loss']:.3f}, margin {margin:+.3f}")

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._eval is None:
            batches = len(kwargs["eval_dataloader"])
            self._eval = tqdm(total=batches, desc="  held-out pairs", unit="batch", leave=False)
        self._eval.update()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._eval is not None:
            self._eval.close()
            self._eval = None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._train is not None:
            self._train.close()
            self._train = None
