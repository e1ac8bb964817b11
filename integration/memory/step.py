"""One training step of the real architecture on fake tensors, and its timeline.

The model's own forward runs, adapters, checkpoints and autocast included, with attention as the device would have it
(`attention`). Its head is replaced by one that answers with a few columns and sends gradients of the right size back:
head and loss are arithmetic (`footprint`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import masking_utils

from ..head.patch import find_head
from ..packing.attention import stand_in_mask, use_packed_attention
from ..packing.layout import pack_pairs
from .architecture import CannotRun, Weights, built, depth_of, kinds_of, layers_of, prepared_config, weights_of
from .attention import attention_as_run
from .live import LiveBytes
from .run import Run
from .timeline import Timeline

_GPU_GRANULE = 512  # bytes that CUDA's caching allocator rounds to
_COLUMNS = 7  # as many as the attached head answers with


class _Head(torch.autograd.Function):
    """Hidden states [..., D], weight [V, D] -> [..., 7]; gradients of both, without a product.

    keep: takes the weight's gradient where that is not to go on (see `Rehearsal._answer`).
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, keep: Callable[[Tensor], None] | None) -> Tensor:
        ctx.like = (hidden.shape, hidden.dtype, weight.shape, weight.dtype)
        ctx.keep = keep
        return hidden.new_zeros(*hidden.shape[:-1], _COLUMNS)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        shape, dtype, weight_shape, weight_dtype = ctx.like
        wants_hidden, wants_weight, _ = ctx.needs_input_grad
        hidden_gradient = grad.new_empty(shape, dtype=dtype) if wants_hidden else None
        weight_gradient = None
        if wants_weight or ctx.keep is not None:
            weight_gradient = grad.new_empty(weight_shape, dtype=weight_dtype)
        if ctx.keep is not None:
            ctx.keep(weight_gradient)
            weight_gradient = None
        return hidden_gradient, weight_gradient, None


class Rehearsal:
    """A run's model, built once; `timeline` rehearses a step of any batch.

    weights: of the full model. head: its weight's [V, D] and dtype, and whether it trains.

    Raises CannotRun for an architecture that cannot be run on fake tensors.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._mode = FakeTensorMode()
        try:
            with warnings.catch_warnings(action="ignore"):
                config = prepared_config(run)
                self.depth = depth_of(kinds_of(config, run.trains))
                self.model = built(run, config, self.depth, self._mode)
        except CannotRun:
            raise
        except Exception as error:
            raise _refused(run, error) from error
        self.weights: Weights = weights_of(self.model, self.depth)
        head = find_head(self.model)
        self.vocab_size, self.hidden_size = head.weight.shape
        self.trains_head = head.weight.requires_grad
        embeddings = self.model.get_input_embeddings()  # type: ignore[operator]
        self._head, self._is_tied = head, getattr(embeddings, "weight", None) is head.weight
        self._kept: list[Tensor] = []
        self._tracker: LiveBytes | None = None
        self._in_backward = False
        self._watch()
        self._timelines: dict[tuple[int, int], Timeline] = {}

    def timeline(self, pairs: int, length: int) -> Timeline:
        """Of a step of B=`pairs` pairs of rows of T=`length` tokens."""
        if (pairs, length) not in self._timelines:
            try:
                self._timelines[pairs, length] = self._rehearse(pairs, length)
            except (CannotRun, torch.OutOfMemoryError):
                raise
            except Exception as error:
                raise _refused(self.run, error) from error
        return self._timelines[pairs, length]

    def _watch(self) -> None:
        """Marks at every layer's input, there and back; the head's stand-in."""
        for index, layer in enumerate(layers_of(self.model, self.depth.layers)):
            layer.register_forward_pre_hook(partial(self._at_input, index), with_kwargs=True)
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._at_gradient)
        self._head.forward = self._answer  # type: ignore[method-assign, assignment]

    def _at_input(self, index: int, layer: nn.Module, args: Any, kwargs: Any) -> None:
        if self._in_backward or self._tracker is None:  # a checkpointed layer, computed again
            return
        self._tracker.mark(f"layer {index - 1}" if index else "before")
        hidden = args[0] if args else kwargs.get("hidden_states")
        if isinstance(hidden, Tensor) and hidden.requires_grad:
            hidden.register_hook(lambda grad, name=f"layer {index}": self._mark(name))

    def _mark(self, name: str) -> None:
        assert self._tracker is not None
        self._tracker.mark(name)

    def _answer(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The head's stand-in.

        A tied weight has two gradients, its head's and its embeddings'. Autograd adds the second to the first in place,
        but makes a third of fake ones. So the first waits here, as long as it would.
        """
        weight: Any = self._head.weight
        if self._is_tied and weight.requires_grad:
            return _Head.apply(hidden, weight.detach(), self._kept.append)
        return _Head.apply(hidden, weight, None)

    def _at_gradient(self, parameter: Tensor) -> None:
        if parameter is self._head.weight:
            self._kept.clear()
        if self._tracker is not None:
            self._tracker.kept_as_gradient(parameter)

    def _rehearse(self, pairs: int, length: int) -> Timeline:
        run = self.run
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings(action="ignore"))
            stack.enter_context(self._mode)
            inputs = self._inputs(pairs, length)
            known = [*self.model.parameters(), *self.model.buffers()]
            known += [x for x in inputs.values() if isinstance(x, Tensor)]
            self._tracker = tracker = LiveBytes(known, _GPU_GRANULE if run.device == "cuda" else 1)
            stack.callback(setattr, self, "_tracker", None)
            stack.callback(self.model.zero_grad)
            stack.callback(self._kept.clear)
            # It would read positions, to see whether a row without a mask holds several sequences: none does.
            stack.enter_context(mock.patch.object(masking_utils, "find_packed_sequence_indices", return_value=None))
            stack.enter_context(attention_as_run(run.device))
            stack.enter_context(tracker)
            autocast = torch.autocast("cpu", dtype=run.dtype if run.casts else None, enabled=run.casts)
            with autocast:
                loss = self.model(**inputs, use_cache=False).logits.sum()
                tracker.mark(f"layer {self.depth.layers - 1}")
                releasing = stack.enter_context(ExitStack())
                released = releasing.enter_context(tracker.releasing())
            releasing.close()
            forward, tracker.segments = tracker.segments, []
            self._in_backward = True
            stack.callback(setattr, self, "_in_backward", False)
            loss.backward()
            del loss
            tracker.mark("before")
            short = Timeline(tuple(forward), tuple(released), tuple(tracker.segments))
        return short.extended(self.depth.first, self.depth.period, self.depth.repeats)

    def _inputs(self, pairs: int, length: int) -> dict[str, Any]:
        layout = self.run.layout
        if layout in ("padded", "equal"):
            ids = torch.zeros(2 * pairs, length, dtype=torch.int64)
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids) if layout == "padded" else None}
        prompt = min(round(2 * self.run.ignored * length), length - 2)
        pair: Any = {
            f"{side}_{name}": value
            for side, first in (("chosen", 1), ("rejected", 2))
            for name, value in (
                ("input_ids", [0] * prompt + [first] * (length - prompt)),
                ("prompt_length", prompt),
            )
        }
        with unset_fake_temporarily():
            batch = pack_pairs([pair] * pairs, layout == "shared")
        use_packed_attention(self.model)
        shape = batch["input_ids"].shape
        return {
            "input_ids": torch.zeros(shape, dtype=torch.int64),
            "position_ids": torch.zeros(shape, dtype=torch.int64),
            "attention_mask": stand_in_mask(),
            "segments": batch["layout"].segments,
        }


def _refused(run: Run, error: Exception) -> CannotRun:
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    kind = type(run.config).__name__
    return CannotRun(
        f"{run.name} ({kind}) cannot be run on fake tensors: {type(error).__name__}: {first[:200]}. Accepted are "
        "causal language models of transformers whose forward reads no numbers; --head-only answers for the head alone"
    )
