"""What this package offers to the bench: problem sets, checkpoints, suites and lm-eval tasks."""

from __future__ import annotations

from pathlib import Path

from benchmarks.micro import CHECKPOINTS, CODE, MATH, MICRO_VERSION
from harness.types import ProblemSet

PROBLEMS: dict[str, ProblemSet] = {problems.name: problems for problems in (MATH, CODE)}
SUITES = Path(__file__).parent / "suites"
TASKS = Path(__file__).parent / "tasks"

__all__ = ["CHECKPOINTS", "MICRO_VERSION", "PROBLEMS", "SUITES", "TASKS"]
