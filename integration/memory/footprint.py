"""A run's peak, for our loss and for full logits.

What is held all the time, weights and optimiser state, comes from counting. On top of it memory rises to one of

    forward     the backbone's, at its highest
    loss        when the backbone is done: all activations, and head and loss
    backward    the backbone's, at its highest: activations go as gradients come
    optimizer   all gradients, and what a step of the optimiser makes

The loss takes what `estimate.estimate_call` says of the head's size; forward, backward and optimiser are the same for
both losses. Where weights are sharded, each rank holds its part, and whole: what lies outside the layers, and two
layers (the next is fetched while one computes), with their gradients in the backward. A rank of tensor parallelism has
its part of heads, MLPs and vocabulary; norms and hidden states are whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from orpo_kernels.estimate import Estimate, HeadSize, estimate_call
from orpo_kernels.plan import CPU_LIBRARY_BYTES

from .architecture import text_config
from .optimizers import state_bytes, step_bytes
from .run import Run
from .step import Rehearsal
from .timeline import Moment

PARTS = ("weights", "gradients", "optimizer", "activations", "loss")
LOSSES = ("ours", "full")


@dataclass(frozen=True)
class Peak:
    """Bytes at a run's highest moment. when: "forward", "loss", "backward" or "optimizer"."""

    when: str
    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int

    @property
    def total(self) -> int:
        return sum(getattr(self, part) for part in PARTS)

    def as_dict(self) -> dict[str, Any]:
        return {"when": self.when, "bytes": self.total, **{part: getattr(self, part) for part in PARTS}}


class Footprint(NamedTuple):
    """run; the peak with our loss and with full logits; what the head and the loss take."""

    run: Run
    ours: Peak
    full: Peak
    head: Estimate


def footprint(run: Run, rehearsal: Rehearsal | None = None) -> Footprint:
    """rehearsal: of the same model, method and layout, to be used again for other batches.

    Raises CannotRun where the architecture cannot be rehearsed, and ValueError for a scratch that holds no tile.
    """
    rehearsal = Rehearsal(run) if rehearsal is None else rehearsal
    timeline = rehearsal.timeline(run.pairs, run.length)
    setting = "trained head" if rehearsal.trains_head else "frozen head"
    softcap = getattr(text_config(run.config), "final_logit_softcapping", None)
    head = HeadSize(rehearsal.hidden_size, -(-rehearsal.vocab_size // run.tp), softcap, run.weights_dtype)
    found = estimate_call(head, setting, run.positions, run.scored, dtype=run.dtype, device=run.device, plan=run.plan)
    shares = _Shares.of(run, rehearsal)
    moments = timeline.peaks()
    at_loss = timeline.at_loss()
    _, live, gradients = timeline.end()
    made = step_bytes(run.optim, rehearsal.weights.training, run.device) // shares.optimizer
    moments.append(Moment("optimizer", live + made, gradients))

    # Its packed operands, which the scratch of our loss counts in.
    library = CPU_LIBRARY_BYTES if run.device == "cpu" else 0
    moments = [moment._replace(live=moment.live + library) for moment in moments]

    def peak(loss: int, weight_gradient: int) -> Peak:
        held = Moment("loss", at_loss.live + weight_gradient, at_loss.gradients + weight_gradient)
        found = [shares.peak(moment, 0) for moment in moments] + [shares.peak(held, loss)]
        return max(found, key=lambda one: one.total)

    return Footprint(run, peak(*_ours(run, found, head)), peak(found.full_bytes + library, 0), found)


def _ours(run: Run, found: Estimate, head: HeadSize) -> tuple[int, int]:
    """(bytes of head and loss, of the gradient of the head's weight) when the loss is at its highest."""
    schedule, weight_gradient = found.schedule, _weight_gradient(run, found, head)
    hidden_gradient = run.dtype.itemsize * head.hidden_size * run.positions
    # Of one sequence, for the mean logit that trainers report.
    wide_hidden = 4 * head.hidden_size * run.length if run.dtype.itemsize < 4 else 0
    forward = schedule.saved_bytes + max(schedule.scratch_bytes, wide_hidden)
    # A frozen head's backward scales what was saved in pieces of an eighth of the budget (`autograd.hidden_gradient`).
    piece = schedule.scratch_bytes if weight_gradient else schedule.scratch_bytes // 8
    backward = schedule.saved_bytes + hidden_gradient + piece
    loss = schedule.weight_copy_bytes + (backward if weight_gradient else max(forward, backward))
    return loss, weight_gradient


def _weight_gradient(run: Run, found: Estimate, head: HeadSize) -> int:
    return run.weights_dtype.itemsize * head.hidden_size * head.vocab_size if "trained" in found.setting else 0


@dataclass(frozen=True)
class _Shares:
    """What this rank holds, and whole beside it; divisors of what is spread."""

    held: int
    state: int
    all_gradients: int
    whole_weights: int
    whole_gradients: int
    weights: int
    gradients: int
    optimizer: int
    accumulates: bool

    @classmethod
    def of(cls, run: Run, rehearsal: Rehearsal) -> _Shares:
        weights = rehearsal.weights
        spread = {"nothing": 0, "optimizer": 1, "gradients": 2, "weights": 3}[run.sharded]
        by = [run.shards if spread >= stage else 1 for stage in (3, 2, 1)]
        gradients = sum(w.layers * w.numbers * w.itemsize for w in weights.training)
        # Of what is whole for a while, one part is this rank's own.
        whole = min(weights.root + 2 * weights.layer, weights.held) * (by[0] - 1) // by[0]
        whole_gradients = min(weights.root + weights.layer, weights.held) * (by[1] - 1) // by[1]
        return cls(
            weights.held // by[0],
            state_bytes(run.optim, weights.training) // by[2],
            gradients // by[1],
            whole,
            int(whole_gradients * gradients / max(weights.held, 1)),
            by[0],
            by[1],
            by[2],
            run.accumulates,
        )

    def peak(self, moment: Moment, loss: int) -> Peak:
        in_step = moment.when != "optimizer"
        gradients = moment.gradients // self.gradients
        if self.gradients > 1 and moment.gradients and in_step:
            gradients += self.whole_gradients
        if self.accumulates:
            gradients = max(self.all_gradients, gradients)
        return Peak(
            moment.when,
            self.held + (self.whole_weights if in_step else 0),
            gradients,
            self.state,
            moment.live - moment.gradients,
            loss,
        )
