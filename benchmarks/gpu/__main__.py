"""Everything that only a GPU can tell, in stages that each fit a short rental, without a network.

    python -m benchmarks.gpu smoke --output FOLDER     right on this card, and at what share of the library's rate
    python -m benchmarks.gpu all --rehearse            every stage on the CPU, tiny sizes: the figures mean nothing

A stage writes its part of FOLDER/<card>.json after every section, so that a stopped run loses nothing. The exit status
is 1 if a section failed. docs/gpu.md says which number leads to which change.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from pathlib import Path

STAGES = {"smoke": 120.0, "profile": 90.0, "race": 200.0, "tests": 240.0, "memory": 120.0}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=(*STAGES, "all"))
    parser.add_argument("--seconds", type=float, help=f"no section is begun after this (defaults: {STAGES})")
    parser.add_argument(
        "--output", type=Path, default=os.environ.get("OUT"), help="folder (default: $OUT, else benchmarks/results)"
    )
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, in Triton's interpreter")
    args = parser.parse_args()
    if args.rehearse:
        os.environ["TRITON_INTERPRET"], os.environ["CUDA_VISIBLE_DEVICES"] = "1", ""
    # Only now: what follows decides on import where kernels run.
    import torch

    if not args.rehearse and not torch.cuda.is_available():
        parser.error("torch sees no GPU (--rehearse runs the stages on the CPU)")
    from benchmarks.gpu.common import Record

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "rehearsal"
    if args.output is None:
        args.output = Path("build" if args.rehearse else "benchmarks/results")
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / f"{re.sub(r'[^a-z0-9]+', '-', card.lower())}.json"
    failed = False
    for stage in STAGES if args.stage == "all" else (args.stage,):
        record = Record(stage, file, args.seconds or (3600.0 if args.rehearse else STAGES[stage]))
        importlib.import_module(f"benchmarks.gpu.{stage}").run(record)
        record.write()
        failed |= record.failed
    print(f"wrote {file}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
