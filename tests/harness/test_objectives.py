"""The objectives on numbers worked out by hand, and the identities between them."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from math import log

import pytest
import torch
from torch import Tensor

from harness.objectives import forward_kl, jsd, nll, reverse_kl, skew_kl, skew_reverse_kl
from harness.types import Objective, Tokens

# One prefix, three tokens. With beta = alpha = 1/4:
#   m = p/4 + 3q/4 = (7, 5, 20)/32    p/m = (16/7, 8/5, 2/5)   q/m = (4/7, 4/5, 6/5)
#   s = 3p/4 + q/4 = (13, 7, 12)/32   q/s = (4/13, 4/7, 2)
P = [1 / 2, 1 / 4, 1 / 4]  # teacher
Q = [1 / 8, 1 / 8, 3 / 4]  # student
TARGET = 1
FORWARD = 5 / 4 * log(2) - log(3) / 4
REVERSE = 3 / 4 * log(3) - 3 / 8 * log(2)
P_TO_M = log(16 / 7) / 2 + log(8 / 5) / 4 + log(2 / 5) / 4
Q_TO_M = log(4 / 7) / 8 + log(4 / 5) / 8 + 3 / 4 * log(6 / 5)

BY_HAND: list[tuple[Objective, float]] = [
    (nll, 3 * log(2)),
    (forward_kl, FORWARD),
    (reverse_kl, REVERSE),
    (jsd(1 / 4), P_TO_M / 4 + 3 / 4 * Q_TO_M),
    (skew_kl(1 / 4), P_TO_M),
    (skew_reverse_kl(1 / 4), log(4 / 13) / 8 + log(4 / 7) / 8 + 3 / 4 * log(2)),
]
STOCK = [objective for objective, _ in BY_HAND] + [jsd(0.9), skew_kl(), skew_reverse_kl()]
DIVERGENCES = [objective for objective in STOCK if objective.needs_teacher]


def name_of(value: object) -> str | None:
    return value.name if isinstance(value, Objective) else None


def tokens_of(targets: Tensor) -> Tokens:
    return Tokens(targets, torch.ones(len(targets)), {})


def logits_of(probabilities: list[float]) -> Tensor:
    """Logits of one row, with a shift that the softmax takes away."""
    return torch.tensor([probabilities], dtype=torch.float64).log() + 3.7


def random_pair(rows: int = 7, vocabulary: int = 50) -> tuple[Tensor, Tensor, Tokens]:
    student, teacher = torch.randn(2, rows, vocabulary, dtype=torch.float64) * 2
    return student, teacher, tokens_of(torch.randint(vocabulary, (rows,)))


def derivative(objective: Objective, student: Tensor, teacher: Tensor, tokens: Tokens) -> Tensor:
    """By autograd through the equation."""
    leaf = student.clone().requires_grad_()
    (slope,) = torch.autograd.grad(objective(leaf, teacher, tokens).sum(), leaf)
    return slope


@pytest.mark.parametrize(("objective", "expected"), BY_HAND, ids=name_of)
def test_value_by_hand(objective: Objective, expected: float) -> None:
    loss = objective(logits_of(Q), logits_of(P), tokens_of(torch.tensor([TARGET])))
    assert loss.shape == (1,)
    assert loss.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (nll, [1 / 8, -7 / 8, 3 / 4]),
        (forward_kl, [-3 / 8, -1 / 8, 1 / 2]),
        (
            reverse_kl,
            [(log(1 / 4) - REVERSE) / 8, (log(1 / 2) - REVERSE) / 8, 0.75 * (log(3) - REVERSE)],
        ),
        (
            jsd(1 / 4),
            [
                3 / 32 * (log(4 / 7) - Q_TO_M),
                3 / 32 * (log(4 / 5) - Q_TO_M),
                9 / 16 * (log(6 / 5) - Q_TO_M),
            ],
        ),
    ],
    ids=name_of,
)
def test_gradient_by_hand(objective: Objective, expected: list[float]) -> None:
    arguments = logits_of(Q), logits_of(P), tokens_of(torch.tensor([TARGET]))
    assert derivative(objective, *arguments)[0].tolist() == pytest.approx(expected, abs=1e-12)
    assert objective.gradient(*arguments)[1][0].tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("objective", STOCK, ids=name_of)
def test_closed_form_is_the_derivative(objective: Objective) -> None:
    student, teacher, tokens = random_pair()
    before = student.clone(), teacher.clone()
    loss, slope = objective.gradient(student, teacher, tokens)
    torch.testing.assert_close(loss, objective(student, teacher, tokens), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        slope, derivative(objective, student, teacher, tokens), rtol=0, atol=1e-12
    )
    assert torch.equal(student, before[0]), "gradient leaves its arguments as they are"
    assert torch.equal(teacher, before[1]), "gradient leaves its arguments as they are"


@pytest.mark.parametrize("objective", DIVERGENCES, ids=name_of)
def test_teacher_gets_no_gradient(objective: Objective) -> None:
    student, teacher, tokens = random_pair()
    student.requires_grad_()
    teacher.requires_grad_()
    objective(student, teacher, tokens).sum().backward()
    assert teacher.grad is None
    assert student.grad is not None and student.grad.abs().max() > 0


@pytest.mark.parametrize("objective", DIVERGENCES, ids=name_of)
def test_zero_on_itself_and_positive_elsewhere(objective: Objective) -> None:
    student, teacher, tokens = random_pair()
    same, slope = objective.gradient(student, student.clone(), tokens)
    assert same.abs().max() < 1e-12
    assert slope.abs().max() < 1e-12
    assert objective(student, teacher, tokens).min() > 0


@pytest.mark.parametrize(
    ("limit", "scaled"),
    [
        (forward_kl, lambda e: (jsd(e), 1 / e)),
        (reverse_kl, lambda e: (jsd(1 - e), 1 / e)),
        (forward_kl, lambda e: (skew_kl(e), 1)),
        (reverse_kl, lambda e: (skew_reverse_kl(e), 1)),
    ],
    ids=["jsd/beta", "jsd/(1-beta)", "skew_kl", "skew_reverse_kl"],
)
def test_limits_are_the_two_kls(
    limit: Objective, scaled: Callable[[float], tuple[Objective, float]]
) -> None:
    student, teacher, tokens = random_pair()
    expected = limit.gradient(student, teacher, tokens)
    errors = []
    for distance in (1e-4, 1e-6):
        objective, factor = scaled(distance)
        found = objective.gradient(student, teacher, tokens)
        errors.append(
            max((factor * f - e).abs().max().item() for f, e in zip(found, expected, strict=True))
        )
    assert errors[1] < 1e-2  # and shrinks with the distance
    assert errors[1] < errors[0] / 10


def test_the_ends_are_special_cased() -> None:
    assert jsd(0) == forward_kl and jsd(1) == reverse_kl
    assert skew_kl(0) == forward_kl and skew_reverse_kl(0) == reverse_kl


def test_skewed_divergences_are_bounded() -> None:
    """SKL_alpha, SRKL_alpha <= -log alpha, reached where the two do not overlap."""
    apart = torch.tensor([[40.0, -40.0]], dtype=torch.float64)
    for make in (skew_kl, skew_reverse_kl):
        loss = make(0.1)(apart, -apart, tokens_of(torch.tensor([0])))
        assert loss.item() == pytest.approx(-log(0.1), abs=1e-9)
        student, teacher, tokens = random_pair()
        assert make(0.1)(8 * student, 8 * teacher, tokens).max() <= -log(0.1)


@pytest.mark.parametrize("objective", STOCK, ids=name_of)
def test_finite_where_probabilities_underflow(objective: Objective) -> None:
    student = torch.tensor([[0.0, 1e4, -1e4], [0.0, 200.0, -200.0]])
    teacher = torch.tensor([[1e4, -1e4, 0.0], [200.0, -200.0, 0.0]])
    tokens = tokens_of(torch.tensor([0, 2]))
    loss, slope = objective.gradient(student, teacher, tokens)
    assert loss.isfinite().all() and slope.isfinite().all()
    assert objective(student, teacher, tokens).isfinite().all()
    assert derivative(objective, student, teacher, tokens).isfinite().all()


@pytest.mark.parametrize("objective", STOCK, ids=name_of)
def test_softmax_in_fp32_or_wider(objective: Objective) -> None:
    student, teacher, tokens = random_pair()
    narrow, target = student.bfloat16(), teacher.bfloat16()
    loss = objective(narrow, target, tokens)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, objective(narrow.float(), target.float(), tokens))
    assert objective.gradient(narrow, target, tokens)[1].dtype == torch.float32
    assert objective(student, teacher, tokens).dtype == torch.float64


@pytest.mark.parametrize("objective", STOCK, ids=name_of)
def test_plain_data(objective: Objective) -> None:
    assert isinstance(objective, Objective)
    assert pickle.loads(pickle.dumps(objective)) == objective
    assert dataclasses.replace(objective) == objective
    assert hash(objective) == hash(dataclasses.replace(objective))
    with pytest.raises(dataclasses.FrozenInstanceError):
        objective.beta = 2.0


def test_names_tell_objectives_apart() -> None:
    objectives = [*STOCK, jsd(0.25 + 1e-12)]
    assert len({objective.name for objective in objectives}) == len(objectives)
    assert (forward_kl.name, jsd(0.5).name, skew_kl().name) == (
        "forward_kl",
        "jsd(0.5)",
        "skew_kl(0.1)",
    )
    assert repr(jsd(0.5)) == "JensenShannon(beta=0.5)"


@pytest.mark.parametrize(
    ("make", "value"), [(jsd, 1.5), (jsd, -0.1), (skew_kl, 1.0), (skew_reverse_kl, -0.2)]
)
def test_parameters_out_of_range(make: Callable[[float], Objective], value: float) -> None:
    with pytest.raises(ValueError, match=str(value)):
        make(value)
