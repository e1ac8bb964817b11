"""What `model(..., labels=labels, fused_lm_head=True)` does once our head is in TRL's place.

TRL puts a forward on the model, the innermost one: PEFT, DDP, FSDP, DeepSpeed and accelerate wrap what has it. TRL's
then runs the backbone, takes the head's weight and multiplies by itself. Ours runs the model's own forward, whose own
head answers with log-probabilities and statistics (`lm_head.ModelLogps.token_stats`): adapters on the head, sharded
heads, scaled and soft-capped logits need nothing more. The answer is TRL's, a `FusedCausalLMOutput`.

A forward that is called without `fused_lm_head` is the model's, as before.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather
from torch import Tensor, nn
from trl.trainer.utils import FusedCausalLMOutput

from orpo_kernels.linear_logps import shift_labels
from orpo_kernels.plan import Plan

from ..lm_head import ModelLogps, attach
from ..packing.batch_layout import BatchLayout
from ..packing.gate import LayoutGate
from ..packing.layout import Name
from ..packing.sequences import groups_of

# Where a model keeps the heads that were put on it, the innermost first.
_HEADS = "_orpo_fused_heads"
_STATISTICS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@dataclass(eq=False)
class FusedHead:
    """One model's answers to `fused_lm_head=True`.

    beneath: what stood in the model's `forward`, where that was more than the class's own.
    temperature, statistics: as `trl.trainer.utils.add_fused_lm_head` takes them.
    entropy_grad: whether the loss holds the entropies. batches: how padded batches are laid out; None: as they are.
    """

    logps: ModelLogps
    temperature: float = 1.0
    statistics: tuple[str, ...] = ()
    entropy_grad: bool = False
    batches: BatchLayout | None = None
    beneath: Callable[..., Any] | None = field(default=None, repr=False)

    def plain(self, model: nn.Module) -> Callable[..., Any]:
        """The model's forward without us."""
        return types.MethodType(type(model).forward, model) if self.beneath is None else self.beneath

    def answer(
        self,
        model: Any,
        labels: Tensor | None,
        targets: Tensor | None,
        num_items_in_batch: Tensor | int | None,
        inputs: dict[str, Any],
    ) -> FusedCausalLMOutput:
        """labels: [B, T], aligned with the inputs; or targets [B, T], shifted already, in their place."""
        config = model.config.get_text_config()
        if getattr(config, "output_router_logits", False):
            inputs.setdefault("output_router_logits", True)
        kept = slice(None) if targets is not None else slice(-1)  # TRL leaves out the place that predicts nothing
        if targets is None:
            if labels is None:
                raise ValueError("fused_lm_head=True was passed without labels: there is nothing to score; pass labels")
            targets = shift_labels(labels)
        plain, inputs["use_cache"] = self.plain(model), False
        laid = None
        if self.batches is not None:
            laid = self.batches.lay_out(inputs, targets, partial(_groups, inputs, targets), plain)
        stats, outputs = self.logps.token_stats(
            targets,
            model=plain,
            statistics=self.statistics,
            temperature=self.temperature,
            entropy_grad=self.entropy_grad and torch.is_grad_enabled(),
            **inputs if laid is None else laid[0],
        )
        fields = {name: getattr(stats, name) for name in _STATISTICS}
        if "entropy" in self.statistics and not self.entropy_grad and stats.logps.requires_grad:
            fields["entropy"] = _Constant.apply(stats.entropy, stats.logps)
        mask = targets.to(stats.logps.device) != -100
        count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        loss, aux_loss = -stats.logps.sum() / count, None
        if inputs.get("output_router_logits"):
            aux_loss = _router_loss(model, outputs)
            loss = loss + getattr(config, "router_aux_loss_coef", 0.0) * aux_loss.to(loss.device)
        return FusedCausalLMOutput(
            loss=loss,
            log_probs=stats.logps[:, kept],
            label_mask=mask[:, kept],
            aux_loss=aux_loss,
            **{name: None if value is None else value[:, kept] for name, value in fields.items()},
        )


def put_on(
    model: nn.Module,
    temperature: float,
    cast_to_fp32: bool,
    outputs: tuple[str, ...],
    *,
    entropy_grad: bool = False,
    plan: Plan | None = None,
    layout: Name = "padded",
    row_length: int | None = None,
) -> FusedHead:
    """Let our head answer `model(..., fused_lm_head=True)`; raises what `lm_head.attach` does.

    outputs: the fields of `FusedCausalLMOutput` that are asked for; log_probs always is.
    layout, row_length: as for `BatchLayout`.
    """
    unknown = set(outputs) - {"log_probs", *_STATISTICS}
    if unknown:
        names = ", ".join(_STATISTICS)
        raise ValueError(f"outputs={outputs}: {', '.join(sorted(unknown))} is none of log_probs, {names}")
    statistics = tuple(name for name in _STATISTICS if name in outputs)
    logps = attach(model, plan)
    logps.in_fp32 = cast_to_fp32
    batches = None if layout == "padded" else BatchLayout(LayoutGate(logps, _everywhere), layout, row_length)
    head = FusedHead(logps, temperature, statistics, entropy_grad and "entropy" in statistics, batches)
    heads = vars(model).setdefault(_HEADS, [])
    present = vars(model).get("forward")
    if heads and getattr(getattr(present, "__func__", None), "_orpo_level", None) == len(heads) - 1:
        head.beneath = heads[-1].beneath
        heads[-1] = head
        return head
    head.beneath = present
    model.forward = types.MethodType(_fused_forward(type(model), len(heads)), model)
    heads.append(head)
    return head


def head_on(model: nn.Module) -> FusedHead | None:
    """The outermost of our heads on a model."""
    heads = vars(model).get(_HEADS)
    return heads[-1] if heads else None


def _fused_forward(cls: type[nn.Module], level: int) -> Callable[..., Any]:
    """A forward under the signature of the class's own, which `generate` and trainers read.

    It finds its head through the model that it is called on, so that a deep copy has its own.
    """
    names = list(inspect.signature(cls.forward).parameters)[1:]

    @wraps(cls.forward)
    def fused_forward(
        self: nn.Module,
        *args: Any,
        fused_lm_head: bool = False,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        head: FusedHead = vars(self)[_HEADS][level]
        extra = {"shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
        if not fused_lm_head:
            return head.plain(self)(*args, **kwargs | {n: v for n, v in extra.items() if v is not None})
        inputs = dict(zip(names, args, strict=False)) | kwargs
        return head.answer(self, inputs.pop("labels", None), shift_labels, num_items_in_batch, inputs)

    fused_forward._orpo_level = level  # type: ignore[attr-defined]
    return fused_forward


def _groups(inputs: dict[str, Any], targets: Tensor, sequences: Sequence[Tensor]) -> list[tuple[int, ...]]:
    """Which sequences of a batch have the same prompt: all that stands before the first scored token."""
    scored = targets != -100
    reaches = torch.where(scored.any(1), scored.int().argmax(1) + 1, targets.shape[1])
    before = torch.arange(targets.shape[1], device=targets.device) < reaches[:, None]
    return groups_of(sequences, ((inputs["attention_mask"] == 1) & before).sum(1).tolist())


def _everywhere(verdict: bool) -> bool:
    """Whether all processes say so."""
    state = PartialState()
    return bool(gather(torch.tensor([verdict], device=state.device)).all())


def _router_loss(model: nn.Module, outputs: Any) -> Tensor:
    aux_loss = getattr(outputs, "aux_loss", None)
    if not isinstance(aux_loss, Tensor):
        raise ValueError(
            f"output_router_logits is on and {type(model).__name__} returned no aux_loss: set it to False, or "
            "router_aux_loss_coef to 0"
        )
    return aux_loss


class _Constant(torch.autograd.Function):
    """The entropies of a loss that was thought not to hold them: an error, where a bonus would quietly be lost."""

    @staticmethod
    def forward(ctx: Any, entropy: Tensor, logps: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return entropy.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        if grad is not None:  # wrappers send zeros to outputs that a loss does not hold
            none = ~grad.any()
            if grad.is_cuda:
                torch._assert_async(none, _HELD)  # no wait for the device
            elif not bool(none):
                raise RuntimeError(_HELD)
        return None, None


_HELD = (
    "the loss holds the entropies, whose gradient costs a product more and was not computed: pass entropy_grad=True to "
    "use() or accelerate()"
)
