"""The steps of a reasoning text."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Literal

from harness.verifiers.completion import CLOSE, OPEN

_LINE = re.compile(r"[^\n]*\n|[^\n]+")


def split(text: str, separator: Literal["line", "blank"] = "line") -> list[str]:
    """Cut before every written line, or before those after a blank one; joining the steps gives the text back."""
    steps: list[str] = []
    begun = False  # whether the last step has a written line
    blank = False  # whether the last line was blank
    for line in _LINE.findall(text):
        written = bool(line.strip())
        if not steps or (written and begun and (blank or separator == "line")):
            steps.append(line)
            begun = written
        else:
            steps[-1] += line
            begun = begun or written
        blank = not written
    return steps


def token_steps(
    pieces: Sequence[str], separator: Literal["line", "blank"] = "line", shortest: int = 1
) -> list[range]:
    """The reasoning steps of a response as ranges of its tokens, given the text of each token.

    Reasoning is what stands inside the think, or all of it where there is none, or what follows a think left blank. A token that
    straddles a boundary belongs to the earlier step; a step of fewer than `shortest` tokens joins the next one (the last joins
    the one before).
    """
    text = "".join(pieces)
    starts = [0, *accumulate(map(len, pieces))]
    opened = text.find(OPEN)
    begin = opened + len(OPEN) if opened >= 0 else 0
    closed = text.find(CLOSE, begin)
    first = bisect_left(starts, begin)
    last = bisect_left(starts, closed if closed >= 0 else len(text), first)
    if closed >= 0 and not text[starts[first] : closed].strip():
        first = bisect_left(starts, closed + len(CLOSE))
        last = bisect_left(starts, len(text), first)
    body = text[starts[first] : starts[last]]
    bounds = accumulate(map(len, split(body, separator)), initial=starts[first])
    cuts = [bisect_left(starts, bound, first, last) for bound in bounds]
    steps: list[range] = []
    for start, stop in pairwise(sorted({first, *cuts, last})):
        if steps and len(steps[-1]) < shortest:
            start = steps.pop().start
        steps.append(range(start, stop))
    if len(steps) > 1 and len(steps[-1]) < shortest:
        stop = steps.pop().stop
        steps[-1] = range(steps[-1].start, stop)
    return steps
