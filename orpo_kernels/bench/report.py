"""A result as a table, and two results side by side."""

from __future__ import annotations

from typing import Any

from orpo_kernels.plan import MIB

TITLES = {
    "evaluation": "Evaluation: forward, no gradient",
    "frozen": "Frozen head: forward + backward",
    "trained": "Trained head: forward + backward",
}
_ERRORS = ("logps", "statistics", "loss", "hidden_gradient", "weight_gradient")


def table(result: dict[str, Any]) -> str:
    """Every mode's peers with what was measured, then those that could not be, with their reasons."""
    lines = [headline(result)]
    for mode in _modes(result):
        rows = [row for row in result["results"] if row["mode"] == mode]
        measured = [row for row in rows if row["samples"]]
        gradients = next((row["gradient_bytes"] for row in measured), 0)
        lines += ["", TITLES[mode] + (f"; {gradients / MIB:,.1f} MiB of each peak are gradients" if gradients else "")]
        lines.append(
            f"  {'':<36}{'holds':<14}{'seconds':>9}{'quartiles':>17}{'min':>9}{'forward':>9}{'peak MiB':>10}"
            f"{'log-prob':>10}{'stats':>9}{'loss':>9}{'d hidden':>10}{'d weight':>10}"
        )
        lines += [_row(row) for row in sorted(measured, key=lambda row: row["summary"]["total_s"]["median"])]
        lines += [f"  {row['label']:<36}{row['status']}: {row['reason']}" for row in rows if row["status"] != "ok"]
    for row in result["sweep"]:
        if row["status"] != "ok":
            lines.append(f"T={row['length']} {row['peer']} {row['mode']}: {row['reason']}")
    return "\n".join(lines)


def headline(result: dict[str, Any]) -> str:
    p = result["problem"]
    cap = "" if p["softcap"] is None else f", soft-cap {p['softcap']:g}"
    return (
        f"{p['pairs']} pairs as {2 * p['pairs']} x {p['padded_length']} positions, {p['scored']} scored; "
        f"D={p['hidden_size']}, V={p['vocab_size']}, {p['dtype']}{cap}"
        f"{', with statistics' if p.get('statistics') else ''}\n{result['machine']['name']}; "
        f"torch {result['versions']['torch']}; full rounds: {result['full_rounds']}, "
        f"repeats {result['settings']['repeats']}, medians; errors against float64"
    )


def _row(row: dict[str, Any]) -> str:
    total, forward, peak = (row["summary"][name] for name in ("total_s", "forward_s", "peak_bytes"))
    spread = f"{_seconds(total['q1'])}-{_seconds(total['q3'])}"
    memory = "-" if peak is None else f"{peak['median'] / MIB:,.1f}"
    errors = [None if row["errors"] is None else row["errors"].get(name) for name in _ERRORS]
    texts = ["-" if error is None else f"{error:.1e}" for error in errors]
    return (
        f"  {row['label']:<36}{row['logits']:<14}{_seconds(total['median']):>9}{spread:>17}{_seconds(total['min']):>9}"
        f"{_seconds(forward['median']):>9}{memory:>10}{texts[0]:>10}{texts[1]:>9}{texts[2]:>9}{texts[3]:>10}{texts[4]:>10}"
    )


def _seconds(seconds: float) -> str:
    """Three digits and more: 12.3, 1.234, 0.01234."""
    return f"{seconds:.1f}" if seconds >= 10 else f"{seconds:.3f}" if seconds >= 0.1 else f"{seconds:.5f}"


def _modes(result: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["mode"] for row in result["results"]))


def compare(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Medians of both and their ratio, after / before, for every peer and mode; what differs in the set-up first."""
    lines = [f"before: {headline(before)}", f"after:  {headline(after)}"]
    for part in ("machine", "problem", "versions"):
        differing = [
            f"{key} {before[part].get(key)} -> {after[part].get(key)}"
            for key in dict.fromkeys([*before[part], *after[part]])
            if before[part].get(key) != after[part].get(key)
        ]
        if differing:
            lines.append(f"not the same {part}: {'; '.join(differing)}")
    old, new = ({(row["mode"], row["peer"]): row for row in result["results"]} for result in (before, after))
    for mode in dict.fromkeys([*_modes(before), *_modes(after)]):
        lines += ["", TITLES[mode]]
        lines.append(f"  {'':<36}{'seconds':>9}{'':>9}{'ratio':>7}{'':>4}{'peak MiB':>10}{'':>10}{'ratio':>7}")
        for key in dict.fromkeys([*old, *new]):
            if key[0] == mode:
                lines.append(_both(old.get(key), new.get(key)))
    return "\n".join(lines)


def _both(old: dict[str, Any] | None, new: dict[str, Any] | None) -> str:
    label = (old or new or {})["label"]
    if old is None or new is None:
        return f"  {label:<36}only {'after' if old is None else 'before'}"
    if not (old["samples"] and new["samples"]):
        return f"  {label:<36}{old['reason'] or 'measured'} | {new['reason'] or 'measured'}"
    a, b = (row["summary"]["total_s"] for row in (old, new))
    # Quartiles that overlap do not tell the two apart.
    overlap = a["q1"] <= b["q3"] and b["q1"] <= a["q3"]
    line = (
        f"  {label:<36}{_seconds(a['median']):>9}{_seconds(b['median']):>9}{b['median'] / a['median']:>7.2f}"
        f"{' ~' if overlap else '':<4}"
    )
    a, b = (row["summary"]["peak_bytes"] for row in (old, new))
    if a is None or b is None:
        return line
    ratio = f"{b['median'] / a['median']:.2f}" if a["median"] else "-"
    return f"{line}{a['median'] / MIB:>10,.1f}{b['median'] / MIB:>10,.1f}{ratio:>7}"
