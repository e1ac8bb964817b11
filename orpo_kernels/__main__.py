"""The command line: `python -m orpo_kernels COMMAND`, installed as `orpo-kernels`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from orpo_kernels import __version__

# Modules of orpo_kernels.commands, in the order that --help lists them.
COMMANDS = ("check", "demo", "train", "bench", "estimate", "tune")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = argparse.ArgumentParser(prog="orpo-kernels", description="Exact ORPO without materialising the logits.")
    parser.add_argument("--version", action="version", version=f"orpo_kernels {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in COMMANDS:
        import_module(f"orpo_kernels.commands.{name}").add_parser(subparsers)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
