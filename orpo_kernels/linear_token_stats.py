"""Log-probabilities of target tokens with statistics of their distributions, without the logits.

The statistics are sums and maxima of the tiles that `linear_logps` makes anyway: they cost no product. Only a gradient
of the entropy costs one, in the forward. How they follow from the competitors' sums is in
`orpo_kernels.kernels.statistics`.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor

from orpo_kernels.autograd import HeadOptions, TokenStats
from orpo_kernels.kernels.statistics import Statistics
from orpo_kernels.linear_logps import check_targets, head_options, scored_token_stats
from orpo_kernels.plan import Plan
from orpo_kernels.tokens import select_scored

__all__ = ["STATISTICS", "TokenStats", "linear_token_stats", "scored_token_stats"]
STATISTICS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    statistics: Collection[str] = STATISTICS,
    entropy_grad: bool = False,
    temperature: float = 1.0,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    plan: Plan | None = None,
) -> TokenStats:
    """`linear_logps` with statistics of softmax(z), z = f(hidden @ weight.T + bias) / temperature.

    statistics: which, of "entropy", "log_sum_sq_probs", "mean_logits" and "is_top1".
    entropy_grad: make the entropy differentiable, for one more product in the forward. A head that trains then
        recomputes its logits in the backward, whatever `Plan.keep_logit_grads` says.
    temperature: what the logits are divided by, after scale and soft-cap.

    The other arguments are those of `linear_logps`, and so are dtypes, shapes and errors. A sure token's entropy keeps
    its precision as its log-probability does. Under torch.compile this is a graph break.

    Raises ValueError or TypeError that names the argument, its value and what it must be.
    """
    wanted = statistics_of(statistics, entropy_grad)
    options = head_options(hidden, weight, bias=bias, logit_scale=logit_scale, softcap=softcap, plan=plan)
    check_temperature(temperature)
    options = at_temperature(options, temperature)
    check_targets(hidden, targets, rows)
    return _select_and_score(hidden, weight, bias, targets, rows, ignore_index, options, wanted)


@torch.compiler.disable  # the compiled operator gives log-probabilities alone
def _select_and_score(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: Tensor | None,
    ignore_index: int,
    options: HeadOptions,
    wanted: Statistics,
) -> TokenStats:
    num_rows = math.prod(hidden.shape[:-1])
    scored = select_scored(targets, weight.shape[0], num_rows, ignore_index=ignore_index, rows=rows)
    return scored_token_stats(hidden, weight, bias, scored, targets.shape, options, None, wanted)


def statistics_of(statistics: Collection[str], entropy_grad: bool) -> Statistics:
    """Raises ValueError for a name that is none, and for a gradient of an entropy that is not asked for."""
    names = (statistics,) if isinstance(statistics, str) else tuple(statistics)
    for name in names:
        if name not in STATISTICS:
            raise ValueError(f"statistics holds {name!r}: it must be some of {', '.join(map(repr, STATISTICS))}")
    if entropy_grad and "entropy" not in names:
        raise ValueError(f"entropy_grad=True with statistics={names}: add 'entropy' to them")
    return Statistics(**{name: name in names for name in STATISTICS}, entropy_grad=bool(entropy_grad))


def check_temperature(temperature: float) -> None:
    """Raises ValueError for a temperature that is not positive and finite."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature={temperature} must be positive and finite")


def at_temperature(options: HeadOptions, temperature: float) -> HeadOptions:
    """The same head with its logits divided: c tanh(s x / c) / T is c' tanh(s' x / c') with c' = c / T, s' = s / T."""
    softcap = None if options.softcap is None else options.softcap / temperature
    # Not by _replace, which the compiler of torch 2.11 cannot follow.
    return HeadOptions(options.logit_scale / temperature, softcap, options.compute_dtype, options.plan)
