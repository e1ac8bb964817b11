"""`bench --layouts` on a model of no size: what it writes, lists and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from orpo_kernels.__main__ import main

ROUNDING = torch.finfo(torch.float32).eps
WORDS = ["one", "two", "three", "four", "five"]
PAIRS = [
    {"prompt": "one two three four five", "chosen": " one two", "rejected": " three four five one"},
    {"prompt": "two " * 80, "chosen": "one", "rejected": "two"},  # too long
    {"prompt": "two two", "chosen": " one", "rejected": " five five"},
    {"prompt": "three", "chosen": " four", "rejected": " one two three four five"},
]


def save_model(folder: Path, **options: Any) -> str:
    words = {word: index for index, word in enumerate(["<unk>", "</s>", *WORDS])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"vocab_size": len(words), "pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, **tokens, **options)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("CI", "1")  # TRL sends no telemetry then
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(PAIRS))
    return str(path)


def bench(pairs: str, model: str, output_dir: Path, *options: str) -> int:
    for name in ("trl", "datasets"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    same = ["--threads", str(torch.get_num_threads())]
    return main(["bench", "--layouts", pairs, "--model", model, "--output-dir", str(output_dir), *same, *options])


def test_every_layout_computes_the_same(pairs: str, folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--micro-batches", "1", "2", "--count", "3", "--rounds", "2", "--length", "40", "--check"]
    assert bench(pairs, folder, tmp_path / "out", *options) == 0
    printed = capsys.readouterr().out
    assert "2 pairs a step" in printed
    assert "TRL, full logits" in printed
    result = json.loads((tmp_path / "out" / "layouts.json").read_text())
    assert result.keys() == {
        *("command", "date", "machine", "versions", "settings", "refused", "results", "seconds"),
    }
    assert result["refused"] == {}
    assert [block["pairs"] for block in result["results"]] == [1, 2]
    for block in result["results"]:
        found = block["layouts"]
        assert list(found) == ["trl", "padded", "packed", "shared"]
        tokens = [found[name]["tokens"] for name in found]
        assert tokens[0] == tokens[1] > tokens[2] > tokens[3] > 0
        for name, one in found.items():
            assert 0 < one["min_s"] <= one["median_s"]
            assert len(one["losses"]) == 4 - block["pairs"]
            assert one["losses"] == pytest.approx(found["trl"]["losses"], rel=4 * ROUNDING), name
            error, of_trl = block["errors"][name], block["errors"]["trl"]
            assert error["loss"] <= 2 * max(of_trl["loss"], ROUNDING)
            assert 0 < error["gradients"] <= 2 * of_trl["gradients"] < 1e-5


def test_a_layout_that_the_model_cannot_have_is_listed_with_its_reason(
    pairs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model = save_model(tmp_path / "model", attention_dropout=0.1)
    options = ["--micro-batches", "1", "--count", "1", "--rounds", "1", "--length", "40"]
    assert bench(pairs, model, tmp_path, *options) == 0
    assert "shared: the model cannot have it (shared: dropout is on" in capsys.readouterr().out
    result = json.loads((tmp_path / "layouts.json").read_text())
    assert list(result["refused"]) == ["packed", "shared"]
    assert list(result["results"][0]["layouts"]) == ["trl", "padded"]
    assert result["results"][0]["errors"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--softcap", "3"], "--softcap 3.0 does not apply to --layouts: leave it out"),
        (["--pairs", "2"], "--pairs 2 does not apply to --layouts"),  # though it is the default elsewhere
        (["--peers", "ours", "full"], "--peers ours full does not apply to --layouts"),
        (["--compare", "a", "b"], "--compare a b does not apply to --layouts"),
        (["--count", "9", "--length", "40"], "--count 9: only 3 pairs of {pairs} fit --length 40"),
        (["--count", "0"], "--count 0: it must be at least 1"),
        (["--length", "1"], "--length 1: it must be at least 2"),
        (["--rounds", "0"], "--rounds 0: it must be at least 1"),
        (["--micro-batches", "2", "4", "--count", "3"], "--micro-batches 4: use 1 to 3 pairs, the --count of all"),
        (["--model", "llama-3-8b"], "--model llama-3-8b: with --layouts, give the folder of a whole model"),
        (["--layouts", "none.json"], "--layouts none.json: No such file"),
        (["--output-dir", "{pairs}", "--count", "1", "--micro-batches", "1"], "--output-dir {pairs}: File exists"),
    ],
)
def test_bad_arguments(
    options: list[str], message: str, pairs: str, folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert bench(pairs, folder, tmp_path, *(option.format(pairs=pairs) for option in options)) == 2
    assert message.format(pairs=pairs) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ('"one"', "line 1: str where a row's object should be"),
        (
            '{"prompt": "one", "chosen": "two", "rejected": "one"}\n\n{"prompt": "one"}',
            "row 1: no 'chosen' in this row",
        ),
    ],
)
def test_bad_pairs(text: str, message: str, folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    assert bench(str(path), folder, tmp_path) == 2
    error = capsys.readouterr().err
    assert f"--layouts {path}" in error
    assert message in error


@pytest.mark.parametrize(
    ("options", "given"), [(["--count", "3"], "--count 3"), (["--check"], "--check"), (["--micro-batches", "1"], "1")]
)
def test_without_layouts_its_options_are_refused(options: list[str], given: str, capsys: pytest.CaptureFixture[str]):
    assert main(["bench", *options]) == 2
    assert f"{given} applies to --layouts only: leave it out" in capsys.readouterr().err


def test_no_trl(monkeypatch: pytest.MonkeyPatch, pairs: str, folder: str, tmp_path: Path, capsys: Any):
    from orpo_kernels.commands import bench_layouts

    monkeypatch.setattr(bench_layouts, "find_spec", lambda name: None if name == "trl" else name)
    assert bench(pairs, folder, tmp_path) == 2
    assert "--layouts needs trl: pip install 'orpo_kernels[trl]'" in capsys.readouterr().err
