"""From the validities of two proposals to the strength of the update (P2 to P6 of the card); every formula here is a reading.

V_T, V_S in [0, 1], Delta = V_T - V_S. All are NumPy arrays [N]: no gradient can flow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import expit

from harness.types import Objective, Tokens

if TYPE_CHECKING:
    from torch import Tensor

    from methods.vcrd import VCRD

EPS = 1e-6


def weights(
    vcrd: VCRD, teacher: np.ndarray, student: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """How much each pair counts, [N], before the normalisation.

    sigmoid       2 s(Delta / tau)      linear        1 + lambda Delta       ratio    2 V_T / (V_T + V_S + eps)
    exp           exp(Delta / tau)      hard          1[Delta > -delta]      relu     max(Delta, 0)
    teacher_only  2 V_T                 student_only  2 (1 - V_S)            uniform  1
    inverted      2 s(-Delta / tau)     shuffled      sigmoid, permuted over the pairs

    Clipped to [low, high]; hard and relu are gates, so nothing lifts them above their zero.
    """
    delta = teacher - student
    form = vcrd.weight
    if form == "linear":
        value = 1 + vcrd.strength * delta
    elif form == "ratio":
        value = 2 * teacher / (teacher + student + EPS)
    elif form == "exp":
        value = np.exp(delta / vcrd.tau)
    elif form == "hard":
        return (delta > -vcrd.delta).astype(float)
    elif form == "relu":
        return np.minimum(np.maximum(delta, 0.0), vcrd.high)
    elif form == "teacher_only":
        value = 2 * teacher
    elif form == "student_only":
        value = 2 * (1 - student)
    elif form == "uniform":
        return np.ones(len(delta))
    else:
        value = 2 * expit((-delta if form == "inverted" else delta) / vcrd.tau)
    value = np.clip(value, vcrd.low, vcrd.high)
    return rng.permutation(value) if form == "shuffled" else value


@dataclass(frozen=True)
class TokenWeighted:
    """The token-level reading (A1 b), an ablation: w D with w = 1 - p(a_S) / p(a_T), a_T and a_S the models' arg-max tokens.

    The teacher's own likelihood is the judge, so the student is never ranked above it: P3 does not hold. w is a constant of the
    gradient.
    """

    base: Objective

    @property
    def name(self) -> str:
        return f"token_validity({self.base.name})"

    @property
    def needs_teacher(self) -> bool:
        return True

    def __call__(self, student: Tensor, teacher: Tensor | None, tokens: Tokens) -> Tensor:
        return self.weight(student, teacher) * self.base(student, teacher, tokens)

    @staticmethod
    def weight(student: Tensor, teacher: Tensor | None) -> Tensor:
        """[N], in [0, 1]; 0 where both models would write the same token"""
        assert teacher is not None
        chosen = student.detach().argmax(-1, keepdim=True)
        gap = teacher.gather(-1, chosen)[:, 0] - teacher.max(-1).values  # log p(a_S) - log p(a_T)
        return 1 - gap.detach().float().exp()
