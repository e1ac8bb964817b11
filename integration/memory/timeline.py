"""The memory of a step of many layers, from that of a few.

Forward and backward are cut at every layer's input. A segment is what happens between two cuts: by how much memory
changes, and how far above its beginning it rises meanwhile. Layers of a kind make equal segments, so a model of L
layers has those of a shorter one in which a stretch of layers, from `first` on and of `period` layers, is there
`repeats` times.

    forward    embeddings, 0, 1, ..., L-1 and what is behind     |  head and loss  |
    backward   what is behind and L-1, ..., 1, 0 and embeddings
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .live import Segment


class Moment(NamedTuple):
    """Bytes above weights and optimiser state. gradients: of parameters, among them."""

    when: str
    live: int
    gradients: int


@dataclass(frozen=True)
class Timeline:
    """forward, backward: segments in their order, those of layers named "layer I". released: what goes between them,
    after the loss: autocast's copies of weights."""

    forward: tuple[Segment, ...]
    released: tuple[Segment, ...]
    backward: tuple[Segment, ...]

    def extended(self, first: int, period: int, repeats: int) -> Timeline:
        """With layers `first` to `first + period - 1` there `repeats` times instead of once."""
        names = {f"layer {index}" for index in range(first, first + period)}
        return Timeline(*(_repeated(part, names, repeats) for part in (self.forward, self.released, self.backward)))

    def at_loss(self) -> Moment:
        """When the backbone's forward is done."""
        return Moment("loss", sum(s.change for s in self.forward), sum(s.gradients for s in self.forward))

    def peaks(self) -> list[Moment]:
        """The highest of the forward, and of the backward behind the loss."""
        found = [_highest("forward", 0, 0, self.forward)]
        _, live, gradients = self.at_loss()
        live += sum(s.change for s in self.released)
        found.append(_highest("backward", live, gradients, self.backward))
        return found

    def end(self) -> Moment:
        """After the backward: gradients, and what else outlives it."""
        segments = (*self.forward, *self.released, *self.backward)
        return Moment("optimizer", sum(s.change for s in segments), sum(s.gradients for s in segments))


def _highest(when: str, live: int, gradients: int, segments: tuple[Segment, ...]) -> Moment:
    best = Moment(when, live, gradients)
    for segment in segments:
        if live + segment.rise > best.live:
            best = Moment(when, live + segment.rise, gradients + segment.gradients_at_rise)
        live += segment.change
        gradients += segment.gradients
    return best


def _repeated(segments: tuple[Segment, ...], names: set[str], repeats: int) -> tuple[Segment, ...]:
    inside = [at for at, segment in enumerate(segments) if segment.name in names]
    if not inside:
        return segments
    start, stop = inside[0], inside[-1] + 1
    stretch = segments[start:stop]
    # What all layers share goes once, with the last that uses it.
    earlier = tuple(segment._replace(change=segment.change - segment.shared) for segment in stretch)
    return segments[:start] + earlier * (repeats - 1) + stretch + segments[stop:]
