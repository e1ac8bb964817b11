"""A head in slices: what travels, what is held, derivatives by differences, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from reference import IGNORED, evaluate_exact, make_case, normal_like, relative_error
from test_memory import Allocations
from test_vocab_parallel import counted
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from orpo_kernels import Plan, vocab_parallel_logps
from orpo_kernels.plan import MIB

CPU = torch.device("cpu")
TOKENS, D, VOCAB = 700, 48, 5002
PLANS = {"default": Plan(), "small": Plan(2 * MIB), "kept": Plan(2 * MIB, keep_logit_grads=MIB)}


def own_rows(weight: Tensor) -> Tensor:
    return weight.chunk(dist.get_world_size())[dist.get_rank()]


def once(plan: Plan, layout: str, dtype: torch.dtype = torch.float32) -> tuple[dict[str, int], Any, Any, Any]:
    """One step of a rank: elements given to collectives, allocations of forward and backward, the slice's schedule."""
    case = make_case((TOKENS,), D, VOCAB, dtype, CPU, ignored=0.0)
    hidden, weight = case.hidden.requires_grad_(), own_rows(case.weight).clone().requires_grad_()
    targets, rows = case.targets, None
    if layout == "ignored":
        targets = torch.cat([targets, torch.full_like(targets, IGNORED)])
        hidden = torch.cat([hidden, hidden]).detach().requires_grad_()
    elif layout == "repeated":
        rows = torch.arange(TOKENS).flip(0) // 2
    schedule = plan.schedule(
        TOKENS, D, len(weight), dtype, "cpu", train_weight=True, ranks=dist.get_world_size()
    )  # fmt: skip
    known = (hidden, weight, targets, rows)
    with counted() as travelled:
        with Allocations(*known) as forward:
            logps = vocab_parallel_logps(hidden, weight, targets, rows=rows, vocab_size=VOCAB, plan=plan)
        measured = [forward.scratch(), forward.largest()]
        upstream = torch.ones_like(logps)
        with Allocations(*known, upstream) as backward:
            gradients = torch.autograd.grad(logps, (hidden, weight), upstream)
        measured += [backward.scratch(), backward.largest()]
    largest = max(max(x.numel() for x in gradients), measured[1], measured[3])
    return dict(travelled), (measured[0], measured[2]), largest, schedule


def differences() -> bool:
    """Derivatives of what every rank gets, by what every rank puts in: all of them move the same number at a time."""
    case = make_case((2, 5), 4, 9, torch.float64, CPU, bias=True, softcap=4.0, logit_scale=0.7)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    sizes = [5, 9 - 5] if ranks == 2 else [9]
    start = sum(sizes[:rank])

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, whole: Tensor) -> Tensor:
            return whole[start : start + sizes[rank]].clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            whole = grad.new_zeros(9, *grad.shape[1:])
            whole[start : start + sizes[rank]] = grad
            dist.all_reduce(whole)
            return whole

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        told: dict[str, Any] = {"vocab_size": 9, "vocab_range": (start, start + sizes[rank])}
        return vocab_parallel_logps(
            hidden, Own.apply(weight), case.targets, bias=Own.apply(bias), softcap=4.0, logit_scale=0.7, **told
        )

    inputs = [x.clone().requires_grad_() for x in (case.hidden, case.weight, case.bias) if x is not None]
    return torch.autograd.gradcheck(function, inputs)


def parts_of_a_sum() -> tuple[Tensor, Tensor]:
    """Hidden's gradient added up by the caller, and in one process."""
    case = make_case((3, 5), 8, 20, torch.float64, CPU)
    hidden = case.hidden.clone().requires_grad_()
    logps = vocab_parallel_logps(
        hidden, own_rows(case.weight), case.targets, vocab_size=20, reduce_hidden_grad=False
    )  # fmt: skip
    (part,) = torch.autograd.grad(logps, hidden, normal_like(logps))
    dist.all_reduce(part)
    return part, evaluate_exact(case, normal_like(logps)).hidden


def refusal(**changes: Any) -> str:
    arguments: dict[str, Any] = {"vocab_size": 20} | changes
    weight = arguments.pop("weight", torch.zeros(10, 4))
    try:
        vocab_parallel_logps(torch.zeros(3, 4), weight, torch.tensor([1, 2, 19]), **arguments)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def refusals() -> dict[str, str]:
    mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
    whole = torch.zeros(20, 4)
    by_rows, by_columns = (distribute_tensor(whole, mesh, [Shard(dim)]) for dim in (0, 1))
    first = dist.new_group([0])
    return {
        **({"does not hold this process": refusal(group=first, vocab_size=10)} if rank else {}),
        "vocab_size is None": refusal(vocab_size=None),
        "vocab_size=21 is more than 2 ranks of 10 rows have": refusal(vocab_size=21),
        "vocab_range=(3, 30): it must be (start, stop) within [0, 20]": refusal(vocab_range=(3, 30)),
        "does not make up [0, 20): they are [0, 10), [0, 10)": refusal(vocab_range=(0, 10)),
        "they are [0, 9), [10, 20)": refusal(vocab_range=((0, 9), (10, 20))[rank]),
        "a target must lie in [0, 19)": refusal(vocab_size=19),
        "placements (Shard(dim=1),): it must be Shard(0)": refusal(weight=by_columns, vocab_size=None),
        "group or vocab_range was given beside a DTensor": refusal(weight=by_rows, group=dist.group.WORLD),
        "vocab_size=21: it must lie in [1, 20]": refusal(weight=by_rows, vocab_size=21),
    }


LAYOUTS = {"whole": TOKENS, "ignored": TOKENS, "repeated": TOKENS // 2}


def work() -> dict[str, Any]:
    found: dict[str, Any] = {layout: once(Plan(), layout) for layout in LAYOUTS}
    found |= {f"plan {name}": once(plan, "whole") for name, plan in PLANS.items()}
    found |= {"bfloat16": once(Plan(2 * MIB), "ignored", torch.bfloat16)}
    found |= {"gradcheck": differences(), "parts": parts_of_a_sum(), "refusals": refusals()}
    return found


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return run_on_ranks(work, 2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_elements_that_travel(layout: str, results: list[dict[str, Any]]):
    """The target's logit and the logsumexp of a token, and its gradient: of rows that repeat once."""
    for rank in results:
        assert rank[layout][0] == {"all_reduce": TOKENS + LAYOUTS[layout] * D, "all_gather": TOKENS + 2}


@pytest.mark.parametrize("name", [f"plan {name}" for name in PLANS] + ["bfloat16"])
def test_scratch_stays_within_the_plan_of_the_slice(name: str, results: list[dict[str, Any]]):
    for rank in results:
        _, scratch, largest, schedule = rank[name]
        assert max(scratch) <= schedule.scratch_bytes
        if name != "plan default":  # whose tiles may have as many elements
            assert largest < VOCAB * D


def test_gradcheck(results: list[dict[str, Any]]):
    assert all(rank["gradcheck"] for rank in results)


def test_hidden_gradient_in_parts(results: list[dict[str, Any]]):
    for rank in results:
        found, right = rank["parts"]
        assert relative_error(found, right) < 1e-12


def test_what_does_not_fit_is_named(results: list[dict[str, Any]]):
    for rank in results:
        for message, error in rank["refusals"].items():
            assert message in error


def test_without_a_process_group():
    with pytest.raises(RuntimeError, match="needs a process group"):
        vocab_parallel_logps(torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.int64), vocab_size=5)
