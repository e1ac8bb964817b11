"""How long a call takes on a card: predicted from a few of the card's rates, not measured.

    product     the longer of  operations / rate  and  bytes / bandwidth
    waves       how unevenly a product's tiles of 128 x 256 fill the multiprocessors; the kernels' own only, as the
                library cuts the inner dimension of its products to fill them
    epilogue    instructions after a tile's last product, four warps a cycle and multiprocessor (of powers of two, half
                a warp): in the kernels' own tiles nothing else runs meanwhile
    rows        bytes between the products / bandwidth
    launches    a gap on the device each, and what a kernel of a few rows takes

The host launches ahead of the device; where it takes longer, as on a small head, its time counts. Instructions are
those that the kernels compile to for compute capability 9.0 (`benchmarks/kernel_resources.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

import torch

from orpo_kernels.plan import Plan, Schedule

_TILE = (128, 256)
# Instructions a logit, without and with a soft-cap.
_EXPONENTIALS, _GRADIENT = (7.0, 24.0), (6.7, 24.0)
_LANES, _POWERS = 128, 16  # a cycle and multiprocessor
# Measured on an H200 and its host (docs/gpu.md): 0.3 to 0.6 ms for 75 launches; and a launch from Python, arguments
# and all.
_GAP_MS, _HOST_MS = 0.005, 0.08
# Of a chunk of the forward, more where it is kept, and of a block of the backward.
_CHUNK_LAUNCHES, _KEPT_LAUNCHES, _BLOCK_LAUNCHES = 8, 6, 2


class Card(NamedTuple):
    """tflops: of bf16 products, as a library reaches them (10^12 a second). bandwidth: TB/s, as a copy reaches it.
    clock: GHz."""

    name: str
    tflops: float
    bandwidth: float
    multiprocessors: int
    clock: float


# H100 and H200 as measured (docs/gpu.md); A100 and B200 at 80 and 75 % of the products' and 90 % of the memory's rate
# that NVIDIA's data sheets state.
CARDS = {
    "a100": Card("A100 80GB SXM", 250.0, 1.8, 108, 1.41),
    "h100": Card("H100 SXM", 750.0, 3.0, 132, 1.755),
    "h200": Card("H200 SXM", 750.0, 4.2, 132, 1.755),
    "b200": Card("B200", 1690.0, 7.0, 148, 1.85),
}


class Part(NamedTuple):
    name: str
    ms: float


@dataclass(frozen=True)
class Prediction:
    """Milliseconds of a forward and backward, part by part. host: what the host needs to launch it all."""

    card: Card
    schedule: Schedule
    parts: tuple[Part, ...]
    host: float

    @property
    def ms(self) -> float:
        return max(sum(part.ms for part in self.parts), self.host)

    def __str__(self) -> str:
        card = self.card
        lines = [f"predicted for {card.name} at {card.tflops:g} TFLOP/s and {card.bandwidth:g} TB/s:"]
        lines += [f"  {part.name:<34}{part.ms:9.2f} ms" for part in self.parts]
        lines.append(f"  {'all':<34}{self.ms:9.2f} ms; the host launches it in {self.host:.1f} ms")
        return "\n".join(lines)


def predict(
    plan: Plan,
    tokens: int,
    hidden_size: int,
    vocab_size: int,
    card: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    train_hidden: bool = True,
    train_weight: bool = False,
    softcap: bool = False,
) -> Prediction:
    """Of a call on N=`tokens` scored tokens by the Triton kernels.

    card: one of CARDS. dtype: the compute dtype, bf16.

    Raises ValueError for another card or dtype; `plan.ScratchTooSmall` as `Plan.schedule` does.
    """
    if card not in CARDS:
        raise ValueError(f"card={card!r}: rates are known of {', '.join(CARDS)}")
    if dtype != torch.bfloat16:
        raise ValueError(f"dtype={dtype}: rates are known of products of bfloat16")
    on, n, d, v = CARDS[card], tokens, hidden_size, vocab_size
    schedule = plan.schedule(
        n,
        d,
        v,
        dtype,
        "cuda",
        train_hidden=train_hidden,
        train_weight=train_weight,
        softcap=softcap,
        full_vocab_tiles=True,
    )

    def product(rows: int, columns: int, moved: float) -> float:
        """Of D products each; moved: bytes."""
        return max(2e-9 * rows * columns * d / on.tflops, _passing(on, moved))

    def tiles(rows: int, columns: int, instructions: tuple[float, float]) -> tuple[float, float]:
        """A product of the kernels' own, in chunks of `rows`, and its epilogue."""
        made = ceil(rows / _TILE[0]) * ceil(columns / _TILE[1])
        uneven = ceil(made / on.multiprocessors) * on.multiprocessors / made
        cycles = max(instructions[softcap] / _LANES, (1 + softcap) / _POWERS)
        epilogue = 1e-6 * rows * columns * cycles / (on.multiprocessors * on.clock)
        moved = 2 * d * (columns + rows) + 2 * rows * columns
        return product(rows, columns, moved) * uneven, epilogue

    def total(pieces: list[int], of: tuple[float, ...], size: int) -> float:
        return sum(of) * sum(pieces) / max(size, 1)

    forward = [min(schedule.forward_chunk, n - start) for start in range(0, n, max(schedule.forward_chunk, 1))]
    chunk = forward[0] if forward else 0
    logits, epilogue = tiles(chunk, v, _EXPONENTIALS) if chunk else (0.0, 0.0)
    parts = [
        Part("logits", total(forward, (logits,), chunk)),
        Part("   exponentials", total(forward, (epilogue,), chunk)),
    ]
    launches = (_CHUNK_LAUNCHES + (_KEPT_LAUNCHES if schedule.keep_rows else 0)) * len(forward)
    if train_hidden:
        u = product(chunk, v, 2 * d * v + 2 * chunk * v + 4 * chunk * d)
        parts.append(Part("u: exponentials x weight", total(forward, (u,), chunk)))
        # The product in fp32, the target's row and u; then u and the gradient.
        parts.append(Part("   rows of u and the gradient", _passing(on, n * d * (4 + 2 + 2 + 2 + 2))))
    if train_weight:
        block, rows = schedule.backward_block, n - schedule.keep_rows
        blocks = ceil(v / block)
        if rows:
            again, epilogue = tiles(rows, block, _GRADIENT)
            parts += [Part("logits again", again * v / block), Part("   their gradients", epilogue * v / block)]
        cuts = ceil(rows / schedule.backward_chunk) + ceil(schedule.keep_rows / schedule.backward_chunk)
        weight = product(n, block, 2 * d * (n + block) + 2 * n * block)
        parts.append(Part("gradients x hidden", weight * v / block))
        if cuts > 1:
            parts.append(Part("   sums of cut products", _passing(on, 8 * d * v * cuts)))
        launches += blocks * _BLOCK_LAUNCHES * cuts
    parts.append(Part("launches", _GAP_MS * launches))
    return Prediction(on, schedule, tuple(parts), _HOST_MS * launches)


def _passing(card: Card, moved: float) -> float:
    """Milliseconds of so many bytes."""
    return 1e-9 * moved / card.bandwidth
