"""Heads that are cut by rows over several processes, against one process on full logits: nothing gathers them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from accelerate import ParallelismConfig
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from ranks import once_on_ranks
from test_memory import Allocations
from test_transformers import full_logits_loss
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from trainers import WORDS, llama, make, pairs
from transformers import LlamaForCausalLM
from wrapping import LEARNING_RATE, Trained, check_same, inputs_of, make_batch, through, tiny_llama, train
from wrapping import VOCAB as TOKENS

from orpo_kernels.integration.lm_head import attach
from orpo_kernels.loss import merge_targets

STEPS = 5
# So many entries that nothing but a weight of the whole head has as many elements. They do not divide, where
# transformers cuts such a head.
UNEVEN = Version(transformers.__version__) >= Version("5.24")
VOCAB = 4003 if UNEVEN else 4004
HEAD = VOCAB * 32


def tiny() -> LlamaForCausalLM:
    """With frozen embeddings, whose gradient would be as large as the head's weight."""
    model = tiny_llama(vocab_size=VOCAB, num_key_value_heads=4, num_hidden_layers=1)
    model.model.embed_tokens.requires_grad_(False)
    return model


def few_inputs() -> LlamaForCausalLM:
    """With embeddings of few tokens: FSDP gathers them."""
    model = tiny()
    model.model.embed_tokens = nn.Embedding(TOKENS, 32)
    return model


def adapted() -> nn.Module:
    config = LoraConfig(r=3, target_modules=["lm_head", "q_proj"], lora_alpha=5, init_lora_weights=False)
    torch.manual_seed(1)
    return get_peft_model(tiny(), config)


# Wrappers


def loaded(model: nn.Module) -> nn.Module:
    """Tensor parallelism as transformers does it."""
    with tempfile.TemporaryDirectory() as folder:
        shared = [folder]
        dist.broadcast_object_list(shared)
        if dist.get_rank() == 0:
            model.save_pretrained(shared[0])
        dist.barrier()
        sharded = LlamaForCausalLM.from_pretrained(shared[0], tp_plan="auto")
        dist.barrier()
    for name, parameter in model.named_parameters():
        sharded.get_parameter(name).requires_grad_(parameter.requires_grad)
    return sharded


def head(style: Any, name: str = "lm_head") -> Callable[[nn.Module], nn.Module]:
    return lambda model: parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), {name: style})


def adapter_too(model: nn.Module) -> nn.Module:
    styles = {name: ColwiseParallel(output_layouts=Replicate()) for name in ("base_layer", "lora_B.default")}
    names = {f"base_model.model.lm_head.{name}": style for name, style in styles.items()}
    return parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), names)


def compiled(model: nn.Module) -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(head(ColwiseParallel(output_layouts=Replicate()))(model), backend="eager")


def both(model: nn.Module) -> nn.Module:
    """FSDP2 over one dimension of a 2 x 2 mesh; all linear layers, the head among them, in slices over the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    styles: dict[str, Any] = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
    styles |= {f"mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")}
    styles |= {f"{name}_proj": RowwiseParallel() for name in ("self_attn.o", "mlp.down")}
    for layer in model.model.layers:
        parallelize_module(layer, mesh["tensor"], styles)
        fully_shard(layer, mesh=mesh["data"])
    parallelize_module(model, mesh["tensor"], {"lm_head": ColwiseParallel(output_layouts=Replicate())})
    return fully_shard(model, mesh=mesh["data"])


def both_with_the_head_a_unit(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(model, mesh["tensor"], {"lm_head": ColwiseParallel()})
    fully_shard(model.lm_head, mesh=mesh["data"])
    return fully_shard(model, mesh=mesh["data"])


def one_group_scores_nothing(step: int, rank: int) -> dict[str, Tensor]:
    return make_batch(step, rank, scored=rank == 0)


# What is wrapped, how, in how many groups with data of their own, and with which batches.
SETUPS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], nn.Module], int, Callable]] = {
    "tp_plan": (tiny, loaded, 1, make_batch),
    "LoRA": (
        adapted,
        head(ColwiseParallel(output_layouts=Replicate()), "base_model.model.lm_head.base_layer"),
        1,
        make_batch,
    ),
    "LoRA, its B cut too": (adapted, adapter_too, 1, make_batch),
    "compiled": (tiny, compiled, 1, make_batch),
    "FSDP2 x TP": (few_inputs, both, 2, make_batch),
    "FSDP2 x TP, the head a unit": (few_inputs, both_with_the_head_a_unit, 2, make_batch),
    "FSDP2 x TP, nothing to score in one group": (few_inputs, both, 2, one_group_scores_nothing),
}


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.replace("_orig_mod.", ""): (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in model.named_parameters()
    }


def trained(name: str) -> tuple[Trained, int]:
    """Losses and first gradients, and the elements of the largest tensor that forward and backward made."""
    build, wrap, groups, batch = SETUPS[name]
    model = wrap(build())
    loss_of = through(attach(model))
    group = dist.get_rank() // (dist.get_world_size() // groups)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    before, losses, gradients, largest = whole(model), [], {}, 0

    def note(loss: Tensor) -> None:
        mean = loss.detach().double()
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())

    for step in range(STEPS):
        with Allocations() if step == 0 else nullcontext() as made:
            loss = loss_of(model, batch(step, group))
            loss.backward()
        if made is not None:
            largest = max(buffer.elements for buffer in made.buffers)
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            after = whole(model)
            gradients = {name: (p - after[name]) / LEARNING_RATE for name, p in before.items()}
        note(loss)
    with torch.no_grad():
        note(loss_of(model, batch(0, group)))
    return Trained(losses, gradients), largest


def mean_logits() -> tuple[Tensor, Tensor]:
    """Of a head in slices, and of the same model whole."""
    found = []
    for wrap in (loaded, lambda model: model):
        batch, model = make_batch(), wrap(tiny())
        targets = merge_targets(batch["targets"], batch["nll_targets"])
        over = batch["attention_mask"].bool()
        found.append(attach(model).sequence_scores(targets, over, **inputs_of(batch)).mean_logits)
    return found[0].detach(), found[1].detach()


LOGGED = ("loss", "grad_norm", "logps/chosen", "logps/rejected", "rewards/accuracies", "logits/chosen", "nll_loss")


def logged(trainer: Any) -> list[dict[str, float]]:
    """What five steps say of themselves."""
    trainer.train()
    return [{k: line[k] for k in LOGGED if k in line} for line in trainer.state.log_history if "loss" in line]


def trainer_of(kind: str, folder: str | Path, model: nn.Module) -> Any:
    options: dict[str, Any] = {"max_steps": STEPS, "optim": "sgd", "learning_rate": 0.1, "max_length": 64}
    return make(kind, Path(folder), pairs(12), model, **options | ({"packing": False} if kind == "own" else {}))


def adapter_of_a_part() -> str:
    """The error for an adapter that PEFT has made for the head of a tp_plan, where its own forward fails; where it
    does not, what comes of ours."""
    config = LoraConfig(r=3, target_modules=["lm_head"], init_lora_weights=False)
    model, batch = get_peft_model(loaded(tiny()), config), make_batch()
    z = None
    with pytest.raises(RuntimeError, match="size of tensor") if UNEVEN else nullcontext():
        z = model(**inputs_of(batch)).logits
    try:
        found, _ = attach(model).logps(batch["targets"], **inputs_of(batch))
    except RuntimeError as error:
        return str(error)
    assert z is not None
    right = z.log_softmax(-1).gather(-1, batch["targets"].clamp_min(0)[..., None])[..., 0] * (batch["targets"] != -100)
    torch.testing.assert_close(found, right)
    return "right"


def work(names: tuple[str, ...], folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in names:
        if name in SETUPS:
            found[name] = trained(name)
        elif name == "adapter of a part":
            found[name] = adapter_of_a_part()
        elif name == "mean logits":
            found[name] = mean_logits()
        else:
            # accelerate takes tensor parallelism on devices only; all that it does then is the same on a CPU.
            ParallelismConfig._validate_accelerator = lambda self, accelerator: None
            found[name] = logged(trainer_of(name, folder, loaded(llama(WORDS + 4))))
    return found


ON_RANKS = [(name, 4 if name.startswith("FSDP2") else 2) for name in SETUPS]
KINDS = ["own", "trl"]
OTHERS = ("mean logits", "adapter of a part", *KINDS)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[dict[str, Any]]]:
    """By number of ranks: what each of them found, from processes that are started once."""
    folder = str(tmp_path_factory.mktemp("ranks"))

    def of(ranks: int, *more: str) -> list[dict[str, Any]]:
        names = more or tuple(name for name, on in ON_RANKS if on == ranks)
        found = once_on_ranks(work, ranks, names + OTHERS if ranks == 2 else names, folder)
        assert not isinstance(found, str), found
        return found

    return of


@pytest.mark.shows(
    "Wrappers", "{name}, {ranks} processes", "gloo, CPU, 5 steps and an evaluation, against 1 process on full logits"
)
@pytest.mark.parametrize(("name", "ranks"), ON_RANKS + [pytest.param("tp_plan", 4, marks=pytest.mark.exhaustive)])
def test_trains_as_one_process_on_full_logits(name: str, ranks: int, results: Callable[[int], list[dict[str, Any]]]):
    build, _, groups, batch = SETUPS[name]
    model = build()
    right = train(model, ranks=groups, steps=STEPS, batch=batch)
    still = {n: torch.zeros_like(p) for n, p in model.named_parameters() if n not in right.gradients}
    more = () if (name, ranks) in ON_RANKS else (name,)
    for rank in results(ranks, *more):
        found, largest = rank[name]
        check_same(found, right._replace(gradients=right.gradients | still))
        assert largest < HEAD


def test_mean_logits(results: Callable[[int], list[dict[str, Any]]]):
    for rank in results(2):
        found, right = rank["mean logits"]
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)


@pytest.mark.shows("Wrappers", "LoRA that PEFT puts on a `tp_plan` head", "the error says what to do", "refused")
def test_an_adapter_of_one_ranks_rows_is_refused(results: Callable[[int], list[dict[str, Any]]]):
    for rank, size in zip(results(2), (-(-VOCAB // 2), VOCAB // 2), strict=True):
        refused = f"an adapter on it has {size} rows where the head has {VOCAB}" in rank["adapter of a part"]
        assert refused or (not UNEVEN and rank["adapter of a part"] == "right")


def full_logits_trainer(kind: str, folder: Path) -> Any:
    """In one process: TRL's own, and ours with its loss made from full logits."""
    trainer = trainer_of(kind, folder, llama(WORDS + 4))
    if kind == "trl":
        theirs = pytest.importorskip("trl.experimental.orpo")
        arguments = {"train_dataset": trainer.train_dataset, "processing_class": trainer.processing_class}
        return theirs.ORPOTrainer(llama(WORDS + 4), trainer.args, **arguments)

    def compute_loss(model: nn.Module, inputs: dict[str, Tensor], **more: Any) -> Tensor:
        return full_logits_loss(model, inputs, trainer.args) / trainer.args.gradient_accumulation_steps

    trainer.compute_loss = compute_loss
    return trainer


@pytest.mark.shows("Trainers", "{kind} `ORPOTrainer` with `tp_plan`", "2 processes (gloo, CPU), 5 steps, full logits")
@pytest.mark.parametrize("kind", KINDS)
def test_trainers(kind: str, results: Callable[[int], list[dict[str, Any]]], tmp_path: Path):
    right = logged(full_logits_trainer(kind, tmp_path))
    for rank in results(2):
        assert len(rank[kind]) == len(right) == STEPS
        for found, expected in zip(rank[kind], right, strict=True):
            assert {k: found[k] for k in expected} == pytest.approx(expected, rel=2e-5)
