"""PACED: the weight, its normalisations, and what weight 0 costs, by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from harness import registry
from harness.objectives import forward_kl, reverse_kl
from harness.types import Lab, OffPolicy, OnPolicy, Stage
from methods.paced import Paced, beta_kernel, kernel_peak
from tests.benches import Run, answer, scripted

RIGHT, WRONG = answer("7"), answer("8")
# Pass rates 0, 1/4, 1/2 and 1 over four rollouts.
STUDENT = {
    "never": [WRONG] * 4,
    "rarely": [RIGHT, WRONG, WRONG, WRONG],
    "half": [RIGHT, RIGHT, WRONG, WRONG],
    "always": [RIGHT] * 4,
}
TEACHER = {name: [WRONG, RIGHT] for name in STUDENT}


def stages(lab: Lab, **fields: Any) -> list[Stage]:
    return list(registry.build("paced", {"rollouts": 4, "references": 2, **fields}).stages(lab))


def weights(stage: Stage) -> dict[str, float]:
    assert isinstance(stage.source, OffPolicy)
    return {example.problem: example.weight for example in stage.source.examples}


def test_the_kernel_by_hand() -> None:
    p = np.array([0, 1, 2, 4, 7, 8]) / 8
    assert beta_kernel(p, 1, 1) == pytest.approx([0, 0.109375, 0.1875, 0.25, 0.109375, 0])
    assert beta_kernel(p, 2, 1) == pytest.approx(
        [0, 7 / 512, 12 / 256, 0.125, 49 / 512, 0]
    )  # p^2 (1-p)
    assert beta_kernel(p, 0, 1) == pytest.approx(1 - p)
    assert beta_kernel(p, 0, 0) == pytest.approx(np.ones(6))


def test_the_peak_is_at_alpha_over_alpha_plus_beta() -> None:
    grid = np.linspace(0, 1, 3001)
    for alpha, beta in ((1, 1), (2, 1), (0.5, 2.5)):
        assert grid[beta_kernel(grid, alpha, beta).argmax()] == pytest.approx(
            alpha / (alpha + beta), abs=1e-3
        )
        assert kernel_peak(alpha, beta) == pytest.approx(
            beta_kernel(grid, alpha, beta).max(), abs=1e-6
        )
    assert kernel_peak(1, 1) == 0.25 and kernel_peak(0, 0) == 1


def test_weights_of_problems_by_hand() -> None:
    lab = scripted(TEACHER, STUDENT)
    # w = p^2 (1-p): 0, 3/64, 8/64, 0; mean 11/256
    forward, _ = stages(lab, alpha=2.0)
    assert weights(forward) == pytest.approx(
        {"never": 0, "rarely": 12 / 11, "half": 32 / 11, "always": 0}
    )
    raw, _ = stages(lab, alpha=2.0, norm="none")
    assert weights(raw) == pytest.approx(
        {"never": 0, "rarely": 3 / 64, "half": 8 / 64, "always": 0}
    )
    top, _ = stages(lab, norm="max1")  # 4 p (1-p)
    assert weights(top) == pytest.approx({"never": 0, "rarely": 0.75, "half": 1, "always": 0})
    step, _ = stages(lab, norm="batch_sum1")
    assert step.normalise == "step" and raw.normalise == "none"


def test_the_reference_is_the_first_verified_response() -> None:
    lab = scripted(TEACHER, STUDENT)
    forward, _ = stages(lab)
    assert isinstance(forward.source, OffPolicy)
    live = [e for e in forward.source.examples if e.weight]
    assert {lab.student.decode(e.response) for e in live} == {RIGHT}
    assert lab.notes["references"] == {"weight 0": 2, "kept": 2}
    any_, _ = stages(lab, keep_wrong_teacher=True)
    assert isinstance(any_.source, OffPolicy)
    assert {lab.student.decode(e.response) for e in any_.source.examples if e.weight} == {WRONG}
    one, _ = stages(lab, references=1, alpha=1.0)
    assert isinstance(one.source, OffPolicy) and not any(e.weight for e in one.source.examples)
    assert lab.notes["references"]["no verified response"] == 2


def test_zeros_stay_in_the_order_unless_dropped() -> None:
    lab = scripted(TEACHER, STUDENT)
    forward, reverse = stages(lab)
    assert len(weights(forward)) == 4
    assert isinstance(reverse.source, OnPolicy) and len(reverse.source.problems) == 4
    forward, reverse = stages(lab, drop_zeros=True)
    assert set(weights(forward)) == {"rarely", "half"}
    assert isinstance(reverse.source, OnPolicy)
    assert [p.id for p in reverse.source.problems] == ["rarely", "half"]
    made = reverse.source.make(lab.problems)
    assert [(e.problem, e.weight) for e in made if e.weight == 0] == [("never", 0), ("always", 0)]


def test_order_and_shares_of_the_schedule() -> None:
    lab = scripted(TEACHER, STUDENT)
    first, second = stages(lab, switch=0.25)
    assert (first.objective, first.share, first.optimizer) == (forward_kl, 0.25, "keep")
    assert (second.objective, second.share, second.optimizer) == (reverse_kl, 0.75, "reset")
    assert [s.name for s in stages(lab, schedule="rkl_then_fkl")] == ["reverse", "forward"]
    (only,) = stages(lab, schedule="rkl")
    assert only.share == 1 and only.objective == reverse_kl
    assert [s.mean for s in stages(lab, reduction="token_mean")] == ["token", "token"]


def test_a_student_without_a_frontier_is_refused() -> None:
    lab = scripted(TEACHER, {name: [WRONG] for name in TEACHER})
    with pytest.raises(ValueError, match=r"every problem has weight 0: pass rates are \[0\.0\]"):
        stages(lab)


def test_problems_of_weight_zero_cost_no_teacher_and_no_rollouts() -> None:
    run = Run("paced", {"rollouts": 4, "references": 4})
    weight = {e.problem: e.weight for e in run.examples[0]}
    zeros = [name for name, w in weight.items() if w == 0]
    assert zeros and len(zeros) < len(weight)
    assert all(
        e.response == () for examples in run.examples for e in examples if e.problem in zeros
    )


def test_the_defaults_are_version_threes() -> None:
    assert (Paced().alpha, Paced().beta, Paced().rollouts, Paced().switch) == (1, 1, 8, 0.5)
