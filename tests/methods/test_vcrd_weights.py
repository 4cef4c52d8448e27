"""VCRD: from two validities to a weight, by hand; P2, P4, P5, and the shuffled control."""

from __future__ import annotations

from itertools import pairwise
from math import exp
from typing import Any

import numpy as np
import pytest
import torch

from harness.types import Tokens
from methods.vcrd.weights import weights
from tests.methods.vcrd_bench import (
    vcrd,
)

FORMS = ["sigmoid", "linear", "ratio", "exp", "hard", "relu"]  # calibrated by Delta

CONTROLS = ["teacher_only", "student_only", "inverted", "shuffled", "uniform"]


def weigh(form: str, teacher: Any, student: Any, **fields: Any) -> list[float]:
    v = np.asarray(teacher, dtype=float), np.asarray(student, dtype=float)
    return weights(vcrd(weight=form, **fields), *v, np.random.default_rng(1)).tolist()


def test_weights_by_hand() -> None:
    vt, vs = [0.9, 0.5, 0.2], [0.3, 0.5, 0.7]  # Delta 0.6, 0, -0.5
    s = [2 / (1 + exp(-d / 0.4)) for d in (0.6, 0.0, -0.5)]
    wide = {"low": 0.0, "high": 100.0}
    assert weigh("sigmoid", vt, vs, tau=0.4, **wide) == pytest.approx(s)
    assert weigh("inverted", vt, vs, tau=0.4, **wide) == pytest.approx([2 - x for x in s])
    assert weigh("linear", vt, vs, strength=0.5, **wide) == pytest.approx([1.3, 1, 0.75])
    assert weigh("ratio", vt, vs, **wide) == pytest.approx([1.5, 1, 4 / 9], abs=1e-5)
    assert weigh("exp", vt, vs, tau=0.3, **wide) == pytest.approx([exp(2), 1, exp(-5 / 3)])
    assert weigh("hard", vt, vs, delta=0.0) == [1, 0, 0]  # Delta > 0: a tie is no reason to learn
    assert weigh("hard", vt, vs, delta=0.2) == [1, 1, 0]
    assert weigh("hard", vt, vs) == [1, 1, 0]  # as set: a tie passes
    assert weigh("relu", vt, vs) == pytest.approx([0.6, 0, 0])
    assert weigh("teacher_only", vt, vs, **wide) == pytest.approx([1.8, 1, 0.4])
    assert weigh("student_only", vt, vs, **wide) == pytest.approx([1.4, 1, 0.6])
    assert weigh("uniform", vt, vs) == [1, 1, 1]


def test_the_clip() -> None:
    assert weigh("exp", [1, 0], [0, 1], tau=0.1, low=0.1, high=3.0) == [3, 0.1]
    assert weigh("sigmoid", [0], [1], tau=0.1, low=0.3) == [0.3]
    assert weigh("linear", [0], [1], strength=5.0) == [0.05]  # never negative
    assert weigh("hard", [0], [1], low=0.2) == [0] == weigh("relu", [0], [1], low=0.2)  # gates


GRID = [(t / 10, s / 10) for t in range(11) for s in range(11)]


@pytest.mark.parametrize("form", ["sigmoid", "linear", "exp", "hard", "relu"])
def test_p2_only_the_difference_counts(form: str) -> None:
    assert weigh(form, [0.9, 0.6], [0.7, 0.4]) == pytest.approx([weigh(form, [0.5], [0.3])[0]] * 2)
    assert weigh("teacher_only", [0.9], [0.7]) != weigh(
        "teacher_only", [0.5], [0.3]
    )  # the control does not


@pytest.mark.parametrize("form", FORMS + CONTROLS)
def test_p4_the_update_never_reverses(form: str) -> None:
    assert min(weigh(form, *zip(*GRID, strict=True), strength=3.0, tau=0.05)) >= 0
    logits = torch.randn(2, 40, 7, generator=torch.Generator().manual_seed(0))
    nothing = Tokens(torch.zeros(40, dtype=torch.long), torch.ones(40), {})
    for objective in vcrd().objectives.values():  # distances from the teacher
        assert (objective(logits[0], logits[1], nothing) >= 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_p5_the_weight_grows_with_the_teachers_lead(form: str) -> None:
    leads = [weigh(form, [0.5 + d / 2], [0.5 - d / 2])[0] for d in np.linspace(-1, 1, 41)]
    assert all(a <= b + 1e-12 for a, b in pairwise(leads)) and leads[0] < leads[-1]
    worse = [weigh("inverted", [0.5 + d / 2], [0.5 - d / 2])[0] for d in np.linspace(-1, 1, 41)]
    assert all(a >= b for a, b in pairwise(worse)) and worse[0] > worse[-1]


def test_shuffled_weights_are_those_of_the_method_in_another_order() -> None:
    vt, vs = [0.9, 0.5, 0.2, 0.7], [0.3, 0.5, 0.7, 0.6]
    assert sorted(weigh("shuffled", vt, vs)) == pytest.approx(sorted(weigh("sigmoid", vt, vs)))


def test_shuffled_weights_fall_back_to_the_base_loss_in_expectation() -> None:
    """A closed form: one logistic student per pair, l_k = (theta - y_k)^2 / 2, so the weighted step is theta - sum w y / sum w.
    Over the permutations it is the step of uniform weights, theta - mean y; the true weights move it elsewhere."""
    vt, vs, y = (
        np.array([0.9, 0.5, 0.1, 0.8]),
        np.array([0.1, 0.5, 0.9, 0.1]),
        np.array([3.0, -1, 2, 7]),
    )
    rng, setting = np.random.default_rng(3), vcrd(weight="shuffled")
    pulls = np.array(
        [w @ y / w.sum() for w in (weights(setting, vt, vs, rng) for _ in range(6000))]
    )
    error = pulls.std() / len(pulls) ** 0.5
    assert abs(pulls.mean() - y.mean()) < 4 * error < 0.2
    own = np.array(weigh("sigmoid", vt, vs))
    assert abs(own @ y / own.sum() - y.mean()) > 10 * error
