"""What both backends take and return.

A backend is a module with the two functions of `Backend`. Both speak of *competitors*, the vocabulary entries other
than the target: with `z = f(W h + b)`,

    L         = logsumexp over v != y of z_v
    log_odds  = z_y - L = log p(y) / (1 - p(y))
    logp      = logsigmoid(log_odds),  s = sigmoid(-log_odds) = 1 - p(y)
    q         = softmax over v != y      (0 at y)
    u         = ((onehot(y) - q) * f') W

and `dlogp/dh = s u`: over all entries the softmax is `p = (1 - s) onehot(y) + s q`, so

    dlogp/dz = onehot(y) - p = onehot(y) - (1 - s) onehot(y) - s q = s (onehot(y) - q)

and `dz/dh = f' W`. So the gradient of a sure token is small times a number of order one, never a difference of two
numbers near one.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from orpo_kernels.kernels.statistics import NO_STATISTICS, Statistics, TokenStatistics
from orpo_kernels.plan import Schedule


class TargetLogits(NamedTuple):
    """Of tokens whose head is a slice of a vocabulary.

    value: [N] fp64, z_y, whichever slice has its row. slope: [N] accumulation dtype, f' there, 0 where another has.
    """

    value: Tensor
    slope: Tensor


class Tokens(NamedTuple):
    """The scored tokens.

    hidden: [R, D], any strides, its own dtype (cast to the head's compute dtype chunk by chunk).
    rows: [N] int64, the row of `hidden` that predicts each token; None when N == R and they correspond.
    targets: [N] int64 in [0, V); -1 where the target is none of the head's rows, all of which then compete.
    known: where the head is a slice of a vocabulary.
    """

    hidden: Tensor
    rows: Tensor | None
    targets: Tensor
    known: TargetLogits | None = None


class Head(NamedTuple):
    """What turns a hidden row into logits: z = cap * tanh(x / cap) with x = logit_scale * (W h + b).

    weight: [V, D]; bias: [V] or None.
    adapter: [V, r] or None, columns appended to the weight: the product's inner dimension is then D + r, hidden's
    too, and a low-rank update W + B A is [W | B] on [h | A h].
    compute_dtype is what the operands of every product are rounded to (autocast's, or the common dtype of the
    inputs); sums are carried in `accumulation_dtype`.
    """

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    compute_dtype: torch.dtype
    adapter: Tensor | None = None

    @property
    def inner_size(self) -> int:
        return self.weight.shape[1] + (0 if self.adapter is None else self.adapter.shape[1])

    @property
    def accumulation_dtype(self) -> torch.dtype:
        return torch.float64 if self.compute_dtype == torch.float64 else torch.float32


class KeptLogitGrads(NamedTuple):
    """Logit gradients kept from the forward for the first K tokens, to spare the backward one product.

    values: [K, V] compute dtype, exp(z - base) * f' with the target's entry 0, cut into parts [K, P] of whole
        groups. The kernels' lack the f' of a head without a soft-cap, have -S f' for the target's entry, with S the sum
        of the others over f', and rows that are a little longer than V.
    base: [K, G] accumulation dtype: column g is the base of the g-th group of `columns` entries.
    columns: the width of a group.
    """

    values: list[Tensor]
    base: Tensor
    columns: int

    def tile(self, tokens: slice, columns: slice) -> Tensor:
        """The values of some tokens and of entries that lie in one part."""
        width = self.values[0].shape[1]
        part, start = divmod(columns.start, width)
        return self.values[part][tokens, start : start + columns.stop - columns.start]

    def release(self, columns: slice) -> None:
        """Drops the part that ends with these entries: they were the last to be read."""
        width = self.values[0].shape[1]
        if columns.stop % width == 0 and len(self.values) > 1:
            self.values[columns.start // width] = self.values[0].new_empty(0, width)


class Forward(NamedTuple):
    """log_odds, lse (`L` above): [N] accumulation dtype. u: [N, D] compute dtype (on a CPU the accumulation dtype), or
    None."""

    log_odds: Tensor
    lse: Tensor
    u: Tensor | None
    kept: KeptLogitGrads | None
    statistics: TokenStatistics = TokenStatistics()


class EntropyGradient(NamedTuple):
    """What an upstream gradient of the entropy adds to the gradient of the logits, in the accumulation dtype [N].

    With it, `coefficient` is a competitor's: dLoss/dz_v = -q_v (coefficient + per_nat log q_v), and dLoss/dz_y = own.
    """

    own: Tensor
    per_nat: Tensor


class HeadGradients(NamedTuple):
    """Gradients of weight [V, D], bias [V] and adapter [V, r], in their own dtypes; None where not wanted."""

    weight: Tensor | None
    bias: Tensor | None
    adapter: Tensor | None = None


class Backend(Protocol):
    """What a backend's module holds."""

    def forward(
        self, tokens: Tokens, head: Head, schedule: Schedule, want_u: bool, wanted: Statistics = NO_STATISTICS
    ) -> Forward:
        """The terms of every token's log-probability, u where it is wanted, and the statistics that are."""

    def weight_gradient(
        self,
        tokens: Tokens,
        head: Head,
        coefficient: Tensor,
        lse: Tensor,
        kept: KeptLogitGrads | None,
        schedule: Schedule,
        want_weight: bool,
        want_bias: bool,
        want_adapter: bool = False,
        entropy: EntropyGradient | None = None,
    ) -> HeadGradients:
        """The head's gradients.

        coefficient: [N] accumulation dtype, `c_t s_t`: the gradient of the loss with respect to each log-probability
        times 1 - p(target). kept: its values are let go as they are used, so that their memory can serve the gradient.
        entropy: given only where nothing is kept.
        """

    def target_logits(self, tokens: Tokens, head: Head, schedule: Schedule) -> TargetLogits:
        """Of a slice, before its forward: of the tokens whose target it has; 0 for the others."""

    def settle_kept(self, kept: KeptLogitGrads, tokens: Tokens, head: Head, lse: Tensor) -> None:
        """Of a slice, after its forward: makes what was kept fit the whole vocabulary's L, [N] fp64; in place."""
