"""Preference data sets: every row brought to token ids, and a summary of what happened.

`formats.normalize_example` brings every accepted shape to `prompt`, `chosen`, `rejected`;
`tokenization.tokenize_pair` makes and truncates the ids; `prepare_dataset` applies them to a whole data set. Rows hold
plain lists of ids, all that padded, packed and shared-prefix batches need, so a batch layout never tokenises
again.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils.logging import tqdm

from .formats import ACCEPTED_SHAPES, SIDES, normalize_example
from .limits import Limits
from .located import located
from .streams import rows_of_stream
from .tokenization import TOKENIZED_COLUMNS, check_max_length, tokenize_pair, truncate_pair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainingArguments

logger = logging.getLogger("orpo_kernels")
_ROWS_WITHOUT_BAR = 1000

__all__ = [
    "ACCEPTED_SHAPES",
    "TOKENIZED_COLUMNS",
    "DataSummary",
    "announce",
    "normalize_example",
    "prepare_dataset",
    "tokenize_pair",
    "truncate_pair",
]


@dataclass(frozen=True)
class DataSummary:
    """What preparing a data set did. Counts are of tokens or rows after truncation, unless named otherwise.

    Attributes:
        pairs: usable pairs.
        dropped: rows left out because neither side has a completion token to score.
        tokens: of both sides, prompts included.
        scored_tokens: completion tokens that some position predicts.
        truncated_prompts: pairs whose prompt lost tokens.
        truncated_completions: completions (two a pair) that lost tokens.
        overlong_prompts: pairs whose prompt alone was longer than `max_length`.
        padded_tokens: cells of the padded batches, in the data set's order at `batch_size` pairs each.
        max_length: the limit, None for none.
        batch_size: pairs a batch.
    """

    pairs: int
    dropped: int
    tokens: int
    scored_tokens: int
    truncated_prompts: int
    truncated_completions: int
    overlong_prompts: int
    padded_tokens: int
    max_length: int | None
    batch_size: int

    @property
    def scored_share(self) -> float:
        """Share of the tokens that are scored, from 0 to 1."""
        return self.scored_tokens / self.tokens if self.tokens else 0.0

    @property
    def padding_share(self) -> float:
        """Share of a padded batch that is padding, from 0 to 1. An estimate: training draws other batches."""
        return 1 - self.tokens / self.padded_tokens if self.padded_tokens else 0.0

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]], max_length: int | None, batch_size: int) -> DataSummary:
        """Count over tokenised rows, those to be dropped included."""
        count: Counter[str] = Counter()
        lengths: list[int] = []
        for row in rows:
            if not _usable(row):
                count["dropped"] += 1
                continue
            lengths.append(row["length"])
            count["tokens"] += sum(len(row[f"{side}_input_ids"]) for side in SIDES)
            count["scored_tokens"] += _scored_tokens(row)
            count["truncated_prompts"] += row["prompt_cut"] > 0
            count["truncated_completions"] += sum(row[f"{side}_cut"] > 0 for side in SIDES)
            if max_length is not None:
                prompt = max(row[f"{side}_prompt_length"] for side in SIDES) + row["prompt_cut"]
                count["overlong_prompts"] += prompt > max_length
        batches = [lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size)]
        return cls(
            pairs=len(lengths),
            dropped=count["dropped"],
            tokens=count["tokens"],
            scored_tokens=count["scored_tokens"],
            truncated_prompts=count["truncated_prompts"],
            truncated_completions=count["truncated_completions"],
            overlong_prompts=count["overlong_prompts"],
            padded_tokens=sum(2 * len(batch) * max(batch) for batch in batches),
            max_length=max_length,
            batch_size=batch_size,
        )

    def __str__(self) -> str:
        return (
            f"{self.pairs:,} pairs, {self.tokens:,} tokens, {self.scored_share:.1%} of them scored\n"
            f"max_length={self.max_length}: {self.truncated_prompts:,} of {self.pairs:,} prompts cut at "
            f"their start ({self.overlong_prompts:,} were longer by themselves), "
            f"{self.truncated_completions:,} of {2 * self.pairs:,} completions cut at their end\n"
            f"{self.dropped:,} rows dropped because no completion token was left to score\n"
            f"about {self.padding_share:.0%} padding in batches of {self.batch_size} pairs"
        )


def _scored_tokens(row: Mapping[str, Any]) -> int:
    """Completion tokens of both sides; without a prompt nothing predicts the first one."""
    return sum(max(len(row[f"{side}_input_ids"]) - max(int(row[f"{side}_prompt_length"]), 1), 0) for side in SIDES)


def announce(text: str, args: TrainingArguments) -> None:
    """Say something of a training run before it starts: in the log or, where that is not shown, beside the bars."""
    logger.info(text)
    if args.should_log and not args.disable_tqdm and not logger.isEnabledFor(logging.INFO):
        print(text, flush=True)


def prepare_dataset(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = 1024,
    *,
    dataset_num_proc: int | None = None,
    batch_size: int = 8,
    name: str = "dataset",
    limits: Limits | None = None,
) -> tuple[Any, Any]:
    """Tokenise a data set of preference rows; each row may have any shape `tokenize_pair` takes.

    ==========================================  ======================================  ===================
    `dataset`                                   comes back as                           summary
    ==========================================  ======================================  ===================
    `datasets.Dataset`                          the same, `TOKENIZED_COLUMNS` only      `DataSummary`
    list, tuple, map-style torch `Dataset`      list of rows                            `DataSummary`
    `datasets.IterableDataset`                  the same, tokenised as it is read       None
    other iterable, torch `IterableDataset`     torch `IterableDataset`, likewise       None
    dict of name to any of these                dict with the same names                dict, same names
    ==========================================  ======================================  ===================

    Rows without a completion token to score on either side are left out, with a warning, and counted in the
    summary.

    Args:
        dataset: see the table.
        tokenizer: as for `tokenize_pair`.
        max_length: as for `tokenize_pair`.
        dataset_num_proc: processes that tokenise what has a length; None for this one alone.
        batch_size: pairs a batch in the summary's estimate of padding.
        name: what errors call the data set.
        limits: what the model can take: other rows are an error.

    Returns:
        The prepared data set and its summary.

    Raises:
        ValueError: `max_length`, `batch_size`, an empty data set, or a row (named by its index) cannot be used.
        TypeError: `dataset` is none of the above, or a generator, which a second epoch would find empty.
    """
    check_max_length(max_length)
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: use at least 1")
    if isinstance(dataset, Mapping):
        options: dict[str, Any] = {"dataset_num_proc": dataset_num_proc, "batch_size": batch_size, "limits": limits}
        found = {
            key: prepare_dataset(part, tokenizer, max_length, name=f"{name}[{key!r}]", **options)
            for key, part in dataset.items()
        }
        return {key: rows for key, (rows, _) in found.items()}, {key: summary for key, (_, summary) in found.items()}

    check_rows(dataset, name)
    tokenize = partial(_tokenize_indexed, tokenizer=tokenizer, max_length=max_length, name=name, limits=limits)
    # Whoever holds one of its data sets has imported the package, so it need not be installed here.
    package = sys.modules.get("datasets")
    rows: Any
    if package is not None and isinstance(dataset, package.IterableDataset):
        rows = dataset.map(tokenize, with_indices=True).select_columns(list(TOKENIZED_COLUMNS))
        return rows.filter(_usable_or_warn), None
    if package is not None and isinstance(dataset, package.Dataset):
        rows = dataset.map(
            tokenize,
            with_indices=True,
            remove_columns=dataset.column_names,
            num_proc=dataset_num_proc,
            desc="Tokenizing preference pairs",
        )
    elif isinstance(dataset, torch.utils.data.IterableDataset) or not _indexable(dataset, name):
        return _LazyPairs(dataset, tokenize), None
    else:
        rows = _tokenized(dataset, tokenize, dataset_num_proc)
    summary = DataSummary.from_rows(rows, max_length, batch_size)
    if summary.dropped:
        rows = list(filter(_usable, rows)) if isinstance(rows, list) else rows.filter(_usable)
        warnings.warn(_left_out(f"{summary.dropped} of {summary.dropped + summary.pairs} rows"), stacklevel=2)
    return rows, summary


def _tokenized(dataset: Any, tokenize: Callable[..., dict[str, Any]], processes: int | None) -> list[dict[str, Any]]:
    """The rows of what has a length and items, with a bar where that takes long."""
    count = len(dataset)
    bar = partial(tqdm, total=count, desc="Tokenizing preference pairs", disable=count < _ROWS_WITHOUT_BAR)
    if processes is None or processes <= 1:
        return [tokenize(dataset[index], index) for index in bar(range(count))]
    examples = (dataset[index] for index in range(count))
    with ProcessPoolExecutor(processes, initializer=_hold, initargs=(tokenize,)) as pool:
        return list(bar(pool.map(_tokenize_held, examples, range(count), chunksize=max(1, count // (8 * processes)))))


_held: Callable[..., dict[str, Any]]


def _hold(tokenize: Callable[..., dict[str, Any]]) -> None:
    """In a worker: the tokenizer crosses once, not with every row."""
    global _held
    _held = tokenize


def _tokenize_held(example: Mapping[str, Any], index: int) -> dict[str, Any]:
    return _held(example, index)


def _tokenize_indexed(
    example: Mapping[str, Any],
    index: int,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    name: str,
    limits: Limits | None,
) -> dict[str, Any]:
    with located(f"{name}, row {index}"):
        row = tokenize_pair(example, tokenizer, max_length)
        if limits is not None:
            limits.check(row)
    return dict(row)


def check_rows(dataset: Any, name: str) -> None:
    """ValueError for a data set without rows; TypeError for a table of columns or several splits at once."""
    kind = type(dataset).__name__
    if type(dataset).__module__.partition(".")[0] in ("pandas", "polars"):
        make = "datasets.Dataset.from_pandas(frame)" if kind == "DataFrame" else "a list of dicts"
        raise TypeError(f"{name} is a {kind} of {type(dataset).__module__.partition('.')[0]}: use {make}")
    if hasattr(dataset, "__len__") and not isinstance(dataset, (str, bytes)) and len(dataset) == 0:
        raise ValueError(f"{name} is empty: it needs at least one row")


def refuse_splits(dataset: Any, name: str) -> None:
    """TypeError for a dict of data sets where one is wanted."""
    if isinstance(dataset, Mapping):
        first = next(iter(dataset), "train")
        raise TypeError(
            f"{name} is a {type(dataset).__name__} of {', '.join(map(str, dataset))}: give one of these data sets, "
            f"{name}={name}[{first!r}]"
        )


def _indexable(dataset: Any, name: str) -> bool:
    """True for what has a length and items; False for what can be iterated over again and again."""
    kind = type(dataset).__name__
    if isinstance(dataset, Iterator):
        raise TypeError(
            f"{name} is a {kind}, which can be read only once: use a list, or a data set that can be read again"
        )
    if isinstance(dataset, (Sequence, torch.utils.data.Dataset)) and not isinstance(dataset, (str, bytes)):
        return True
    if isinstance(dataset, (str, bytes)) or not isinstance(dataset, Iterable):
        raise TypeError(f"{name} is a {kind}: use a list of dicts, a data set, or a dict of them")
    return False


def _usable(row: Mapping[str, Any]) -> bool:
    return _scored_tokens(row) > 0


def _usable_or_warn(row: Mapping[str, Any]) -> bool:
    """`_usable` for streams, which have no summary to count in."""
    if not _usable(row):
        warnings.warn(_left_out("a row of the stream"), stacklevel=2)
        return False
    return True


def _left_out(what: str) -> str:
    return f"{what} left out: neither side has a completion token to score"


class _LazyPairs(torch.utils.data.IterableDataset):
    """Tokenises the rows of an iterable as they are read."""

    def __init__(self, dataset: Iterable[Mapping[str, Any]], tokenize: Callable[..., dict[str, Any]]) -> None:
        self.dataset = dataset
        self.tokenize = tokenize

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rows = (self.tokenize(example, index) for index, example in enumerate(rows_of_stream(self.dataset)))
        return filter(_usable_or_warn, rows)

    def set_epoch(self, epoch: int) -> None:
        """Hand the epoch on to a data set that reshuffles by it."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
