"""Log-probabilities from inside a model's own head, in the place of its logits.

The model's own forward runs unchanged and calls its own head; only what the head does for the one call that has
been *requested* differs (`head.call`). So every architecture works, and whatever wraps the model (autocast, FSDP,
ZeRO, offload hooks, adapters in the backbone) has done its part by the time the head is called. What the model
does to its logits after the head is found out on the first batch (`head.logit_transform`) and checked again on every
step.

    ours = attach(model)
    logps, outputs = ours.logps(shift_labels(labels), input_ids=ids, attention_mask=mask)
    loss_of(logps).backward()
    ours.detach()
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from orpo_kernels.kernels.statistics import NO_STATISTICS, Statistics
from orpo_kernels.linear_token_stats import STATISTICS, TokenStats, check_temperature, statistics_of
from orpo_kernels.plan import Plan
from orpo_kernels.tokens import select_scored

from .head.call import Request, SequenceScores, check_shape, forward, join, run
from .head.logit_transform import PLACEHOLDERS, Transform, check_untrained, infer_transform, placeholder_values
from .head.lora import virtual_tokens
from .head.patch import bare_model, head_and_adapters, head_rows, patch, patch_adapters, unpatch
from .head.sharded import gathered

logger = logging.getLogger("orpo_kernels")


class ModelLogps:
    """Asks a model for log-probabilities instead of logits. Made by `attach`.

    model: as given to `attach`, or a wrapper put around it later (accelerate, DDP): pass that to `logps`.
    transform: what the model does to its logits after the head; None until the first batch told.
    in_fp32: multiply in fp32, outside autocast, whatever the head and its input are in. False until set.
    """

    def __init__(self, model: nn.Module, plan: Plan | None = None) -> None:
        self.model = model
        self.plan = plan
        self.transform: Transform | None = None
        self.in_fp32 = False
        self.head, self.adapters = head_and_adapters(model)
        patch(self.head, forward)
        patch_adapters(self.adapters, forward)
        _say_if_tied(model, self.head)

    def logps(
        self,
        targets: Tensor,
        *,
        model: Callable[..., Any] | None = None,
        rows: Tensor | None = None,
        hidden_shape: torch.Size | None = None,
        ignore_index: int = -100,
        **inputs: Any,
    ) -> tuple[Tensor, Any]:
        """Run the model and return (log-probabilities, outputs).

        targets: [B, T] int64 aligned with the hidden states (`shift_labels`), `ignore_index` where not scored.
        model: the wrapped model to call, or a forward of the model's own; by default the model attached.
        rows: int64, shaped like targets: the flattened hidden row that predicts each; targets may then have any
            shape, and hidden_shape says what the head will be given (default: that of `inputs["input_ids"]`, to
            which PEFT's prompt tuning adds positions that `rows` does not count).
        inputs: the model's own arguments, without labels.

        Returns log-probabilities fp32 shaped like targets, 0 where not scored, on the device of the model's
        outputs, and these, whose `logits` are [..., 7] placeholders.

        Where ranks share the work (DDP, FSDP, ZeRO, tensor parallelism) all of them make the call. The first
        one runs the model twice, once without gradients to see what it does to its logits.

        Raises ValueError for targets or inputs that do not fit, RuntimeError when the head was not called
        exactly once, or when the model treats its logits in a way that cannot be taken exactly.
        """
        answer, _, outputs = self._ask(targets, model, rows, hidden_shape, ignore_index, inputs)
        return answer.logps, outputs

    def sequence_scores(
        self,
        targets: Tensor,
        mean_logits_over: Tensor | Sequence[Tensor],
        *,
        model: Callable[..., Any] | None = None,
        rows: Tensor | None = None,
        hidden_shape: torch.Size | None = None,
        ignore_index: int = -100,
        **inputs: Any,
    ) -> SequenceScores:
        """Run the model and return log-probabilities with each sequence's mean logit; no logits needed.

        mean_logits_over: the positions that each mean is over: [B, T] bool, or S int64 tensors of flattened hidden
            rows, one a sequence.

        All else is as for `logps`. Returns (log-probabilities, mean logits [B] or [S] without gradient, outputs); no
        mean logits, None, for a soft-capped head, which has no such form.
        """
        answer, mean_logits, outputs = self._ask(
            targets, model, rows, hidden_shape, ignore_index, inputs, mean_logits_over=mean_logits_over
        )
        return SequenceScores(answer.logps, mean_logits, outputs)

    def token_stats(
        self,
        targets: Tensor,
        *,
        statistics: Collection[str] = STATISTICS,
        entropy_grad: bool = False,
        temperature: float = 1.0,
        model: Callable[..., Any] | None = None,
        rows: Tensor | None = None,
        hidden_shape: torch.Size | None = None,
        ignore_index: int = -100,
        **inputs: Any,
    ) -> tuple[TokenStats, Any]:
        """Run the model and return (log-probabilities with statistics of each token's distribution, outputs).

        statistics, entropy_grad: as for `orpo_kernels.linear_token_stats`.
        temperature: what the model's logits, scaled and capped as it does, are divided by.

        All else is as for `logps`; under torch.compile, the head is left out of the graph.
        """
        wanted = statistics_of(statistics, entropy_grad)
        check_temperature(temperature)
        answer, _, outputs = self._ask(
            targets, model, rows, hidden_shape, ignore_index, inputs, wanted=wanted, temperature=temperature
        )
        return answer, outputs

    def _ask(
        self,
        targets: Tensor,
        model: Callable[..., Any] | None,
        rows: Tensor | None,
        hidden_shape: torch.Size | None,
        ignore_index: int,
        inputs: dict[str, Any],
        *,
        mean_logits_over: Tensor | Sequence[Tensor] | None = None,
        wanted: Statistics = NO_STATISTICS,
        temperature: float = 1.0,
    ) -> tuple[TokenStats, Tensor | None, Any]:
        """(log-probabilities and statistics, the sequences' mean logits, the model's outputs)."""
        call = self.model if model is None else model
        _check_call(call, inputs)
        self._follow()
        if self.adapters and inputs.get("adapter_names") is not None:
            raise ValueError(
                "adapter_names was passed: a batch cannot mix the head's adapters; choose with set_adapter instead"
            )
        virtual = virtual_tokens(self.model)
        if virtual and rows is None:
            targets, mean_logits_over = _behind(virtual, targets, mean_logits_over, ignore_index)
        elif virtual and rows is not None and hidden_shape is None:
            *rest, length = _input_shape(inputs)
            hidden_shape = torch.Size((*rest, virtual + length))
            mean_logits_over = _over_behind(virtual, length, mean_logits_over)
            rows = _places_behind(virtual, length, rows)
        if hidden_shape is None:
            hidden_shape = targets.shape if rows is None else _input_shape(inputs)
        if rows is None and targets.shape != hidden_shape:
            raise ValueError(f"targets has shape {tuple(targets.shape)}: it must be {tuple(hidden_shape)}")
        vocab_size, num_rows = head_rows(self.head), hidden_shape.numel()
        scored = select_scored(targets, vocab_size, num_rows, ignore_index=ignore_index, rows=rows)
        request = Request(
            targets, rows, ignore_index, scored, hidden_shape, Transform(), self.plan, mean_logits_over, wanted,
            temperature, self.in_fp32,
        )  # fmt: skip
        if self.transform is None:
            _say_if_tied(self.model, self.head)
            self.transform = _find_transform(self.model, call, replace(request, only_placeholders=True), inputs)
        request.transform = self.transform
        outputs = run(call, request, inputs)
        logits = _one_set(gathered(outputs.logits), request)
        _check_placeholders(logits, request)
        check_untrained(logits)
        assert request.answer is not None
        if logits.requires_grad and not request.answer.logps.requires_grad:
            raise RuntimeError(
                "the head ran without gradients inside a model that has them: it lies in a reentrant checkpoint. "
                "Checkpoint the layers, not the head"
            )
        answer = join(logits, request.answer, wanted)
        if virtual and rows is None:
            answer = answer.map(lambda x: x[..., virtual:])
        return answer, request.mean_logits, outputs

    def detach(self) -> None:
        """Give the model its own head back, exactly as it was."""
        # Adapters on the head too, and copies of it such as PEFT's modules_to_save makes.
        for module in (self.head, *self.model.modules()):
            unpatch(module, forward)

    def _follow(self) -> None:
        """The head as it is now: adapters may have been put on it, switched, merged or taken off since."""
        head, self.adapters = head_and_adapters(self.model)
        if head is not self.head:
            patch(head, forward)
            self.head = head
        patch_adapters(self.adapters, forward)


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


def _find_transform(model: nn.Module, call: Callable[..., Any], request: Request, inputs: dict[str, Any]) -> Transform:
    """Send the placeholders through the whole wrapped model once, and leave the random numbers as they were."""
    devices = {p.device.index for p in model.parameters() if p.is_cuda}
    if torch.cuda.is_initialized():
        devices.add(torch.cuda.current_device())  # that of offloaded weights
    with torch.no_grad(), torch.random.fork_rng(sorted(devices)):
        logits = _one_set(gathered(run(call, request, inputs).logits), request)
    return infer_transform(logits.reshape(-1, len(PLACEHOLDERS))[0].tolist(), logits.dtype)


def _check_call(call: Callable[..., Any], inputs: dict[str, Any]) -> None:
    if inputs.get("labels") is not None:
        raise ValueError("labels were passed: the model would compute its own loss from placeholders; leave them out")
    wrapper: Any = call
    while isinstance(wrapper, nn.Module):
        if isinstance(wrapper, nn.DataParallel):
            raise ValueError("nn.DataParallel replicates the head per thread: use DistributedDataParallel instead")
        wrapper = wrapper._modules.get("module")


def _behind(virtual: int, targets: Tensor, over: Any, ignore_index: int) -> tuple[Tensor, Any]:
    """Targets [B, virtual + T] and the places of mean logits, behind positions that are not scored."""
    before = targets.new_full((*targets.shape[:-1], virtual), ignore_index)
    return torch.cat([before, targets], -1), _over_behind(virtual, targets.shape[-1], over)


def _over_behind(virtual: int, length: int, over: Any) -> Any:
    """`mean_logits_over` of rows of `length` tokens, for the same rows behind `virtual` positions."""
    if over is None:
        return None
    if isinstance(over, Tensor):
        return torch.cat([over.new_zeros(*over.shape[:-1], virtual), over], -1)
    return tuple(_places_behind(virtual, length, places) for places in over)


def _places_behind(virtual: int, length: int, places: Tensor) -> Tensor:
    """Places in flattened rows of `length` tokens as places in the same rows behind `virtual` positions."""
    return places + virtual * (1 + places // length)


def _input_shape(inputs: dict[str, Any]) -> torch.Size:
    if isinstance(inputs.get("input_ids"), Tensor):
        return inputs["input_ids"].shape
    raise ValueError("rows was given without input_ids: give hidden_shape, the [B, T] of what the head is given")


def _one_set(logits: Tensor, request: Request) -> Tensor:
    """One set of placeholders, of as many as there are ranks where the outputs of a head in slices are gathered."""
    if logits.shape[-1] not in (len(PLACEHOLDERS), request.copies * len(PLACEHOLDERS)):
        raise RuntimeError(
            f"the model's logits have {logits.shape[-1]} columns where the head returned {len(PLACEHOLDERS)}: "
            "something else computed or joined them"
        )
    return logits[..., : len(PLACEHOLDERS)]


def _check_placeholders(logits: Tensor, request: Request) -> None:
    """The placeholders must arrive as the transform has them; one row is looked at."""
    check_shape(logits.shape[:-1], request.hidden_shape)
    seen = logits.detach().reshape(-1, len(PLACEHOLDERS))[:1].to(torch.float32)
    expected = request.transform(placeholder_values(seen, torch.float32)).expand_as(seen)
    right = torch.isclose(seen, expected, rtol=16 * torch.finfo(logits.dtype).eps, atol=1e-3).all()
    message = (
        f"the model treats its logits otherwise than on the first batch ({request.transform}): "
        f"{PLACEHOLDERS} came out wrong"
    )
    if seen.is_cuda:
        torch._assert_async(right, message)  # no wait for the device
    elif not bool(right):
        raise RuntimeError(f"{message}: {seen[0].tolist()}")


_said_tied: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


def _say_if_tied(model: nn.Module, head: nn.Linear) -> None:
    embeddings = getattr(bare_model(model), "get_input_embeddings", lambda: None)()
    weight = getattr(embeddings, "weight", None)
    if weight is None or weight is not head.weight or not weight.requires_grad:
        return
    # Where everything trains this was to be expected; where something is frozen it may go unnoticed.
    everything_trains = all(parameter.requires_grad for parameter in model.parameters())
    level = logging.INFO if everything_trains else logging.WARNING
    if level > _said_tied.get(head, 0):
        _said_tied[head] = level
        logger.log(
            level,
            "the head is tied to the input embeddings and trains with them: 4 units of work instead of 2. "
            "Freeze the embeddings to spare it",
        )
