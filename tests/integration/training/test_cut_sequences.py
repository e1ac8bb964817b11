"""Our trainer on sequences that are cut over ranks, against one process on whole ones.

Context parallelism: accelerate takes it on GPUs only, and torch's ring attention has no CPU kernel. So the check of
the device is lifted, and the model's layers look at no other position; transformers' cut, in place and balanced, and
everything of ours are the real ones. Ulysses runs on the CPU as it is: tests/integration/test_deepspeed.py.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate.parallelism_config import ParallelismConfig
from torch import Tensor, nn
from trainers import OWN, llama, make, pairs, tokenizer
from transformers import (
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from orpo_kernels.integration.training.sequence_parallel import CutCollator, refusal
from orpo_kernels.integration.transformers import LayoutCollator, PreferenceCollator

# Without clipping, which would hide a factor; SGD too, and steps that are large enough to tell in a later loss.
OPTIONS = {"train_sampling_strategy": "sequential", "max_grad_norm": 0.0, "optim": "sgd", "learning_rate": 0.5}
RUNS = {
    "batch": OPTIONS,
    "global": OPTIONS | {"loss_normalization": "global"},
    "sequence means": OPTIONS | {"loss_normalization": "global", "preset": "llama_factory"},
}


class _OwnPosition(nn.Module):
    """In the place of attention: looks at no other position."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        return self.linear(hidden_states), None


def position_wise() -> LlamaForCausalLM:
    model = llama()
    for layer in model.model.layers:
        layer.self_attn = _OwnPosition(model.config.hidden_size)
    return model.double()


def run(folder: Path, **options: Any) -> dict[str, Any]:
    """Train, evaluate seven rows, and tell everything."""
    trainer = make(OWN, folder, pairs(16), position_wise(), per_device_eval_batch_size=2, **options)
    trainer.train()
    evaluated = trainer.evaluate(pairs(7))
    model = trainer.accelerator.unwrap_model(trainer.model)
    timed = ("runtime", "per_second", "flos")
    logs = [
        {name: value for name, value in log.items() if not any(part in name for part in timed)}
        for log in [*trainer.state.log_history[:-1], evaluated]
    ]
    return {"logs": logs, "parameters": dict(model.named_parameters())}


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "packing": ("(packing=True, share_prefix='auto', data_collator=NoneType) and cp_size=2 cuts", {"packing": True}),
    "shared prefixes": ("(packing=auto, share_prefix='true', data_collator=NoneType)", {"share_prefix": "true"}),
    "a given layout": (
        "share_prefix='auto', data_collator=LayoutCollator) and cp_size=2",
        {"data_collator": LayoutCollator(tokenizer())},
    ),
}


def _process(rank: int, folder: Path, ranks: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    ParallelismConfig._validate_accelerator = lambda self, accelerator: None  # it takes no CPU
    parallelism: dict[str, Any] = {"parallelism_config": ParallelismConfig(dp_shard_size=ranks // 2, cp_size=2)}
    parallelism["ddp_timeout"] = 60
    found: dict[str, Any] = {
        name: run(folder, per_device_train_batch_size=2, **parallelism, **options) for name, options in RUNS.items()
    }
    for name, (_, options) in REFUSED.items():
        with pytest.raises(ValueError, match="cp_size") as error:
            make(OWN, folder, pairs(4), **parallelism, **options)
        found[name] = str(error.value)
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.exhaustive)])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of several processes found: 1 or 2 data-parallel groups of 2 ranks."""
    folder = tmp_path_factory.mktemp("cut")
    mp.spawn(_process, (folder, request.param, free_port()), nprocs=request.param)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(request.param)]


@pytest.mark.shows(
    "Wrappers",
    "accelerate `cp_size=2`, {name}",
    "2 processes (gloo, CPU), a model without attention, against 1 process on whole sequences",
)
@pytest.mark.parametrize("name", RUNS)
def test_context_parallelism_trains_as_one_process(name: str, ranks: list[dict[str, Any]], tmp_path: Path):
    """2 pairs a group: one process on as many micro-batches of 2 pairs as there are groups."""
    groups = len(ranks) // 2
    right = run(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=groups, **RUNS[name])
    first = dict(position_wise().named_parameters())
    for found in (rank[name] for rank in ranks):
        for key, parameter in right["parameters"].items():
            moved = (parameter - first[key]).norm()
            assert moved > 0
            assert (parameter - found["parameters"][key]).norm() <= 1e-9 * moved, key
    logs = ranks[0][name]["logs"]
    assert len(logs) == len(right["logs"]) == 16 // (2 * groups) + 2
    for found, expected in zip(logs, right["logs"], strict=True):
        assert found.keys() == expected.keys()
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", REFUSED)
def test_layouts_that_cannot_be_cut_are_refused(name: str, ranks: list[dict[str, Any]]):
    assert all(REFUSED[name][0] in rank[name] for rank in ranks)


def test_models_that_cannot_be_cut_are_refused():
    settings = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}
    settings |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    windowed = MistralForCausalLM(MistralConfig(sliding_window=5, **settings))
    assert "sliding window of 5" in str(refusal(windowed))
    assert refusal(windowed, keeps_windows=True) is None
    assert refusal(MistralForCausalLM(MistralConfig(sliding_window=None, **settings))) is None
    state = MambaForCausalLM(MambaConfig(vocab_size=9, hidden_size=8, state_size=2, num_hidden_layers=1))
    assert "its layers are" in str(refusal(state))
    routed = MixtralConfig(sliding_window=None, num_local_experts=2, output_router_logits=True, **settings)
    assert "router" in str(refusal(MixtralForCausalLM(routed)))
    assert "not a transformers model" in str(refusal(nn.Linear(2, 2)))
    assert refusal(llama()) is None


@pytest.mark.parametrize(("parts", "labels"), [(4, True), (7, False), (1, False)])
def test_batches_divide_into_parts(parts: int, labels: bool):
    ids = {"chosen_input_ids": [5, 6, 7, 8], "rejected_input_ids": [5, 6, 9]}
    rows = [ids | {"chosen_prompt_length": 2, "rejected_prompt_length": 2}]
    inner = PreferenceCollator(tokenizer())
    cut, whole = CutCollator(inner, parts, labels=labels)(rows), inner(rows)
    assert cut["input_ids"].shape[1] % parts == 0
    for name, value in whole.items():
        assert torch.equal(cut[name][:, : value.shape[1]], value)
    added = {name: value[:, 4:] for name, value in cut.items()}
    assert (added["targets"] == -100).all()
    assert (added["nll_targets"] == -100).all()
    assert not added["attention_mask"].any()
    assert cut["position_ids"].tolist() == [list(range(cut["input_ids"].shape[1]))] * 2
    assert ("labels" in cut) == labels
