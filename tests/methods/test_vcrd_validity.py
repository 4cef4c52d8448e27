"""VCRD: each estimator of validity by hand, who is asked, and what stays unjudged."""

from __future__ import annotations

from collections.abc import Callable
from math import exp
from typing import Any

import numpy as np
import pytest

from benchmarks import PROBLEMS
from harness.lab import Workbench
from harness.ledger import Ledger
from harness.models.scripted import Scripted
from harness.types import Ids, Problem, Request, Scores
from methods.vcrd.proposals import pairs
from methods.vcrd.validity import ESTIMATORS, judge, validities
from tests.methods.vcrd_bench import (
    ADD,
    LONG,
    STUDENT,
    TEACHER,
    Rewards,
    action,
    bench,
    vcrd,
    written,
)


def test_rollouts_by_hand() -> None:
    def teacher(request: Request, index: int) -> str:
        return "</think>\n3" if index < (3 if request.prefix[-2:] == good else 1) else "</think>\n4"

    def student(request: Request, index: int) -> str:
        return "</think>\n3" if index < 1 else "</think>\n4"

    lab = bench(Scripted(teacher, name="t1"), Scripted(student, name="s1"))
    good = lab.teacher.tokenize("3\n", end=False)
    steps = [action(lab, "<think>\n", "3\n"), action(lab, "<think>\n", "4\n")]
    by = lambda **f: ESTIMATORS["rollout"](lab, vcrd(**f), steps, False)  # noqa: E731
    assert by(completer="teacher", rollouts=5) == pytest.approx([4 / 7, 2 / 7])  # (c+1) / (K+2)
    assert by(completer="student", rollouts=5) == pytest.approx([2 / 7, 2 / 7])
    # both: 3 by the teacher (3 and 1 right), 2 by the student (1 right)
    assert by(completer="both", rollouts=5) == pytest.approx([5 / 7, 3 / 7])


def test_a_step_that_ends_the_response_counts_by_its_answer() -> None:
    lab = bench({"add": ["</think>\n4"]}, prm=Rewards({"<think>\n3\n": 0.7}))
    done = "<think>\n3\n</think>\n"
    steps = [
        action(lab, done, "3", ends=True),
        action(lab, "<think>\n", "3\n"),
        action(lab, done, "4", ends=True),
    ]
    assert judge(lab, vcrd(validity="prm"), steps, False) == [1, 0.7, 0]
    assert judge(lab, vcrd(validity="const"), steps, False) == [0.5] * 3


def test_an_answer_settles_it_for_rollouts_too_unless_it_cannot_be_read() -> None:
    right = Scripted(lambda request, index: "</think>\n3", name="right")
    lab = bench(right)
    done = [action(lab, "<think>\n3\n</think>\n", text, ends=True) for text in ("3", "4")]
    assert judge(lab, vcrd(rollouts=2), done, False) == [1, 0]
    mute = Problem("mute", "1+2=?", None, verifier="exact")
    last = action(lab, "<think>\n3\n</think>\n", "3", ends=True, problem=mute)
    assert judge(lab, vcrd(validity="const"), [last], False) == [0.5]
    assert judge(lab, vcrd(rollouts=2), [last], False) == [None]


def test_likelihood_by_hand() -> None:
    def scores(nats: float) -> Callable[[Ids, Ids], Scores]:
        # The prefix is free, so a mean over the whole response would be smaller than over the step.
        return lambda prompt, response: Scores(
            tuple(0.0 if i < 8 else -nats * (i - 7) for i in range(len(response))),
            (0.0,) * len(response),
        )

    def model(name: str, nats: float) -> Scripted:
        return Scripted({}, name=name, capabilities={"generate", "score"}, scores=scores(nats))

    lab = bench(model("t2", 0.1), model("s2", 0.5))
    step = action(lab, "<think>\n", "3\n")  # two tokens, of 1 and 2 times as many nats
    assert step.prefix == 8
    value = exp((0.1 + 0.2 + 0.5 + 1.0) / 4)
    assert ESTIMATORS["likelihood"](lab, vcrd(), [step], False) == pytest.approx([1 / value])


def test_the_judge_is_asked_about_one_step_after_what_stands_before_it() -> None:
    from methods.vcrd.validity import QUESTION

    asked = QUESTION.format(problem="1+2=?", before="<think>\n", step="3\n")
    judge_ = Rewards({asked: 0.9})
    lab = bench({"add": [""]}, judge=judge_)
    step = action(lab, "<think>\n", "3\n")
    assert ESTIMATORS["judge"](lab, vcrd(), [step], False) == [0.9]
    assert lab._ledger.charged["verifier_calls"] == 1 and lab._ledger.charged["flops"] > 0
    assert ESTIMATORS["judge"](lab, vcrd(), [step], False) == [0.9] and len(judge_.seen) == 1


def test_two_judges_are_paid_for_one_question_each() -> None:
    ledger = Ledger()
    lab = bench({"add": [""]}, ledger=ledger)
    for value in (0.2, 0.3):
        assert lab.rewards(Rewards({"q": value}), [("q", ""), ("q", "")]) == [value, value]
    assert ledger.charged["verifier_calls"] == 2


@pytest.mark.parametrize(("before", "step", "ends", "valid"), [
    ("<think>\n", "3+(3+4)\n", False, 1),
    ("<think>\n", "(1+2)+7\n", False, 1),  # the other order is as valid
    ("<think>\n", "4+(3+4)\n", False, 0),
    ("<think>\n", "3+7\n", False, 0),  # two operations at once
    ("<think>\n3+(3+4)\n", "</think>\n", False, 0),  # closed too early
    ("<think>\n3+(3+4)\n3+7\n10\n", "</think>\n", False, 1),
    ("<think>\n4+(3+4)\n", "4+7\n", False, 1),  # a right step after a wrong one
    ("<think>\n4+(3+4)\n4+7\n11\n", "</think>\n", False, 0),
    ("<think>\n3+(3+4)\n3+7\n10\n</think>\n", "10", True, 1),
    ("<think>\n3+(3+4)\n3+7\n10\n</think>\n", "11", True, 0),
])  # fmt: skip
def test_the_oracle_by_hand(before: str, step: str, ends: bool, valid: int) -> None:
    lab = bench({LONG.id: [""]}, problems=(LONG,), oracle=PROBLEMS["micro_math"].oracle)
    given = action(lab, before, step, ends=ends, problem=LONG)
    assert judge(lab, vcrd(validity="oracle"), [given], False) == [valid]


def test_without_an_oracle_it_says_what_to_do_before_anything_is_sampled() -> None:
    ledger = Ledger()
    lab = bench(written(TEACHER), ledger=ledger)
    with pytest.raises(
        ValueError, match="validity 'oracle' needs problems whose steps can be judged"
    ):
        list(vcrd(validity="oracle").stages(lab))
    assert ledger.charged["teacher_generated"] == 0


def test_chance_is_a_function_of_the_step() -> None:
    lab = bench({"add": [""]})
    steps = [action(lab, "<think>\n", f"{i}\n") for i in range(200)]
    one, two = (ESTIMATORS["random"](lab, vcrd(), s, False) for s in (steps, steps[::-1]))
    assert one == two[::-1] and 0.4 < np.mean(one) < 0.6 and 0 <= min(one) < max(one) < 1  # type: ignore[arg-type, type-var]


def test_equal_proposals_have_delta_zero_and_no_verifier_is_called() -> None:
    ledger = Ledger()
    lab = bench(written("<think>\n3\n</think>\n3"), ledger=ledger)
    found = pairs(lab, vcrd(positions=9), [ADD], False)
    assert len(found) == 3 and all(pair.same for pair in found)
    teacher, student = validities(lab, vcrd(), found, False)
    assert (teacher - student == 0).all()
    assert ledger.charged["verifier_calls"] == 0 and "validity" not in str(ledger.purposes)


def test_what_a_cap_left_unjudged_has_delta_zero() -> None:
    lab = bench(written("<think>\n3\n</think>\n3"), written("<think>\n4\n</think>\n4"))
    found = pairs(lab, vcrd(prefixes="teacher", positions=9), [ADD], False)
    poor = bench(lab.teacher, lab.student, ledger=Ledger({"teacher_generated": 0}))
    teacher, student = validities(poor, vcrd(completer="teacher"), found[:1], False)
    assert not found[0].same and (teacher[0], student[0]) == (0.5, 0.5)


def test_what_no_verifier_can_read_is_left_unjudged() -> None:
    """Every completion of a problem without an answer is an error: no rate, no weight, and a note that says how many."""
    mute = Problem("mute", "1+2=?", None, verifier="exact")
    lab = bench(written(TEACHER), written(STUDENT), problems=(mute,))
    found = pairs(lab, vcrd(prefixes="teacher", positions=9), [mute], False)
    teacher, student = validities(lab, vcrd(), found, False)
    assert (teacher == 0.5).all() and (student == 0.5).all()
    assert lab.notes["steps that could not be judged"] == 2 * sum(not pair.same for pair in found)


class Spied(Workbench):
    """Notes what it is asked for."""

    asked: list[tuple[Any, dict[str, Any]]]

    def samples(self, model: Any, n: int = 1, **how: Any) -> Any:
        self.asked.append((model, how))
        return super().samples(model, n, **how)


def spied(step: list[int], **more: Any) -> Spied:
    lab = bench(
        written(TEACHER), written(STUDENT), problems=(LONG,), clock=lambda: tuple(step), **more
    )
    lab.__class__ = Spied
    lab.asked = []  # type: ignore[attr-defined]
    base = Scripted(written(STUDENT), name="base")
    lab.models.loaders["base"] = lambda: base  # type: ignore[attr-defined]
    return lab  # type: ignore[return-value]


@pytest.mark.parametrize("fresh", [False, True])
def test_who_is_asked_and_how(fresh: bool) -> None:
    lab = spied([0, 0])
    setting = vcrd(prefixes="student", temperature=0.7, top_p=0.9, completer="student", rollouts=2)
    found = pairs(lab, setting, [LONG], fresh)
    validities(lab, setting, found, fresh)
    by = {how["purpose"]: (model, how) for model, how in lab.asked}
    student = lab.student if fresh else lab.base
    assert by["prefixes"][0] is by["validity"][0] is student and by["proposals"][0] is lab.teacher
    assert (
        by["prefixes"][1].get("on_policy", False)
        is by["validity"][1].get("on_policy", False)
        is fresh
    )
    for purpose in ("prefixes", "proposals"):
        how = by[purpose][1]
        assert (how["temperature"], how["top_p"], how["judge"]) == (0.7, 0.9, False)
    how = by["validity"][1]
    assert (how["temperature"], how["top_p"], how["judge"]) == (1.0, 1.0, True)
