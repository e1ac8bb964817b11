"""The table of what works with what cannot call green what is not."""

from __future__ import annotations

from typing import Any

from compatibility import table


def found(result: str, row: str = "a wrapper", limits: str = "", **more: Any) -> dict[str, Any]:
    shows = [["Wrappers", row, "3 steps", limits]]
    return {"shows": shows, "measured": {}, "result": result, "reason": "", "with": "torch 1"} | more


def row_of(text: str, name: str = "a wrapper") -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_one_failure_fails_the_row():
    tests = {"1": found("passed"), "2": found("failed"), "3": found("skipped", reason="no GPU")}
    assert "**failed** (1 of 3)" in row_of(table(tests))
    del tests["2"]
    assert "**skipped** (1 of 2): no GPU" in row_of(table(tests))
    del tests["3"]
    assert "1 passed" in row_of(table(tests))


def test_the_largest_error_stands():
    tests = {
        "1": found("passed", measured={"losses": 2e-7}),
        "2": found("passed", measured={"losses": 3e-8, "gradients": 4e-6}, **{"with": "torch 2"}),
        "3": found("passed", row="another"),
    }
    assert row_of(table(tests)) == ["a wrapper", "3 steps", "2e-07", "4e-06", "2 passed", "", "1, 2"]
    assert row_of(table(tests), "another") == ["another", "3 steps", "", "", "1 passed", "", "1"]
