"""The demo's picture: loss and margin over the optimiser steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_TRAIN = "#9aa5b1"
_HELD_OUT = "#0b6e99"


def plot_curves(path: Path, curves: dict[str, list[dict[str, Any]]], title: str, machine: str) -> None:
    """Write a PNG of `curves`: under "train" and "heldout", rows of step, loss and margin.

    A training row at step s is the batch that s starts from, s - 1 updates done; a held-out row at step s is all
    held-out pairs after s updates.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left")
    panels = figure.subplots(1, 2)
    for axes, name, label in zip(
        panels, ("loss", "margin"), ("ORPO loss (nats)", "margin, chosen − rejected (nats per token)"), strict=True
    ):
        train = [(row["step"] - 1, row[name]) for row in curves["train"]]
        held_out = [(row["step"], row[name]) for row in curves["heldout"]]
        axes.plot(*zip(*train, strict=True), color=_TRAIN, marker=".", linewidth=1.2, label="training batch")
        axes.plot(
            *zip(*held_out, strict=True), color=_HELD_OUT, marker="o", linewidth=2.2, label="all held-out pairs"
        )
        for (x, y), offset in zip((held_out[0], held_out[-1]), (8, 8), strict=True):
            axes.annotate(
                f"{y:.2f}",
                (x, y),
                xytext=(0, offset),
                textcoords="offset points",
                ha="center",
                color=_HELD_OUT,
                fontweight="bold",
            )
        if name == "margin":
            axes.axhline(0.0, color="black", linewidth=0.8, linestyle=":")
        axes.set_title({"loss": "Loss", "margin": "Margin"}[name], loc="left")
        axes.set_xlabel("optimiser steps done")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(x=0.06, y=0.14)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.text(0.99, 0.955, machine, ha="right", va="center", fontsize=8, color="#555555")
    figure.savefig(path)
