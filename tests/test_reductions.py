"""A method with its idea switched off equals a simpler one, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from harness import registry
from harness.config import search
from harness.objectives import forward_kl, nll, reverse_kl, skew_kl, skew_reverse_kl
from harness.registry import Method
from harness.types import Example, Lab, OffPolicy, OnPolicy, Problem, Stage
from methods.vcrd import VCRD
from methods.vcrd.loss import StepLoss, examples
from methods.vcrd.proposals import pairs
from tests.benches import Run, problems

LOCAL: dict[str, Any] = {"steps": "line", "positions": 2}


class Plain(Method):
    """What the others reduce to: one stage, no weights."""

    name, paper = "plain", "none"
    needs = frozenset({"teacher.generate", "teacher.logits"})
    kind: str = search("forward")  # which stage
    refresh: int = search(0, ge=0)  # of step-local pairs

    def stages(self, lab: Lab) -> Iterator[Stage]:
        if self.kind == "nll":
            yield Stage("s", OffPolicy(lab.references(n=4)), nll)
        elif self.kind == "forward":
            yield Stage("s", OffPolicy(lab.references(n=4)), forward_kl, mean="sequence")
        elif self.kind == "step-local":
            yield self.distillm2(lab)
        else:
            yield Stage("s", OnPolicy(lab.problems, lab.rollouts()), reverse_kl, mean="sequence")

    def distillm2(self, lab: Lab) -> Stage:
        """DistiLLM-2's loss (arXiv:2503.07067) on single steps: SKL on the teacher's, SRKL on the student's, all alike."""

        def make(block: Sequence[Problem]) -> list[Example]:
            unique = list({problem.id: problem for problem in block}.values())
            chosen = unique[
                : 2 * max(1, self.refresh)
            ]  # 2 responses and 2 positions of each: at most 6 of 8
            found = pairs(lab, VCRD(**LOCAL), chosen, self.refresh > 0)
            return [*examples(lab, found, [1.0] * len(found), {"teacher": 1.0, "student": 1.0})]

        both = StepLoss({"teacher": skew_kl(0.1), "student": skew_reverse_kl(0.1)})
        return Stage("s", OnPolicy(lab.problems, make, max(1, self.refresh)), both, mean="sum")


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {**registry.methods(), "plain": Plain}
    monkeypatch.setattr(registry, "methods", lambda: known)


def same(name: str, fields: dict[str, Any], kind: str, **more: Any) -> None:
    method, plain = Run(name, fields), Run("plain", {"kind": kind, **more})
    assert method.losses == plain.losses
    assert method.student.identity == plain.student.identity


def test_sft_keeping_one_of_four_is_nll_on_the_references() -> None:
    same("sft", {"samples": 4, "keep": 1}, "nll")


@pytest.mark.parametrize(("schedule", "kind"), [("fkl", "forward"), ("rkl", "reverse")])
@pytest.mark.parametrize("norm", ["dataset_mean1", "none", "max1"])
def test_paced_without_exponents_is_a_uniform_kl(schedule: str, kind: str, norm: str) -> None:
    fields = {"alpha": 0.0, "beta": 0.0, "rollouts": 4, "references": 4}
    same("paced", {**fields, "schedule": schedule, "norm": norm}, kind)


@pytest.mark.parametrize(("name", "fields", "other", "its"), [
    ("fkl", {"references": 4}, "paced", {"alpha": 0.0, "beta": 0.0, "schedule": "fkl", "rollouts": 4, "references": 4}),
    ("rkl", {}, "paced", {"alpha": 0.0, "beta": 0.0, "schedule": "rkl", "rollouts": 4}),
    ("hard_filter", {"bounds": "inclusive", "rollouts": 4, "references": 4}, "fkl", {"references": 4}),
    ("hard_filter", {"bounds": "inclusive", "rollouts": 4, "kl": "reverse"}, "rkl", {}),
    ("gkd", {"lam": 0.0, "beta": 0.0, "references": 4}, "fkl", {"references": 4, "reduction": "token_mean"}),
    ("gkd", {"lam": 1.0, "beta": 1.0, "temperature": 1.0}, "rkl", {"reduction": "token_mean"}),
])  # fmt: skip
def test_a_uniform_kl_by_another_name(
    name: str, fields: dict[str, Any], other: str, its: dict[str, Any]
) -> None:
    one, two = Run(name, fields), Run(other, its)
    assert one.losses == two.losses and one.student.identity == two.student.identity


def test_a_uniform_kl_pays_for_nothing_that_it_does_not_use() -> None:
    forward, reverse = Run("fkl").ledger.charged, Run("rkl").ledger.charged
    assert forward["student_generated"] == 0 < forward["teacher_generated"]
    assert reverse["teacher_generated"] == 0 < reverse["student_generated"]
    student = Run("gkd", {"lam": 1.0}).ledger.charged
    teacher = Run("gkd", {"lam": 0.0}).ledger.charged
    assert student["teacher_generated"] == teacher["student_generated"] == 0


def test_limo_that_selects_nothing_away_trains_on_the_best_chain_of_every_solved_problem() -> None:
    fields = {"weak_k": 1, "weak_max": 1, "strong_k": 4, "strong_max": 4, "keep": 10**6}
    limo, sft = Run("limo", fields, train=False), Run("sft", {"samples": 4, "keep": 4}, train=False)
    assert {e.problem for e in limo.examples[0]} == {e.problem for e in sft.examples[0]}
    everything = {(e.problem, e.response) for e in sft.examples[0]}
    assert {(e.problem, e.response) for e in limo.examples[0]} <= everything
    wide = Run("limo", {**fields, "one_per_problem": False}, train=False)
    assert {(e.problem, e.response) for e in wide.examples[0]} == everything


@pytest.mark.parametrize(
    "mode", ["sequential_increment", "sequential_cumulative", "data_only", "reversed"]
)
def test_heal_that_finds_no_problem_hard_enough_is_sft(mode: str) -> None:
    fields = {"samples": 4, "cap": 3, "hard": 0.0, "extreme": 1.0, "mode": mode}
    heal, sft = Run("heal", fields, items=problems()), Run("sft", {"samples": 4, "keep": 3})
    assert heal.losses == sft.losses and heal.student.identity == sft.student.identity
    assert heal.ledger.charged["teacher_generated"] == sft.ledger.charged["teacher_generated"]


@pytest.mark.parametrize("refresh", [0, 2])
@pytest.mark.parametrize("fields", [
    {"weight": "uniform"}, {"weight": "uniform", "normalise": "none"}, {"validity": "const"}, {"validity": "const", "weight": "linear"},
    {"validity": "random", "weight": "hard", "delta": 1.0},
])  # fmt: skip
def test_vcrd_without_its_weights_is_step_local_distillm2(
    refresh: int, fields: dict[str, Any]
) -> None:
    same("vcrd", {**LOCAL, "refresh": refresh, **fields}, "step-local", refresh=refresh)


def test_vcrd_with_weights_is_not() -> None:
    fields = {**LOCAL, "refresh": 0, "validity": "oracle"}
    method, plain = Run("vcrd", fields), Run("plain", {"kind": "step-local"})
    assert method.losses != plain.losses
