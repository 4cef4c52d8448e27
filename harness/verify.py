"""Completions that exist already, from anywhere, judged by the rules of our tasks: lines of JSON in, lines of JSON out."""

from __future__ import annotations

import difflib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from harness import evaluation, problems, verifiers
from harness.config import nearest
from harness.types import Problem, Verdict

CHUNK = 128  # completions a core that are judged, and written, together


@dataclass(frozen=True, slots=True)
class Completion:
    """One line of the input."""

    id: str | int  # as it was given
    problem: Problem
    text: str
    truncated: bool = False


@dataclass
class Tally:
    """What was judged so far."""

    statuses: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    disputed: int = 0

    def add(self, completion: Completion, verdict: Verdict) -> None:
        self.statuses[verdict.status] += 1
        self.truncated += completion.truncated
        self.disputed += verdict.disputed

    def __str__(self) -> str:
        total = self.statuses.total()
        counts = {
            "correct": self.statuses["ok"],
            **{name: self.statuses[name] for name in ("wrong", "unparsed", "timeout", "error")},
            "truncated": self.truncated,
            "disagreements of the second extractor": self.disputed,
        }
        share = f" ({100 * counts['correct'] / total:.1f} % correct)" if total else ""
        return f"{total} judged{share}: " + ", ".join(f"{k} {v}" for k, v in counts.items())


def read(
    task: str, lines: Iterable[bytes], place: str, options: Mapping[str, Any] | None = None
) -> list[Completion]:
    """Every line as a completion of one of the task's problems; the first bad line is an error that names it."""
    known = by_id(task, options)
    return [
        _completion(line, known, task, f"{place}, line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]


def by_id(task: str, options: Mapping[str, Any] | None = None) -> Mapping[str, Problem]:
    """All rows behind a task, by the data's own id (or row number), and by ours, which has the set's name before it.

    With options of the problem set (release: v6), the test problems that these choose.
    """
    if task not in evaluation.own():
        raise ValueError(
            f"unknown task {task!r}: {nearest(task, evaluation.own())}; "
            "completions are judged for these tasks only, and lm-eval's own score what they generate"
        )
    source = evaluation.source_of(task)
    found = problems.load(source, "test", **options) if options else problems.every(source)
    return {
        **{problem.id: problem for problem in found},
        **{problem.id.removeprefix(f"{source}/"): problem for problem in found},
    }


def judge(completions: list[Completion], tally: Tally, opened: bool = False) -> Iterator[list[str]]:
    """The lines of the answer, in order, a chunk at a time; `opened`: the prompts ended inside a think."""
    size = CHUNK * (os.cpu_count() or 1)
    for first in range(0, len(completions), size):
        chunk = completions[first : first + size]
        verdicts = verifiers.verify_many(
            [(c.problem, c.text, not c.truncated) for c in chunk], opened=opened
        )
        for completion, verdict in zip(chunk, verdicts, strict=True):
            tally.add(completion, verdict)
        yield [_line(*pair) for pair in zip(chunk, verdicts, strict=True)]


def run(
    task: str,
    lines: Iterable[bytes],
    place: str,
    write: Callable[[str], None],
    progress: Callable[[int, int], None],
    *,
    opened: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Tally:
    """Judge lines and write one for each; nothing is written before all of them were read."""
    completions, tally = read(task, lines, place, options), Tally()
    evaluation.check(task)  # that there is a sandbox, if it needs one
    progress(0, len(completions))
    for answers in judge(completions, tally, opened):
        write("".join(f"{answer}\n" for answer in answers))
        progress(tally.statuses.total(), len(completions))
    return tally


def _completion(line: bytes, known: Mapping[str, Problem], task: str, place: str) -> Completion:
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON: {error.msg} at column {error.colno}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{place}: not UTF-8") from None
    except (RecursionError, ValueError) as error:  # nested too deeply, a number too long
        raise ValueError(f"{place}: cannot be read: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(
            f"{place}: a line is an object with the keys id and completion, got {type(row).__name__}"
        )
    for key, kinds, what in (
        ("id", (str, int), "a string or a whole number"),
        ("completion", (str,), "a string"),
    ):
        if key not in row:
            raise ValueError(
                f"{place}: no key {key!r}; the line has {', '.join(map(repr, row)) or 'none'}"
            )
        if not isinstance(row[key], kinds) or isinstance(row[key], bool):
            raise ValueError(f"{place}: {key!r} is {what}, got {row[key]!r}")
    if not isinstance(row.get("truncated", False), bool):
        raise ValueError(f"{place}: 'truncated' is true or false, got {row['truncated']!r}")
    problem = known.get(str(row["id"]))
    if problem is None:
        raise ValueError(
            f"{place}: {task} has no problem {str(row['id'])!r}: {_nearest(row['id'], known)}"
        )
    return Completion(row["id"], problem, row["completion"], row.get("truncated", False))


def _nearest(given: str | int, known: Mapping[str, Problem]) -> str:
    """A suggestion; a set has too many ids to list them all."""
    own = [name for name, problem in known.items() if name != problem.id]
    close = difflib.get_close_matches(str(given), own, n=1)
    return f"did you mean {close[0]!r}?" if close else f"its {len(own)} ids: {own[0]} to {own[-1]}"


def _line(completion: Completion, verdict: Verdict) -> str:
    return json.dumps(
        {
            "id": completion.id,
            "correct": verdict.correct,
            "extracted": verdict.extracted,
            "status": verdict.status,
        }
    )
