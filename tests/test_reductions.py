"""A method with its idea switched off equals a simpler one, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from harness import registry
from harness.config import search
from harness.objectives import forward_kl, nll, reverse_kl
from harness.registry import Method
from harness.types import Lab, OffPolicy, OnPolicy, Stage
from tests.benches import Run, problems


class Plain(Method):
    """What the others reduce to: one stage, no weights."""

    name, paper = "plain", "none"
    needs = frozenset({"teacher.generate", "teacher.logits"})
    kind: str = search("forward")  # which stage

    def stages(self, lab: Lab) -> Iterator[Stage]:
        if self.kind == "nll":
            yield Stage("s", OffPolicy(lab.references(n=4)), nll)
        elif self.kind == "forward":
            yield Stage("s", OffPolicy(lab.references(n=4)), forward_kl, mean="sequence")
        else:
            yield Stage("s", OnPolicy(lab.problems, lab.rollouts()), reverse_kl, mean="sequence")


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {**registry.methods(), "plain": Plain}
    monkeypatch.setattr(registry, "methods", lambda: known)


def same(name: str, fields: dict[str, Any], kind: str) -> None:
    method, plain = Run(name, fields), Run("plain", {"kind": kind})
    assert method.losses == plain.losses
    assert method.student.identity == plain.student.identity


def test_sft_keeping_one_of_four_is_nll_on_the_references() -> None:
    same("sft", {"samples": 4, "keep": 1}, "nll")


@pytest.mark.parametrize(("schedule", "kind"), [("fkl", "forward"), ("rkl", "reverse")])
@pytest.mark.parametrize("norm", ["dataset_mean1", "none", "max1"])
def test_paced_without_exponents_is_a_uniform_kl(schedule: str, kind: str, norm: str) -> None:
    fields = {"alpha": 0.0, "beta": 0.0, "rollouts": 4, "references": 4}
    same("paced", {**fields, "schedule": schedule, "norm": norm}, kind)


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
