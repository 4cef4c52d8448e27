"""`retort verify`: lines in, lines out, in their order; and what is refused before anything is judged."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness import problems, verify

DATA = os.environ.get("RETORT_DATA")


def retort(*words: str, text: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "harness", "verify", *words],
        env={**os.environ, **environment},
        input=text,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two problem sets, with ids of their own and without."""
    rows = {
        "math500": [
            {"unique_id": f"test/x/{i}.json", "problem": f"{i} + {i}?", "answer": str(2 * i)}
            for i in range(5)
        ],
        "gsm8k": [{"question": f"{i} + 1?", "answer": f"x\n#### {i + 1}"} for i in range(5)],
    }
    for name, found in rows.items():
        (tmp_path / name).mkdir()
        text = "\n".join(map(json.dumps, found))
        (tmp_path / name / "test.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    return tmp_path


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_a_line_for_each_in_their_order(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "completions.jsonl"
    file.write_text(
        lines(
            {"id": "test/x/2.json", "completion": r"\boxed{4}"},
            {"id": "test/x/1.json", "completion": r"\boxed{3}", "model": "further keys are fine"},
            {"id": "test/x/2.json", "completion": "I do not know", "truncated": True},
            {"id": "math500/test/x/4.json", "completion": r"<think>\boxed{1}</think>\boxed{08.0}"},
            {"id": "test/x/2.json", "completion": r"\boxed{4}"},
        ),
        encoding="utf-8",
    )
    done = retort("math500", str(file), RETORT_DATA=str(data))
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        {"id": "test/x/2.json", "correct": True, "extracted": "4", "status": "ok"},
        {"id": "test/x/1.json", "correct": False, "extracted": "3", "status": "wrong"},
        {"id": "test/x/2.json", "correct": False, "extracted": None, "status": "unparsed"},
        {"id": "math500/test/x/4.json", "correct": True, "extracted": "08.0", "status": "ok"},
        {"id": "test/x/2.json", "correct": True, "extracted": "4", "status": "ok"},
    ]
    assert done.stderr.splitlines()[-1] == (
        "math500: 5 judged (60.0 % correct): correct 3, wrong 1, unparsed 1, timeout 0, error 0, truncated 1, "
        "disagreements of the second extractor 0"
    )


def test_a_think_that_the_prompts_opened(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut inside its reasoning, a response has no answer, though it names one."""
    monkeypatch.setenv("RETORT_DATA", str(data))
    text = lines(
        {"id": "test/x/2.json", "completion": r"so \boxed{4}, let me check", "truncated": True},
        {"id": "test/x/2.json", "completion": r"hm</think> \boxed{4}"},
    )
    for opened, expected in ((False, ["ok", "ok"]), (True, ["unparsed", "ok"])):
        said: list[str] = []
        given = text.encode().splitlines()
        verify.run("math500", given, "here", said.append, lambda *_: None, opened=opened)
        assert [json.loads(line)["status"] for line in "".join(said).splitlines()] == expected


def test_options_choose_the_problems(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETORT_DATA", str(data))
    assert len(verify.by_id("gsm8k")) == 10  # each under two names
    with pytest.raises(ValueError, match="gsm8k has no option release"):
        verify.by_id("gsm8k", {"release": "v6"})
    with pytest.raises(ValueError, match="livecodebench: unknown release 'v9'"):
        verify.by_id("livecodebench", {"release": "v9"})


@pytest.mark.parametrize("line", ["[" * 100_000, '{"id": ' + "9" * 5000 + ', "completion": ""}'])
def test_a_line_that_cannot_be_read_is_named(
    line: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETORT_DATA", str(data))
    with pytest.raises(ValueError, match="here, line 2: "):
        verify.read("gsm8k", [b'{"id": 1, "completion": ""}', line.encode()], "here")


def test_standard_input_and_row_numbers(data: Path) -> None:
    text = lines(
        {"id": 3, "completion": r"\boxed{4}"}, {"id": "0", "completion": r"\boxed{\frac{2}{2}}"}
    )
    done = retort("gsm8k", "-", text=text, RETORT_DATA=str(data))
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["id"], row["correct"]) for row in rows] == [(3, True), ("0", True)]
    assert done.stderr.endswith("disagreements of the second extractor 1\n")
    nothing = retort("gsm8k", "-", RETORT_DATA=str(data))
    assert (nothing.returncode, nothing.stdout) == (0, "")


def test_micro_tasks_take_the_text_after_the_think() -> None:
    first, second = problems.load("micro_math", "test", 2)
    program = problems.load("micro_code", "test", 1)[0]
    text = lines(
        {"id": first.id, "completion": f"<think>\nx\n</think>\n{first.answer}"},
        {"id": second.id.partition("/")[2], "completion": f"<think>\n{second.answer}"},
        {"id": second.id, "completion": second.answer},
        {"id": second.id, "completion": second.answer, "truncated": True},  # digits may lack
    )
    done = retort("micro_math", "-", text=text)
    statuses = [json.loads(line)["status"] for line in done.stdout.splitlines()]
    assert statuses == ["ok", "unparsed", "ok", "unparsed"]
    done = retort("micro_code", "-", text=lines({"id": program.id, "completion": program.solution}))
    assert json.loads(done.stdout)["status"] == "ok", done.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "test/x/7.json", "completion": ""}', "'test/x/7.json': did you mean 'test/x/"),
        ('{"id": 2, "completion": ""}', "no problem '2': its 5 ids: test/x/0.json to test/x/4"),
        ('{"id": "test/x/1.json"}', "no key 'completion'; the line has 'id'"),
        ('{"completion": "x"}', "no key 'id'; the line has 'completion'"),
        ('{"id": null, "completion": ""}', "'id' is a string or a whole number, got None"),
        ('{"id": true, "completion": ""}', "'id' is a string or a whole number, got True"),
        ('{"id": "test/x/1.json", "completion": 4}', "'completion' is a string, got 4"),
        (
            '{"id": "test/x/1.json", "completion": "", "truncated": 1}',
            "'truncated' is true or false, got 1",
        ),
        ("[1]", "an object with the keys id and completion, got list"),
        ("{'id': 1}", "not JSON: Expecting property name"),
        ("\udcff", "not"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_judged(
    data: Path, monkeypatch: pytest.MonkeyPatch, line: str, message: str
) -> None:
    monkeypatch.setenv("RETORT_DATA", str(data))
    good = b'{"id": "test/x/1.json", "completion": ""}\n'
    given = [good, b"\n", line.encode(errors="surrogateescape"), good]
    with pytest.raises(ValueError, match="here, line 3: ") as raised:
        verify.run("math500", given, "here", pytest.fail, lambda done, total: None)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_mistake_is_one_line_and_exit_status_2(data: Path) -> None:
    for words, text, message in (
        (["math500", "-"], '{"id": 1}\n', "standard input, line 1: no key 'completion'"),
        (["math50", "-"], "", "unknown task 'math50': did you mean 'math500'"),
        (["arc_easy", "-"], "", "for these tasks only"),
        (["math500", "absent.jsonl"], "", "absent.jsonl: No such file"),
    ):
        done = retort(*words, text=text, RETORT_DATA=str(data))
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_answers_are_written_chunk_by_chunk(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETORT_DATA", str(data))
    monkeypatch.setattr(verify, "CHUNK", 2)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    written: list[str] = []
    events: list[tuple[int, int]] = []
    given = [lines({"id": i % 5, "completion": r"\boxed{3}"}).encode() for i in range(5)]
    tally = verify.run("gsm8k", given, "here", written.append, lambda *e: events.append(e))
    assert [text.count("\n") for text in written] == [2, 2, 1]
    assert events == [(0, 5), (2, 5), (4, 5), (5, 5)]
    assert dict(tally.statuses) == {"ok": 1, "wrong": 4}


if DATA:

    @pytest.mark.parametrize(("task", "rows"), [("math", 5000), ("math500", 500), ("aime24", 30), ("aime25", 30), ("amc23", 40), ("gsm8k", 1319)])  # fmt: skip
    def test_real_data_every_row_has_the_id_that_the_data_gives_it(task: str, rows: int) -> None:
        path = Path(DATA or "", {"math": "math_test"}.get(task, task), "test.jsonl.gz")
        with gzip.open(path, "rt", encoding="utf-8") as file:
            found = [json.loads(line) for line in file]
        key = {"math": "idx", "math500": "unique_id", "gsm8k": None}.get(task, "id")
        known = verify.by_id(task)
        assert len(found) == rows
        for number, row in enumerate(found):
            problem = known[str(row[key] if key else number)]
            assert problem.prompt == row.get("problem", row.get("question"))
