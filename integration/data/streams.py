"""Streams that are read by several workers."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import get_worker_info


def rows_of_stream(stream: Iterable[Any]) -> Iterator[Any]:
    """Every row once, however many workers a data loader has: one of them reads them all.

    An iterable that knows nothing of workers would be read whole by each, and one that draws at random, by workers of
    other seeds, cannot be shared by position. A `datasets.IterableDataset` shares itself, shard by shard.
    """
    worker = get_worker_info()
    package = sys.modules.get("datasets")
    if worker is None or (package is not None and isinstance(stream, package.IterableDataset)):
        yield from stream
    elif worker.id == 0:
        # A stream that shares itself by worker must find that there is none.
        state: Any = torch.utils.data._utils.worker
        state._worker_info = None
        try:
            yield from stream
        finally:
            state._worker_info = worker
