"""A teacher that replays a file: public layouts, matching, and broken rows named by line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness import models
from harness.models.codec import Bytes
from harness.models.traces import TraceFile
from harness.types import LanguageModel, Problem, Request, Sampling
from tests.tiny import tiny_model

ADD, TIMES = Problem("p/1", "What is\n 1 + 2?"), Problem("p/2", "What is 3 * 4?")


def written(path: Path, *rows: Any) -> Path:
    file = path / "traces.jsonl"
    file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return file


def texts(file: Path, problem: Problem = ADD, **sampling: Any) -> list[str]:
    traces = TraceFile(file, Bytes()).generate(
        [Request(problem.prompt, problem)], Sampling(**{"n": 9, **sampling})
    )
    return [trace.text for trace in traces[0]]


def test_matches_by_id_or_by_text(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        {"problem": "p/1", "response": "by id"},
        {"problem": "What is 3   * 4?\n", "response": "by text", "extra": 1},
        "",
        {"problem": "What is 3 * 4?", "response": "again"},
        {"problem": "unknown", "response": "unused"},
    )
    replay = TraceFile(file, Bytes())
    assert isinstance(replay, LanguageModel)
    assert replay.capabilities == {"generate"}
    [adds, times, none] = replay.generate(
        [Request(p.prompt, p) for p in (ADD, TIMES, Problem("p/3", "else"))], Sampling(n=2)
    )
    assert [(t.text, t.index, t.finished) for t in times] == [
        ("by text", 0, True),
        ("again", 1, True),
    ]
    assert [t.text for t in adds] == ["by id"]  # one is all there is
    assert none == []
    assert adds[0].tokens == (*b"by id", Bytes.END)
    assert adds[0].author == replay.identity
    assert replay.coverage([ADD, TIMES, Problem("p/3", "else")]) == (2, ("p/3",), 1)
    assert texts(file, TIMES, n=1) == ["by text"]


LAYOUTS: list[tuple[dict[str, Any], list[str]]] = [
    ({"problem": ADD.prompt, "response": "3"}, ["3"]),
    (
        {
            "problem": ADD.prompt, "solution": "unread", "generations": ["a", "b"],
            "correctness_math_verify": [True, False], "is_reasoning_complete": [True, False],
        },
        ["a", "b"],
    ),
    ({"question": ADD.prompt, "solution": "3", "answer": "3"}, ["3"]),
    (
        {"question": ADD.prompt, "solution": "3", "thinking_trajectories": ["t", "u"], "attempt": "A"},
        ["<think>\nt\n</think>\n\nA", "<think>\nu\n</think>\n\nA"],
    ),
    (
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": ADD.prompt},
                {"role": "assistant", "content": "3"},
            ]
        },
        ["3"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("row", "expected"), LAYOUTS)
def test_public_layouts(row: dict[str, Any], expected: list[str], tmp_path: Path) -> None:
    assert texts(written(tmp_path, row)) == expected


def test_incomplete_reasoning_is_unfinished(tmp_path: Path) -> None:
    replay = TraceFile(written(tmp_path, LAYOUTS[1][0]), Bytes())
    [[one, other]] = replay.generate([Request("", ADD)], Sampling(n=2))
    assert (one.finished, one.tokens) == (True, (97, Bytes.END))
    assert (other.finished, other.tokens) == (False, (98,))


def test_longer_than_the_limit_is_cut(tmp_path: Path) -> None:
    replay = TraceFile(written(tmp_path, {"problem": "p/1", "response": "abcd"}), Bytes())
    [[trace]] = replay.generate([Request("", ADD)], Sampling(max_new_tokens=3))
    assert (trace.text, trace.tokens, trace.finished) == ("abc", tuple(b"abc"), False)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"not JSON .*expected one object a line"),
        ("[1]", "expected an object, found list"),
        ({"problem": "x"}, r"expected the keys problem, response; or .*; found problem"),
        ({"problem": 3, "response": "x"}, "problem must be a string, found int"),
        ({"problem": "x", "generations": "y"}, "generations must be a list of strings"),
        (
            {"problem": "x", "generations": ["y", "z"], "is_reasoning_complete": [True]},
            "is_reasoning_complete must be a list of 2",
        ),
        (
            {"messages": [{"role": "user", "content": "x"}]},
            "messages must end with a user turn and an",
        ),
        ({"messages": "x"}, r"messages must be a list of \{role, content\}"),
    ],
)
def test_broken_rows_are_named(row: Any, message: str, tmp_path: Path) -> None:
    file = written(tmp_path, {"problem": "p", "response": "r"}, "", row)
    with pytest.raises(ValueError, match=rf"traces\.jsonl:3: {message}"):
        TraceFile(file, Bytes())


def test_everything_else_is_refused(tmp_path: Path) -> None:
    replay = TraceFile(written(tmp_path, {"problem": "p/1", "response": "r"}), Bytes(), name="old")
    for call, what in [
        (lambda: replay.score([]), "scores"),
        (lambda: replay.hidden(None), "hidden states"),  # type: ignore[arg-type]
        (lambda: replay.head(None), "logits"),
    ]:
        with pytest.raises(ValueError, match=f"old only replays traces and has no {what}"):
            call()
    with pytest.raises(ValueError, match=r"cannot continue from a prefix \(problem 'p/1'\)"):
        replay.generate([Request("", ADD, prefix=(1,))], Sampling())
    with pytest.raises(ValueError, match="missing is not a file; give a JSONL file"):
        TraceFile(tmp_path / "missing", Bytes())


def test_a_suite_names_a_file_and_the_student_tokenizes(tmp_path: Path) -> None:
    student = tiny_model()
    file = written(tmp_path, {"problem": "p/1", "response": "<think>\n3"})
    teacher = models.load({"traces": str(file)}, tokenizer_of=student)
    [[trace]] = teacher.generate([Request("", ADD)], Sampling())
    assert trace.tokens == student.tokenize("<think>\n3")
    with pytest.raises(
        ValueError, match=r"can only generate; use a model with `engine: hf` as the teacher"
    ):
        models.check_pair(student, teacher)
    again = models.load({"traces": str(file)}, tokenizer_of=Bytes())
    assert again.identity != teacher.identity
