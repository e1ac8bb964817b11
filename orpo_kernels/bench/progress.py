"""A bar over the measurements of `bench` where tqdm is installed, else a line each."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from orpo_kernels.bench.runner import Report


def with_progress(total: int, work: Callable[[Report], dict[str, Any]]) -> dict[str, Any]:
    """work(report), of at most `total` measurements."""
    if find_spec("tqdm") is None:
        return work(lambda what: print(what, file=sys.stderr) if what else None)
    from tqdm import tqdm

    with tqdm(total=total, unit="run", file=sys.stderr) as bar:

        def progress(what: str | None) -> None:
            if what is None:
                bar.update()
            else:
                bar.set_postfix_str(what)

        return work(progress)
