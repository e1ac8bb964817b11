"""Estimates of a run's memory beside measured peaks: every combination, each in a fresh process.

    python -m benchmarks.memory_accuracy [--models NAME ...] [--output FILE.json]

Three sizes of a Llama, both losses, LoRA and all weights, with and without checkpointing, two lengths, padded
and shared rows; fp32 on the CPU, one pair, AdamW. `docs/memory.md` holds its table; --from FILE estimates again
what an earlier run measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from orpo_kernels.bench import machine
from orpo_kernels.integration.memory.measured import compare, estimate, run_of
from orpo_kernels.plan import MIB


def _llama(hidden_size: int, layers: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden_size,
        "intermediate_size": hidden_size * 8 // 3,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden_size // 64,
        "num_key_value_heads": 2,
        "vocab_size": 32000,
    }


# Named by their parameters. The first two have a head of their own, the last one's is tied to its embeddings.
MODELS: dict[str, Any] = {"37m": _llama(384, 8), "60m": _llama(512, 10), "smollm2-135m": "smollm2-135m"}


def cases(models: list[str]) -> list[dict[str, Any]]:
    """What is measured, the smallest model first."""
    axes = itertools.product(models, (0, 16), (False, True), ("padded", "shared"), (128, 512), ("full", "ours"))
    return [
        {"model": model, "lora_r": r, "checkpointing": checkpointing, "layout": layout, "length": length, "loss": loss}
        for model, r, checkpointing, layout, length, loss in axes
    ]


def specification(case: dict[str, Any]) -> dict[str, Any]:
    return {**case, "model": MODELS[case["model"]], "device": "cpu"}


def again(row: dict[str, Any]) -> dict[str, Any]:
    """What was measured, with an estimate by the code as it is."""
    case = {name: row[name] for name in ("model", "lora_r", "checkpointing", "layout", "length", "loss")}
    row = {**row, **estimate(run_of(specification(case)), case["loss"])}
    return row | {"error": row["estimated"] / row["measured"] - 1}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: MiB measured and how far off the estimate is, of full logits and ours."""
    lines = [
        "| model | trains | checkpointing | rows | length | full: MiB | estimate | ours: MiB | estimate |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("model", "lora_r", "checkpointing", "layout", "length"))
        groups.setdefault(key, {})[row["loss"]] = row
    for (model, r, checkpointing, layout, length), pair in groups.items():
        cells = [model, f"LoRA {r}" if r else "all", "yes" if checkpointing else "no", layout, str(length)]
        for loss in ("full", "ours"):
            one = pair.get(loss)
            cells += ["", ""] if one is None else [f"{one['measured'] / MIB:,.0f}", f"{one['error']:+.1%}"]
        lines.append(f"| {' | '.join(cells)} |")
    errors = [abs(row["error"]) for row in rows]
    lines.append(
        f"\n{len(rows)} runs: the estimate is off by {statistics.median(errors):.1%} in the middle and "
        f"{max(errors):.1%} at most; {sum(error <= 0.1 for error in errors)} are within 10 %."
    )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all")
    parser.add_argument(
        "--output", type=Path, help="a .json file, written after every run; what it holds is not run again"
    )
    parser.add_argument("--from", dest="source", type=Path, help="estimate again what such a file measured")
    args = parser.parse_args()
    if args.source:
        print(table([again(row) for row in json.loads(args.source.read_text(encoding="utf-8"))["rows"]]))
        return 0
    rows: list[dict[str, Any]] = []
    if args.output and args.output.exists():
        rows = json.loads(args.output.read_text(encoding="utf-8"))["rows"]
    done = [{key: row.get(key) for key in case} for row in rows for case in cases(["37m"])[:1]]
    for case in cases(args.models):
        if case in done:
            continue
        found = compare(specification(case))
        row = {**case, **found, "error": found["estimated"] / found["measured"] - 1}
        rows.append(row)
        print(f"{case}: {found['measured'] / MIB:,.0f} MiB, estimate {row['error']:+.1%}", file=sys.stderr, flush=True)
        if args.output:
            result = {"machine": machine.describe("cpu", 1), "versions": machine.versions(), "rows": rows}
            args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
