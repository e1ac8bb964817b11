"""Sequences cut over ranks: what every one of several processes (gloo) finds is what one finds of whole sequences.

One set of four processes does it all. Cut in four, they are one group; cut in two, a mesh of two groups, which hold
the same sequences. Results come home as files.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from orpo_kernels import OrpoLoss, orpo_loss, shift_labels
from orpo_kernels.integration.lm_head import attach
from orpo_kernels.loss import merge_targets, orpo_from_logps
from orpo_kernels.objective import CHOSEN, PROMPT, REJECTED, OrpoOutput, orpo_objective_flat
from orpo_kernels.sequence_parallel import cut_sequence, shift_and_cut, sum_over_ranks

RANKS = 4
CUTS = (2, 4)
PAIRS, LENGTH, WIDTH, VOCAB = 4, 13, 5, 17  # 13 positions in 2 or 4 parts: uneven ones
PRESETS = ("trl", "llama_factory", "paper")
STEPS, RATE = 3, 0.2


@dataclass
class Batch:
    """Whole sequences: hidden [2B, T, D], weight [V, D], bias [V], labels [2B, T], nll_labels [B, T]; not shifted."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    labels: Tensor
    nll_labels: Tensor


def make_batch(dtype: torch.dtype = torch.float64, seed: int = 0) -> Batch:
    """Completions [2, 11) but for: pair 1's chosen one, on the first rank; pair 2's rejected one, on the last; pair 3
    has no rejected one. The third of four ranks holds no token of a chosen sequence's NLL."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

    tokens = torch.randint(VOCAB, (2 * PAIRS, LENGTH), generator=random)
    spans = [(2, 11), (1, 3), (2, 6), (3, 7), (2, 11), (2, 9), (12, 13), (0, 0)]
    labels = torch.full_like(tokens, -100)
    for row, (start, end) in enumerate(spans):
        labels[row, start:end] = tokens[row, start:end]
    nll_labels = tokens[:PAIRS].masked_fill((torch.arange(LENGTH) >= 8) & (labels[:PAIRS] == -100), -100)
    return Batch(normal(2 * PAIRS, LENGTH, WIDTH), normal(VOCAB, WIDTH), normal(VOCAB), labels, nll_labels)


def log_probs(batch: Batch) -> Tensor:
    """[2B, T] of the merged targets, 0 where nothing is scored; a leaf."""
    targets = merge_targets(shift_labels(batch.labels), shift_labels(batch.nll_labels))
    logits = nn.functional.linear(batch.hidden, batch.weight, batch.bias)
    found = logits.log_softmax(-1).gather(2, targets.clamp(min=0)[..., None]).squeeze(-1)
    return torch.where(targets == -100, 0, found).detach().requires_grad_()


def facts(output: OrpoOutput) -> dict[str, Tensor]:
    """Everything that the objective gives, and its metrics."""
    found = {field.name: torch.as_tensor(getattr(output, field.name)) for field in fields(output)}
    return {name: value.detach().clone() for name, value in (found | output.metrics()).items()}


def flat(logps: Tensor, targets: Tensor, nll_targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probs, pair, kind) of the scored tokens of a rectangle."""
    row = torch.arange(2 * PAIRS)[:, None].expand_as(targets)
    kind = torch.where(row < PAIRS, CHOSEN, REJECTED)
    kind = torch.where(targets == -100, PROMPT, kind)
    scored = merge_targets(targets, nll_targets) != -100
    return logps[scored], row[scored] % PAIRS, kind[scored]


# Each case: (the batch, the group or None for whole sequences) -> (what it found, its gradients). Along the second
# dimension of a gradient in GATHERED lie a rank's positions; the others are averaged, as DDP does.

GATHERED = {"logps", "hidden"}
Found = tuple[dict[str, Tensor], dict[str, Tensor]]
Case = Callable[[Batch, Any], Found]


def targets_of(batch: Batch, group: Any, preset: str) -> tuple[Tensor, Tensor | None]:
    shift = shift_labels if group is None else functools.partial(shift_and_cut, group=group)
    return shift(batch.labels), None if preset == "llama_factory" else shift(batch.nll_labels)


def part(tensor: Tensor, group: Any) -> Tensor:
    return (tensor if group is None else cut_sequence(tensor, group, 1)).detach().clone().requires_grad_()


def from_log_probs(batch: Batch, group: Any, preset: str, **options: Any) -> Found:
    targets, nll_targets = targets_of(batch, group, preset)
    logps = part(log_probs(batch), group)
    output = orpo_from_logps(logps, targets, nll_targets=nll_targets, preset=preset, group=group, **options)
    output.loss.backward()
    return facts(output), {"logps": logps.grad}


def from_flat_tokens(batch: Batch, group: Any, preset: str) -> Found:
    targets, _ = targets_of(batch, group, preset)
    _, nll_targets = targets_of(batch, group, "trl")
    logps = part(log_probs(batch), group)
    tokens = flat(logps, targets, nll_targets)
    output = orpo_objective_flat(*tokens, num_pairs=PAIRS, preset=preset, group=group)
    output.loss.backward()
    return facts(output), {"logps": logps.grad}


def from_hidden_states(batch: Batch, group: Any, preset: str) -> Found:
    targets, nll_targets = targets_of(batch, group, preset)
    hidden = part(batch.hidden, group)
    weight, bias = (tensor.clone().requires_grad_() for tensor in (batch.weight, batch.bias))
    options: dict[str, Any] = {"preset": preset, "softcap": 3.0, "group": group}
    if preset == "paper":
        output = OrpoLoss(**options)(weight, hidden, targets, bias=bias, nll_targets=nll_targets)
    else:
        output = orpo_loss(hidden, weight, targets, nll_targets=nll_targets, bias=bias, **options)
    output.loss.backward()
    return facts(output), {"hidden": hidden.grad, "weight": weight.grad, "bias": bias.grad}


def of_one_part_of_the_loss(batch: Batch, group: Any) -> Found:
    """Not the loss itself is differentiated, but other things that it is made of."""
    targets, nll_targets = targets_of(batch, group, "trl")
    logps = part(log_probs(batch), group)
    output = orpo_from_logps(logps, targets, nll_targets=nll_targets, preset="trl", group=group)
    (output.odds_ratio_loss * 3 + (output.chosen_logps * torch.arange(PAIRS)).sum()).backward()
    return facts(output), {"logps": logps.grad}


def without_a_scored_token(batch: Batch, group: Any) -> Found:
    nothing = Batch(**{**vars(batch), "labels": torch.full_like(batch.labels, -100), "nll_labels": batch.labels[:0]})
    nothing.nll_labels = nothing.labels[:PAIRS]
    return from_hidden_states(nothing, group, "trl")


class PositionWise(nn.Module):
    """A language model whose layers look at no other position."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        hidden = self.embedding(input_ids)
        return SimpleNamespace(logits=self.lm_head(hidden + self.layer(hidden).tanh()))


def training_a_model(batch: Batch, group: Any) -> Found:
    """Steps of SGD under DDP, whose averaging over the group is all that the gradients get."""
    model = PositionWise().double()
    wrapped = (
        model
        if group is None
        else DistributedDataParallel(model, process_group=getattr(group, "get_group", lambda: group)())
    )
    ours = attach(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    losses = []
    for step in range(STEPS):
        batch = make_batch(seed=step)
        targets, nll_targets = targets_of(batch, group, "trl")
        ids = torch.where(batch.labels == -100, 3, batch.labels)
        ids = ids if group is None else cut_sequence(ids, group)
        logps, _ = ours.logps(merge_targets(targets, nll_targets), model=wrapped, input_ids=ids)
        output = orpo_from_logps(logps, targets, nll_targets=nll_targets, preset="trl", group=group)
        output.loss.backward()
        losses.append(output.loss.detach())
        if step == 0:
            gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": torch.stack(losses), **{name: p.detach() for name, p in model.named_parameters()}}, gradients


CASES: dict[str, Case] = {
    **{f"log-probs, {preset}": functools.partial(from_log_probs, preset=preset) for preset in PRESETS},
    **{f"flat tokens, {preset}": functools.partial(from_flat_tokens, preset=preset) for preset in PRESETS},
    **{f"hidden states, {preset}": functools.partial(from_hidden_states, preset=preset) for preset in PRESETS},
    "log-probs, normalizers": functools.partial(
        from_log_probs, preset="trl", nll_normalizer=100.0, pair_normalizer=torch.tensor(7)
    ),
    "log-probs, odds ratio and means alone": of_one_part_of_the_loss,
    "hidden states, no scored token": without_a_scored_token,
    "training a model": training_a_model,
}


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/store", timeout=datetime.timedelta(seconds=60), rank=rank, world_size=RANKS
    )
    groups: dict[int, Any] = {
        4: dist.group.WORLD,
        2: init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))["cp"],
    }
    dtypes = (torch.float64, torch.float32)
    found = {
        (name, cut, dtype): CASES[name](make_batch(dtype), groups[cut])
        for name in CASES
        for cut in CUTS
        for dtype in dtypes
    }
    torch.save(found, folder / f"rank{rank}.pt")
    torch.save(errors_of(groups[2]) | {"travelled": travelled(groups[4])}, folder / f"more{rank}.pt")
    dist.destroy_process_group()


def travelled(group: Any) -> list[int]:
    """How many numbers each exchange of a loss and its backward moved."""
    counted, all_reduce = [], dist.all_reduce

    def counting(tensor: Tensor, *args: Any, **options: Any) -> Any:
        counted.append(tensor.numel())
        return all_reduce(tensor, *args, **options)

    dist.all_reduce = counting
    try:
        from_hidden_states(make_batch(), group, "trl")
    finally:
        dist.all_reduce = all_reduce
    return counted


def errors_of(mesh: Any) -> dict[str, str]:
    found = {}
    for name, group in {
        "mesh": mesh._get_root_mesh(),
        "name": "cp",
        "outside": dist.GroupMember.NON_GROUP_MEMBER,
    }.items():
        try:
            sum_over_ranks(group, torch.zeros(1))
        except (TypeError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (folder,), nprocs=RANKS)
    return [torch.load(folder / f"rank{rank}.pt") | torch.load(folder / f"more{rank}.pt") for rank in range(RANKS)]


def groups_of(cut: int) -> Iterator[range]:
    return (range(start, start + cut) for start in range(0, RANKS, cut))


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_cut_sequences_give_what_whole_ones_give(ranks: list[dict[Any, Any]], name: str, dtype: torch.dtype, cut: int):
    bound = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    expected, gradients = CASES[name](make_batch(dtype), None)
    assert expected
    assert gradients
    for members in groups_of(cut):
        found = [ranks[rank][name, cut, dtype] for rank in members]
        for one, _ in found:
            assert one.keys() == expected.keys()
            for key, value in expected.items():
                torch.testing.assert_close(one[key], value, **bound, msg=lambda m, key=key: f"{key}: {m}")
                assert torch.equal(one[key], found[0][0][key]), f"{key} differs from rank to rank"
        for key, value in gradients.items():
            parts = [grads[key] for _, grads in found]
            whole = torch.cat(parts, 1) / cut if key in GATHERED else torch.stack(parts).mean(0)
            torch.testing.assert_close(whole, value, **bound, msg=lambda m, key=key: f"gradient of {key}: {m}")


def test_the_batch_holds_the_hard_cases():
    """A completion on one rank only, an empty one, a rank without a token of the NLL."""
    batch = make_batch()
    targets, nll = shift_labels(batch.labels) != -100, shift_labels(batch.nll_labels) != -100
    for cut in CUTS:
        counts = torch.stack([p.sum(1) for p in targets.tensor_split(cut, 1)])  # [P, 2B]
        assert (counts > 0).sum(0).tolist()[1] == 1  # chosen, on one rank
        assert (counts > 0).sum(0).tolist()[6] == 1  # rejected, on one rank
    assert targets.sum(1).tolist()[7] == 0
    assert any(not p.any() for p in nll[1:].tensor_split(4, 1))
    output = from_log_probs(batch, None, "trl")[0]
    assert output["valid_pairs"] == 3


def test_gradients_are_not_zero():
    for name, case in CASES.items():
        _, gradients = case(make_batch(), None)
        assert all(grad.abs().max() > 0 for grad in gradients.values()) == ("no scored token" not in name)


def test_six_numbers_a_pair_travel_each_way(ranks: list[dict[Any, Any]]):
    assert all(found["travelled"] == [6 * PAIRS, 6 * PAIRS] for found in ranks)


def test_a_group_that_is_none_is_refused_by_name(ranks: list[dict[Any, Any]]):
    for found in ranks:
        assert "ValueError: group is a mesh of 2 dimensions ('dp', 'cp')" in found["mesh"]
        assert "TypeError: group is 'cp'" in found["name"]
        assert "this rank belongs to" in found["outside"]
