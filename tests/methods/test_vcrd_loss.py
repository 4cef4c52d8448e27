"""VCRD: the step loss, how it is packed, and the token variant; P6."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from harness.objectives import skew_kl
from harness.types import Tokens
from methods.vcrd import VCRD
from methods.vcrd.loss import StepLoss, TokenWeighted, examples
from methods.vcrd.proposals import Action, Pair, pairs
from methods.vcrd.validity import validities
from methods.vcrd.weights import weights
from tests.benches import Run
from tests.methods.vcrd_bench import (
    ADD,
    bench,
    vcrd,
)

RNG = np.random.default_rng(0)


def test_p6_the_token_weight_is_a_constant_of_the_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 30, 5, generator=generator).double()
    nothing = Tokens(torch.zeros(30, dtype=torch.long), torch.ones(30), {})
    objective, base = TokenWeighted(skew_kl(0.1)), skew_kl(0.1)
    leaf = student.clone().requires_grad_()
    weight = objective.weight(student, teacher)
    objective(leaf, teacher, nothing).sum().backward()
    _, slope = base.gradient(student.clone(), teacher, nothing)  # type: ignore[attr-defined]
    assert torch.allclose(leaf.grad, weight[:, None] * slope)  # type: ignore[arg-type]
    assert (weight[student.argmax(-1) == teacher.argmax(-1)] == 0).all() and (weight > 0).any()


def test_the_token_weight_by_hand() -> None:
    teacher = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]]).log() + 3  # logits, not normalised
    student = torch.tensor([[0.1, 0.8, 0.1], [0.9, 0.0, 0.1]])
    assert TokenWeighted.weight(student, teacher).tolist() == pytest.approx([1 - 0.3 / 0.5, 0])


def step_loss(run: Run, action: Action, objective: Any) -> float:
    """mean_i D(teacher, student) over the step's tokens, from whole logits"""
    prompt = run.student.encode(run.lab.prompt(action.problem))
    ids = torch.tensor([(*prompt, *action.tokens)])
    rows = slice(len(prompt) + action.prefix - 1, len(prompt) + len(action.tokens) - 1)
    with torch.no_grad():
        q, p = (model.model(ids).logits[0, rows] for model in (run.student, run.teacher))
    return float(objective(q, p, Tokens(ids[0], ids[0], {})).mean())


@pytest.mark.parametrize("fields", [
    {}, {"gamma": 0.25}, {"base_loss": "fkl"}, {"base_loss": "rkl", "normalise": "none"}, {"base_loss": "gjsd", "beta": 0.3},
    {"normalise": "none", "weight": "relu"},
])  # fmt: skip
def test_the_packed_loss_is_the_definition(fields: dict[str, Any]) -> None:
    """One step over all pairs: sum_k w_k [T_k + gamma S_k] over sum_k w_k (1 + gamma), or over the number of proposals."""
    settings = {"steps": "line", "refresh": 0, "positions": 3, "validity": "oracle", **fields}
    run = Run("vcrd", settings, train=False)
    method = run.method
    assert isinstance(method, VCRD)
    found = pairs(run.lab, method, run.lab.problems, False)
    w = weights(method, *validities(run.lab, method, found, False), RNG)
    sides = {who: (method.gamma if who == "student" else 1.0) for who in method.objectives}
    total = sum(
        weight * scale * step_loss(run, getattr(pair, who), method.objectives[who])
        for pair, weight in zip(found, w, strict=True)
        for who, scale in sides.items()
    )
    scale = len(found) * len(sides) if method.normalise == "none" else w.sum() * sum(sides.values())
    made_ = method.examples(run.lab, run.lab.problems, False)
    assert len(made_) == len(found) * len(sides) and any(not e.response for e in made_)
    assert len({round(x, 6) for x in w.tolist()}) > 1
    run.trainer._step(run.stages[0], made_, lambda: run.lab.teacher, 0.0)
    assert run.losses == pytest.approx([total / scale], rel=1e-4)


def test_packing_by_hand() -> None:
    """A response of three steps of 2 tokens; at its first both models agree, at its last the other model writes 3 tokens."""
    lab = bench({"add": [""]})
    full = lab.teacher.tokenize("a\nb\nc\n", end=False)
    first, last = Action(ADD, 0, full[:2], "", False), Action(ADD, 4, full, "", False)
    other = Action(ADD, 4, (*full[:4], *lab.teacher.tokenize("de\n", end=False)), "", False)
    given = [Pair(first, first, "student"), Pair(other, last, "student")]
    own, apart, *saved = examples(lab, given, [2.0, 0.5], {"teacher": 1.0, "student": 0.25})
    # the response: 2 as teacher's, 0.5 as student's first step, 0.125 as student's last
    assert own.response == full and own.weight == pytest.approx(2.625)
    assert own.loss == (True, True, False, False, True, True)
    assert [x * 2.625 for x in own.scalars["teacher"]] == pytest.approx([1, 1, 0, 0, 0, 0])  # type: ignore[union-attr]
    assert [x * 2.625 for x in own.scalars["student"]] == pytest.approx(
        [0.25, 0.25, 0, 0, 0.0625, 0.0625]
    )  # type: ignore[union-attr]
    assert (
        apart.response == other.tokens
        and apart.weight == 0.5
        and apart.loss == (*[False] * 4, *[True] * 3)
    )
    assert apart.scalars["teacher"] == pytest.approx((*[0] * 4, *[1 / 3] * 3)) and not any(
        apart.scalars["student"]
    )  # type: ignore[arg-type]
    assert [(e.weight, e.response) for e in saved] == [
        (0, ())
    ] * 2  # four proposals in two sequences


def test_the_step_losss_gradient_is_that_of_autograd() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 6, 5, generator=generator).double()
    shares = {
        "teacher": torch.tensor([0, 0.5, 1, 0, 0.2, 0]).double(),
        "student": torch.tensor([0.3, 0, 1, 0, 0, 0]).double(),
    }
    tokens = Tokens(torch.zeros(6, dtype=torch.long), torch.ones(6), shares)
    objective = StepLoss(vcrd().objectives)
    leaf = student.clone().requires_grad_()
    value = objective(leaf, teacher, tokens)
    value.sum().backward()
    loss, slope = objective.gradient(student.clone(), teacher, tokens)
    assert torch.allclose(value, loss) and torch.allclose(leaf.grad, slope)  # type: ignore[arg-type]
    assert value[3] == 0 == value[5]
