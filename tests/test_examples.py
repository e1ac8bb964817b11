"""The examples, on a tiny model: each runs as a user would run it, and says what it promises."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft", reason="peft is not installed")
from test_demo import tiny  # noqa: F401  (a model's folder)

EXAMPLES = Path(__file__).parents[1] / "examples"
SAYS = {
    "own_loop.py": ("pairs, ", "step 2: loss "),
    "with_trl.py": ("'rewards/accuracies'",),
    "lora_and_packing.py": ("rows are shared, which computes", "'rewards/accuracies'"),
    "chat.py": ("question: ", "before: ", "after: "),
    "other_losses.py": ("step 2: dpo 0.", "simpo "),
}


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_it_runs(
    name: str,
    tiny: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if name == "with_trl.py":
        pytest.importorskip("trl", reason="trl is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, str(tiny), "--steps", "2"])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    said = capsys.readouterr().out
    for words in SAYS[name]:
        assert words in said, said


def test_each_is_listed() -> None:
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert f"[{path.name}]({path.name})" in listed
