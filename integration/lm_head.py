"""Log-probabilities from inside a model's own head, in the place of its logits.

The model's own forward runs unchanged and calls its own head; only what the head does for the one call that has
been *requested* differs. So every architecture works, and whatever wraps the model (autocast, FSDP, ZeRO,
offload hooks, adapters in the backbone) has done its part by the time the head is called.

    head, requested:   logps = linear_logps(hidden, weight, targets)      kept in the request
                       logps, anchor = fork(logps)                        anchor [..., 7]: known numbers
                       return anchor                                      in the place of the logits
    after the model:   logps = join(logps, outputs.logits)                sends zeros back through the logits

Fork and join make one path of the two. Hooks on module outputs (FSDP, ZeRO, DDP) fire in the backward only if a
gradient arrives at the model's output; fork's backward needs both gradients, so it, and with it the head's,
cannot run before those hooks. The values of `logits` carry no numbers of ours: soft-caps and output casts would
change them. They carry seven known ones, which tell what the model does after its head (`transform`), and which
are checked again on every step. Seven columns rather than one, because one would broadcast against a bias or an
adapter's output without an error.
"""

from __future__ import annotations

import logging
import types
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from orpo_kernels.linear_logps import head_options, scored_logps
from orpo_kernels.plan import Plan
from orpo_kernels.tokens import ScoredTokens, select_scored

from .transform import PROBES, Transform, anchor_values, infer_transform

logger = logging.getLogger("orpo_kernels")


class _Request:
    """One call of the head: what is asked, and what it answered."""

    def __init__(
        self,
        scored: ScoredTokens | None,
        targets_shape: torch.Size,
        hidden_shape: torch.Size,
        transform: Transform,
        plan: Plan | None,
        mean_logits_over: Tensor | None,
    ) -> None:
        self.scored = scored  # None: a probe, which scores nothing
        self.targets_shape = targets_shape
        self.hidden_shape = hidden_shape
        self.transform = transform
        self.plan = plan
        self.mean_logits_over = mean_logits_over
        self.calls = 0
        self.logps: Tensor | None = None
        self.mean_logits: Tensor | None = None

    def serve(self, head: nn.Linear, hidden: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 1:
            raise RuntimeError(
                "the model called its head twice in one forward (multi-token prediction?): only a head that is "
                "called once can stand in for the logits"
            )
        if hidden.shape[:-1] != self.hidden_shape:
            raise RuntimeError(
                f"the head was given hidden states of shape {tuple(hidden.shape)} where targets call for "
                f"{(*self.hidden_shape, hidden.shape[-1])}: do not pass logits_to_keep or labels, and give "
                "targets one entry for every input token"
            )
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        if self.scored is None:
            # fp64, so that a scale or a cap comes out as exactly as the model's arithmetic allows.
            probe = torch.float64 if hidden.device.type != "mps" else wide
            return anchor_values(hidden, probe).repeat(*self.hidden_shape, 1)
        options = head_options(
            hidden,
            head.weight,
            bias=head.bias,
            logit_scale=self.transform.logit_scale,
            softcap=self.transform.softcap,
            plan=self.plan,
        )
        logps = scored_logps(hidden, head.weight, head.bias, self.scored, self.targets_shape, options)
        if self.mean_logits_over is not None and self.transform.softcap is None:
            self.mean_logits = _mean_logits(hidden, head, self.transform.logit_scale, self.mean_logits_over)
        self.logps, anchor = _Fork.apply(logps, anchor_values(hidden, wide).repeat(*self.hidden_shape, 1))
        return anchor


# The request in force. Kept in the module rather than on the model: a compiled model must not specialise on it.
_request: _Request | None = None


def _head_forward(self: nn.Linear, hidden: Tensor) -> Tensor:
    if _request is None:
        return nn.Linear.forward(self, hidden)
    return _request.serve(self, hidden)


class _Fork(torch.autograd.Function):
    """(logps, anchor) -> the same; the gradient of logps waits for the anchor's, which is dropped."""

    @staticmethod
    def forward(ctx: Any, logps: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
        return logps.clone(), anchor.clone()

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor, grad_anchor: Tensor) -> tuple[Tensor, None]:
        return grad_logps, None


class _Join(torch.autograd.Function):
    """(logps, logits) -> logps; logits get a gradient of zeros."""

    @staticmethod
    def forward(ctx: Any, logps: Tensor, logits: Tensor) -> Tensor:
        ctx.like = (logits.shape, logits.dtype, logits.device)
        return logps.to(logits.device, copy=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype, device = ctx.like
        return grad, torch.zeros(shape, dtype=dtype, device=device)


def _mean_logits(hidden: Tensor, head: nn.Linear, scale: float, over: Tensor) -> Tensor:
    """Each sequence's mean logit over the positions `over` [B, T] and the vocabulary: [B] fp32, no gradient.

    The mean of a linear map is the map of the mean: mean_t(h_t) . mean_v(W_v) + mean(b).
    """
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        weights = over.to(hidden.device, torch.float32)
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1)
        # As a product, so that no fp32 copy of hidden is made.
        mean = torch.bmm(weights[:, None].to(hidden.dtype), hidden).squeeze(1).float()
        mean = mean @ head.weight.mean(0, dtype=torch.float32)
        if head.bias is not None:
            mean = mean + head.bias.mean(dtype=torch.float32)
        return mean * scale


class ModelLogps:
    """Asks a model for log-probabilities instead of logits. Made by `attach`.

    model: as given to `attach`, or a wrapper put around it later (accelerate, DDP): pass that to `logps`.
    transform: what the model does to its logits after the head; None until the first batch told.
    """

    def __init__(self, model: nn.Module, plan: Plan | None = None) -> None:
        self.model = model
        self.plan = plan
        self.transform: Transform | None = None
        self.head = _patch(find_head(model))
        _say_if_tied(model, self.head)

    def logps(
        self,
        targets: Tensor,
        *,
        model: nn.Module | None = None,
        rows: Tensor | None = None,
        hidden_shape: torch.Size | None = None,
        ignore_index: int = -100,
        mean_logits_over: Tensor | None = None,
        **inputs: Any,
    ) -> tuple[Tensor, Any]:
        """Run the model and return (log-probabilities, outputs).

        targets: [B, T] int64 aligned with the hidden states (`shift_labels`), `ignore_index` where not scored.
        model: the wrapped model to call; by default the one attached.
        rows: int64, shaped like targets: the flattened hidden row that predicts each; targets may then have any
            shape, and hidden_shape says what the head will be given (default: that of `inputs["input_ids"]`).
        mean_logits_over: [B, T] bool: put each sequence's mean logit over these positions into
            `outputs["mean_logits"]` [B]; no logits needed (left out for a soft-capped head, which has no such form).
        inputs: the model's own arguments, without labels.

        Returns log-probabilities fp32 shaped like targets, 0 where not scored, and the model's outputs, whose
        `logits` are [..., 7] placeholders.

        Raises ValueError for targets or inputs that do not fit, RuntimeError when the head was not called
        exactly once, or when the model treats its logits in a way that cannot be taken exactly.
        """
        if "labels" in inputs:
            raise ValueError("labels were passed: the model would compute its own loss from placeholders; leave them out")
        call = self.model if model is None else model
        if isinstance(call, nn.DataParallel):
            raise ValueError("nn.DataParallel replicates the head per thread: use DistributedDataParallel instead")
        if hidden_shape is None:
            hidden_shape = targets.shape if rows is None else inputs["input_ids"].shape
        if rows is None and targets.shape != hidden_shape:
            raise ValueError(f"targets has shape {tuple(targets.shape)}: it must be {tuple(hidden_shape)}")
        if self.transform is None:
            self.transform = self._probe(call, targets, hidden_shape, inputs)
        scored = select_scored(
            targets,
            self.head.weight.shape[0] if self.head.weight.dim() == 2 else self.head.out_features,
            hidden_shape.numel(),
            ignore_index=ignore_index,
            rows=rows,
        )
        request = _Request(scored, targets.shape, hidden_shape, self.transform, self.plan, mean_logits_over)
        outputs = _run(call, request, inputs)
        logits = outputs.logits
        _check_anchor(logits, self.transform)
        assert request.logps is not None
        logps = request.logps
        logps = _Join.apply(logps, logits)
        if request.mean_logits is not None:
            outputs["mean_logits"] = request.mean_logits
        return logps, outputs

    def _probe(
        self, call: nn.Module, targets: Tensor, hidden_shape: torch.Size, inputs: dict[str, Any]
    ) -> Transform:
        """Send the probes through the whole wrapped model once, and leave no trace of it."""
        request = _Request(None, targets.shape, hidden_shape, Transform(), None, None)
        devices = [targets.device] if targets.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            logits = _run(call, request, inputs).logits
        return infer_transform(logits.reshape(-1, len(PROBES))[0].tolist(), logits.dtype)

    def detach(self) -> None:
        """Give the model its own head back, exactly as it was."""
        _unpatch(self.head)


def attach(model: nn.Module, plan: Plan | None = None) -> ModelLogps:
    """Prepare `model` to answer with log-probabilities when asked to.

    model: a transformers model (or one with `get_output_embeddings`), bare or under PEFT, before or after
        accelerate, DDP or torch.compile wraps it. Until it is asked, it behaves as before: generation, saving
        and state_dict keys are untouched.

    Raises ValueError when the head is not a plain linear layer, and says what was found.
    """
    return ModelLogps(model, plan)


@contextmanager
def attached(model: nn.Module, plan: Plan | None = None) -> Iterator[ModelLogps]:
    """`attach` for the length of a `with` block."""
    handle = attach(model, plan)
    try:
        yield handle
    finally:
        handle.detach()


def find_head(model: nn.Module) -> nn.Linear:
    """The linear layer that makes the logits, beneath whatever wraps it; raises ValueError if there is none."""
    bare: Any = model
    while not hasattr(bare, "get_output_embeddings"):
        inner = getattr(bare, "_orig_mod", None) or getattr(bare, "module", None)
        if inner is None:
            raise ValueError(f"{type(model).__name__} has no get_output_embeddings(): give a causal language model")
        bare = inner
    head = bare.get_output_embeddings()
    wrapper = getattr(head, "modules_to_save", None)
    if isinstance(wrapper, nn.ModuleDict):  # PEFT's copy of a head that trains whole
        active = head.active_adapter
        head = wrapper[active if isinstance(active, str) else active[0]]
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"the head of {type(bare).__name__} is {type(head).__name__}: only a plain nn.Linear head is exact "
            "here. Put adapters on other layers than the head"
        )
    return head


_patched_classes: dict[type, type] = {}


def _patch(head: nn.Linear) -> nn.Linear:
    """Let `_head_forward` serve the head. By its class, so that a deep copy serves its own weights; beneath
    accelerate's hook, where there is one, so that offloaded weights have arrived."""
    if _is_patched(head):
        return head
    if "_old_forward" in vars(head):
        head._old_forward = types.MethodType(_head_forward, head)
        return head
    if "forward" in vars(head):
        raise ValueError(
            f"the head's forward has been replaced by {vars(head)['forward']!r}: remove that patch before attaching"
        )
    if type(head).forward is not nn.Linear.forward:
        raise ValueError(
            f"the head is a {type(head).__name__} with a forward of its own: only nn.Linear's product is exact here"
        )
    original = type(head)
    if original not in _patched_classes:
        _patched_classes[original] = type(original.__name__, (original,), {"forward": _head_forward})
    head.__class__ = _patched_classes[original]
    return head


def _is_patched(head: nn.Linear) -> bool:
    return type(head).forward is _head_forward or (
        getattr(vars(head).get("_old_forward"), "__func__", None) is _head_forward
    )


def _unpatch(head: nn.Linear) -> None:
    if type(head).forward is _head_forward:
        head.__class__ = type(head).__mro__[1]
    elif _is_patched(head):
        head._old_forward = types.MethodType(type(head).forward, head)


def _run(call: nn.Module, request: _Request, inputs: dict[str, Any]) -> Any:
    """The model's forward with `request` in force; the head must have answered it."""
    global _request
    if _request is not None:
        raise RuntimeError("a model was asked for log-probabilities inside another such call: finish that one first")
    _request = request
    try:
        outputs = call(**inputs)
    finally:
        _request = None
    if request.calls == 0:
        raise RuntimeError(
            f"the forward of {type(call).__name__} did not call the attached head: something computed the logits "
            "by another way (another library's fused loss, a replaced head). Remove that, or attach again"
        )
    return outputs


def _check_anchor(logits: Tensor, transform: Transform) -> None:
    """The placeholders must arrive as the transform has them; one row is looked at."""
    if logits.shape[-1] != len(PROBES):
        raise RuntimeError(
            f"the model's logits have {logits.shape[-1]} columns where the head returned {len(PROBES)}: something "
            "added to them"
        )
    seen = logits.detach().reshape(-1, len(PROBES))[:1].to(torch.float32)
    expected = transform(anchor_values(seen, torch.float32)).expand_as(seen)
    right = torch.isclose(seen, expected, rtol=16 * torch.finfo(logits.dtype).eps, atol=1e-3).all()
    message = f"the model treats its logits otherwise than on the first batch ({transform}): {PROBES} came out wrong"
    if seen.device.type == "cuda":
        torch._assert_async(right, message)  # type: ignore[arg-type]  # no wait for the device
    elif not bool(right):
        raise RuntimeError(f"{message}: {seen[0].tolist()}")


_said_tied: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _say_if_tied(model: nn.Module, head: nn.Linear) -> None:
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    if head.weight.requires_grad and embeddings is not None and head.weight is getattr(embeddings, "weight", None):
        if head not in _said_tied:
            _said_tied.add(head)
            logger.info(
                "the head is tied to the input embeddings and trains with them: 4 units of work instead of 2. "
                "Freeze the embeddings to spare it"
            )
