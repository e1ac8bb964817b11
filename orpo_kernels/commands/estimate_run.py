"""`orpo-kernels estimate --model M`: whether a whole run fits a card, and what would."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import torch

from orpo_kernels.plan import MIB, Plan

# Where a card's memory goes beside a run's tensors: the driver's context, libraries' workspaces, gaps between blocks.
_KEPT_FREE = "1GiB"
_UNITS = {"": 30, "k": 10, "m": 20, "g": 30, "t": 40}
_SHARDED = {1: "optimizer", 2: "gradients", 3: "weights"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("a whole run (the default with --model)")
    group.add_argument(
        "--gpu", metavar="SIZE", help="a card's memory, such as 24GiB: say what fits, and what to change"
    )
    group.add_argument("--keep-free", metavar="SIZE", default=_KEPT_FREE, help="of it (default: %(default)s)")
    method = group.add_mutually_exclusive_group()
    method.add_argument("--full", action="store_true", help="every weight trains (default)")
    method.add_argument("--lora-r", type=int, metavar="R", help="LoRA of that rank on every linear layer but the head")
    method.add_argument("--qlora", action="store_true", help="LoRA of rank 16 on weights of 4 bits (bitsandbytes)")
    group.add_argument("--optim", default="adamw_torch_fused", help="as transformers calls it (default: %(default)s)")
    group.add_argument("--checkpointing", action="store_true", help="activation (gradient) checkpointing of the layers")
    group.add_argument("--packing", action="store_true", help="rows without padding, each pair's prompt once")
    group.add_argument("--no-padding", action="store_true", help="all rows are as long as the longest")
    group.add_argument("--accumulation", action="store_true", help="gradients are accumulated over micro-batches")
    group.add_argument("--weights-dtype", metavar="DTYPE", help="of the weights (default: as --model stores them)")
    group.add_argument("--attention", choices=("sdpa", "eager"), help="default: the model's own")
    spread = group.add_mutually_exclusive_group()
    spread.add_argument("--fsdp", type=int, metavar="N", help="weights, gradients and optimiser over N processes")
    spread.add_argument("--zero", type=int, choices=_SHARDED, help="DeepSpeed's stage, over --gpus processes")
    group.add_argument("--gpus", type=int, metavar="N", help="processes of --zero")
    group.add_argument("--json", action="store_true", help="print JSON")
    group.add_argument("--plot", type=Path, metavar="FILE.png", help="memory against length, with the card's line")


def run(args: argparse.Namespace, dtypes: dict[str, torch.dtype]) -> int:
    try:
        gpu = None if args.gpu is None else size_of("--gpu", args.gpu)
        free = size_of("--keep-free", args.keep_free)
        if gpu is not None and free >= gpu:
            raise ValueError(f"--keep-free {args.keep_free} leaves nothing of --gpu {args.gpu}")
        _check_plot(args.plot)
        from orpo_kernels.integration.memory.answers import Advisor

        advisor = Advisor(run_of(args, dtypes))
        found = advisor.ask()
        answers = None if gpu is None else advisor.answers(gpu - free)
    except (ValueError, ImportError) as error:
        print(f"orpo-kernels estimate: {error}", file=sys.stderr)
        return 2
    from orpo_kernels.integration.memory import report

    if args.json:
        print(json.dumps(report.as_json(found, answers, gpu), indent=1))
    else:
        print(f"{report.described(found.run)}\n")
        print("\n".join(report.table(found)))
        if answers is not None and gpu is not None:
            print("\n" + "\n".join(report.verdict(answers, gpu)))
    if args.plot is not None:
        from orpo_kernels.integration.memory import plot

        plot.write(args.plot, advisor, answers, gpu)
        print(f"wrote {args.plot}", file=sys.stderr)
    return 0


def run_of(args: argparse.Namespace, dtypes: dict[str, torch.dtype]) -> Any:
    """The `Run` that the arguments describe. Raises ValueError that names what is wrong."""
    from orpo_kernels.integration.memory.configurations import config_of
    from orpo_kernels.integration.memory.run import Run

    config, name = config_of(args.model)
    weights = _dtype("--weights-dtype", args.weights_dtype, dtypes) if args.weights_dtype else stored_dtype(config)
    dtype = dtypes[args.dtype] if args.dtype else weights
    if dtype == torch.float32:
        weights = dtype if args.weights_dtype is None else weights
    if args.zero and args.gpus is None:
        raise ValueError(f"--zero {args.zero}: give --gpus N too, the processes that share")
    shards = args.fsdp if args.fsdp is not None else args.gpus if args.zero else 1
    rank = 16 if args.qlora else args.lora_r
    return Run(
        config,
        name,
        pairs=args.pairs,
        length=args.length,
        layout="shared" if args.packing else "equal" if args.no_padding else "padded",
        ignored=args.ignored,
        weights_dtype=weights,
        dtype=dtype,
        peft=None if rank is None else _lora(rank),
        four_bit=args.qlora,
        optim=args.optim,
        accumulates=args.accumulation,
        checkpointing=args.checkpointing,
        device=args.device,
        attention=args.attention,
        plan=Plan(None if args.scratch_mib is None else int(args.scratch_mib * MIB)),
        sharded="weights" if args.fsdp is not None else _SHARDED.get(args.zero, "nothing"),  # type: ignore[arg-type]
        shards=shards,
        tp=args.tp,
    )


def _lora(rank: int) -> Any:
    if rank < 1:
        raise ValueError(f"--lora-r {rank}: it must be at least 1")
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("--lora-r and --qlora need the peft package: pip install 'peft>=0.18'") from error
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def stored_dtype(config: Any) -> torch.dtype:
    """What `from_pretrained(dtype="auto")` would load, by the configuration."""
    for one in (config, config.get_text_config(decoder=True)):
        dtype = getattr(one, "dtype", None)
        dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
            return dtype
    return torch.float32


def size_of(name: str, text: str) -> int:
    """Bytes of "24GiB", "24 GB", "24g", "24" (GiB): a card's sizes are powers of two. Raises ValueError."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]?)(?:i?b)?\s*", text.lower())
    if found is None or not math.isfinite(float(found[1])):
        raise ValueError(f"{name} {text}: use a size such as 24GiB")
    return int(float(found[1]) * (1 << _UNITS[found[2]]))


def _dtype(name: str, text: str, dtypes: dict[str, torch.dtype]) -> torch.dtype:
    if text not in dtypes:
        raise ValueError(f"{name} {text}: use one of {', '.join(dtypes)}")
    return dtypes[text]


def _check_plot(path: Path | None) -> None:
    if path is None:
        return
    if path.suffix not in (".png", ".svg", ".pdf") or not path.parent.is_dir():
        raise ValueError(f"--plot {path}: give a .png, .svg or .pdf file in a folder that exists")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("--plot needs the matplotlib package: pip install matplotlib") from error
