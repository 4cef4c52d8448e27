"""How completions are read, and what may happen while they are judged."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from harness import problems, verifiers
from harness.types import Problem
from harness.verifiers import (
    code,
    completion,
    math,
    sandbox,
    second,
    steps,
    verify,
    verify_many,
    workers,
)

DATA = os.environ.get("RETORT_DATA")
ROOT = Path(__file__).parents[2]


def maths(answer: str | None = "42") -> Problem:
    return Problem("m", "?", answer)


def micro(answer: str = "45") -> Problem:
    return Problem("x", "?", answer, verifier="exact", source="micro_math")


def program(tests: str = "assert f(2) == 4\n") -> Problem:
    return Problem("c", "?", tests=tests, domain="code", verifier="code")


def block(text: str) -> str:
    return f"```python\n{text}\n```"


# Reading


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("45", False, "45"),
        ("<think>\n40+5\n</think>\n45", False, "\n45"),
        ("40+5\n</think>45", True, "45"),
        ("40+5\n</think>45", False, "45"),
        ("<think>a</think>b<think>c</think>d", False, "d"),
        ("<think>a</think>b<think>c", False, None),
        ("<think>45", False, None),
        ("45", True, None),
        ("<think>45</think>", False, ""),
    ],
)
def test_only_what_follows_the_last_closed_think_counts(
    text: str, opened: bool, expected: str | None
) -> None:
    assert completion.response(text, opened=opened) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{1}, then \boxed{2}", ["2"]),
        (r"\boxed{1} and \boxed{2}", ["1", "2"]),
        (r"$\boxed{1}$, $\boxed{2}$, and $\boxed{3}$.", ["1", "2", "3"]),
        (r"$\boxed{1} \text{ and } \boxed{2}$", ["1", "2"]),
        (r"\(\boxed{1}\),\ \(\boxed{2}\)", ["1", "2"]),
        (r"\boxed{1} \boxed{2}", ["2"]),
        (r"\boxed{1} or \boxed{2}", ["2"]),
        (r"\boxed{0} so \boxed{1} and \boxed{2}", ["1", "2"]),
        (r"\boxed{\frac{1}{2}}", [r"\frac{1}{2}"]),
        (r"\boxed{\{1, 2\}}", [r"\{1, 2\}"]),
        (r"\boxed{\{ x}", [r"\{ x"]),
        (r"\boxed{\boxed{5}}", ["5"]),
        (r"\boxed {7}", ["7"]),
        (r"\boxed{3}. No: \boxed{\frac{1}{2}", []),
        ("42", []),
    ],
)
def test_the_last_box_and_those_joined_to_it(text: str, expected: list[str]) -> None:
    assert completion.boxed(text) == expected


def test_the_last_closed_block_counts() -> None:
    assert completion.fenced(f"First\n{block('a = 1')}\nthen\n{block('b = 2')}\nend") == "b = 2\n"
    assert completion.fenced("```python\na = 1\n") is None
    assert completion.fenced(block("a = 1") + "\n```python\nb") == "a = 1\n"
    assert completion.fenced(block("a = 1") + "\n```python\nb", finished=False) is None
    assert (
        completion.fenced("1. like so\n   ```python\n   if a:\n       b\n   ```")
        == "if a:\n    b\n"
    )
    assert completion.fenced("````\n```\n````") == "```\n"
    assert completion.fenced("a = 1") is None


@pytest.mark.parametrize(
    ("text", "status", "extracted"),
    [
        ("<think>\n40+5\n45\n</think>\n45", "ok", "45"),
        ("45", "ok", "45"),
        ("<think>x</think>\n44", "wrong", "44"),
        ("<think>x</think>\n45 or 46", "unparsed", None),
        ("<think>\n45\n</think>\n", "unparsed", None),
        ("<think>\n45", "unparsed", None),
        ("\\boxed{45}", "unparsed", None),
        ("٤٥", "unparsed", None),
        ("9" * 5000, "wrong", "9" * 5000),
    ],
)
def test_micro_answers(text: str, status: str, extracted: str | None) -> None:
    verdict = verify(micro(), text)
    assert (verdict.status, verdict.extracted) == (status, extracted)


def test_a_cut_micro_answer_is_none() -> None:
    assert verify(micro("4"), "<think>x</think>\n4", finished=False).status == "unparsed"
    assert verify(micro("4"), "<think>x</think>\n4").correct


def test_an_unknown_verifier_is_refused() -> None:
    with pytest.raises(ValueError, match="known: code, exact, math"):
        verify(Problem("p", "?", "1", verifier="judge"), "1")


# Mathematics


@pytest.mark.parametrize(
    ("gold", "text", "status"),
    [
        ("42", r"\boxed{42}", "ok"),
        ("42", r"\boxed{41}, no, \boxed{42.0}", "ok"),
        ("42", r"\boxed{42}, no, \boxed{41}", "wrong"),
        ("42", r"The answer is 42.", "unparsed"),
        ("42", r"\boxed{}", "unparsed"),
        ("42", r"<think>\boxed{42}</think> I do not know", "unparsed"),
        ("42", r"<think>\boxed{42}", "unparsed"),
        ("1, 2", r"$\boxed{2}$ and $\boxed{1}$", "ok"),
        ("1, 2", r"\boxed{2}", "wrong"),
        (r"\frac{1}{2}", r"\boxed{0.5}", "ok"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(3, \pi/2)}", "ok"),
        ("1000", r"\boxed{1,000}", "ok"),
        ("18", r"\boxed{\$18}", "ok"),
        ("", r"\boxed{1}", "error"),
        (None, r"\boxed{1}", "error"),
        ("$", r"\boxed{1}", "error"),
    ],
)
def test_mathematics(gold: str | None, text: str, status: str) -> None:
    assert verify(maths(gold), text).status == status


def test_mathematics_outside_the_main_thread() -> None:
    found = []
    thread = threading.Thread(target=lambda: found.append(verify(maths(), r"\boxed{42}")))
    thread.start()
    thread.join()
    assert found[0].correct


def test_a_hanging_expression_is_killed_and_others_are_unaffected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[workers.Worker] = []

    def start() -> workers.Worker:
        started.append(workers._math())
        return started[-1]

    pool = workers.Pool(start)
    monkeypatch.setitem(workers.POOLS, "math", pool)
    monkeypatch.setattr(math, "SECONDS", 1.0)
    items = [
        (maths(), r"\boxed{42}"),  # the worker has started, so what follows has no time to import
        (maths(), r"\boxed{9^{9^{9^{9}}}}"),
        (maths(), r"\boxed{6 \cdot 7}"),
    ]
    begin = time.monotonic()
    assert [verdict.status for verdict in verify_many(items, workers=1)] == ["ok", "timeout", "ok"]
    assert time.monotonic() - begin < 30
    late, fresh = (worker.process.poll() for worker in started)
    assert late == -signal.SIGKILL and fresh is None
    pool.close()
    assert started[1].process.poll() is not None


@pytest.mark.parametrize(
    ("gold", "answer", "status"),
    [
        (r"\frac{1}{2004!}", r"\frac{2}{2004!}", "wrong"),
        (r"\frac{1}{2004!}", r"1/2004!", "ok"),
        ("0", "10^{-9}", "wrong"),
        ("10^{-10}", "2 \\cdot 10^{-10}", "wrong"),
        ("10^{-10}", "0.0000000001", "ok"),
        (r"\frac{1}{3}", "0.333333", "ok"),
        (r"\frac{1}{3000}", "0.000333", "ok"),
        ("9", r"9\%", "ok"),
        (r"0.01\%", "0.0001", "ok"),
        (r"\infty", r"\infty", "ok"),
        ("i", "i", "ok"),
        ("0", r"\sin \pi", "ok"),
    ],
)
def test_small_numbers_are_told_apart(gold: str, answer: str, status: str) -> None:
    assert verify(maths(gold), rf"\boxed{{{answer}}}").status == status


def test_where_the_solution_has_several_boxes_they_are_the_answer_too() -> None:
    solution = r"The solutions are $\boxed{-2}$ and $\boxed{1}$."
    problem = Problem("m", "?", "1", solution=solution)
    for text, status in {
        solution: "ok",
        r"\boxed{1, -2}": "ok",
        r"\boxed{1}": "ok",  # what the data set says
        r"\boxed{-2}": "wrong",
        r"\boxed{2} and \boxed{1}": "wrong",
    }.items():
        assert verify(problem, text).status == status, text
    other = Problem("m", "?", "7", solution=solution)  # the boxes are not its answer
    assert verify(other, solution).status == "wrong"
    assert (
        verify(maths("1"), r"\boxed{2} and \boxed{1}").status == "wrong"
    )  # no solution, no second chance


BOMBS = {
    "9**9**9": "9**9**9",
    "a tower of powers": "9^{9^{9^{9}}}",
    "a large power": "10^{10^{10}}",
    "a factorial": "100000000!",
    "factorials": "9!!!!!!!",
    "a binomial": r"\binom{10^{9}}{10^{8}}",
    "a sum": r"\sum_{k=1}^{10^9} \frac{1}{k}",
    "digits": "7" * 100_000,
    "braces": "{" * 30_000 + "1" + "}" * 30_000,
    "brackets": "(" * 2_000 + "1" + ")" * 2_000,
    "fractions": r"\frac{1}{" * 400 + "2" + "}" * 400,
    "roots": r"\sqrt{" * 400 + "2" + "}" * 400,
    "a polynomial": "(x+1)^{5000}",
    "an exponent": "1e999999999",
    "a set": r"\{" + ",".join(map(str, range(5_000))) + r"\}",
    "blanks": "1" + " " * 100_000 + "2",
    "no text": "\x00\ud800",
}


def test_bombs_are_contained(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[workers.Worker] = []

    def start() -> workers.Worker:
        started.append(workers._math())
        return started[-1]

    pool = workers.Pool(start)
    monkeypatch.setitem(workers.POOLS, "math", pool)
    monkeypatch.setattr(math, "SECONDS", 0.5)
    problem = maths("42")
    begin = time.monotonic()
    found = verify_many([(problem, rf"\boxed{{{bomb}}}") for bomb in BOMBS.values()])
    assert (
        time.monotonic() - begin < 90
    )  # each half a second at most, and a worker's start after it
    statuses = dict(zip(BOMBS, (verdict.status for verdict in found), strict=True))
    assert set(statuses.values()) <= {"wrong", "timeout", "error"}
    # one that follows another has a new worker, whose imports are not its time
    assert statuses["a tower of powers"] == statuses["a large power"] == "timeout"
    assert verify(problem, r"\boxed{42}").correct
    pool.close()
    assert all(worker.process.poll() is not None for worker in started)
    assert time.monotonic() - begin < 100


def test_blanks_around_a_joint_cost_nothing() -> None:
    begin = time.monotonic()
    assert completion.boxed(rf"\boxed{{1}},{' ' * 100_000}x \boxed{{2}}") == ["2"]
    assert completion.boxed(rf"\boxed{{1}},{' ' * 100_000}\boxed{{2}}") == ["1", "2"]
    assert time.monotonic() - begin < 2


# The second extractor


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("073", "73"),
        ("00", "0"),
        ("7.50", "7.5"),
        ("7.0", "7"),
        (".5", "0.5"),
        ("-0.50", "-0.5"),
        ("1.2.30", "1.2.30"),
        ("1,000", "1000"),
        ("1{,}000,000", "1000000"),
        (r"10,\!000", "10000"),
        ("1,2", "1,2"),
        (r"\dfrac12", "1/2"),
        (r"\frac{1}{2}", "1/2"),
        (r"\frac1{2}", "1/2"),
        (r"\frac{x+1}{2}", "(x+1)/2"),
        (r"\tfrac{\frac{1}{2}}{03}", "(1/2)/3"),
        (r"\frac{\pi}{2}", r"\pi/2"),
        (r"50\%", "50"),
        (r"90^\circ", "90"),
        (r"90^{\circ}", "90"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)"),
        (r"\leftarrow", r"\leftarrow"),
        (r"7\text{ cm}^2", "7"),
        (r"5 \mbox{ inches}", "5"),
        ("12 cm", "12"),
        ("12m", "12m"),
        (r"\text{(A)}", "(A)"),
        (r"x^2+05", "x^2+5"),
        ("x_{10}", "x_{10}"),
        (r"\$18.90", "18.9"),
        ("", ""),
    ],
)
def test_normalised_strings(answer: str, expected: str) -> None:
    assert second.normalise(answer) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{1} \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1\}}", r"\{1\}"),
        (r"\boxed{\}", None),
        (r"\boxed{1}, \boxed{2", None),
        (r"\fbox{3}", "3"),
        ("3", None),
    ],
)
def test_the_second_extractor_matches_braces_by_itself(text: str, expected: str | None) -> None:
    assert second.last_box(text) == expected


@pytest.mark.parametrize(
    ("gold", "text", "status", "said", "disputed"),
    [
        ("0.5", r"\boxed{\frac{1}{2}}", "ok", "wrong", True),
        ("1, 2", r"\boxed{1} and \boxed{2}", "ok", "wrong", True),
        ("3", r"\boxed{2} and \boxed{3}", "wrong", "ok", True),
        ("3", r"\fbox{3}", "unparsed", "ok", True),
        ("73", r"\boxed{073}", "ok", "ok", False),
        ("73", r"\boxed{74}", "wrong", "wrong", False),
        ("73", "73", "unparsed", None, False),
        ("73", r"<think>\boxed{73}", "unparsed", None, False),
        ("73", r"<think>\boxed{73}</think> \boxed{1}", "wrong", "wrong", False),
    ],
)
def test_the_second_extractor_is_only_reported(
    gold: str, text: str, status: str, said: str | None, disputed: bool
) -> None:
    verdict = verify(maths(gold), text)
    assert (verdict.status, verdict.second, verdict.disputed) == (status, said, disputed)
    assert verify_many([(maths(gold), text)]) == [verdict]


def test_the_second_extractor_reads_mathematics_only() -> None:
    assert verify(micro(), "45").second is None
    assert verify(program(), block("def f(x): return 4")).second is None
    assert verify(maths(None), r"\boxed{1}").second is None


def test_a_hanging_worker_does_not_outlive_its_caller() -> None:
    command = "from harness.verifiers import math; math.ALARM = 1; math.serve()"
    worker = subprocess.Popen(
        [sys.executable, "-c", command], cwd=ROOT, stdin=subprocess.PIPE, text=True
    )
    assert worker.stdin is not None
    worker.stdin.write(json.dumps(["5", "9^{9^{9^{9}}}"]) + "\n")
    worker.stdin.close()
    assert worker.wait(60) == -signal.SIGALRM


def test_a_worker_that_dies_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", "import sys; sys.stdin.readline()"]
    monkeypatch.setitem(workers.POOLS, "math", workers.Pool(lambda: workers.Worker(command, {})))
    assert verify(maths(), r"\boxed{42}").status == "error"


# Programs


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("def f(x):\n    return 2 * x", "ok"),
        ("def f(x):\n    return 3 * x", "wrong"),
        ("def f(x)\n    return 2 * x", "wrong"),
        ("print('ok')\nprint('passed')", "wrong"),
        ("import sys\nsys.exit(0)", "wrong"),
        ("import os\nos._exit(0)", "wrong"),
        ("def f(x):\n    raise SystemExit(0)", "wrong"),
        ("import os\nif os.fork():\n    os._exit(0)\ndef f(x): return 4", "wrong"),
        ("def f(x): return bytearray(1 << 34)", "wrong"),
        ("open('big', 'wb').write(bytes(1 << 26))\ndef f(x): return 4", "wrong"),
        ("import os\nwhile True: os.fork()", "wrong"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "wrong"),
        ("import numpy\ndef f(x): return 4", "wrong"),  # no site-packages
        ("input()\ndef f(x): return 4", "wrong"),
        ("print('x' * 10_000_000)\ndef f(x): return 4", "ok"),
        ("open('own', 'w').write('1')\ndef f(x): return 4", "ok"),
        ("import threading\nt = threading.Thread(target=int)\nt.start()\nt.join()\ndef f(x): return 4", "ok"),
        ("import os\nassert not os.environ\ndef f(x): return 4", "ok"),
        ("from dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int'\ndef f(x): return 4", "ok"),
        ("if __name__ == '__main__':\n    raise SystemExit\ndef f(x): return 4", "ok"),
    ],
)  # fmt: skip
def test_programs(text: str, status: str) -> None:
    assert verify(program(), block(text)).status == status


def test_a_program_cannot_find_the_nonce_in_memory() -> None:
    spy = (
        "import gc, sys\n"
        "frame, seen = sys._getframe(), []\n"
        "while frame:\n"
        "    seen += [v for v in frame.f_locals.values() if isinstance(v, bytes)]\n"
        "    frame = frame.f_back\n"
        "def f(x): return 4\n"
        "assert not [v for v in seen if len(v) == 16]"
    )
    assert verify(program(), block(spy)).correct


def test_an_endless_program_is_ended_with_all_it_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(code.LIMITS, "seconds", 1.0)
    start = time.monotonic()
    assert verify(program(), block("while True: pass")).status == "timeout"
    escape = (
        "import os, time\n"
        "for _ in range(4):\n"
        "    if os.fork() == 0:\n"
        "        os.setsid()\n"
        "        time.sleep(1000)\n"
        "def f(x): return 4"
    )
    assert verify(program(), block(escape)).correct  # it passed, and nothing of it is left
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    assert verify(program(), block(bomb)).status == "timeout"
    assert time.monotonic() - start < 20


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give programs a user of their own")
def test_a_program_of_root_loses_its_rights(tmp_path: Path) -> None:
    text = f"import os\nassert os.getuid() != 0\ndef f(x):\n    open({str(tmp_path / 'x')!r}, 'w')"
    assert verify(program("f(1)"), block(text)).status == "wrong"
    assert not (tmp_path / "x").exists()


def test_verdicts_do_not_depend_on_the_run() -> None:
    once = verify(program("assert 0"), block("x = 1"))
    seen = "import random\norder = list({'a', 'b', 'c', 'd', 'e', 'f'})\ndraw = random.random()"
    tests = "assert False, 1"
    assert once.status == "wrong" and verify(program(tests), block(seen)).status == "wrong"
    worker = workers.POOLS[sandbox.kind()].start()
    other = workers.POOLS[sandbox.kind()].start()
    try:
        for digit in "0123456789abcdef":  # a bit of what the program sees decides, the same in both
            guess = f"import hashlib\nh = hashlib.sha256(repr((order, draw)).encode()).hexdigest()\nassert h[0] == {digit!r}"
            job = code.job(program(guess), seen)
            assert worker.ask(job, 10) == other.ask(job, 10)
    finally:
        worker.end()
        other.end()


def test_problems_without_tests_are_errors() -> None:
    assert verify(Problem("c", "?", verifier="code"), block("x = 1")).status == "error"


def test_many_programs_are_fast() -> None:
    items = [
        (Problem(str(i), "?", tests=f"assert f({i}) == {2 * i}", verifier="code"), block("def f(x): return 2 * x"))
        for i in range(300)
    ]  # fmt: skip
    start = time.process_time(), time.monotonic()
    found = verify_many(items, workers=1)
    assert all(verdict.correct for verdict in found)
    assert time.monotonic() - start[1] < 15  # 1 s on a free core


# Many at once


def test_many_keep_their_order_and_equal_answers_are_judged_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    judge = verifiers._judge
    monkeypatch.setattr(verifiers, "_judge", lambda *job: asked.append(job) or judge(*job))
    items = [(maths(str(i % 5)), rf"\boxed{{{i % 7}}}") for i in range(70)] + [(maths(), "none")]
    found = verify_many(items, workers=2)
    assert [v.correct for v in found] == [i % 5 == i % 7 for i in range(70)] + [False]
    assert found[-1].status == "unparsed"
    assert len(asked) == 35


def test_items_may_say_that_they_were_cut() -> None:
    text = "<think>x</think>45"
    assert [v.status for v in verify_many([(micro(), text, True), (micro(), text, False)])] == [
        "ok",
        "unparsed",
    ]


def test_nothing_to_judge() -> None:
    assert verify_many([]) == []


def test_recall_uses_what_was_judged() -> None:
    problem = micro()
    other = verifiers.Verdict("wrong", "7")
    with verifiers.graded({(problem.source, problem.id, "45"): other}):
        assert verifiers.recall(problem, ["45"]) == [other]
        assert verifiers.recall(problem, ["45", "46"])[0].correct  # one is new: all are judged
    assert verifiers.recall(problem, ["45"])[0].correct


def test_versions_name_the_judges() -> None:
    found = verifiers.versions()
    assert found["math-verify"] and found["reading"] and found["code.seconds"]


def test_a_template_that_opens_a_think() -> None:
    class Model:
        def __init__(self, opening: str) -> None:
            self.opening = opening

        def encode(self, prompt: str) -> tuple[int, ...]:
            return tuple(f"user {prompt} assistant {self.opening}".encode())

        def decode(self, ids: tuple[int, ...]) -> str:
            return bytes(ids).decode()

    assert verifiers.opens_think(Model("<think>\n"))
    assert not verifiers.opens_think(Model(""))
    assert not verifiers.opens_think(Model("<think>\n\n</think>\n"))


def test_reading_needs_no_heavy_library() -> None:
    heavy = "{'torch', 'math_verify', 'sympy', 'datasets', 'lm_eval'}"
    source = (
        f"import sys, harness.problems, harness.verifiers; assert not {heavy} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", source], cwd=ROOT, check=True)


# Steps


@pytest.mark.parametrize("separator", ["line", "blank", "statement", "block", "sentence"])
@pytest.mark.parametrize(
    "text", ["", "a", "a\nb", "\n\na\n\n\nb\nc\n \n\nd\n", "\n", "a\r\nb\n\nc"]
)
def test_steps_join_to_the_text(text: str, separator: str) -> None:
    assert "".join(steps.split(text, separator)) == text


def test_steps() -> None:
    text = "\na\nb\n\n\nc\n"
    assert steps.split(text) == ["\na\n", "b\n\n\n", "c\n"]
    assert steps.split(text, "blank") == ["\na\nb\n\n\n", "c\n"]


# Real data


if DATA:

    def assert_all(right: bool, items: list[tuple[Problem, str]]) -> None:
        """No exceptions."""
        verdicts = zip(items, verify_many(items), strict=True)
        assert [(item, v) for item, v in verdicts if v.correct != right] == [] and items

    @pytest.mark.parametrize("name", ["aime24", "aime25", "amc23", "gsm8k", "math500", pytest.param("math", marks=pytest.mark.slow)])  # fmt: skip
    def test_real_data_right_answers_are_right_and_changed_ones_wrong(name: str) -> None:
        found = problems.load(name, "test")
        solved = name in ("math", "math500")  # where the solution boxes the answer
        right = [(p, p.solution if solved else f"So $\\boxed{{{p.answer}}}$.") for p in found]
        assert_all(True, [(p, text or "") for p, text in right])
        boxed = [(p, f"So $\\boxed{{{text}}}$.") for p in found for text in changed(p.answer or "")]
        assert len(boxed) > len(found)
        assert_all(False, boxed)
        assert_all(False, [(p, before_the_end(text or "")) for p, text in right])

    @pytest.mark.parametrize("name", ["aime24", "aime25"])
    def test_real_data_aime_answers_with_leading_zeros(name: str) -> None:
        found = problems.load(name, "test")
        assert_all(True, [(p, rf"\boxed{{{p.answer:0>3}}}") for p in found])
        assert {second.judge(p, rf"\boxed{{{p.answer:0>3}}}") for p in found} == {"ok"}


def changed(answer: str) -> list[str]:
    """The answer with its first integer one larger, and negated if it is a number."""
    wrong = [re.sub("[0-9]+", lambda n: str(int(n[0]) + 1), answer, count=1)]
    plain = answer.replace("\\!", "").replace(",", "")
    is_list = re.search(r",(?![0-9]{3}\b)", answer.replace("\\!", ""))  # "0,1" are two
    if re.fullmatch(r"-?[0-9]*\.?[0-9]+", plain) and float(plain) and not is_list:
        wrong.append(answer[1:] if answer.startswith("-") else f"-{answer}")
    return [text for text in wrong if text != answer]


def before_the_end(text: str) -> str:
    r"""The text up to where its last \boxed{} closes."""
    (*_, last) = completion.boxed(text)
    start = text.index(last, text.rindex("\\boxed"))
    return text[: start + len(last)]


def test_changed_answers() -> None:
    assert changed("-3") == ["-4", "3"] and changed("1,000") == ["2,000", "-1,000"]
    assert changed("0,1") == ["1,1"] and changed("0") == ["1"] and changed(r"\text{east}") == []
    assert (
        before_the_end(r"$\boxed{5}$ or $\boxed{\frac{1}{5}}$")
        == r"$\boxed{5}$ or $\boxed{\frac{1}{5}"
    )


def cut(pieces: list[str], **how: Any) -> list[str]:
    return ["".join(pieces[i] for i in step) for step in steps.token_steps(pieces, **how)]


def test_steps_of_tokens() -> None:
    pieces = ["<think>", "\n", "a", "+b", "\n", "c", "\n", "</think>", "\n", "7", ""]
    assert cut(pieces) == ["\na+b\n", "c\n"]
    assert [*map(list, steps.token_steps(pieces))] == [[1, 2, 3, 4], [5, 6]]
    assert cut(pieces, shortest=3) == ["\na+b\nc\n"]  # the last joins the one before
    assert cut(["a\n", "b", "c\n", "d\n", "e\n"], shortest=2) == ["a\nbc\n", "d\ne\n"]
    blank = ["<", "think", ">", "a", ".\n\n", "b\n", "c\n\nd", "e", "\n\n", "f", "</", "think>"]
    # a token that straddles a boundary belongs to the earlier step
    assert cut(blank, separator="blank") == ["a.\n\n", "b\nc\n\nd", "e\n\n", "f"]
    assert cut(["a\n", "b", ""]) == ["a\n", "b"]  # no think: all of it, without the end token
    assert cut(["a\n", "b\n", "</think>", "7"]) == ["a\n", "b\n"]  # opened by the template
    assert cut(["<think>", "\na"]) == ["\na"] and cut([]) == cut(["<think>", "</think>"]) == []
    assert cut(["<think>", "\n\n", "</think>", "\na\n", "b"]) == ["\na\n", "b"]  # a blank think
