"""The table of what works with what, made from the tests that ran.

A test says what it shows with `@pytest.mark.shows(section, row, how, limits)`, the row's name with the test's
parameters in braces (`{id}` is all of them); its checks say how far off they found it with `measured`. Under

    pytest --compatibility docs/compatibility.md

each row's result is that of all tests that show it: failed if one failed, else skipped if one was skipped. The rows
are kept in build/compatibility.json, where runs in several environments meet.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch

SECTIONS = ("Trainers", "Wrappers", "Adapters", "Architectures", "Layouts", "Causal language models", "Their layouts")
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "axolotl", "llamafactory")
KEPT = Path("build/compatibility.json")
_HEADER = """# What works with what

Made by `make {target}` from the tests that ran; not written by hand. Losses and gradients are the largest
relative errors found against full logits: of a step's loss, over all steps, and of a parameter's gradient in the
first step (Frobenius norm). All on {machine}.
"""

_measured: dict[str, float] = {}
_noted: list[str] = []


def measured(**errors: float) -> None:
    """Note relative errors (`losses`, `gradients`) of the test that is running."""
    for name, error in errors.items():
        _measured[name] = max(_measured.get(name, 0.0), error)


def note(text: str) -> None:
    """Put a remark of the test that is running beside its row's limits."""
    _noted.append(text)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--compatibility", metavar="FILE", help="write the table of what works with what (Markdown)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "shows(section, row, how, limits=''): a row of the compatibility table")
    if config.getoption("--compatibility") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Table(Path(config.getoption("--compatibility"))))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    outcome: Any = yield
    report = outcome.get_result()
    if call.when == "setup":
        _measured.clear()
        _noted.clear()
    for mark in item.iter_markers("shows"):
        section, row, how, limits = (*mark.args, "")[:4]
        callspec = getattr(item, "callspec", None)
        if callspec is not None:
            row = row.format(id=callspec.id, **callspec.params)
        # What a report carries reaches the process that started the workers.
        report.user_properties.append(
            ("shows", [section, row, how, "; ".join(filter(None, [limits, *_noted])), dict(_measured)])
        )


class _Table:
    def __init__(self, file: Path) -> None:
        self.file = file
        self.rows: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.passed and report.when != "call":
            return
        shown = [value for name, value in report.user_properties if name == "shows"]
        if shown:
            self.rows[report.nodeid] = {
                "shows": [row[:4] for row in shown],
                "measured": shown[-1][4],
                "result": report.outcome,
                "reason": report.longrepr[2].removeprefix("Skipped: ") if report.skipped else "",
            }

    def pytest_sessionfinish(self) -> None:
        kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
        for test, found in self.rows.items():
            # A test that another environment can run has its result from there.
            if found["result"] != "skipped" or kept.get(test, found)["result"] == "skipped":
                kept[test] = found | {"with": _versions()}
        KEPT.parent.mkdir(exist_ok=True)
        KEPT.write_text(json.dumps(kept, indent=1))
        self.file.parent.mkdir(exist_ok=True)
        self.file.write_text(table(kept, target=self.file.stem), encoding="utf-8")


def _versions() -> str:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def table(tests: dict[str, dict[str, Any]], *, target: str = "compatibility") -> str:
    """The Markdown text of the tests' results. target: what make calls that which ran them."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    environments: list[str] = []
    for found in tests.values():
        if found["with"] not in environments:
            environments.append(found["with"])
        for section, name, how, limits in found["shows"]:
            row = rows.setdefault((section, name), {"how": how, "limits": [], "tests": [], "measured": {}})
            row["tests"].append(found)
            row["limits"] += [limits] if limits and limits not in row["limits"] else []
            for error, value in found["measured"].items():
                row["measured"][error] = max(row["measured"].get(error, 0.0), value)
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    machine = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, {card}"
    lines = [_HEADER.format(machine=machine, target=target), "Environments:", ""]
    lines += [f"{index}. {environment}" for index, environment in enumerate(environments, 1)]
    for section in [section for section in SECTIONS if any(of == section for of, _ in rows)]:
        lines += ["", f"## {section}", "", "| what | how tested | losses | gradients | result | limits | env. |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for (of, name), row in rows.items():
            if of == section:
                errors = [f"{row['measured'][key]:.0e}" if key in row["measured"] else "" for key in _ERRORS]
                where = ", ".join(sorted({str(environments.index(test["with"]) + 1) for test in row["tests"]}))
                cells = [name, row["how"], *errors, _result(row["tests"]), "; ".join(row["limits"]), where]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


_ERRORS = ("losses", "gradients")


def _result(tests: list[dict[str, Any]]) -> str:
    for result in ("failed", "skipped"):
        having = [test for test in tests if test["result"] == result]
        if having:
            reason = " ".join(having[0]["reason"].replace("|", "/").split())[:150]
            return f"**{result}** ({len(having)} of {len(tests)}){': ' + reason if reason else ''}"
    return f"{len(tests)} passed"
