"""What a head costs on many cards: predicted from the rates of cards and links, not measured.

A layout spreads the head [V, D] over `tp` ranks by its rows (`vocab_parallel`), and what each of these holds over
`fsdp` more, of which groups of `cp` share their sequences. Every card has the same number n of scored tokens to its
name; a group of tp ranks works on tp n of them together, each on V / tp rows, so that all layouts do the same work on a
card. What travels, through one card in one step, with w bytes a number of the model (2 in bf16):

    tp      forward     the targets' logits                  all-reduce [tp n] fp64
                        the competitors' logsumexps          all-gather [tp n] fp64 of each rank
            backward    the gradient of hidden               all-reduce [tp n, D], while the weight's is computed
    fsdp    forward     the weight                           all-gather [V / tp, D], while the layer before it runs
            backward    its gradient, where the head trains  reduce-scatter [V / tp, D], while the layer before it runs
    cp      either way  each pair's sums and counts          all-reduce of 6 B numbers (`sequence_parallel`)

A ring moves 2 (P - 1) / P of an all-reduced tensor through every rank, and (P - 1) / P of one that is gathered whole
or scattered. Ranks of one node talk over NVLink; a group that spans nodes has one network card for each of its ranks
in a node, up to what NVLink feeds them with. What hides is the shorter of an exchange and of the work beside it; a
decoder layer is taken for 12 D^2 weights, and the head to be in FSDP's root group, which is gathered once a step.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil
from typing import Any, NamedTuple

from orpo_kernels.costs import CARDS, Prediction, predict
from orpo_kernels.plan import Plan

NODE = 8  # cards
# GB/s through a card, one way, as data sheets give them: H100 and H200's NVLink, and a network card of 400 Gb/s each.
NVLINK, FABRIC = 450.0, 50.0
# Of a collective that moves next to nothing, in ms: assumed, the order of what NCCL takes.
LATENCY_NODE, LATENCY_FABRIC = 0.02, 0.05
_ITEM, _WIDE = 2, 8  # bytes of bf16, and of the fp64 in which a token's numbers travel
_LAYER = 12  # weights of a decoder layer / D^2: 4 of attention, 8 of the rest


class Layout(NamedTuple):
    """tp ranks hold the head's rows, each of which fsdp ranks share; cp of these share a sequence."""

    tp: int = 1
    fsdp: int = 1
    cp: int = 1

    @property
    def cards(self) -> int:
        return self.tp * self.fsdp

    def __str__(self) -> str:
        parts = [f"CP {self.cp}"] if self.cp > 1 else []
        parts += [f"FSDP {self.fsdp}"] if self.fsdp > 1 else []
        parts += [f"TP {self.tp}"] if self.tp > 1 else []
        return " x ".join(parts) or "one card"


class Exchange(NamedTuple):
    """moved: bytes through a card, each way. ms: of the link. hidden: ms of it that pass beside other work."""

    name: str
    moved: float
    ms: float
    hidden: float

    @property
    def exposed(self) -> float:
        return self.ms - self.hidden


class OnRanks(NamedTuple):
    """A step of the head on one card of a layout. weight_bytes: of the head's weight, as the step needs it there."""

    layout: Layout
    compute: Prediction
    exchanges: tuple[Exchange, ...]
    weight_bytes: int

    @property
    def moved(self) -> float:
        return sum(exchange.moved for exchange in self.exchanges)

    @property
    def link_ms(self) -> float:
        return sum(exchange.ms for exchange in self.exchanges)

    @property
    def exposed_ms(self) -> float:
        return sum(exchange.exposed for exchange in self.exchanges)

    @property
    def ms(self) -> float:
        return self.compute.ms + self.exposed_ms


def predict_layout(
    layout: Layout,
    tokens: int,
    hidden_size: int,
    vocab_size: int,
    card: str,
    *,
    pairs: int,
    train_weight: bool,
    softcap: bool = False,
    ignored: float = 0.25,
    plan: Plan | None = None,
) -> OnRanks:
    """A step of the head, in bf16, forward and backward.

    tokens: n, scored ones to a card. pairs: B, to a card. ignored: share of the positions that are not scored.
    card: one of `costs.CARDS`.

    Raises ValueError for sizes below 1, a cp that does not divide fsdp, a tp beyond V, and as `costs.predict` does.
    """
    _check(layout, vocab_size)
    n, d, rows = layout.tp * tokens, hidden_size, ceil(vocab_size / layout.tp)
    compute = predict(plan or Plan(), n, d, rows, card, train_hidden=True, train_weight=train_weight, softcap=softcap)
    layer = _layer_ms(tokens, d, card, ignored)
    exchanges = []
    if layout.tp > 1:
        tp = _Ring(layout.tp, layout.tp)
        exchanges += [
            tp.all_reduce("targets' logits", _WIDE * n),
            tp.all_gather("competitors' logsumexps", _WIDE * n * layout.tp),
            tp.all_reduce("gradient of hidden", _ITEM * n * d, _backward(compute) if train_weight else 0.0),
        ]
    if layout.fsdp > 1:
        fsdp = _Ring(layout.fsdp, layout.tp * layout.fsdp, layout.tp)
        exchanges.append(fsdp.all_gather("weight", _ITEM * rows * d, layer))
        if train_weight:
            exchanges.append(fsdp.all_gather("gradient of weight", _ITEM * rows * d, 2 * layer))
    if layout.cp > 1:
        cp = _Ring(layout.cp, layout.tp * layout.cp, layout.tp)
        sums = 4 * 6 * pairs * layout.cp * layout.tp
        exchanges += [cp.all_reduce("sums of sequences", sums), cp.all_reduce("their gradients", sums)]
    return OnRanks(layout, compute, tuple(exchanges), _ITEM * rows * d)


def tokens_to_hide(layout: Layout, hidden_size: int, vocab_size: int, card: str, *, ignored: float = 0.25) -> int:
    """Scored tokens to a card from which on the layer before the head takes as long as the gather of its weight."""
    one = predict_layout(layout, 1, hidden_size, vocab_size, card, pairs=1, train_weight=False, ignored=ignored)
    (gather,) = (exchange.ms for exchange in one.exchanges if exchange.name == "weight")
    return ceil(gather / _layer_ms(1, hidden_size, card, ignored))


def layouts_of(tp: int, cards: int) -> list[Layout]:
    """What to choose between on so many cards: FSDP, sequences cut in a node, 2, 4, ... up to `tp` ranks of TP.

    Raises ValueError for a tp that is no power of 2 from 2 to `cards`.
    """
    steps = [2**power for power in range(1, cards.bit_length()) if cards % 2**power == 0]
    if tp not in steps:
        raise ValueError(f"tp={tp}: on {cards} cards use one of {', '.join(map(str, steps))}")
    shared = [Layout(tp=size, fsdp=cards // size) for size in steps if size <= tp]
    return [Layout(fsdp=cards), Layout(fsdp=cards, cp=min(NODE, cards)), *shared]


class _Ring:
    """ranks: P. span: how many cards lie between its first and its last; apart: between two that follow each other."""

    def __init__(self, ranks: int, span: int, apart: int = 1) -> None:
        self.ranks = ranks
        inside = span <= NODE
        self.bandwidth = NVLINK if inside else min(NVLINK, FABRIC * max(1, NODE // apart))
        self.latency = LATENCY_NODE if inside else LATENCY_FABRIC

    def all_reduce(self, name: str, size: float, beside: float = 0.0) -> Exchange:
        return self._move(name, 2 * size * (self.ranks - 1) / self.ranks, beside)

    def all_gather(self, name: str, size: float, beside: float = 0.0) -> Exchange:
        """size: of the whole; a reduce-scatter moves as much."""
        return self._move(name, size * (self.ranks - 1) / self.ranks, beside)

    def _move(self, name: str, moved: float, beside: float) -> Exchange:
        ms = self.latency + 1e-6 * moved / self.bandwidth
        return Exchange(name, moved, ms, min(ms, beside))


def _layer_ms(tokens: int, d: int, card: str, ignored: float) -> float:
    """Of a decoder layer's forward; tokens: scored ones."""
    return 2 * _LAYER * d * d * tokens / (1.0 - ignored) / (CARDS[card].tflops * 1e9)


def _backward(compute: Prediction) -> float:
    """ms of what a trained head's weight gradient takes."""
    parts = ("logits again", "   their gradients", "gradients x hidden", "   sums of cut products")
    return sum(part.ms for part in compute.parts if part.name in parts)


def _check(layout: Layout, vocab_size: int) -> None:
    for name, size in layout._asdict().items():
        if size < 1:
            raise ValueError(f"{name}={size}: it must be at least 1")
    if layout.fsdp % layout.cp:
        raise ValueError(f"cp={layout.cp} does not divide fsdp={layout.fsdp}: cut sequences share the weights' ranks")
    if layout.tp > vocab_size:
        raise ValueError(f"tp={layout.tp}: the head has {vocab_size} rows to share")


def report(
    tp: int, tokens: int, hidden_size: int, vocab_size: int, card: str, *, cards: tuple[int, ...], **options: Any
) -> str:
    """Tables of `layouts_of` each of `cards`, for a frozen and a trained head. The rest as for `predict_layout`."""
    on = CARDS[card]
    lines = [
        f"Predicted, not measured: {on.name} at {on.tflops:g} TFLOP/s, NVLink {NVLINK:g} GB/s, fabric {FABRIC:g} GB/s "
        f"a card,\n{tokens:,} scored tokens a card in every layout (a group of TP shares those of its cards), bf16."
    ]
    layouts = [layout for number in cards for layout in layouts_of(min(tp, number), number)]
    for setting, train_weight in (("Frozen head", False), ("Trained head", True)):
        found = [
            predict_layout(layout, tokens, hidden_size, vocab_size, card, train_weight=train_weight, **options)
            for layout in layouts
        ]
        lines += ["", f"{setting}:", "", *table(found)]
    enough = [
        f"{tokens_to_hide(layout, hidden_size, vocab_size, card, ignored=options['ignored']):,} on {layout.cards} cards"
        for layout in layouts
        if layout.tp == layout.cp == 1
    ]
    lines += ["", f"FSDP's gather hides wholly from as many scored tokens a card on: {', '.join(enough)}."]
    return "\n".join(lines)


def table(found: list[OnRanks]) -> list[str]:
    """Lines of Markdown, a layout each."""
    names = ("cards", "layout", "weight, MiB", "over links, MB", "link, ms", "hidden, ms", "head, ms", "all, ms")
    lines = [_row(names), _row(["---"] * len(names))]
    for one in found:
        hidden = one.link_ms - one.exposed_ms
        numbers = (one.weight_bytes / 2**20, one.moved / 1e6)
        times = (one.link_ms, hidden, one.compute.ms, one.ms)
        cells = [str(one.layout.cards), str(one.layout), *(f"{x:,.0f}" for x in numbers), *(f"{x:.2f}" for x in times)]
        lines.append(_row(cells))
    return lines


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
