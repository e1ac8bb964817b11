"""Stage `smoke`: right on this card? and at what share of the library's rate? In order of what would stop us first."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from benchmarks.gpu import warm
from benchmarks.gpu.common import (
    BF16,
    CUDA,
    DEVICE,
    FP32,
    HEADLINE,
    Record,
    make,
    milliseconds,
    relative,
    synchronize,
    teraflops,
    truth,
)
from orpo_kernels import Plan, Schedule
from orpo_kernels.kernels import configs, triton_launch, triton_path
from orpo_kernels.kernels.configs import TileConfig
from orpo_kernels.kernels.interface import Head, Tokens
from orpo_kernels.kernels.triton_launch import Launcher
from orpo_kernels.linear_logps import head_options, scored_logps
from orpo_kernels.plan import MIB
from orpo_kernels.tokens import select_scored

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias, scale, rows": {"bias": True, "scale": 0.5, "rows": True},
    "soft-cap, bias": {"softcap": 5.0, "bias": True},
    "large logits": {"spread": 60.0},
}
TINY = TileConfig(32, 64, 32, 4, 2, 2)


def environment() -> dict[str, Any]:
    found: dict[str, Any] = {"torch": torch.__version__, "triton": triton.__version__, "device": str(DEVICE)}
    if CUDA:
        card = torch.cuda.get_device_properties(0)
        query = "clocks.sm,clocks.mem,power.limit,temperature.gpu,driver_version"
        found |= {
            "device": card.name,
            "multiprocessors": card.multi_processor_count,
            "memory_bytes": card.total_memory,
            "capability": torch.cuda.get_device_capability(),
            "mixed mm": triton_path.has_mixed_product(DEVICE, BF16),
            "nvidia-smi": subprocess.run(
                ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
                capture_output=True, text=True, check=False,
            ).stdout.strip(),
        }  # fmt: skip
    print(found, flush=True)
    return found


def shapes() -> list[TileConfig]:
    """The three most promising tile shapes of the card, best guess first."""
    if not CUDA:
        return [TINY, TINY._replace(persistent=True)]
    target = configs.target_of(DEVICE)
    assert target is not None
    found = configs.candidates(target, BF16)
    return [found[0], found[1], next(c for c in found if not c.persistent)]


def small_cases() -> Iterator[tuple[tuple[int, int, int], str, torch.dtype, TileConfig | None, int]]:
    for kind in KINDS:
        for dtype in (BF16, FP32):
            for config in (None, TINY, *((TINY._replace(persistent=True),) if dtype == BF16 else ())):
                keep = 0 if config is None else 15
                yield (300, 192, 1000) if CUDA else (33, 40, 150), kind, dtype, config, keep
                if CUDA and (config is None or not config.persistent):
                    yield (65, 72, 257), kind, dtype, config, keep


def schedule(sizes: tuple[int, int, int], dtype: torch.dtype, **options: Any) -> Schedule:
    return Plan().schedule(*sizes, dtype, DEVICE, train_weight=True, full_vocab_tiles=True, **options)


def errors(
    tokens: Tokens, head: Head, plan: Schedule, config: TileConfig | None, pick: Tensor
) -> tuple[dict[str, float], dict[str, float]]:
    """Of a forward and, where every token is picked, a gradient, against float64; and those that are too large."""
    n, d = tokens.targets.numel(), head.weight.shape[1]
    out = triton_path.forward(tokens, head, plan, True, config=config)
    alone = triton_path.forward(tokens, head, plan, False, config=config)
    want, u = truth(tokens, head, pick), out.u
    assert u is not None
    found = {
        "log_odds": float((out.log_odds[pick] - want.log_odds).abs().max()),
        "log_odds of sums": float((alone.log_odds[pick] - want.log_odds).abs().max()),
        "u": relative(u[pick], want.u),
    }
    if pick.numel() == n:
        c_s = torch.rand(n, device=DEVICE) * torch.sigmoid(-want.log_odds).float()
        d_weight, d_bias, _ = triton_path.weight_gradient(
            tokens, head, c_s, out.lse, out.kept, plan, True, head.bias is not None, config=config
        )
        g = c_s.double()[:, None] * want.g
        assert d_weight is not None
        found["weight"] = relative(d_weight, g.T @ want.hidden)
        if d_bias is not None:
            found["bias"] = relative(d_bias, g.sum(0))
    # fp32 roundings of a logit; tensor cores may cut each partial sum of 16 products.
    near = max(1.0, float(want.lse.abs().max())) * (3e-6 + d / 16 * 2.0**-24)
    bf16 = head.compute_dtype == BF16
    limits = {"log_odds": near, "log_odds of sums": near, "u": 6e-3 if bf16 else 3e-5}
    limits |= dict.fromkeys(("weight", "bias"), 0.008 if bf16 else 3e-05)
    return found, {name: x for name, x in found.items() if not x <= limits[name]}


def integers() -> dict[str, Any]:
    """Operands in [-8, 8] and D = 512: sums below 2^24 are exact in any order, so bits must agree."""
    n, d, v = (300, 512, 2000) if CUDA else (40, 64, 150)
    tokens, head = make((n, d, v), integers=True)
    head = head._replace(logit_scale=2.0**-9)
    h, w = tokens.hidden, head.weight
    exact = (h.double() @ w.double().T).float()
    found: dict[str, Any] = {}
    if CUDA:
        found["mm to fp32"] = torch.equal(torch.mm(h, w.T, out_dtype=FP32), exact)
        total = torch.ones(n, v, device=DEVICE)
        torch.addmm(total, h, w.T, out_dtype=FP32, out=total)
        found["addmm to fp32 in place"] = torch.equal(total, exact + 1)
        long, other = (torch.randint(-8, 9, (65536, 256), device=DEVICE).to(BF16) for _ in range(2))
        narrow = torch.empty(256, 256, dtype=BF16, device=DEVICE)
        triton_path._product(long.t(), other, narrow)
        found["mm rounded once"] = torch.equal(narrow, (long.double().T @ other.double()).to(BF16))
    tiles = {}
    for config in [TINY, *shapes()]:
        launch = Launcher(head, config)
        base = launch.targets(h, None, tokens.targets)[2]
        tile, g = (triton_launch.tile_buffer(n, v, BF16, DEVICE, config).fill_(torch.nan) for _ in range(2))
        launch.sums(h, None, tokens.targets, base, tile)
        launch.gradient(h, tokens.targets, torch.ones_like(base), base, g, None)
        tiles[config] = (tile[:, :v], g[:, :v])
    first = tiles[TINY]
    for config, pair in tiles.items():
        found[str(tuple(config))] = all(torch.equal(a, b) for a, b in zip(pair, first, strict=True))
    t = (exact.double() - exact.double().gather(1, tokens.targets[:, None])) * head.logit_scale
    want = torch.exp(t).scatter(1, tokens.targets[:, None], 0.0)
    found["exponentials, relative error"] = relative(first[0], want)
    print("  ", found, flush=True)
    wrong = [name for name, x in found.items() if x is False]
    if wrong or not found["exponentials, relative error"] < 3e-3:
        raise ArithmeticError(f"bits differ: {wrong}")
    return found


def small() -> dict[str, Any]:
    found, wrong = {}, {}
    for sizes, kind, dtype, config, keep in small_cases():
        name = f"{sizes} {kind} {str(dtype)[6:]} {'default' if config is None else tuple(config)} keep {keep}"
        tokens, head = make(sizes, dtype, **KINDS[kind])
        plan = replace(schedule(sizes, dtype, softcap=head.softcap is not None), keep_rows=keep)
        plan = replace(plan, forward_chunk=max(1, sizes[0] // 2 - 3), backward_block=max(64, sizes[2] // 3))
        try:
            found[name], bad = errors(tokens, head, plan, config, torch.arange(sizes[0], device=DEVICE))
        except Exception as error:  # the other cases still tell something
            bad = {"error": f"{type(error).__name__}: {str(error)[:300]}"}  # type: ignore[dict-item]
        if bad:
            wrong[name] = bad
            print("   WRONG", name, bad, flush=True)
    worst = {key: max(e[key] for e in found.values() if key in e) for key in ("log_odds", "u", "weight", "bias")}
    print(f"   {len(found)} cases, {len(wrong)} wrong, worst {worst}", flush=True)
    if wrong:
        raise ArithmeticError(f"{len(wrong)} cases: {list(wrong)[:5]}")
    return {"cases": len(found), "worst": worst}


def headline() -> dict[str, Any]:
    """The real size, and tiles whose entries lie past 2^31, against float64 at a few tokens."""
    cases: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {"headline": (HEADLINE, {})}
    if CUDA:
        cases["tile past 2^31"] = ((16384, 256, 151936), {"forward_chunk": 16384})
    found = {}
    for name, (sizes, change) in cases.items():
        tokens, head = make(sizes)
        n = sizes[0]
        pick = torch.tensor([0, 1, n // 2, n - 2, n - 1], device=DEVICE)
        found[name], bad = errors(tokens, head, replace(schedule(sizes, BF16), **change), None, pick)
        print("  ", name, found[name], "WRONG" if bad else "", flush=True)
        if bad:
            raise ArithmeticError(f"{name}: {bad}")
    return found


def library() -> dict[str, Any]:
    """What the library makes of the products that the loss needs: the denominator."""
    n, d, v = HEADLINE
    found: dict[str, Any] = {}

    def rate(name: str, operations: float, call: Any) -> None:
        try:
            ms = milliseconds(call)
        except (RuntimeError, TypeError) as error:  # what this version of torch lacks
            found[name] = {"error": str(error)[:200]}
            print(f"   {name:<44} {found[name]['error']}", flush=True)
            return
        found[name] = {"ms": ms, "tflops": teraflops(operations, ms)}
        print(f"   {name:<44}{ms:10.3f} ms {found[name]['tflops']:8.1f} TFLOP/s", flush=True)

    to32: dict[str, Any] = {"out_dtype": FP32} if CUDA else {}
    weight = make((1, d, v), seed=2)[1].weight
    if CUDA:
        a = torch.randn(8192, 8192, device=DEVICE).to(BF16)
        rate("8192^3", 2 * 8192**3, lambda: a @ a)
        source = torch.empty(1 << 30, dtype=torch.int8, device=DEVICE)
        target = torch.empty_like(source)
        found["copy TB/s"] = 2 * source.numel() / milliseconds(lambda: target.copy_(source)) / 1e9
        print(f"   copy {found['copy TB/s']:.2f} TB/s", flush=True)
        del a, source, target
    for c in (512, 1024, 1280, 2048) if CUDA else (16,):
        h = torch.randn(c, d, device=DEVICE).to(BF16)
        e = torch.rand(c, -(-v // 256) * 256, device=DEVICE).to(BF16)[:, :v]
        rate(f"logits [{c}, D] W^T to bf16", 2 * c * d * v, lambda h=h: torch.mm(h, weight.T))
        rate(f"E W [{c}, V] [V, D] to fp32", 2 * c * d * v, lambda e=e: torch.mm(e, weight, **to32))
    for vb in (4096, 8192, 16384) if CUDA else (100,):
        g, h = torch.randn(n, vb, device=DEVICE).to(BF16), torch.randn(n, d, device=DEVICE).to(BF16)
        wide, narrow = torch.empty(vb, d, device=DEVICE), torch.empty(vb, d, device=DEVICE, dtype=BF16)
        rate(f"G^T H of {vb} entries to fp32", 2 * n * d * vb, lambda g=g, h=h: torch.mm(g.t(), h, **to32))
        rate("   the same to bf16", 2 * n * d * vb, lambda g=g, h=h, out=narrow: torch.mm(g.t(), h, out=out))
        rate("   rounding it", 0.0, lambda a=wide, out=narrow: out.copy_(a))
    return found


def time_tiles(config: TileConfig, c: int, block: int) -> dict[str, Any]:
    """Of one shape on a chunk of `c` tokens, and of the gradient on all tokens and `block` entries."""
    n, d, v = HEADLINE
    tokens, head = make((n, d, v), seed=3)
    launch, part = Launcher(head, config), Launcher(head, config, slice(0, block))
    tile = triton_launch.tile_buffer(c, v, BF16, DEVICE, config)
    g = triton_launch.tile_buffer(n, block, BF16, DEVICE, config)
    h, y = tokens.hidden[:c], tokens.targets[:c]
    base = launch.targets(tokens.hidden, None, tokens.targets)[2]
    calls: dict[str, tuple[int, Any]] = {
        "exponentials": (c * v, lambda: launch.sums(h, None, y, base[:c], tile)),
        "sums": (c * v, lambda: launch.sums(h, None, y, base[:c], None)),
        "gradient": (n * block, lambda: part.gradient(tokens.hidden, tokens.targets, base, base, g, None)),
    }
    found = {}
    for name, (logits, call) in calls.items():
        ms = milliseconds(call)
        found[name] = {"ms": ms, "tflops": teraflops(2 * d * logits, ms)}
    return found


def tiles() -> dict[str, Any]:
    """The tile kernel alone, shape by shape; the rates compare with the bare products of `library`."""
    found: dict[str, Any] = {}
    for config in shapes():
        try:
            row: dict[str, Any] = time_tiles(config, min(1024, HEADLINE.n), min(8192, HEADLINE.v))
        except Exception as error:  # a shape that does not run is a finding
            row = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
        found[str(tuple(config))] = row
        rates = row.get("error") or {name: f"{x['tflops']:.0f}" for name, x in row.items()}
        print(f"   {tuple(config)!s:<42} {rates}", flush=True)
    return found


WAYS: dict[str, tuple[bool, bool, Plan]] = {
    "evaluation": (False, False, Plan()),
    "frozen head": (True, False, Plan()),
    "trained head": (True, True, Plan()),
    "trained head, kept": (True, True, Plan(keep_logit_grads=True)),
}


def step_of(sizes: tuple[int, int, int], trains_hidden: bool, trains_weight: bool, plan: Plan) -> Any:
    """A call of forward and, where something trains, backward, on new tensors.

    As in a trainer, the scored tokens are selected before: that waits for the device.
    """
    tokens, head = make(sizes, seed=4)
    hidden = tokens.hidden.requires_grad_(trains_hidden)
    weight = head.weight.requires_grad_(trains_weight)
    upstream = torch.full(tokens.targets.shape, -1.0 / len(tokens.targets), device=DEVICE)
    scored = select_scored(tokens.targets, len(weight), len(hidden))
    options = head_options(hidden, weight, bias=None, logit_scale=1.0, softcap=None, plan=plan)

    def step() -> None:
        hidden.grad = weight.grad = None
        logps = scored_logps(hidden, weight, None, scored, tokens.targets.shape, options)
        if trains_hidden:
            logps.backward(upstream)

    def forget() -> None:
        hidden.grad = weight.grad = None

    return step, forget


def whole(sizes: tuple[int, int, int] = HEADLINE) -> dict[str, Any]:
    """Milliseconds of a call, and its peak above the inputs against what the plan says."""
    n, d, v = sizes
    found: dict[str, Any] = {}
    for name, (trains_hidden, trains_weight, plan) in WAYS.items():
        step, forget = step_of(sizes, trains_hidden, trains_weight, plan)
        ms, queued = milliseconds(step), milliseconds(step, queued=True)
        schedule = plan.schedule(
            n, d, v, BF16, DEVICE, train_hidden=trains_hidden, train_weight=trains_weight, full_vocab_tiles=True
        )
        units = schedule.units_forward + schedule.units_backward
        results = 2 * d * (n * trains_hidden + v * trains_weight)
        found[name] = {
            "ms": ms,
            "queued_ms": queued,
            "units": units,
            "tflops": teraflops(units * 2 * n * d * v, queued),
            "planned_bytes": schedule.scratch_bytes + schedule.saved_bytes,
            "gradient_bytes": results,
            "schedule": str(schedule),
        }
        if CUDA:
            forget()
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step()
            synchronize()
            found[name]["peak_bytes"] = torch.cuda.max_memory_allocated() - before - results
            begun = time.perf_counter()
            step()
            found[name]["host_ms"] = 1e3 * (time.perf_counter() - begun)
            synchronize()
        print(
            f"   {name:<20}{ms:9.2f} ms, queued {queued:9.2f} {found[name]['tflops']:7.1f} TFLOP/s, above gradients "
            f"{found[name].get('peak_bytes', 0) / MIB:,.0f} MiB, planned {found[name]['planned_bytes'] / MIB:,.0f}; "
            f"host {found[name].get('host_ms', 0.0):.2f} ms",
            flush=True,
        )
        del step, forget
    return found


def slow_lane() -> dict[str, Any]:
    """What the slow lane costs when no row needs it, and with one row in 64."""
    n, d, v = HEADLINE
    tokens, head = make((n, d, v), seed=5)
    far = torch.arange(0, n, 64, device=DEVICE)
    own = head.weight[tokens.targets[far]].float()
    hidden = tokens.hidden.clone()
    hidden[far] = (100.0 * own / own.square().sum(1, keepdim=True)).to(BF16)
    plan = schedule(HEADLINE, BF16)
    lane = Launcher.slow_lane
    found = {}
    for name, h, used in (
        ("without it", tokens.hidden, False),
        ("idle", tokens.hidden, True),
        ("one row in 64", hidden, True),
    ):
        if not used:
            Launcher.slow_lane = _nothing  # type: ignore[method-assign, assignment]
        try:
            found[name] = milliseconds(partial(triton_path.forward, tokens._replace(hidden=h), head, plan, True), 3)
        finally:
            Launcher.slow_lane = lane  # type: ignore[method-assign]
        print(f"   forward, slow lane {name}: {found[name]:.2f} ms", flush=True)
    return found


def _nothing(*_: Any) -> None:
    pass


def jobs() -> list[warm.Job]:
    small = {
        warm.Job(sizes[1], config, dtype, tuple(KINDS[kind].items()), keep)
        for sizes, kind, dtype, config, keep in small_cases()
    }
    return [
        *(warm.Job(HEADLINE.d, c, alone=True) for c in shapes()),
        *(warm.Job(512, c, options=(("integers", True),), alone=True) for c in (TINY, *shapes())),
        *(warm.Job(d, None) for d in (HEADLINE.d, 256)),
        *sorted(small, key=str),
    ]


def run(record: Record) -> None:
    record.section("environment", environment)
    record.section("compile", lambda: warm.warm(jobs()))
    record.section("integers", integers)
    record.section("small", small)
    record.section("headline", headline)
    record.section("library", library)
    record.section("tiles", tiles)
    record.section("whole", whole)
    record.section("slow lane", slow_lane)
