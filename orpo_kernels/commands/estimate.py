"""`orpo-kernels estimate`: what a run would take, by full logits and without them, before anything is loaded.

`estimate_run` answers for the whole run; here is what `--head-only` prints, for head and loss.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

import torch

from orpo_kernels.commands import estimate_run
from orpo_kernels.costs import CARDS, Prediction, predict
from orpo_kernels.estimate import MODELS, SETTINGS, Estimate, HeadSize, estimate, head_of_model
from orpo_kernels.plan import MIB, Plan
from orpo_kernels.scale import report

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
DTYPES |= {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "estimate",
        help="say whether a run fits a card, by full logits and without them",
        description="Peak memory of a whole training run (--model), or memory and operations of head and loss alone "
        "(--head-only): from the sizes, nothing is loaded.",
    )
    parser.add_argument(
        "--head-only", action="store_true", help="head and loss alone, as without --model and with a card"
    )
    parser.add_argument(
        "--model", metavar="FOLDER_OR_NAME", help=f"a folder with a config.json, or one of {', '.join(MODELS)}"
    )
    parser.add_argument("--hidden-size", type=int, metavar="D", help="in place of --model's")
    parser.add_argument("--vocab-size", type=int, metavar="V", help="in place of --model's")
    parser.add_argument("--softcap", type=float, help="of the logits, in place of --model's")
    parser.add_argument("--dtype", choices=DTYPES, help="compute dtype (default: --model's, else float32)")
    parser.add_argument("--pairs", type=int, default=2, metavar="B", help="a batch (default: %(default)s)")
    parser.add_argument(
        "--length", type=int, default=1024, metavar="T", help="tokens a row, padding included (default: %(default)s)"
    )
    parser.add_argument(
        "--ignored", type=float, default=0.25, help="share of positions that are not scored (default: %(default)s)"
    )
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu", *CARDS),
        default="cuda",
        help="it need not be there; a card by its name gets the milliseconds predicted (default: %(default)s)",
    )
    parser.add_argument("--scratch-mib", type=float, help="memory budget (default: the device's)")
    parser.add_argument(
        "--tp",
        type=int,
        default=1,
        metavar="P",
        help="ranks that share every layer and the head; with --head-only or a card, layouts compared",
    )
    estimate_run.add_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if not args.head_only and args.model is not None and args.device not in CARDS:
        return estimate_run.run(args, DTYPES)
    try:
        head = _head(args)
        dtype = DTYPES[args.dtype] if args.dtype else head.dtype or torch.float32
        scratch = None if args.scratch_mib is None else int(args.scratch_mib * MIB)
        on_card = args.device in CARDS
        found = estimate(
            head,
            args.pairs,
            args.length,
            dtype=dtype,
            device="cuda" if on_card else args.device,
            ignored=args.ignored,
            scratch_bytes=scratch,
        )
        times = predictions(found, head, args.device, dtype, scratch) if on_card else []
        over_ranks = "" if args.tp == 1 else _over_ranks(args, head, dtype, found[0].tokens)
    except ValueError as error:
        print(f"orpo-kernels estimate: {error}", file=sys.stderr)
        return 2
    cap = "" if head.softcap is None else f", soft-cap {head.softcap:g}"
    print(
        f"{args.pairs} pairs of {args.length} tokens a row, {args.ignored:.0%} of them not scored; "
        f"D={head.hidden_size}, V={head.vocab_size}{cap}; {str(dtype).removeprefix('torch.')} on {args.device}\n"
    )
    print("\n".join(table(found)))
    print(
        "\nGradients (of hidden states and weight) come on top of either. A unit is 2*N*D*V operations, N the scored\n"
        "tokens; full logits are made for every position. Full logits: one cross entropy, no copy."
    )
    for setting, prediction in times:
        print(f"\n{setting}, {prediction}")
    if over_ranks:
        print(f"\n{over_ranks}")
    return 0


def _over_ranks(args: argparse.Namespace, head: HeadSize, dtype: torch.dtype, tokens: int) -> str:
    """What layouts of many cards make of the same tokens a card."""
    if dtype != torch.bfloat16:
        raise ValueError(f"--tp {args.tp}: rates are known of products of bfloat16: give --dtype bfloat16")
    return report(
        args.tp,
        tokens,
        head.hidden_size,
        head.vocab_size,
        args.device if args.device in CARDS else "h100",
        cards=(8, 512),
        pairs=args.pairs,
        softcap=head.softcap is not None,
        ignored=args.ignored,
    )


def predictions(
    found: list[Estimate], head: HeadSize, card: str, dtype: torch.dtype, scratch_bytes: int | None
) -> list[tuple[str, Prediction]]:
    """Each setting and the time of a call, forward and backward. Raises ValueError as `costs.predict` does."""
    times = []
    for e in found:
        hidden, weight, keep = SETTINGS[e.setting]
        plan = Plan(scratch_bytes=scratch_bytes, keep_logit_grads=keep)
        prediction = predict(
            plan,
            e.tokens,
            head.hidden_size,
            head.vocab_size,
            card,
            dtype=dtype,
            train_hidden=hidden,
            train_weight=weight,
            softcap=head.softcap is not None,
        )
        times.append((e.setting, prediction))
    return times


def table(found: list[Estimate]) -> list[str]:
    """Lines: MiB and units of each setting."""
    head = f"{'MiB':<36}{'full logits':>12}{'ours':>10}  = {'scratch':>8} + {'saved':>9}{'gradients':>11}"
    lines = [f"{head}{'units: full':>13}{'ours':>6}"]
    for e in found:
        full, ours, scratch, saved, gradients = (
            f"{number / MIB:,.0f}"
            for number in (
                e.full_bytes,
                e.our_bytes,
                e.schedule.scratch_bytes,
                e.schedule.saved_bytes,
                e.gradient_bytes,
            )
        )
        lines.append(
            f"{e.setting:<36}{full:>12}{ours:>10}  = {scratch:>8} + {saved:>9}{gradients:>11}"
            f"{e.full_units:>13.2f}{e.our_units:>6.2f}"
        )
    return lines


def _head(args: argparse.Namespace) -> HeadSize:
    given = {
        name: getattr(args, name)
        for name in ("hidden_size", "vocab_size", "softcap")
        if getattr(args, name) is not None
    }
    if args.model is not None:
        return replace(head_of_model(args.model), **given)
    if "hidden_size" not in given or "vocab_size" not in given:
        raise ValueError("give --model, or both --hidden-size and --vocab-size")
    return HeadSize(**given)
