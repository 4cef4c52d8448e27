"""The micro world: steps judged by hand, splits, determinism, and the tokenizer's round trip."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from benchmarks import CHECKPOINTS, MICRO_VERSION, PROBLEMS
from benchmarks.micro import code, math, scores
from benchmarks.micro.problems import MicroSet, family_of, reasoning_lines, split_of
from benchmarks.micro.tokenizer import WORDS, build
from harness.types import Problem, ProblemSet, Trace, Verdict

MATH, CODE = PROBLEMS["micro_math"], PROBLEMS["micro_code"]
REDUCE = Problem("micro_math/reduce-5-0", "(((4+3)+1)*5)+(2+3)=?", "45")
SOLVE = Problem("micro_math/solve-4-0", "(((x*6)*4)-7)+58=147", "4")
PIPELINE = Problem(
    "micro_code/code-4-0",
    'def f(xs):\n    """sort, first keep even, then add 1, then sum"""',
    "keep even, sort, add 1, sum",
    domain="code",
)


BOUNDS = {"all lines": 0.8, "math": 0.8, "code": 0.6, "answer": 0.75}  # AUCs of the committed judge


def think(*lines: str, answer: str = "") -> str:
    return "\n".join(["<think>", *lines, "</think>", answer])


def valid(problems: ProblemSet, problem: Problem, *lines: str) -> list[bool]:
    assert problems.oracle is not None
    return problems.oracle.valid_steps(problem, think(*lines))


# Steps ----------------------------------------------------------------------------------------------------------------


def test_any_order_of_reductions_is_valid() -> None:
    assert (
        valid(MATH, REDUCE, "((7+1)*5)+(2+3)", "(8*5)+(2+3)", "40+(2+3)", "40+5", "45")
        == [True] * 5
    )
    assert (
        valid(MATH, REDUCE, "(((4+3)+1)*5)+5", "((7+1)*5)+5", "(8*5)+5", "40+5", "45") == [True] * 5
    )


def test_a_wrong_reduction_is_found_and_later_lines_stand_on_their_own() -> None:
    lines = ("((7+1)*5)+(2+3)", "(9*5)+(2+3)", "45+(2+3)", "45+5", "45")
    assert valid(MATH, REDUCE, *lines) == [True, False, True, True, False]
    assert MATH.oracle is not None
    assert MATH.oracle.first_invalid(REDUCE, think(*lines)) == 1
    assert MATH.oracle.first_invalid(REDUCE, think(*lines[:1])) is None
    assert not MATH.oracle.sound(REDUCE, think(*lines))


def test_two_reductions_at_once_and_other_spellings_are_invalid() -> None:
    assert valid(MATH, REDUCE, "((7+1)*5)+5") == [False]
    assert valid(MATH, REDUCE, "((7+1)*5)+(2+3)=") == [False]
    assert valid(MATH, REDUCE, "what?", "45", "45") == [False, False, False]


def test_a_reduction_below_zero_can_be_judged_too() -> None:
    assert valid(MATH, replace(REDUCE, prompt="(1+2)-4=?"), "3-4", "-1") == [True, True]


def test_solve_undoes_the_outermost_operation_or_merges_two_of_a_kind() -> None:
    undo = ("((x*6)*4)-7=89", "(x*6)*4=96", "x*6=24", "x=4")
    merge = ("((x*24)-7)+58=147", "(x*24)+51=147", "x*24=96", "x=4")
    assert valid(MATH, SOLVE, *undo) == [True] * 4
    assert valid(MATH, SOLVE, *merge) == [True] * 4


def test_solve_rejects_wrong_arithmetic_skipped_steps_and_remainders() -> None:
    assert valid(MATH, SOLVE, "((x*6)*4)-7=88", "(x*6)*4=95", "x*6=23") == [False, True, False]
    assert valid(MATH, SOLVE, "(x*6)*4=96", "x=4") == [False, False]
    assert valid(MATH, replace(SOLVE, prompt="(x+3)-3=5"), "x=5") == [
        True
    ]  # the merge leaves nothing


def test_statements_are_judged_by_what_they_do() -> None:
    keep, order, add, total = (code.STATEMENTS[name] for name in code.pipeline(PIPELINE.prompt))
    assert valid(CODE, PIPELINE, keep, order, add, total) == [True] * 4
    assert (
        valid(CODE, PIPELINE, order, "xs = [x for x in xs if x % 2 != 1]", add, total) == [True] * 4
    )
    assert valid(CODE, PIPELINE, add, keep, order, total) == [
        False,
        True,
        True,
        True,
    ]  # adds too early
    assert valid(CODE, PIPELINE, keep, total, order) == [True, False, False]
    assert valid(CODE, PIPELINE, keep, "xs = sorted(ys)", order) == [True, False, True]
    assert valid(CODE, PIPELINE, keep, keep) == [True, False]


@pytest.mark.parametrize(
    "line",
    ["import os", "xs = __import__('os')", "xs = [9] * 999999999", "xs = 9 ** 9 ** 9", "xs = xs.sort()", "while 1: pass", "xs ="],
)  # fmt: skip
def test_lines_outside_the_micro_language_never_run(line: str) -> None:
    assert code.run(line, [1, 2]) is None


def test_docstrings_start_in_the_middle() -> None:
    assert code.pipeline(PIPELINE.prompt) == ("keep even", "sort", "add 1", "sum")


def test_reasoning_lines_are_those_of_the_think() -> None:
    assert reasoning_lines("ab\n<think>\n a\n\nb\n</think>\nc") == ["a", "b"]
    assert reasoning_lines("<think>\na") == ["a"]
    assert reasoning_lines("a\nb") == []


# Problems -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problems", [MATH, CODE], ids=["math", "code"])
@pytest.mark.parametrize("order", ["right", "left", "any"])
def test_every_solution_is_valid_and_correct(problems: ProblemSet, order: math.Order) -> None:
    assert isinstance(problems, MicroSet) and problems.oracle is not None
    levels = sorted({level for levels in problems.levels.values() for level in levels})
    others = 0
    for problem in problems.load("train", 400, levels=levels):
        text = (code if problem.domain == "code" else math).solution(problem, order)
        steps = problems.oracle.valid_steps(problem, text)
        assert steps and all(steps), (problem.prompt, text)
        assert scores.correct(problem, text), (problem.prompt, text)
        others += text != problem.solution
        if order == "right":
            assert text == problem.solution
    assert order == "right" or others > 100


def test_programs_pass_their_tests_in_python() -> None:
    for problem in CODE.load("dev", 40):
        assert problem.solution is not None and problem.tests is not None
        program = problem.solution.split("```python\n")[1].removesuffix("```")
        exec(program + "\n" + problem.tests, {})


def test_a_wrong_program_fails() -> None:
    problem = CODE.load("dev", 1)[0]
    assert problem.solution is not None
    first = reasoning_lines(problem.solution)[0]
    head, _, program = problem.solution.partition("</think>")
    shorter = program.replace(f"    {first}\n", "")
    assert scores.correct(problem, f"{head}</think>{program}")
    assert not scores.correct(problem, f"{head}</think>{shorter}")
    assert not scores.correct(problem, head)


@pytest.mark.parametrize("problems", [MATH, CODE], ids=["math", "code"])
def test_splits_are_disjoint_deterministic_balanced_and_grow_at_the_end(
    problems: ProblemSet,
) -> None:
    rows = {split: problems.load(split, 150) for split in ("train", "dev", "test")}
    prompts = [problem.prompt for split in rows.values() for problem in split]
    assert len(prompts) == len(set(prompts)) == 450
    assert all(split_of(p.prompt) == split for split in rows for p in rows[split])
    assert len({p.id for split in rows.values() for p in split}) == 450
    assert problems.load("test", 50) == rows["test"][:50]
    cells = [(family_of(p), p.level) for p in rows["train"]]
    counts = [cells.count(cell) for cell in set(cells)]
    assert max(counts) - min(counts) <= 1


def test_loading_does_not_depend_on_the_hash_seed() -> None:
    script = "from benchmarks import PROBLEMS as P\nprint([[q.id for q in s.load('dev', 30)] for s in P.values()])"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(outputs) == 1 and "micro_code" in outputs.pop()


def test_a_level_that_runs_dry_ends() -> None:
    assert 100 < len(MATH.load("test", 5000, levels=(1,), families=("reduce",))) < 1000


def test_unknown_options_name_what_is_known() -> None:
    with pytest.raises(ValueError, match="levels and families"):
        MATH.load("test", 1, level=3)
    with pytest.raises(ValueError, match="reduce, solve"):
        MATH.load("test", 1, families=("divide",))
    with pytest.raises(ValueError, match="level"):
        CODE.load("test", 1, levels=(2, 40))


def test_the_sets_keep_the_contract() -> None:
    assert MATH.revision == f"micro_version {MICRO_VERSION}"
    for problem in MATH.load("test", 20):
        assert (problem.verifier, problem.domain, problem.source) == ("exact", "math", "micro_math")
    for problem in CODE.load("test", 20):
        assert (problem.verifier, problem.domain, problem.source) == ("code", "code", "micro_code")
        assert problem.answer == ", ".join(code.pipeline(problem.prompt))


def test_importing_the_problems_loads_no_tensor_library() -> None:
    script = (
        "import benchmarks, sys; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# The reward model -----------------------------------------------------------------------------------------------------


def steps(problem: Problem, text: str, **fields: Any) -> list[tuple[str, str, bool]]:
    """(kind, text of the step, right) of a response's steps."""
    verdict = Verdict("ok" if scores.correct(problem, text) else "wrong")
    trace = Trace(problem, (), text, **{"finished": True, "verdict": verdict, **fields})
    found, start = [], 0
    for step in scores.steps(trace):
        found.append((step.kind, text[start : step.end], step.right))
        start = step.end
    return found


def test_steps_end_with_their_lines_and_carry_the_oracles_verdict() -> None:
    problem = replace(REDUCE, prompt="(1+2)+3=?", answer="6")
    whole = "<think>\n3+3\n7\n</think>\n6"
    first = [("line", "<think>\n3+3\n", True), ("line", "7\n", False)]
    close = ("close", "</think>\n", False)
    assert steps(problem, whole) == [*first, close, ("answer", "6", True)]
    assert steps(problem, whole, finished=False) == [*first, close]
    assert steps(problem, whole[:-1]) == [*first, close]
    assert steps(problem, "<think>\n3+3\n\n7") == first[:1]  # the last line may go on
    sound = [("line", "<think>\n3+3\n", True), ("line", "6\n", True), ("close", "</think>\n", True)]
    assert steps(problem, "<think>\n3+3\n6\n</think>\n7") == [*sound, ("answer", "7", False)]
    assert steps(problem, "6") == []


def test_the_figures_of_a_judge_by_hand() -> None:
    right = np.array([True, True, False, False])
    found = scores.judged(np.array([0.95, 0.25, 0.25, 0.05]), right)
    assert (found["n"], found["right"], found["auc"]) == (4, 0.5, pytest.approx(0.875))
    assert found["brier"] == pytest.approx((0.05**2 + 0.75**2 + 0.25**2 + 0.05**2) / 4)
    assert found["ece"] == pytest.approx((0.05 + abs(0.5 - 1) + 0.05) / 4)


def test_the_committed_judge_tells_right_steps_from_wrong_ones() -> None:
    table = scores.measure_judge(CHECKPOINTS["micro/prm"].parent, 3)
    assert table["all lines"]["n"] > 300
    for part, least in BOUNDS.items():
        assert table[part]["auc"] > least, (part, table[part])
    assert table["all lines"]["ece"] < 0.1


# Tokenizer ------------------------------------------------------------------------------------------------------------


def texts() -> list[str]:
    rng = random.Random(0)
    noise = ["".join(chr(rng.choice([rng.randrange(128), rng.randrange(0xD7FF), rng.randrange(0x1F000, 0x1FAFF)])) for _ in range(40)) for _ in range(200)]  # fmt: skip
    mixed = [
        "".join(rng.choice([*WORDS, " ", "\n", "é", "sum"]) for _ in range(20)) for _ in range(200)
    ]
    micro = [
        p.prompt + "\n" + (p.solution or "") for s in (MATH, CODE) for p in s.load("test", 200)
    ]
    return [*noise, *mixed, *micro, "Natalia sold 48/2 = 24 clips in May.\r\n\t  x"]


@pytest.mark.parametrize("problems", [MATH, CODE], ids=["math", "code"])
def test_a_sound_derivation_is_valid_and_whole(problems: MicroSet) -> None:
    for problem in problems.load("train", 60, families=tuple(problems.families)[:1]):
        assert problem.solution and problems.oracle
        lines = problem.solution.splitlines()
        end = lines.index("</think>")
        assert problems.oracle.sound(problem, problem.solution)
        for gone in {1, end - 1}:  # the first or the last step skipped
            text = "\n".join([*lines[:gone], *lines[gone + 1 :]])
            assert not problems.oracle.sound(problem, text)


def test_any_text_comes_back_unchanged() -> None:
    tok = build()
    for text in texts():
        assert tok.decode(tok.encode(text), skip_special_tokens=True) == text


def test_digits_are_single_and_thinking_tags_are_ordinary_tokens() -> None:
    tok = build()
    assert len(tok.encode("2026")) == 4
    ids = tok.encode("<think></think>")
    assert len(ids) == 2 and not set(ids) & set(tok.all_special_ids)
    assert tok.pad_token_id != tok.eos_token_id


def test_chat_rendering() -> None:
    tok = build()
    turn = {"role": "user", "content": "1+2=?"}
    bare = tok.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
    whole = tok.apply_chat_template(
        [turn, {"role": "assistant", "content": "<think>\n3"}], tokenize=False
    )
    assert bare == "<|user|>1+2=?<|assistant|>"
    assert whole == bare + "<think>\n3<|end|>"


@pytest.mark.parametrize("name", sorted(CHECKPOINTS))
def test_checkpoints_hold_this_tokenizer(name: str) -> None:
    from transformers import AutoConfig, AutoTokenizer

    tok = AutoTokenizer.from_pretrained(CHECKPOINTS[name])
    assert tok.get_vocab() == build().get_vocab()
    assert tok.chat_template == build().chat_template
    assert tok.decode(tok.encode("sum  é\n<think>"), skip_special_tokens=True) == "sum  é\n<think>"
    config = AutoConfig.from_pretrained(CHECKPOINTS[name])
    assert (config.vocab_size, config.eos_token_id, config.pad_token_id) == (len(tok), tok.eos_token_id, tok.pad_token_id)  # fmt: skip


def test_checkpoints_are_small() -> None:
    files = [file for folder in CHECKPOINTS.values() for file in folder.iterdir()]
    assert 0 < sum(file.stat().st_size for file in files) < 12e6
