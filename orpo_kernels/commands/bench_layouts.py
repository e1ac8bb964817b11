"""`orpo-kernels bench --layouts FILE`: a whole model's training steps by the layout of their batches."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from orpo_kernels.bench.progress import with_progress

# Those that nothing else takes, and those of the others that apply here too.
OPTIONS = ("micro_batches", "count", "check")
_COMMON = ("layouts", "model", "length", "rounds", "threads", "output_dir")
_PACKAGES = ("trl", "datasets", "accelerate")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "layouts",
        "Instead of the head alone: forward and backward of a whole model in fp32 on the CPU, its batches padded with "
        "full logits (TRL, stock), padded, packed, or packed with each prompt once. Prints a table and writes "
        "layouts.json. Of the other options --model, --length, --rounds, --threads and --output-dir apply.",
    )
    group.add_argument(
        "--layouts",
        type=Path,
        metavar="FILE",
        help="preference pairs, .json or .jsonl. --model: a model's folder (default: SmolLM2-135M from its wheel). "
        "--length: only pairs that fit whole (default: 1024). --rounds: default 3",
    )
    group.add_argument("--micro-batches", nargs="+", type=int, metavar="B", help="pairs a step (default: 1 4)")
    group.add_argument("--count", type=int, help="pairs in all, the first that fit (default: 20)")
    group.add_argument("--check", action="store_true", default=None, help="losses and gradients against float64 too")


def refuse(args: argparse.Namespace, names: Iterable[str], why: str) -> None:
    """ValueError that names the first of these options that was given."""
    for name in names:
        value = getattr(args, name)
        if value is not None:
            given = [] if value is True else value if isinstance(value, list) else [value]
            option = " ".join([f"--{name.replace('_', '-')}", *map(str, given)])
            raise ValueError(f"{option} {why}: leave it out")


def run(args: argparse.Namespace) -> int:
    try:
        others = (name for name in vars(args) if name not in (*OPTIONS, *_COMMON, "run"))
        refuse(args, others, "does not apply to --layouts")
        missing = [package for package in _PACKAGES if find_spec(package) is None]
        if missing:
            raise ValueError(f"--layouts needs {', '.join(missing)}: pip install 'orpo_kernels[trl]'")
        from orpo_kernels.bench import layouts

        settings = layouts.Settings(**_settings(args))
        made = layouts.prepare(settings)
        try:
            args.output_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--output-dir {args.output_dir}: {error.strerror}") from error
    except ValueError as error:
        print(f"orpo-kernels bench: {error}", file=sys.stderr)
        return 2
    result = with_progress(settings.steps(), partial(layouts.run, *made, settings, ["orpo-kernels", *sys.argv[1:]]))
    path = args.output_dir / "layouts.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(layouts.table(result))
    print(f"\nwrote {path}")
    return 0


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    found = {
        "pairs": args.layouts,
        "model": args.model,
        "micro_batches": tuple(dict.fromkeys(args.micro_batches or (1, 4))),
        "count": 20 if args.count is None else args.count,
        "length": 1024 if args.length is None else args.length,
        "rounds": 3 if args.rounds is None else args.rounds,
        "threads": torch.get_num_threads() if args.threads is None else args.threads,
        "check": bool(args.check),
    }
    for name, least in {"count": 1, "length": 2, "rounds": 1, "threads": 1}.items():
        if found[name] < least:
            raise ValueError(f"--{name} {found[name]}: it must be at least {least}")
    for size in found["micro_batches"]:
        if not 1 <= size <= found["count"]:
            raise ValueError(f"--micro-batches {size}: use 1 to {found['count']} pairs, the --count of all")
    return found
