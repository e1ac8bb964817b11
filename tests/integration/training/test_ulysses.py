"""Our trainer under DeepSpeed's Ulysses: attention and all, on sequences cut over two processes, against one process.

Run by `make test-deepspeed`, as tests/integration/test_deepspeed.py is.
"""

from __future__ import annotations

import importlib.util
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DeepSpeedSequenceParallelConfig
from trainers import OWN, llama, make, pairs, tokenizer

from orpo_kernels.integration.transformers import PreferenceCollator

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: run `make test-deepspeed`"
)
# SGD without clipping, which would hide a factor.
OPTIONS = {"per_device_train_batch_size": 2, "train_sampling_strategy": "sequential", "max_grad_norm": 0.0}
OPTIONS |= {"optim": "sgd", "learning_rate": 0.5}
GLOBAL = {"loss_normalization": "global", "gradient_accumulation_steps": 2}
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ZeRO-0": ({"stage": 0}, {}),
    "ZeRO-2": ({"stage": 2}, {}),
    "ZeRO-3": ({"stage": 3}, {}),
    "ZeRO-3 without reduce-scatter": ({"stage": 3, "reduce_scatter": False}, {}),
    "ZeRO-2, tokens and pairs of a step": ({"stage": 2}, GLOBAL),
    "ZeRO-2, sequence means of a step": ({"stage": 2}, GLOBAL | {"preset": "llama_factory"}),
}


def _deepspeed(zero: dict[str, Any]) -> dict[str, Any]:
    sizes = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps")
    zero = zero | {"stage3_param_persistence_threshold": 0}
    more = {"zero_allow_untested_optimizer": True, "gradient_clipping": 0.0}
    return {"zero_optimization": zero, **dict.fromkeys(sizes, "auto"), **more}


def run(folder: Path, **options: Any) -> tuple[list[dict[str, float]], Any]:
    """What was logged, an evaluation of seven rows last, and the trainer."""
    # Ulysses' adapter gathers the ranks' batches, which gloo can do with equal lengths only.
    collator = PreferenceCollator(tokenizer(), pad_to_multiple_of=16)
    trainer = make(OWN, folder, pairs(16), llama(), data_collator=collator, **OPTIONS | options)
    trainer.train()
    evaluated = trainer.evaluate(pairs(7))
    timed = ("runtime", "per_second", "flos", "grad_norm")
    logs = [
        {name: value for name, value in log.items() if not any(part in name for part in timed)}
        for log in [*trainer.state.log_history[:-1], evaluated]
    ]
    return logs, trainer


def _process(rank: int, folder: Path, name: str, port: int) -> None:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    deepspeed.init_distributed(dist_backend="gloo")
    zero, options = RUNS[name]
    handler = DeepSpeedSequenceParallelConfig(sp_attn_implementation="sdpa", sp_seq_length_is_variable=True)
    parallelism = ParallelismConfig(sp_size=2, sp_handler=handler)
    logs, trainer = run(folder, deepspeed=_deepspeed(zero), parallelism_config=parallelism, **options)
    engine = trainer.model_wrapped
    if zero["stage"]:
        found = {name: safe_get_full_fp32_param(p).clone() for name, p in engine.module.named_parameters()}
    else:
        found = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    torch.save((logs, found), folder / f"{rank}.pt")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


@pytest.mark.shows(
    "Wrappers",
    "DeepSpeed Ulysses (`sp_size=2`), {name}",
    "our trainer, 2 processes (gloo, CPU), against 1 on whole rows",
)
@pytest.mark.parametrize("name", RUNS)
def test_trains_as_one_process(name: str, tmp_path: Path):
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    mp.spawn(_process, (tmp_path, name, port), nprocs=2)
    logs, alone = run(tmp_path, **RUNS[name][1])
    for rank in range(2):
        found_logs, found = torch.load(tmp_path / f"{rank}.pt")
        for key, parameter in alone.model.named_parameters():
            moved = (parameter - llama().get_parameter(key)).norm()
            assert (parameter - found[key]).norm() <= 2e-4 * moved, key
    assert len(found_logs) == len(logs)
    found_logs, _ = torch.load(tmp_path / "0.pt")
    for found, expected in zip(found_logs, logs, strict=True):
        assert found.keys() == expected.keys()
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
