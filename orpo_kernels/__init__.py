"""Exact ORPO and sequence log-probabilities without materialising the logits.

    linear_logps   log-probabilities of target tokens from hidden states and the head's weight
    linear_token_stats  the same with entropy, log sum p^2, mean logit and top-1, at a temperature
    orpo_loss      the ORPO loss on top of it; `OrpoLoss` is the same as a module
    Plan           how much memory a call may use
    vocab_parallel_logps   `linear_logps` under a head whose rows are spread over ranks

Trainers and the way into a model's own head are in `orpo_kernels.integration`.
"""

from orpo_kernels.linear_logps import linear_logps, shift_labels
from orpo_kernels.linear_token_stats import TokenStats, linear_token_stats
from orpo_kernels.loss import OrpoLoss, orpo_loss
from orpo_kernels.objective import OrpoOutput
from orpo_kernels.plan import Plan, Schedule
from orpo_kernels.presets import PRESETS, Preset
from orpo_kernels.vocab_parallel import vocab_parallel_logps

__all__ = [
    "PRESETS",
    "OrpoLoss",
    "OrpoOutput",
    "Plan",
    "Preset",
    "Schedule",
    "TokenStats",
    "linear_logps",
    "linear_token_stats",
    "orpo_loss",
    "shift_labels",
    "vocab_parallel_logps",
]
__version__ = "0.1.0"
