"""Scratch stays within the budget and the report of what is saved is right: every allocation is watched.

Fake tensors have sizes and no memory, so that real shapes can be run through; a dispatch mode sees what is
allocated and when it is freed. What a kernel allocates inside itself is not seen.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from reference import IGNORED, evaluate, make_case, normal_like
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from orpo_kernels import Plan, linear_logps, linear_token_stats
from orpo_kernels.autograd import HeadOptions
from orpo_kernels.kernels import dispatch as backend
from orpo_kernels.kernels import torch_path, torch_products
from orpo_kernels.kernels.statistics import NO_STATISTICS, Statistics
from orpo_kernels.linear_logps import scored_token_stats
from orpo_kernels.plan import CPU_LIBRARY_BYTES, MIB, Schedule
from orpo_kernels.tokens import RowGroups, ScoredTokens


@dataclass
class Buffer:
    nbytes: int
    elements: int
    born: int
    died: int | None = None


class Allocations(TorchDispatchMode):
    """Records every storage that is made while the mode is on, other than those of `known` tensors."""

    def __init__(self, *known: Tensor | None) -> None:
        super().__init__()
        self.buffers: list[Buffer] = []
        self._time = 0
        self._live: dict[int, tuple[StorageWeakRef, Buffer]] = {}
        # Weak references are held, so that no later storage gets the same address.
        self._known = [StorageWeakRef(x.untyped_storage()) for x in known if x is not None]
        self._known_keys = {reference.cdata for reference in self._known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._bury()
        out = func(*args, **(kwargs or {}))
        # What an operation is given was there before, such as what autograd saved.
        given = {
            StorageWeakRef(x.untyped_storage()).cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)
        }
        for x in tree_leaves(out):
            if not isinstance(x, Tensor):
                continue
            storage = x.untyped_storage()
            reference = StorageWeakRef(storage)
            if reference.cdata in self._live or reference.cdata in self._known_keys or reference.cdata in given:
                continue
            buffer = Buffer(storage.nbytes(), storage.nbytes() // x.itemsize, self._time)
            self.buffers.append(buffer)
            self._live[reference.cdata] = (reference, buffer)
        self._time += 1
        return out

    def _bury(self) -> None:
        for key, (reference, buffer) in list(self._live.items()):
            if reference.expired():
                buffer.died = self._time
                del self._live[key]

    def scratch(self) -> int:
        """The most bytes that were alive at once of buffers that did not outlive the mode."""
        self._bury()
        steps = []
        for buffer in self.buffers:
            if buffer.died is not None:
                steps += [(buffer.born, buffer.nbytes), (buffer.died, -buffer.nbytes)]
        alive = most = 0
        # At equal times the freed come first: they were gone before the operation of that time.
        for _, change in sorted(steps):
            alive += change
            most = max(most, alive)
        return most

    def largest(self) -> int:
        """The elements of the largest buffer that did not outlive the mode."""
        self._bury()
        return max((buffer.elements for buffer in self.buffers if buffer.died is not None), default=0)


@dataclass(frozen=True)
class Shapes:
    """Everything about a call but the numbers."""

    tokens: int
    hidden_size: int
    vocab_size: int
    dtype: torch.dtype
    device: str = "cpu"
    train: tuple[str, ...] = ()
    plan: Plan = field(default_factory=Plan)
    # "ignored": half the rows of hidden are scored; "whole": all of them; "repeated": two tokens a row.
    layout: str = "ignored"
    bias: bool = False
    softcap: float | None = None
    autocast: torch.dtype | None = None
    rank: int = 0
    statistics: Statistics = NO_STATISTICS


@dataclass(frozen=True)
class Measured:
    schedule: Schedule
    forward: int
    backward: int
    largest: int


@pytest.fixture
def torch_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch backend, with the costlier answer to what depends on numbers."""
    monkeypatch.setattr(torch, "equal", lambda a, b: False)
    monkeypatch.setattr(backend, "why_not_triton", lambda head: "there is no memory to launch a kernel on")


@pytest.fixture
def fake(torch_backend: None) -> Iterator[None]:
    """Fake CPU tensors."""
    torch_products.has_mixed_product(torch.device("cpu"), torch.bfloat16)  # Found out on real ones, and cached.
    with FakeTensorMode():
        yield


@pytest.fixture
def fake_gpu(torch_backend: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """A device without memory that is not a CPU, with a GPU's product of 16-bit operands."""
    monkeypatch.setattr(torch_products, "has_mixed_product", lambda device, dtype: True)
    monkeypatch.setattr(torch, "autocast", lambda device_type, enabled: contextlib.nullcontext())
    return "meta"


def measure(s: Shapes) -> Measured:
    """Run forward, and backward if anything trains, and watch."""
    n, v = s.tokens, s.vocab_size

    def floats(*shape: int, train: str = "") -> Tensor:
        return torch.zeros(shape, dtype=s.dtype, device=s.device, requires_grad=train in s.train)

    def integers(size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.int64, device=s.device)

    num_rows = {"ignored": 2 * n, "whole": n, "repeated": n}[s.layout]
    hidden = floats(num_rows, s.hidden_size + s.rank, train="hidden")
    weight = floats(v, s.hidden_size, train="weight")
    bias = floats(v, train="weight") if s.bias else None
    adapter = floats(v, s.rank, train="adapter") if s.rank else None
    targets, rows = integers(n), None if s.layout == "whole" else integers(n)
    groups = None
    if s.layout == "repeated":
        unique, starts, counts = (integers(-(-n // 2)) for _ in range(3))
        groups = RowGroups(integers(n), unique, starts, counts, largest=2)
    options = HeadOptions(0.5, s.softcap, s.autocast or s.dtype, s.plan)
    schedule = s.plan.schedule(
        n,
        s.hidden_size + s.rank,
        v,
        options.compute_dtype,
        s.device,
        train_hidden="hidden" in s.train,
        train_weight="weight" in s.train or "adapter" in s.train,
        softcap=s.softcap is not None,
        has_adapter=adapter is not None,
        statistics=s.statistics,
    )
    inputs = [hidden, weight, bias, adapter, targets, rows, *(groups[:4] if groups is not None else ())]
    with Allocations(*inputs) as forward:
        scored = ScoredTokens(rows if s.layout == "ignored" else None, targets, rows, groups)
        found = scored_token_stats(hidden, weight, bias, scored, torch.Size([num_rows]), options, adapter, s.statistics)
    # Now, while what is saved is still held.
    forward_scratch, forward_largest = forward.scratch(), forward.largest()
    if not s.train:
        return Measured(schedule, forward_scratch, 0, forward_largest)
    results = [found.logps, *([found.entropy] if s.statistics.entropy_grad else [])]
    upstream = [torch.ones_like(x) for x in results]
    with Allocations(*inputs, *upstream) as backward:
        trained = [x for x in (hidden, weight, bias, adapter) if x is not None and x.requires_grad]
        gradients = torch.autograd.grad(results, trained, upstream)
    measured = Measured(schedule, forward_scratch, backward.scratch(), max(forward_largest, backward.largest()))
    del gradients
    return measured


def assert_within_budget(s: Shapes) -> Measured:
    measured = measure(s)
    budget = s.plan.budget(s.device)
    # The BLAS library's own buffers are part of the budget, and not seen here.
    library = min(CPU_LIBRARY_BYTES, budget // 3) if s.device == "cpu" else 0
    used = max(measured.forward, measured.backward)
    assert used <= measured.schedule.scratch_bytes - library, (used, measured)
    assert measured.schedule.scratch_bytes <= budget
    return measured


TRAIN = {"evaluation": (), "frozen head": ("hidden",), "trained head": ("hidden", "weight"), "head only": ("weight",)}
# (N, D, V): one token, a small model's batch, very many tokens, a wide one.
SIZES = [(1, 4096, 32000), (1000, 768, 8000), (20_000, 8, 1000), (1500, 4096, 3000)]


@pytest.mark.parametrize("train", TRAIN.values(), ids=TRAIN)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float64, marks=pytest.mark.exhaustive)], ids=str
)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_default_budget(size: tuple[int, int, int], dtype: torch.dtype, train: tuple[str, ...], fake: None) -> None:
    n, d, v = size
    measured = assert_within_budget(Shapes(n, d, v, dtype, train=train))
    if n > 1:
        assert measured.largest < n * v
    # Not so cautious that most of the budget lies idle where it is asked for.
    if n == 1500 and train:
        assert max(measured.forward, measured.backward) >= measured.schedule.scratch_bytes / 4


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap, bias": {"softcap": 30.0, "bias": True},
    "all scored": {"layout": "whole"},
    "repeated rows": {"layout": "repeated"},
    "autocast": {"autocast": torch.bfloat16},
    "adapter": {"rank": 16},
}


# What trains, and what is kept.
MODES: dict[str, tuple[tuple[str, ...], bool | int]] = {
    "evaluation": ((), False),
    "frozen head": (("hidden",), False),
    "trained head": (("hidden", "weight"), False),
    "trained head, kept": (("hidden", "weight"), True),
    "head only, some kept": (("weight",), 400_000),
}


def mode_of(variant: dict[str, Any], mode: tuple[tuple[str, ...], bool | int]) -> tuple[tuple[str, ...], bool | int]:
    """With an adapter, it is what trains of the head."""
    train, keep = mode
    return tuple("adapter" if name == "weight" and variant.get("rank") else name for name in train), keep


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.exhaustive)], ids=str)
def test_small_budget(
    dtype: torch.dtype, variant: dict[str, Any], mode: tuple[tuple[str, ...], bool | int], fake: None
) -> None:
    train, keep = mode_of(variant, mode)
    plan = Plan(scratch_bytes=2 * MIB, keep_logit_grads=keep)
    measured = assert_within_budget(Shapes(400, 256, 2000, dtype, train=train, plan=plan, **variant))
    assert measured.largest < 400 * 2000


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_products_of_16_bit_operands(
    variant: dict[str, Any], mode: tuple[tuple[str, ...], bool | int], fake_gpu: str
) -> None:
    """fp16 on a GPU: products that make their own results, operands that are copies."""
    train, keep = mode_of(variant, mode)
    low = torch.float16
    dtype = low
    if "autocast" in variant:
        dtype, variant = torch.float32, {"autocast": low}
    for scratch in (None, 16 * MIB):
        plan = Plan(scratch_bytes=scratch, keep_logit_grads=keep)
        shapes = Shapes(1500, 512, 20000, dtype, device=fake_gpu, train=train, plan=plan, **variant)
        assert_within_budget(shapes)


STATISTICS = {"statistics": Statistics(True, True, True, True), "bias": True}
ENTROPY_GRAD = {
    "statistics": Statistics(True, True, True, True, entropy_grad=True),
    "softcap": 30.0,
    "layout": "repeated",
}


@pytest.mark.parametrize(
    ("dtype", "variant", "mode"),
    [
        (torch.bfloat16, STATISTICS, "evaluation"),
        (torch.float32, STATISTICS, "trained head, kept"),
        (torch.bfloat16, ENTROPY_GRAD, "trained head"),
        (torch.float32, ENTROPY_GRAD, "trained head, kept"),
    ],
)
def test_small_budget_with_statistics(dtype: torch.dtype, variant: dict[str, Any], mode: str, fake: None) -> None:
    train, keep = MODES[mode]
    plan = Plan(scratch_bytes=2 * MIB, keep_logit_grads=keep)
    measured = assert_within_budget(Shapes(400, 256, 2000, dtype, train=train, plan=plan, **variant))
    assert measured.largest < 400 * 2000
    assert (measured.schedule.keep_rows > 0) == (bool(keep) and variant is STATISTICS)


@pytest.mark.parametrize("variant", [STATISTICS, ENTROPY_GRAD], ids=["statistics", "entropy's gradient"])
def test_statistics_of_16_bit_products(variant: dict[str, Any], fake_gpu: str) -> None:
    plan = Plan(scratch_bytes=16 * MIB)
    train = ("hidden", "weight")
    assert_within_budget(Shapes(1500, 512, 20000, torch.float16, device=fake_gpu, train=train, plan=plan, **variant))


@pytest.mark.parametrize("tokens", [1, 2, 10, 100, 1000, 10_000, 100_000])
def test_any_number_of_tokens(tokens: int, fake: None) -> None:
    """From 1 to 10^5 tokens, 8 MiB are enough."""
    plan = Plan(scratch_bytes=8 * MIB)
    assert_within_budget(Shapes(tokens, 64, 300, torch.float32, train=("hidden", "weight"), plan=plan))


@pytest.mark.parametrize("layout", ["ignored", "whole", "repeated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_of_many_hidden_rows(dtype: torch.dtype, layout: str, fake: None) -> None:
    """[N, D] far larger than the budget: the gradient of hidden is made piece by piece."""
    shapes = Shapes(8000, 512, 300, dtype, train=("hidden",), plan=Plan(scratch_bytes=2 * MIB), layout=layout)
    measured = assert_within_budget(shapes)
    assert 4 * measured.schedule.scratch_bytes < 8000 * 512 * 4


def test_fake_tensors_tell_the_truth(torch_backend: None) -> None:
    """The same call on real tensors allocates the same."""
    shapes = Shapes(
        300, 32, 1500, torch.bfloat16, train=("hidden", "weight"), plan=Plan(scratch_bytes=MIB), softcap=9.0
    )
    real = measure(shapes)
    with FakeTensorMode():
        assert measure(shapes) == real


def test_a_buffer_that_is_held_too_long_is_seen(monkeypatch: pytest.MonkeyPatch, fake: None) -> None:
    """The watch works: with a copy of each widened block of the weight held until the next chunk, the budget breaks."""
    held: list[Tensor] = []
    real = torch_products.Products.weight_rows

    def weight_rows(self: Any, columns: slice) -> Tensor:
        if columns.start == 0:
            held.clear()
        rows = real(self, columns)
        held.append(rows.clone())
        return rows

    shapes = Shapes(400, 256, 2000, torch.bfloat16, plan=Plan(scratch_bytes=2 * MIB))
    assert_within_budget(shapes)
    monkeypatch.setattr(torch_products.Products, "weight_rows", weight_rows)
    with pytest.raises(AssertionError), torch.no_grad():
        assert_within_budget(shapes)


# ---------------------------------------------------------------------------- saved


SAVED: dict[str, tuple[tuple[str, ...], bool | int]] = {
    "evaluation": ((), False),
    "frozen head": (("hidden",), False),
    "trained head": (("hidden", "weight"), False),
    "head only": (("weight",), False),
    "trained head, kept": (("hidden", "weight"), True),
    "trained head, some kept": (("hidden", "weight"), 10_000),
}


def bytes_saved(case: Any, train: tuple[str, ...], plan: Plan, function: Callable[..., Tensor] = linear_logps) -> int:
    """What autograd holds of a call, the inputs aside, each storage once."""
    inputs = [x for x in (case.hidden, case.weight, case.targets, case.rows) if x is not None]
    for name in ("hidden", "weight"):
        getattr(case, name).requires_grad_(name in train)
    known = {x.untyped_storage().data_ptr() for x in inputs}
    seen: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            seen[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        logps = function(case.hidden, case.weight, case.targets, rows=case.rows, plan=plan)
    assert logps.requires_grad == bool(train)
    return sum(seen.values())


@pytest.mark.parametrize(("train", "keep"), SAVED.values(), ids=SAVED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_saved_bytes_are_as_reported(
    dtype: torch.dtype, train: tuple[str, ...], keep: bool | int, device: torch.device
) -> None:
    case = make_case((200,), 24, 150, dtype, device)
    plan = Plan(scratch_bytes=1 << 18, keep_logit_grads=keep)
    n = int((case.targets != IGNORED).sum())
    assert 0 < n < 200
    schedule = plan.schedule(n, 24, 150, dtype, device, train_hidden="hidden" in train, train_weight="weight" in train)
    saved = bytes_saved(case, train, plan)
    if device.type == "cpu":
        assert saved == schedule.saved_bytes
    else:
        # Triton's tiles pad their rows, and it holds a chunk's reference once.
        assert saved <= 1.5 * schedule.saved_bytes
    assert (schedule.keep_rows > 0) == bool(keep)
    assert (schedule.keep_rows < n) == (keep is not True)
    # Where every token is scored, targets and rows are inputs, and log-probs need no place found.
    whole = make_case((200,), 24, 150, dtype, device, ignored=0.0)
    schedule = plan.schedule(
        200, 24, 150, dtype, device, train_hidden="hidden" in train, train_weight="weight" in train
    )
    wide = max(4, dtype.itemsize)
    inputs = 200 * (8 * (2 if "weight" in train else 1) + wide) if train else 0
    if device.type == "cpu":
        assert bytes_saved(whole, train, plan) == schedule.saved_bytes - inputs


@pytest.mark.parametrize("train", [("hidden",), ("hidden", "weight"), ("weight",)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_bytes_with_a_gradient_of_the_entropy(dtype: torch.dtype, train: tuple[str, ...]) -> None:
    case = make_case((200,), 24, 150, dtype, torch.device("cpu"))
    plan = Plan(keep_logit_grads=True)
    schedule = plan.schedule(
        int((case.targets != IGNORED).sum()), 24, 150, dtype, "cpu", train_hidden="hidden" in train,
        train_weight="weight" in train, statistics=Statistics(entropy=True, entropy_grad=True),
    )  # fmt: skip

    def entropy(*args: Tensor, **options: Any) -> Tensor:
        return linear_token_stats(*args, **options, statistics=["entropy"], entropy_grad=True).entropy

    assert bytes_saved(case, train, plan, entropy) == schedule.saved_bytes
    assert schedule.keep_rows == 0


def test_saved_bytes_with_repeated_rows(device: torch.device) -> None:
    """What groups them, and a place for each, come to at most the 40 bytes a token that are documented."""
    case = make_case((200,), 24, 150, torch.bfloat16, device)
    case = dataclasses.replace(case, rows=torch.arange(200, device=device) // 2)
    n = int((case.targets != IGNORED).sum())
    train = ("hidden", "weight")
    reported = Plan().schedule(n, 24, 150, torch.bfloat16, device, train_weight=True).saved_bytes
    saved = bytes_saved(case, train, Plan())
    assert reported < saved <= reported + 40 * n


@pytest.mark.skipif(not torch.cuda.is_available(), reason="watches the allocator of a GPU")
@pytest.mark.parametrize("train", TRAIN.values(), ids=TRAIN)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_peak_on_a_gpu(dtype: torch.dtype, train: tuple[str, ...]) -> None:
    """The allocator's own peak: scratch, what is saved, and the results."""
    n, d, v = 4096, 1024, 40000
    case = make_case((n,), d, v, dtype, torch.device("cuda"))
    frozen = tuple({"hidden", "weight"} - set(train))
    plan = Plan(scratch_bytes=128 * MIB)

    def peak() -> int:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        evaluate(linear_logps, case, frozen=frozen, plan=plan)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    peak()  # The first call makes the library's workspace.
    scored = int((case.targets != IGNORED).sum())
    schedule = plan.schedule(
        scored, d, v, dtype, "cuda", train_hidden="hidden" in train, train_weight="weight" in train
    )
    leaves = case.hidden.nbytes + case.weight.nbytes
    gradients = sum(getattr(case, name).nbytes for name in train)
    numbers = 16 * 4 * n
    assert peak() <= plan.budget("cuda") + schedule.saved_bytes + leaves + gradients + numbers


# ------------------------------------------------------------------------------ kept


@pytest.mark.parametrize("retain_graph", [False, True])
def test_kept_values_go_as_the_gradient_comes(retain_graph: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Part by part, unless the graph is kept; parts change no number."""
    monkeypatch.setattr(torch_path, "_PART", 1)  # a part for every block
    case = make_case((200,), 24, 3000, torch.float32, torch.device("cpu"))
    case.weight.requires_grad_()
    upstream = normal_like(case.targets).float()
    parts: list[StorageWeakRef] = []

    def pack(x: Tensor) -> Tensor:
        if x.shape[-1:] == (1024,):
            parts.append(StorageWeakRef(x.untyped_storage()))
        return x

    alive: list[int] = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            alive.append(sum(not part.expired() for part in parts))
            return func(*args, **(kwargs or {}))

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        logps = linear_logps(case.hidden, case.weight, case.targets, plan=Plan(keep_logit_grads=True))
    assert len(parts) == 2  # and a narrower third
    with Count():
        logps.backward(upstream, retain_graph=retain_graph)
    assert alive[0] == 2
    assert alive[-1] == (2 if retain_graph else 0)
    first = case.weight.grad.clone()
    if retain_graph:
        case.weight.grad = None
        logps.backward(upstream)
        assert torch.equal(case.weight.grad, first)
    monkeypatch.undo()
    case.weight.grad = None
    whole = linear_logps(case.hidden, case.weight, case.targets, plan=Plan(keep_logit_grads=True))
    whole.backward(upstream)
    assert torch.equal(case.weight.grad, first)
