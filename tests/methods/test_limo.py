"""LIMO: the difficulty band, the four features, and the ranking, on numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from harness import registry
from harness.types import Lab, OffPolicy
from methods.baselines.limo import LIMO
from tests.benches import answer, scripted

RIGHT, WRONG = answer("7"), answer("8")


def chosen(lab: Lab, **fields: Any) -> list[tuple[str, str]]:
    (stage,) = registry.build("limo", fields).stages(lab)
    assert isinstance(stage.source, OffPolicy)
    return [(e.problem, lab.student.decode(e.response)) for e in stage.source.examples]


def test_features_by_hand() -> None:
    text = (
        "Perhaps we check since it might work, since sincere checks are mighty; therefore VERIFY."
    )
    # 14 words; check, verify; perhaps, might; since, since, therefore ("sincere", "checks", "mighty" are other words)
    assert len(text.split()) == 14
    assert LIMO().features(text) == pytest.approx([14, 2 / 14, 2 / 14, 3 / 14])


def test_doubling_a_text_doubles_the_first_feature_only() -> None:
    text = "check this since it might be"
    one, two = LIMO().features(text), LIMO().features(f"{text} {text}")
    assert two == pytest.approx([2 * one[0], *one[1:]])


def test_scores_by_hand() -> None:
    texts = ["a b", "check b c d", "a b c d e f"]
    # f1 = 2, 4, 6: z = -1.2247, 0, 1.2247; f2 = 0, 1/4, 0: z = -.7071, 1.4142, -.7071; f3, f4 never vary: 0
    expected = [0.3 * -1.22474 + 0.2 * -0.70711, 0.2 * 1.41421, 0.3 * 1.22474 + 0.2 * -0.70711]
    assert LIMO().scores(texts) == pytest.approx(expected, abs=1e-4)
    # min-max: f1 = 0, .5, 1; f2 = 0, 1, 0
    assert LIMO(normaliser="minmax").scores(texts) == pytest.approx([0, 0.35, 0.3])
    assert LIMO(normaliser="none").scores(texts) == pytest.approx([0.6, 1.25, 1.8])
    assert sum(LIMO().weights) == pytest.approx(1)


def test_the_band() -> None:
    """Kept iff the student never succeeds and the teacher does 1 to 3 times in 32."""
    table = {f"t{k}": [RIGHT] * k + [WRONG] * (32 - k) for k in (0, 1, 2, 3, 4, 32)}
    student = {**{name: [WRONG] for name in table}, "t2": [WRONG, WRONG, RIGHT, WRONG]}
    lab = scripted(table, student)
    assert sorted(name for name, _ in chosen(lab)) == ["t1", "t3"]
    assert lab.notes["selection"] == {
        "problems the student solves": 1,
        "problems outside the teacher's band": 3,
        "problems in the pool": 2,
        "candidate chains": 4,
        "kept": 2,
    }
    assert "whole pool of 2" in lab.notes["keep"]
    assert sorted(name for name, _ in chosen(lab, weak_max=1)) == ["t1", "t2", "t3"]


def test_the_best_chain_of_a_problem_and_the_best_of_all() -> None:
    low, high = answer("7", "a"), answer("7", "check a since b might c")
    table = {"p": [low, high, WRONG], "q": [low, WRONG, low], "r": [WRONG] * 3}
    fields = {
        "weak_k": 1,
        "strong_k": 3,
        "words": {"a": ("check",), "b": ("might",), "c": ("since",)},
    }
    lab = scripted(table, {name: [WRONG] for name in table})
    assert chosen(lab, **fields) == [("p", high), ("q", low)]
    assert chosen(lab, **fields, keep=1) == [("p", high)]
    assert len(chosen(lab, **fields, one_per_problem=False)) == 4


def test_equal_scores_go_by_problem_id_then_sample_index() -> None:
    table = {name: [RIGHT, WRONG] for name in ("b", "c", "a")}
    lab = scripted(table, {name: [WRONG] for name in table})
    assert [name for name, _ in chosen(lab, weak_k=1, strong_k=2)] == ["a", "b", "c"]


def test_wrong_chains_are_candidates_only_when_asked() -> None:
    lab = scripted({"p": [RIGHT, WRONG]}, {"p": [WRONG]})
    fields = {"weak_k": 1, "strong_k": 2, "one_per_problem": False}
    assert len(chosen(lab, **fields)) == 1
    assert len(chosen(lab, **fields, require_correct=False)) == 2


def test_no_candidates_score_nothing() -> None:
    assert LIMO().scores([]).shape == (0,) and isinstance(LIMO().scores([]), np.ndarray)
