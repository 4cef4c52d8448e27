"""What bounds a program under test, and what the sandbox is asked; harness/verifiers/sandbox.py says where it runs.

`Problem.tests` is Python source that passes if nothing is raised, or JSON that starts with a brace:

    {"kind": "functional", "entry": "twoSum", "class": "Solution" or null, "cases": [[[argument, ...], expected], ...]}
    {"kind": "stdin", "cases": [["input", "output"], ...]}
"""

from __future__ import annotations

from typing import Any

from harness.types import Problem
from harness.verifiers.inside import referee

LIMITS: dict[str, float] = {
    "seconds": 6.0,  # of computing time for program and tests, or for each case; three times as much by the clock
    "memory": 1 << 30,  # bytes of address space of a process
    "processes": 16,  # and threads
    "file_size": 16 << 20,  # bytes; what a script prints counts as a file
    "files": 64 << 20,  # bytes of all files together
    "output": 8 << 20,  # bytes of an answer
}


def job(problem: Problem, program: str) -> dict[str, Any]:
    """What the sandbox is asked to run."""
    return {"program": program, "tests": problem.tests, "entry": problem.entry, **LIMITS}


def patience(problem: Problem) -> float:
    """Seconds by the clock that a verdict may take."""
    return referee.units(problem.tests or "") * LIMITS["seconds"] * referee.PATIENCE
