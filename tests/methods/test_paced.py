"""PACED: the weight, its normalisations, and what weight 0 costs, by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness import registry
from harness.config import Budget
from harness.ledger import Ledger
from harness.objectives import forward_kl, reverse_kl
from harness.types import Lab, OffPolicy, OnPolicy, Problem, Stage
from methods.paced import Paced, beta_kernel, kernel_peak
from tests.benches import Cut, Run, answer, listen, scripted

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
    peak, _ = stages(lab, norm="max1", alpha=2.0)  # p^2 (1-p) is 4/27 at its peak, p = 2/3
    assert weights(peak) == pytest.approx(
        {"never": 0, "rarely": 81 / 256, "half": 27 / 32, "always": 0}
    )
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


def test_problems_of_weight_zero_cost_no_teacher_and_no_rollouts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lab = scripted(TEACHER, STUDENT)
    asked: list[tuple[str, list[str]]] = []
    for model in (lab.student, lab.teacher):
        generate = model.generate

        def heard(
            requests: Any, sampling: Any, model: Any = model, generate: Any = generate
        ) -> Any:
            asked.append((model.name, [request.problem.id for request in requests]))
            return generate(requests, sampling)

        monkeypatch.setattr(model, "generate", heard)
    forward, reverse = stages(lab, alpha=2.0)
    assert asked == [("student", [*TEACHER]), ("teacher", ["rarely", "half"])]
    assert isinstance(reverse.source, OnPolicy)
    made = reverse.source.make(lab.problems)
    assert asked[2:] == [("student", ["rarely", "half"])]
    assert isinstance(forward.source, OffPolicy)
    for examples in (forward.source.examples, made):
        assert [e.problem for e in examples] == [*TEACHER]
        assert [e.response != () for e in examples] == [False, True, True, False]


def test_the_defaults_are_version_threes() -> None:
    assert (Paced().alpha, Paced().beta, Paced().rollouts, Paced().switch) == (1, 1, 8, 0.5)


def test_zeros_that_are_dropped_do_not_count_in_the_mean() -> None:
    lab = scripted(TEACHER, STUDENT)
    # w = p^2 (1-p): 3/64 and 8/64 are left; mean 11/128
    forward, _ = stages(lab, alpha=2.0, drop_zeros=True)
    assert weights(forward) == pytest.approx({"rarely": 6 / 11, "half": 16 / 11})


def test_smoothing_by_hand() -> None:
    lab = scripted(TEACHER, STUDENT)
    # p = (c + 1/2) / 5: 0.1, 0.3, 0.5, 0.9
    smooth, _ = stages(lab, smoothing=0.5, alpha=2.0, norm="none")
    expected = {"never": 0.009, "rarely": 0.063, "half": 0.125, "always": 0.081}
    assert weights(smooth) == pytest.approx(expected)


def test_the_students_text_is_its_own_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pass rates and rollouts at temperature 1, whatever the suite's sampling says."""
    lab = scripted(TEACHER, STUDENT)
    asked = listen(lab, monkeypatch)
    _, reverse = stages(lab)
    assert isinstance(reverse.source, OnPolicy)
    reverse.source.make(lab.problems)
    assert len(asked) >= 2
    assert {(s.temperature, s.top_p, s.top_k) for s in asked} == {(1.0, 1.0, 0)}


def test_pass_rates_are_estimated_once_for_all_who_ask(tmp_path: Path) -> None:
    first = Run("paced", {"rollouts": 4, "references": 4, "schedule": "fkl"}, store=tmp_path)
    other = Run("hard_filter", {"rollouts": 4, "references": 4}, store=tmp_path)
    cost = first.ledger.charged["student_generated"]
    assert cost > 0 and first.ledger.spent["student_generated"] >= cost
    assert other.ledger.charged["student_generated"] == cost
    assert other.ledger.spent["student_generated"] == 0
    assert other.lab.notes["pass rates"] == first.lab.notes["pass rates"]


# -- measuring again ----------------------------------------------------------------------------

AGAIN: dict[str, Any] = {"rollouts": 4, "references": 4, "reestimate_every": 1.0, "smoothing": 0.5}


def test_pass_rates_are_measured_again_after_every_epoch() -> None:
    # 24 problems in steps of 8: an epoch is three steps, and half of eleven is six
    run = Run("paced", AGAIN, steps=11)
    assert [s.name for s in run.stages] == ["forward", "forward 2", "reverse", "reverse 2"]
    assert [s["steps"] for s in run.trainer.state.stages] == [3, 3, 3, 2]
    assert [s.optimizer for s in run.stages] == ["keep", "keep", "reset", "keep"]
    rates = [
        value
        for name, value in run.lab.notes.items()
        if name.startswith("pass rates") and "edges" in str(value)
    ]
    assert len(rates) == 3  # at the start and within each stage; the switch takes what is there
    by_leg = [{e.problem: e.weight for e in examples} for examples in run.examples]
    assert by_leg[0] != by_leg[1] != by_leg[3] and by_leg[1] != by_leg[0]
    assert run.trainer.consumed == pytest.approx(1)


def test_legs_are_as_long_as_they_say() -> None:
    run = Run("paced", {**AGAIN, "schedule": "fkl", "reestimate_every": 2.0}, steps=14)
    assert [s["steps"] for s in run.trainer.state.stages] == [6, 6, 2]


def test_legs_under_a_budget_of_tokens_train_what_one_stage_does() -> None:
    budget = Budget(trained_tokens=6000)
    legs = Run("paced", {**AGAIN, "schedule": "fkl"}, budget=budget)
    whole = Run("paced", {**AGAIN, "schedule": "fkl", "reestimate_every": 0.0}, budget=budget)
    assert len(legs.stages) > 2 and len(whole.stages) == 1
    longest = max(row["tokens"] for row in legs.trainer.state.curve)
    for run in (legs, whole):
        assert 6000 <= run.ledger.charged["trained"] < 6000 + longest
        assert run.trainer.consumed == pytest.approx(1)


def test_a_leg_whose_measuring_cost_the_rest_of_the_flops_is_passed_over() -> None:
    """Two legs are paid for, and a third measuring takes more than what is left: what was trained is kept."""
    one = Run("paced", {**AGAIN, "schedule": "fkl"}, steps=3).ledger.charged["flops"]
    run = Run("paced", {**AGAIN, "schedule": "fkl"}, budget=Budget(flops=1.05 * one))
    stages = run.trainer.state.stages
    assert len(stages) == 2 and stages[-1]["steps"] == 0
    assert stages[-1]["stopped_by"] == "preparation" and stages[0]["steps"] > 0
    with pytest.raises(ValueError, match="gets no step"):
        Run("paced", {**AGAIN, "schedule": "fkl"}, budget=Budget(flops=one / 10))


def test_a_short_leg_may_draw_no_problem_with_weight() -> None:
    fields = {"rollouts": 4, "references": 4, "reestimate_every": 0.04, "schedule": "fkl"}
    run = Run("paced", fields, steps=12)
    assert len(run.stages) == 12 and run.ledger.charged["steps"] == 12


def test_refreshing_at_the_switch_measures_there_too() -> None:
    run = Run("paced", {**AGAIN, "reestimate_every": 0.0, "refresh_at_switch": True}, steps=6)
    assert [s.name for s in run.stages] == ["forward", "reverse"]
    assert {"pass rates", "pass rates at the switch"} <= set(run.lab.notes)


@pytest.mark.parametrize("steps", [2, 4, 7, 10])
def test_a_run_that_was_cut_reuses_the_same_pass_rates(steps: int, tmp_path: Path) -> None:
    whole = Run("paced", AGAIN, steps=11)
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(Cut):
        Run("paced", AGAIN, steps=11, checkpoint=path, cut_after=steps, store=tmp_path)
    again = Run("paced", AGAIN, steps=11, checkpoint=path, store=tmp_path)
    assert again.losses == whole.losses and again.student.identity == whole.student.identity
    assert again.lab.notes == whole.lab.notes
    for quantity in ("student_generated", "teacher_scored", "trained"):
        assert again.ledger.charged[quantity] == whole.ledger.charged[quantity]


def test_a_student_that_has_mastered_everything_keeps_its_last_weights() -> None:
    lab = scripted({"only": [RIGHT]}, {"only": [RIGHT]})
    before = np.array([1.0])
    assert Paced(rollouts=4)._weights(lab, "later", before) is before
    assert lab.notes["later: no problem has weight"]


# -- self-distillation --------------------------------------------------------------------------

SELF: dict[str, Any] = {"rollouts": 4, "schedule": "rkl", "track": "self_distillation"}


@pytest.mark.parametrize("context", ["answer_in_user", "answer_in_system"])
def test_a_self_teacher_that_sees_the_answer_pulls_from_the_first_step(context: str) -> None:
    run = Run("paced", {**SELF, "self_teacher_context": context}, steps=2)
    assert run.losses[0] > 1e-3
    assert run.stages[0].teacher is run.lab.base
    assert run.ledger.charged["teacher_generated"] == 0


def test_a_self_teacher_that_sees_no_more_than_the_student_pulls_nowhere() -> None:
    run = Run("paced", {**SELF, "self_teacher_context": "none"}, steps=1)
    assert run.losses[0] == pytest.approx(0, abs=1e-7)


def test_what_the_self_teacher_sees() -> None:
    run = Run("paced", SELF, train=False)
    by_id = {problem.id: problem for problem in run.lab.problems}
    live = [e for e in run.examples[0] if e.weight]
    assert live
    for example in live:
        problem = by_id[example.problem]
        assert problem.answer is not None and example.teacher_prompt is not None
        assert example.prompt == run.student.encode(problem.prompt)  # bare, for the student
        assert example.teacher_prompt == run.student.encode(run.lab.prompt(problem, problem.answer))
    system = Run("paced", {**SELF, "self_teacher_context": "answer_in_system"}, train=False)
    for example in (e for e in system.examples[0] if e.weight):
        problem = by_id[example.problem]
        told = f"hint: {problem.answer}"
        assert example.teacher_prompt == run.student.encode(problem.prompt, system=told)


def test_self_distillation_is_on_the_students_text() -> None:
    with pytest.raises(ValueError, match=r"needs schedule rkl, got fkl_then_rkl"):
        registry.build("paced", {"track": "self_distillation"})
    needs = [
        registry.build("paced", fields).required() for fields in (SELF, {"schedule": "rkl"}, {})
    ]
    assert needs == [{"base.logits"}, {"teacher.logits"}, {"teacher.generate", "teacher.logits"}]


def test_a_problem_without_an_answer_is_refused_before_a_rollout_is_paid() -> None:
    ledger = Ledger()
    made = [Problem(name, f"{name}=?", None if name == "half" else "7") for name in TEACHER]
    lab = scripted(TEACHER, STUDENT, made, ledger=ledger)
    with pytest.raises(ValueError, match="'half' has no answer to show"):
        next(Paced(**SELF).stages(lab))
    assert ledger.charged["student_generated"] == 0
