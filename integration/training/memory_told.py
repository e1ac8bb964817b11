"""A training run's memory, told by the trainers: an estimate before the first step, and beside an out-of-memory.

The estimate (`memory`) needs the model's configuration and takes a second or two, so it is on where there is a GPU to
fill. Where it cannot be made, for an architecture that does not run on fake tensors, nothing is said; a run never
fails for it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from orpo_kernels.plan import MIB, Plan

from ..data.dataset import announce

if TYPE_CHECKING:
    from ..memory.footprint import Footprint
    from ..memory.run import Run

logger = logging.getLogger("orpo_kernels")
_GIB = 1 << 30
_ROWS = 100_000  # as many of a data set's are looked at for the longest


class MemoryTold:
    """What a trainer says of memory; mixed into one of transformers'."""

    args: Any
    model: Any
    train_dataset: Any
    data_collator: Any
    accelerator: Any

    def train(self, *args: Any, **options: Any) -> Any:
        if self.args.device.type == "cuda" and self.model is not None:
            held = torch.cuda.memory_allocated(self.args.device)
            # What torch holds and does not use is free too.
            free = torch.cuda.mem_get_info(self.args.device)[0] + torch.cuda.memory_reserved(self.args.device) - held
            self._tell_memory(free, held)
        return super().train(*args, **options)  # type: ignore[misc]

    def training_step(self, *args: Any, **options: Any) -> Any:
        try:
            return super().training_step(*args, **options)  # type: ignore[misc]
        except torch.OutOfMemoryError as error:
            if self.args.auto_find_batch_size:  # it is caught, and another size tried
                raise
            # The first words stay: libraries know an out-of-memory by them.
            raise torch.OutOfMemoryError(f"{error}\n{self._advice(error.__traceback__)}") from error

    def _tell_memory(self, free: int, held: int = 0) -> None:
        """free: bytes that can still be allocated; held: those that are, the model's weights, if it is there."""
        found = self._footprint()
        if found is None:
            return
        announce(f"memory: {_said(found)}", self.args)
        needed = found.ours.total - min(held, found.ours.weights)
        if needed > free and self.args.should_log:
            logger.warning(
                "the run will need %s more at its peak and %s are free: `orpo-kernels estimate` says what fits. %s",
                _size(needed),
                _size(free),
                self._change(found.run, free + min(held, found.ours.weights)),
            )

    def _advice(self, trace: TracebackType | None) -> str:
        where = "in the log-probabilities of the scored tokens" if _in_our_loss(trace) else "in the model"
        lines = [f"This was {where}, in a training step of orpo_kernels."]
        found = self._footprint()
        budget = None
        if self.args.device.type == "cuda":
            budget = torch.cuda.get_device_properties(self.args.device).total_memory
        run = None if found is None else found.run
        if found is not None:
            lines.append(f"Estimated: {_said(found)}.")
        lines.append(self._change(run, budget))
        if _in_our_loss(trace):
            plan = (run.plan if run is not None else None) or Plan()
            lines.append(
                f"The loss itself takes what its plan allows ({plan.budget(self.args.device) / MIB:.0f} MiB of "
                "scratch): a smaller scratch_bytes (Plan) takes less, in more and smaller products."
            )
        return "\n".join(lines)

    def _change(self, run: Run | None, budget: int | None) -> str:
        """The cheapest change after which the run fits, or the cheapest of all where none is known to do."""
        if run is None:
            return "Change per_device_train_batch_size, max_length or gradient_checkpointing=True."
        from ..memory.answers import changes_of, tried

        first = ""
        for name, argument, costs, fields in changes_of(run):
            change = tried(name, argument, costs, _with(run, fields))
            if change.result is None:
                continue
            total = change.result.ours.total
            said = f"Change {argument}: about {_size(total)} in all; it costs {costs}."
            if budget is None or total <= budget:
                return said
            first = first or said
        return first or "Change max_length."

    def _footprint(self) -> Footprint | None:
        """The estimate of this run; None where it cannot be made."""
        try:
            from ..memory.footprint import footprint

            return footprint(self._memory_run())
        except Exception as error:  # of any library: an estimate is no reason to stop
            logger.info("no estimate of the run's memory: %s", error)
            return None

    def _memory_run(self) -> Run:
        """This run, its longest rows in one batch."""
        from ..memory.run import Run

        args, model = self.args, self.accelerator.unwrap_model(self.model)
        half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        peft_config = next(iter(getattr(model, "peft_config", {}).values()), None)
        length, prompt = self._longest(args.per_device_train_batch_size)
        flash = "flash" in str(model.config._attn_implementation)
        layout: Any = getattr(self.data_collator, "name", getattr(self, "layout", "padded"))
        trained = frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
        everything = peft_config is not None or len(trained) == sum(1 for _ in model.parameters())
        return Run(
            model.config,
            type(model).__name__ if peft_config is None else type(model.get_base_model()).__name__,
            pairs=args.per_device_train_batch_size,
            length=length,
            layout="equal" if layout == "padded" and flash else layout,
            ignored=prompt / (2 * length),
            weights_dtype=model.dtype,
            dtype=half or model.dtype,
            autocast=half is not None,
            peft=peft_config,
            four_bit=bool(getattr(model, "is_loaded_in_4bit", False)),
            trains=None if everything else trained,
            optim=str(getattr(args.optim, "value", args.optim)),
            accumulates=args.gradient_accumulation_steps > 1,
            checkpointing=args.gradient_checkpointing or getattr(args, "activation_checkpointing", False),
            device="cpu" if args.device.type == "cpu" else "cuda",
            plan=getattr(args, "plan", None) or getattr(self, "plan", None) or Plan(),
            **self._sharding(),
        )

    def _sharding(self) -> dict[str, Any]:
        stage = 0
        if getattr(self, "is_fsdp_enabled", False):
            stage = 3
        elif getattr(self, "is_deepspeed_enabled", False):
            stage = int(self.accelerator.state.deepspeed_plugin.zero_stage)
        names = {1: "optimizer", 2: "gradients", 3: "weights"}
        return {"sharded": names[stage], "shards": self.args.world_size} if stage else {}

    def _longest(self, pairs: int) -> tuple[int, int]:
        """(tokens of the longest row, prompt tokens of the `pairs` longest in the mean)."""
        rows = self.train_dataset
        limit = getattr(self.args, "max_length", None) or 1024
        if not hasattr(rows, "__len__") or not len(rows) or not isinstance(rows[0], Mapping):
            return limit, 0
        names = ("length", "chosen_prompt_length")
        if any(name not in rows[0] for name in names):
            return limit, 0
        some = range(min(len(rows), _ROWS))
        if hasattr(rows, "select_columns"):
            columns = rows.select_columns(list(names)).select(some)[:]
            found = list(zip(*(columns[name] for name in names), strict=True))
        else:
            found = [tuple(rows[index][name] for name in names) for index in some]
        longest = sorted(found, reverse=True)[:pairs]
        return max(2, longest[0][0]), sum(prompt for _, prompt in longest) // len(longest)


def _with(run: Run, fields: dict[str, Any]) -> Run:
    from dataclasses import replace

    # What is written out by name is of the weights, which adapters leave alone.
    return replace(run, **(fields | {"trains": None} if "peft" in fields else fields))


def _said(found: Footprint) -> str:
    peak = found.ours
    parts = {name: getattr(peak, name) for name in ("weights", "gradients", "optimizer", "activations", "loss")}
    listed = ", ".join(f"{name} {_size(size)}" for name, size in parts.items() if size)
    return (
        f"about {_size(peak.total)} at the peak of a step with the longest rows ({found.run.pairs} x "
        f"{found.run.length} tokens a side): {listed}; with full logits {_size(found.full.total)}"
    )


def _size(nbytes: int) -> str:
    return f"{nbytes / _GIB:,.1f} GiB" if nbytes >= _GIB else f"{nbytes / MIB:,.0f} MiB"


def _in_our_loss(trace: TracebackType | None) -> bool:
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__", "").startswith(("orpo_kernels.autograd", "orpo_kernels.kernels")):
            return True
        trace = trace.tb_next
    return False
