"""Stage `tests`: the project's tests of the kernels and of what only a card can break, in several processes."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from functools import partial
from typing import Any

from benchmarks.gpu.common import CUDA, Record

TESTS = ("tests/kernels/test_card.py", "tests/kernels/test_triton_path.py", "tests/kernels/test_dispatch.py")
MORE = ("tests/test_linear_logps.py", "tests/test_autograd.py", "tests/test_memory.py")


def pytest(files: tuple[str, ...], seconds: float) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-v",
        "-x" if not CUDA else "--maxfail=30",
        *files,
    ]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(max(2, (os.cpu_count() or 2) - 4)) if CUDA else "2", "--dist", "worksteal"]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    # A session of its own: what is out of time ends with all its workers.
    run = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    timed_out = False
    try:
        output, _ = run.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        timed_out = True
        os.killpg(run.pid, signal.SIGKILL)
        output, _ = run.communicate()
    lines = output.splitlines()
    # `[gw0] [ 1%] PASSED tests/...` or `tests/... PASSED`; a summary's lines begin with the verdict.
    verdicts = Counter(
        found[1] for line in lines if (found := re.match(r"(?:\[gw|tests/).*\b(PASSED|FAILED|SKIPPED|ERROR)\b", line))
    )
    shown = [line for line in lines if re.match(r"(FAILED|ERROR|E  )", line)][:60] + lines[-3:]
    print("\n".join(f"   {line[:220]}" for line in shown), flush=True)
    counts = ", ".join(f"{count} {verdict.lower()}" for verdict, count in sorted(verdicts.items()))
    print(f"   {counts}{', and the time was up' if timed_out else ''}", flush=True)
    if verdicts["FAILED"] or verdicts["ERROR"] or (run.returncode and not timed_out):
        raise RuntimeError(f"exit status {run.returncode}, {counts}: {shown[:30]}")
    return {"counts": verdicts, "complete": not timed_out}


def run(record: Record) -> None:
    for name, files in (("kernels", TESTS), ("primitive", MORE)):
        left = max(10.0, record.limit - record.used())
        record.section(name, partial(pytest, files, left))
