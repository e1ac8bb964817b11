"""What fits a card: the longest length, the largest batch, and what to change.

Memory grows with length and batch, about as a polynomial of second degree. So the largest that fits is guessed from a
parabola through what is known, and proven by an estimate of itself and one of the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from .footprint import LOSSES, Footprint, footprint
from .run import Run
from .step import Rehearsal

STEP = 64  # tokens: lengths are asked about in multiples
_LONGEST = 1 << 20
_MOST_PAIRS = 1 << 14
_LORA_RANK = 16
_GPUS = (2, 4, 8)


def most(bytes_of: Callable[[int], int], budget: int, limit: int) -> int:
    """The largest n from 1 to `limit` with bytes_of(n) <= budget, 0 for none. bytes_of must not fall."""
    known: dict[int, int] = {}

    def fits(n: int) -> bool:
        if n not in known:
            known[n] = bytes_of(n)
        return known[n] <= budget

    low, high = 0, limit + 1
    for n in (1, min(limit, 8), min(limit, 16)):
        if low < n < high:
            low, high = (n, high) if fits(n) else (low, n)
    while high - low > 1:
        wide = high - low
        guess = min(max(_crossing(known, budget), low + 1), high - 1, 8 * max(low, 1))
        for n in (guess, guess + 1 if fits(guess) else guess - 1):
            if low < n < high:
                low, high = (n, high) if fits(n) else (low, n)
        if high <= limit and 1 < high - low > wide // 4:  # what is held turns from one thing into another
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _crossing(known: dict[int, int], budget: int) -> int:
    """Where the parabola through the three points nearest to the budget reaches it, rounded down."""
    near = sorted(sorted(known, key=lambda n: (abs(known[n] - budget), -n))[:3])
    if len(near) < 2:
        return near[0] + 1
    (a, b), last = near[:2], near[-1]
    slope = (known[b] - known[a]) / (b - a)
    bend = ((known[last] - known[b]) / (last - b) - slope) / (last - a) if last != b else 0.0
    low, high = float(near[0]) / 16, float(16 * last)

    def value(n: float) -> float:
        return known[a] + (n - a) * (slope + (n - b) * bend)

    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if value(middle) <= budget else (low, middle)
    return int(low)


class Change(NamedTuple):
    """name: the option of `orpo-kernels estimate`; argument: a trainer's. costs: in words."""

    name: str
    argument: str
    costs: str
    run: Run
    result: Footprint | None


@dataclass(frozen=True)
class Answers:
    """For a card of `budget` bytes. longest, pairs: by loss; what was asked for otherwise being as it was. advice: for
    our loss, the cheapest first; together: all of the changes that it takes, where one alone is not enough."""

    budget: int
    asked: Footprint
    longest: dict[str, int]
    pairs: dict[str, int]
    advice: list[Change]
    together: Change | None

    @property
    def fits(self) -> bool:
        return self.asked.ours.total <= self.budget


class Advisor:
    """Asks about one run; what it rehearsed is used again."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._rehearsal = Rehearsal(run)
        self._known: dict[tuple[int, int], Footprint] = {}

    def ask(self, pairs: int | None = None, length: int | None = None) -> Footprint:
        key = (pairs or self.run.pairs, length or self.run.length)
        if key not in self._known:
            self._known[key] = footprint(replace(self.run, pairs=key[0], length=key[1]), self._rehearsal)
        return self._known[key]

    def longest(self, budget: int, loss: str) -> int:
        """Tokens a row, a multiple of STEP."""
        return STEP * most(lambda n: getattr(self.ask(length=STEP * n), loss).total, budget, self._limit() // STEP)

    def most_pairs(self, budget: int, loss: str) -> int:
        return most(lambda n: getattr(self.ask(pairs=n), loss).total, budget, _MOST_PAIRS)

    def answers(self, budget: int) -> Answers:
        asked = self.ask()
        longest = {loss: self.longest(budget, loss) for loss in LOSSES}
        pairs = {loss: self.most_pairs(budget, loss) for loss in LOSSES}
        advice: list[Change] = []
        together = None
        if asked.ours.total > budget:
            advice, together = self._advice(budget, longest["ours"])
        return Answers(budget, asked, longest, pairs, advice, together)

    def _limit(self) -> int:
        """A model with a table of positions has no more of them."""
        from ..data.limits import max_positions

        return max_positions(self._rehearsal.model) or _LONGEST

    def _advice(self, budget: int, longest: int) -> tuple[list[Change], Change | None]:
        found = []
        whole = self.run
        names: list[str] = []
        arguments: list[str] = []
        together = None
        for name, argument, costs, fields in changes_of(self.run):
            found.append(tried(name, argument, costs, replace(self.run, **fields)))
            whole = replace(whole, **_but_spread(fields, whole))
            names.append(name)
            arguments.append(argument)
            if together is None and len(names) > 1:
                both = tried(" ".join(names), ", ".join(arguments), "all of these", whole)
                together = both if both.result is not None and both.result.ours.total <= budget else None
        if longest:
            found.append(
                Change(
                    f"--length {longest}",
                    f"max_length={longest}",
                    "longer rows are cut",
                    self.run,
                    self.ask(length=longest),
                )
            )
        alone = any(change.result is not None and change.result.ours.total <= budget for change in found)
        return found, None if alone else together


def tried(name: str, argument: str, costs: str, run: Run) -> Change:
    try:
        return Change(name, argument, costs, run, footprint(run))
    except ValueError:  # such as a layout that the architecture does not have
        return Change(name, argument, costs, run, None)


def _but_spread(fields: dict[str, Any], run: Run) -> dict[str, Any]:
    """Of cards, the most that have been named."""
    return fields if "shards" not in fields else fields | {"shards": max(run.shards, fields["shards"])}


def changes_of(run: Run) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """(option, a trainer's argument, what it costs, fields of `Run`), the cheapest first."""
    if run.layout == "padded":
        costs = "nothing, where the model can have it (docs/layouts.md)"
        yield "--packing", "packing=True", costs, {"layout": "shared"}
    if run.pairs > 1:
        argument = f"per_device_train_batch_size=1 with gradient_accumulation_steps={run.pairs}"
        yield "--pairs 1", argument, "as many micro-batches more", {"pairs": 1, "accumulates": True}
    if run.optim.startswith("adamw_torch"):
        costs = "rounded optimiser states; needs bitsandbytes"
        yield "--optim adamw_8bit", "optim='adamw_8bit'", costs, {"optim": "adamw_8bit"}
    if not run.checkpointing:
        costs = "about a third more operations"
        yield "--checkpointing", "gradient_checkpointing=True", costs, {"checkpointing": True}
    if run.peft is None:
        from peft import LoraConfig

        lora = LoraConfig(r=_LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        option, argument = f"--lora-r {_LORA_RANK}", f"a LoraConfig of r={_LORA_RANK}"
        yield option, argument, "adapters train, not the weights", {"peft": lora}
        quantised = {"peft": lora, "four_bit": True}
        yield "--qlora", "the same on a model loaded in 4 bits", "weights are rounded to 4 bits", quantised
    elif not run.four_bit:
        yield "--qlora", "a model loaded in 4 bits", "weights are rounded to 4 bits", {"four_bit": True}
    for gpus in _GPUS:
        if gpus > run.shards and not run.four_bit:
            spread = {"sharded": "weights", "shards": gpus}
            yield f"--fsdp {gpus}", f"FSDP over {gpus} GPUs", f"{gpus} GPUs, and what they exchange", spread
