"""What only a card can break: streams, graphs, tensor memory, the allocator, the library's products, real sizes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from orpo_kernels import Plan, linear_logps
from orpo_kernels.kernels import torch_path
from orpo_kernels.kernels.interface import Head, Tokens
from orpo_kernels.plan import MIB

triton_path = pytest.importorskip("orpo_kernels.kernels.triton_path", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

BF16 = torch.bfloat16
SIZES = (2000, 1024, 50000)


def operands(n: int, d: int, v: int, dtype: torch.dtype = BF16) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(n, d, device="cuda").to(dtype)
    weight = torch.randn(v, d, device="cuda").mul_(3 / d**0.5).to(dtype)
    return hidden, weight, torch.randint(v, (n,), device="cuda")


def step(
    hidden: Tensor, weight: Tensor, targets: Tensor, plan: Plan | None = None, trains: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probabilities and gradients of their weighted sum."""
    h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_(trains)
    logps = linear_logps(h, w, targets, plan=plan)
    (logps * torch.linspace(0.5, 1.5, len(logps), device="cuda")).sum().backward()
    assert h.grad is not None
    return logps.detach(), h.grad, w.grad


def reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same by full logits in float64."""
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logps = torch.log_softmax(h @ w.T, 1).gather(1, targets[:, None])[:, 0]
    (logps * torch.linspace(0.5, 1.5, len(logps), device="cuda")).sum().backward()
    assert h.grad is not None
    assert w.grad is not None
    return logps.detach(), h.grad, w.grad


def relative(got: Tensor | None, want: Tensor) -> float:
    assert got is not None
    return float((got.double() - want).norm() / want.norm())


def assert_right(
    got: tuple[Tensor, Tensor, Tensor | None], want: tuple[Tensor, Tensor, Tensor], rounding: float
) -> None:
    """rounding: of one number of the gradients' dtype; two are made on the way to one."""
    # 4096 products cut at 16 a time: 256 roundings of a logit, 6e-8 each.
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-5, atol=1e-4)
    assert relative(got[1], want[1]) <= 2 * rounding
    assert relative(got[2], want[2]) <= 2 * rounding


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
def test_float64(dtype: torch.dtype, keep: bool) -> None:
    inputs = operands(*SIZES, dtype)
    allowed = {BF16: 2.0**-9, torch.float16: 2.0**-11, torch.float32: 1e-5}[dtype]
    assert_right(step(*inputs, Plan(keep_logit_grads=keep)), reference(*inputs), allowed)


def test_the_same_bits_twice_and_on_another_stream() -> None:
    inputs = operands(*SIZES)
    first, second = step(*inputs), step(*inputs)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        third = step(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    for other in (second, third):
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_strides_that_descriptors_refuse() -> None:
    """Rows that begin at odd addresses, columns that do not lie side by side, rows of another width."""
    hidden, weight, targets = operands(300, 256, 5000)
    want = step(hidden, weight, targets)

    def shifted(x: Tensor, by: int) -> Tensor:
        """The same numbers, each row `by` numbers further into a wider one."""
        wider = torch.zeros(len(x), x.shape[1] + 2 * by, dtype=x.dtype, device="cuda")
        wider[:, by : by + x.shape[1]] = x
        return wider[:, by : by + x.shape[1]]

    for h, w in (
        (shifted(hidden, 1), weight),
        (hidden, shifted(weight, 3)),
        (shifted(hidden, 8), shifted(weight, 8)),
        (hidden.T.contiguous().T, weight.T.contiguous().T),
    ):
        got = step(h, w, targets)
        torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(got[1], want[1], rtol=2e-2, atol=1e-5)


def test_odd_sizes() -> None:
    for sizes in ((1, 8, 2), (65, 7, 257), (129, 576, 49152), (1, 4096, 32000), (300, 100, 50257)):
        inputs = operands(*sizes)
        want, got = reference(*inputs), step(*inputs)
        torch.testing.assert_close(got[0].double(), want[0], rtol=1e-5, atol=1e-4)
        assert relative(got[1], want[1]) <= 2.0**-8
        assert relative(got[2], want[2]) <= 2.0**-8


def test_entries_past_2_to_the_31() -> None:
    """A tile of exponentials of 2.5e9 numbers, kept ones too, and rows of hidden as far apart."""
    n, d, v = 16500, 64, 151936
    hidden, weight, targets = operands(n, d, v)
    far = torch.arange(n - 40, n, device="cuda")
    want = reference(hidden[far], weight, targets[far])[0]
    for plan in (Plan(scratch_bytes=8 << 30), Plan(scratch_bytes=8 << 30, keep_logit_grads=True)):
        assert plan.schedule(n, d, v, BF16, "cuda", train_weight=True, full_vocab_tiles=True).forward_chunk * v > 2**31
        got = step(hidden, weight, targets, plan)
        torch.testing.assert_close(got[0][far].double(), want, rtol=1e-5, atol=1e-4)
        once_more = step(hidden[far], weight, targets[far])
        # Another weight on each token: compare directions.
        cosine = torch.nn.functional.cosine_similarity(got[1][far].float(), once_more[1].float())
        assert (cosine > 0.999).all()


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("sizes", [(4096, 2048, 128256), (3000, 576, 49152)], ids=str)
def test_the_allocators_peak_is_within_the_plan(sizes: tuple[int, int, int], trains: bool, keep: bool) -> None:
    n, d, v = sizes
    plan = Plan(keep_logit_grads=keep)
    inputs = operands(*sizes)
    step(*inputs, plan, trains)  # the library's workspace
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(*inputs, plan, trains)
    peak = torch.cuda.max_memory_allocated() - before
    schedule = plan.schedule(n, d, v, BF16, "cuda", train_weight=trains, full_vocab_tiles=True)
    gradients = 2 * d * (n + v * trains)
    # The allocator rounds up to 2 MiB; a few numbers a token are the caller's own.
    assert peak <= schedule.scratch_bytes + schedule.saved_bytes + gradients + 16 * MIB
    assert schedule.scratch_bytes <= plan.budget("cuda")


def test_autocast_over_fp32_parameters() -> None:
    hidden, weight, targets = operands(*SIZES, torch.float32)
    with torch.autocast("cuda", dtype=BF16):
        got = step(hidden, weight, targets)
    want = step(hidden.to(BF16), weight.to(BF16), targets)
    assert torch.equal(got[0], want[0])
    assert got[2] is not None
    assert want[2] is not None
    assert got[2].dtype == torch.float32
    # Another product of the library's, rounded at its end.
    torch.testing.assert_close(want[2].float(), got[2], rtol=2.0**-8, atol=1e-5 * float(got[2].abs().max()))


def test_graph_capture_of_the_backends_functions() -> None:
    """A captured forward and gradient replay to the same bits; the call itself asks how many tokens are scored, which
    a capture refuses with an error of torch's own."""
    n, d, v = 500, 256, 5000
    hidden, weight, targets = operands(n, d, v)
    tokens, head = Tokens(hidden, None, targets), Head(weight, None, 1.0, None, BF16)
    plan = Plan().schedule(n, d, v, BF16, "cuda", train_weight=True, full_vocab_tiles=True)
    plan = dataclasses.replace(plan, forward_chunk=256, backward_block=2048)
    ones = torch.ones(n, device="cuda")

    def both() -> tuple[Tensor, Tensor, Tensor]:
        out = triton_path.forward(tokens, head, plan, True)
        return out.log_odds, out.u, triton_path.weight_gradient(tokens, head, ones, out.lse, None, plan, True, False)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        want = both()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = both()
    for result in got:
        result.fill_(torch.nan)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_captured_call_is_an_error() -> None:
    hidden, weight, targets = operands(50, 64, 500)
    linear_logps(hidden, weight, targets)
    with pytest.raises(RuntimeError, match=r"(?i)captur"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        linear_logps(hidden, weight, targets)
    torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_products_of_narrow_operands_have_wide_results(dtype: torch.dtype) -> None:
    assert torch_path.has_mixed_product(torch.device("cuda"), dtype)
    a, b = (torch.randint(-8, 9, (512, 512), device="cuda").to(dtype) for _ in range(2))
    exact = (a.double() @ b.double()).float()
    assert torch.equal(triton_path._add_product(None, a, b, torch.empty(512, 512, device="cuda", dtype=dtype)), exact)
    total = torch.ones(512, 512, device="cuda")
    assert triton_path._add_product(total, a, b, total) is total
    assert torch.equal(total, exact + 1)


def test_a_product_in_the_weights_dtype_is_rounded_once() -> None:
    """Of a short result and a long inner dimension, which the library cuts; its sums stay below 2^24."""
    before = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    a, b = (torch.randint(-8, 9, (65536, 256), device="cuda").to(BF16) for _ in range(2))
    out = torch.empty(256, 256, device="cuda", dtype=BF16)
    triton_path._product(a.t(), b, out)
    assert torch.equal(out, (a.double().T @ b.double()).to(BF16))
    assert torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction == before


def test_a_second_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    inputs = operands(300, 256, 5000)
    with torch.cuda.device(0):
        got = step(*(x.to("cuda:1") for x in inputs))
    want = step(*inputs)
    assert torch.equal(got[0].cpu(), want[0].cpu())
