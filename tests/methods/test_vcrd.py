"""VCRD on the micro world: pairs, shared proposals, batches, settings, on-policy runs, the scorecard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import PROBLEMS
from harness import registry
from harness.objectives import forward_kl, skew_kl, skew_reverse_kl
from harness.types import Example, Measure, OnPolicy, Problem
from methods.vcrd import VCRD
from methods.vcrd.proposals import Pair, pairs
from methods.vcrd.validity import validities
from tests.benches import Cut, Run
from tests.methods.vcrd_bench import (
    STUDENT,
    TEACHER,
    bench,
    vcrd,
    written,
)


@pytest.fixture(scope="module")
def run() -> Run:
    return Run(
        "vcrd", {"steps": "line", "refresh": 0, "validity": "oracle", "positions": 2}, train=False
    )


def made(run: Run) -> list[Example]:
    """The examples of all problems; a stage shows those of its first step."""
    assert isinstance(run.method, VCRD)
    return run.method.examples(run.lab, run.lab.problems, False)


def local(run: Run, **fields: Any) -> list[Pair]:
    return pairs(run.lab, vcrd(positions=2, **fields), run.lab.problems, False)


def test_p1_p7_a_pair_is_two_steps_under_one_prefix(run: Run) -> None:
    found = local(run)
    assert {pair.source for pair in found} == {"teacher", "student"}
    for pair in found:
        assert pair.teacher.prefix == pair.student.prefix
        cut = pair.teacher.prefix
        assert pair.teacher.tokens[:cut] == pair.student.tokens[:cut]
        for action in (pair.teacher, pair.student):
            step = run.student.decode(action.step)
            assert action.terminal or (step.count("\n") == 1 and step.endswith("\n"))


@pytest.mark.parametrize("fields", [
    {"validity": "oracle"}, {"validity": "rollout", "rollouts": 4}, {"validity": "rollout", "rollouts": 4, "completer": "student"},
    {"validity": "likelihood"},
])  # fmt: skip
def test_p3_the_students_step_can_be_the_better_one(run: Run, fields: dict[str, Any]) -> None:
    setting = vcrd(positions=2, **fields)
    found = pairs(run.lab, setting, run.lab.problems, False)
    run.teacher._allowed |= {"score"}
    teacher, student = validities(run.lab, setting, found, False)
    assert (student > teacher).any() and (teacher > student).any()
    assert ((teacher >= 0) & (teacher <= 1) & (student >= 0) & (student <= 1)).all()


def test_all_weight_forms_share_one_set_of_proposals_and_verdicts(run: Run) -> None:
    fields = {"steps": "line", "refresh": 0, "rollouts": 2, "positions": 2}
    first = Run("vcrd", fields, train=False)
    assert first.ledger.charged["teacher_generated"] > 0
    for form in ("linear", "teacher_only", "inverted", "shuffled"):
        other = Run("vcrd", {**fields, "weight": form}, seed=1, train=False)
        assert (
            other.ledger.spent["teacher_generated"] == other.ledger.spent["student_generated"] == 0
        )
        assert (
            other.ledger.charged["teacher_generated"] == first.ledger.charged["teacher_generated"]
        )
        assert [e.response for e in made(other)] == [e.response for e in made(first)]
    uniform = Run("vcrd", {**fields, "weight": "uniform"}, train=False)
    assert "validity" not in uniform.ledger.purposes["teacher_generated"]  # it asks nobody


def test_a_step_holds_at_most_as_many_sequences_as_the_batch() -> None:
    fields = {"steps": "line", "refresh": 3, "positions": 3, "validity": "const"}
    run = Run("vcrd", fields, train=False)
    source = run.stages[0].source
    assert isinstance(source, OnPolicy) and source.every == 3
    block = list(
        run.lab.problems
    )  # 24: three steps of 8 sequences, each of 2 responses with 3 more each at most
    assert isinstance(run.method, VCRD) and len(run.method._few(block)) == 6
    assert len(VCRD(positions=64, refresh=3)._few(block)) == 3
    drawn = source.make(block)
    assert 0 < sum(bool(e.response) for e in drawn) <= 24


def test_fkl_leaves_the_students_step_out_and_gamma_can() -> None:
    for fields in ({"base_loss": "fkl"}, {"gamma": 0.0}):
        alone = Run(
            "vcrd",
            {"steps": "line", "refresh": 0, "validity": "oracle", "positions": 2, **fields},
            train=False,
        )
        assert not any(any(e.scalars["student"]) for e in made(alone) if e.response)  # type: ignore[arg-type]
    assert VCRD(base_loss="fkl").objectives == {"teacher": forward_kl}


def test_the_default_loss_is_skew_kl_on_the_teachers_and_skew_reverse_kl_on_the_students_step() -> (
    None
):
    assert VCRD().objectives == {"teacher": skew_kl(0.1), "student": skew_reverse_kl(0.1)}


def test_the_token_variant_trains_on_whole_responses() -> None:
    run = Run("vcrd", {"steps": "line", "refresh": 0, "granularity": "token"})
    assert all(e.loss is None for e in run.examples[0]) and {e.term for e in run.examples[0]} == {
        "teacher",
        "student",
    }
    assert "validity" not in run.ledger.purposes.get("teacher_generated", {})


@pytest.mark.parametrize(("fields", "needs"), [
    ({"validity": "prm"}, {"prm.reward"}), ({"validity": "judge"}, {"judge.reward"}), ({"validity": "likelihood"}, {"teacher.score"}),
    ({}, set()), ({"validity": "prm", "weight": "uniform"}, set()),
])  # fmt: skip
def test_what_it_needs_depends_on_the_judge(fields: dict[str, Any], needs: set[str]) -> None:
    assert VCRD(**fields).required() == VCRD.needs | needs


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="gamma: rkl trains on the student's steps alone"):
        registry.build("vcrd", {"gamma": 0.0, "base_loss": "rkl"})
    with pytest.raises(ValueError, match="granularity: token weighs a divergence"):
        registry.build("vcrd", {"granularity": "token", "base_loss": "ce"})


def test_it_works_on_code() -> None:
    """Statements, completions judged by running the tests."""
    problems = PROBLEMS["micro_code"].load("train", 12, levels=(4,))
    run = Run(
        "vcrd",
        {"refresh": 0, "rollouts": 2, "positions": 3, "steps": "auto"},
        items=problems,
        steps=2,
    )
    assert all(np.isfinite(run.losses)) and run.ledger.charged["verifier_calls"] > 0
    notes = run.lab.notes["pairs"]
    low, _, high = notes["V of the student's step, deciles 1, 5, 9"]
    assert notes["prefixes"] > 20 and low < high


def test_normalisation_is_that_of_the_step(run: Run) -> None:
    assert run.stages[0].normalise == "step" and run.stages[0].mean == "sum"
    plain = Run(
        "vcrd",
        {"steps": "line", "refresh": 0, "normalise": "none", "validity": "const"},
        train=False,
    )
    assert plain.stages[0].normalise == "none"


ON_POLICY = {"steps": "line", "refresh": 2, "positions": 2, "rollouts": 2, "completer": "both"}


def test_on_policy_proposals_are_those_of_the_student_as_it_is() -> None:
    run = Run("vcrd", ON_POLICY)
    (stage,) = run.stages
    assert isinstance(stage.source, OnPolicy) and stage.source.every == 2
    assert run.ledger.charged["student_generated"] > 0 and run.trainer.state.stages[0]["steps"] == 4
    other = Run("vcrd", ON_POLICY, seed=1, train=False)
    assert [e.response for e in other.examples[0]] != [e.response for e in run.examples[0]]


def test_an_on_policy_run_that_was_cut_ends_in_the_same_student(tmp_path: Path) -> None:
    whole = Run("vcrd", ON_POLICY)
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(Cut):
        Run("vcrd", ON_POLICY, checkpoint=path, cut_after=3)
    again = Run("vcrd", ON_POLICY, checkpoint=path)
    assert again.losses == whole.losses and again.student.identity == whole.student.identity
    assert again.ledger.purposes == whole.ledger.purposes


def test_the_scorecard_holds_every_estimator_against_the_oracle() -> None:
    run = Run(
        "vcrd",
        {"steps": "line", "refresh": 0, "rollouts": 4, "positions": 2},
        items=PROBLEMS["micro_math"].load("train", 12, levels=(4, 5)),
        train=False,
    )
    run.teacher._allowed |= {"score"}
    rows = run.method.mechanisms(run.lab)
    same = rows["both propose the same step"]
    found = pairs(run.lab, vcrd(positions=2), run.lab.problems, False)
    assert isinstance(same, Measure) and same.values == [float(pair.same) for pair in found]
    both = [rows[f"the {who}'s step is the better one"].values for who in ("teacher", "student")]  # type: ignore[union-attr]
    assert any(both[0]) and not any(a and b for a, b in zip(*both, strict=True))
    area = rows["AUC of V on the student's steps: rollouts by teacher, K = 4"]
    assert (
        isinstance(area, Measure)
        and area.labels is not None
        and len(area.values) == len(area.labels) < len(found)
    )
    for k in (2, 4, 8):
        assert f"calibration of V: rollouts by both, K = {k}" in rows
    assert any(
        name.startswith("correlation of V with the truth: rollouts by student, level 4")
        for name in rows
    )
    assert "calibration of V: likelihood" in rows
    assert not any("process reward model" in name for name in rows)  # the suite names none


def test_controls_have_no_scorecard() -> None:
    run = Run("vcrd", {"steps": "line", "refresh": 0, "weight": "uniform"}, train=False)
    assert run.method.mechanisms(run.lab) == {}


def test_shuffled_weights_are_drawn_anew_at_every_refresh() -> None:
    step = [0, 0]
    many = [Problem(f"q{i}", "1+2=?", "3", verifier="exact") for i in range(20)]
    lab = bench(written(TEACHER), written(STUDENT), problems=many, clock=lambda: tuple(step))
    setting = vcrd(weight="shuffled", validity="random", prefixes="teacher", positions=9)
    drawn = []
    for step[1] in (0, 4):
        drawn.append([e.weight for e in setting.examples(lab, many, True)])
    assert drawn[0] != drawn[1] and sorted(drawn[0]) != [1.0] * len(drawn[0])


def test_the_token_variant_needs_responses_that_its_loss_can_use() -> None:
    with pytest.raises(ValueError, match="base_loss fkl has nothing for the student's"):
        registry.build("vcrd", {"granularity": "token", "base_loss": "fkl", "prefixes": "student"})
