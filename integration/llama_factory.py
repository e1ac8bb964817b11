"""LLaMA-Factory's `stage: dpo` with `pref_loss: orpo`, without the logits.

Importing this module puts `ORPOTrainer` in the place of LLaMA-Factory's trainer of that stage, and

    python -m orpo_kernels.integration.llama_factory train.yaml

is `llamafactory-cli train train.yaml` with that import; several processes start it under torchrun. (Ray's workers
import LLaMA-Factory by themselves and keep its own trainer.)

The loss of a batch and its metrics are ours, on log-probabilities from the model's own head (`lm_head`) and with the
preset "llama_factory": its NLL runs over the chosen answer, averaged within each sequence. `pref_ftx` adds to that
NLL's weight. All else is LLaMA-Factory's, and so is everything for another `pref_loss`. What differs in the numbers:

- A pair with an empty answer leaves every mean over pairs, where LLaMA-Factory's weights all become NaN.
- `odds_ratio_loss` with `pref_ftx` is the odds-ratio term alone; LLaMA-Factory adds `pref_ftx / pref_beta` times
  `sft_loss`.
- `logits/chosen` and `logits/rejected` of a model that soft-caps its logits are NaN: their mean has no form without
  the logits.

Versions: LLaMA-Factory 0.9.5 refuses transformers after 5.6 and TRL after 0.24 unless DISABLE_VERSION_CHECK=1 is set.
With the transformers we need, its preference trainer can be imported only with TRL 0.27 or 0.28 and weave beside it,
and its gradient checkpointing works before transformers 5.23 (later: `disable_gradient_checkpointing: true`).

Raises ImportError at import where LLaMA-Factory or TRL is missing, of another version or cannot be imported.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from orpo_kernels.integration.training.head_access import HeadAccess
from orpo_kernels.integration.versions import require
from orpo_kernels.linear_logps import shift_labels
from orpo_kernels.loss import orpo_from_logps
from orpo_kernels.presets import get_preset

__all__ = ["ORPOTrainer", "main"]

_require = partial(
    require,
    "orpo_kernels.integration.llama_factory",
    {"llamafactory": ">=0.9.5,<0.9.6", "trl": ">=0.27,<0.29"},
    also=", weave, and DISABLE_VERSION_CHECK=1 set",
    install="pip install --no-deps {}; pip install weave",
)
_require()
try:
    from llamafactory.train import tuner
    from llamafactory.train.dpo import trainer as dpo
except (ImportError, RuntimeError) as error:  # TRL raises a RuntimeError where one of its own imports fails
    _require(cause=error)


class ORPOTrainer(HeadAccess, dpo.CustomDPOTrainer):
    """LLaMA-Factory's trainer of preferences, without the logits for `pref_loss: orpo`; its arguments.

    Raises ValueError for `ld_alpha` with ORPO, and what `lm_head.attach` raises.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.preset = replace(get_preset("llama_factory"), nll_weight=1 + self.ftx_gamma)
        if self.loss_type == "orpo" and self.ld_alpha is not None:
            raise ValueError(
                f"ld_alpha is {self.ld_alpha}: ORPO here takes all tokens of an answer alike; leave it out"
            )

    def get_batch_loss_metrics(
        self, model: nn.Module, batch: dict[str, Any], train_eval: Literal["train", "eval"] = "train"
    ) -> tuple[Tensor, dict[str, Any]]:
        """The loss and LLaMA-Factory's metrics of one batch; ORPO's are [] tensors: nothing waits for the device."""
        if self.loss_type != "orpo":
            return super().get_batch_loss_metrics(model, batch, train_eval)
        inputs = dict(batch)
        targets = shift_labels(inputs.pop("labels"))  # [2B, T]
        everywhere = torch.ones_like(targets, dtype=torch.bool)
        logps, mean_logits, _ = self.head_logps.sequence_scores(
            targets, everywhere, model=model, use_cache=False, **inputs
        )
        output = orpo_from_logps(logps, targets.to(logps.device), beta=self.beta, preset=self.preset)

        if mean_logits is None:
            mean_logits = logps.new_full([len(targets)], torch.nan)
        chosen, rejected = mean_logits.view(2, -1).mean(1)
        metrics = output.metrics(logits_chosen=chosen, logits_rejected=rejected)
        del metrics["log_odds_ratio"], metrics["log_odds_chosen"]
        metrics["sft_loss"] = metrics.pop("nll_loss")
        metrics["odds_ratio_loss"] = output.odds_ratio_loss.detach()
        prefix = "eval_" if train_eval == "eval" else ""
        return output.loss, {f"{prefix}{name}": value for name, value in metrics.items()}


# Where LLaMA-Factory looks its trainer up when it starts a run.
dpo.CustomDPOTrainer = ORPOTrainer


def main() -> None:
    """`llamafactory-cli train` on the command line's arguments."""
    tuner.run_exp()


if __name__ == "__main__":
    main()
