"""Checks of programs in the sandbox, against a fresh interpreter for each with no isolation: checks a second.

    python -m benchmarks.speed.sandbox    # about a minute on two idle cores

Both ways run the same programs with the same tests (micro code's own solutions), as many at a time as there are cores, in turns;
the median over repeats counts.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import PROBLEMS
from benchmarks.speed import machine, write
from harness.types import Problem
from harness.verifiers import completion, sandbox, verify_many


def in_sandbox(problems: Sequence[Problem], workers: int) -> int:
    """How many programs pass."""
    items = [(problem, problem.solution or "") for problem in problems]
    return sum(verdict.correct for verdict in verify_many(items, workers=workers))


def in_fresh_interpreters(problems: Sequence[Problem], workers: int) -> int:
    """How many programs pass."""

    def passes(problem: Problem) -> bool:
        program = completion.fenced(problem.solution or "")
        command = [sys.executable, "-c", f"{program}\n{problem.tests}"]
        return subprocess.run(command, capture_output=True).returncode == 0

    with ThreadPoolExecutor(workers) as executor:
        return sum(executor.map(passes, problems))


WAYS: dict[str, Callable[[Sequence[Problem], int], int]] = {
    "sandbox": in_sandbox,
    "fresh interpreters": in_fresh_interpreters,
}


def measure(problems: Sequence[Problem], workers: int, repeats: int) -> dict[str, Any]:
    """Checks a second both ways, and how many programs each found right."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    passed: dict[str, int] = {}
    in_sandbox(problems[: 64 * workers], workers)  # the workers start
    for _ in range(repeats):
        for way, check in WAYS.items():
            start = time.perf_counter()
            passed[way] = check(problems, workers)
            seconds[way].append(time.perf_counter() - start)
    rates = {way: len(problems) / statistics.median(took) for way, took in seconds.items()}
    return {
        "checks_per_second": rates,
        "ratio": rates["sandbox"] / rates["fresh interpreters"],
        "passed": passed,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--checks", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=Path("results/reference/speed/sandbox.json"))
    arguments = parser.parse_args()
    here = machine()
    problems = PROBLEMS["micro_code"].load("train", arguments.checks)
    row = measure(problems, arguments.workers, arguments.repeats)
    rate = row["checks_per_second"]
    print(
        f"{rate['sandbox']:,.0f} checks/s in the sandbox ({sandbox.kind()}), "
        f"{rate['fresh interpreters']:,.0f} with a fresh interpreter each: {row['ratio']:.1f} times"
    )
    here |= {
        "sandbox": sandbox.kind(),
        "root": os.geteuid() == 0,
        "workers": arguments.workers,
    }
    record = {
        "environment": here,
        "checks": len(problems),
        "repeats": arguments.repeats,
        "rows": {"micro_code": row},
    }
    write(arguments.out, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
