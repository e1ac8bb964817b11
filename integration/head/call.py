"""One call of a model's head, answered with log-probabilities.

    head, requested:   logps = linear_logps(hidden, weight, targets)      kept in the request
                       placeholders, logps = fork(placeholders, logps)    placeholders [..., 7]: known numbers
                       return placeholders                                in the place of the logits
    after the model:   logps = join(outputs.logits, logps)                sends zeros back through the logits

Fork and join make one path of the two. Hooks on module outputs (FSDP, ZeRO, DDP) fire in the backward only if
a gradient arrives at the model's output; fork's backward needs both gradients, so it, and with it the head's,
cannot run before those hooks. The values of `logits` carry no numbers of ours: soft-caps and output casts would
change them. They carry seven known ones (`logit_transform.PLACEHOLDERS`). Seven columns rather than one, because one
would broadcast against a bias or an adapter's output without an error. An entropy with a gradient goes the same way
beside logps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from orpo_kernels.autograd import HeadOptions
from orpo_kernels.kernels.statistics import NO_STATISTICS, Statistics
from orpo_kernels.linear_logps import head_options
from orpo_kernels.linear_token_stats import TokenStats, at_temperature, scored_token_stats
from orpo_kernels.plan import Plan
from orpo_kernels.tokens import ScoredTokens
from orpo_kernels.vocab_parallel import scored_slice_logps
from orpo_kernels.vocab_slice import VocabSlice, is_dtensor

from .logit_transform import PLACEHOLDERS, Transform, placeholder_values
from .lora import LowRank, Step, join_adapters, low_rank_steps
from .patch import plain_forward
from .sharded import as_output, gathered, head_tensors, own_adapter


class SequenceScores(NamedTuple):
    """What `ModelLogps.sequence_scores` gives."""

    logps: Tensor
    mean_logits: Tensor | None
    outputs: Any


@dataclass(eq=False)
class Request:
    """What is asked of the head, and what it answered.

    targets: int64, any shape. rows: the flattened hidden row that predicts each, None where they correspond.
    scored: the scored tokens among them. hidden_shape: that of the hidden states without their last size.
    mean_logits_over: see `ModelLogps.sequence_scores`; wanted, temperature: see `ModelLogps.token_stats`.
    in_fp32: see `ModelLogps`.
    only_placeholders: score nothing; answered: it has returned them. copies: of them side by side, where the head's
    output is gathered. adapters: what each layer of an adapted head has added; steps: those layers, from the last to
    the one being called.
    """

    targets: Tensor
    rows: Tensor | None
    ignore_index: int
    scored: ScoredTokens
    hidden_shape: torch.Size
    transform: Transform
    plan: Plan | None
    mean_logits_over: Tensor | Sequence[Tensor] | None
    wanted: Statistics = NO_STATISTICS
    temperature: float = 1.0
    in_fp32: bool = False
    only_placeholders: bool = False
    calls: int = 0
    answered: bool = False
    copies: int = 1
    answer: TokenStats | None = None
    mean_logits: Tensor | None = None
    steps: list[Step] = field(default_factory=list, init=False)
    adapters: list[LowRank] = field(default_factory=list, init=False)

    def serve(self, layer: nn.Module, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The placeholders [..., 7] in the place of layer(input): the head, a LoRA layer around it, or one of its B."""
        if not isinstance(layer, nn.Linear):
            self.steps = low_rank_steps(layer, input)
            if not self.steps:
                return plain_forward(layer, input, *args, **kwargs)
        elif len(self.steps) > 1:
            scale = self.steps.pop().scale
            self.adapters.append(LowRank(gathered(input), layer.weight, layer.bias, scale))
        else:
            return self._answer(layer, input)
        step = self.steps[-1]
        inner = step.layer(step.input)
        if not is_dtensor(input):
            return inner
        # What follows this layer takes its output for that of the layer itself, as what follows the head does.
        return self._output(gathered(inner)[..., : len(PLACEHOLDERS)], layer, input)

    def _answer(self, head: nn.Linear, input: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 1:
            raise RuntimeError(
                "the model called its head twice in one forward (multi-token prediction?): only a head that is "
                "called once can stand in for the logits"
            )
        hidden, weight, bias, part = head_tensors(head, input)
        if self.in_fp32:
            hidden, weight = _at_least_fp32(hidden), _at_least_fp32(weight)
            bias = None if bias is None else _at_least_fp32(bias)
        if self.rows is None:
            check_shape(hidden.shape[:-1], self.targets.shape)
        elif not torch.compiler.is_compiling():
            # In a graph the numbers in hidden_shape would be constants; there, the placeholders' shape tells later.
            check_shape(hidden.shape[:-1], self.hidden_shape)
        if self.only_placeholders:
            # fp64 where there is one: a scale or a cap then comes out as exactly as the model's arithmetic allows.
            wide = torch.float64 if hidden.device.type in ("cpu", "cuda") else torch.float32
            self.answered = True
            return self._output(_placeholders(hidden, wide), head, input)
        scale, softcap = self.transform
        joined, bias, adapter = join_adapters(hidden, bias, [own_adapter(adapter, part) for adapter in self.adapters])
        device = hidden.device.type
        with torch.autocast(device, enabled=torch.is_autocast_enabled(device) and not self.in_fp32):
            answer = self._score(joined, weight, bias, adapter, part)
        if self.mean_logits_over is not None and softcap is None:
            self.mean_logits = _mean_logits(joined, weight, bias, adapter, scale, self.mean_logits_over, part)
        placeholders, self.answer = _through(_Fork, _placeholders(hidden, answer.logps.dtype), answer, self.wanted)
        return self._output(placeholders, head, input)

    def _output(self, placeholders: Tensor, layer: nn.Module, input: Any) -> Tensor:
        output, self.copies = as_output(placeholders, layer, input)
        return output

    def _score(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, adapter: Tensor | None, part: VocabSlice | None
    ) -> TokenStats:
        scale, softcap = self.transform
        options = head_options(
            hidden,
            weight,
            bias=bias,
            logit_scale=scale,
            softcap=softcap,
            plan=self.plan,
            adapter=adapter,
            is_slice=part is not None,
        )
        options = at_temperature(options, self.temperature)
        if part is None and torch.compiler.is_compiling() and not self.wanted.asked:
            # How many tokens are scored is data: the operator selects them itself, so that one graph serves all.
            from orpo_kernels.compiled import compiled_linear_logps

            targets = self.targets.to(hidden.device)
            rows = None if self.rows is None else self.rows.to(hidden.device)
            return TokenStats(
                compiled_linear_logps(hidden, weight, bias, targets, rows, self.ignore_index, options, adapter)
            )
        return self._score_eagerly(hidden, weight, bias, adapter, options, part)

    @torch.compiler.disable  # the compiled operator gives log-probabilities alone
    def _score_eagerly(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        adapter: Tensor | None,
        options: HeadOptions,
        part: VocabSlice | None,
    ) -> TokenStats:
        scored = self.scored
        if scored.targets.device != hidden.device:
            scored = tree_map_only(Tensor, lambda tensor: tensor.to(hidden.device), scored)
        if part is not None:
            if self.wanted.asked:
                raise RuntimeError(
                    f"the head is cut over {part.ranks} ranks, where there are log-probabilities only: ask for no "
                    "statistics, or leave the head whole (without tensor parallelism)"
                )
            shape = self.targets.shape
            return TokenStats(scored_slice_logps(hidden, weight, bias, scored, shape, options, part, adapter))
        return scored_token_stats(hidden, weight, bias, scored, self.targets.shape, options, adapter, self.wanted)


# The request in force. Kept in the module rather than on the model: a compiled model must not specialise on it.
_request: Request | None = None


# Named as what it stands in for: a pickled model looks its head's forward up by this name.
def forward(self: nn.Module, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What an attached head does: answer the request in force, or its own product."""
    if _request is None:
        return plain_forward(self, input, *args, **kwargs)
    return _request.serve(self, input, *args, **kwargs)


def run(model: Callable[..., Any], request: Request, inputs: dict[str, Any]) -> Any:
    """The model's outputs with `request` in force; RuntimeError if its head did not answer it."""
    global _request
    if _request is not None:
        raise RuntimeError("a model was asked for log-probabilities inside another such call: finish that one first")
    _request = request
    try:
        outputs = model(**inputs)
    except (RuntimeError, IndexError) as error:
        if request.answered and request.calls == 1:
            raise RuntimeError(
                f"the forward of {_name(model)} does something to its logits after the head that needs a "
                f"column for each entry of the vocabulary; it found {len(PLACEHOLDERS)} placeholders and said: {error}"
            ) from error
        raise
    finally:
        _request = None
    if request.calls == 0:
        raise RuntimeError(
            f"the forward of {_name(model)} did not call the attached head: something computed the logits "
            "by another way (another library's fused loss, a replaced head). Remove that, or attach again"
        )
    if not isinstance(getattr(outputs, "logits", None), Tensor):
        raise RuntimeError(
            f"the forward of {_name(model)} returned a {type(outputs).__name__} without logits: leave "
            "return_dict at its default"
        )
    return outputs


def _name(model: Any) -> str:
    """Of a model, or of that whose method is called in its place."""
    return type(getattr(model, "__self__", model)).__name__


def join(logits: Tensor, answer: TokenStats, wanted: Statistics) -> TokenStats:
    """The answer on the device of logits; logits get a gradient of zeros."""
    device = logits.device
    _, joined = _through(_Join, logits, answer, wanted)
    return joined.map(lambda x: x.to(device))


def _through(
    function: type[torch.autograd.Function], logits: Tensor, answer: TokenStats, wanted: Statistics
) -> tuple[Tensor, TokenStats]:
    """_Fork or _Join of what has a gradient in the answer."""
    logps, entropy, *others = answer
    if wanted.entropy_grad:
        logits, logps, entropy = function.apply(logits, logps, entropy)
    else:
        logits, logps = function.apply(logits, logps)
    # What _replace makes, torch 2.11 cannot carry out of a compiled graph.
    return logits, TokenStats(logps, entropy, *others)


def check_shape(seen: torch.Size, expected: torch.Size) -> None:
    if seen != expected:
        raise RuntimeError(
            f"the head was given hidden states [{', '.join(map(str, seen))}, D] where targets call for "
            f"[{', '.join(map(str, expected))}, D]: do not pass logits_to_keep, and give targets one entry for "
            "every input token (or rows and hidden_shape)"
        )


class _Fork(torch.autograd.Function):
    """(placeholders, values) -> the same; the values' gradients wait for the placeholders', which is dropped."""

    @staticmethod
    def forward(ctx: Any, placeholders: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        return placeholders.clone(), *(value.clone() for value in values)

    @staticmethod
    def backward(ctx: Any, grad_placeholders: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *grads


class _Join(torch.autograd.Function):
    """(logits, values) -> the same, the values on the device of the logits, whose gradient is zero."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, *values: Tensor) -> tuple[Tensor | None, ...]:
        ctx.device = values[0].device
        ctx.like = (logits.shape, logits.dtype, logits.device)
        return None, *(value.to(logits.device, copy=True) for value in values)

    @staticmethod
    def backward(ctx: Any, grad_logits: None, *grads: Tensor) -> tuple[Tensor, ...]:
        shape, dtype, device = ctx.like
        return torch.zeros(shape, dtype=dtype, device=device), *(grad.to(ctx.device) for grad in grads)


def _placeholders(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    return placeholder_values(hidden, dtype).repeat(*hidden.shape[:-1], 1)


def _at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _mean_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapter: Tensor | None,
    scale: float,
    over: Tensor | Sequence[Tensor],
    part: VocabSlice | None = None,
) -> Tensor:
    """Each of S sequences' mean logit over its positions `over` and the vocabulary: [S], no gradient.

    The mean of a linear map is the map of the mean: mean_t(h_t) . mean_v(W_v) + mean(b). In fp32, or fp64 for fp64
    hidden states. part: which rows these are, each rank's giving its share of the mean.
    """
    rows = weight.shape[0] if part is None else part.vocab_size
    wide = torch.promote_types(hidden.dtype, torch.float32)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        columns = [weight] if adapter is None else [weight, adapter]
        mean = _mean_hidden(hidden, over, wide) @ torch.cat([block.sum(0, dtype=wide) for block in columns]) / rows
        if bias is not None:
            mean = mean + bias.sum(dtype=wide) / rows
        if part is not None:
            torch.distributed.all_reduce(mean, group=part.group)
        return mean * scale


def _mean_hidden(hidden: Tensor, over: Tensor | Sequence[Tensor], wide: torch.dtype) -> Tensor:
    """[S, D]: the mean over a mask [S, T], or over each sequence's flattened positions; 0 where there are none.

    A sequence at a time, so that no wide copy of all hidden states is made.
    """
    if isinstance(over, Tensor):
        weights = over.to(hidden.device, wide)
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1)
        return torch.stack([w @ h.to(wide) for w, h in zip(weights, hidden, strict=True)])
    flat = hidden.flatten(0, -2)
    sums = [flat[places.to(flat.device)].sum(0, dtype=wide) for places in over]
    return torch.stack([total / max(len(places), 1) for total, places in zip(sums, over, strict=True)])
