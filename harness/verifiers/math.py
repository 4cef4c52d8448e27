"""Mathematical answers, judged by math-verify, which is run in processes that can be killed.

math-verify bounds its time with signals, which need the main thread and cannot stop a computation inside C. So its own
limits are off, and `serve`, the other end of harness.verifiers.workers, is killed from outside when it is late.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import resource
import signal
import sys
from typing import Any

from harness.types import Status

SECONDS = 10.0  # for one answer
ALARM = 60  # seconds after which a worker ends itself, were nobody to do it
MEMORY = 4 << 30  # bytes of address space
SMALL = 1e-3
RELATIVE = 1e-3


def judge(gold: str, answer: str) -> Status:
    """Whether math-verify finds the two equal; "error" if it cannot read the gold answer."""
    import math_verify

    expected = parsed(gold)
    if not expected:
        return "error"
    for one, other in itertools.product(expected, parsed(answer)):
        if math_verify.verify(one, other, timeout_seconds=0) and not apart(one, other):
            return "ok"
    return "wrong"


def apart(one: Any, other: Any) -> bool:
    """Whether two small numbers differ by more than a thousandth of themselves.

    math-verify compares numbers to six decimals, or to a difference that it takes for zero: to it 1/2004! is 2/2004!, and any
    small number 0. Six decimals of a number above SMALL say more than this does, so larger ones are left to it.
    """
    import sympy

    if not all(isinstance(x, sympy.Expr) and x.is_number for x in (one, other)):
        return False
    largest = max(abs(x.doit().evalf()) for x in (one, other))
    if not largest < SMALL:
        return False
    return bool(abs((one - other).doit().evalf()) > RELATIVE * largest)


@functools.lru_cache(maxsize=64)
def parsed(answer: str) -> list[Any]:
    """The readings of an answer as it would stand in a box; gold and given are read alike."""
    import math_verify

    config = math_verify.LatexExtractionConfig(
        boxed_match_priority=0, try_extract_without_anchor=False
    )
    return math_verify.parse(rf"\boxed{{{answer}}}", [config], parsing_timeout=0)


def serve() -> None:
    """Judge pairs, one a line on standard input, until it closes."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable(logging.WARNING)  # math-verify says on every start that its time limit is off
    for line in sys.stdin:
        signal.alarm(ALARM)  # unhandled, it ends a process that hangs and whose caller is gone
        status = judge(*json.loads(line))
        signal.alarm(0)
        sys.stdout.write(json.dumps(status) + "\n")
        sys.stdout.flush()
