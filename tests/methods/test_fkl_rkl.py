"""The two uniform KLs: which text, which loss, which samples."""

from __future__ import annotations

import pytest

from harness import registry
from harness.objectives import forward_kl, reverse_kl
from harness.types import OffPolicy, OnPolicy
from tests.benches import answer, listen, scripted

RIGHT, WRONG, AGAIN = answer("7"), answer("8"), answer("7", think="2")
TEACHER = {"first": [RIGHT, AGAIN], "second": [WRONG, AGAIN], "never": [WRONG, WRONG]}


def test_forward_takes_the_first_verified_response() -> None:
    lab = scripted(TEACHER)

    def texts(**fields: object) -> dict[str, str]:
        (stage,) = registry.build("fkl", fields).stages(lab)
        assert isinstance(stage.source, OffPolicy) and stage.objective == forward_kl
        assert {e.weight for e in stage.source.examples} == {1.0}
        return {e.problem: lab.student.decode(e.response) for e in stage.source.examples}

    assert texts() == {"first": RIGHT}
    assert texts(references=2) == {"first": RIGHT, "second": AGAIN}
    assert lab.notes["references"] == {"kept": 2, "no verified response": 1}
    wrong = {"first": RIGHT, "second": WRONG, "never": WRONG}
    assert texts(references=2, keep_wrong_teacher=True) == wrong


def test_reverse_samples_the_student_at_temperature_one(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = scripted(TEACHER, {name: [WRONG] for name in TEACHER})
    asked = listen(lab, monkeypatch)
    (stage,) = registry.build("rkl", {}).stages(lab)
    assert isinstance(stage.source, OnPolicy) and stage.objective == reverse_kl
    assert stage.source.problems == lab.problems
    made = stage.source.make(lab.problems[1:])
    assert [(e.problem, lab.student.decode(e.response)) for e in made] == [
        ("second", WRONG),
        ("never", WRONG),
    ]
    assert [(s.temperature, s.top_p, s.top_k) for s in asked] == [(1.0, 1.0, 0)]


@pytest.mark.parametrize("name", ["fkl", "rkl"])
def test_reductions_are_named_as_in_papers(name: str) -> None:
    lab = scripted(TEACHER)
    means = {}
    for reduction in ("seq_mean", "token_mean", "sum"):
        (stage,) = registry.build(name, {"reduction": reduction}).stages(lab)
        means[reduction] = stage.mean
    assert means == {"seq_mean": "sequence", "token_mean": "token", "sum": "sum"}
    (stage,) = registry.build(name, {}).stages(lab)
    assert stage.mean == "sequence"
