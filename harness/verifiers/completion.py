"""How a completion is read: which part of it counts, and where in that part the answer stands."""

from __future__ import annotations

import ast
import re
import textwrap
from functools import lru_cache

from harness import coding
from harness.types import Problem, Trace

OPEN, CLOSE = "<think>", "</think>"

_PROGRAM = re.compile(r"from [\w.]+ import |import \w|def \w+\(|async def |@\w")
_INDENTED = re.compile(r"(?:[ \t]*\n)*[ \t]+\S")
_FUTURE = re.compile(r"^from __future__ import .*\n?", re.MULTILINE)
_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([^\n`]*)$", re.MULTILINE)
# What may stand around a joint, mathematics included; possessive, or a page of blanks would take minutes.
_SPACE = r"(?:\s|\$|~|\\[ ,;:!]|\\q?quad\b|\\[()\[\]])*+"
_AND = r"(?:and\b|\\text\s*\{\s*and\s*\}|\\(?:mbox|textrm)\s*\{\s*and\s*\})"
_JOINT = re.compile(rf"{_SPACE}(?:,{_SPACE}(?:{_AND})?|{_AND}){_SPACE}")


def response(text: str, *, opened: bool = False) -> str | None:
    """What follows the last </think>; None if a think was opened (also by the template) and never closed."""
    _, closed, tail = text.rpartition(CLOSE)
    if OPEN in tail or (opened and not closed):
        return None
    return tail


def boxed(text: str) -> list[str]:
    r"""The contents of the last \boxed{} and of those that "and" or commas join to it; empty if it never closes."""
    found: list[str] = []
    end = len(text)
    while (start := text.rfind(r"\boxed", 0, end)) >= 0:
        span = _braces(text, start + len(r"\boxed"))
        if span is None:
            break
        if found and not _JOINT.fullmatch(text, span[1] + 1, end):
            break
        found.insert(0, text[span[0] : span[1]].strip())
        end = start
    return found


def fenced(text: str, *, finished: bool = True) -> str | None:
    """The last closed fenced block; None if there is none, or if the response was cut inside a later one."""
    last: str | None = None
    opening: re.Match[str] | None = None
    for fence in _FENCE.finditer(text):
        if opening is None:
            opening = fence
        elif fence[1].startswith(opening[1]) and not fence[2].strip():
            last = textwrap.dedent(text[opening.end() + 1 : fence.start()])
            opening = None
    return None if opening is not None and not finished else last


def program(problem: Problem, text: str, *, finished: bool = True) -> str | None:
    """The whole program that a response gives; None if it gives none.

    Where the prompt is a function to complete, a program that defines it gets the prompt's imports and helpers in front, and
    anything else is its body, which may also come without a fence.
    """
    found = fenced(text, finished=finished)
    if not stub(problem):
        return found if found and found.strip() else None
    name = re.escape(problem.entry or "")
    whole = re.compile(rf"^(?:async +def|def|class) +{name}\b|^{name} *=", re.MULTILINE)
    if found is None and not _FENCE.search(text):
        found = text.strip("\n")
        if not (_INDENTED.match(found) or (_PROGRAM.match(found) and whole.search(found))):
            return None
    if found is None or not found.strip():
        return None
    if whole.search(found):
        return _behind(coding.preface(problem.prompt, problem.entry or ""), found)
    # Text is not parsed here: a compiler can be made to hang or crash, and judging is the sandbox's part.
    body = found if _INDENTED.match(found) else textwrap.indent(found, "    ")
    return f"{problem.prompt.rstrip()}\n{body}"


def stub(problem: Problem) -> bool:
    """Whether the prompt is Python that ends in the function to complete, as HumanEval's are."""
    return problem.entry is not None and _ends_in(problem.prompt, problem.entry)


@lru_cache(maxsize=4096)
def _ends_in(prompt: str, entry: str) -> bool:
    try:
        last = ast.parse(prompt.rstrip() + "\n    pass\n").body[-1]
    except (SyntaxError, ValueError):
        return False
    return isinstance(last, ast.FunctionDef) and last.name == entry


def _behind(head: str, program: str) -> str:
    """A program behind a head, but for its `from __future__` lines, which must come first."""
    if not head.strip():
        return program
    future = "".join(_FUTURE.findall(program))
    return f"{future}{head.rstrip()}\n\n{_FUTURE.sub('', program)}"


def rejection(trace: Trace, template_opens: bool = False) -> str | None:
    """Why a teacher's trace is not trained on; None if it is (after open-r1's flags; our reading)."""
    if not trace.finished:
        return "truncated"
    opened = trace.text.count("<think>") + template_opens
    if opened != trace.text.count("</think>"):
        return "think not closed" if opened else "think not opened"
    if opened > 1:
        return "more than one think"
    if trace.verdict is None or trace.verdict.status == "error":
        return "gold answer not readable"  # skipped, not counted as wrong
    return None if trace.correct else trace.verdict.status


def _braces(text: str, start: int) -> tuple[int, int] | None:
    """Where the group that opens at `start` (after spaces) begins and ends; None if it never closes."""
    while start < len(text) and text[start].isspace():
        start += 1
    if start >= len(text) or text[start] != "{":
        return None
    depth, position = 0, start
    while position < len(text):
        char = text[position]
        if char == "\\":
            position += 2  # an escaped brace is text
            continue
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return start + 1, position
        position += 1
    return None
