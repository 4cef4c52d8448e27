"""The steps of a reasoning text."""

from __future__ import annotations

import io
import re
import tokenize
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Literal

from harness.verifiers.completion import CLOSE, OPEN

# line, blank: a line, or what blank lines set apart. statement, block: the same of code, where a bracket or a quote that is open
# joins what follows. sentence: up to a full stop, or to the end of a line.
Separator = Literal["line", "blank", "statement", "block", "sentence"]

STOPS: Mapping[Separator, tuple[str, ...]] = {  # where a model that writes one step is stopped
    "line": ("\n",),
    "blank": ("\n\n",),
    "statement": ("\n",),
    "block": ("\n\n",),
    "sentence": (". ", "! ", "? ", "\n"),
}
JOINED = 32  # lines of a statement at most: text that opens a bracket for good goes on as lines
_LINE = re.compile(r"[^\n]*\n|[^\n]+")
_SENTENCE = re.compile(r".*?(?:[.!?] +|\n)|.+", re.DOTALL)
_OPENING = re.compile(rf"\s*{OPEN}\s*")


def split(text: str, separator: Separator = "line") -> list[str]:
    """Cut before every written line (or sentence), or before those after a blank one; joining the steps gives the text back."""
    steps: list[str] = []
    apart = separator in ("blank", "block")
    begun = False  # whether the last step has a written line
    blank = False  # whether the last line was blank
    for line in (_SENTENCE if separator == "sentence" else _LINE).findall(text):
        written = bool(line.strip())
        if not steps or (
            written and begun and (blank or not apart) and whole(steps[-1], separator)
        ):
            steps.append(line)
            begun = written
        else:
            steps[-1] += line
            begun = begun or written
        blank = not written
    return steps


def whole(step: str, separator: Separator) -> bool:
    """Whether something is written, and no bracket, triple quote or backslash in it waits for the next line (in code).

    Text that is no code may open a bracket for good: after JOINED lines nothing is waited for.
    """
    if not step.strip() or separator not in ("statement", "block") or step.count("\n") >= JOINED:
        return bool(step.strip())
    depth = 0
    try:
        for token in tokenize.generate_tokens(io.StringIO(step).readline):
            if token.type == tokenize.OP:
                depth += (token.string in "([{") - (token.string in ")]}")
            if depth < 0:  # closes what another step opened, or no code
                return True
    except tokenize.TokenError as error:
        return not re.search("EOF in multi-line|triple-quoted", str(error))
    except SyntaxError:  # no code, or a dedent whose block stands in another step
        pass
    return True


def actions(pieces: Sequence[str], separator: Separator, longest: int) -> list[range]:
    """Every step of a whole response, its conclusion included, as a range of its tokens, given the text of each token.

    The opening of a think is no step. A step of more than `longest` tokens is cut into its lines, a line that is longer still into
    pieces of `longest`. A token over a boundary belongs to the later step if only its leading space lies before the boundary.
    """
    text = "".join(pieces)
    starts = [0, *accumulate(map(len, pieces))]
    opening = _OPENING.match(text)
    begin = _place(text, starts, opening.end() if opening else 0, 0, len(pieces))
    found: list[range] = []
    for step in _ranges(text, starts, range(begin, len(pieces)), separator):
        lines = _ranges(text, starts, step, "line") if len(step) > longest else [step]
        for line in lines:
            found += [line[i : i + longest] for i in range(0, len(line), longest)]
    return found


def _ranges(text: str, starts: Sequence[int], tokens: range, separator: Separator) -> list[range]:
    """The steps of a part of a response, as ranges of tokens; the end token, which has no text, belongs to the last."""
    first, last = tokens.start, tokens.stop
    body = text[starts[first] : starts[last]]
    bounds = accumulate(map(len, split(body, separator)[:-1]), initial=starts[first])
    cuts = {first, *(_place(text, starts, bound, first, last) for bound in bounds), last}
    return [range(a, b) for a, b in pairwise(sorted(cuts)) if a < b]


def _place(text: str, starts: Sequence[int], bound: int, first: int, last: int) -> int:
    """The token at which what begins at a character begins."""
    cut = bisect_left(starts, bound, first, last)
    straddles = cut > first and starts[cut] > bound
    return cut - 1 if straddles and text[starts[cut - 1] : bound].isspace() else cut


def token_steps(
    pieces: Sequence[str], separator: Separator = "line", shortest: int = 1
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
