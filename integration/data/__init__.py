"""Preference data: rows of any shape, read, brought to token ids and collated."""

from .collator import LayoutCollator, PreferenceCollator
from .dataset import DataSummary, announce, prepare_dataset
from .formats import ACCEPTED_SHAPES, normalize_example
from .tokenization import TOKENIZED_COLUMNS, tokenize_pair, truncate_pair

__all__ = [
    "ACCEPTED_SHAPES",
    "TOKENIZED_COLUMNS",
    "DataSummary",
    "LayoutCollator",
    "PreferenceCollator",
    "announce",
    "normalize_example",
    "prepare_dataset",
    "tokenize_pair",
    "truncate_pair",
]
