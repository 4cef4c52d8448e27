"""VCRD: one step of either model under one prefix, on models that say what is written here."""

from __future__ import annotations

import numpy as np
import pytest

from harness.models.scripted import Reply, Scripted
from harness.types import Problem, Request
from methods.vcrd.proposals import pairs, positions, propose
from tests.methods.vcrd_bench import (
    ADD,
    LONG,
    STUDENT,
    TEACHER,
    action,
    bench,
    texts,
    vcrd,
    written,
)


@pytest.mark.parametrize(("prefixes", "own"), [("teacher", TEACHER), ("student", STUDENT)])
def test_both_steps_stand_under_the_same_prefix(prefixes: str, own: str) -> None:
    lab = bench(
        Scripted(written(TEACHER), name=f"t {own}"),
        Scripted(written(STUDENT), name=f"s {own}"),
        problems=(LONG,),
    )
    found = pairs(lab, vcrd(prefixes=prefixes, positions=9), [LONG], False)
    lines, t, s = (x.splitlines(keepends=True) for x in (own, TEACHER, STUDENT))
    expected = [("".join(lines[:k]), t[k], s[k]) for k in range(1, 6)]
    assert texts(lab, found) == expected
    assert [p.teacher.terminal for p in found] == [False] * 4 + [True]
    assert {p.source for p in found} == {prefixes}


def one_step(model: str, separator: str, before: str = "", limit: int = 128) -> str:
    """What `propose` takes from a model that would write this much."""

    def answer(request: Request, index: int) -> str:
        return model[len(Scripted({}).decode(request.prefix)) - len(before) :]

    lab = bench(Scripted(answer, name=repr((model, separator, before, limit))))
    given = action(lab, before, "x")
    setting = vcrd(steps=separator, max_step=limit)
    (found,) = propose(lab, setting, "teacher", False, [(given, setting.steps)])  # type: ignore[list-item]
    assert found.tokens[: found.prefix] == given.tokens[: given.prefix]
    return lab.teacher.decode(found.step) + ("<end>" if found.terminal else "")


@pytest.mark.parametrize(("says", "separator", "step"), [
    ("one\ntwo\n", "line", "one\n"),
    ("\n\none\ntwo", "line", "\n\none\n"),  # a blank line is no step: it goes on
    ("one\ntwo\n\nthree", "blank", "one\ntwo\n\n"),
    ("one", "line", "one<end>"),  # the end inside a step
    ("f(1,\n  2)\nx", "statement", "f(1,\n  2)\n"),  # a bracket is open: it goes on
    ("f(1,\n  2)\nx", "line", "f(1,\n"),
    ("It is so. And so.", "sentence", "It is so. "),
])  # fmt: skip
def test_one_step_of_a_model(says: str, separator: str, step: str) -> None:
    assert one_step(says, separator, "before\n") == step


@pytest.mark.parametrize(("says", "separator", "step"), [
    ("Is it? Yes.", "sentence", "Is it? "), ("Go! Now.", "sentence", "Go! "), ("a = 1\nb\n\nc", "block", "a = 1\nb\n\n"),
    ("f(\n\n1)\n\nb", "block", "f(\n\n1)\n\n"),
])  # fmt: skip
def test_where_a_model_is_stopped(says: str, separator: str, step: str) -> None:
    assert one_step(says, separator, "before\n") == step


def test_a_step_that_is_too_long_is_cut() -> None:
    assert one_step("abcdefgh\n", "line", limit=5) == "abcde"
    assert one_step("ab\ncdefgh\n\ni", "blank", limit=6) == "ab\n"  # its first line
    assert one_step("f(\nabcdefgh)", "statement", limit=6) == "f(\n"


def test_inside_a_step_that_is_too_long_both_propose_lines() -> None:
    full = "a1\nb2\nc3\nd4\n\nz"

    def goes_on(request: Request, index: int) -> str:
        return full[len(Scripted({}).decode(request.prefix)) :]

    lab = bench(Scripted(goes_on, name="long"), Scripted(goes_on, name="long too"))
    found = pairs(
        lab, vcrd(steps="blank", max_step=8, prefixes="teacher", positions=9), [ADD], False
    )
    assert [lab.teacher.decode(pair.other.step) for pair in found] == [
        "a1\n",
        "b2\n",
        "c3\n",
        "d4\n\n",
        "z",
    ]
    assert all(pair.same for pair in found)


def test_the_opening_of_a_think_is_no_step() -> None:
    assert one_step("<think>\none\ntwo\n", "line") == "<think>\none\n"


@pytest.mark.parametrize(("full", "separator"), [
    ("<think>\na\n\n\nb\n</think>\nc", "line"), ("<think>\na\n\n\n\nb\n</think>\n\nc\n", "blank"), ("One.  Two.\n\nThree.", "sentence"),
    ("x = 1\n\nreturn 1\n", "statement"),
])  # fmt: skip
def test_one_model_on_both_sides_always_proposes_the_same_step(full: str, separator: str) -> None:
    def goes_on(request: Request, index: int) -> str:
        return full[len(Scripted({}).decode(request.prefix)) :]

    lab = bench(Scripted(goes_on, name=f"both {full!r}"), Scripted(goes_on, name=f"too {full!r}"))
    for prefixes in ("teacher", "student"):
        found = pairs(lab, vcrd(steps=separator, prefixes=prefixes, positions=9), [ADD], False)
        assert len(found) > 1 and all(pair.same for pair in found)


def test_a_model_that_writes_blank_lines_for_ever_comes_to_an_end() -> None:
    lab = bench(Scripted(lambda request, index: "\n", name="blank"))
    (found,) = propose(
        lab, vcrd(max_step=5), "teacher", False, [(action(lab, "before\n", "x"), "line")]
    )
    assert lab.teacher.decode(found.step) == "\n" * 5


def test_a_model_that_writes_nothing_makes_no_proposal() -> None:
    lab = bench(Scripted(lambda request, index: Reply("", finished=False), name="mute"))
    assert propose(lab, vcrd(), "teacher", False, [(action(lab, "before\n", "x"), "line")]) == []


def test_auto_takes_the_separator_of_the_domain() -> None:
    from methods.vcrd.proposals import separator

    domains = ["math", "code", "instructions"]
    found = [separator(vcrd(steps="auto"), Problem("p", "", domain=d)) for d in domains]
    assert found == ["blank", "statement", "sentence"]


def test_positions() -> None:
    drawn = [positions(np.random.default_rng(i), 6, 2) for i in range(2000)]
    assert all(len(set(d)) == 2 and d == sorted(d) and d[0] >= 0 and d[1] < 6 for d in drawn)
    # 0 is drawn with 1/3, and put there in half of the other cases
    assert np.mean([0 in d for d in drawn]) == pytest.approx(2 / 3, abs=0.04)
    assert (
        positions(np.random.default_rng(0), 3, 9) == [0, 1, 2]
        and positions(np.random.default_rng(0), 0, 2) == []
    )


def test_on_policy_draws_are_new_at_every_refresh_and_others_never() -> None:
    from methods.vcrd.proposals import responses

    many = [Problem(f"p{i}", "1+2=?", "3", verifier="exact") for i in range(60)]
    step = [0, 0]
    lab = bench(written(TEACHER), problems=many, clock=lambda: tuple(step))
    drawn = {}
    for fresh in (False, True):
        for step[1] in (0, 4):
            writers = [who for _, who in responses(lab, vcrd(), many, fresh)]
            cuts = [p.own.prefix for p in pairs(lab, vcrd(positions=1), many, fresh)]
            drawn[fresh, step[1]] = (writers, cuts)
    assert drawn[False, 0] == drawn[False, 4]
    assert drawn[True, 0][0] != drawn[True, 4][0] and drawn[True, 0][1] != drawn[True, 4][1]
    for mix, least, most in ((0.0, 0, 0), (0.25, 5, 26), (1.0, 60, 60)):
        writers = [who for _, who in responses(lab, vcrd(mix=mix), many, False)]
        assert least <= writers.count("student") <= most


def test_a_response_that_was_cut_off_lends_its_whole_steps_only() -> None:
    lab = bench(
        Scripted(
            lambda r, i: "<think>\n" + "1\n" * 2 + "2" * 300 if not r.prefix else "5\n",
            name="endless",
        )
    )
    found = pairs(lab, vcrd(prefixes="teacher", positions=99), [ADD], False)
    assert [step for _, step, _ in texts(lab, found)] == ["1\n", "1\n"]
