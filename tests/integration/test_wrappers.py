"""Every wrapper, trained for several steps by two processes and compared with one process on full logits."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import WORLD, Setup, bare_name, check_setup, results_of, work_through
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import MixedPrecision, MixedPrecisionPolicy, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel as DDP
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from wrapping import Trained, checkpointed, make_batch, scaled, through, tiny_llama, with_a_frozen

from orpo_kernels.integration.lm_head import attach

BF16 = torch.bfloat16


def with_an_unused_layer() -> LlamaForCausalLM:
    model = tiny_llama()
    model.unused = nn.Linear(3, 3)
    return model


def tied() -> LlamaForCausalLM:
    return tiny_llama(tie_word_embeddings=True)


def even_vocabulary() -> LlamaForCausalLM:
    return tiny_llama(vocab_size=98)  # older transformers gather only what divides by the number of ranks


def second_rank_scores_nothing(step: int, rank: int) -> dict[str, Tensor]:
    return make_batch(step, rank, scored=rank == 0)


# Wrappers


def ddp(**options: Any) -> Callable[[nn.Module], nn.Module]:
    return lambda model: DDP(model, **options)


@dataclass(frozen=True)
class Fsdp1(Setup):
    def parameters(self, wrapped: nn.Module) -> dict[str, Tensor]:
        with FSDP.summon_full_params(wrapped, writeback=False):
            return {bare_name(name): p.detach().clone() for name, p in wrapped.named_parameters()}


def fsdp1(*units: type[nn.Module], param_dtype: torch.dtype | None = None, **options: Any) -> Callable:
    """FSDP1 with the decoder layers, and modules of the other given types, as units."""
    policy = ModuleWrapPolicy({LlamaDecoderLayer, *units})
    if param_dtype is not None:
        options["mixed_precision"] = MixedPrecision(param_dtype=param_dtype, reduce_dtype=torch.float32)
    return lambda model: FSDP(model, auto_wrap_policy=policy, device_id=torch.device("cpu"), **options)


def fsdp2(head: str, param_dtype: torch.dtype | None = None, **options: Any) -> Callable:
    """FSDP2 with the head in the root's group, in a group of its own, or in one with the norm."""
    if param_dtype is not None:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)

    def wrap(model: nn.Module) -> nn.Module:
        for layer in model.model.layers:
            fully_shard(layer, **options)
        if head == "own":
            fully_shard(model.lm_head, **options)
        elif head == "norm":
            fully_shard([model.model.norm, model.lm_head], **options)
        return fully_shard(model, **options)

    return wrap


def sharded_head(style: Any, fsdp: bool = False) -> Callable[[nn.Module], nn.Module]:
    """The head as a DTensor, sharded over both ranks; fsdp: in the second dimension of a mesh."""

    def wrap(model: nn.Module) -> nn.Module:
        mesh = init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("data", "tensor"))
        parallelize_module(model, mesh["tensor"], {"lm_head": style})
        if fsdp:
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh["data"])
            fully_shard(model, mesh=mesh["data"])
        return model

    return wrap


def tp_plan(model: LlamaForCausalLM) -> nn.Module:
    """Tensor parallelism as transformers does it: DTensors, and closures in the place of the layers' forwards."""
    with tempfile.TemporaryDirectory() as folder:
        shared = [folder]
        dist.broadcast_object_list(shared)
        model.save_pretrained(shared[0])  # which only the first rank does
        dist.barrier()
        loaded = LlamaForCausalLM.from_pretrained(shared[0], tp_plan="auto")
        dist.barrier()
    return loaded


SETUPS: dict[str, Setup] = {
    "DDP": Setup(ddp()),
    "DDP, attached first": Setup(ddp(), attach_first=True),
    "DDP static_graph": Setup(ddp(static_graph=True)),
    "DDP find_unused_parameters": Setup(ddp(find_unused_parameters=True), model=with_an_unused_layer),
    "DDP, nothing to score on one rank": Setup(ddp(), batch=second_rank_scores_nothing),
    "DDP, frozen head": Setup(ddp(), model=with_a_frozen("lm_head")),
    "DDP static_graph, scaled logits": Setup(ddp(static_graph=True), model=scaled),
    "DDP, checkpoints": Setup(ddp(), model=checkpointed(reentrant=False)),
    "DDP static_graph, reentrant checkpoints": Setup(ddp(static_graph=True), model=checkpointed(reentrant=True)),
    "FSDP1": Fsdp1(fsdp1(use_orig_params=True)),
    "FSDP1, attached first": Fsdp1(fsdp1(use_orig_params=True), attach_first=True),
    "FSDP1 flat parameters": Fsdp1(fsdp1()),
    "FSDP1, head a unit": Fsdp1(fsdp1(nn.Linear, use_orig_params=True)),
    "FSDP1, head a unit, attached first": Fsdp1(fsdp1(nn.Linear, use_orig_params=True), attach_first=True),
    "FSDP1, scaled logits": Fsdp1(fsdp1(use_orig_params=True), model=scaled),
    "FSDP1, head a unit, scaled logits": Fsdp1(fsdp1(nn.Linear, use_orig_params=True), model=scaled),
    "FSDP1 SHARD_GRAD_OP": Fsdp1(fsdp1(sharding_strategy=ShardingStrategy.SHARD_GRAD_OP, use_orig_params=True)),
    "FSDP1, reentrant checkpoints": Fsdp1(fsdp1(use_orig_params=True), model=checkpointed(reentrant=True)),
    "FSDP1 bf16": Fsdp1(fsdp1(use_orig_params=True, param_dtype=BF16), rounded=True),
    **{
        f"FSDP2, head in the group of the {head}, reshard_after_forward={reshard}": Setup(
            fsdp2(head, reshard_after_forward=reshard)
        )
        for head in ("root", "own", "norm")
        for reshard in (True, False)
    },
    **{
        f"FSDP2, head in the group of the {head}, scaled logits": Setup(
            fsdp2(head, reshard_after_forward=True), model=scaled
        )
        for head in ("root", "own", "norm")
    },
    "FSDP2, attached first": Setup(fsdp2("own"), attach_first=True),
    "FSDP2, frozen head": Setup(fsdp2("own"), model=with_a_frozen("lm_head")),
    "FSDP2, frozen backbone": Setup(fsdp2("own"), model=with_a_frozen("model")),
    "FSDP2, tied head": Setup(fsdp2("root"), model=tied),
    "FSDP2, checkpoints": Setup(fsdp2("root"), model=checkpointed(reentrant=False)),
    "FSDP2 bf16": Setup(fsdp2("root", param_dtype=BF16), rounded=True),
    "FSDP2 bf16, head in a group of its own": Setup(fsdp2("own", param_dtype=BF16), rounded=True),
    "FSDP2, nothing to score on one rank": Setup(fsdp2("own"), batch=second_rank_scores_nothing),
    "DTensor head, gathered logits": Setup(sharded_head(ColwiseParallel(output_layouts=Replicate())), same_data=True),
    "DTensor head, local logits": Setup(sharded_head(ColwiseParallel()), same_data=True),
    "DTensor head, sharded logits": Setup(sharded_head(ColwiseParallel(use_local_output=False)), same_data=True),
    "DTensor head, sharded along D": Setup(sharded_head(RowwiseParallel(input_layouts=Replicate())), same_data=True),
    "DTensor head within FSDP2": Setup(
        sharded_head(ColwiseParallel(output_layouts=Replicate()), fsdp=True), same_data=True
    ),
    "transformers tp_plan": Setup(tp_plan, model=even_vocabulary, same_data=True),
}


def one_layer() -> LlamaForCausalLM:
    return tiny_llama(num_hidden_layers=1)


def compiled(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def wrap_and_compile(model: nn.Module) -> nn.Module:
        torch._dynamo.reset()
        return torch.compile(wrap(model), backend="eager")

    return wrap_and_compile


def compiled_layers(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def compile_and_wrap(model: nn.Module) -> nn.Module:
        torch._dynamo.reset()
        for layer in model.model.layers:
            layer.compile(backend="eager")
        return wrap(model)

    return compile_and_wrap


SLOW_SETUPS: dict[str, Setup] = {
    "compiled DDP": Setup(compiled(ddp()), model=one_layer),
    "DDP of a compiled model": Setup(lambda model: DDP(compiled(lambda same: same)(model)), model=one_layer),
    "FSDP2, compiled": Setup(compiled(fsdp2("own")), model=one_layer),
    "FSDP2, compiled layers": Setup(compiled_layers(fsdp2("own")), model=one_layer),
    "FSDP1, compiled": Fsdp1(compiled(fsdp1(use_orig_params=True)), model=one_layer),
    "FSDP1 bf16, head a unit": Fsdp1(fsdp1(nn.Linear, use_orig_params=True, param_dtype=BF16), rounded=True),
    "FSDP1, frozen head": Fsdp1(fsdp1(use_orig_params=True), model=with_a_frozen("lm_head")),
    "FSDP1, checkpoints": Fsdp1(fsdp1(use_orig_params=True), model=checkpointed(reentrant=False)),
    "FSDP2 bf16, head in the group of the norm": Setup(fsdp2("norm", param_dtype=BF16), rounded=True),
    "FSDP2, reentrant checkpoints": Setup(fsdp2("own"), model=checkpointed(reentrant=True)),
    "DDP find_unused_parameters, frozen backbone": Setup(
        ddp(find_unused_parameters=True), model=with_a_frozen("model")
    ),
}
ALL_SETUPS = SETUPS | SLOW_SETUPS


def work(rank: int, names: list[str], folder: Path) -> None:
    work_through(ALL_SETUPS, rank, names, folder)


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    return results_of(work, request, tmp_path_factory.mktemp("wrappers"))


@pytest.mark.shows(
    "Wrappers", "{name}", "2 processes (gloo, CPU), 3 steps and an evaluation, against 1 process on full logits"
)
@pytest.mark.parametrize("name", [*SETUPS, *(pytest.param(name, marks=pytest.mark.exhaustive) for name in SLOW_SETUPS)])
def test_trains_as_one_process_on_full_logits(name: str, results: Callable[[str], Any]):
    check_setup(ALL_SETUPS[name], results(name))


@pytest.mark.shows("Wrappers", "DTensor weight with a plain input", "the error names both and the fix", "refused")
def test_a_sharded_weight_that_nothing_gathers_is_an_error(tmp_path: Path):
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = tiny_llama()
        weight = distribute_tensor(model.lm_head.weight, init_device_mesh("cpu", (1,)), [Shard(0)])
        model.lm_head.weight = nn.Parameter(weight)
        with pytest.raises(RuntimeError, match=r"weight is a DTensor \(Shard\(dim=0\),\) and its input a plain tensor"):
            through(attach(model))(model, make_batch())
    finally:
        dist.destroy_process_group()


@pytest.mark.shows(
    "Wrappers",
    "`accelerate launch`",
    "a plain loop, 2 processes (gloo, CPU), 3 steps, against 1 process on full logits",
)
def test_accelerate_launch(tmp_path: Path):
    """The plain loop of `accelerated.py`, started as users start theirs."""
    here = Path(__file__).parent
    options = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    command = [sys.executable, "-m", "accelerate.commands.launch", *options.split(), "--main_process_port", "0"]
    done = subprocess.run(
        [*command, here / "accelerated.py", tmp_path / "trained.pt"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    check_setup(Setup(ddp()), {"head": Trained(*torch.load(tmp_path / "trained.pt"))})
