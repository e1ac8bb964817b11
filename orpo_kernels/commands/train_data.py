"""The rows of `orpo-kernels train`: which they are, and where they come from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Arguments:
    def __post_init__(self) -> None:
        from orpo_kernels.integration.training.arguments import numbers_from_text

        numbers_from_text(self)


@dataclass
class DataArguments(Arguments):
    dataset_name: str = field(
        metadata={"help": "Preference pairs: a .json, .jsonl, .csv or .parquet file, a folder, or a dataset's name."}
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str | None = field(default=None, metadata={"help": "Split to evaluate on."})
    eval_fraction: float = field(
        default=0.0, metadata={"help": "Share of the training rows to hold out for evaluation, from their end."}
    )


def check_shapes(rows: Any, what: str) -> None:
    """ValueError for a row of none of the accepted shapes, before the model is loaded."""
    from orpo_kernels.integration.data.formats import normalize_example
    from orpo_kernels.integration.data.tokenization import REQUIRED_COLUMNS

    for index in range(len(rows) if isinstance(rows, list) else 0):
        if not all(column in rows[index] for column in REQUIRED_COLUMNS):
            try:
                normalize_example(rows[index])
            except ValueError as error:
                raise ValueError(f"{what} {index}: {error}") from error


def load_pairs(data_args: DataArguments) -> tuple[Any, Any]:
    """(training rows, evaluation rows or None). A JSON file needs no other package; the rest needs `datasets`."""
    if not 0.0 <= data_args.eval_fraction < 1.0:
        raise ValueError(f"--eval_fraction {data_args.eval_fraction}: use a share from 0 up to, not including, 1")
    if data_args.eval_fraction and data_args.dataset_test_split:
        raise ValueError("--eval_fraction and --dataset_test_split were both given: use one")
    train, held_out = _load(data_args)
    if len(train) == 0:
        raise ValueError(f"--dataset_name {data_args.dataset_name} leaves no rows to train on")
    return train, held_out


def _load(data_args: DataArguments) -> tuple[Any, Any]:
    from orpo_kernels.integration.data.files import ENDINGS, ending_of, read_pairs, read_splits

    path = Path(data_args.dataset_name)
    if ending_of(path) in ENDINGS and not path.exists():
        raise ValueError(f"--dataset_name {path}: there is no such file")
    if path.is_file() and ending_of(path) not in ENDINGS:
        raise ValueError(f"--dataset_name {path}: the ending is none of {', '.join(ENDINGS)}")
    if path.is_file() and path.suffix != ".parquet":
        try:
            rows: Any = read_pairs(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"--dataset_name {error}") from error
        if data_args.dataset_test_split:
            raise ValueError(f"--dataset_test_split was given, but {path} holds one split: use --eval_fraction")
        return _cut(rows, data_args.eval_fraction)

    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"--dataset_name {path} needs the datasets package: pip install datasets") from error
    if path.is_file():
        loaded: Any = datasets.load_dataset("parquet", data_files=str(path))
    elif (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        loaded = datasets.load_from_disk(str(path))
    else:
        try:
            builder = datasets.load_dataset_builder(data_args.dataset_name)
            # The cells of a .csv and the strings of a .json file stay what they are; Arrow makes numbers, dates and
            # nulls of some.
            loaded = read_splits(builder.config.data_files or {"": ["."]})
            loaded = datasets.load_dataset(data_args.dataset_name) if loaded is None else loaded
        except (OSError, ValueError, RuntimeError) as error:
            first = str(error).partition("\n")[0]
            raise ValueError(f"--dataset_name {path} is no file or folder here, and no data set: {first}") from error
    if isinstance(loaded, datasets.Dataset):
        loaded = datasets.DatasetDict({data_args.dataset_train_split: loaded})
    for split in filter(None, (data_args.dataset_train_split, data_args.dataset_test_split)):
        if split not in loaded:
            raise ValueError(f"{data_args.dataset_name} has no split {split!r}, only {', '.join(loaded)}")
    train = loaded[data_args.dataset_train_split]
    if data_args.dataset_test_split:
        return train, loaded[data_args.dataset_test_split]
    return _cut(train, data_args.eval_fraction)


def _cut(rows: Any, eval_fraction: float) -> tuple[Any, Any]:
    """(rows but the last ones, the last ones or None)."""
    kept = len(rows) - round(len(rows) * eval_fraction)
    if isinstance(rows, list):
        return rows[:kept], rows[kept:] or None
    return rows.select(range(kept)), rows.select(range(kept, len(rows))) if kept < len(rows) else None
