"""The odds-ratio term of ORPO and its closed-form gradient, finite however sure a sequence is.

    term = -log sigmoid(logodds(l_w) - logodds(l_l)),    logodds(l) = l - log(1 - e^l)

for the mean log-probs per token of a chosen (`l_w`) and a rejected (`l_l`) completion (Hong, Lee, Thorne:
"ORPO: Monolithic Preference Optimization without Reference Model", arXiv 2403.07691, equations 4 and 7).

With `p = e^l` and `q = 1 - p` the term is `log(1 + p_l q_w / (p_w q_l))`. Its derivatives share a denominator
that is a sum of positive terms, so nothing cancels:

    D = p_w q_l + p_l q_w,    d/dl_w = -p_l / D,    d/dl_l = (p_l q_w / D) / q_l

`p` and `D` are taken relative to the larger probability, so that improbable sequences do not underflow.
Autograd on the textbook form gives NaN at l_w = 0; this gives -p_l / q_l (at l_l = -1: -0.58198).

As l_l approaches 0 the term truly diverges (as -log|l_l|, its derivative as 1/|l_l|); where both do, it is
undefined. So both enter as at most `-SURE = -2^-100`: a value nearer to 0 has the term and the derivatives of
-SURE, at most |l_w| + 100 ln 2 and 2^100, which fp32 holds even times a GradScaler's factor. The bound is
this small because a token's own factor `1 - p` shrinks along with |l_l|: gradients of logits stay exact down
to it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

SURE = 2.0**-100
# A log-prob above 0 is rounding (bf16 logits are off by 0.03 to 0.04 nats), or it is not a log-prob.
ROUNDING = 0.05


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0. Split at -ln 2, where either form starts to cancel (Maechler 2012, "Rmpfr")."""
    return torch.where(x < -math.log(2), torch.log1p(-torch.exp(x)), torch.log(-torch.expm1(x)))


def odds_ratio_loss(chosen_logps: Tensor, rejected_logps: Tensor) -> tuple[Tensor, Tensor]:
    """Each pair's odds-ratio term and log odds ratio.

    Args:
        chosen_logps: [B] mean log-prob per completion token, fp32 or fp64.
        rejected_logps: [B], the same dtype.

    Returns:
        `-log sigmoid(log_odds)` [B], at least 0, once differentiable by this module's closed form, and
        `log_odds = logodds(l_w) - logodds(l_l)` [B], without gradient. A NaN, an infinity or a value above
        ROUNDING (no log-prob) makes its pair NaN; all else is finite.

    Raises:
        TypeError: a dtype other than fp32 or fp64, or two different ones.
        ValueError: different shapes.
    """
    check_logps("chosen_logps", chosen_logps)
    if rejected_logps.dtype != chosen_logps.dtype:
        raise TypeError(f"rejected_logps is {rejected_logps.dtype}, chosen_logps {chosen_logps.dtype}: cast")
    if rejected_logps.shape != chosen_logps.shape:
        raise ValueError(
            f"rejected_logps has shape {list(rejected_logps.shape)}, chosen_logps "
            f"{list(chosen_logps.shape)}: give one of each per pair"
        )
    return _OddsRatio.apply(chosen_logps, rejected_logps)


class _OddsRatio(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
        l_w, l_l = _bounded(chosen), _bounded(rejected)
        log_odds = (l_w - l_l) + (log1mexp(l_l) - log1mexp(l_w))
        larger = torch.maximum(l_w, l_l)
        p_w, p_l = torch.exp(l_w - larger), torch.exp(l_l - larger)
        q_w, q_l = -torch.expm1(l_w), -torch.expm1(l_l)
        d = p_w * q_l + p_l * q_w
        ctx.save_for_backward(-p_l / d, p_l * q_w / d / q_l)
        ctx.mark_non_differentiable(log_odds)
        return -F.logsigmoid(log_odds), log_odds

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_term: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        slope_w, slope_l = ctx.saved_tensors
        return grad_term * slope_w, grad_term * slope_l


def _bounded(logps: Tensor) -> Tensor:
    is_log_prob = (logps > -math.inf) & (logps < ROUNDING)  # false for NaN
    return torch.where(is_log_prob, logps.clamp(max=-SURE), math.nan)


def check_logps(name: str, logps: Tensor) -> None:
    """Raise TypeError unless `logps`, which messages call `name`, is fp32 or fp64."""
    if logps.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} is {logps.dtype}: give float32 or float64 log-probs")
