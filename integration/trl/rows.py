"""Rows of TRL's shapes on their way to its `map` calls: messages rendered, streams and dicts of sets among them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import datasets
import torch
from trl.data_utils import maybe_apply_chat_template, maybe_extract_prompt

from ..data.chat import plain_turn, template_options, without_nulls
from ..data.dataset import check_rows
from ..data.formats import IMAGE_COLUMNS, MESSAGE_COLUMNS, refuse_images
from ..data.limits import Limits
from ..data.located import located
from ..data.streams import rows_of_stream

_SIDES = ("chosen", "rejected")


def check_row(row: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    limits.check(row)
    return {}


def has_scored_token(row: Mapping[str, Any]) -> bool:
    return any(label != -100 for side in _SIDES for label in row[f"{side}_labels"][1:])


class Sets(dict[str, Any]):
    """A dict of evaluation sets that are mapped together."""

    def map(self, *args: Any, **options: Any) -> Sets:
        return Sets({name: part.map(*args, **options) for name, part in self.items()})


class Stream(torch.utils.data.IterableDataset):
    """A stream whose rows go through TRL's `map` calls as they are read; an error there names the row."""

    def __init__(self, dataset: Iterable[Any], name: str, steps: tuple[Callable[[Any], Any], ...]) -> None:
        self.dataset = dataset
        self.name = name
        self.steps = steps

    def map(
        self, function: Callable[..., Any], fn_kwargs: dict[str, Any] | None = None, num_proc: Any = None
    ) -> Stream:
        return Stream(self.dataset, self.name, (*self.steps, partial(function, **(fn_kwargs or {}))))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for index, row in enumerate(rows_of_stream(self.dataset)):
            with located(f"{self.name}, row {index}"):
                for step in self.steps:
                    row = {**row, **step(row)}
            yield row

    def set_epoch(self, epoch: int) -> None:
        """Hand the epoch on to a data set that reshuffles by it."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)


def _as_text(row: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """TRL's own rendering of a row of messages, of what these are without nulls (`chat`); text stays as it is."""
    refuse_images(row)
    plain: dict[str, Any] = without_nulls(row)
    for column in MESSAGE_COLUMNS:
        if isinstance(plain.get(column), list):
            plain[column] = [plain_turn(turn) for turn in plain[column]]
    plain["chat_template_kwargs"] = template_options(plain)[1]
    text = maybe_apply_chat_template(maybe_extract_prompt(plain), tokenizer)  # which passes no tools on
    return {column: text[column] for column in ("prompt", *_SIDES) if column in text}


def _as_text_of(row: Mapping[str, Any], index: int, name: str, tokenizer: Any) -> dict[str, Any]:
    with located(f"{name}, row {index}"):
        return _as_text(row, tokenizer)


def _has_messages(dataset: Any) -> bool:
    columns = (column for column in MESSAGE_COLUMNS if column in dataset.column_names)
    return any(not isinstance(dataset.features[column], datasets.Value) for column in columns)


def mappable(name: str, dataset: Any, tokenizer: Any) -> Any:
    """The data set, messages rendered, or what can be mapped in its place; ValueError if it holds images or no rows.

    tokenizer: whose chat template renders; None leaves it to TRL to say that it is missing.
    """
    if dataset is None:
        return dataset
    if isinstance(dataset, Mapping):
        return Sets({key: mappable(f"{name}[{key!r}]", part, tokenizer) for key, part in dataset.items()})
    check_rows(dataset, name)
    if isinstance(dataset, datasets.Dataset):
        images = [column for column in IMAGE_COLUMNS if column in dataset.column_names]
        for index, row in enumerate(dataset.select_columns(images) if images else ()):
            with located(f"{name}, row {index}"):
                refuse_images(row)
        if tokenizer is None or not _has_messages(dataset):
            return dataset
        return dataset.map(
            _as_text_of, with_indices=True, fn_kwargs={"name": name, "tokenizer": tokenizer}, desc="Rendering messages"
        )
    if isinstance(dataset, (datasets.IterableDataset, torch.utils.data.IterableDataset)):
        return Stream(dataset, name, (partial(_as_text, tokenizer=tokenizer),))
    raise TypeError(
        f"{name} is a {type(dataset).__name__}: use a datasets.Dataset (Dataset.from_list makes one of a "
        "list), a datasets.IterableDataset or, for evaluation, a dict of them"
    )
