"""The steps of a reasoning text."""

from __future__ import annotations

import re
from typing import Literal

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
