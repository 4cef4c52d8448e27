"""Rejection-sampling SFT: which traces survive, and why the others do not."""

from __future__ import annotations

from typing import Any

from harness import registry
from harness.models.scripted import Reply
from harness.types import Example, Lab, OffPolicy, Problem
from harness.verifiers import rejection
from methods.baselines.sft import SFT
from tests.benches import answer, scripted


def trained_on(lab: Lab, **fields: Any) -> list[Example]:
    (stage,) = registry.build("sft", fields).stages(lab)
    assert isinstance(stage.source, OffPolicy)
    return list(stage.source.examples)


def texts(lab: Lab, examples: list[Example]) -> list[tuple[str, str]]:
    return [(e.problem, lab.student.decode(e.response)) for e in examples]


RIGHT, WRONG = answer("7"), answer("8")
LONG = answer("7", think="1\n2\n3")


def test_each_rejection_has_its_reason() -> None:
    open_think = "<think>\n1\n7"
    table = {
        "p": [
            RIGHT,
            WRONG,
            Reply(RIGHT, finished=False),
            open_think,
            answer("7", think="a</think><think>b"),
            "7</think>7",
            answer("seven"),
        ]
    }
    lab = scripted(table)
    (traces,) = lab.samples(lab.teacher, 7)
    assert [rejection(trace) for trace in traces] == [
        None,
        "wrong",
        "truncated",
        "think not closed",
        "more than one think",
        "think not opened",
        "unparsed",
    ]
    trained_on(lab, samples=7)
    counts = lab.notes["traces"]
    assert counts["kept"] == 1 and counts["truncated"] == 1 and counts["wrong"] == 1


def test_a_template_that_opens_the_think_leaves_it_to_be_closed() -> None:
    lab = scripted({"p": ["1</think>7", RIGHT]})
    ((closed, both),) = lab.samples(lab.teacher, 2)
    assert rejection(closed) == "think not opened"
    assert rejection(closed, template_opens=True) is None
    assert rejection(both, template_opens=True) == "think not closed"


def test_first_goes_by_the_sample_index_and_shortest_by_length() -> None:
    table = {"p": [WRONG, LONG, RIGHT], "q": [RIGHT, LONG, WRONG]}
    lab = scripted(table)
    assert texts(lab, trained_on(lab, samples=3)) == [("p", LONG), ("q", RIGHT)]
    assert texts(lab, trained_on(lab, samples=3, choose="shortest")) == [("p", RIGHT), ("q", RIGHT)]
    both = [("p", LONG), ("p", RIGHT), ("q", RIGHT), ("q", LONG)]
    assert texts(lab, trained_on(lab, samples=3, keep=9)) == both
    drawn = texts(lab, trained_on(lab, samples=3, keep=9, choose="random"))
    assert sorted(drawn) == sorted(both)


def test_a_difficulty_band_is_on_the_pass_rate() -> None:
    table = {"none": [WRONG] * 4, "one": [RIGHT, WRONG, WRONG, WRONG], "all": [RIGHT] * 4}
    lab = scripted(table)
    assert [e.problem for e in trained_on(lab, samples=4, max_pass=0.5)] == ["one"]
    assert [e.problem for e in trained_on(lab, samples=4, min_pass=0.5)] == ["all"]
    assert [e.problem for e in trained_on(lab, samples=4)] == ["one", "all"]
    assert lab.notes["traces"]["problems without a trace"] == 1


def test_problems_that_the_teacher_hardly_solves_are_sampled_further() -> None:
    table = {
        "late": [WRONG, WRONG, WRONG, RIGHT, LONG],
        "once": [RIGHT, WRONG, LONG, WRONG, WRONG],
        "both": [RIGHT, LONG, RIGHT, RIGHT, RIGHT],
    }
    lab = scripted(table)
    fields = {"samples": 2, "keep": 9}
    assert [e.problem for e in trained_on(lab, **fields)] == ["once", "both", "both"]
    assert texts(lab, trained_on(lab, **fields, more=3)) == [
        *[("late", RIGHT), ("late", LONG)],
        *[("once", RIGHT), ("both", RIGHT), ("both", LONG)],
    ]
    assert lab.notes["problems sampled further"] == 1
    found = [e.problem for e in trained_on(lab, **fields, more=1, more_at=0.5)]
    assert found == [
        "once",
        "once",
        "both",
        "both",
    ]  # the first right answer to "late" is its fourth


def test_equal_problem_texts_train_once() -> None:
    items = [
        Problem(name, text, "7", verifier="exact")
        for name, text in (("a", "2 + 5"), ("b", "2  +  5"), ("c", "1+6"))
    ]
    table = {name: [RIGHT] for name in "abc"}
    lab = scripted(table, items=items)
    assert [e.problem for e in trained_on(lab, samples=1)] == ["a", "c"]
    assert [e.problem for e in trained_on(lab, samples=1, dedup="none")] == ["a", "b", "c"]


def test_loss_on_all_puts_the_prompt_under_the_loss() -> None:
    lab = scripted({"p": [RIGHT]})
    (bare,), (whole,) = trained_on(lab, samples=1), trained_on(lab, samples=1, loss_on="all")
    assert (*bare.prompt, *bare.response) == (*whole.prompt, *whole.response)
    assert len(whole.prompt) == 1 and whole.num_loss_tokens == len(bare.prompt) - 1 + len(
        bare.response
    )


def test_data_trains_on_the_problems_own_solutions() -> None:
    items = [Problem("a", "a", "7", solution="so 7"), Problem("b", "b", "7")]
    lab = scripted({"a": [], "b": []}, items=items)
    examples = trained_on(lab, responses="data")
    assert texts(lab, examples) == [("a", "so 7")]
    assert lab.notes["solutions"] == {"given": 1, "missing": 1}


def test_an_unreadable_gold_answer_is_skipped_and_not_wrong() -> None:
    items = [Problem("a", "a", "$", verifier="math"), Problem("b", "b", "7", verifier="math")]
    lab = scripted(
        {"a": [r"<think></think>\boxed{7}"], "b": [r"<think></think>\boxed{7}"]}, items=items
    )
    assert [e.problem for e in trained_on(lab, samples=1)] == ["b"]
    assert lab.notes["traces"]["gold answer not readable"] == 1


def test_the_defaults_are_open_r1s() -> None:
    assert (SFT().samples, SFT().keep, SFT().choose) == (4, 1, "first")
