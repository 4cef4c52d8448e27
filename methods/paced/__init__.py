"""PACED: distillation at the frontier of the student's competence (arXiv:2603.11178).

Each problem counts by how often the student solves it, w(p) = p^alpha (1-p)^beta; forward KL on the teacher's responses, then
reverse KL on the student's own. Formulas are the paper's where marked with an equation; the normalisation, the switch point and
the reduction are our reading. Left out here: re-estimation of p during a stage, and self-distillation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np

from harness.config import search
from harness.objectives import forward_kl, reverse_kl
from harness.registry import Method, method
from harness.types import Lab, OffPolicy, OnPolicy, Stage

MEAN = {"seq_mean": "sequence", "token_mean": "token", "sum": "sum"}


@method("paced", paper="arXiv:2603.11178")
class Paced(Method):
    needs = frozenset({"teacher.generate", "teacher.logits"})

    alpha: float = search(1.0, 0.0, 3.0)  # exponent on p (eq. 3)
    beta: float = search(1.0, 0.0, 3.0)  # exponent on 1 - p (eq. 3)
    rollouts: int = search(8, 4, 32, ge=1, le=1024)  # K student samples a problem (sec. 3.1)
    norm: Literal["dataset_mean1", "none", "max1", "batch_sum1"] = "dataset_mean1"  # of w (reading)
    drop_zeros: bool = False  # leave problems of weight 0 out of the denominator too (reading)
    schedule: Literal["fkl_then_rkl", "rkl_then_fkl", "fkl", "rkl"] = (
        "fkl_then_rkl"  # order of the KLs
    )
    switch: float = search(0.5, 0.25, 0.75, ge=0.01, le=0.99)  # share of the first stage (reading)
    refresh_at_switch: bool = False  # measure p again before the second stage (reading)
    references: int = search(
        1, 1, 8, le=1024
    )  # teacher samples a problem; the first that counts is used
    keep_wrong_teacher: bool = False  # train on unverified references too (reading)
    reduction: Literal["seq_mean", "token_mean", "sum"] = "seq_mean"  # tokens to problem (reading)

    def stages(self, lab: Lab) -> Iterator[Stage]:
        order = self.schedule.split("_then_")
        shares = [self.switch, 1 - self.switch] if len(order) == 2 else [1.0]
        weights = self._weights(lab, "pass rates")
        for position, (kind, share) in enumerate(zip(order, shares, strict=True)):
            if position and self.refresh_at_switch:
                weights = self._weights(lab, "pass rates at the switch")
            yield Stage(
                {"fkl": "forward", "rkl": "reverse"}[kind],
                self._forward(lab, weights) if kind == "fkl" else self._reverse(lab, weights),
                forward_kl if kind == "fkl" else reverse_kl,
                share=share,
                mean=MEAN[self.reduction],  # type: ignore[arg-type]
                normalise="step" if self.norm == "batch_sum1" else "none",
                optimizer="reset" if position else "keep",
            )

    def _forward(self, lab: Lab, weights: np.ndarray) -> OffPolicy:
        examples = lab.references(
            weights.tolist(), n=self.references, verified=not self.keep_wrong_teacher
        )
        return OffPolicy([e for e in examples if e.weight or not self.drop_zeros])

    def _reverse(self, lab: Lab, weights: np.ndarray) -> OnPolicy:
        kept = [p for p, w in zip(lab.problems, weights, strict=True) if w or not self.drop_zeros]
        return OnPolicy(kept, lab.rollouts(weights.tolist()))

    def _weights(self, lab: Lab, name: str) -> np.ndarray:
        rates = lab.pass_rates(lab.student, self.rollouts, temperature=1.0, top_p=1.0, top_k=0)
        weights = beta_kernel(rates, self.alpha, self.beta)
        counts, edges = np.histogram(rates, bins=np.linspace(0, 1, self.rollouts + 2))
        lab.note(name, {"edges": edges.tolist(), "counts": counts.tolist()})
        lab.note(f"{name}: problems of weight 0", int((weights == 0).sum()))
        if not weights.any():
            raise ValueError(
                f"every problem has weight 0: pass rates are {np.unique(rates).tolist()} over "
                f"{self.rollouts} rollouts; take problems nearer the student's frontier, or more rollouts"
            )
        if self.norm == "dataset_mean1":
            weights = weights / weights.mean()
        elif self.norm == "max1":
            weights = weights / kernel_peak(self.alpha, self.beta)
        return weights


def beta_kernel(p: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    """w(p) = p^alpha (1-p)^beta   (eq. 3), elementwise; 0^0 = 1, so alpha = beta = 0 weighs all alike"""
    return np.power(p, alpha) * np.power(1 - p, beta)


def kernel_peak(alpha: float, beta: float) -> float:
    """The largest value of w, at p* = alpha / (alpha + beta); 1 where both are 0."""
    top = alpha / (alpha + beta) if alpha + beta else 0.0
    return float(beta_kernel(np.array(top), alpha, beta))
