"""A head in slices, on 2 and 4 real processes, against float64 on the whole of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from ranks import once_on_ranks
from reference import (
    GRADIENT_BOUND,
    IGNORED,
    Case,
    Result,
    evaluate,
    evaluate_exact,
    largest_logit,
    make_case,
    normal_like,
    relative_error,
    row_errors,
)
from test_memory import Allocations
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from orpo_kernels import Plan, linear_logps
from orpo_kernels.kernels import dispatch
from orpo_kernels.vocab_parallel import vocab_parallel_logps

CPU = torch.device("cpu")
D = 24
BOUNDS = GRADIENT_BOUND | {torch.float64: 1e-12, torch.float32: 1e-5}


@dataclass(frozen=True)
class Setup:
    """case: the whole problem. cut: how many rows each rank has, of which the last `padding` are none; None cuts as
    evenly as can be, with no range given. train: what gets a gradient. kernels: in Triton's interpreter."""

    case: Callable[[], Case]
    options: dict[str, Any] = field(default_factory=dict)
    cut: Callable[[int, int], list[int]] | None = None
    padding: int = 0
    train: tuple[str, ...] = ("hidden", "weight", "bias")
    dtensor: bool = False
    kernels: bool = False


class Found(NamedTuple):
    """A rank's result, of its own rows. travelled: elements by collective. largest: of the tensors made."""

    result: Result
    travelled: dict[str, int]
    largest: int


def case(*shape: int, v: int = 61, dtype: torch.dtype = torch.float64, bias: bool = True, **options: Any) -> Any:
    return lambda: make_case(shape or (3, 7), D, v, dtype, CPU, bias=bias, **options)


def with_rows(order: str, **options: Any) -> Callable[[], Case]:
    def make() -> Case:
        made = case(21, **options)()
        random = torch.Generator().manual_seed(5)
        rows = (
            torch.randperm(21, generator=random) if order == "shuffled" else torch.randint(9, (21,), generator=random)
        )
        return replace(made, rows=rows)

    return make


def with_targets(choose: Callable[[Tensor], Tensor], **options: Any) -> Callable[[], Case]:
    def make() -> Case:
        made = case(**options)()
        return replace(made, targets=choose(made.targets))

    return make


def extreme(*lift: float, dtype: torch.dtype = torch.float64, **options: Any) -> Callable[[], Case]:
    """The i-th token's target has a logit that is lift[i] above what it would be."""

    def make() -> Case:
        made = case(len(lift), dtype=dtype, ignored=0.0, bias=False, **options)()
        wide = made.weight[made.targets].double()
        moved = made.hidden.double() + torch.tensor(lift)[:, None] * wide / wide.square().sum(1, keepdim=True)
        return replace(made, hidden=moved.to(dtype))

    return make


def apart(by: float, **options: Any) -> Callable[[], Case]:
    """The first quarter of the vocabulary, where the targets are, has logits `by` above the others'."""

    def make() -> Case:
        made = case(bias=True, **options)()
        assert made.bias is not None
        few = len(made.bias) // 4  # with `ragged` and 2 ranks, all that the first one has
        moved = made.bias + by * (torch.arange(len(made.bias)) < few)
        return replace(made, bias=moved, targets=torch.where(made.targets == IGNORED, IGNORED, made.targets % few))

    return make


def ragged(v: int, ranks: int) -> list[int]:
    sizes = [v // (2 * ranks) + 3 * i for i in range(ranks - 1)]
    return [*sizes, v - sum(sizes)]


def all_on_the_last(v: int, ranks: int) -> list[int]:
    return [0] * (ranks - 1) + [v]


KEEPS = {"plan": Plan(keep_logit_grads=True)}
FAR = (30.0, 60.0, 120.0, 400.0, 900.0, -40.0, -120.0, -400.0, -900.0, 0.0)
LIFTS = (30.0, 60.0, 90.0, 110.0, -40.0, -80.0, -110.0, 0.0)
SETUPS: dict[str, Setup] = {
    **{
        str(dtype)[6:]: Setup(case(dtype=dtype))
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    },
    "one token": Setup(case(1, ignored=0.0)),
    "every token": Setup(case(ignored=0.0)),
    "no bias": Setup(case(bias=False)),
    "scale": Setup(case(logit_scale=0.3)),
    "soft-cap": Setup(case(logit_scale=0.7, softcap=5.0)),
    "soft-cap, kept": Setup(case(logit_scale=0.7, softcap=5.0), KEEPS),
    "kept": Setup(case(dtype=torch.float32), KEEPS),
    "kept in part": Setup(case(), {"plan": Plan(keep_logit_grads=1200)}),
    "small plan": Setup(case(9, 33, dtype=torch.float32), {"plan": Plan(scratch_bytes=60_000)}),
    "rows repeat": Setup(with_rows("repeated")),
    "rows in any order": Setup(with_rows("shuffled")),
    "ragged": Setup(case(), cut=ragged),
    "ragged, padded": Setup(case(), cut=ragged, padding=5),
    "ragged, padded, float32": Setup(case(dtype=torch.float32), cut=ragged, padding=5),
    "one rank has all rows": Setup(case(), cut=all_on_the_last),
    "one rank has all rows, the others padding": Setup(case(), cut=all_on_the_last, padding=2),
    "fewer entries than ranks": Setup(case(v=1), cut=all_on_the_last),
    "a rank without a target": Setup(with_targets(lambda y: torch.where(y == IGNORED, y, y % 7))),
    "a rank without a target, kept": Setup(with_targets(lambda y: torch.where(y == IGNORED, y, y % 7)), KEEPS),
    "no scored token": Setup(with_targets(lambda y: torch.full_like(y, IGNORED))),
    "sure and hopeless": Setup(extreme(*FAR)),
    "sure and hopeless, float32": Setup(extreme(*LIFTS, dtype=torch.float32), KEEPS),
    "frozen head": Setup(case(), train=("hidden",)),
    "frozen backbone": Setup(case(), train=("weight", "bias")),
    "nothing trains": Setup(case(), train=()),
    "DTensor": Setup(case(), dtensor=True),
    "DTensor, rows in any order": Setup(with_rows("shuffled", dtype=torch.float32), dtensor=True),
    "kernels": Setup(case(dtype=torch.float32), kernels=True),
    "kernels, bfloat16": Setup(case(dtype=torch.bfloat16), kernels=True),
    "kernels, soft-cap, kept": Setup(case(dtype=torch.float32, logit_scale=0.7, softcap=5.0), KEEPS, kernels=True),
    "kernels, kept, padded": Setup(case(dtype=torch.float32), KEEPS, cut=ragged, padding=3, kernels=True),
    "kernels, sure and hopeless": Setup(extreme(*LIFTS, dtype=torch.float32), kernels=True),
    "kernels, sure and hopeless, kept": Setup(extreme(*LIFTS, dtype=torch.float32), KEEPS, kernels=True),
    **{
        f"{kernels}slices {by} apart, {dtype}{', kept' if keep else ''}": Setup(
            apart(by, dtype=getattr(torch, dtype)), KEEPS if keep else {}, cut=ragged, kernels=bool(kernels)
        )
        for kernels, dtype in (("", "float64"), ("kernels, ", "float32"))
        for by in (-110.0, 110.0)
        for keep in (False, True)
    },
}


def rows_of(setup: Setup, v: int, ranks: int) -> list[int]:
    """How many entries each rank has."""
    if setup.cut is not None:
        return setup.cut(v, ranks)
    size = -(-v // ranks)
    return [max(0, min(size, v - size * rank)) for rank in range(ranks)]


def padded(rows: Tensor, padding: int) -> Tensor:
    return torch.cat([rows, rows.new_full((padding, *rows.shape[1:]), torch.nan)])


def on_a_rank(setup: Setup, upstream: Tensor) -> Result:
    """The call of one rank, on new leaves."""
    whole, rank, ranks = setup.case(), dist.get_rank(), dist.get_world_size()
    v = whole.weight.shape[0]
    sizes = rows_of(setup, v, ranks)
    start, stop = sum(sizes[:rank]), sum(sizes[: rank + 1])
    mesh = init_device_mesh("cpu", (ranks,)) if setup.dtensor else None

    def leaf(name: str, tensor: Tensor | None) -> Any:
        if tensor is None:
            return None
        if name != "hidden" and mesh is not None:
            return nn.Parameter(distribute_tensor(tensor, mesh, [Shard(0)]))
        if name != "hidden":
            tensor = padded(tensor[start:stop], setup.padding)
            if setup.cut is None:  # as many rows on every rank: what the last ones lack is padding
                tensor = padded(tensor, -(-v // ranks) - (stop - start))
        return tensor.clone().requires_grad_(name in setup.train)

    leaves = {name: leaf(name, getattr(whole, name)) for name in ("hidden", "weight", "bias")}
    told = {} if setup.dtensor else {"vocab_size": v}
    if setup.cut is not None:
        told["vocab_range"] = (start, stop)
    logps = vocab_parallel_logps(
        leaves["hidden"], leaves["weight"], whole.targets, bias=leaves["bias"], **whole.options, **setup.options, **told
    )
    if logps.requires_grad:
        logps.backward(upstream.to(logps.dtype))
    local = {name: x.grad.to_local() if x.grad is not None and mesh and name != "hidden" else x.grad
             for name, x in leaves.items() if x is not None}  # fmt: skip
    return Result(logps.detach(), local["hidden"], local["weight"], local.get("bias"))


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """The elements that this rank gives to each of the collectives."""
    counts: dict[str, int] = {}
    originals = {"all_reduce": dist.all_reduce, "all_gather": dist.all_gather}

    def watched(name: str) -> Callable[..., Any]:
        def call(*tensors: Tensor, **options: Any) -> Any:
            counts[name] = counts.get(name, 0) + tensors[-1].numel()
            return originals[name](*tensors, **options)

        return call

    for name in originals:
        setattr(dist, name, watched(name))
    try:
        yield counts
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def work(names: tuple[str, ...]) -> dict[str, Found]:
    found = {}
    for name in names:
        setup = SETUPS[name]
        dispatch.why_not_triton = _kernels_serve if setup.kernels else _torch_serves
        upstream = normal_like(setup.case().targets)
        with counted() as travelled, Allocations() as made:
            result = on_a_rank(setup, upstream)
        found[name] = Found(result, dict(travelled), max((buffer.elements for buffer in made.buffers), default=0))
    return found


def _kernels_serve(head: Any) -> str | None:
    from orpo_kernels.kernels import triton_path

    return triton_path.supports(head, head.weight.device)


def _torch_serves(head: Any) -> str:
    return "for comparison"


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Callable[[str, int], list[Found]]:
    """Starts the processes once for each number of ranks, through all set-ups that the selected tests ask for."""
    asked = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]

    def of(name: str, ranks: int) -> list[Found]:
        names = tuple(p["name"] for p in asked if p.get("name") in SETUPS and p.get("ranks") == ranks)
        found = once_on_ranks(work, ranks, names)
        assert not isinstance(found, str), found
        return [rank[name] for rank in found]

    return of


def joined(setup: Setup, found: list[Found]) -> Result:
    """The ranks' results as one process's; all of them must have the same bits where they have the same numbers."""
    first = found[0].result
    sizes = rows_of(setup, setup.case().weight.shape[0], len(found))

    def rows(name: str) -> Tensor | None:
        parts = [getattr(rank.result, name) for rank in found]
        if parts[0] is None:
            assert all(part is None for part in parts)
            return None
        for part, size in zip(parts, sizes, strict=True):
            assert (part[size:] == 0).all()
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    for rank in found[1:]:
        assert torch.equal(rank.result.logps, first.logps)
        assert (rank.result.hidden is None) == (first.hidden is None)
        assert first.hidden is None or torch.equal(rank.result.hidden, first.hidden)
    return Result(first.logps, first.hidden, rows("weight"), rows("bias"))


# The interpreter is slow: on 4 ranks it runs what differs from 2.
ON_RANKS = [(name, ranks) for ranks in (2, 4) for name in SETUPS if ranks == 2 or "kernels, " not in name]


@pytest.mark.parametrize(("name", "ranks"), ON_RANKS)
def test_same_as_one_process(
    name: str, ranks: int, results: Callable[[str, int], list[Found]], monkeypatch: pytest.MonkeyPatch
):
    """Against float64: within the bound, or no further off than twice what one process is."""
    setup, found = SETUPS[name], results(name, ranks)
    monkeypatch.setattr(dispatch, "why_not_triton", _kernels_serve if setup.kernels else _torch_serves)
    whole = setup.case()
    upstream = normal_like(whole.targets)
    frozen = tuple({"hidden", "weight", "bias"} - set(setup.train))
    exact, got = evaluate_exact(whole, upstream), joined(setup, found)
    alone = evaluate(linear_logps, whole, upstream, frozen=frozen, **setup.options)
    size = max(1.0, largest_logit(whole) / 8)
    for part in ("logps", "hidden", "weight", "bias"):
        right, ours = getattr(exact, part), getattr(got, part)
        if right is None or (part != "logps" and part not in setup.train):
            assert ours is None, part
            continue
        assert ours.dtype == getattr(alone, part).dtype
        bound = BOUNDS[torch.float32 if part == "logps" and ours.dtype == torch.float32 else whole.hidden.dtype]
        error = relative_error(ours, right)
        assert error <= max(bound, 2 * relative_error(getattr(alone, part), right)), part
        if part in ("logps", "hidden"):  # a token that is sure, beside others that are not
            right, ours = (x.reshape(-1, 1 if part == "logps" else D) for x in (right, ours))
            assert row_errors(ours, right).max() <= 2 * bound * size, part
