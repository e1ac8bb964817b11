"""`orpo-kernels bench`: time, memory and error of the head and the loss, by this package and by its peers."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from orpo_kernels.bench import lengths, report, runner
from orpo_kernels.bench.child import MODES
from orpo_kernels.bench.peers import PEERS
from orpo_kernels.bench.problem import Problem
from orpo_kernels.bench.progress import with_progress
from orpo_kernels.commands import bench_layouts
from orpo_kernels.estimate import MODELS, head_of_model

_DTYPES = ("float32", "bfloat16", "float16")
# Filled in later, so that --layouts can tell what was given.
_DEFAULTS: dict[str, Any] = {
    "pairs": 2,
    "dtype": "float32",
    "ignored": 0.25,
    "lengths": "fixed",
    "seed": 0,
    "statistics": False,
    "peers": list(PEERS),
    "modes": list(MODES),
    "rounds": 5,
    "repeats": 2,
    "minutes": 4.0,
    "timeout": 600.0,
    "sweep": [],
}
_RESULT_KEYS = {"machine", "problem", "versions", "settings", "results", "full_rounds"}


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="measure time, memory and error of the loss against other implementations",
        description="Head and ORPO loss by this package and by its peers, on the same inputs, each measurement in a "
        "process of its own. Prints a table; writes result.json and plots. A peer that cannot run is listed with "
        "its reason.",
        epilog=f"peers: {', '.join(PEERS)}",
    )
    sizes = parser.add_argument_group("inputs")
    sizes.add_argument(
        "--model", metavar="NAME", help=f"sizes of a real head: {', '.join(MODELS)}, or a model's folder"
    )
    sizes.add_argument("--pairs", type=int, metavar="B", help=f"default: {_DEFAULTS['pairs']}")
    sizes.add_argument("--length", type=int, metavar="T", help="most tokens a row (default: 384; 1024 with --model)")
    sizes.add_argument("--tokens", type=int, help="shorten the rows so that the batch has at most this many")
    sizes.add_argument("--hidden-size", type=int, metavar="D", help="default: 768")
    sizes.add_argument("--vocab-size", type=int, metavar="V", help="default: 32768")
    sizes.add_argument("--softcap", type=float, help="soft-cap of the logits")
    sizes.add_argument("--dtype", choices=_DTYPES, help=f"default: {_DEFAULTS['dtype']}")
    sizes.add_argument("--ignored", type=float, help=f"share not scored (default: {_DEFAULTS['ignored']})")
    sizes.add_argument(
        "--lengths",
        metavar="fixed|lognormal|FILE",
        help="fixed: full rows. lognormal: uneven ones, as fitted to real pairs. A .json or .jsonl file of "
        f"preference pairs: theirs (default: {_DEFAULTS['lengths']})",
    )
    sizes.add_argument(
        "--statistics",
        action="store_true",
        default=None,
        help="make each token's entropy, log sum p^2, mean logit and top-1 too (peers without them are left out)",
    )
    sizes.add_argument("--seed", type=int, help=f"default: {_DEFAULTS['seed']}")
    how = parser.add_argument_group("measuring")
    how.add_argument("--peers", nargs="+", choices=PEERS, metavar="PEER", help="default: all")
    how.add_argument("--modes", nargs="+", choices=MODES, help="default: all")
    how.add_argument("--rounds", type=int, help=f"at most (default: {_DEFAULTS['rounds']})")
    how.add_argument("--repeats", type=int, help=f"in each process (default: {_DEFAULTS['repeats']})")
    how.add_argument(
        "--minutes",
        type=float,
        help=f"after the first round, none begins that would not fit (default: {_DEFAULTS['minutes']:g})",
    )
    how.add_argument("--timeout", type=float, help=f"seconds a process may take (default: {_DEFAULTS['timeout']:g})")
    how.add_argument("--sweep", nargs="+", type=int, metavar="T", help="more lengths, for memory against length")
    how.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    how.add_argument("--threads", type=int, help="of the CPU (default: torch's)")
    bench_layouts.add_arguments(parser)
    parser.add_argument("--output-dir", type=Path, default=Path("bench_output"), help="default: %(default)s")
    parser.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("BEFORE", "AFTER"),
        help="print two result files side by side",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.layouts is not None:
        return bench_layouts.run(args)
    try:
        bench_layouts.refuse(args, bench_layouts.OPTIONS, "applies to --layouts only")
        for name, value in _DEFAULTS.items():
            if getattr(args, name) is None:
                setattr(args, name, value)
        if args.compare:
            print(report.compare(*map(read, args.compare)))
            return 0
        problem, settings = _problem(args), _settings(args)
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except ValueError as error:
        print(f"orpo-kernels bench: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"orpo-kernels bench: --output-dir {args.output_dir}: {error.strerror}", file=sys.stderr)
        return 2
    try:
        result = with_progress(
            settings.measurements(), partial(runner.run, problem, settings, ["orpo-kernels", *sys.argv[1:]])
        )
    except RuntimeError as error:  # the judge's
        print(f"orpo-kernels bench: {error}", file=sys.stderr)
        return 1
    path = args.output_dir / "result.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(report.table(result))
    print("\nwrote", *[path, *_plots(result, args.output_dir)])
    if result["interrupted"]:
        return 130
    # Our own settings must run; a peer need not.
    ours = [row for row in result["results"] if row["peer"] == "ours"]
    return 1 if any(row["status"] == "failed" for row in ours) else 0


def read(path: Path) -> dict[str, Any]:
    """A result file. Raises ValueError if it is none."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--compare {path}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"--compare {path} is not valid JSON: {error}") from error
    if not isinstance(result, dict) or not result.keys() >= _RESULT_KEYS:
        raise ValueError(f"--compare {path} is not a result.json of this command")
    return result


def _plots(result: dict[str, Any], folder: Path) -> list[Path]:
    if find_spec("matplotlib") is None:
        print("\nno plots: matplotlib is not installed (pip install 'orpo_kernels[bench]')")
        return []
    from orpo_kernels.bench import plots

    return plots.write(result, folder)


def _problem(args: argparse.Namespace) -> Problem:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here")
    sizes: dict[str, Any] = {"hidden_size": 768, "vocab_size": 32768, "softcap": None}
    if args.model is not None:
        head = head_of_model(args.model)
        sizes = {"hidden_size": head.hidden_size, "vocab_size": head.vocab_size, "softcap": head.softcap}
    sizes |= {name: getattr(args, name) for name in sizes if getattr(args, name) is not None}
    if args.pairs < 1:
        raise ValueError(f"--pairs {args.pairs}: it must be at least 1")
    length = args.length or (384 if args.model is None else 1024)
    if args.tokens is not None:
        length = min(length, args.tokens // (2 * args.pairs))
        if length < 2:
            raise ValueError(f"--tokens {args.tokens} leaves no row of 2 tokens for {args.pairs} pairs")
    return Problem(
        pairs=args.pairs,
        length=length,
        **sizes,
        dtype=args.dtype,
        device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        ignored=args.ignored,
        lengths=_lengths(args),
        seed=args.seed,
        statistics=args.statistics,
    )


def _lengths(args: argparse.Namespace) -> lengths.Lengths:
    if args.lengths == "fixed":
        return ()
    if args.lengths == "lognormal":
        return lengths.lognormal(args.pairs, args.seed)
    return lengths.from_file(Path(args.lengths), args.pairs, args.seed)


def _settings(args: argparse.Namespace) -> runner.Settings:
    for name in ("rounds", "repeats", "minutes", "timeout", "threads"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name} {value}: it must be positive")
    if any(length < 2 for length in args.sweep):
        raise ValueError(f"--sweep {' '.join(map(str, args.sweep))}: a row has at least 2 tokens")
    return runner.Settings(
        peers=tuple(dict.fromkeys(args.peers)),
        modes=tuple(mode for mode in MODES if mode in args.modes),
        rounds=args.rounds,
        repeats=args.repeats,
        minutes=args.minutes,
        timeout=args.timeout,
        threads=args.threads or torch.get_num_threads(),
        sweep=tuple(sorted(set(args.sweep))),
    )
