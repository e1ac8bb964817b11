"""Exact ORPO and sequence log-probabilities without materialising the logits."""

from orpo_kernels.linear_logps import linear_logps, shift_labels
from orpo_kernels.plan import Plan

__all__ = ["Plan", "linear_logps", "shift_labels"]
__version__ = "0.1.0"
