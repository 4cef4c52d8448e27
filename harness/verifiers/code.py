"""What bounds a program under test; harness/verifiers/nursery.py runs it.

It is contained against accident and the usual tricks (exiting early, printing a verdict, forking, hogging), not against
a program that attacks the runner in its own process, nor does it lose the network: that is a sandbox's part.
"""

from __future__ import annotations

from harness.types import Problem

LIMITS: dict[str, float] = {
    "seconds": 6.0,  # of wall time for program and tests
    "memory": 1 << 30,  # bytes of address space
    "processes": 32,  # and threads
    "file_size": 16 << 20,  # bytes
}


def job(problem: Problem, program: str) -> dict[str, float | str]:
    """What the nursery is asked to run."""
    assert problem.tests is not None
    return {"program": program, "tests": problem.tests, **LIMITS}
