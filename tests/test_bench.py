"""`bench`, on a problem of no size: what it writes, lists and refuses."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from orpo_kernels.__main__ import main
from orpo_kernels.bench import exact, lengths, meter, report, runner
from orpo_kernels.bench.child import MODES, measure
from orpo_kernels.bench.peers import PEERS
from orpo_kernels.bench.problem import IGNORED, Problem, make_inputs

TINY = Problem(pairs=2, length=12, hidden_size=16, vocab_size=60)
# None of them compiles anything.
EAGER = ["full", "liger-eager", "trl-fused", "torch-chunked", "torch-plain", "ours", "ours-kept", "ours-12mib"]


@pytest.fixture(scope="module")
def solved(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """The judge's answers, for fp32 and bf16 inputs."""
    folder = tmp_path_factory.mktemp("exact")
    files = {}
    for narrow in (False, True):
        files[narrow] = folder / f"{narrow}.pt"
        torch.save(exact.solve(make_inputs(problem_of(narrow)), with_weight=True), files[narrow])
    return files


def problem_of(narrow: bool) -> Problem:
    return Problem.of(TINY.as_dict() | {"dtype": "bfloat16" if narrow else "float32"})


def specification(peer: str, mode: str, file: Path | None, narrow: bool = False) -> dict[str, Any]:
    problem = problem_of(narrow).as_dict()
    return {"problem": problem, "peer": peer, "mode": mode, "repeats": 1, "exact": file and str(file)}


@pytest.mark.parametrize("linux", [True, False])
def test_memory_is_that_of_the_peak(linux: bool, monkeypatch: pytest.MonkeyPatch):
    """By the system's own mark, or sampled where there is none."""
    monkeypatch.setattr(meter, "_LINUX", linux and meter._LINUX)
    size = 256 << 20
    peak = meter.watch_memory(torch.device("cpu"))
    held = torch.ones(size // 4)
    time.sleep(0.1)
    del held
    assert 0.95 * size < peak() < 1.2 * size
    assert meter.watch_memory(torch.device("cpu"))() < 0.05 * size


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("peer", EAGER)
def test_every_peer_computes_the_same(peer: str, mode: str, solved: dict[bool, Path]):
    found = measure(specification(peer, mode, solved[False]))
    if found["status"] == "skipped":  # a package that is not there, or what an older torch does not have
        assert "not installed" in found["reason"] or (
            peer.startswith("torch") and "linear_cross_entropy" in found["reason"]
        )
        pytest.skip(f"{peer}: {found['reason']}")
    (sample,) = found["samples"]
    assert 0 < sample["forward_s"] <= sample["total_s"]
    errors = found["errors"]
    assert errors["loss"] < 1e-5
    assert (errors["logps"] is None) == peer.startswith("liger")
    assert errors["logps"] is None or errors["logps"] < 1e-4
    train_hidden, train_weight = MODES[mode]
    for name, trains in (("hidden_gradient", train_hidden), ("weight_gradient", train_weight)):
        assert (errors[name] is not None) == trains, name
        assert errors[name] is None or errors[name] < 1e-5


@pytest.mark.parametrize("peer", EAGER)
def test_statistics_of_every_peer_that_gives_them(peer: str, solved: dict[bool, Path]):
    problem = specification(peer, "frozen", solved[False])
    problem["problem"] |= {"statistics": True}
    found = measure(problem)
    if not PEERS[peer].statistics:
        assert (found["status"], found["reason"]) == ("skipped", "it gives no statistics")
        return
    if found["status"] == "skipped":
        pytest.skip(f"{peer}: {found['reason']}")
    assert found["errors"]["statistics"] < 1e-4
    assert found["errors"]["hidden_gradient"] < 1e-5
    assert measure(specification(peer, "frozen", solved[False]))["errors"]["statistics"] is None


@pytest.mark.parametrize("mode", ["frozen", "trained"])
def test_bf16_errors_are_seen(mode: str, solved: dict[bool, Path]):
    """A judge that could not tell bf16 logits from exact ones would be none."""
    full, ours = (measure(specification(peer, mode, solved[True], True))["errors"] for peer in ("full", "ours"))
    assert ours["logps"] < 1e-5
    assert full["logps"] > 100 * ours["logps"]
    assert 1e-4 < ours["hidden_gradient"] < full["hidden_gradient"]


def test_inputs_are_as_described():
    problem = Problem(pairs=3, length=40, hidden_size=64, vocab_size=500, ignored=0.25)
    inputs = make_inputs(problem)
    scored = inputs.scored_targets != IGNORED
    assert int(scored.sum()) == problem.scored == 0.75 * problem.positions
    logits = inputs.hidden.double() @ inputs.weight.double().T
    logps = logits.log_softmax(-1).gather(-1, inputs.scored_targets.clamp_min(0)[..., None])[..., 0][scored]
    assert -2.5 < float(logps.median()) < -0.1
    assert torch.equal(make_inputs(problem).hidden, inputs.hidden)


def test_what_does_not_run_is_listed_with_its_reason(monkeypatch: pytest.MonkeyPatch):
    def call(arguments: list[str], timeout: float) -> dict[str, Any]:
        peer = json.loads(arguments[2])["peer"]
        if peer == "full":
            return real(["-c", "raise MemoryError('no room for logits')"], timeout)
        return measure(json.loads(arguments[2]))

    real = runner.call
    monkeypatch.setattr(runner, "call", call)
    settings = runner.Settings(peers=("full", "cce-exact", "ours"), modes=("frozen",), rounds=2, repeats=1)
    result = runner.run(TINY, settings, ["bench"])
    full, cce, ours = result["results"]
    assert (full["status"], full["reason"]) == ("failed", "MemoryError: no room for logits")
    assert cce["status"] == "skipped"
    assert cce["reason"]
    assert ours["status"] == "ok"
    assert [sample["round"] for sample in ours["samples"]] == [0, 1]
    table = report.table(result)
    assert "no room for logits" in table
    assert cce["reason"] in table
    assert real(["-c", "import time; time.sleep(9)"], 0.2)["reason"] == "took more than 0.2 s"


def fake_call(arguments: list[str], timeout: float) -> dict[str, Any]:
    """A measurement without one."""
    sample = {"forward_s": 1.0, "total_s": 2.0, "peak_bytes": 1 << 20}
    return {"status": "ok", "samples": [sample], "gradient_bytes": 0, "errors": None}


def test_the_first_round_is_whole_whatever_the_limit(monkeypatch: pytest.MonkeyPatch):
    """Else the last modes would have no figures at all."""
    monkeypatch.setattr(runner, "call", fake_call)
    result = runner.run(TINY, runner.Settings(peers=("full", "ours"), rounds=3, minutes=1e-9, sweep=(8,)), ["bench"])
    assert (result["full_rounds"], result["interrupted"]) == (1, False)
    assert [len(row["samples"]) for row in result["results"]] == [1] * 6
    assert [(row["peer"], row["mode"]) for row in result["sweep"]] == [
        (peer, mode) for mode in ("frozen", "trained") for peer in ("full", "ours")
    ]


@pytest.mark.parametrize("calls", [1, 3])
def test_an_interrupted_run_keeps_what_it_has(calls: int, monkeypatch: pytest.MonkeyPatch):
    """calls: measurements before Ctrl-C, in the only round or in the sweep after it."""
    left = [calls]

    def call(arguments: list[str], timeout: float) -> dict[str, Any]:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return fake_call(arguments, timeout)

    monkeypatch.setattr(runner, "call", call)
    settings = runner.Settings(peers=("full", "ours"), modes=("frozen",), rounds=1, sweep=(8,))
    result = runner.run(TINY, settings, ["bench"])
    assert result["interrupted"]
    full, ours = result["results"]
    assert full["status"] == "ok"
    assert len(result["sweep"]) == max(0, calls - 2)
    assert (ours["status"] == "ok") == (calls > 1)
    assert ("interrupted before its turn" in report.table(result)) == (calls == 1)


def test_comparison_tells_what_changed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runner, "call", fake_call)
    settings = runner.Settings(peers=("full", "ours"), modes=("frozen",), rounds=1)
    before = runner.run(TINY, settings, ["bench"])
    after = json.loads(json.dumps(before))
    after["problem"]["vocab_size"] = 61
    after["machine"]["name"] = "another"
    after["results"][1]["summary"]["total_s"] = {"median": 1.0, "min": 1.0, "q1": 1.0, "q3": 1.0}
    after["results"][0] |= {"peer": "new", "label": "a new one"}
    text = report.compare(before, after)
    assert "not the same problem: vocab_size 60 -> 61" in text
    assert "not the same machine: name" in text
    lines = {line.strip().split("  ")[0]: line.split() for line in text.splitlines()}
    assert lines["orpo_kernels"][1:] == ["2.000", "1.000", "0.50", "1.0", "1.0", "1.00"]
    assert lines["full logits"][-2:] == ["only", "before"]
    assert lines["a new one"][-2:] == ["only", "after"]
    assert "0.50 ~" not in text  # quartiles apart
    assert "1.00 ~" in report.compare(before, before)


def test_the_command_writes_and_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    sizes = ["--pairs", "1", "--length", "12", "--hidden-size", "16", "--vocab-size", "60", "--sweep", "8"]
    how = ["--peers", "full", "ours", "--modes", "frozen", "--rounds", "1", "--repeats", "1", "--device", "cpu"]
    assert main(["bench", *sizes, *how, "--output-dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "full logits" in printed
    assert "orpo_kernels" in printed
    result = json.loads((tmp_path / "result.json").read_text())
    assert result.keys() == {
        *("command", "date", "machine", "versions", "problem", "settings", "results", "sweep"),
        *("full_rounds", "interrupted", "seconds"),
    }
    for row in result["results"]:
        assert row["status"] == "ok"
        assert row["summary"]["total_s"]["median"] > 0
        assert [sample.keys() for sample in row["samples"]] == [{"round", "forward_s", "total_s", "peak_bytes"}]
        assert row.keys() == {
            *("peer", "label", "logits", "mode", "status", "reason", "samples", "summary", "gradient_bytes", "errors")
        }
        assert row["errors"].keys() == {"logps", "statistics", "loss", "hidden_gradient", "weight_gradient"}
    assert [row["length"] for row in result["sweep"]] == [8, 8]
    assert list(tmp_path.glob("*.png"))
    assert main(["bench", "--compare", *[str(tmp_path / "result.json")] * 2]) == 0
    assert "orpo_kernels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pairs", "0"], "--pairs 0"),
        (["--rounds", "0"], "--rounds 0: it must be positive"),
        (["--ignored", "0.9"], "ignored=0.9"),
        (["--model", "nobody"], "nobody"),
        (["--tokens", "3"], "--tokens 3 leaves no row"),
        (["--sweep", "1"], "--sweep 1"),
        (["--compare", "none.json", "none.json"], "--compare none.json"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_lengths():
    drawn = lengths.lognormal(200, 0)
    assert drawn == lengths.lognormal(200, 0) != lengths.lognormal(200, 1)
    assert len(drawn) == 200
    assert all(size >= 1 for row in drawn for size in row)
    problem = Problem(pairs=200, length=1024, lengths=drawn)
    assert problem.padded_length <= 1024
    assert problem.scored < problem.positions


def test_lengths_of_a_file(tmp_path: Path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        '{"prompt": 9, "chosen": 3, "rejected": 4}\n{"prompt": "abcdefghi", "chosen": "x", "rejected": ""}\n'
    )
    assert set(lengths.from_file(path, 2)) == {(9, 3, 4), (2, 1, 1)}
    problem = Problem(pairs=2, length=8, lengths=((9, 3, 4), (2, 1, 1)))
    # The prompt gives way, from 9 to 4; a row of P + C tokens has P + C - 1 positions that predict one.
    assert problem.spans == ((3, 3, 4), (1, 1, 1))
    scored = make_inputs(problem).scored_targets != IGNORED
    assert scored.sum(1).tolist() == [6, 2, 4, 1]
    assert problem.scored == 13
    for pairs, text, message in ((3, None, "holds 2 rows, fewer than 3 pairs"), (1, "{", "is not valid JSON")):
        path.write_text(text or path.read_text())
        with pytest.raises(ValueError, match=message):
            lengths.from_file(path, pairs)


def test_names():
    assert [name for name in PEERS if name.startswith("ours")] == ["ours", "ours-kept", "ours-12mib"]
