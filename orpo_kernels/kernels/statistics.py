"""What a token's distribution is like besides its log-probability, through the competitors as that is.

With the symbols of `interface` (s = 1 - p(y), q the softmax over the competitors, L their logsumexp):

    H           = -(1 - s) log(1 - s) + s (-log s + H(q))
    sum p^2     = (1 - s)^2 + s^2 sum q^2
    H(q)        = log S - sum e (z - r) / S          log sum q^2 = log sum e^2 - 2 log S

where e = exp(z - r) and S = sum e over the competitors, relative to any base r. Every term of H is positive and
as exact as s is: the entropy of a token with s = 1e-10 has all its digits, where `log Z - sum p z` would have none.

**The entropy's gradient.** From dp_w/dz_v = p_w (1(v=w) - p_v) and sum_w dp_w/dz_v = 0,

    dH/dz_v = -sum_w (log p_w + 1) dp_w/dz_v = -p_v (log p_v + H)

and with p_v = s q_v for a competitor, log p_v = log s + log q_v:

    dH/dz_y = own                                 own   = -(1 - s) (log(1 - s) + H)
    dH/dz_v = -q_v (level + s log q_v)            level = s (log s + H)

Nothing of it depends on the loss. So, as `u` does for the log-probability, a vector formed in the forward is all that
the hidden states' backward needs:

    dH/dh = own f'_y W_y - level (q f') W - s ((q log q) f') W

(q f') W is u's product. The last is the one more that a gradient of the entropy costs: with log q = z - r - log S it is
made of A = sum e f' W and B = sum e (z - r) f' W as (B - log S A) / S. The weight's gradient recomputes the logits, and
with them q and log q = z - L, whatever is asked of the tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Statistics(NamedTuple):
    """Which statistics a forward is asked for."""

    entropy: bool = False
    log_sum_sq_probs: bool = False
    mean_logits: bool = False
    is_top1: bool = False
    # Of a forward that makes u: the same of the entropy.
    entropy_grad: bool = False

    @property
    def asked(self) -> int:
        """How many."""
        return sum(self[:4])

    @property
    def second_tile(self) -> bool:
        """Whether the torch path needs room for two tiles."""
        return self.entropy or self.is_top1


NO_STATISTICS = Statistics()


class TokenStatistics(NamedTuple):
    """[N] each in the accumulation dtype, is_top1 bool; None where not asked for.

    entropy_u: [N, D] in the dtype of `u`: the derivative of the entropy with respect to the hidden states.
    """

    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    entropy_u: Tensor | None = None


class EntropySlopes(NamedTuple):
    """`dH/dz_y = own` and `dH/dz_v = -q_v (level + s log q_v)`: [N] each."""

    own: Tensor
    level: Tensor


def entropy(log_odds: Tensor, sums: Tensor, first: Tensor) -> Tensor:
    """H. sums: S; first: sum e (z - r) over the competitors, 0 where there are none."""
    p, s = torch.sigmoid(log_odds), torch.sigmoid(-log_odds)
    of_competitors = torch.where(sums == 0, 0.0, sums.log() - first / sums)
    # Where p or s is 0 its logarithm may be infinite.
    own = torch.where(p == 0, 0.0, -p * F.logsigmoid(log_odds))
    return own + torch.where(s == 0, 0.0, s * (of_competitors - F.logsigmoid(-log_odds)))


def log_sum_sq_probs(log_odds: Tensor, sums: Tensor, second: Tensor, exponent: float = 0.0) -> Tensor:
    """log sum p^2. second: e^-exponent sum e^2 over the competitors."""
    of_competitors = torch.where(sums == 0, -torch.inf, second.log() + exponent - 2 * sums.log())
    others = 2 * F.logsigmoid(-log_odds) + of_competitors
    return torch.logaddexp(2 * F.logsigmoid(log_odds), others)


def entropy_slopes(log_odds: Tensor, entropy: Tensor) -> EntropySlopes:
    p, s = torch.sigmoid(log_odds), torch.sigmoid(-log_odds)
    own = torch.where(p == 0, 0.0, -p * (F.logsigmoid(log_odds) + entropy))
    level = torch.where(s == 0, 0.0, s * (F.logsigmoid(-log_odds) + entropy))
    return EntropySlopes(own, level)
