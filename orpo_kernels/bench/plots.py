"""Pictures of a result: time against memory, and memory against length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from orpo_kernels.bench.report import TITLES, headline
from orpo_kernels.plan import MIB

_OURS = ("#0b6e99", "#12a2a8", "#5b4b8a")
_OTHERS = ("#c44e52", "#dd8452", "#937860", "#8c8c8c", "#ccb974", "#da8bc3", "#64874b", "#a1743b", "#444444", "#b0b0b0")
_MARKERS = "osD^vP*XhdpH"


def write(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write the PNGs that the result has figures for; their paths."""
    styles = _styles(result)
    written = []
    panels: dict[str, list[dict[str, Any]]] = {}
    for row in result["results"]:
        if row["samples"] and row["summary"]["peak_bytes"] is not None:
            panels.setdefault(row["mode"], []).append(row)
    if panels:
        written.append(_figure(folder / "time_memory.png", result, panels, _scatter, styles))
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in _points(result):
        lines.setdefault(row["mode"], []).append(row)
    if lines:
        written.append(_figure(folder / "memory_length.png", result, lines, _curves, styles))
    return written


def _points(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The sweep's rows and, at its own length, the main measurement's; none without a sweep."""
    rows = [row for row in result["sweep"] if row["peak_bytes"] is not None]
    swept = {(row["mode"], row["peer"]) for row in rows}
    for row in result["results"]:
        if (row["mode"], row["peer"]) in swept and row["summary"]["peak_bytes"] is not None:
            rows.append({**row, "length": result["problem"]["length"], "peak_bytes": row["summary"]["peak_bytes"]})
    return rows


def _styles(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Colour, marker and label of each peer."""
    found: dict[str, dict[str, Any]] = {}
    counts = {True: 0, False: 0}
    for row in result["results"]:
        if row["peer"] in found:
            continue
        ours = row["peer"].startswith("ours")
        colors = _OURS if ours else _OTHERS
        color, marker = colors[counts[ours] % len(colors)], _MARKERS[len(found) % len(_MARKERS)]
        found[row["peer"]] = {"color": color, "marker": marker, "label": row["label"], "markersize": 9 if ours else 7}
        counts[ours] += 1
    return found


def _figure(
    path: Path, result: dict[str, Any], panels: dict[str, list[dict[str, Any]]], draw: Any, styles: dict[str, Any]
) -> Path:
    figure = Figure(figsize=(1.5 + 4.6 * len(panels), 5.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(headline(result), fontsize=9, x=0.01, ha="left")
    shown: dict[str, None] = {}
    for axes, (mode, rows) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        draw(axes, rows, styles)
        axes.set_title(TITLES[mode], loc="left", fontsize=10)
        axes.grid(alpha=0.25, which="both")
        axes.spines[["top", "right"]].set_visible(False)
        shown |= {row["peer"]: None for row in rows}
    handles = [Line2D([], [], linestyle="", **styles[peer]) for peer in shown]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path)
    return path


def _scatter(axes: Axes, rows: list[dict[str, Any]], styles: dict[str, Any]) -> None:
    for row in rows:
        time, memory = row["summary"]["total_s"], row["summary"]["peak_bytes"]
        axes.errorbar(
            time["median"],
            _mib(memory["median"]),
            xerr=_bars(time),
            yerr=[[bar[0] / MIB] for bar in _bars(memory)],
            capsize=2,
            linestyle="",
            **styles[row["peer"]],
        )
    axes.set_yscale("log")
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds: median and quartiles")
    axes.set_ylabel("peak memory (MiB)")


def _curves(axes: Axes, rows: list[dict[str, Any]], styles: dict[str, Any]) -> None:
    for peer in dict.fromkeys(row["peer"] for row in rows):
        points = sorted((row for row in rows if row["peer"] == peer), key=lambda row: row["length"])
        many = [row["peak_bytes"] if isinstance(row["peak_bytes"], dict) else None for row in points]
        middle = [bar["median"] if bar else row["peak_bytes"] for bar, row in zip(many, points, strict=True)]
        spread = [_bars(bar) if bar else [[0.0], [0.0]] for bar in many]
        axes.errorbar(
            [row["length"] for row in points],
            [_mib(number) for number in middle],
            yerr=[[bars[side][0] / MIB for bars in spread] for side in (0, 1)],
            capsize=2,
            linewidth=1.2,
            **styles[peer],
        )
    axes.set_yscale("log")
    axes.set_xlabel("T, tokens a row")
    axes.set_ylabel("peak memory (MiB)")


def _bars(spread: dict[str, float]) -> list[list[float]]:
    """matplotlib's error bars: from the median down to the first quartile, up to the third."""
    return [[spread["median"] - spread["q1"]], [spread["q3"] - spread["median"]]]


def _mib(number: float) -> float:
    return max(number / MIB, 0.01)  # a logarithm must be taken of it
