"""Verdicts on completions: read the answer out of the text, then judge it.

    verify(problem, text)         one
    verify_many(items)            many, in parallel, in order

Reading is done here (harness/verifiers/completion.py has the rules); judging that may hang is done by workers.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

from harness.types import LanguageModel, Problem, Second, Verdict
from harness.verifiers import code, completion, math, sandbox, second, workers
from harness.verifiers.completion import rejection

__all__ = ["graded", "opens_think", "recall", "rejection", "verify", "verify_many", "versions"]

READING = "2"  # raised when the rules of reading, or what we add to math-verify's judgement, change
CODE_GRACE = 8.0  # seconds beyond a program's own limit, to clean up after it
JOBS_A_WORKER = 32  # fewer are not worth another worker's start

Item = tuple[Problem, str] | tuple[Problem, str, bool]  # problem, text, whether it was finished
Key = tuple[str, str, str]  # problem set, problem, text

_graded: ContextVar[Mapping[Key, Verdict]] = ContextVar(
    "graded", default=types.MappingProxyType({})
)


def verify(problem: Problem, text: str, finished: bool = True, *, opened: bool = False) -> Verdict:
    """The verdict on one response; `opened`: the chat template has opened a think already."""
    return verify_many([(problem, text, finished)], opened=opened)[0]


def verify_many(
    items: Sequence[Item], *, opened: bool = False, workers: int | None = None
) -> list[Verdict]:
    """The verdicts on many (problem, text[, finished]), in their order; equal answers to one problem are judged once."""
    reads = [_read(item[0], item[1], item[2] if len(item) > 2 else True, opened) for item in items]
    jobs: dict[tuple[Problem, str], Verdict] = {}
    for item, (extracted, _) in zip(items, reads, strict=True):
        if extracted is not None:
            jobs[item[0], extracted] = Verdict("error")
    useful = -(-sum(problem.verifier != "exact" for problem, _ in jobs) // JOBS_A_WORKER)
    with ThreadPoolExecutor(max(1, min(workers or os.cpu_count() or 1, useful))) as executor:
        jobs.update(zip(jobs, executor.map(lambda job: _judge(*job), jobs), strict=True))
    return [
        Verdict("unparsed", None, said)
        if extracted is None
        else replace(jobs[item[0], extracted], second=said)
        for item, (extracted, said) in zip(items, reads, strict=True)
    ]


def versions() -> dict[str, str]:
    """What decides a verdict besides the problem and the text; part of the protocol hash."""
    packages = ("math-verify", "latex2sympy2_extended", "sympy")
    return {
        "reading": READING,
        "second": second.VERSION,
        **{name: importlib.metadata.version(name) for name in packages},
        "math.seconds": str(math.SECONDS),
        "math.memory": str(math.MEMORY),
        "python": ".".join(map(str, sys.version_info[:2])),
        "sandbox": sandbox.VERSION,
        **{f"code.{name}": str(value) for name, value in code.LIMITS.items()},
    }


def opens_think(model: LanguageModel) -> bool:
    """Whether the model's chat template ends inside a think, so that responses only close it."""
    prompt = model.decode(model.encode("1"))
    return prompt.rfind(completion.OPEN) > prompt.rfind(completion.CLOSE)


@contextmanager
def graded(verdicts: Mapping[Key, Verdict]) -> Iterator[None]:
    """Inside the block `recall` looks here first; the mapping may still be filled meanwhile."""
    token = _graded.set(verdicts)
    try:
        yield
    finally:
        _graded.reset(token)


def recall(problem: Problem, texts: Sequence[str]) -> list[Verdict]:
    """Verdicts that were made already, or new ones."""
    known = _graded.get()
    keys = [(problem.source, problem.id, text) for text in texts]
    if all(key in known for key in keys):
        return [known[key] for key in keys]
    return verify_many([(problem, text) for text in texts])


def _read(
    problem: Problem, text: str, finished: bool, opened: bool
) -> tuple[str | None, Second | None]:
    """The answer that a response gives, or None; and what the second extractor says of the response."""
    tail = completion.response(text, opened=opened)
    if tail is None:
        return None, None
    return _answer(problem, tail, finished), second.judge(problem, tail)


def _answer(problem: Problem, tail: str, finished: bool) -> str | None:
    if problem.verifier == "exact":
        # All that follows the think is the answer, so a response that was cut has not given it.
        answer = tail.strip()
        return answer if finished and re.fullmatch(r"-?[0-9]+", answer) else None
    if problem.verifier == "math":
        return ", ".join(completion.boxed(tail)).strip() or None
    if problem.verifier == "code":
        return completion.program(problem, tail, finished=finished)
    raise ValueError(
        f"problem {problem.id!r}: unknown verifier {problem.verifier!r}; known: code, exact, math"
    )


def _judge(problem: Problem, extracted: str) -> Verdict:
    """Whether an answer is right."""
    if problem.verifier == "exact":
        return _exact(problem, extracted)
    if problem.verifier == "math":
        verdict = Verdict("error", extracted)
        for gold in _golds(problem):
            verdict = _ask("math", [gold, extracted], math.SECONDS, extracted)
            if verdict.correct:
                break
        return verdict
    if not problem.tests:
        return Verdict("error", extracted)
    return _run(problem, extracted)


def _run(problem: Problem, program: str) -> Verdict:
    """The verdict of a problem's tests on a program."""
    kind = sandbox.kind(problem.source)
    job, seconds = code.job(problem, program), code.patience(problem) + CODE_GRACE
    status = _status(kind, job, seconds)
    if status == "share":  # the tests hand over what cannot cross between processes
        status = _status(kind, {**job, "share": True}, seconds)
    return Verdict(status, program)


def _golds(problem: Problem) -> Iterator[str]:
    r"""The right answers: the one given, and where that is only the last of several boxes of the solution, all of them.

    Of "the solutions are \boxed{-2} and \boxed{1}" data sets keep the 1, but a response that says the same gives both.
    """
    gold = (problem.answer or "").strip()
    if gold:
        yield gold
        boxes = completion.boxed(problem.solution or "")
        if len(boxes) > 1 and boxes[-1] == gold:
            yield ", ".join(boxes)


def _exact(problem: Problem, extracted: str) -> Verdict:
    try:
        right = int(extracted) == int(problem.answer or "")
    except ValueError:  # a gold answer that is no integer, or thousands of digits
        return Verdict("error" if len(extracted) < 4000 else "wrong", extracted)
    return Verdict("ok" if right else "wrong", extracted)


def _ask(kind: str, job: object, seconds: float, extracted: str) -> Verdict:
    return Verdict(_status(kind, job, seconds), extracted)


def _status(kind: str, job: object, seconds: float) -> Any:
    """What a worker says."""
    try:
        return workers.POOLS[kind].ask(job, seconds)
    except workers.Late:
        return "timeout"
    except (EOFError, BrokenPipeError):  # the worker was killed, by its memory limit for one
        return "error"
