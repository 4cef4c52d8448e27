"""HumanEval, MBPP and LiveCodeBench: rows as problems, programs out of responses, prompts for base models."""

from __future__ import annotations

import base64
import json
import os
import pickle
import zlib
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from harness import coding, evaluation, fewshot, problems
from harness.evaluation import Setting, evaluate
from harness.models.scripted import Scripted
from harness.types import Ids, Problem, Request
from harness.verifiers import completion, verify
from tests.harness.test_evaluation import Counting
from tests.harness.test_problems import write

DATA = os.environ.get("RETORT_DATA")

PROMPT = '''from math import sqrt


def half(x):
    return x / 2


def root(x):
    """The root of half of x.
    >>> root(8)
    2.0
    """
'''
BODY = "    return sqrt(half(x))\n"
HUMANEVAL = {
    "task_id": "HumanEval/7",
    "prompt": PROMPT,
    "entry_point": "root",
    "canonical_solution": BODY,
    "test": "def check(candidate):\n    assert candidate(8) == half(4)\n",
}


def mbpp(number: int, split: str) -> dict[str, Any]:
    return {
        "task_id": number,
        "text": f"Write a function to add {number}.",
        "code": f"def add(x):\r\n    return x + {number}",
        "test_setup_code": "",
        "test_list": [f"assert add({i}) == {i + number}" for i in range(3)],
        "challenge_test_list": [],
        "split": split,
    }


def lcb(key: str, day: str, **fields: Any) -> dict[str, Any]:
    return {
        "question_id": key,
        "question_content": f"Do {key}.\n",
        "contest_date": f"{day}T00:00:00",
        "difficulty": "easy",
        "starter_code": "",
        "public_test_cases": json.dumps([{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]),
        "metadata": "{}",
        **fields,
    }


STARTER = "class Solution:\n    def add(self, a: int, bs: List[int]) -> int:\n        "
FUNCTIONAL = {
    "starter_code": STARTER,
    "difficulty": "hard",
    "public_test_cases": json.dumps(
        [{"input": "1\n[2, 3]", "output": "6", "testtype": "functional"}]
    ),
    "metadata": json.dumps({"func_name": "add"}),
}
HIDDEN = [{"input": "5\n[]", "output": "5", "testtype": "functional"}]


def packed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data)).decode()


def official(tests: Any) -> str:
    return packed(pickle.dumps(json.dumps(tests)))


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write(tmp_path / "humaneval/test.jsonl.gz", [HUMANEVAL])
    splits = ["prompt"] * 5 + ["test"] * 4 + ["validation"] * 2 + ["train"] * 3
    write(tmp_path / "mbpp/mbpp.jsonl.gz", [mbpp(i, s) for i, s in enumerate(splits, 1)])
    public = [
        lcb("a_A", "2023-05-07"),
        lcb("b", "2023-09-17", **FUNCTIONAL),
        lcb("c", "2024-03-02"),
    ]
    write(tmp_path / "livecodebench/v1_public_tests.jsonl.gz", public)
    hidden = {
        **public[1],
        "private_test_cases": official(HIDDEN),
        "reference_solution": f"{STARTER}return a + sum(bs)",
    }
    write(tmp_path / "livecodebench/v1_leetcode_substitute_hidden_tests.jsonl.gz", [hidden])
    train = [
        {"question": f"Q{i}", "answer": f"He has <<{i}+1={i + 1}>>{i + 1}.\n#### {i + 1}"}
        for i in range(20)
    ]
    write(tmp_path / "gsm8k/train.jsonl.gz", train)
    write(tmp_path / "gsm8k/test.jsonl.gz", [{"question": "T", "answer": "#### 5"}])
    monkeypatch.setenv("RETORT_DATA", str(tmp_path))
    return tmp_path  # fmt: skip


# Sets


def test_humaneval(data: Path) -> None:
    (problem,) = problems.load("humaneval", "test")
    assert (problem.id, problem.entry, problem.prompt) == ("humaneval/HumanEval/7", "root", PROMPT)
    assert (problem.domain, problem.verifier) == ("code", "code")
    # The tests call the prompt's helper, so they bring it along.
    assert problem.tests == PROMPT[: PROMPT.index("def root")] + HUMANEVAL["test"] + "\ncheck(root)"
    turn = problems.render(problem)
    assert turn.startswith(f"Complete this function:\n\n```python\n{PROMPT}\n```\n\n")
    assert turn.endswith("the complete program in one ```python block.")
    assert verify(problem, problem.solution or "").status == "ok"


def test_mbpp(data: Path) -> None:
    found = {split: problems.load("mbpp", split) for split in ("train", "dev", "test")}  # type: ignore[arg-type]
    assert {split: [p.id for p in mine] for split, mine in found.items()} == {
        "train": ["mbpp/12", "mbpp/13", "mbpp/14"],
        "dev": ["mbpp/10", "mbpp/11"],
        "test": ["mbpp/6", "mbpp/7", "mbpp/8", "mbpp/9"],
    }
    assert [p.id for p in problems.every("mbpp")] == [f"mbpp/{i}" for i in range(1, 15)]
    first = found["test"][0]
    asserts = "assert add(0) == 6\nassert add(1) == 7\nassert add(2) == 8"
    assert first.tests == asserts and first.entry == "add"
    assert first.prompt == (
        f"Write a function to add 6.\n\nThe program must pass these tests:\n\n```python\n{asserts}\n```"
    )
    assert verify(first, first.solution or "").status == "ok"
    assert verify(first, (first.solution or "").replace("+ 6", "+ 5")).status == "wrong"


@pytest.mark.parametrize(
    ("setup", "tests", "entry"),
    [
        ("", ["assert f(1) == 2", "assert len(f(2)) == len([])"], "f"),
        ("import math", ["assert math.isclose(f(1), 2)"], "f"),
        ("from math import floor", ["assert floor(f(1)) == 2"], "f"),
        ("root = Node(1)\ndef g(): ...", ["assert f(g()) == root"], "f"),
        ("", ["assert sum(10, 15) == 6"], "sum"),  # nothing else is called, so it is this one
        ("", ["assert f(Pair(1, 2)) == 1"], None),
        ("", ["assert f(g(1)) == 1", "assert f(2) == 1"], "f"),
        ("", ["assert True"], None),
        ("", [], None),
    ],
)
def test_the_function_that_asserts_call(setup: str, tests: list[str], entry: str | None) -> None:
    assert coding.tested(setup, tests) == entry


def test_livecodebench(data: Path) -> None:
    stdin, functional, _ = problems.load("livecodebench", "test")
    assert [stdin.id, stdin.level, functional.level] == ["livecodebench/a_A", 1, 3]
    assert json.loads(stdin.tests or "") == {"kind": "stdin", "cases": [["1 2\n", "3\n"]]}
    assert json.loads(functional.tests or "") == {
        "kind": "functional",
        "entry": "add",
        "class": "Solution",
        "cases": [[[1, [2, 3]], 6], [[5, []], 5]],
    }
    assert "standard input" in stdin.prompt and STARTER.rstrip() in functional.prompt
    assert functional.solution == f"```python\n{STARTER}return a + sum(bs)\n```"
    assert stdin.entry is functional.entry is stdin.solution is None
    assert problems.every("livecodebench") == problems.load("livecodebench", "test")
    (data / problems.LiveCodeBench.PRIVATE).unlink()
    problems._kept.clear()
    assert len(json.loads(problems.load("livecodebench", "test")[1].tests or "")["cases"]) == 1


def test_livecodebench_by_date_and_level(data: Path) -> None:
    def ids(**options: Any) -> list[str]:
        return [p.id[-1] for p in problems.load("livecodebench", "test", **options)]

    assert ids(release="v1", start="2023-05-08") == ["b", "c"]
    assert ids(start="2023-09-17", end=date(2023, 9, 17)) == ["b"]  # as YAML reads a date
    assert ids(end="2024-03-02", levels=[1]) == ["A", "c"] and ids(n=1, levels=[3]) == ["b"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"release": "v7"}, r"unknown release 'v7': did you mean 'v6'\? known: v1, v2"),
        ({"release": 1}, "unknown release 1: .*known: v1"),
        ({"release": "v2"}, "RETORT_DATA holds release v1 only, and v2 was asked for"),
        ({"start": "spring"}, "start: a date such as 2023-09-01, got 'spring'"),
        ({"end": "2024-13-01"}, "end: a date such as 2023-09-01, got '2024-13-01'"),
        ({"start": "2024-04-01"}, "no contest from 2024-04-01 to the last; release v1 has those from 2023-05-07 to 2024-03-02"),
        ({"start": "2024-01-01", "end": "2023-06-01"}, "no contest from 2024-01-01 to 2023-06-01"),
        ({"levels": [2]}, r"no problem of levels \[2\]; known: 1 \(easy\)"),
        ({"from": "2024-01-01"}, "no option from; it knows n, levels, release, start and end"),
    ],
)  # fmt: skip
def test_livecodebench_options_are_checked_before_anything_runs(
    data: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"livecodebench.*{message}"):
        problems.load("livecodebench", "test", **options)
    model = Counting(lambda request, i: "")
    if "levels" not in options:
        with pytest.raises(ValueError, match=message):
            evaluate(model, {"livecodebench": {"options": options}})
    assert not model.asked


def test_the_hub_is_read_by_data_file(
    data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    asked = []

    def download(repository: str, name: str, *, repo_type: str) -> str:
        asked.append((repository, name, repo_type))
        row = lcb(name, "2024-05-05", private_test_cases=official([{"input": "", "output": name}]))
        return str(write(tmp_path / "hub" / name, [row]))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.delenv("RETORT_DATA")
    found = problems.load("livecodebench", "test", release="v3")
    names = ["test.jsonl", "test2.jsonl", "test3.jsonl"]
    assert asked == [("livecodebench/code_generation_lite", name, "dataset") for name in names]
    assert [json.loads(p.tests or "")["cases"][1] for p in found] == [["", name] for name in names]

    def offline(*_: Any, **__: Any) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(
        ValueError,
        match=r"code_generation_lite/test\.jsonl cannot be .*: no route .*RETORT_DATA=DIR",
    ):
        problems.load("livecodebench", "test", release="v2")  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"contest_date": "soon", "difficulty": None, "starter_code": STARTER},
            "gz:1: no field 'func_name'",
        ),
        ({"metadata": "{}", "starter_code": STARTER}, r"gz:1: no field 'func_name'"),
        ({"public_test_cases": "{}"}, r"gz:1: tests are a list, got dict"),
        ({"public_test_cases": "[1"}, r"gz:1: Expecting"),
        ({**FUNCTIONAL, "public_test_cases": [{"input": "[1", "output": "1"}]}, "gz:1: Expecting"),
    ],
)
def test_a_broken_row_is_named(data: Path, fields: dict[str, Any], message: str) -> None:
    write(data / "livecodebench/v1_public_tests.jsonl.gz", [lcb("x", "2024-01-01", **fields)])
    with pytest.raises(ValueError, match=message):
        problems.load("livecodebench", "test")


@pytest.mark.parametrize("field", ["contest_date", "question_content", "public_test_cases"])
def test_a_missing_field_is_named(data: Path, field: str) -> None:
    row = {key: value for key, value in lcb("x", "2024-01-01").items() if key != field}
    write(data / "livecodebench/v1_public_tests.jsonl.gz", [row])
    with pytest.raises(
        ValueError,
        match=rf"v1_public_tests\.jsonl\.gz:1: no field '{field}'; the row has question_id",
    ):
        problems.load("livecodebench", "test")


# Private tests


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_private_tests_in_either_encoding() -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        text = packed(pickle.dumps(json.dumps(HIDDEN), protocol))
        assert coding.private_tests(text) == HIDDEN
    assert coding.private_tests(json.dumps(HIDDEN)) == HIDDEN
    long = [{"input": "1 " * 100_000, "output": "é"}]
    assert coding.private_tests(official(long)) == long


def test_a_pickle_that_would_run_something_does_not(tmp_path: Path) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        data = pickle.dumps(Evil(tmp_path / "ran"), protocol)
        with pytest.raises(
            ValueError,
            match=r"no plain string \((GLOBAL|STACK_GLOBAL|SHORT_BINUNICODE|BINUNICODE)\)",
        ):
            coding.private_tests(packed(data))  # fmt: skip
        assert not (tmp_path / "ran").exists()
        pickle.loads(data)  # it was a live one
        (tmp_path / "ran").rmdir()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (packed(pickle.dumps([1])), "no plain string"),
        (packed(pickle.dumps({"a": "b"})), "no plain string"),
        (packed(pickle.dumps(b"[]")), "no plain string"),
        (packed(pickle.dumps("[]")[:-1]), "exhausted before seeing STOP"),
        (packed(b"\x80\x04."), "the pickle is empty"),
        (packed(b"garbage"), "no newline"),
        (packed(pickle.dumps("{}")), "tests are a list, got dict"),
        (packed(pickle.dumps("[")), "Expecting value"),
        (packed(pickle.dumps("[]"))[:-8], "cut short|[Ii]ncorrect|padding"),
        ("%%%", "base64"),
        (base64.b64encode(b"plain").decode(), "decompressing"),
    ],
)
def test_private_tests_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(
        ValueError, match=f"private tests that cannot be read: .*({message}).*; expected JSON"
    ):
        coding.private_tests(text)  # fmt: skip


def test_a_zip_bomb_is_not_unpacked() -> None:
    bomb = packed(pickle.dumps("[]" + " " * 1_000_000))
    assert len(bomb) < 3000
    with pytest.raises(ValueError, match="more than 1,000 bytes once unpacked"):
        coding.private_tests(bomb, largest=1000)
    assert coding.private_tests(bomb) == []


# Programs

STUB = Problem("h", PROMPT, tests="", verifier="code", source="humaneval", entry="root")
HEAD = PROMPT[: PROMPT.index("def root")].rstrip() + "\n\n"
JOINED = PROMPT + BODY.rstrip()


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("```python\ndef root(x):\n    return 1\n```", HEAD + "def root(x):\n    return 1\n"),
        ("```python\nroot = abs\n```", HEAD + "root = abs\n"),
        (
            "```python\nfrom __future__ import annotations\nimport re\ndef root(x): ...\n```",
            f"from __future__ import annotations\n{HEAD}import re\ndef root(x): ...\n",
        ),
        (BODY, JOINED),
        ("\n" + BODY, JOINED),
        ("   \n" + BODY, PROMPT + "   \n" + BODY.rstrip("\n")),
        ("```\n   \n" + BODY + "```", PROMPT + "\n" + BODY),
        (f"The body:\n```python\n{BODY}```", JOINED + "\n"),
        ("```\nreturn sqrt(half(x))\n```", JOINED + "\n"),
        (f"```python\n{PROMPT}{BODY}```", HEAD + PROMPT + BODY),
        ("def root(x):\n    return 1", HEAD + "def root(x):\n    return 1"),
        ("import re\ndef root(x):\n    return 1", HEAD + "import re\ndef root(x):\n    return 1"),
        ("def other(x):\n    return 1", None),  # not the function, and no body
        ("The answer is sqrt(half(x)).", None),
        ("```python\n    return 1", None),  # cut inside its fence
        ("    So:\n```python\n    return 1", None),
        ("```python\n\n```", None),
        ("", None),
        ("\n \n", None),
    ],
)  # fmt: skip
def test_the_program_of_a_function_to_complete(text: str, program: str | None) -> None:
    assert completion.program(STUB, text) == program


def test_only_such_prompts_take_a_body() -> None:
    assert completion.stub(STUB)
    for prompt, entry in [(PROMPT, None), (PROMPT, "half"), ("Write def root(x) please.", "root")]:
        other = Problem("h", prompt, tests="", verifier="code", entry=entry)
        assert not completion.stub(other) and completion.program(other, BODY) is None
        assert completion.program(other, "```\nx = 1\n```") == "x = 1\n"


def test_a_body_is_judged(data: Path) -> None:
    (problem,) = problems.load("humaneval", "test")
    assert verify(problem, BODY).status == "ok"
    assert verify(problem, "    return None\n").status == "wrong"
    assert verify(problem, "```python\ndef root(x):\n    return sqrt(half(x))\n```").status == "ok"
    assert verify(problem, "I do not know.").status == "unparsed"


def test_livecodebench_programs_find_its_usual_imports(data: Path) -> None:
    """Where they are run; the program that is shown is the model's own."""
    functional = problems.load("livecodebench", "test")[1]
    solution = functional.solution or ""
    assert (
        completion.program(functional, solution) == solution.split("\n", 1)[1].rpartition("```")[0]
    )
    assert verify(functional, solution).status == "ok"
    # builtins win over math; names of typing, collections and the modules themselves are there
    told = "assert pow(2, 3, 5) == 3"
    told += " and Counter('aab')['a'] == 2 and heapq.heappop([1]) == 1 and List"
    assert verify(functional, f"{solution.rpartition('```')[0]}{told}\n```").status == "ok"
    assert (
        verify(functional, f"{solution.rpartition('```')[0]}assert pow(2, 3, 5) == 4\n```").status
        == "wrong"
    )


# Tasks


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("micro_math", {}, (1, 0.0, 1.0)),
        ("gsm8k", {}, (1, 0.0, 1.0)),
        ("aime24", {}, (16, 0.6, 0.95)),
        ("aime25", {}, (16, 0.6, 0.95)),
        ("amc23", {}, (16, 0.6, 0.95)),
        ("math500", {}, (4, 0.6, 0.95)),
        ("humaneval", {}, (10, 0.2, 0.95)),
        ("mbpp", {}, (10, 0.2, 0.95)),
        ("livecodebench", {}, (10, 0.2, 0.95)),
        ("humaneval_base", {}, (10, 0.2, 0.95)),
        ("aime24", {"n": 64}, (64, 0.6, 0.95)),
        ("aime24", {"temperature": 1.0, "top_p": 1.0}, (16, 1.0, 1.0)),
        ("aime24", {"temperature": 0}, (1, 0, 0.95)),  # greedy: one sample is meant
        ("micro_math", {"temperature": 0.5}, (1, 0.5, 1.0)),
    ],
)
def test_a_task_says_how_it_is_sampled(
    name: str, given: dict[str, Any], expected: tuple[int, float, float]
) -> None:
    from harness.config import Benchmark

    setting = Setting.of(name, given)
    assert (setting.n, setting.temperature, setting.top_p) == expected
    assert Setting.of(name, Benchmark(**given)) == setting


@pytest.mark.parametrize(
    ("name", "given"), [("gsm8k", {"n": 2}), ("aime24", {"n": 2, "temperature": 0})]
)
def test_equal_samples_are_refused(name: str, given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"n = 2 greedy samples are equal"):
        Setting.of(name, given)


def test_a_suite_with_equal_samples_is_refused_before_compute() -> None:
    from harness.compare import check
    from harness.config import parse
    from tests.harness.test_compare import SUITE

    with pytest.raises(ValueError, match=r"benchmarks\.micro_math: n = 4 greedy samples are equal"):
        check(parse({**SUITE, "benchmarks": {"micro_math": {"n": 4}}}), ["sft"])


def test_a_date_is_text_in_the_protocol() -> None:
    setting = Setting.of("livecodebench", {"options": {"start": date(2024, 1, 2)}})
    assert setting.options == {"start": "2024-01-02"}


def test_code_tasks_through_the_driver(data: Path) -> None:
    model = Counting(lambda request, i: request.problem.solution or "")
    found = evaluate(model, {"humaneval": {}, "mbpp": {"n": 2}})
    assert [len(records) for records in found.values()] == [10, 8]
    assert all(record["correct"] for records in found.values() for record in records)
    assert {sampling.max_new_tokens for _, sampling in model.asked} == {4096}
    assert evaluation.problems_of("livecodebench", options={"start": "2024-01-01"})[0].id[-1] == "c"


def test_plain_lm_eval_runs_the_code_tasks(data: Path) -> None:
    from lm_eval import evaluator
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    class Plain(LM):
        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            self.asked = {request.task_name: request.args for request in requests}
            return [request.doc["solution"] or "```\npass\n```" for request in requests]

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any: ...
        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> Any: ...

    names = ["humaneval", "mbpp", "livecodebench"]
    names += [f"{name}_base" for name in names]
    folder = Path(evaluation.__file__).parents[1] / "benchmarks/tasks"
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    model = Plain()
    with evaluation._quiet():
        result = evaluator.simple_evaluate(
            model, tasks=names, task_manager=manager, bootstrap_iters=0, confirm_run_unsafe_code=True
        )["results"]  # fmt: skip
        with pytest.raises(ValueError, match="unsafe"):
            evaluator.simple_evaluate(model, tasks=["mbpp"], task_manager=manager)
    assert all(result[name]["unparsed,samples"] == 0.0 for name in names)
    for name in ("humaneval", "mbpp", "humaneval_base", "mbpp_base"):
        assert result[name]["accuracy,samples"] == 1.0
    assert model.asked["humaneval_base"][0] == PROMPT.rstrip()
    assert model.asked["humaneval"][1]["temperature"] == 0.2


# Base models


def test_few_shot_prompts(data: Path) -> None:
    (asked,) = problems.load("gsm8k", "test")
    text = fewshot.prompt(asked)
    assert text.count("Problem: ") == text.count("Solution:") == 9 and "<<" not in text
    shots = problems.load("gsm8k", "train", 8)
    assert text.startswith(
        f"Problem: {shots[0].prompt}\nSolution: He has {shots[0].answer}. "
        rf"The answer is $\boxed{{{shots[0].answer}}}$.{chr(10) * 2}Problem: {shots[1].prompt}"
    )
    assert text.endswith("\n\nProblem: T\nSolution:")
    code = fewshot.prompt(problems.load("mbpp", "test")[0])
    assert code.count("[BEGIN]\n```python\n") == code.count("\n```\n[DONE]\n\n") == 3
    assert code.startswith("Write a function to add 2.") and code.endswith("\n\n[BEGIN]\n")
    stdin, functional, _ = problems.load("livecodebench", "test")
    assert "class Solution" in fewshot.prompt(functional).partition("[DONE]")[0]
    assert "input()" in fewshot.prompt(stdin) and "class" not in fewshot.prompt(stdin)
    math = fewshot.prompt(Problem("m", "Why?", "1", source="math500"))
    assert math.count(r"\boxed{") == 4 and math.endswith("Problem: Why?\nSolution:")


def test_the_examples_for_mathematics_are_read_as_they_say() -> None:
    answers = ["9", "x+3", "1/12", "2, 3"]
    for (asked, solved), answer in zip(fewshot.MATH, answers, strict=True):
        assert verify(Problem("m", asked, answer), solved).status == "ok"


def test_base_tasks_ask_for_a_continuation(data: Path) -> None:
    class Opening(Counting):
        """Its chat template opens a think, which a continuation does not see."""

        def encode(self, prompt: str, system: str | None = None) -> Ids:
            return super().encode(prompt + "<think>\n", system)

    def answer(request: Request, sample: int) -> str:
        if not request.raw:
            return f"x</think>{request.problem.answer}"
        return "\n" + BODY + "\ndef more(): ..."

    model = Opening(answer)
    found = evaluate(model, {"humaneval_base": {"n": 1}, "micro_math": {"limit": 3}})
    assert [r["status"] for r in found["humaneval_base"] + found["micro_math"]] == ["ok"] * 4
    asked = {request.raw: (request, sampling) for mine, sampling in model.asked for request in mine}
    request, sampling = asked[True]
    assert request.prompt == PROMPT.rstrip() and "\ndef" in sampling.stop
    assert request.encoded(model) == tuple(request.prompt.encode())
    assert asked[False][0].encoded(model) == model.encode(asked[False][0].prompt)


def test_a_model_without_a_template_runs_base_tasks(data: Path) -> None:
    from tests.tiny import tiny_model

    model = tiny_model()
    model.tokenizer.chat_template = None
    records = evaluate(model, {"gsm8k_base": {"max_new_tokens": 4}})["gsm8k_base"]
    assert [r["status"] for r in records] == ["unparsed"]
    (problem,) = problems.load("gsm8k", "test")
    request = Request(fewshot.prompt(problem), problem, raw=True)
    assert request.encoded(model) == model.tokenize(request.prompt, end=False)
    with pytest.raises(ValueError, match="no chat template"):
        evaluate(model, {"gsm8k": {"max_new_tokens": 4}})


def test_the_protocol_tells_base_tasks_apart(data: Path) -> None:
    chat, base = evaluation.protocol_of("gsm8k"), evaluation.protocol_of("gsm8k_base")
    assert "boxed" in chat["template"] and base["template"].startswith("few-shot ")
    write(data / "gsm8k/train.jsonl.gz", [{"question": f"N{i}", "answer": "#### 1"} for i in range(20)])  # fmt: skip
    problems._loaded.clear(), problems._kept.clear()
    assert evaluation.protocol_of("gsm8k_base")["template"] != base["template"]
    assert evaluation.protocol_of("gsm8k")["template"] == chat["template"]


def test_a_script_sees_text_to_continue() -> None:
    model = Scripted({})
    assert model.raw("ab") == (97, 98)


# Real data

if DATA:

    def test_real_data_of_livecodebench() -> None:
        found = problems.load("livecodebench", "test")
        tests = {p.id: json.loads(p.tests or "") for p in found}
        assert Counter(t["kind"] for t in tests.values()) == {"stdin": 219, "functional": 181}
        functional = [t for t in tests.values() if t["kind"] == "functional"]
        assert all(t["class"] == "Solution" and t["entry"] for t in functional)
        assert all(t["cases"] for t in tests.values())
        hidden = [p for p in found if p.solution]
        public = {"livecodebench/" + row["question_id"]: len(json.loads(row["public_test_cases"]))
                  for _, row in problems._lines(Path(str(DATA), "livecodebench/v1_public_tests.jsonl.gz"))}  # fmt: skip
        assert len(hidden) == 28
        assert {p.id for p in hidden} == {
            i for i, n in public.items() if len(tests[i]["cases"]) > n
        }
        assert Counter(p.level for p in found) == {1: 142, 2: 168, 3: 90}

    def test_real_data_of_livecodebench_by_date() -> None:
        parts = [("2023-05-07", "2023-08-31"), ("2023-09-01", "2023-12-31"), ("2024-01-01", "2024-03-02")]  # fmt: skip
        found = [problems.load("livecodebench", "test", start=a, end=b) for a, b in parts]
        assert sum(map(len, found)) == 400 and all(found)
        assert len({p.id for part in found for p in part}) == 400

    def test_real_data_names_the_function_of_nearly_all_mbpp_tasks() -> None:
        found = problems.every("mbpp")
        assert [p.id for p in found if p.entry is None] == ["mbpp/601"]  # calls a class of its own
        assert all(f"def {p.entry}" in (p.solution or "") for p in found if p.entry)

    def test_real_data_of_humaneval_completes_bodies() -> None:
        for problem in problems.load("humaneval", "test"):
            whole = (problem.solution or "").removeprefix("```python\n").removesuffix("\n```")
            body = whole.removeprefix(problem.prompt)
            assert completion.stub(problem) and problem.entry and body != whole
            for text in (body, f"```python\n{body}\n```", problem.solution or ""):
                program = completion.program(problem, text)
                assert program and f"def {problem.entry}(" in program
                compile(program, problem.id, "exec")
            assert fewshot.prompt(problem) == problem.prompt.rstrip()

    def test_real_data_serves_the_few_shot_prompts() -> None:
        for name in ("gsm8k", "mbpp", "livecodebench", "math500"):
            for problem in problems.load(name, "test", 3):
                assert 200 < len(fewshot.prompt(problem)) < 12_000
