"""The hard filter: who is inside the band, and what the others cost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from harness import registry
from harness.objectives import forward_kl, reverse_kl
from harness.types import Lab, OffPolicy, OnPolicy, Stage
from methods.baselines.hard_filter import inside
from tests.benches import answer, listen, scripted

RIGHT, WRONG = answer("7"), answer("8")
# Pass rates 0, 1/4, 1/2 and 1 over four rollouts.
STUDENT = {
    "never": [WRONG] * 4,
    "rarely": [RIGHT, WRONG, WRONG, WRONG],
    "half": [RIGHT, RIGHT, WRONG, WRONG],
    "always": [RIGHT] * 4,
}
TEACHER = {name: [RIGHT] for name in STUDENT}


def stage(lab: Lab, **fields: Any) -> Stage:
    (only,) = registry.build("hard_filter", {"rollouts": 4, **fields}).stages(lab)
    return only


def trained(lab: Lab, **fields: Any) -> list[str]:
    source = stage(lab, **fields).source
    if isinstance(source, OnPolicy):
        return [problem.id for problem in source.problems]
    assert {example.weight for example in source.examples} == {1.0}
    return [example.problem for example in source.examples]


def test_the_band_by_hand() -> None:
    p = np.array([0, 1, 2, 5, 7, 8]) / 8
    assert inside(p, 0.0, 1.0, "exclusive").tolist() == [False, True, True, True, True, False]
    assert inside(p, 0.0, 1.0, "inclusive").all()
    assert inside(p, 0.25, 0.875, "inclusive").tolist() == [False, False, True, True, True, False]
    assert inside(p, 0.25, 0.875, "exclusive").tolist() == [False, False, False, True, False, False]


@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_only_problems_inside_are_in_the_loader(kl: str) -> None:
    lab = scripted(TEACHER, STUDENT)
    assert trained(lab, kl=kl) == ["rarely", "half"]
    assert trained(lab, kl=kl, low=0.25, high=0.5, bounds="inclusive") == ["rarely", "half"]
    assert trained(lab, kl=kl, low=0.25, high=1.0) == ["half"]
    assert trained(lab, kl=kl, low=0.5, bounds="inclusive") == ["half", "always"]
    assert trained(lab, kl=kl, high=0.25, bounds="inclusive") == ["never", "rarely"]


def test_what_it_kept_is_noted_and_the_teacher_writes_nothing_else() -> None:
    lab = scripted(TEACHER, STUDENT)
    assert isinstance(stage(lab).source, OffPolicy) and stage(lab).objective == forward_kl
    assert lab.notes["problems"] == {"kept": 2, "filtered out": 2}
    assert lab.notes["pass rates"]["counts"] == [1, 1, 1, 0, 1]
    assert lab.notes["references"] == {"weight 0": 2, "kept": 2}


def test_reverse_needs_no_text_of_the_teacher() -> None:
    lab = scripted(TEACHER, STUDENT)
    assert stage(lab, kl="reverse").objective == reverse_kl
    assert lab._ledger.charged["teacher_generated"] == 0
    build = registry.build
    assert build("hard_filter", {"kl": "reverse"}).required() == {"teacher.logits"}
    assert build("hard_filter", {}).required() == {"teacher.generate", "teacher.logits"}


def test_rollouts_are_paceds(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = scripted(TEACHER, STUDENT)
    asked = listen(lab, monkeypatch)
    source = stage(lab, kl="reverse").source
    assert isinstance(source, OnPolicy)
    source.make(source.problems)
    assert [(s.n, s.temperature, s.top_p, s.top_k) for s in asked] == [(4, 1, 1, 0), (1, 1, 1, 0)]


def test_wrong_references_only_if_asked() -> None:
    lab = scripted({**TEACHER, "half": [WRONG]}, STUDENT)
    assert trained(lab) == ["rarely"]
    assert trained(lab, keep_wrong_teacher=True) == ["rarely", "half"]


def test_nothing_left_says_what_was_found_and_what_to_do() -> None:
    lab = scripted(TEACHER, STUDENT)
    with pytest.raises(
        ValueError, match=r"no problem has a pass rate in \(0\.6, 1\): they are "
    ) as e:
        stage(lab, low=0.6)
    assert "[0.0, 0.25, 0.5, 1.0] over 4 rollouts; widen low and high" in str(e.value)


@pytest.mark.parametrize(
    ("fields", "band"),
    [
        ({"low": 0.8, "high": 0.2, "bounds": "inclusive"}, "[0.8, 0.2]"),
        ({"low": 0.5, "high": 0.5}, "(0.5, 0.5)"),
    ],
)
def test_a_band_without_room_is_refused(fields: dict[str, Any], band: str) -> None:
    with pytest.raises(ValueError) as e:
        registry.build("hard_filter", fields)
    assert f"low: no pass rate lies in {band}; take a low below high" in str(e.value)
    assert "\n" not in str(e.value)
    assert registry.build("hard_filter", {"low": 0.5, "high": 0.5, "bounds": "inclusive"})
