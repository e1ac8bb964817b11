"""Rows from a file of preference pairs: what it holds as text stays text, and what is wrong is named by its line.

Lines end at a line feed, with or without a carriage return before it, and nowhere else: a JSON string may hold
U+2028 and other characters that `str.splitlines` takes for ends.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

TEXT_ENDINGS = (".json", ".jsonl", ".csv")
ENDINGS = (*TEXT_ENDINGS, ".parquet")
_UNPACKED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def read_pairs(path: Path) -> list[dict[str, Any]]:
    """The rows of a .json file (an array of objects, or an object a line), a .jsonl or a .csv file, in UTF-8, or one of
    these with .gz, .bz2 or .xz behind its name.

    A .csv file's first line names the columns; every cell is a string.

    Raises ValueError that names the file, and the line where one is at fault.
    """
    text, ending = read_text(path), ending_of(path)
    if ending == ".csv":
        return _csv_rows(path, text)
    if ending == ".json" and text.lstrip().startswith("["):
        return _objects(path, _parsed(path, text), "entry")
    if ending == ".jsonl" and text.lstrip().startswith("["):
        raise ValueError(f"{path} holds a JSON array, and a .jsonl file one object a line: name it .json")
    if ending == ".json":
        whole = _whole_object(text)
        if whole is not None and not {"chosen", "rejected"} <= whole.keys():
            raise ValueError(
                f"{path} holds one object with the keys {', '.join(map(repr, whole))}: give the array of rows itself, "
                "[{...}, {...}], or one row a line"
            )
        if whole is not None:
            return [whole]
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [_objects(path, [_parsed(path, line, number)], f"line {number}:")[0] for number, line in lines]


def read_splits(files: Mapping[str, Sequence[str]]) -> dict[str, list[dict[str, Any]]] | None:
    """The rows of each split's files, as `read_pairs` reads them; None where one is no such file on this machine."""
    paths = {split: [Path(file) for file in listed] for split, listed in files.items()}
    if not all(path.is_file() and ending_of(path) in TEXT_ENDINGS for listed in paths.values() for path in listed):
        return None
    return {split: [row for path in listed for row in read_pairs(path)] for split, listed in paths.items()}


def ending_of(path: Path) -> str:
    """The ending of a file's name, that of its packing aside."""
    return Path(path.stem).suffix if path.suffix in _UNPACKED else path.suffix


def read_text(path: Path) -> str:
    """A file's text, unpacked; a byte order mark of UTF-8 is left out. Raises ValueError for another encoding."""
    try:
        with _UNPACKED.get(path.suffix, open)(path, "rb") as file:
            raw: bytes = file.read()
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} cannot be unpacked: {error}") from None
    if raw.startswith(_UTF16) or b"\0" in raw[:1000]:
        raise ValueError(f"{path} looks like UTF-16: save it as UTF-8")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: byte {raw[error.start]:#04x} is not UTF-8 (the file may be in cp1252 or latin-1): "
            "save it as UTF-8"
        ) from None


def _whole_object(text: str) -> dict[str, Any] | None:
    """The text as one JSON object; None where it is not (an object a line, perhaps)."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None


def _parsed(path: Path, text: str, line: int = 1) -> Any:
    """line: of the file, on which the text begins."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {line + error.lineno - 1}, column {error.colno}"
        raise ValueError(f"{path} is not valid JSON: {place}: {error.msg}") from None


def _objects(path: Path, rows: list[Any], what: str) -> list[dict[str, Any]]:
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            place = what if what.endswith(":") else f"{what} {index}:"
            raise ValueError(f"{path}, {place} {type(row).__name__} where a row's object should be")
    return rows


def _csv_rows(path: Path, text: str) -> list[dict[str, Any]]:
    csv.field_size_limit(sys.maxsize)  # the module's own is 128 KiB
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[dict[str, Any]] = []
    try:
        names = next(reader, [])
        if len(set(names)) < len(names):
            raise ValueError(f"{path}, line 1: two columns have one name: {', '.join(names)}")
        for cells in reader:
            if cells and len(cells) != len(names):
                raise ValueError(
                    f"{path}, line {reader.line_num}: {len(cells)} cells where the header has {len(names)} "
                    f"({', '.join(names)}): quote cells that hold commas or line ends"
                )
            if cells:
                rows.append(dict(zip(names, cells, strict=True)))
    except csv.Error as error:
        raise ValueError(f"{path} is not valid CSV: line {reader.line_num}: {error}") from None
    return rows
