"""`orpo-kernels tune`, and the tile shapes that it keeps."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from orpo_kernels.__main__ import main
from orpo_kernels.commands import tune
from orpo_kernels.kernels import configs
from orpo_kernels.kernels.interface import Head

tuned = pytest.importorskip("orpo_kernels.kernels.tuned", reason="Triton is not installed")
triton_launch = pytest.importorskip("orpo_kernels.kernels.triton_launch", reason="Triton is not installed")

H100 = configs.cuda_target(90)
CANDIDATES = configs.candidates(H100, torch.bfloat16)
DEFAULT, OTHER = CANDIDATES[0], CANDIDATES[1]
NAME = "card | a pass"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A folder of its own for each test, read afresh."""
    monkeypatch.setenv("ORPO_KERNELS_CACHE", str(tmp_path / "cache"))
    tuned.entries.cache_clear()
    yield tmp_path / "cache"
    tuned.entries.cache_clear()


# ---- the file ----


def entry(**changes: Any) -> Any:
    return tuned.Entry(OTHER, DEFAULT, 1.0, 1.5)._replace(**changes)


def chosen() -> configs.TileConfig:
    return tuned.shape(NAME, DEFAULT, CANDIDATES)


def test_what_is_saved_is_used(cache: Path):
    assert chosen() == DEFAULT
    assert tuned.save({NAME: entry()}) == cache / "tiles.json"
    assert chosen() == OTHER
    tuned.save({"another": entry()})
    assert set(tuned.entries()) == {NAME, "another"}
    assert chosen() == OTHER
    tuned.save({NAME: entry(config=CANDIDATES[2])})
    assert chosen() == CANDIDATES[2]
    assert [file.name for file in cache.iterdir()] == ["tiles.json"]


@pytest.mark.parametrize(
    "unfit",
    [
        entry(default_seconds=1.02),  # no faster than noise
        entry(default=CANDIDATES[3]),  # what it beat is no longer the default
        entry(config=OTHER._replace(block_v=512)),  # does not fit the card
    ],
)
def test_an_entry_that_does_not_fit_is_not_used(unfit: Any):
    tuned.save({NAME: unfit})
    assert chosen() == DEFAULT


@pytest.mark.parametrize(
    "broken",
    ["", "{", "[]", "7", '{"card | a pass": 3}', '{"card | a pass": {"config": {"block_c": 1}}}', "\x00"],
)
def test_a_broken_file_warns_once_and_counts_for_nothing(broken: str, cache: Path):
    cache.mkdir()
    (cache / "tiles.json").write_text(broken)
    with pytest.warns(UserWarning, match=r"cache/tiles\.json is not what `orpo-kernels tune` writes"):
        assert chosen() == DEFAULT
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen() == DEFAULT
    tuned.save({NAME: entry()})
    assert chosen() == OTHER


def test_it_is_read_once(cache: Path):
    tuned.save({NAME: entry()})
    assert chosen() == OTHER
    (cache / "tiles.json").unlink()
    assert chosen() == OTHER


def test_where_the_file_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert tuned.path() == tmp_path / "cache" / "tiles.json"
    monkeypatch.delenv("ORPO_KERNELS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tuned.path() == tmp_path / "xdg" / "orpo_kernels" / "tiles.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "me")
    assert tuned.path() == tmp_path / "me" / ".cache" / "orpo_kernels" / "tiles.json"


def test_keys_tell_apart_what_the_default_tells_apart():
    def key(**changes: Any) -> str:
        case = {"card": "A", "dtype": torch.bfloat16, "what": "sums", "tokens": 64, "hidden_size": 1024}
        return tuned.key(**{**case, "heavy_epilogue": False, **changes})

    changes: list[dict[str, Any]] = [
        {"card": "B"}, {"dtype": torch.float32}, {"what": "gradient"}, {"tokens": 65}, {"tokens": 4096},
        {"hidden_size": 1025}, {"hidden_size": 4096}, {"heavy_epilogue": True},
    ]  # fmt: skip
    assert len({key(), *(key(**change) for change in changes)}) == 1 + len(changes)
    assert key(tokens=1, hidden_size=7) == key()
    # In a class the default is the same, or its entry would be of use for a part only.
    for dtype in (torch.bfloat16, torch.float32):
        for heavy in (False, True):
            for tokens in ((1, 64), (65, 512), (513, 9999)):
                for sizes in ((1, 1024), (1025, 3072), (3073, 9999)):
                    found = {configs.default(H100, dtype, n, d, heavy) for n in tokens for d in sizes}
                    assert len(found) == 1


def test_the_launcher_takes_what_was_tuned_for_the_pass(monkeypatch: pytest.MonkeyPatch):
    class OnACard:  # as much of a weight as is looked at
        shape, device = (128256, 4096), torch.device("cuda")

    monkeypatch.setattr(configs, "target_of", lambda device: H100)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A Card")
    head: Any = Head(OnACard(), None, 1.0, None, torch.bfloat16)  # type: ignore[arg-type]
    tuned.save({tuned.key("A Card", torch.bfloat16, "gradient", 2000, 4096, False): entry()})
    assert triton_launch.default_config(head, "gradient", 1500) == OTHER
    assert triton_launch.default_config(head, "exponentials", 1500) == DEFAULT
    assert triton_launch.default_config(head, "gradient", 300) == DEFAULT
    assert triton_launch.default_config(head, "gradient", 1500, bias_gradient=True) == DEFAULT
    tuned.save({tuned.key("A Card", torch.bfloat16, "sums", 2000, 4096, True): entry()})
    assert triton_launch.default_config(head, "sums", 1500, bias_gradient=True) == OTHER
    assert triton_launch.default_config(head, "sums", 1500, statistics=True) == DEFAULT  # timed without them


# ---- the command ----


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_it_rehearses_in_the_interpreter_or_says_so(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "tune.json"
    assert main(["tune", "--repeats", "1", "--dtype", "float32", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "the times mean nothing" in printed
    for what in tuned.PASSES:
        assert f"tiny, N=32{'':<15} {what}" in printed
    rows = json.loads(output.read_text())["rows"]
    assert [row["pass"] for row in rows] == list(tuned.PASSES)
    assert all(row["seconds"] > 0 for row in rows)
    assert not cache.exists()
    monkeypatch.delenv("TRITON_INTERPRET")
    assert main(["tune"]) == 2
    assert "torch sees no GPU to time (TRITON_INTERPRET=1 rehearses" in capsys.readouterr().err


def test_shapes_that_do_not_suit_are_not_timed():
    assert tune.suited(CANDIDATES, DEFAULT, 4096, False) == CANDIDATES
    few = tune.suited(CANDIDATES, DEFAULT, 64, False)
    assert DEFAULT in few
    assert {shape.block_c for shape in few if shape != DEFAULT} == {64}
    heavy = tune.suited(CANDIDATES, configs.default(H100, torch.bfloat16, 4096, 4096, True), 4096, True)
    assert {shape[:4] for shape in heavy if shape != DEFAULT} == {(128, 128, 64, 8), (64, 128, 64, 4)}


def timings(monkeypatch: pytest.MonkeyPatch, times: dict[int, float]) -> list[dict[str, Any]]:
    """Rows for one pass whose shapes take what `times` says of their place among the candidates."""
    one = tune.Pass("a head", "sums", lambda config: config, DEFAULT, CANDIDATES, NAME)
    monkeypatch.setattr(tune, "passes", lambda name, problem: [one])
    monkeypatch.setattr(tune, "seconds", lambda run, device, repeats: times.get(CANDIDATES.index(run()), 9.0))
    problem = tune.Problem()
    return tune.tune({"first": problem, "of the same class": problem}, torch.device("cpu"), 1.0, 1)


def test_the_fastest_is_kept(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cache: Path):
    rows = timings(monkeypatch, {0: 1.5, 1: 1.0, 2: 1.2})
    assert len(rows) == len(CANDIDATES)  # a class is timed once
    assert tune.winners(rows) == {NAME: entry()}
    assert "1500.00  1000.00    50%  256x128x64, 8 warps, 3 stages, persistent" in tune.table(rows)
    assert tune._keep(rows) == 0
    assert capsys.readouterr().out == f"wrote {cache / 'tiles.json'}\n"
    assert chosen() == OTHER


def test_the_default_is_kept_where_it_is_the_fastest(monkeypatch: pytest.MonkeyPatch):
    tuned.save({NAME: entry()})
    assert tune._keep(timings(monkeypatch, {0: 1.0})) == 0
    assert chosen() == DEFAULT


def test_nothing_is_kept_without_the_defaults_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cache: Path
):
    rows = [row for row in timings(monkeypatch, {1: 1.0}) if row["config"] != row["default"]]
    assert tune._keep(rows) == 1
    assert "give it more --minutes" in capsys.readouterr().err
    assert not cache.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tokens", "7"], "--tokens 7: use an even number of at least 4"),
        (["--vocab-size", "100"], "give --model, or both --hidden-size and --vocab-size"),
        (["--hidden-size", "-1"], "--hidden-size -1: it must be positive"),
        (["--minutes", "0"], "--minutes 0.0: it must be positive"),
        (["--model", "nowhere"], "model='nowhere' is neither"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    assert main(["tune", *arguments]) == 2
    assert said in capsys.readouterr().err
