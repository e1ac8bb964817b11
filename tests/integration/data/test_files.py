"""Files of preference pairs: text stays text, and what is wrong is named with its line."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pytest

from orpo_kernels.commands.train import DataArguments, load_pairs
from orpo_kernels.integration.data.files import read_pairs

# What `str.splitlines` takes for ends of lines, and JSON does not.
NOT_ENDS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"
ROW = {"prompt": "q", "chosen": "a", "rejected": "b"}


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("character", NOT_ENDS)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_line_ends_at_a_line_feed_only(character: str, end: str, tmp_path: Path) -> None:
    rows = [ROW, {**ROW, "chosen": f"one{character}two"}]
    # Control characters must be escaped in JSON; these may stand as they are.
    escaped = [json.dumps(row, ensure_ascii=character in "\x0b\x0c\x1c\x1d\x1e") for row in rows]
    for name in ("pairs.jsonl", "pairs.json"):
        assert read_pairs(written(tmp_path, name, end.join(escaped) + end)) == rows


def test_arrays_lines_and_a_single_object(tmp_path: Path) -> None:
    for text in (json.dumps([ROW, ROW]), json.dumps([ROW, ROW], indent=1), f"{json.dumps(ROW)}\n\n{json.dumps(ROW)}"):
        assert read_pairs(written(tmp_path, "pairs.json", text)) == [ROW, ROW]
    assert read_pairs(written(tmp_path, "one.json", json.dumps(ROW, indent=1))) == [ROW]


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    assert read_pairs(written(tmp_path, "pairs.jsonl", b"\xef\xbb\xbf" + json.dumps(ROW).encode())) == [ROW]
    assert read_pairs(written(tmp_path, "pairs.csv", b"\xef\xbb\xbfprompt,chosen,rejected\nq,a,b\n")) == [ROW]


def test_cells_of_a_csv_file_are_text(tmp_path: Path) -> None:
    cells = ["null", "None", "NA", "", "007", "1e3", " x ", "two\nlines", 'a "quote", and a comma']
    lines = ['"' + cell.replace('"', '""') + '",a,b' for cell in cells]
    found = read_pairs(written(tmp_path, "pairs.csv", "prompt,chosen,rejected\n" + "\n".join(lines)))
    assert found == [{"prompt": cell, "chosen": "a", "rejected": "b"} for cell in cells]


def test_a_cell_of_a_megabyte(tmp_path: Path) -> None:
    (row,) = read_pairs(written(tmp_path, "pairs.csv", f"prompt,chosen,rejected\n{'x' * 2**20},a,b\n"))
    assert len(row["prompt"]) == 2**20


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", f"{json.dumps(ROW)}\n" * 16 + '{"prompt": }', r"a\.jsonl is not valid JSON: line 17, column 12"),
        ("a.json", '[\n{"prompt": "q"},\n{"prompt": }]', r"a\.json is not valid JSON: line 3, column 12"),
        ("a.jsonl", json.dumps([ROW]), r"a\.jsonl holds a JSON array, and a \.jsonl file one object a line"),
        ("a.json", json.dumps({"data": [ROW]}), r"a\.json holds one object with the keys 'data': give the array"),
        ("a.jsonl", f"{json.dumps(ROW)}\n3", r"a\.jsonl, line 2: int where a row's object should be"),
        ("a.json", "[1]", r"a\.json, entry 0: int where a row's object"),
        ("a.jsonl", json.dumps(ROW).encode("utf-16"), r"a\.jsonl looks like UTF-16: save it as UTF-8"),
        ("a.jsonl", json.dumps(ROW).encode("utf-16-le"), r"a\.jsonl looks like UTF-16"),
        ("a.csv", "prompt,chosen,rejected\nq,caf\xe9,b\n".encode("cp1252"), r"a\.csv, line 2: byte 0xe9 is not UTF-8"),
        ("a.csv", "prompt,chosen,rejected\nq,a\n", r"a\.csv, line 2: 2 cells where the header has 3"),
        ("a.csv", "prompt,chosen,chosen\nq,a,b\n", r"a\.csv, line 1: two columns have one name"),
        ("a.csv", 'prompt,chosen,rejected\nq,a,"b', r"a\.csv is not valid CSV"),
    ],
)
def test_what_is_wrong_is_named(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, name, content)
    with pytest.raises(ValueError, match=message):
        read_pairs(path)
    with pytest.raises(ValueError, match=message):  # and on the command line, in one line
        load_pairs(DataArguments(str(path)))


TEXTS = ["007", "NA", "null", "", "2026-01-01 00:00:00", "1e3", "True"]


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".json", ".csv.gz", ".jsonl.bz2", ".json.xz"])
def test_text_in_a_folder_stays_text(ending: str, tmp_path: Path) -> None:
    """Arrow's and pandas' readers make numbers, dates and nulls of some strings."""
    rows = [{"prompt": text, "chosen": text, "rejected": "x"} for text in TEXTS]
    if ".csv" in ending:
        text = "prompt,chosen,rejected\n" + "".join(f'"{row["prompt"]}","{row["chosen"]}",x\n' for row in rows)
    elif ".jsonl" in ending:
        text = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        text = json.dumps(rows)
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}.get(Path(ending).suffix, bytes)
    for split in ("train", "test"):
        (tmp_path / f"{split}{ending}").write_bytes(pack(text.encode()))
    found = load_pairs(DataArguments(str(tmp_path), dataset_test_split="test"))
    assert found == (rows, rows)
    assert load_pairs(DataArguments(str(tmp_path), eval_fraction=2 / 7)) == (rows[:5], rows[5:])
    assert load_pairs(DataArguments(str(tmp_path / f"train{ending}"))) == (rows, None)


def test_what_is_wrong_in_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"chosen": "a", "rejected": "b"}\n{"chosen"\n')
    with pytest.raises(ValueError, match=r"--dataset_name .*train\.jsonl is not valid JSON: line 2"):
        load_pairs(DataArguments(str(tmp_path)))
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / "pairs.csv.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match=r"pairs\.csv\.gz cannot be unpacked"):
        load_pairs(DataArguments(str(tmp_path / "pairs.csv.gz")))
