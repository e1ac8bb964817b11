"""DeepSpeed's ZeRO on two processes, compared with one process on full logits.

DeepSpeed is not in the test environment: `make test-deepspeed` builds it in an environment of its own, and runs
this file there.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import WORLD, Setup, bare_name, check_setup, results_of, work_through
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from wrapping import (
    LEARNING_RATE,
    checkpointed,
    inputs_of,
    logps_of_logits,
    scaled,
    tiny_llama,
    train,
    with_a_frozen,
)

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: run `make test-deepspeed`"
)


@dataclass(frozen=True)
class Zero(Setup):
    def optimizer(self, wrapped: Any) -> Any:
        return None  # the engine has it

    def backward(self, wrapped: Any, loss: Tensor) -> None:
        wrapped.backward(loss)

    def step(self, wrapped: Any, optimizer: Any) -> None:
        wrapped.step()

    def parameters(self, wrapped: Any) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        return {
            bare_name(name): safe_get_full_fp32_param(p).clone() if p.requires_grad else frozen(p)
            for name, p in wrapped.named_parameters()
        }


def frozen(parameter: nn.Parameter) -> Tensor:
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
        return parameter.detach().clone()


def config(stage: int, **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 4,
        # Its defaults clip gradients, and leave small parameters whole.
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        **more,
    }


def zero(stage: int, **more: Any) -> Callable[[nn.Module], nn.Module]:
    def wrap(model: nn.Module) -> nn.Module:
        import deepspeed

        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
        return deepspeed.initialize(model=model, config=config(stage, **more), optimizer=optimizer)[0]

    return wrap


def born_sharded() -> LlamaForCausalLM:
    """As transformers loads a model for ZeRO-3: no rank ever holds all of it."""
    import deepspeed

    whole = tiny_llama()
    with deepspeed.zero.Init(config_dict_or_path=config(3)):
        model = tiny_llama()
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(whole.get_parameter(name))
    return model


@dataclass(frozen=True)
class BornSharded(Zero):
    def expected(self) -> Any:
        return Setup(self.wrap).expected()


def dpo(logps: Tensor) -> Tensor:
    """Of [2B, T]; the reference is a pass without gradients of the same model, as with an adapter switched off."""
    chosen, rejected = (logps - 0.9 * logps.detach()).sum(-1).chunk(2)
    return -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()


@dataclass(frozen=True)
class TrlDpo(Zero):
    """DPO on what TRL's `fused_lm_head=True` gives with our head."""

    def loss_of(self, ours: Any, wrapped: Any) -> Callable[[nn.Module, dict[str, Tensor]], Tensor]:
        def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            inputs = inputs_of(batch) | {"shift_labels": batch["targets"], "fused_lm_head": True}
            with torch.no_grad():
                reference = model(**inputs).log_probs
            logps = model(**inputs).log_probs
            torch.testing.assert_close(reference, logps.detach())
            return dpo(logps)

        return loss

    def expected(self) -> Any:
        def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            return dpo(logps_of_logits(model(**inputs_of(batch)).logits, batch["targets"]))

        return train(self.model(), loss, ranks=WORLD)


def with_trls_door(stage: int) -> Callable[[nn.Module], nn.Module]:
    def wrap(model: nn.Module) -> nn.Module:
        from trl.trainer import utils

        from orpo_kernels.integration.trl import use

        with use():
            utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits"))
        return zero(stage)(model)

    return wrap


SETUPS: dict[str, Setup] = {
    "ZeRO-1": Zero(zero(1)),
    "ZeRO-2": Zero(zero(2)),
    "ZeRO-2, attached first": Zero(zero(2), attach_first=True),
    "ZeRO-2, reentrant checkpoints": Zero(zero(2), model=checkpointed(reentrant=True)),
    "ZeRO-2 bf16": Zero(zero(2, bf16={"enabled": True}), rounded=True),
    "ZeRO-3": Zero(zero(3)),
    "ZeRO-3, attached first": Zero(zero(3), attach_first=True),
    "ZeRO-3, sharded from the start": BornSharded(zero(3), model=born_sharded),
    "ZeRO-3, frozen head": Zero(zero(3), model=with_a_frozen("lm_head")),
    "ZeRO-3, tied head": Zero(zero(3), model=lambda: tiny_llama(tie_word_embeddings=True)),
    "ZeRO-3, scaled logits": Zero(zero(3), model=scaled),
    "ZeRO-3, checkpoints": Zero(zero(3), model=checkpointed(reentrant=False)),
    "ZeRO-3, reentrant checkpoints": Zero(zero(3), model=checkpointed(reentrant=True)),
    "ZeRO-3, DPO of TRL": TrlDpo(with_trls_door(3)),
    "ZeRO-3 bf16": Zero(zero(3, bf16={"enabled": True}), rounded=True),
}


def work(rank: int, names: list[str], folder: Path) -> None:
    work_through(SETUPS, rank, names, folder)


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    return results_of(work, request, tmp_path_factory.mktemp("deepspeed"))


@pytest.mark.shows(
    "Wrappers",
    "DeepSpeed {name}",
    "2 processes (gloo, CPU), 3 steps and an evaluation, against 1 process on full logits",
)
@pytest.mark.parametrize("name", SETUPS)
def test_trains_as_one_process_on_full_logits(name: str, results: Callable[[str], Any]):
    check_setup(SETUPS[name], results(name))
