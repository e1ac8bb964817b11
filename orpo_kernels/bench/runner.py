"""All measurements of a run: rounds that go through every peer and mode in turn, each in a fresh process.

Interleaved, so that a machine that slows down slows all; every other round backwards, so that nobody always
follows the same one. What a peer cannot do, or does not survive, becomes its reason in the result.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orpo_kernels.bench import machine
from orpo_kernels.bench.peers import PEERS
from orpo_kernels.bench.problem import Problem

# Called before each measurement with what comes next, and after it with None.
Report = Callable[[str | None], None]
_QUANTITIES = ("forward_s", "total_s", "peak_bytes")


@dataclass(frozen=True)
class Settings:
    """How to measure.

    peers, modes: names (`peers.PEERS`, `child.MODES`). rounds: at most; repeats: in each process.
    minutes: after the first round, none is begun that would not fit. timeout: seconds a process.
    sweep: further lengths T to measure once each, after the rounds, for memory against length.
    """

    peers: tuple[str, ...] = tuple(PEERS)
    modes: tuple[str, ...] = ("evaluation", "frozen", "trained")
    rounds: int = 5
    repeats: int = 2
    minutes: float = 4.0
    timeout: float = 600.0
    threads: int = 1
    sweep: tuple[int, ...] = ()

    def measurements(self) -> int:
        """The most there can be, the judge included."""
        cases = len(self.peers) * len(self.modes)
        return 1 + cases * self.rounds + len(self.sweep) * len(self.peers) * len(training(self.modes))


def training(modes: tuple[str, ...]) -> list[str]:
    return [mode for mode in modes if mode != "evaluation"]


def run(problem: Problem, settings: Settings, command: list[str], report: Report = lambda _: None) -> dict[str, Any]:
    """The result, as its file holds it; interrupted by Ctrl-C, with what there is by then.

    Raises RuntimeError if the judge fails.
    """
    started = time.monotonic()

    def elapsed() -> float:
        return time.monotonic() - started

    limit = settings.minutes * 60
    results = {(peer, mode): _empty(peer, mode) for mode in settings.modes for peer in settings.peers}
    with tempfile.TemporaryDirectory() as folder:
        exact = Path(folder) / "exact.pt"
        report("float64")
        _solve(problem, settings, exact)
        report(None)
        rounds, interrupted = 0, False
        sweep: list[dict[str, Any]] = []
        try:
            for index in range(settings.rounds):
                begun = elapsed()
                cases = list(results.values())[:: -1 if index % 2 else 1]
                for result in (r for r in cases if r["status"] in ("ok", "waiting")):
                    report(f"{result['peer']} {result['mode']}")
                    path = None if result["errors"] else str(exact)
                    _add(result, index, _measure(problem, settings, result["peer"], result["mode"], path))
                    report(None)
                rounds += 1
                if elapsed() + (elapsed() - begun) > limit:
                    break
            _sweep(problem, settings, results, report, sweep)
        except KeyboardInterrupt:
            interrupted = True
    for result in results.values():
        if result["status"] == "waiting":
            result |= {"status": "not measured", "reason": "interrupted before its turn"}
        result["summary"] = summary(result["samples"])
    return {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(problem.device, settings.threads),
        "versions": machine.versions(),
        "problem": {
            **problem.as_dict(),
            "padded_length": problem.padded_length,
            "positions": problem.positions,
            "scored": problem.scored,
        },
        "settings": asdict(settings),
        "full_rounds": rounds,
        "interrupted": interrupted,
        "results": list(results.values()),
        "sweep": sweep,
        "seconds": round(elapsed(), 1),
    }


def summary(samples: list[dict[str, Any]]) -> dict[str, dict[str, float] | None]:
    """median, min, q1 and q3 of each quantity; None where there is none."""
    return {name: spread([s[name] for s in samples if s[name] is not None]) for name in _QUANTITIES}


def spread(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": quartiles[1], "min": min(values), "q1": quartiles[0], "q3": quartiles[2]}


def _empty(peer: str, mode: str) -> dict[str, Any]:
    return {
        "peer": peer,
        "label": PEERS[peer].label,
        "logits": PEERS[peer].logits,
        "mode": mode,
        "status": "waiting",
        "reason": None,
        "samples": [],
        "gradient_bytes": None,
        "errors": None,
    }


def _add(result: dict[str, Any], index: int, found: dict[str, Any]) -> None:
    result["status"], result["reason"] = found["status"], found.get("reason")
    if found["status"] == "ok":
        result["samples"] += [{"round": index, **sample} for sample in found["samples"]]
        result["gradient_bytes"] = found["gradient_bytes"]
        result["errors"] = found["errors"] or result["errors"]


def _sweep(
    problem: Problem,
    settings: Settings,
    results: dict[Any, dict[str, Any]],
    report: Report,
    found: list[dict[str, Any]],
) -> None:
    """Adds to `found` the peak memory at each length of every peer that has run."""
    once = replace(settings, repeats=1)
    for length in settings.sweep:
        for mode in training(settings.modes):
            for peer in settings.peers:
                if results[peer, mode]["status"] != "ok":
                    continue
                report(f"{peer} {mode} T={length}")
                measured = _measure(replace(problem, length=length), once, peer, mode, None)
                report(None)
                peak = measured["samples"][0]["peak_bytes"] if measured["status"] == "ok" else None
                row = {"peer": peer, "mode": mode, "length": length, "peak_bytes": peak}
                found.append({**row, "status": measured["status"], "reason": measured.get("reason")})


def _measure(problem: Problem, settings: Settings, peer: str, mode: str, exact: str | None) -> dict[str, Any]:
    specification = {
        "problem": problem.as_dict(),
        "peer": peer,
        "mode": mode,
        "repeats": settings.repeats,
        "threads": settings.threads,
        "exact": exact,
    }
    return call(["-m", "orpo_kernels.bench.child", json.dumps(specification)], settings.timeout)


def call(arguments: list[str], timeout: float) -> dict[str, Any]:
    """What a Python process prints as its last line, a JSON object with "status"; "failed" and why if it fails."""
    try:
        done = subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, check=False, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return {"status": "failed", "reason": f"took more than {timeout:g} s"}
    if done.returncode:
        return {"status": "failed", "reason": _last_words(done)}
    return json.loads(done.stdout.splitlines()[-1])


def _solve(problem: Problem, settings: Settings, path: Path) -> None:
    specification = {
        "problem": problem.as_dict(),
        "threads": settings.threads,
        "with_weight": "trained" in settings.modes,
    }
    command = [sys.executable, "-m", "orpo_kernels.bench.exact", json.dumps(specification), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the float64 judge failed: {_last_words(done)}")


def _last_words(done: subprocess.CompletedProcess[str]) -> str:
    """Of a process that failed: the line of its traceback that names the error."""
    if done.returncode < 0:
        return f"killed by signal {-done.returncode}" + (", out of memory?" if done.returncode == -9 else "")
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    named = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception", "Unsupported"))]
    return (named or lines or [f"exit code {done.returncode}"])[-1][:300]
