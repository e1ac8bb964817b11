"""The primitive: log-probabilities of target tokens under a language-model head, without the logits.

    logp_t = z_t[y_t] - logsumexp_v z_t[v],     z_t = f(W h_t + b)

Preference and likelihood losses (ORPO, CPO, DPO, SFT) are plain maths on its output. What it costs, and the
algorithm behind it, is in `orpo_kernels.plan` and `orpo_kernels.kernels`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from orpo_kernels.autograd import HeadOptions, LinearLogps, Needs, TokenStats
from orpo_kernels.kernels.statistics import NO_STATISTICS, Statistics
from orpo_kernels.plan import Plan
from orpo_kernels.tokens import ScoredTokens, select_scored

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    plan: Plan | None = None,
) -> Tensor:
    """Log-probability (nats) of every target under `softmax(f(hidden @ weight.T + bias))`.

    hidden: [..., D] fp64, fp32, bf16 or fp16.
    weight: [V, D] in the same dtype (any of them under autocast).
    targets: [...] integer, aligned with `hidden`: `hidden[t]` predicts `targets[t]` (already shifted).
        Any shape when `rows` is given.
    rows: int64, shaped like `targets`: the row of `hidden.view(-1, D)` that predicts each target. Rows may
        repeat; their gradients are summed.
    bias: [V]. logit_scale, softcap: f(x) = softcap * tanh(logit_scale * x / softcap), or logit_scale * x.
    ignore_index: targets with this value are not scored.
    plan: memory budget and what to keep (`Plan`); the default follows the device.

    Returns fp32 (fp64 for fp64 inputs), shaped like `targets`, 0 at ignored places; differentiable in hidden,
    weight and bias. A target that is certain keeps its precision: logp = logsigmoid(z_y - L) with L over the
    other entries. A row with NaN gives NaN; one with inf too, unless a soft-cap bounds its logits.

    Raises ValueError or TypeError that names the argument, its value and what it must be.
    """
    options = head_options(hidden, weight, bias=bias, logit_scale=logit_scale, softcap=softcap, plan=plan)
    check_targets(hidden, targets, rows)
    if torch.compiler.is_compiling():
        from orpo_kernels.compiled import compiled_linear_logps

        return compiled_linear_logps(hidden, weight, bias, targets, rows, ignore_index, options)
    num_rows = math.prod(hidden.shape[:-1])
    scored = select_scored(targets, weight.shape[0], num_rows, ignore_index=ignore_index, rows=rows)
    return scored_logps(hidden, weight, bias, scored, targets.shape, options)


def scored_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scored: ScoredTokens,
    shape: torch.Size,
    options: HeadOptions,
    adapter: Tensor | None = None,
) -> Tensor:
    """`linear_logps` for tokens that have been selected already; `shape` is that of the targets.

    adapter: [V, r], a low-rank update beside the weight, in any floating dtype: hidden is then [..., D + r], the
    adapter's input behind the head's.
    """
    return scored_token_stats(hidden, weight, bias, scored, shape, options, adapter, NO_STATISTICS).logps


def scored_token_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scored: ScoredTokens,
    shape: torch.Size,
    options: HeadOptions,
    adapter: Tensor | None,
    wanted: Statistics,
) -> TokenStats:
    """`linear_token_stats` for tokens that have been selected already; arguments as of `scored_logps`."""
    logps, *statistics = LinearLogps.apply(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        scored.targets,
        scored.rows,
        scored.groups,
        options,
        Needs.of(hidden, weight, bias, adapter),
        adapter,
        wanted,
    )

    def placed(x: Tensor) -> Tensor:
        if scored.positions is None:
            return x.view(shape)
        return x.new_zeros(math.prod(shape)).index_copy(0, scored.positions, x).view(shape)

    return TokenStats(logps, *statistics).map(placed)


def head_options(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    plan: Plan | None,
    adapter: Tensor | None = None,
    is_slice: bool = False,
) -> HeadOptions:
    """The checked options of a head; raises as `linear_logps` does. adapter: as for `scored_logps`. is_slice: the
    weight is one rank's rows, of which there may be none."""
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: it must be [V, D]")
    vocab_size, hidden_size = weight.shape
    if adapter is not None:
        if adapter.dim() != 2 or adapter.shape[0] != vocab_size:
            raise ValueError(f"adapter has shape {tuple(adapter.shape)}: it must be [V, r] with V={vocab_size}")
        hidden_size += adapter.shape[1]
    if hidden.dim() < 1 or hidden.shape[-1] != hidden_size:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)} and weight {tuple(weight.shape)}: the last size of hidden "
            f"must be weight's D={hidden_size}"
        )
    if (vocab_size == 0 and not is_slice) or hidden_size == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: V and D must be at least 1")
    if bias is not None and bias.shape != (vocab_size,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}: it must be [V] = [{vocab_size}]")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(
                f"{name} is on {tensor.device} and hidden on {hidden.device}: move one to the other's device"
            )
    if not (math.isfinite(logit_scale) and logit_scale != 0):
        raise ValueError(f"logit_scale={logit_scale} must be finite and not 0")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap={softcap} must be positive and finite, or None for no cap")
    if plan is not None and not isinstance(plan, Plan):
        raise TypeError(f"plan={plan!r} must be an orpo_kernels.Plan, or None for the default")
    return HeadOptions(
        float(logit_scale),
        None if softcap is None else float(softcap),
        _compute_dtype(hidden, weight, bias),
        plan or Plan(),
    )


def _compute_dtype(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """What F.linear would multiply in: autocast's dtype if on, else the common dtype."""
    tensors = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, tensor in tensors.items():
        if tensor.dtype not in _FLOATS:
            raise TypeError(f"{name} has dtype {tensor.dtype}: it must be float64, float32, bfloat16 or float16")
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type) and torch.float64 not in {t.dtype for t in tensors.values()}:
        return torch.get_autocast_dtype(device_type)
    if len({t.dtype for t in tensors.values()}) > 1:
        found = ", ".join(f"{name} {tensor.dtype}" for name, tensor in tensors.items())
        raise TypeError(f"mixed dtypes ({found}): cast them to one dtype, or run under torch.autocast")
    return hidden.dtype


def check_targets(hidden: Tensor, targets: Tensor, rows: Tensor | None) -> None:
    if targets.dtype not in _INTEGERS:
        raise TypeError(f"targets has dtype {targets.dtype}: it must hold integer token ids (int64)")
    if targets.device != hidden.device:
        raise ValueError(f"targets is on {targets.device} and hidden on {hidden.device}: move targets there")
    if rows is None:
        if targets.shape != hidden.shape[:-1]:
            raise ValueError(
                f"targets has shape {tuple(targets.shape)} and hidden {tuple(hidden.shape)}: without `rows`, "
                f"targets must be shaped like hidden without its last size, {tuple(hidden.shape[:-1])}"
            )
        return
    if rows.dtype != torch.int64 or rows.shape != targets.shape or rows.device != targets.device:
        raise ValueError(
            f"rows is {rows.dtype} {tuple(rows.shape)} on {rows.device}: it must be int64, shaped like targets "
            f"{tuple(targets.shape)} and on {targets.device}"
        )


def shift_labels(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Targets aligned with hidden states from labels aligned with the inputs, as Hugging Face models take them.

    labels: [..., T] integers, not changed. Returns [..., T]: `targets[t] = labels[t + 1]`; the last place
    predicts nothing and gets `ignore_index`.

    Raises ValueError where there is no dimension to shift along.
    """
    if labels.dim() == 0:
        raise ValueError(f"labels has shape {tuple(labels.shape)}: shift_labels needs [..., T]")
    return torch.cat([labels[..., 1:], torch.full_like(labels[..., :1], ignore_index)], dim=-1)
