"""`orpo-kernels tune`: times the kernels' tile shapes on this card and keeps those that beat the defaults.

Three passes are timed: sums (evaluation), exponentials (forward with gradient, its product with W included) and the
gradient of W (likewise), each with the `suited` ones of the shapes that the card has room for
(`kernels.configs.candidates`). Where the winners are kept and when they are used: `kernels.tuned`.

Without a GPU, TRITON_INTERPRET=1 rehearses the command in Triton's interpreter on tiny sizes: its times mean nothing,
and nothing is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from orpo_kernels.bench import machine
from orpo_kernels.bench.meter import Clock
from orpo_kernels.bench.problem import Problem, make_inputs
from orpo_kernels.estimate import MODELS, HeadSize, head_of_model
from orpo_kernels.plan import Plan

# The kernels take no others.
_DTYPES = ("bfloat16", "float32")
# One of each kind: a large D, a small one, and one with a soft-cap. Their tokens make full and nearly empty tiles.
_HEADS = ("llama-3-8b", "smollm2-135m", "gemma-2-2b")
_TOKENS = (4096, 512, 64)
_TINY = HeadSize(32, 160)


class Pass(NamedTuple):
    """One of `tuned.PASSES` on a head.

    run: calls it with a tile shape. default: the launcher's own, were nothing tuned. key: of `tuned`.
    """

    problem: str
    what: str
    run: Callable[[Any], Any]
    default: Any
    candidates: list[Any]
    key: str


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "tune",
        help="time the kernels' tile shapes on this GPU and keep the fastest",
        description="Time every tile shape that fits this GPU, and keep those that beat the defaults for later runs. "
        "Shapes change the order of sums, and so the last bits of results: that is why it is a command of its own.",
    )
    parser.add_argument(
        "--model",
        metavar="FOLDER_OR_NAME",
        help=f"a folder with a config.json, or one of {', '.join(MODELS)} (default: {', '.join(_HEADS)})",
    )
    parser.add_argument("--hidden-size", type=int, metavar="D", help="in place of --model's")
    parser.add_argument("--vocab-size", type=int, metavar="V", help="in place of --model's")
    parser.add_argument("--softcap", type=float, help="of the logits, in place of --model's")
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        metavar="N",
        help=f"scored tokens of a batch (default: {' '.join(map(str, _TOKENS))})",
    )
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16", help="default: %(default)s")
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="no shape is begun after this (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=7, help="calls a shape (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="a .json file for every time taken")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    try:
        device = _device()
        rehearsal = device.type == "cpu"
        problems = _problems(args, device)
    except ValueError as error:
        print(f"orpo-kernels tune: {error}", file=sys.stderr)
        return 2
    if rehearsal:
        print("a rehearsal in Triton's interpreter: the times mean nothing, and nothing is kept")
    rows = tune(problems, device, args.minutes, args.repeats)
    print(table(rows))
    if args.output:
        result = {
            "machine": machine.describe(device.type, torch.get_num_threads()),
            "versions": machine.versions(),
            "problems": {name: problem.as_dict() for name, problem in problems.items()},
            "rehearsal": rehearsal,
            "rows": rows,
        }
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if rehearsal else _keep(rows)


def _device() -> torch.device:
    if find_spec("triton") is None:
        raise ValueError(
            "Triton is not installed: there are no tile shapes to time (pip install 'orpo_kernels[triton]')"
        )
    if torch.cuda.is_available():
        return torch.device("cuda")
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("torch sees no GPU to time (TRITON_INTERPRET=1 rehearses the command without one)")
    return torch.device("cpu")


def _problems(args: argparse.Namespace, device: torch.device) -> dict[str, Problem]:
    """What to time, by name; what many users have comes first."""
    for name in ("hidden_size", "vocab_size", "minutes", "repeats"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name.replace('_', '-')} {value}: it must be positive")
    for tokens in args.tokens or ():
        if tokens < 4 or tokens % 2:
            raise ValueError(f"--tokens {tokens}: use an even number of at least 4")
    given = {n: getattr(args, n) for n in ("hidden_size", "vocab_size", "softcap") if getattr(args, n) is not None}
    if args.model is not None:
        heads = {args.model: replace(head_of_model(args.model), **given)}
    elif {"hidden_size", "vocab_size"} <= given.keys():
        heads = {f"D={args.hidden_size} V={args.vocab_size}": HeadSize(**given)}
    elif given:
        raise ValueError("give --model, or both --hidden-size and --vocab-size")
    else:
        heads = {"tiny": _TINY} if device.type == "cpu" else {name: MODELS[name] for name in _HEADS}
    return {
        f"{name}, N={tokens}": Problem(
            pairs=1,
            length=tokens // 2,
            hidden_size=head.hidden_size,
            vocab_size=head.vocab_size,
            softcap=head.softcap,
            dtype=args.dtype,
            device=device.type,
            ignored=0.0,
        )
        for tokens in args.tokens or ((32,) if device.type == "cpu" else _TOKENS)
        for name, head in heads.items()
    }


def passes(name: str, problem: Problem) -> Iterator[Pass]:
    """The passes over a problem, its inputs made."""
    from orpo_kernels.kernels import configs, triton_path, tuned
    from orpo_kernels.kernels.interface import Head, Tokens

    inputs = make_inputs(problem)
    targets, device = inputs.scored_targets.flatten(), inputs.weight.device
    tokens = Tokens(inputs.hidden.flatten(0, 1), torch.arange(len(targets), device=device), targets)
    dtype, n, (v, d) = inputs.weight.dtype, len(targets), inputs.weight.shape
    heavy = problem.softcap is not None
    head = Head(inputs.weight, None, 1.0, problem.softcap, dtype)
    schedule = Plan().schedule(n, d, v, dtype, problem.device, train_weight=True, softcap=heavy, full_vocab_tiles=True)
    coefficient = torch.full((n,), 1.0 / n, device=device)
    lse = triton_path.forward(tokens, head, schedule, False).lse
    target = configs.target_of(device)
    card = "interpreter" if target is None else torch.cuda.get_device_name(device)

    calls: dict[str, Callable[[Any], Any]] = {
        "sums": lambda c: triton_path.forward(tokens, head, schedule, False, config=c),
        "exponentials": lambda c: triton_path.forward(tokens, head, schedule, True, config=c),
        "gradient": lambda c: triton_path.weight_gradient(
            tokens, head, coefficient, lse, None, schedule, True, False, config=c
        ),
    }
    for what in tuned.PASSES:
        chunk = min(n, schedule.backward_chunk if what == "gradient" else schedule.forward_chunk)
        default = configs.default(target, dtype, chunk, d, heavy)
        fitting = [default] if target is None else configs.candidates(target, dtype)
        key = tuned.key(card, dtype, what, chunk, d, heavy)
        yield Pass(name, what, calls[what], default, suited(fitting, default, chunk, heavy), key)


def suited(shapes: list[Any], default: Any, tokens: int, heavy_epilogue: bool) -> list[Any]:
    """Without shapes of which half or more would be empty, or whose heavy epilogue spills registers."""

    def suits(shape: Any) -> bool:
        accumulators = shape.block_c * shape.block_v // (32 * shape.num_warps)  # a thread
        return shape.block_c < 2 * max(tokens, 64) and not (heavy_epilogue and accumulators > 64)

    return [shape for shape in shapes if shape == default or suits(shape)]


def seconds(function: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """The median, after one call that compiles."""
    function()
    found = []
    for _ in range(repeats):
        clock = Clock(device)
        function()
        found.append(clock())
    return statistics.median(found)


def tune(problems: dict[str, Problem], device: torch.device, minutes: float, repeats: int) -> list[dict[str, Any]]:
    """Rows of problem, pass, key, config, default (the shape that it competes with), seconds, reason."""
    from triton.runtime.errors import OutOfResources, PTXASError

    stop = time.monotonic() + 60 * minutes
    rows = []
    keys: set[str] = set()
    for name, problem in problems.items():
        for one in passes(name, problem):
            if one.key in keys:
                continue  # A batch of another size whose chunks are of the same class.
            keys.add(one.key)
            for config in one.candidates:
                row: dict[str, Any] = {"problem": name, "pass": one.what, "key": one.key}
                row |= {"config": config._asdict(), "default": one.default._asdict(), "seconds": None, "reason": None}
                if time.monotonic() > stop:
                    row["reason"] = f"the limit of {minutes:g} minutes came first"
                else:
                    try:
                        row["seconds"] = seconds(partial(one.run, config), device, repeats)
                    except (OutOfResources, PTXASError) as error:
                        row["reason"] = str(error).splitlines()[0]
                rows.append(row)
    return rows


def winners(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The fastest shape of each key whose default was timed, as a `tuned.Entry`."""
    from orpo_kernels.kernels.configs import TileConfig
    from orpo_kernels.kernels.tuned import Entry

    found = {}
    for key, timed in _timed(rows).items():
        best = min(timed, key=lambda row: row["seconds"])
        default = next((row for row in timed if row["config"] == row["default"]), None)
        if default is not None:
            found[key] = Entry(
                TileConfig(**best["config"]), TileConfig(**best["default"]), best["seconds"], default["seconds"]
            )
    return found


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'problem':<26}{'pass':<15}{'default ms':>11}{'best ms':>9}{'gain':>7}  best shape"]
    kept = winners(rows)
    for key, timed in _timed(rows).items():
        best = min(timed, key=lambda row: row["seconds"])
        before, gain = "-", ""
        if key in kept:
            before = f"{1e3 * kept[key].default_seconds:.2f}"
            gain = f"{kept[key].default_seconds / best['seconds'] - 1:.0%}"
        shape = "x".join(str(best["config"][f"block_{size}"]) for size in "cvd")
        lines.append(
            f"{best['problem']:<26}{best['pass']:<15}{before:>11}{1e3 * best['seconds']:>9.2f}{gain:>7}  {shape}, "
            f"{best['config']['num_warps']} warps, {best['config']['num_stages']} stages"
            + (", persistent" if best["config"]["persistent"] else "")
        )
    refused = {row["reason"] for row in rows if row["reason"]}
    return "\n".join([*lines, *(f"not timed: {reason}" for reason in sorted(refused))])


def _timed(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["seconds"] is not None:
            found.setdefault(row["key"], []).append(row)
    return found


def _keep(rows: list[dict[str, Any]]) -> int:
    from orpo_kernels.kernels import tuned

    found = winners(rows)
    if not found:
        print("orpo-kernels tune: no default shape was timed: give it more --minutes", file=sys.stderr)
        return 1
    try:
        print(f"wrote {tuned.save(found)}")
    except OSError as error:
        print(f"orpo-kernels tune: {tuned.path()}: {error.strerror}", file=sys.stderr)
        return 1
    return 0
