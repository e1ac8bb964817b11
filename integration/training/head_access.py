"""The way into the head of a trainer's model, for trainers built on transformers' own."""

from __future__ import annotations

from typing import Any

import torch

from orpo_kernels.plan import Plan

from ..lm_head import ModelLogps, attach
from ..packing.gate import LayoutGate


class HeadAccess:
    """Log-probabilities from the head of `self.model`, and the layouts that it allows.

    chose_layout: whether the user chose the layout, and is to be warned where it cannot be had.
    """

    model: Any
    accelerator: Any
    plan: Plan | None = None
    chose_layout = True
    _logps: ModelLogps | None = None
    _gate: LayoutGate | None = None

    @property
    def head_logps(self) -> ModelLogps:
        """Of the model as it is now: `model_init` makes a new one, and a wrapper may have taken its place."""
        if self._logps is None or self._logps.model is not self.model:
            self._logps = attach(self.model, self.plan)
            self._gate = LayoutGate(self._logps, self._everywhere, asked_for=self.chose_layout)
        return self._logps

    @property
    def layout_gate(self) -> LayoutGate:
        assert self.head_logps is not None
        assert self._gate is not None
        return self._gate

    def _everywhere(self, verdict: bool) -> bool:
        """Whether all processes say so."""
        return bool(self.accelerator.gather(torch.tensor([verdict], device=self.accelerator.device)).all())


def read_streams_everywhere(args: Any) -> None:
    """Each process reads a stream itself, unless the user says otherwise: sent from one process to the others, its
    batches would have to be of one length. args: `transformers.TrainingArguments`."""
    if args.accelerator_config.dispatch_batches is None:
        args.accelerator_config.dispatch_batches = False
