"""AKL on numbers worked out by hand, and its gradient against autograd."""

from __future__ import annotations

from math import log
from typing import Any

import pytest
import torch
from torch import Tensor

from harness import registry
from harness.types import OffPolicy, OnPolicy, Tokens
from methods.baselines.akl import AdaptiveKL, HeadRule, head
from tests.benches import Run, answer, listen, scripted

# Teacher by rank: 8/16, 5/16, 2/16, 1/16; summed up: 8, 13, 15, 16 sixteenths.
P = [2 / 16, 8 / 16, 1 / 16, 5 / 16]
Q = [4 / 16, 2 / 16, 2 / 16, 8 / 16]  # |p - q| = 2, 6, 1, 3 sixteenths
FORWARD = 5 / 16 * log(5) - log(2) / 8
REVERSE = 13 / 8 * log(2) - log(5) / 2
RULES: list[HeadRule] = ["cum_le_mu", "smallest_ge_mu"]

# mu, rule, which tokens are the head, g_head / (g_head + g_tail)
BY_HAND: list[tuple[float, HeadRule, list[int], float]] = [
    (0.9, "cum_le_mu", [1, 3], 9 / 12),  # 13/16 <= 0.9 < 15/16
    (0.9, "smallest_ge_mu", [0, 1, 3], 11 / 12),
    (0.6, "cum_le_mu", [1], 6 / 12),
    (0.6, "smallest_ge_mu", [1, 3], 9 / 12),
    (0.3, "cum_le_mu", [1], 6 / 12),  # the likeliest token alone is more than mu
    (0.3, "smallest_ge_mu", [1], 6 / 12),
    (0.0, "smallest_ge_mu", [1], 6 / 12),
]


def logits(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).log() + 1.3


def tokens(n: int) -> Tokens:
    return Tokens(torch.zeros(n, dtype=torch.long), torch.ones(n), {})


def random_pair(rows: int = 9, vocabulary: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    student, teacher = 2 * torch.randn(
        2, rows, vocabulary, dtype=torch.float64, generator=generator
    )
    return student, teacher


@pytest.mark.parametrize(("mu", "rule", "members", "ahead"), BY_HAND)
def test_head_loss_and_gradient_by_hand(
    mu: float, rule: HeadRule, members: list[int], ahead: float
) -> None:
    objective = AdaptiveKL(mu, rule)
    assert head(torch.tensor([P]), mu, rule)[0].nonzero()[:, 0].tolist() == members
    loss, slope = objective.gradient(logits(Q), logits(P), tokens(1))
    expected = ahead * FORWARD + (1 - ahead) * REVERSE
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    assert objective(logits(Q), logits(P), tokens(1)).item() == pytest.approx(expected, abs=1e-12)
    pull = [
        ahead * (q - p) + (1 - ahead) * q * (log(q / p) - REVERSE)
        for p, q in zip(P, Q, strict=True)
    ]
    assert slope[0].tolist() == pytest.approx(pull, abs=1e-12)


def test_a_mass_of_exactly_mu_is_in_under_one_rule_and_enough_under_the_other() -> None:
    teacher = torch.tensor([[0.25, 0.5, 0.25]])  # the ties go by the vocabulary's order
    assert head(teacher, 0.75, "cum_le_mu").tolist() == [[True, True, False]]
    assert head(teacher, 0.75, "smallest_ge_mu").tolist() == [[True, True, False]]
    assert head(teacher, 0.74, "cum_le_mu").tolist() == [[False, True, False]]
    assert head(teacher, 0.76, "smallest_ge_mu").tolist() == [[True, True, True]]


def test_rows_have_heads_of_their_own() -> None:
    both = torch.tensor([P, P[::-1]])
    assert head(both, 0.9, "cum_le_mu").nonzero().tolist() == [[0, 1], [0, 3], [1, 0], [1, 2]]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mu", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_closed_form_is_the_derivative_with_the_coefficients_held(
    mu: float, rule: HeadRule
) -> None:
    objective, (student, teacher) = AdaptiveKL(mu, rule), random_pair()
    before = student.clone(), teacher.clone()
    loss, slope = objective.gradient(student, teacher, tokens(9))
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])
    leaf, given = student.clone().requires_grad_(), teacher.clone().requires_grad_()
    value = objective(leaf, given, tokens(9))
    value.sum().backward()
    torch.testing.assert_close(loss, value.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(slope, leaf.grad, rtol=0, atol=1e-12)
    assert given.grad is None


@pytest.mark.parametrize("rule", RULES)
def test_the_order_of_the_vocabulary_does_not_matter(rule: HeadRule) -> None:
    objective, (student, teacher) = AdaptiveKL(0.5, rule), random_pair()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(5))
    loss, slope = objective.gradient(student, teacher, tokens(9))
    shuffled, its = objective.gradient(student[:, order], teacher[:, order], tokens(9))
    torch.testing.assert_close(shuffled, loss, rtol=0, atol=1e-12)
    torch.testing.assert_close(its, slope[:, order], rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_equal_distributions_cost_nothing(rule: HeadRule) -> None:
    student, _ = random_pair()
    loss, slope = AdaptiveKL(0.5, rule).gradient(student, student.clone(), tokens(9))
    assert loss.abs().max() < 1e-12 and slope.abs().max() < 1e-12
    assert not loss.isnan().any() and not slope.isnan().any()


def test_finite_where_probabilities_underflow() -> None:
    student = torch.tensor([[0.0, 1e4, -1e4]])
    teacher = torch.tensor([[1e4, -1e4, 0.0]])
    loss, slope = AdaptiveKL(0.5).gradient(student, teacher, tokens(1))
    assert loss.isfinite().all() and slope.isfinite().all()


def test_whose_text(monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong = answer("7"), answer("8")
    lab = scripted({"a": [wrong, right], "b": [wrong, wrong]}, {"a": [wrong], "b": [wrong]})
    asked = listen(lab, monkeypatch)

    def stage(**fields: Any) -> Any:
        (only,) = registry.build("akl", {"references": 2, **fields}).stages(lab)
        return only

    teacher, student = stage(mu=0.3, head_rule="smallest_ge_mu"), stage(responses="student")
    assert isinstance(teacher.source, OffPolicy) and isinstance(student.source, OnPolicy)
    assert [(e.problem, lab.student.decode(e.response)) for e in teacher.source.examples] == [
        ("a", right)
    ]
    assert teacher.objective == AdaptiveKL(0.3, "smallest_ge_mu") and teacher.mean == "token"
    assert student.objective == AdaptiveKL(0.5, "cum_le_mu")
    assert list(student.source.problems) == list(lab.problems)
    assert {lab.student.decode(e.response) for e in student.source.make(lab.problems)} == {wrong}
    assert [(s.temperature, s.top_p, s.top_k) for s in asked] == [(1.0, 1.0, 0)]


def test_on_the_students_text_the_teacher_need_not_write() -> None:
    run = Run("akl", {"responses": "student"}, steps=2)  # its teacher refuses what is not declared
    assert run.method.required() == {"teacher.logits"}
    assert run.ledger.charged["teacher_generated"] == 0 < run.ledger.charged["teacher_scored"]
