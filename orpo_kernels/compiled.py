"""The primitive under torch.compile: the eager bodies as two opaque operators.

How many tokens are scored is data, so selection happens inside the operator and the sizes that depend on it
are dynamic: a compiled graph serves every length and every number of ignored tokens. Eager calls do not come
here, so that torch's FlopCounterMode, blind inside custom operators, sees their products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from orpo_kernels.autograd import (
    HeadOptions,
    Needs,
    Saved,
    head_gradient,
    hidden_gradient,
    logps_forward,
)
from orpo_kernels.kernels.interface import HeadGradients, KeptLogitGrads, Tokens
from orpo_kernels.plan import Plan
from orpo_kernels.tokens import group_rows, select_scored

# `Plan.keep_logit_grads=True` in an operator's integer argument.
_KEEP_ALL = -1


@torch.library.custom_op("orpo_kernels::linear_logps", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: Tensor | None,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    compute_dtype: torch.dtype,
    scratch_bytes: int | None,
    keep: int,
    needs: list[bool],
    adapter: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int]:
    """(logps [T], positions [N], one_minus_p [N], lse [N], u [N, D], kept [K, V], base [K, G], columns)."""
    scored = select_scored(targets, weight.shape[0], hidden.shape[0], ignore_index=ignore_index, rows=rows)
    options = _options(logit_scale, softcap, compute_dtype, scratch_bytes, keep)
    tokens, head = Tokens(hidden, scored.rows, scored.targets), options.head(weight, bias, adapter)
    answer, saved = logps_forward(tokens, head, options.plan, Needs(*needs))
    logps = answer.logps
    positions = scored.positions
    if positions is None:
        positions = torch.arange(targets.numel(), device=targets.device)
    full = logps.new_zeros(targets.numel()).index_copy_(0, positions, logps)
    kept = saved.kept

    def none() -> Tensor:  # a new one each time: an operator must not return a tensor twice
        return logps.new_empty(0, 0)

    return (
        full,
        positions,
        saved.one_minus_p,
        saved.lse,
        none() if saved.u is None else saved.u,
        none() if kept is None else _side_by_side(kept.values),
        none() if kept is None else kept.base,
        0 if kept is None else kept.columns,
    )


@torch.library.custom_op("orpo_kernels::linear_logps_backward", mutates_args=())
def _backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: Tensor | None,
    positions: Tensor,
    one_minus_p: Tensor,
    lse: Tensor,
    u: Tensor,
    kept: Tensor,
    base: Tensor,
    columns: int,
    logit_scale: float,
    softcap: float | None,
    compute_dtype: torch.dtype,
    scratch_bytes: int | None,
    keep: int,
    needs: list[bool],
    adapter: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight, bias and adapter; empty where not needed."""
    options = _options(logit_scale, softcap, compute_dtype, scratch_bytes, keep)
    wants = Needs(*needs)
    coefficient = grad.index_select(0, positions).to(one_minus_p.dtype) * one_minus_p
    token_rows = positions if rows is None else rows.index_select(0, positions)
    groups = None if rows is None else group_rows(token_rows)
    d_hidden, d_head = None, HeadGradients(None, None)
    if wants.hidden:
        d_hidden = hidden_gradient(hidden.shape, hidden.dtype, [(coefficient, u)], token_rows, groups, options.plan)
    if wants.head:
        saved = Saved(one_minus_p, lse, None, KeptLogitGrads([kept], base, columns) if columns else None)
        tokens = Tokens(hidden, token_rows, targets.index_select(0, positions))
        head = options.head(weight, bias, adapter)
        d_head = head_gradient(tokens, head, coefficient, saved, options.plan, wants)
    grads = (d_hidden, *d_head)
    return tuple(hidden.new_empty(0) if g is None else g for g in grads)  # type: ignore[return-value]


@_forward.register_fake
def _(
    hidden,
    weight,
    bias,
    targets,
    rows,
    ignore_index,
    logit_scale,
    softcap,
    compute_dtype,
    scratch_bytes,
    keep,
    needs,
    adapter,
):
    context = torch.library.get_ctx()
    n = context.new_dynamic_size()
    wide = torch.float64 if compute_dtype == torch.float64 else torch.float32
    number = hidden.new_empty(n, dtype=wide)
    kept = hidden.new_empty(0, 0, dtype=wide)
    base = hidden.new_empty(0, 0, dtype=wide)
    columns: int | torch.SymInt = 0
    if keep and any(needs[1:]):
        k = context.new_dynamic_size()
        kept = hidden.new_empty(k, context.new_dynamic_size(), dtype=compute_dtype)  # rows may be longer than V
        base = hidden.new_empty(k, context.new_dynamic_size(), dtype=wide)
        columns = context.new_dynamic_size()
    return (
        hidden.new_empty(targets.shape[0], dtype=wide),
        targets.new_empty(n, dtype=torch.int64),
        number,
        torch.empty_like(number),
        hidden.new_empty(n, hidden.shape[1], dtype=wide if hidden.device.type == "cpu" else compute_dtype)
        if needs[0]
        else hidden.new_empty(0, 0, dtype=wide),
        kept,
        base,
        columns,
    )


@_backward.register_fake
def _(
    grad,
    hidden,
    weight,
    bias,
    targets,
    rows,
    positions,
    one_minus_p,
    lse,
    u,
    kept,
    base,
    columns,
    logit_scale,
    softcap,
    compute_dtype,
    scratch_bytes,
    keep,
    needs,
    adapter,
):
    def like(x, needed):
        return torch.empty_like(x, memory_format=torch.contiguous_format) if needed else hidden.new_empty(0)

    return tuple(like(x, needed) for x, needed in zip((hidden, weight, bias, adapter), needs, strict=True))


def _setup_context(ctx, inputs, output) -> None:
    hidden, weight, bias, targets, rows = inputs[:5]
    _, *saved, columns = output
    ctx.save_for_backward(hidden, weight, bias, targets, rows, *saved, inputs[-1])
    ctx.columns = columns
    ctx.arguments = inputs[6:-1]
    ctx.needs = inputs[-2]


def _autograd(ctx, grad, *_unused):
    *saved, adapter = ctx.saved_tensors
    grads = _backward(grad, *saved, ctx.columns, *ctx.arguments, adapter)
    *inputs, adapter = (g if needed else None for g, needed in zip(grads, ctx.needs, strict=True))
    return (*inputs, *(None,) * 9, adapter)


_forward.register_autograd(_autograd, setup_context=_setup_context)


def compiled_linear_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: Tensor | None,
    ignore_index: int,
    options: HeadOptions,
    adapter: Tensor | None = None,
) -> Tensor:
    """`linear_logps` on checked arguments, traceable."""
    plan = options.plan
    logps = _forward(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        targets.reshape(-1),
        None if rows is None else rows.reshape(-1),
        ignore_index,
        options.logit_scale,
        options.softcap,
        options.compute_dtype,
        plan.scratch_bytes,
        _KEEP_ALL if plan.keep_logit_grads is True else int(plan.keep_logit_grads),
        list(Needs.of(hidden, weight, bias, adapter)),
        adapter,
    )[0]
    return logps.view(targets.shape)


def _side_by_side(parts: list[Tensor]) -> Tensor:
    """One contiguous tensor; the parts go one by one."""
    if len(parts) == 1:
        return parts[0]
    whole = parts[0].new_empty(parts[0].shape[0], sum(part.shape[1] for part in parts))
    start = 0
    while parts:
        part = parts.pop(0)
        whole[:, start : start + part.shape[1]] = part
        start += part.shape[1]
    return whole


def _options(
    logit_scale: float, softcap: float | None, compute_dtype: torch.dtype, scratch_bytes: int | None, keep: int
) -> HeadOptions:
    plan = Plan(scratch_bytes=scratch_bytes, keep_logit_grads=True if keep == _KEEP_ALL else keep)
    return HeadOptions(logit_scale, softcap, compute_dtype, plan)
