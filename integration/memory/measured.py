"""A real step, measured in a process of its own, beside its estimate.

The model has random weights. What has to be loaded once is, by a step of a few tokens, before the watch starts; a
second such step makes the optimiser's state; then comes the step in question. Growth is the resident set's on a CPU
(large blocks go back to the system when they are freed, see `ENVIRONMENT`) and the allocator's on a GPU, both to their
peak: gradients, optimiser state, activations and loss, not the weights.
"""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from orpo_kernels.bench.meter import watch_memory
from orpo_kernels.objective import orpo_objective_flat

from ..batches import FlatBatch
from ..lm_head import attach
from ..packing.attention import use_packed_attention
from ..packing.gate import model_inputs, on_device
from ..packing.layout import pack_pairs, pad_pairs, sequence_places
from .architecture import quiet, text_config
from .configurations import config_of
from .footprint import Footprint, footprint
from .run import Run

# glibc keeps what was freed in small blocks, and raises the bar between small and large ones as it goes.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "8192", "MALLOC_TRIM_THRESHOLD_": "8192", "MALLOC_ARENA_MAX": "1"}
_FEW = 16
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def run_of(specification: dict[str, Any]) -> Run:
    """specification: model (a name or a configuration as a dict), loss ("ours" or "full"), lora_r (0: all weights
    train), and fields of `Run` by their names, dtypes as text."""
    fields = {key: value for key, value in specification.items() if key not in ("model", "loss", "lora_r")}
    for name in ("dtype", "weights_dtype"):
        fields[name] = _DTYPES[fields.get(name, "float32")]
    if specification["lora_r"]:
        from peft import LoraConfig

        fields["peft"] = LoraConfig(r=specification["lora_r"], target_modules="all-linear", task_type="CAUSAL_LM")
    return Run(*config_of(specification["model"]), **fields)


def compare(specification: dict[str, Any], timeout: float = 900.0) -> dict[str, Any]:
    """{"measured", "estimated"} bytes beyond the weights, and the "peak" of the estimate, as `Peak.as_dict` has it.

    In a process of its own, started anew: the server of forks may run already, without `ENVIRONMENT`.
    """
    context = multiprocessing.get_context("spawn")
    with (
        mock.patch.dict(os.environ, ENVIRONMENT),
        ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool,
    ):
        return pool.submit(measure_specified, specification).result(timeout)


def measure_specified(specification: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(1)
    return measure(run_of(specification), specification["loss"])


def measure(run: Run, loss: str) -> dict[str, Any]:
    device = torch.device(run.device)
    model = _model(run)
    estimated = estimate(run, loss)
    step = _Step(model, run, loss)
    step(_batch(run, _FEW, device))
    step.forget()
    peak = watch_memory(device)
    step(_batch(run, _FEW, device), update=True)
    step(_batch(run, run.length, device), update=True)
    return {"measured": peak(), **estimated}


def estimate(run: Run, loss: str) -> dict[str, Any]:
    """{"estimated"} bytes beyond the weights, and the "peak" as `Peak.as_dict` has it."""
    found: Footprint = footprint(run)
    peak = getattr(found, loss)
    return {"estimated": peak.total - peak.weights, "peak": peak.as_dict()}


def _model(run: Run) -> nn.Module:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(run.device), quiet():
        model: Any = AutoModelForCausalLM.from_config(run.config, dtype=run.weights_dtype)
    model.tie_weights()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    if run.peft is not None:
        from peft import get_peft_model

        model = get_peft_model(model, run.peft)
    if run.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model.train()


def _batch(run: Run, length: int, device: torch.device) -> FlatBatch:
    """Pairs that share their prompt and nothing after it; padded ones are an eighth shorter on the rejected side."""
    vocab = text_config(run.config).vocab_size
    prompt = min(round(2 * run.ignored * length), length - 2)
    packs = run.layout in ("packed", "shared")
    pairs: list[Any] = []
    for index in range(run.pairs):
        random = torch.Generator().manual_seed(index)
        rejected_length = length - max(1, length // 8) if run.layout == "padded" else length
        start = torch.randint(vocab, (prompt,), generator=random).tolist()
        row: dict[str, Any] = {}
        for side, total, first in (("chosen", length, 3), ("rejected", rejected_length, 4)):
            rest = torch.randint(vocab, (total - prompt - 1,), generator=random).tolist()
            row |= {f"{side}_input_ids": [*start, first, *rest], f"{side}_prompt_length": prompt}
        pairs.append(row)
    if packs:
        return on_device(pack_pairs(pairs, run.layout == "shared"), device)
    return on_device(pad_pairs(pairs), device)


class _Step:
    def __init__(self, model: nn.Module, run: Run, loss: str) -> None:
        self.model, self.run, self.loss = model, run, loss
        self.ours = attach(model, run.plan) if loss == "ours" else None
        if run.layout in ("packed", "shared"):
            use_packed_attention(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        fused = {"fused": True} if run.optim == "adamw_torch_fused" else {}
        makers = {"adamw_torch": torch.optim.AdamW, "adamw_torch_fused": torch.optim.AdamW, "sgd": torch.optim.SGD}
        self.optimizer = makers[run.optim](trained, lr=1e-5, **fused)

    def __call__(self, batch: FlatBatch, update: bool = False) -> None:
        with torch.autocast(self.run.device, dtype=self.run.dtype if self.run.casts else None, enabled=self.run.casts):
            loss = self._ours(batch) if self.ours is not None else self._full(batch)
        loss.backward()
        if update:
            self.optimizer.step()
        self.forget()

    def forget(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def _ours(self, batch: FlatBatch) -> Tensor:
        assert self.ours is not None
        logps, *_ = self.ours.sequence_scores(
            batch["targets"],
            sequence_places(batch),
            rows=batch["rows"],
            use_cache=False,
            **model_inputs(batch),
        )
        pairs = batch["layout"].num_pairs
        return orpo_objective_flat(logps, batch["pair"], batch["kind"], num_pairs=pairs, beta=0.1, preset="trl").loss

    def _full(self, batch: FlatBatch) -> Tensor:
        """The same of the model's own logits, with one log-softmax over everything."""
        logits = self.model(**model_inputs(batch), use_cache=False).logits.flatten(0, -2)
        logps = torch.log_softmax(logits.float(), -1)
        del logits
        logps = logps[batch["rows"], batch["targets"]]
        pairs = batch["layout"].num_pairs
        return orpo_objective_flat(logps, batch["pair"], batch["kind"], num_pairs=pairs, beta=0.1, preset="trl").loss
