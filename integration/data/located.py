"""Errors of a row, with the row's place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def located(where: str) -> Iterator[None]:
    """An error within becomes a ValueError that begins with `where`.

    Of any type: templates raise jinja2's and their own.
    """
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{where}: {kind}{error}") from error
