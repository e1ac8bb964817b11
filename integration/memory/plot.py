"""A picture of memory against length, with the card's line."""

from __future__ import annotations

from pathlib import Path

from .answers import STEP, Advisor, Answers
from .report import GIB, described

_OURS, _FULL, _CARD = "#0b6e99", "#c44e52", "#444444"
_POINTS = 9


def write(path: Path, advisor: Advisor, answers: Answers | None, gpu: int | None) -> None:
    """Lengths go to a little beyond what fits with our loss, or to twice what was asked for. Raises ImportError
    without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    run = advisor.run
    furthest = max(run.length, int(1.15 * answers.longest["ours"]) if answers is not None else 2 * run.length)
    lengths = sorted({max(STEP, round(furthest * at / _POINTS / STEP) * STEP) for at in range(1, _POINTS + 1)})
    found = [advisor.ask(length=length) for length in lengths]
    figure = Figure(figsize=(7.6, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for loss, label, color in (("full", "full logits", _FULL), ("ours", "orpo_kernels", _OURS)):
        totals = [getattr(one, loss).total / GIB for one in found]
        axes.plot(lengths, totals, "o-", color=color, label=label, markersize=4, linewidth=1.6)
        longest = 0 if answers is None else answers.longest[loss]
        if longest and answers is not None:
            axes.plot([longest], [answers.budget / GIB], marker="v", color=color, markersize=8)
            axes.annotate(
                f"{longest:,}",
                (longest, answers.budget / GIB),
                xytext=(5, -14),
                textcoords="offset points",
                color=color,
                fontsize=9,
            )
    weights = [one.ours.weights / GIB for one in found]
    axes.fill_between(lengths, weights, color="#d8d8d8", label="weights", linewidth=0)
    top = max(one.ours.total for one in found) / GIB
    if gpu is not None and answers is not None:
        axes.axhline(answers.budget / GIB, color=_CARD, linestyle="--", linewidth=1.2)
        free = (gpu - answers.budget) / GIB
        said = f" {gpu / GIB:g} GiB card, {free:g} kept free"
        axes.text(0, answers.budget / GIB, said, va="bottom", fontsize=8)
        top = max(top, gpu / GIB)
    axes.set_ylim(0, 1.6 * top)
    axes.set_xlim(0, 1.02 * lengths[-1])
    axes.set_xlabel("T, tokens a row")
    axes.set_ylabel("peak of a training step, GiB")
    name, _, rest = described(run).partition(": ")
    axes.set_title(f"{name}\n{rest}", loc="left", fontsize=8, wrap=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="upper left")
    figure.savefig(path)
