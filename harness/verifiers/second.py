r"""A second reading of mathematical answers, that shares nothing with the first: the last \boxed{}, compared as a string.

It decides no score. Where it and math-verify disagree, one of the two is wrong, and the report lists the case.
"""

from __future__ import annotations

import re

from harness.types import Problem, Second

VERSION = "1"  # raised when a verdict can change

_DROPPED = re.compile(  # what changes how an answer looks, and not what it is
    r"\\(?:left|right|displaystyle|textstyle|limits|bigl?|bigr?|Bigl?|Bigr?)(?![a-zA-Z])"
    r"|\\(?:quad|qquad)(?![a-zA-Z])|\\[,;:! ]|\\?[$%]|\^\{?\\circ\}?|°|~|\s+"
)
_WORDS = re.compile(r"\\(?:text|mbox|textrm|textbf|textit|mathrm|mathbf)\{([^{}]*)\}")
_UNIT = re.compile(  # behind a number, at the end: \text{anything}, or one of a few bare words
    r"(?<=[0-9})])(?:\\(?:text|mbox|textrm|mathrm)\{[ A-Za-z.]*\}"
    r"|(?:degree|dollar|cent|unit|inche?|meter|mile|pound|gram|second|minute|hour|day|year)s?|feet|cm|mm|km|mph)"
    r"(?:\^\{?[23]\}?)?$"
)
_FRACTION = re.compile(r"\\frac(?:([0-9])([0-9])|\{([^{}]*)\}\{([^{}]*)\}|([0-9])\{([^{}]*)\})")
_THOUSANDS = re.compile(r"(?<![0-9,.])[0-9]{1,3}(?:(?:,|\{,\})[0-9]{3})+(?![0-9,])")
_NUMBER = re.compile(r"(?<![0-9.])(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)(?![0-9.])")
NESTED = 4  # fractions inside fractions that are rewritten


def judge(problem: Problem, tail: str) -> Second | None:
    """Whether the last box of what follows the think is the gold answer; None for no box, no gold answer, or no mathematics."""
    if problem.verifier != "math" or not problem.answer:
        return None
    found = last_box(tail)
    if found is None:
        return None
    return "ok" if normalise(found) == normalise(problem.answer) else "wrong"


def last_box(text: str) -> str | None:
    r"""The content of the last \boxed{} or \fbox{}; None where there is none, or it does not close."""
    start = max(text.rfind(r"\boxed{"), text.rfind(r"\fbox{"))
    if start < 0:
        return None
    begin = text.index("{", start) + 1
    depth = 1
    for brace in re.finditer(r"\\.|[{}]", text[begin:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[begin : begin + brace.start()]
    return None


def normalise(answer: str) -> str:
    r"""An answer without what only decorates it: a/b for \frac{a}{b}, 1000 for 1{,}000, 0.5 for .50, 7 for 007 and for 7 cm."""
    text = answer.replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac")
    text = _UNIT.sub("", _DROPPED.sub("", text).rstrip("."))
    text = _WORDS.sub(r"\1", text)
    text = _THOUSANDS.sub(lambda found: re.sub(r"[{},]", "", found[0]), text)
    for _ in range(NESTED):
        text = _FRACTION.sub(_fraction, text)
    return _NUMBER.sub(_number, text)


def _fraction(found: re.Match[str]) -> str:
    above, below = [part for part in found.groups() if part is not None]
    return "/".join(x if re.fullmatch(r"\\?\w+", x) else f"({x})" for x in (above, below))


def _number(found: re.Match[str]) -> str:
    whole, _, decimals = found[0].partition(".")
    whole, decimals = whole.lstrip("0") or "0", decimals.rstrip("0")
    return f"{whole}.{decimals}" if decimals else whole
