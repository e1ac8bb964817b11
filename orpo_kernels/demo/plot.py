"""The demo's picture: loss and margin over the optimiser steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

_TRAIN = "#9aa5b1"
_HELD_OUT = "#0b6e99"
_GREY = "#555555"


def plot_curves(path: Path, curves: dict[str, list[dict[str, Any]]], title: str, machine: str) -> None:
    """Write a PNG of `curves`: under "train" and "heldout", rows of step, loss and margin.

    A training row of step s is the batch that s was made from, after s - 1 updates; a held-out row of step s
    is all held-out pairs after s updates.
    """
    # Not pyplot: no global state, and the Agg canvas whatever backend is configured.
    figure = Figure(figsize=(10, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title}\n", fontsize=13, fontweight="bold", x=0.012, ha="left")
    figure.text(0.012, 0.915, machine, va="center", fontsize=9, color=_GREY)
    loss, margin = figure.subplots(1, 2, gridspec_kw={"wspace": 0.06})
    _panel(loss, curves, "loss", "Loss", "ORPO loss (nats)")
    _panel(margin, curves, "margin", "Margin", "chosen − rejected (nats per token)")
    margin.axhline(0.0, color="black", linewidth=0.8, linestyle=":")
    figure.savefig(path)


def _panel(axes: Axes, curves: dict[str, list[dict[str, Any]]], key: str, title: str, label: str) -> None:
    train, held_out = curves["train"], curves["heldout"]
    axes.plot(
        [row["step"] - 1 for row in train],
        [row[key] for row in train],
        color=_TRAIN,
        marker=".",
        linewidth=1.2,
        label="one training batch",
    )
    axes.plot(
        [row["step"] for row in held_out],
        [row[key] for row in held_out],
        color=_HELD_OUT,
        marker="o",
        linewidth=2.2,
        label="all held-out pairs",
    )
    for row in (held_out[0], held_out[-1]):
        axes.annotate(
            f"{row[key]:.2f}".replace("-", "\N{MINUS SIGN}"),
            (row["step"], row[key]),
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
            color=_HELD_OUT,
            fontweight="bold",
            path_effects=[withStroke(linewidth=3, foreground="white")],  # legible where lines cross it
        )
    axes.set_title(title, loc="left")
    axes.set_xlabel("optimiser steps done")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.09, y=0.14)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
