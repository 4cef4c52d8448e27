"""From the validities of two proposals to the strength of the update (P2 to P6 of the card); every formula here is a reading.

V_T, V_S in [0, 1], Delta = V_T - V_S. All are NumPy arrays [N]: no gradient can flow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.special import expit

if TYPE_CHECKING:
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
