"""Draws docs/layouts.png: two pairs in each layout, what is computed, and who sees whom.

    python docs/layouts_figure.py [FILE]

Rows, padding and masks are those of `integration.layout`, not drawings of them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from orpo_kernels.integration.packing.layout import Name, lay_out
from orpo_kernels.integration.packing.segments import Segments

COLORS = {"fill": "#ececec", "prompt": "#8da0cb", "chosen": "#66c2a5", "rejected": "#fc8d62"}
PROMPT, CHOSEN, REJECTED = 1, 2, 3
SHAPES = ((6, 3, 5), (4, 6, 2))  # prompt, chosen, rejected tokens of each pair
LONGEST = sum(2 * prompt + chosen + rejected for prompt, chosen, rejected in SHAPES)
TITLES: dict[Name, str] = {
    "padded": "padded: a row a sequence",
    "packed": "packed: sequences one after the other",
    "shared": "shared: each prompt once",
}


def pairs() -> list[dict[str, Any]]:
    """Pairs whose ids tell what a token is: its kind in the last digit."""
    made = []
    for at, (prompt, chosen, rejected) in enumerate(SHAPES):
        first = 1000 * (at + 1)
        start = [first + 10 * i + PROMPT for i in range(prompt)]
        made.append(
            {
                "chosen_input_ids": start + [first + 10 * i + CHOSEN for i in range(chosen)],
                "chosen_prompt_length": prompt,
                "rejected_input_ids": start + [first + 10 * i + REJECTED for i in range(rejected)],
                "rejected_prompt_length": prompt,
            }
        )
    return made


def seen(segments: Segments) -> torch.Tensor:
    """[T, T] bool of a single row."""
    start, prefix_start, prefix_stop, _ = segments.ranges(torch.device("cpu"))[:, 0, :, None]
    key = torch.arange(segments.length)
    query = key[:, None]
    return ((key >= start) & (key <= query)) | ((key >= prefix_start) & (key < prefix_stop))


def draw_rows(axis: Any, name: Name) -> None:
    batch = lay_out(name, pairs())
    kinds, positions = batch["input_ids"] % 10, batch["position_ids"]
    rows, length = kinds.shape
    axis.imshow(kinds, cmap=ListedColormap(list(COLORS.values())), vmin=0, vmax=3, aspect="equal")
    for row in range(rows):
        for place in range(length):
            if kinds[row, place]:
                axis.text(place, row, int(positions[row, place]), ha="center", va="center", fontsize=6.5)
    axis.set_xlim(-0.5, LONGEST - 0.5)  # the same scale for all
    axis.set_anchor("W")
    axis.set_xticks([x - 0.5 for x in range(1, length)], minor=True)
    axis.set_yticks([y - 0.5 for y in range(1, rows)], minor=True)
    axis.grid(which="minor", color="white", linewidth=1)
    axis.tick_params(which="both", bottom=False, left=False, labelbottom=False, labelleft=False)
    axis.set_title(f"{TITLES[name]}, {kinds.numel()} tokens computed (numbers are positions)", loc="left", fontsize=9)
    for side in axis.spines.values():
        side.set_visible(False)


def draw_mask(axis: Any, name: Name) -> None:
    batch = lay_out(name, pairs())
    kinds = batch["input_ids"][0] % 10
    mask = seen(batch["layout"].segments)
    axis.imshow(torch.where(mask, kinds[None], 0), cmap=ListedColormap(list(COLORS.values())), vmin=0, vmax=3)
    length = len(kinds)
    axis.set_xticks([x - 0.5 for x in range(1, length)], minor=True)
    axis.set_yticks([x - 0.5 for x in range(1, length)], minor=True)
    axis.grid(which="minor", color="white", linewidth=0.5)
    axis.tick_params(which="both", bottom=False, left=False, labelbottom=False, labelleft=False)
    axis.set_xlabel("is seen", fontsize=8)
    axis.set_ylabel("sees", fontsize=8)
    axis.set_title(f"{name}: who sees whom", loc="left", fontsize=9)


def main() -> None:
    target = sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).with_name("layouts.png"))
    figure = plt.figure(figsize=(9, 7.6))
    grid = figure.add_gridspec(4, 2, height_ratios=(4, 1, 1, 16), hspace=0.4, wspace=0.1)
    for row, name in enumerate(TITLES):
        draw_rows(figure.add_subplot(grid[row, :]), name)
    for column, name in enumerate(("packed", "shared")):
        draw_mask(figure.add_subplot(grid[3, column]), name)  # type: ignore[arg-type]
    legend = [
        Patch(color=color, label=name if name != "fill" else "padding, or not seen") for name, color in COLORS.items()
    ]
    figure.legend(handles=legend, loc="lower center", ncol=4, frameon=False, fontsize=8)
    figure.savefig(target, dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    main()
