"""What fits, asked of a card and on the command line, and what is told of bad input."""

from __future__ import annotations

import bisect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_timeline import LORA, SIZES, llama

from orpo_kernels.__main__ import main
from orpo_kernels.commands.estimate_run import size_of
from orpo_kernels.estimate import HeadSize, estimate_call
from orpo_kernels.integration.memory.answers import STEP, Advisor, most
from orpo_kernels.integration.memory.footprint import footprint
from orpo_kernels.integration.memory.live import Segment
from orpo_kernels.integration.memory.run import Run
from orpo_kernels.integration.memory.step import Rehearsal
from orpo_kernels.integration.memory.timeline import Timeline
from orpo_kernels.plan import Plan

GIB = 1 << 30


@given(
    st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 10**6), st.integers(0, 10**3)), min_size=1, max_size=3),
    st.integers(0, 10**12),
    st.integers(1, 20_000),
)
def test_the_most_that_fits(parts: list[tuple[int, int, int]], budget: int, limit: int):
    """Of the highest of several parabolas, as a peak is."""
    asked = []

    def bytes_of(n: int) -> int:
        assert 1 <= n <= limit
        asked.append(n)
        return max(a + b * n + c * n * n for a, b, c in parts)

    def holds(n: int) -> bool:
        return max(a + b * n + c * n * n for a, b, c in parts) <= budget

    right = bisect.bisect_left(range(1, limit + 1), True, key=lambda n: not holds(n))
    assert most(bytes_of, budget, limit) == right
    assert len(set(asked)) == len(asked) <= 60


def run(**fields: Any) -> Run:
    config = llama(3, hidden_size=256, vocab_size=20_000)
    return Run(config, "a llama", **{"pairs": 2, "length": 512} | fields)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps whose memory is a formula: the search asks for many."""

    def rehearse(self: Rehearsal, pairs: int, length: int) -> Timeline:
        rows = 2 * pairs * length
        width = (5000 if self.run.checkpointing else 40_000) * (1 if self.run.layout == "shared" else 2)
        activations = width * rows + pairs * length * length
        backward = Segment("before", -activations, rows * 1000)
        return Timeline((Segment("before", activations, activations),), (), (backward,))

    monkeypatch.setattr(Rehearsal, "_rehearse", rehearse)


def test_the_longest_of_real_steps():
    advisor = Advisor(run(peft=LORA))
    budget = advisor.ask().full.total
    longest = advisor.longest(budget, "ours")
    assert longest > 512
    assert advisor.ask(length=longest).ours.total <= budget < advisor.ask(length=longest + STEP).ours.total


def test_the_answers_are_the_largest_that_fit(quick: None):
    advisor = Advisor(run())
    budget = advisor.ask().full.total
    found = advisor.answers(budget)
    assert found.fits
    assert found.advice == []
    assert found.longest["full"] >= 512 < found.longest["ours"]
    for loss, longest in found.longest.items():
        assert getattr(advisor.ask(length=longest), loss).total <= budget
        assert getattr(advisor.ask(length=longest + STEP), loss).total > budget
    assert found.pairs["full"] == 2 < found.pairs["ours"]
    assert advisor.ask(pairs=found.pairs["ours"] + 1).ours.total > budget


def test_advice_says_what_is_enough(quick: None):
    asked = run(length=1024)
    need = footprint(asked).ours.total
    found = Advisor(asked).answers(need - need // 10)
    assert not found.fits
    names = [change.name for change in found.advice]
    assert names[:2] == ["--packing", "--pairs 1"]
    for change in found.advice:
        assert change.result is not None
        assert change.result == footprint(change.result.run)
    enough = {change.name for change in found.advice if change.result.ours.total <= found.budget}
    assert "--pairs 1" in enough
    assert found.advice[-1].name == f"--length {found.longest['ours']}"


def test_one_arithmetic():
    """Where both peaks are at the loss, they differ by what `estimate_call` says."""
    asked = run(peft=LORA, layout="equal", ignored=0.25)
    found = footprint(asked)
    assert found.ours.when == found.full.when == "loss"
    head = estimate_call(
        HeadSize(256, 20_000), "frozen head", 2048, 1536, dtype=torch.bfloat16, device="cuda", plan=Plan()
    )
    assert found.head.schedule == head.schedule
    assert found.full.loss == head.full_bytes
    assert found.ours.loss >= head.our_bytes


def test_methods_and_shards():
    def peak(**fields: Any) -> Any:
        return footprint(run(**fields)).ours

    full, lora = peak(), peak(peft=LORA)
    assert lora.optimizer < full.optimizer / 10
    assert peak(peft=LORA, four_bit=True).weights < lora.weights
    assert peak(checkpointing=True).activations < full.activations
    zero = [peak(sharded=name, shards=4) for name in ("optimizer", "gradients", "weights")]
    assert [one.optimizer for one in zero] == [full.optimizer // 4] * 3
    assert zero[0].weights == full.weights > zero[2].weights
    cut = peak(tp=2)
    assert cut.weights < full.weights
    assert cut.activations < full.activations
    assert peak(accumulates=True).total >= full.total


# ---- the command ----

CONFIG = {"model_type": "llama", "num_hidden_layers": 4, "torch_dtype": "bfloat16", **SIZES}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def test_the_command(folder: Path, quick: None, capsys: pytest.CaptureFixture[str]):
    picture = folder / "fit.png"
    arguments = [
        "estimate",
        "--model",
        str(folder),
        "--gpu",
        "2GiB",
        "--lora-r",
        "4",
        "--length",
        "256",
        "--plot",
        str(picture),
    ]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "LoRA of rank 4" in printed
    assert "this run fits" in printed
    assert "longest at 2 pairs" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main([*arguments[:-2], "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["gpu"]["fits"]
    assert found["longest_length"]["ours"] > found["longest_length"]["full"] > 256
    assert found["ours"]["bytes"] == sum(
        found["ours"][part] for part in ("weights", "gradients", "optimizer", "activations", "loss")
    )
    assert main(["estimate", "--model", str(folder), "--head-only"]) == 0
    assert "frozen head" in capsys.readouterr().out


def test_advice_is_printed(folder: Path, quick: None, capsys: pytest.CaptureFixture[str]):
    assert main(["estimate", "--model", str(folder), "--gpu", "20MiB", "--keep-free", "1MiB", "--pairs", "1"]) == 0
    printed = capsys.readouterr().out
    assert "does not fit" in printed
    assert "--checkpointing" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nobody"], "model='nobody' is unknown: give a folder with a config.json"),
        (["--model", "nobody"], "qwen3-30b-a3b"),
        (["--gpu", "many"], "--gpu many: use a size such as 24GiB"),
        (["--gpu", "1GiB"], "--keep-free 1GiB leaves nothing of --gpu 1GiB"),
        (["--pairs", "0"], "pairs=0: it must be at least 1"),
        (["--length", "-4"], "length=-4"),
        (["--ignored", "1.5"], "ignored=1.5"),
        (["--optim", "adam"], "optim='adam' is not one of adamw_torch_fused"),
        (["--lora-r", "0"], "--lora-r 0"),
        (["--zero", "3"], "--zero 3: give --gpus N too"),
        (["--tp", "3"], "tp=3 does not divide num_attention_heads=4"),
        (["--fsdp", "0"], "shards=0"),
        (["--plot", "fit.txt"], "--plot fit.txt"),
        (["--scratch-mib", "0.001"], "cannot hold one tile"),
    ],
)
def test_bad_arguments(folder: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["estimate", "--model", str(folder), *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[1]", "holds a list"),
        ("{}", "model_type=None: use a causal language model"),
        (json.dumps({"model_type": "t5"}), "model_type='t5'"),
        (json.dumps(CONFIG | {"hidden_size": "wide"}), "is no configuration of llama"),
        (json.dumps(CONFIG | {"num_attention_heads": 0}), "llama"),
    ],
)
def test_bad_configurations(folder: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]):
    (folder / "config.json").write_text(text)
    assert main(["estimate", "--model", str(folder)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_an_architecture_that_reads_numbers(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    from transformers.models.llama.modeling_llama import LlamaMLP

    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: forward(self, x) * float(x.sum()))
    assert main(["estimate", "--model", str(folder)]) == 2
    error = capsys.readouterr().err
    assert "cannot be run on fake tensors" in error
    assert "Accepted are causal language models" in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GiB", 24 * GIB), ("24 GB", 24 * GIB), ("80g", 80 * GIB), ("1.5", 3 * GIB // 2), ("512MiB", GIB // 2)],
)
def test_sizes(text: str, size: int):
    assert size_of("--gpu", text) == size
