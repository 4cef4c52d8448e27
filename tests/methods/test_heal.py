"""HEAL: GEAR, PURE and PACE on numbers worked out by hand, and on a teacher whose entropies stand where the script says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import pytest

from benchmarks import PROBLEMS
from harness import registry
from harness.lab import Workbench
from harness.ledger import Ledger
from harness.models.scripted import Reply, Scripted
from harness.registry import Method
from harness.store import Store
from harness.types import Example, Ids, Lab, OffPolicy, Problem, Request, Scores, Trace
from methods.heal import Heal, gear, pace, pure
from tests.benches import SAMPLING, TINY, Run, model, shared_store

LINES = {"segment": "line", "min_step": 1, "min_new_steps": 1}
STEPS = [range(0, 2), range(2, 3), range(3, 7)]
FRESH = count()  # scripted scores are no function of the model's name: a store for each lab
ENTROPIES = [0.2, 0.4, 1.0, 0.1, 0.3, 0.5, 0.7]


def heal(**fields: Any) -> Heal:
    return Heal.model_validate({**LINES, **fields})


# GEAR by hand ---------------------------------------------------------------------------------------------------------


def test_step_entropies_by_hand() -> None:
    assert gear.step_entropies(ENTROPIES, STEPS, "step_mean") == pytest.approx([0.3, 1.0, 0.4])
    assert gear.step_entropies(ENTROPIES, STEPS, "step_max") == pytest.approx([0.4, 1.0, 0.7])
    # Steps shorter than the window of 8 count whole; in ten tokens the best eight neighbours hold the 4 and the 2.
    assert gear.step_entropies(ENTROPIES, STEPS, "token_window") == pytest.approx([0.3, 1.0, 0.4])
    long = [0.0, 4.0, 0, 0, 0, 0, 0, 0, 2.0, 0]
    assert gear.step_entropies(long, [range(10)], "token_window") == pytest.approx([6 / 8])


def test_surges_by_hand() -> None:
    means = np.array([0.3, 1.0, 0.4, 0.9, 0.2])
    none, mean = gear.surges(means, "delta_prev", None), "delta_running_mean"
    assert none[0] == -np.inf and none[1:] == pytest.approx([0.7, -0.6, 0.5, -0.7])
    assert gear.surges(means, "delta_prev", 0.25)[0] == pytest.approx(0.05)
    # against the mean of up to three steps before: .3; .65; 1.7/3; 2.3/3
    expected = [0.05, 0.7, -0.25, 0.9 - 1.7 / 3, 0.2 - 2.3 / 3]
    assert gear.surges(means, mean, 0.25) == pytest.approx(expected)
    assert gear.surges(means, "absolute", 0.25) == pytest.approx(means)


def test_how_far_is_searched() -> None:
    def last(num: int, fraction: float) -> int:
        return gear.last_searched([range(i, i + 1) for i in range(num)], fraction, "steps")

    assert [last(k, 1 / 3) for k in (1, 2, 3, 5, 6, 7, 9, 10)] == [1, 2, 2, 2, 2, 3, 3, 4]
    assert last(7, 1.0) == 7 and last(7, 0.5) == 4
    # half of the seven tokens of STEPS reach into the third step, which begins at token 3; a third of them, to the second
    assert gear.last_searched(STEPS, 0.5, "tokens") == 3
    assert gear.last_searched(STEPS, 0.4, "tokens") == 2


def test_what_is_kept_before_the_breakpoint() -> None:
    assert [gear.kept_tokens(STEPS, 3, backup) for backup in (0, 1, 2)] == [7, 3, 2]
    assert gear.kept_tokens(STEPS, 1, 1) == 0 and gear.kept_tokens(STEPS, 2, 2) == 0


# A scripted teacher ---------------------------------------------------------------------------------------------------

RIGHT = "<think>\na\nb\n</think>\n7"
BAD = "<think>\nab\ncd\nef\ngh\nij\nkl\n</think>\n8"  # six steps of three tokens; the first holds the newline too


def surging(text: str, at: int, first: float = 0.1) -> Reply:
    """A reply whose entropy is 2 in one step (from 1), `first` in step 1 and 0.1 elsewhere."""
    steps = heal_steps(text)
    values = [0.1] * (len(text.encode()) + 1)
    for k, step in enumerate(steps, 1):
        for i in step:
            values[i] = 2.0 if k == at else first if k == 1 else 0.1
    return Reply(text, entropies=tuple(values))


def heal_steps(text: str) -> list[range]:
    from harness.verifiers.steps import token_steps

    return token_steps([chr(byte) for byte in text.encode()] + [""])


def flat(prompt: Ids, response: Ids) -> Scores:
    return Scores((-0.5,) * len(response), (0.5,) * len(response))


def going_on(request: Request, index: int) -> str:
    """A right answer after any prefix, with one new step."""
    return f"{'' if request.prefix else '<think>'}\nx{index}\n</think>\n7"


class Teacher:
    """Unaided it fails; with the hint it says what the table has for the prefix it was given."""

    def __init__(self, base: Sequence[Any], repaired: Any, **fields: Any) -> None:
        self.asked: list[Request] = []
        self.base, self.repaired, self.fields = base, repaired, fields

    def __call__(self, request: Request, index: int) -> Any:
        if "hint: " not in request.prompt and not request.prefix:
            return self.base[index % len(self.base)]
        self.asked.append(request)
        return self.repaired(request, index)

    def lab(self, **settings: Any) -> Workbench:
        author = Scripted(
            self, name="teacher", capabilities=("generate", "score"), **{"scores": flat, **self.fields}
        )  # fmt: skip
        return Workbench(
            (pupil := Scripted({"p": [""]}, name="student")),
            {"base": lambda: pupil, "teacher": lambda: author},
            settings.pop("items", [Problem("p", "6+1=?", "7", verifier="exact")]),
            Store(shared_store() / f"heal-{next(FRESH)}"),
            settings.pop("ledger", Ledger()),
            SAMPLING,
            **settings,
        )


def prefixes_asked(teacher: Teacher, lab: Lab) -> list[str]:
    return [lab.teacher.decode(r.prefix) for r in teacher.asked if r.prefix]


def repaired(fields: dict[str, Any], base: Sequence[Any], **script: Any) -> tuple[Teacher, Lab]:
    teacher = Teacher(base, script.pop("says", going_on), **script)
    lab = teacher.lab()
    settings = {
        "samples": len(base),
        "hard": 1.0,
        "extreme": 0.5,
        "parts": ("base", "repair"),
        "paths": 4,
        "candidates": 2,
    }
    heal(**{**settings, **fields}).pools(lab)
    return teacher, lab


def test_the_prefix_ends_before_the_surge() -> None:
    base = [surging(BAD, at=4)]
    for fields, kept in (
        ({}, "<think>\nab\ncd\nef\n"),  # the surge is in step 4: steps 1 to 3 stay
        ({"backup": 0}, "<think>\nab\ncd\nef\ngh\n"),
        ({"backup": 2}, "<think>\nab\ncd\n"),
        # a third of six steps is two: step 4 is out of reach, and step 2 rises by nothing, so it is the largest of one
        ({"search_fraction": 1 / 3, "first_step": "never"}, "<think>\nab\n"),
        ({"surge": "absolute"}, "<think>\nab\ncd\nef\n"),
        ({"entropy": "step_max"}, "<think>\nab\ncd\nef\n"),
    ):
        teacher, lab = repaired(fields, base)
        assert set(prefixes_asked(teacher, lab)) == {kept}, fields
        assert {"hint: 7" in request.prompt for request in teacher.asked} == {True}
        shares = lab.notes["gear: share of a failed trace that is kept"]  # type: ignore[attr-defined]
        assert shares["counts"][int(10 * len(kept) / (len(BAD) + 1))] == 1 == sum(shares["counts"])


def test_step_one_is_the_breakpoint_where_it_is_less_sure_than_those_of_solved_problems() -> None:
    # Solved: first steps at 0.1. Failed: step 1 at 1.5 (a surge of 1.4) and step 5 at 1.4 (a surge of 1.3).
    failed = surging(BAD, at=5, first=1.5)
    failed = replace(
        failed, entropies=tuple(1.4 if e == 2.0 else e for e in failed.entropies or ())
    )
    solved = surging(RIGHT, at=0)
    for rule, scratch in (("reference", 1), ("never", 0)):
        teacher, lab = repaired({"first_step": rule}, [failed, solved])
        assert lab.notes["gear"] == {"failed traces": 1, "of them from scratch": scratch}  # type: ignore[attr-defined]
        assert set(prefixes_asked(teacher, lab)) == (
            set() if scratch else {"<think>\nab\ncd\nef\ngh\n"}
        )


def test_a_trace_of_one_step_is_repaired_from_scratch() -> None:
    base = [surging("<think>\nab\n</think>\n8", at=1)]
    for fields in ({}, {"backup": 0}, {"first_step": "never"}):
        teacher, lab = repaired(fields, base)
        assert teacher.asked and not prefixes_asked(teacher, lab)
        assert lab.notes["gear"]["of them from scratch"] == 1  # type: ignore[attr-defined]


def test_start_and_random_breakpoints() -> None:
    base = [surging(BAD, at=4), surging(BAD.replace("ij", "mn"), at=4)]
    teacher, lab = repaired({"breakpoint": "start"}, base)
    assert not prefixes_asked(teacher, lab)
    # Two paths ask the same from scratch: they get different samples, not one twice.
    assert lab.notes["repair"]["candidates"] == 4 and lab.notes["repair"]["verified"] == 4  # type: ignore[attr-defined]
    trace, steps = (Trace(Problem("q", "q"), (), "", True), heal_steps(BAD))
    drawn = {
        gear.breakpoint_of(
            heal(breakpoint="random", search_fraction=1 / 3, first_step="never"), replace(trace, index=i), steps, np.zeros(6)
        )
        for i in range(20)
    }  # fmt: skip
    assert drawn == {2}
    drawn = {
        gear.breakpoint_of(heal(breakpoint="random"), replace(trace, index=i), steps, np.zeros(6))
        for i in range(99)
    }
    assert drawn == {1, 2, 3, 4, 5, 6}


def test_which_failed_traces_are_repaired() -> None:
    one = Problem("p", "p", "7", verifier="exact")
    made = [
        Trace(one, (), "", finished, index=i)
        for i, finished in enumerate((False, True, True, True, True))
    ]
    lab = Teacher([""], None).lab()
    judged = [
        replace(t, verdict=lab.verify(one, "7" if t.index == 2 else "8")) for t in made
    ]  # 2 is right
    assert [t.index for t in gear.broken(heal(paths=9), judged)] == [1, 3, 4, 0]
    assert [t.index for t in gear.broken(heal(paths=2), judged)] == [1, 3]


def test_each_dropped_candidate_has_its_reason() -> None:
    says = [
        "x\n</think>\n7",  # kept
        "x\n</think>\n7",  # kept: how often the teacher says it counts, as in the base part
        "x\n</think>\n8",  # wrong
        Reply("y\n</think>\n7", finished=False),
        "the given answer is\n</think>\n7",
        "</think>\n7",  # nothing new but the answer
    ]
    _, lab = repaired(
        {"candidates": 6}, [surging(BAD, at=4)], says=lambda request, index: says[index]
    )
    counts = lab.notes["repair"]  # type: ignore[attr-defined]
    reasons = (
        "verified",
        "wrong",
        "truncated",
        "mentions the answer it was given",
        "too few new steps",
    )
    assert [counts[reason] for reason in reasons] == [2, 1, 1, 1, 1]  # fmt: skip
    assert counts["kept under the cap"] == 2 and counts["different texts among them"] == 1
    assert counts["problems with a kept trace"] == 1 and counts["unrepairable problems"] == 0
    _, lab = repaired(
        {"candidates": 6, "leak_filter": False, "min_new_steps": 0}, [surging(BAD, at=4)],
        says=lambda request, index: says[index],
    )  # fmt: skip
    assert lab.notes["repair"]["verified"] == 4  # type: ignore[attr-defined]


def test_the_problem_that_stays_unsolved_is_counted() -> None:
    _, lab = repaired({}, [surging(BAD, at=4)], says=lambda request, index: "z\n</think>\n8")
    assert lab.notes["repair"]["unrepairable problems"] == 1  # type: ignore[attr-defined]
    assert lab.notes["repair"]["share of problems with a verified trace"] == 0  # type: ignore[attr-defined]


def test_a_bridge_is_one_hinted_step_that_does_not_say_the_answer() -> None:
    bridges = ["uv\nrest", "so 7\nrest", "</think>\n8", "wx\nrest"]  # good, says it, no step, good

    def says(request: Request, index: int) -> str:
        return bridges[index] if "hint: " in request.prompt else "y\n</think>\n7"

    teacher = Teacher([surging(BAD, at=4)], says)
    lab = teacher.lab()
    method = heal(
        hint_mode="bridge_step",
        samples=1,
        extreme=0.5,
        candidates=4,
        paths=1,
        keep_rule="all",
        parts=("base", "repair"),
    )
    pool = method.pools(lab)["repair"]["p"]
    gear_notes = lab.notes["gear"]
    assert (gear_notes["bridge is no step"], gear_notes["bridge states the answer"]) == (1, 1)
    unaided = [lab.teacher.decode(r.prefix) for r in teacher.asked if "hint" not in r.prompt]
    assert unaided == [f"<think>\nab\ncd\nef\n{step}\n" for step in ("uv", "wx")]
    assert [t.text for t in pool] == [f"{prefix}y\n</think>\n7" for prefix in unaided]
    assert {t.prefix for t in pool} == {len("<think>\nab\ncd\nef\n")}  # the bridge is new too


def test_a_bridge_from_scratch_opens_the_think_and_one_that_was_cut_is_none() -> None:
    def says(request: Request, index: int) -> Any:
        if "hint: " not in request.prompt:
            return "y\n</think>\n7"
        return ["uv\nrest", Reply("wx", finished=False)][index]

    teacher = Teacher([surging("<think>\nab\n</think>\n8", at=1)], says)
    lab = teacher.lab()
    fields = {"samples": 1, "extreme": 0.5, "candidates": 2, "paths": 1, "keep_rule": "all"}
    pools = heal(hint_mode="bridge_step", parts=("base", "repair"), **fields).pools(lab)
    assert [t.text for t in pools["repair"]["p"]] == ["<think>\nuv\ny\n</think>\n7"]
    assert lab.notes["gear"]["bridge is no step"] == 1


def test_a_sentence_put_into_the_think_is_cut_out_again() -> None:
    teacher = Teacher([surging(BAD, at=4)], lambda request, index: f"y{index}\n</think>\n7")
    lab = teacher.lab()
    method = heal(
        hint_mode="inline_think",
        samples=1,
        extreme=0.5,
        candidates=2,
        paths=1,
        keep_rule="all",
        parts=("base", "repair"),
    )
    pool = method.pools(lab)["repair"]["p"]
    assert all(
        "hint" not in r.prompt and "come to 7" in lab.teacher.decode(r.prefix)
        for r in teacher.asked
    )
    assert [t.text for t in pool] == [f"<think>\nab\ncd\nef\ny{i}\n</think>\n7" for i in range(2)]
    assert {t.prefix for t in pool} == {len("<think>\nab\ncd\nef\n")}


def test_problems_are_selected_by_the_teachers_pass_rate() -> None:
    right, wrong = RIGHT, BAD
    table = {
        "none": [wrong] * 8,
        "one": [right, *[wrong] * 7],
        "half": [right, wrong],
        "most": [right, right, wrong, right],
    }
    problems = [Problem(name, name, "7", verifier="exact") for name in table]
    mute = Problem("mute", "mute", None, tests="assert f()", verifier="code", domain="code")
    author = Scripted(
        {**table, "mute": ["none"]}, name="teacher", capabilities=("generate", "score"), scores=flat
    )
    lab = Workbench(
        author,
        {"teacher": lambda: author},
        [*problems, mute],
        Store(shared_store() / f"heal-{next(FRESH)}"),
        Ledger(),
        SAMPLING,
    )
    drawn = lab.samples(author, 8)

    def names(**fields: Any) -> list[list[str]]:
        return [[p.id for p in part] for part in heal(**fields).selected(lab, drawn)]

    assert names() == [["none", "one"], ["none"]]  # 1 of 8 is more than 1 of 30
    assert names(extreme=1 / 8) == [["none", "one"], ["none", "one"]]
    assert names(hard=1.0, extreme=0.5) == [
        ["none", "one", "half", "most"],
        ["none", "one", "half"],
    ]
    assert names(hard=0.0, extreme=1.0) == [[], []]
    assert lab.notes["problems"]["hard, without an answer to hint at"] == 0
    names()
    assert lab.notes["problems"]["hard, without an answer to hint at"] == 1


# PURE -----------------------------------------------------------------------------------------------------------------


def test_ratios_by_hand() -> None:
    log_ppl, uncertainty = np.array([0.5, 2.0]), np.array([1.5, 0.9, 0.09])  # U_0, U_1, U_2
    assert pure.ratio(log_ppl, uncertainty, "log_ratio", 0.1) == pytest.approx([0.5, 2 / 0.19])
    assert pure.ratio(log_ppl, uncertainty, "ratio", 0.1) == pytest.approx(
        [np.exp(0.5), np.exp(2) / 0.19]
    )
    assert pure.ratio(log_ppl, uncertainty, "jump", 0.1) == pytest.approx(
        [0.5 * 0.6 / 1.0, 2 * 0.81 / 0.19]
    )
    assert pure.ratio(log_ppl, uncertainty[::-1], "jump", 0.1) == pytest.approx(
        [0, 0]
    )  # U rises: no jump
    assert pure.ratio(log_ppl, uncertainty, "perplexity", 0.1) == pytest.approx(log_ppl)


def test_aggregates_by_hand() -> None:
    values = np.arange(1.0, 21.0)
    assert pure.aggregate(values, "max") == 20
    assert pure.aggregate(values, "top10pct_mean") == pytest.approx(19.5)  # two of twenty
    assert pure.aggregate(values[:3], "top10pct_mean") == 3
    assert pure.aggregate(np.array([]), "max") == -np.inf


def test_keep_rules_by_hand() -> None:
    names = ["a"] * 10 + ["b", "b", "c", "d", "e"]
    scores = [*range(10), 50, 51, 52, 53, 54]
    values = [np.array([float(score)]) for score in scores]
    # a has ten and loses its own two worst; b to e have five together and lose one
    stays = pure.kept(heal(lmbda=0.2), names, values)
    assert [scores[i] for i in np.flatnonzero(~stays)] == [8, 9, 54]
    stays = pure.kept(heal(lmbda=0.4), names, values)
    assert [scores[i] for i in np.flatnonzero(~stays)] == [6, 7, 8, 9, 53, 54]
    assert pure.kept(heal(keep_rule="log_threshold", lmbda=50.0), names, values).sum() == 11
    # Quartiles 1 and 2, fence 3.5: one step of four is an outlier in the first trace, two of four in the second.
    steps = [
        np.array([1.0, 1, 2, 9]),
        np.array([1.0, 2, 9, 9]),
        np.array([1.0, 1, 1, 2]),
        np.array([1.0, 1, 2, 2]),
    ]
    rule = {"keep_rule": "outlier_share", "lmbda": 0.3}
    assert pure.kept(heal(**rule), ["a"] * 4, steps).tolist() == [True, False, True, True]
    assert pure.kept(heal(**{**rule, "lmbda": 0.2}), ["a"] * 4, steps).tolist() == [
        False,
        False,
        True,
        True,
    ]


def scored(traces: Sequence[Trace], scores: Any, **fields: Any) -> list[np.ndarray | None]:
    return pure.anomalies(Teacher([""], None, scores=scores).lab(), heal(**fields), traces)


def trace_of(text: str, prefix: int = 0) -> Trace:
    problem = Problem("p", "6+1=?", "7", verifier="exact")
    return Trace(problem, (*text.encode(), 257), text, True, prefix=prefix)


LEAD = b"</think>\n"


def surprising(steps: dict[bytes, float], certain: dict[bytes, float], asked: list[Any]) -> Any:
    """Log-probabilities by line, and of the answer by the last line that stands before it; else -0.5 and -1."""

    def scores(prompt: Ids, response: Ids) -> Scores:
        asked.append((prompt, response))
        before = bytes(t for t in prompt if t < 256)
        if before.endswith(LEAD):
            last = before.removesuffix(LEAD).strip().split(b"\n")[-1]
            return Scores(
                (-certain.get(last, 1.0),) * len(response), (0.3, *(0.7,) * (len(response) - 1))
            )
        text, values = bytes(t for t in response if t < 256), []
        for line in text.splitlines(keepends=True):
            values += [-steps.get(line.strip(), 0.5)] * len(line)
        return Scores((*values, *(-0.5,) * (len(response) - len(values))), (0.0,) * len(response))

    return scores


def test_anomalies_by_hand() -> None:
    trace = trace_of("<think>\nab\ncde\nf\n</think>\n77")
    asked: list[Any] = []
    scores = surprising(
        {b"cde": 2.0}, {b"6+1=?<think>": 3.0, b"ab": 2.0, b"cde": 0.25, b"f": 0.09}, asked
    )
    # Step 1 holds the newline after <think> (a line of "<think>" by the script's reading): 0.5 all over.
    (found,) = scored([trace], scores, anomaly="log_ratio")
    assert found == pytest.approx([0.5 / 2.01, 2 / 0.26, 0.5 / 0.1])
    (found,) = scored([trace], scores, anomaly="jump", eps=0.25)
    assert found == pytest.approx([0.5 * 1 / 2.25, 2 * 1.75 / 0.5, 0.5 * 0.16 / 0.34])
    (found,) = scored([trace], scores, anomaly="ratio", exclude_last=1)
    assert found == pytest.approx([np.exp(0.5) / 2.01, np.exp(2) / 0.26])
    (found,) = scored([trace], scores, uncertainty="entropy")
    assert found == pytest.approx([0.5 / 0.51, 2 / 0.51, 0.5 / 0.51])  # (0.3 + 0.7) / 2
    (found,) = scored([trace], scores, uncertainty="first_token")
    assert found == pytest.approx([0.5 / 0.31, 2 / 0.31, 0.5 / 0.31])
    # From the repair point on: "<think>\nab\n" was given.
    (found,) = scored([replace(trace, prefix=11)], scores, anomaly="jump", eps=0.25)
    assert found == pytest.approx([2 * 1.75 / 0.5, 0.5 * 0.16 / 0.34])
    prompts = {bytes(t for t in prompt if t < 256) for prompt, _ in asked}
    assert all(prompt.startswith(b"6+1=?") and b"hint" not in prompt for prompt in prompts)
    assert {bytes(t for t in response if t < 256) for prompt, response in asked} == {
        trace.text.encode(),
        b"77",
    }


def test_mathematics_is_forced_into_a_box_after_the_think_is_closed() -> None:
    lab = Teacher([""], None).lab()
    problem = Problem("p", "p", "42", verifier="math")
    trace = Trace(problem, (), "<think>\na\n</think>\nSo \\boxed{42}.", True)
    lead, answer = (lab.teacher.decode(ids) for ids in pure.forced(lab, trace))
    assert (lead, answer) == ("</think>\n\nFinal answer: \\boxed{", "42")
    lead, answer = (
        lab.teacher.decode(ids) for ids in pure.forced(lab, replace(trace, text="So \\boxed{42}."))
    )
    assert (lead, answer) == ("\n\nFinal answer: \\boxed{", "42")


# The four tests of the specification: a genuine derivation against the same with its middle third replaced.


def shortcuts(num: int) -> list[tuple[Trace, Trace]]:
    found = []
    teacher = model("teacher")
    for problem in PROBLEMS["micro_math"].load("train", num, levels=(4, 5), families=("reduce",)):
        assert problem.solution and problem.answer
        lines = problem.solution.split("\n")
        body = lines[1 : lines.index("</think>")]
        third = len(body) // 3 or 1
        cut = [*body[:third], f"so {problem.answer}", *body[2 * third :]]
        short = "\n".join(["<think>", *cut, "</think>", problem.answer])
        found.append(
            tuple(
                Trace(problem, teacher.tokenize(text), text, True)
                for text in (problem.solution, short)
            )
        )
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("form", ["log_ratio", "ratio", "jump", "perplexity"])
def test_a_shortcut_is_more_anomalous_than_a_derivation(form: str) -> None:
    run = Run("sft", train=False)
    run.lab.models.loaded["teacher"] = model("teacher").freeze()
    pairs = shortcuts(40)
    values = pure.anomalies(run.lab, heal(anomaly=form), [t for pair in pairs for t in pair])
    scores = np.array([pure.aggregate(v, "max") for v in values if v is not None]).reshape(-1, 2)
    assert len(scores) == 40 and np.mean(scores[:, 1] > scores[:, 0]) >= 0.9


def test_the_number_of_steps_alone_changes_nothing() -> None:
    for num in (2, 5, 30):
        (found,) = scored([trace_of("<think>\n" + "ab\n" * num + "</think>\n7")], flat)
        assert found is not None and len(found) == num
        assert pure.aggregate(found, "max") == pytest.approx(0.5 / 0.51)
        assert pure.aggregate(found, "top10pct_mean") == pytest.approx(0.5 / 0.51)


def test_a_certain_answer_stays_finite() -> None:
    def certain(prompt: Ids, response: Ids) -> Scores:
        return Scores((0.0,) * len(response), (0.0,) * len(response))

    for form in ("log_ratio", "ratio", "jump", "perplexity"):
        (found,) = scored([trace_of("<think>\na\nb\n</think>\n7")], certain, anomaly=form)
        assert found is not None and np.isfinite(found).all()


@pytest.mark.parametrize(
    "rule", [{}, {"keep_rule": "outlier_share"}, {"keep_rule": "log_threshold", "lmbda": 2.0}]
)
def test_on_real_hints_some_stay_and_some_go(rule: dict[str, Any]) -> None:
    items = PROBLEMS["micro_math"].load("train", 12, levels=(6, 7), families=("reduce",))
    fields = {"samples": 4, "hints": 8, "hard": 1.0, "parts": ("base", "hint"), **LINES}
    run = Run("heal", {**fields, **rule}, items=items, train=False)
    assert 0 < run.lab.notes["hint"]["share of verified traces kept by PURE"] < 1


def test_only_what_saw_the_answer_is_filtered() -> None:
    items = PROBLEMS["micro_math"].load("train", 12, levels=(6, 7), families=("reduce",))
    runs = {
        rule: Run(
            "heal",
            {
                "samples": 4,
                "hints": 8,
                "hard": 1.0,
                "parts": ("base", "hint"),
                "keep_rule": rule,
                **LINES,
            },
            items=items,
            train=False,
        )
        for rule in ("reject_share", "all")
    }
    pools = {rule: run.method.pools(run.lab) for rule, run in runs.items()}  # type: ignore[attr-defined]
    assert pools["all"]["base"] == pools["reject_share"]["base"]
    assert sum(map(len, pools["all"]["hint"].values())) > sum(
        map(len, pools["reject_share"]["hint"].values())
    )


def test_a_cap_on_scoring_drops_what_it_leaves_unscored() -> None:
    teacher = Teacher([surging(BAD, at=4)], lambda request, index: f"x{index}\n</think>\n7")
    fields = {
        "samples": 1,
        "extreme": 0.5,
        "parts": ("base", "repair"),
        "paths": 1,
        "candidates": 8,
    }
    free, capped = teacher.lab(), teacher.lab(ledger=Ledger({"teacher_scored": 100}))
    assert (
        len(heal(**fields).pools(free)["repair"]["p"]) == 7
    )  # nothing but the worst fifth is gone: 1 of 8
    assert heal(**fields).pools(capped)["repair"]["p"] == []
    assert capped.notes["repair"]["not scored, by a cap"] == 8


# PACE -----------------------------------------------------------------------------------------------------------------


def examples(name: str, num: int) -> list[Example]:
    return [Example(f"{name}{i}", (1,), (2,)) for i in range(num)]


PARTS = [("base", examples("b", 20)), ("hint", examples("h", 10)), ("repair", examples("r", 5))]


def legs(mode: str, replay: float = 0.2) -> list[tuple[str, list[str], float]]:
    made = pace.curriculum(PARTS, mode, replay, np.random.default_rng(3))
    return [(name, [e.problem for e in each], share) for name, each, share in made]


def test_increments_replay_a_part_of_what_came_before() -> None:
    base, hint, repair = legs("sequential_increment")
    assert [leg[0] for leg in (base, hint, repair)] == ["base", "hint", "repair"]
    # 20; 10 and 2 of the 20 before; 5 and 1 of the 30 before: 38 in all
    assert [len(leg[1]) for leg in (base, hint, repair)] == [20, 12, 6]
    assert [leg[2] for leg in (base, hint, repair)] == pytest.approx([20 / 38, 12 / 38, 6 / 38])
    assert {name[0] for name in hint[1]} == {"b", "h"} and sum(n[0] == "b" for n in hint[1]) == 2
    assert [len(leg[1]) for leg in legs("sequential_increment", replay=0.0)] == [20, 10, 5]


def test_the_other_modes() -> None:
    assert [len(leg[1]) for leg in legs("sequential_cumulative")] == [20, 30, 35]
    ((name, data, share),) = legs("data_only")
    assert (name, len(data), share) == ("data", 35, 1.0)
    turned = legs("reversed")
    assert [(leg[0], len(leg[1])) for leg in turned] == [("repair", 5), ("hint", 12), ("base", 24)]


# The whole ------------------------------------------------------------------------------------------------------------


def test_stages_are_named_and_share_the_budget() -> None:
    teacher = Teacher(
        [surging(BAD, at=4)] * 3 + [surging(RIGHT, at=0)],
        going_on,
    )
    lab = teacher.lab()
    method: Method = heal(
        samples=4, extreme=0.5, paths=1, candidates=5, hints=5, keep_rule="all", replay=0.0
    )
    stages = list(method.stages(lab))
    assert [stage.name for stage in stages] == ["base", "hint", "repair"]
    assert [stage.share for stage in stages] == pytest.approx([1 / 11, 5 / 11, 5 / 11])
    for stage in stages:
        assert isinstance(stage.source, OffPolicy)
        assert {lab.student.decode(e.prompt) for e in stage.source.examples} == {"6+1=?"}


def test_a_part_without_a_survivor_ends_the_run_before_it_trains() -> None:
    with pytest.raises(
        ValueError, match=r"stage 'repair' is empty.*'too few new steps': [1-9]"
    ) as error:
        Run("heal", {**TINY["heal"], "min_new_steps": 99})
    assert "'problems with a kept trace': 0" in str(error.value)


def test_costs_stand_in_the_ledger_by_purpose() -> None:
    teacher = Teacher([surging(BAD, at=4)], lambda request, index: "x\n</think>\n7")
    ledger = Ledger()
    lab = teacher.lab(ledger=ledger)
    list(heal(samples=1, extreme=0.5, paths=1, candidates=1, hints=1, min_new_steps=0).pools(lab))
    generated = ledger.summary()["purposes"]["teacher_generated"]
    assert generated == {
        "base": len(BAD) + 1,
        "hint": len("x\n</think>\n7") + 1,
        "repair": len("x\n</think>\n7") + 1,
    }
    assert (
        ledger.summary()["purposes"]["teacher_scored"]["scoring"]
        == ledger.charged["teacher_scored"]
        > 0
    )


def test_a_teacher_that_only_writes_has_its_traces_scored_for_entropy() -> None:
    """Without recorded entropies one pass under the bare prompt gives them: the same prefixes are kept."""
    surge = surging(BAD, at=4).entropies

    def scores(prompt: Ids, response: Ids) -> Scores:
        return Scores((-0.5,) * len(response), (surge or ())[: len(response)])

    teacher, lab = repaired({}, [BAD], scores=scores)
    assert set(prefixes_asked(teacher, lab)) == {"<think>\nab\ncd\nef\n"}


def test_the_papers_setting_differs_where_we_measured_otherwise() -> None:
    paper = registry.build("heal", registry.paper_recipe(Heal)["fields"])
    ours = Heal()
    changed = {name for name in Heal.model_fields if getattr(paper, name) != getattr(ours, name)}
    assert changed == {"search_fraction", "first_step", "anomaly", "exclude_last"}
    marked = {field.name for field in registry.fields(Heal) if "[measured]" in field.meaning}
    assert changed == marked
    assert all("[" in field.meaning for field in registry.fields(Heal))


def test_the_scorecard_reads_lines_as_steps() -> None:
    from methods.heal.scorecard import _step_of_line

    lab = Teacher([""], None).lab()
    trace = trace_of("<think>\na\n\nb\nc\nd\n</think>\n7")
    steps = [range(0, 11), range(11, 15)]  # a, b | c, d
    assert [_step_of_line(lab, trace, steps, line) for line in range(4)] == [1, 1, 2, 2]


@pytest.mark.parametrize("text", [
    "the given answer", "the reference final answer", "a known answer", "using the hint", "a hint says so",
    "the answer was given", "the answer provided", "We are told that the answer is 42", "we're told the final answer",
    "given the answer, go back", "For reference, the final answer is",
])  # fmt: skip
def test_texts_that_mention_the_answer_they_were_given(text: str) -> None:
    assert gear.LEAK.search(f"So {text} 42.")


@pytest.mark.parametrize("text", [
    "the answer is 7, as expected", "So the correct answer is 7", "type hints for f", "as the problem hints, use parity",
    "the sum is given",
])  # fmt: skip
def test_texts_that_do_not(text: str) -> None:
    assert not gear.LEAK.search(text)


def test_a_repair_from_scratch_is_no_hint_again() -> None:
    """Both ask the same; the repairs go on where the hints' sample indices end."""
    teacher = Teacher([surging(BAD, at=4)], going_on)
    lab = teacher.lab()
    fields = {
        "samples": 1,
        "hard": 1.0,
        "extreme": 0.5,
        "hints": 3,
        "paths": 1,
        "candidates": 2,
        "breakpoint": "start",
    }
    pools = heal(**fields, keep_rule="all").pools(lab)
    assert [t.text[8] for t in pools["hint"]["p"]] == ["x"] * 3
    assert [t.index for t in pools["hint"]["p"]] == [0, 1, 2]
    assert [t.index for t in pools["repair"]["p"]] == [3, 4]
    alone = heal(**fields, keep_rule="all", parts=("base", "repair")).pools(teacher.lab())
    assert [t.index for t in alone["repair"]["p"]] == [0, 1]


def test_the_cap_holds_for_every_part() -> None:
    teacher = Teacher(
        [surging(RIGHT, at=0), surging(BAD, at=4), surging(RIGHT, at=0), surging(BAD, at=2)],
        going_on,
    )
    lab = teacher.lab()
    fields = {
        "samples": 4,
        "hard": 1.0,
        "extreme": 0.5,
        "hints": 4,
        "paths": 2,
        "candidates": 3,
        "keep_rule": "all",
    }
    pools = heal(**fields, cap=2).pools(lab)
    assert {name: len(pool["p"]) for name, pool in pools.items()} == {
        "base": 1 + 1,
        "hint": 2,
        "repair": 2,
    }
    assert [t.index for t in heal(**fields, cap=1).pools(lab)["base"]["p"]] == [0]
    assert {t.index for t in pools["repair"]["p"]} == {0}  # one of each path before a second of any


def test_a_leak_in_what_was_kept_is_no_leak() -> None:
    unaided = BAD.replace("ab", "given answer")
    _, lab = repaired({"backup": 1}, [surging(unaided, at=4)])
    assert "mentions the answer it was given" not in lab.notes["repair"]  # type: ignore[attr-defined]


def test_problems_that_nothing_can_solve_are_not_repaired() -> None:
    items = [Problem("p", "p", "$", verifier="math"), Problem("q", "q", "", verifier="exact")]
    author = Scripted({"p": ["\\boxed{7}"], "q": ["7"]}, name="teacher")
    lab = Workbench(
        author,
        {"teacher": lambda: author},
        items,
        Store(shared_store() / f"heal-{next(FRESH)}"),
        Ledger(),
        SAMPLING,
    )
    assert heal().selected(lab, lab.samples(author, 2)) == ([], [])
    counts = lab.notes["problems"]
    assert (
        counts["with an answer that cannot be read"],
        counts["hard, without an answer to hint at"],
    ) == (1, 1)


def test_settings_that_contradict_each_other_are_refused() -> None:
    for fields, words in (
        ({"parts": ("hint",)}, "base is always one of them"),
        ({"anomaly": "random", "keep_rule": "outlier_share"}, "use reject_share"),
        ({"lmbda": 2.0}, "is no share"),
    ):
        with pytest.raises(ValueError, match=words):
            registry.build("heal", fields)


def test_random_controls_are_functions_of_what_they_serve() -> None:
    items = PROBLEMS["micro_math"].load("train", 12, levels=(6, 7), families=("reduce",))
    fields = {**TINY["heal"], "hints": 8, "cap": 30, "anomaly": "random", "breakpoint": "random"}
    one, again, other = (
        Run("heal", fields, items=items, seed=seed, train=False) for seed in (0, 0, 1)
    )
    assert one.examples == again.examples and one.examples != other.examples
    assert (
        one.lab.notes["gear"] == other.lab.notes["gear"]
        and other.ledger.spent["teacher_generated"] == 0
    )
    dropped = one.lab.notes["hint"]["verified"] - one.lab.notes["hint"]["kept by PURE"]
    assert dropped == int(0.2 * one.lab.notes["hint"]["verified"]) > 0


def test_the_scorecard_on_the_micro_world() -> None:
    items = PROBLEMS["micro_math"].load("train", 24, levels=(6, 7), families=("reduce",))
    fields = {
        "samples": 4,
        "hints": 4,
        "paths": 2,
        "candidates": 4,
        "hard": 1.0,
        "extreme": 0.5,
        **LINES,
    }
    run = Run("heal", fields, items=items, train=False)
    rows = run.method.mechanisms(run.lab)

    def mean(name: str) -> float:
        return float(np.mean(rows[name].values))  # type: ignore[union-attr]

    sides = [
        f"breakpoint: {side}" for side in ("at the first invalid step", "before it", "after it")
    ]
    assert sum(map(mean, sides)) == pytest.approx(1)
    # As set is: the largest surge of the whole trace, step 1 too.
    twin = "largest surge, whole trace, step 1 too: at the first invalid step"
    assert rows[sides[0]] == rows[twin]
    assert (
        mean("largest surge, whole trace: before it") <= 1
        and "repairs: verified traces that PURE keeps" in rows
    )
    assert mean("hints: problems with a verified and valid trace") <= mean(
        "hints: problems with a verified trace"
    )
    random = Run(
        "heal", {**fields, "breakpoint": "random", "anomaly": "random"}, items=items, train=False
    )
    others = random.method.mechanisms(random.lab)
    assert (
        others[twin] == rows[twin]
        and others[sides[0]] == others["random step, whole trace: at the first invalid step"]
    )
    told = rows["hints: AUC for an invalid or skipped step, perplexity alone"]
    assert told.labels and len(told.labels) == len(told.values) == len(told.problems)  # type: ignore[union-attr]


def test_a_prefix_that_ends_inside_a_step_leaves_the_rest_to_be_scored() -> None:
    asked: list[Any] = []
    trace = trace_of("<think>\nab\ncdef\n</think>\n7", prefix=len("<think>\nab\ncd"))

    def scores(prompt: Ids, response: Ids) -> Scores:
        asked.append(bytes(t for t in prompt if t < 256))
        values = [-float(i) for i in range(len(response))]
        return Scores(tuple(values), (0.0,) * len(response))

    (found,) = scored([trace], scores, anomaly="perplexity")
    # Of the step "cdef\n" (tokens 11 to 15) only 13, 14 and 15 are new.
    assert found == pytest.approx([14.0])
    (found,) = scored([trace], scores, anomaly="jump")
    assert any(
        prompt.endswith(b"<think>\nab\ncd</think>\n") for prompt in asked
    )  # U before it: where the text stood


def test_a_sentence_from_scratch_stands_inside_the_think() -> None:
    teacher = Teacher(
        [surging("<think>\nab\n</think>\n8", at=1)], lambda request, index: "y\n</think>\n7"
    )
    lab = teacher.lab()
    method = heal(
        hint_mode="inline_think",
        samples=1,
        extreme=0.5,
        candidates=1,
        paths=1,
        keep_rule="all",
        parts=("base", "repair"),
    )
    (trace,) = method.pools(lab)["repair"]["p"]
    assert (trace.text, trace.prefix) == ("<think>\ny\n</think>\n7", 0)


def test_entropies_are_asked_for_only_where_they_decide() -> None:
    for fields, scored_tokens in (
        ({"breakpoint": "random"}, 0),
        ({"breakpoint": "start"}, 0),
        ({}, 2),
    ):
        asked: list[Any] = []

        def scores(prompt: Ids, response: Ids, asked: list[Any] = asked) -> Scores:
            asked.append(response)
            return flat(prompt, response)

        repaired({**fields, "keep_rule": "all"}, [BAD, RIGHT], scores=scores)
        assert len(asked) == scored_tokens, fields
