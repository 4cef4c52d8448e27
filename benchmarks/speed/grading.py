"""Grading answers in worker processes that can be killed, against plain calls of math-verify: answers a second.

    RETORT_DATA=DIR python -m benchmarks.speed.grading    # some two minutes on two idle cores

The 5,000 gold answers of MATH's test split, each inside the solution that boxes it. The peer parses the boxed answer and compares it in
this process, without any limit of time, equal strings parsed once as by ours: what a loop over `math_verify.parse` and
`math_verify.verify` costs at the least. Ways take turns; the median over repeats counts. Imports come before the clock.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.speed import machine, write
from harness import verifiers
from harness.problems import load
from harness.types import Problem
from harness.verifiers import completion, math

PACKAGES = ("math-verify", "latex2sympy2_extended", "sympy")


def ours(problems: Sequence[Problem], workers: int) -> int:
    """How many are judged right by so many workers."""
    items = [(problem, problem.solution or "") for problem in problems]
    return sum(verdict.correct for verdict in verifiers.verify_many(items, workers=workers))


def peer(problems: Sequence[Problem]) -> int:
    """How many math-verify finds right, called in this process."""
    import math_verify

    math.parsed.cache_clear()
    right = 0
    for problem in problems:
        answer = ", ".join(completion.boxed(problem.solution or ""))
        gold, given = (math.parsed(text) for text in (problem.answer or "", answer))
        right += math_verify.verify(gold, given, timeout_seconds=0)
    return right


def measure(
    ways: dict[str, Callable[[], int]], count: int, repeats: int
) -> dict[str, dict[str, Any]]:
    """Answers a second of each way, and how many it finds right."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    right: dict[str, int] = {}
    for _ in range(repeats):
        for way, call in ways.items():
            start = time.perf_counter()
            right[way] = call()
            seconds[way].append(time.perf_counter() - start)
    return {
        way: {
            "answers_per_second": count / statistics.median(took),
            "seconds": took,
            "right": right[way],
        }
        for way, took in seconds.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--limit", type=int, help="answers; default: all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("results/reference/speed/grading.json"))
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # the peer's: that it has no limit of time
    here = machine()
    problems = load("math", "test", arguments.limit)
    ours(problems[:64], 2)
    peer(problems[:1])  # its imports
    ways: dict[str, Callable[[], int]] = {
        "one worker": lambda: ours(problems, 1),
        "two workers": lambda: ours(problems, 2),
        "math-verify in this process": lambda: peer(problems),
    }
    rows = measure(ways, len(problems), arguments.repeats)
    plain = rows["math-verify in this process"]["answers_per_second"]
    for way, row in rows.items():
        row["ratio"] = row["answers_per_second"] / plain
        print(
            f"{way}: {row['answers_per_second']:,.0f} answers/s, {row['ratio']:.2f} times plain calls; "
            f"{row['right']} of {len(problems)} right"
        )
    here["packages"] = {name: metadata.version(name) for name in PACKAGES}
    record = {
        "environment": here,
        "answers": len(problems),
        "repeats": arguments.repeats,
        "rows": rows,
    }
    write(arguments.out, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
