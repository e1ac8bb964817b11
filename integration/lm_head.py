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
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from orpo_kernels.linear_logps import head_options, scored_logps
from orpo_kernels.plan import Plan
from orpo_kernels.tokens import ScoredTokens, select_scored

from .patch import bare_model, find_head, is_tensor_parallel, patch, plain_forward, unpatch
from .transform import PROBES, Transform, anchor_values, infer_transform

logger = logging.getLogger("orpo_kernels")


@dataclass(eq=False)
class _Request:
    """One call of the head: what is asked, and what it answered.

    targets: int64, any shape; rows: the flattened hidden row that predicts each, or None where they correspond.
    hidden_shape: that of the hidden states without their last size. scored: the scored tokens among the targets.
    probe: score nothing, only return the probes.
    """

    targets: Tensor
    rows: Tensor | None
    ignore_index: int
    scored: ScoredTokens | None
    hidden_shape: torch.Size
    transform: Transform
    plan: Plan | None
    mean_logits_over: Tensor | None
    probe: bool = False
    calls: int = 0
    logps: Tensor | None = None
    mean_logits: Tensor | None = None

    def serve(self, head: nn.Linear, input: Tensor) -> Tensor:
        """The anchor [..., 7] in the place of head(input)."""
        self.calls += 1
        if self.calls > 1:
            raise RuntimeError(
                "the model called its head twice in one forward (multi-token prediction?): only a head that is "
                "called once can stand in for the logits"
            )
        hidden, weight, bias = _plain_tensors(head, input)
        # While compiling, the numbers in hidden_shape would be constants of the graph: `_check_anchor` looks instead.
        if not torch.compiler.is_compiling():
            _check_shape(hidden.shape[:-1], self.hidden_shape)
        if self.probe:
            # fp64 where there is one, so that a scale or a cap comes out as exactly as the model's arithmetic allows.
            wide = torch.float64 if hidden.device.type in ("cpu", "cuda") else torch.float32
            return _like_input(_anchor(hidden, wide), input)
        self.logps = self._score(hidden, weight, bias)
        if self.mean_logits_over is not None and self.transform.softcap is None:
            self.mean_logits = _mean_logits(hidden, weight, bias, self.transform.logit_scale, self.mean_logits_over)
        self.logps, anchor = _Fork.apply(self.logps, _anchor(hidden, self.logps.dtype))
        return _like_input(anchor, input)

    def _score(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        scale, softcap = self.transform
        options = head_options(hidden, weight, bias=bias, logit_scale=scale, softcap=softcap, plan=self.plan)
        if torch.compiler.is_compiling():
            # How many tokens are scored is data: the operator selects them again, so that one graph serves any number.
            from orpo_kernels.compiled import compiled_linear_logps

            targets = self.targets.to(hidden.device)
            rows = None if self.rows is None else self.rows.to(hidden.device)
            return compiled_linear_logps(hidden, weight, bias, targets, rows, self.ignore_index, options)
        scored = self.scored
        assert scored is not None
        if scored.targets.device != hidden.device:
            scored = tree_map_only(Tensor, lambda tensor: tensor.to(hidden.device), scored)
        return scored_logps(hidden, weight, bias, scored, self.targets.shape, options)


# The request in force. Kept in the module rather than on the model: a compiled model must not specialise on it.
_request: _Request | None = None


# Named as what it stands in for: a pickled model looks its forward up by this name.
def forward(self: nn.Linear, input: Tensor) -> Tensor:
    if _request is None:
        return plain_forward(self, input)
    return _request.serve(self, input)


class _Fork(torch.autograd.Function):
    """(logps, anchor) -> the same; the gradient of logps waits for the anchor's, which is dropped."""

    @staticmethod
    def forward(ctx: Any, logps: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
        return logps.clone(), anchor.clone()

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor, grad_anchor: Tensor) -> tuple[Tensor, None]:
        return grad_logps, None


class _Join(torch.autograd.Function):
    """(logps, logits) -> logps, on the logits' device; logits get a gradient of zeros."""

    @staticmethod
    def forward(ctx: Any, logps: Tensor, logits: Tensor) -> Tensor:
        ctx.device = logps.device
        ctx.like = (logits.shape, logits.dtype, logits.device)
        return logps.to(logits.device, copy=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype, device = ctx.like
        return grad.to(ctx.device), torch.zeros(shape, dtype=dtype, device=device)


def _anchor(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    return anchor_values(hidden, dtype).repeat(*hidden.shape[:-1], 1)


def _plain_tensors(head: nn.Linear, input: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states, weight and bias as every rank can multiply them by itself.

    A tensor-parallel head is gathered: every rank of its group holds the same hidden states, works on the whole
    weight, and keeps its own part of the gradient.
    """
    weight, bias = head.weight, head.bias
    if _is_dtensor(weight):
        if not (_is_dtensor(input) or is_tensor_parallel(head)):
            raise RuntimeError(
                f"the head's weight is a DTensor, {weight.placements}, and its input a plain tensor: either it was "  # type: ignore[attr-defined]
                "called without the FSDP module that gathers it, or its parallel style does not turn the input into "
                "a DTensor. Call the wrapped model; shard the head with ColwiseParallel or RowwiseParallel"
            )
        input, weight, bias = _whole(input), _whole(weight), None if bias is None else _whole(bias)
    if weight.shape != (head.out_features, head.in_features):
        raise RuntimeError(
            f"the head's weight has shape {tuple(weight.shape)} and the head is {head.in_features} -> "
            f"{head.out_features}: its weight is sharded by something that does not gather it for the head's own "
            "forward, or was exchanged by hand"
        )
    return input, weight, bias


def _is_dtensor(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def _whole(tensor: Any) -> Tensor:
    """The whole of a DTensor, whose gradient is the same on every rank; any other tensor as it is."""
    if not _is_dtensor(tensor):
        return tensor
    from torch.distributed.tensor import Replicate

    return tensor.full_tensor(grad_placements=[Replicate()] * tensor.device_mesh.ndim)


def _like_input(anchor: Tensor, input: Any) -> Tensor:
    """A DTensor where the head was given one, since what follows such a head expects one."""
    if not _is_dtensor(input):
        return anchor
    from torch.distributed.tensor import DTensor, Replicate

    mesh = input.device_mesh
    return DTensor.from_local(anchor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _mean_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, over: Tensor) -> Tensor:
    """Each sequence's mean logit over the positions `over` [B, T] and the vocabulary: [B] fp32, no gradient.

    The mean of a linear map is the map of the mean: mean_t(h_t) . mean_v(W_v) + mean(b).
    """
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        weights = over.to(hidden.device, torch.float32)
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1)
        # As a product, so that no fp32 copy of hidden is made.
        mean = torch.bmm(weights[:, None].to(hidden.dtype), hidden).squeeze(1).float()
        mean = mean @ weight.mean(0, dtype=torch.float32)
        if bias is not None:
            mean = mean + bias.mean(dtype=torch.float32)
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
        self.head = find_head(model)
        patch(self.head, forward)
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

        Under data parallelism every rank must make the call. Raises ValueError for targets or inputs that do not
        fit, RuntimeError when the head was not called exactly once, or when the model treats its logits in a way
        that cannot be taken exactly.
        """
        call = self.model if model is None else model
        _check_call(call, inputs)
        if hidden_shape is None:
            hidden_shape = targets.shape if rows is None else _input_shape(inputs)
        if rows is None and targets.shape != hidden_shape:
            raise ValueError(f"targets has shape {tuple(targets.shape)}: it must be {tuple(hidden_shape)}")
        # From the head's description: its weight may be sharded or elsewhere until the model calls it.
        scored = select_scored(
            targets, self.head.out_features, hidden_shape.numel(), ignore_index=ignore_index, rows=rows
        )
        request = _Request(
            targets, rows, ignore_index, scored, hidden_shape, Transform(), self.plan, mean_logits_over
        )
        if self.transform is None:
            self.transform = _probe(call, request, inputs)
        request.transform = self.transform
        outputs = _run(call, request, inputs)
        logits = _whole(outputs.logits)
        _check_anchor(logits, request)
        assert request.logps is not None
        if logits.requires_grad and not request.logps.requires_grad:
            raise RuntimeError(
                "the head ran without gradients inside a model that has them: it lies in a reentrant checkpoint. "
                "Checkpoint the layers, not the head"
            )
        if request.mean_logits is not None:
            outputs["mean_logits"] = request.mean_logits
        return _Join.apply(request.logps, logits), outputs

    def detach(self) -> None:
        """Give the model its own head back, exactly as it was."""
        for module in [self.head, *self.model.modules()]:  # copies of the head too (PEFT's modules_to_save)
            if isinstance(module, nn.Linear):
                unpatch(module, forward)


def attach(model: nn.Module, plan: Plan | None = None) -> ModelLogps:
    """Prepare `model` to answer with log-probabilities when asked to.

    model: a transformers model (or one with `get_output_embeddings`), bare or under PEFT, before or after
        accelerate, DDP, FSDP, DeepSpeed or torch.compile wraps it. Until it is asked, it behaves as before:
        generation, saving and state_dict keys are untouched.

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
    if not isinstance(getattr(outputs, "logits", None), Tensor):
        raise RuntimeError(
            f"the forward of {type(call).__name__} returned {type(outputs).__name__} without `logits`: leave "
            "return_dict and logits as the model's defaults have them"
        )
    return outputs


def _probe(call: nn.Module, request: _Request, inputs: dict[str, Any]) -> Transform:
    """Send the probes through the whole wrapped model once, and leave no trace of it."""
    accelerator = torch.accelerator.current_accelerator()
    devices = {p.device.index for p in call.parameters() if accelerator and p.device.type == accelerator.type}
    kind = "cuda" if accelerator is None else accelerator.type
    with torch.no_grad(), torch.random.fork_rng(sorted(devices), device_type=kind):
        logits = _whole(_run(call, replace(request, probe=True), inputs).logits)
    return infer_transform(logits.reshape(-1, len(PROBES))[0].tolist(), logits.dtype)


def _check_call(call: nn.Module, inputs: dict[str, Any]) -> None:
    if inputs.get("labels") is not None:
        raise ValueError("labels were passed: the model would compute its own loss from placeholders; leave them out")
    wrapper: Any = call
    while isinstance(wrapper, nn.Module):
        if isinstance(wrapper, nn.DataParallel):
            raise ValueError("nn.DataParallel replicates the head per thread: use DistributedDataParallel instead")
        wrapper = wrapper._modules.get("module")


def _input_shape(inputs: dict[str, Any]) -> torch.Size:
    if isinstance(inputs.get("input_ids"), Tensor):
        return inputs["input_ids"].shape
    raise ValueError("rows was given without input_ids: give hidden_shape, the [B, T] of the head's input")


def _check_shape(seen: torch.Size, expected: torch.Size) -> None:
    if seen != expected:
        raise RuntimeError(
            f"the head was given hidden states [{', '.join(map(str, seen))}, D] where targets call for "
            f"[{', '.join(map(str, expected))}, D]: do not pass logits_to_keep or labels, and give targets one entry "
            "for every input token (or rows and hidden_shape)"
        )


def _check_anchor(logits: Tensor, request: _Request) -> None:
    """The placeholders must arrive as the transform has them; one row is looked at."""
    if logits.shape[-1] != len(PROBES):
        raise RuntimeError(
            f"the model's logits have {logits.shape[-1]} columns where the head returned {len(PROBES)}: something "
            "added to them"
        )
    _check_shape(logits.shape[:-1], request.hidden_shape)
    seen = logits.detach().reshape(-1, len(PROBES))[:1].to(torch.float32)
    expected = request.transform(anchor_values(seen, torch.float32)).expand_as(seen)
    right = torch.isclose(seen, expected, rtol=16 * torch.finfo(logits.dtype).eps, atol=1e-3).all()
    message = (
        f"the model treats its logits otherwise than on the first batch ({request.transform}): {PROBES} came out wrong"
    )
    if seen.device.type == "cuda":
        torch._assert_async(right, message)  # type: ignore[arg-type]  # no wait for the device
    elif not bool(right):
        raise RuntimeError(f"{message}: {seen[0].tolist()}")


_said_tied: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _say_if_tied(model: nn.Module, head: nn.Linear) -> None:
    embeddings = getattr(bare_model(model), "get_input_embeddings", lambda: None)()
    weight = getattr(embeddings, "weight", None)
    if weight is not None and weight is head.weight and weight.requires_grad and head not in _said_tied:
        _said_tied.add(head)
        logger.info(
            "the head is tied to the input embeddings and trains with them: 4 units of work instead of 2. "
            "Freeze the embeddings to spare it"
        )
