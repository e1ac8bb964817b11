"""Axolotl's `rl: orpo` without the logits.

    plugins:
      - orpo_kernels.integration.axolotl.ORPOPlugin
    rl: orpo

The plugin sets Axolotl's own `trainer_cls` option to `ORPOTrainer`, a subclass of Axolotl's trainer, so that the
option alone, `trainer_cls: orpo_kernels.integration.axolotl.ORPOTrainer`, does the same. (A plugin may also name a
trainer through `get_trainer_cls`; for preference training Axolotl then leaves out the model.)

The loss of a batch and its metrics are ours, on log-probabilities from the model's own head (`lm_head`). All else is
Axolotl's and TRL's: data, tokens, collator, optimiser, schedules, checkpoints and, over our batches, the means of
an evaluation. What differs in the numbers:

- A pair with an empty completion leaves the odds-ratio mean, where TRL's weights all become NaN.
- `logits/chosen` and `logits/rejected` of a model that soft-caps its logits are NaN: their mean has no form without
  the logits.

Axolotl prints an ImportError that it meets while it loads a plugin and trains on without the plugin. Only a missing
Axolotl is therefore an error here at import; versions are checked when Axolotl hands over its configuration.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

try:
    from axolotl.integrations.base import BasePlugin as _BasePlugin

    _cause = None
except ImportError as error:
    _cause = error

from orpo_kernels.linear_logps import shift_labels
from orpo_kernels.loss import merge_targets, orpo_from_logps
from orpo_kernels.presets import get_preset

from .training.head_access import HeadAccess
from .versions import require

__all__ = ["ORPOPlugin", "ORPOTrainer"]

# Axolotl 0.19 imports a trainer that later TRL no longer has.
_SUPPORTED = {"axolotl": ">=0.19,<0.20", "trl": ">=1.9,<1.13"}
_PLUGIN, _TRAINER = f"{__name__}.ORPOPlugin", f"{__name__}.ORPOTrainer"
_PRESET = get_preset("trl")

ORPOTrainer: type  # made when it is asked for, see __getattr__


if _cause is not None:
    require(__name__, _SUPPORTED, cause=_cause)

# What stands behind the class below in the bases of what is built: Axolotl's trainer.
_AxolotlTrainer: Any = object


class _HeadLoss(HeadAccess, _AxolotlTrainer):
    """The ORPO loss from the head, for a subclass of TRL's ORPOTrainer."""

    def get_batch_loss_metrics(
        self, model: nn.Module, batch: dict[str, Any], train_eval: Literal["train", "eval"] = "train"
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and TRL's metrics of one batch, as [] tensors: nothing waits for the device."""
        inputs = self.concatenated_inputs(batch, padding_value=self.padding_value, device=self.accelerator.device)
        ids, mask, labels = (inputs[f"concatenated_{name}"] for name in ("input_ids", "attention_mask", "labels"))
        targets = shift_labels(labels)  # [2B, T]
        nll_targets = shift_labels(ids.masked_fill(mask != 1, -100)[: len(ids) // 2])  # [B, T]
        mean_logits_over = torch.ones_like(labels, dtype=torch.bool)
        mean_logits_over[:, -1] = False  # as TRL has it
        arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        if self.aux_loss_enabled:
            arguments["output_router_logits"] = True
        logps, mean_logits, outputs = self.head_logps.sequence_scores(
            merge_targets(targets, nll_targets), mean_logits_over, model=model, **arguments
        )
        output = orpo_from_logps(
            logps,
            targets.to(logps.device),
            nll_targets=nll_targets.to(logps.device),
            beta=self.beta,
            preset=_PRESET,
        )
        loss = output.loss
        if self.aux_loss_enabled:
            loss = loss + self.aux_loss_coef * outputs.aux_loss.to(loss.device)
        if mean_logits is None:
            mean_logits = logps.new_full([len(ids)], torch.nan)
        chosen, rejected = mean_logits.view(2, -1).mean(1)
        metrics = output.metrics(logits_chosen=chosen, logits_rejected=rejected)
        means = self.accelerator.reduce(torch.stack(list(metrics.values())), "mean")  # over processes
        prefix = "eval_" if train_eval == "eval" else ""
        return loss, {f"{prefix}{name}": value for name, value in zip(metrics, means, strict=True)}


@cache
def _trainer_class() -> type:
    # Not before Axolotl has patched what its trainers import.
    from axolotl.core.trainers import AxolotlORPOTrainer

    return type("ORPOTrainer", (_HeadLoss, AxolotlORPOTrainer), {"__module__": __name__, "__doc__": _HeadLoss.__doc__})


def __getattr__(name: str) -> Any:
    if name != "ORPOTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require(__name__, _SUPPORTED)
    return _trainer_class()


class ORPOPlugin(_BasePlugin):
    """Makes `rl: orpo` train with `ORPOTrainer`."""

    def register(self, cfg: Any) -> None:
        """Set `trainer_cls` in Axolotl's configuration, as read from its file.

        Raises ImportError where Axolotl or TRL is of another version, ValueError where the configuration asks for
        another kind of training or another trainer.
        """
        if _PLUGIN not in (cfg.get("plugins") or []):
            return  # Axolotl has kept the plugin from an earlier configuration
        require(__name__, _SUPPORTED)
        if cfg.get("rl") != "orpo":
            raise ValueError(f"rl is {cfg.get('rl')!r}: {_PLUGIN} is for rl: orpo; set that or leave the plugin out")
        if cfg.get("trainer_cls") not in (None, _TRAINER):
            raise ValueError(f"trainer_cls is {cfg['trainer_cls']!r}: {_PLUGIN} sets {_TRAINER}; leave one of them out")
        cfg["trainer_cls"] = _TRAINER
