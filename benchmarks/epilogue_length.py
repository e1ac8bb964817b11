"""How many instructions a warp runs for a logit after the last product of its tile, read off NVIDIA machine code.

The path is the shortest through the branches from the last product to the next one, or to the end, that takes as many
powers of two as the tile has logits: tiles that hold no target skip what compares columns, and most hold none.
"""

from __future__ import annotations

import heapq
import re

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);")
_LABEL = re.compile(r"^(\.L_\w+):")
_BRANCH = re.compile(r"\bBRA\b.*\((\.L_\w+)\)")
_PRODUCT = re.compile(r"\b(?:HGMMA|UTCHMMA|HMMA)\b")


def instructions_a_logit(code: str, logits: int) -> float | None:
    """code: `nvdisasm -c`. logits: those of a thread, each with one power of two. None where there is no such path."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(lines)
        elif instruction := _INSTRUCTION.match(line):
            lines.append(instruction[1])
    products = {i for i, line in enumerate(lines) if _PRODUCT.search(line)}
    if not products:
        return None
    # The last product in the loop: those in straight lines before it wait for the same tile.
    queue = [(0, start + 1, 0) for start in products if start + 1 not in products]
    done: set[tuple[int, int]] = set()
    while queue:
        length, at, powers = heapq.heappop(queue)
        if at >= len(lines) or (at, powers) in done:
            continue
        done.add((at, powers))
        line = lines[at]
        ends = at in products or (line.split()[0] == "EXIT")
        if ends:
            if powers >= logits:
                return length / logits
            continue  # a path past another product is not the epilogue's
        powers = min(powers + ("MUFU.EX2" in line), logits)
        branch = _BRANCH.search(line)
        if branch:
            heapq.heappush(queue, (length + 1, labels[branch[1]], powers))
        if not branch or line.startswith("@") or re.search(r"\bBRA U?!?U?P\d", line):
            heapq.heappush(queue, (length + 1, at + 1, powers))
    return None
