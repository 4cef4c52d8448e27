"""PACED: distillation at the frontier of the student's competence (arXiv:2603.11178).

Each problem counts by how often the student solves it, w(p) = p^alpha (1-p)^beta; forward KL on the teacher's responses, then
reverse KL on the student's own. With itself as the teacher (self-distillation) the student is judged by its frozen start, which is
shown the answer. Formulas are the paper's where marked with an equation; what is our reading says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import Literal

import numpy as np
from pydantic import model_validator

from harness.config import search
from harness.objectives import forward_kl, reverse_kl
from harness.registry import Method, method
from harness.types import MEAN, Example, Lab, OffPolicy, OnPolicy, Problem, Reduction, Stage

PLAIN = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}  # the student's own distribution


@method("paced", paper="arXiv:2603.11178")
class Paced(Method):
    needs = frozenset({"teacher.generate", "teacher.logits"})

    alpha: float = search(1.0, 0.0, 3.0, le=20.0)  # exponent on p (eq. 3)
    beta: float = search(1.0, 0.0, 3.0, le=20.0)  # exponent on 1 - p (eq. 3)
    rollouts: int = search(8, 4, 32, ge=1, le=1024)  # K student samples a problem (sec. 3.1)
    smoothing: float = search(0.0, 0.0, 1.0)  # a in p = (c + a) / (K + 2a); 0 is the paper's
    norm: Literal["dataset_mean1", "none", "max1", "batch_sum1"] = "dataset_mean1"  # of w (reading)
    drop_zeros: bool = False  # leave problems of weight 0 out of order and means too (reading)
    schedule: Literal["fkl_then_rkl", "rkl_then_fkl", "fkl", "rkl"] = (
        "fkl_then_rkl"  # order of the KLs
    )
    switch: float = search(0.5, 0.25, 0.75, ge=0.01, le=0.99)  # share of the first stage (reading)
    refresh_at_switch: bool = False  # measure p again before the second stage (reading)
    reestimate_every: float = search(
        0.0, 0.0, 4.0, le=1000.0
    )  # epochs after which p is measured again; 0: never, the paper's
    references: int = search(
        1, 1, 8, le=1024
    )  # teacher samples a problem; the first that counts is used
    keep_wrong_teacher: bool = False  # train on unverified references too (reading)
    reduction: Reduction = "seq_mean"  # tokens to problem (reading)
    track: Literal["distillation", "self_distillation"] = (
        "distillation"  # self: the frozen start teaches (sec. 2)
    )
    self_teacher_context: Literal["answer_in_user", "answer_in_system", "none"] = (
        "answer_in_user"  # what the frozen start is shown that the student is not (reading)
    )

    @model_validator(mode="after")
    def _own_text(self) -> Paced:
        if self.track == "self_distillation" and self.schedule != "rkl":
            raise ValueError(
                "track self_distillation judges the student's own responses: it needs schedule rkl, "
                f"got {self.schedule}"
            )
        return self

    def required(self) -> frozenset[str]:
        if self.track == "self_distillation":
            return frozenset({"base.logits"})
        return self.needs if "fkl" in self.schedule else frozenset({"teacher.logits"})

    def stages(self, lab: Lab) -> Iterator[Stage]:
        if self.track == "self_distillation" and self.self_teacher_context != "none":
            for problem in lab.problems:  # before a single rollout is paid
                self._shown(lab, problem)
        order = self.schedule.split("_then_")
        start, weights = 0.0, self._weights(lab, "pass rates")
        for place, kind in enumerate(order):
            end = self.switch if place < len(order) - 1 else 1.0
            if place and self.refresh_at_switch:
                weights = self._weights(lab, "pass rates at the switch", weights)
            for leg in count(1):
                name = "forward" if kind == "fkl" else "reverse"
                yield Stage(
                    name if leg == 1 else f"{name} {leg}",
                    self._forward(lab, weights) if kind == "fkl" else self._reverse(lab, weights),
                    forward_kl if kind == "fkl" else reverse_kl,
                    share=end - (start if leg == 1 else lab.consumed),
                    mean=MEAN[self.reduction],
                    normalise="step" if self.norm == "batch_sum1" else "none",
                    optimizer="reset" if place and leg == 1 else "keep",
                    teacher=lab.base if self.track == "self_distillation" else None,
                    epochs=self.reestimate_every or None,
                )
                if not self.reestimate_every or lab.consumed > end - 1e-9:
                    break
                weights = self._weights(lab, f"pass rates before {name} {leg + 1}", weights)
            start = end

    def _forward(self, lab: Lab, weights: np.ndarray) -> OffPolicy:
        examples = lab.references(
            weights.tolist(), n=self.references, verified=not self.keep_wrong_teacher
        )
        return OffPolicy([e for e in examples if e.weight or not self.drop_zeros])

    def _reverse(self, lab: Lab, weights: np.ndarray) -> OnPolicy:
        kept = [p for p, w in zip(lab.problems, weights, strict=True) if w or not self.drop_zeros]
        write = lab.rollouts(weights.tolist(), **PLAIN)
        if self.track == "distillation" or self.self_teacher_context == "none":
            return OnPolicy(kept, write)
        by_id = {problem.id: problem for problem in lab.problems}

        def make(block: Sequence[Problem]) -> list[Example]:
            return [
                replace(e, teacher_prompt=self._shown(lab, by_id[e.problem])) if e.weight else e
                for e in write(block)
            ]

        return OnPolicy(kept, make)

    def _shown(self, lab: Lab, problem: Problem) -> tuple[int, ...]:
        """The problem and its answer, as the self-teacher reads them."""
        if problem.answer is None:
            raise ValueError(
                f"problem {problem.id!r} has no answer to show to the self-teacher: take problems with answers, "
                "or self_teacher_context none"
            )
        bare, told = lab.prompt(problem), lab.prompt(problem, problem.answer)
        if self.self_teacher_context == "answer_in_user":
            return lab.base.encode(told)
        return lab.base.encode(bare, system=told.removeprefix(bare).strip())

    def _weights(self, lab: Lab, name: str, before: np.ndarray | None = None) -> np.ndarray:
        """w of every problem, [P], from p as it is now; the weights before, where no problem has any left."""
        rates = lab.pass_rates(lab.student, self.rollouts, **PLAIN)
        a = self.smoothing
        weights = beta_kernel(
            (rates * self.rollouts + a) / (self.rollouts + 2 * a), self.alpha, self.beta
        )
        counts, edges = np.histogram(rates, bins=np.linspace(0, 1, self.rollouts + 2))
        lab.note(name, {"edges": edges.tolist(), "counts": counts.tolist()})
        lab.note(f"{name}: problems of weight 0", int((weights == 0).sum()))
        if not weights.any() and before is not None:
            lab.note(f"{name}: no problem has weight", "the weights before are kept")
            return before
        if not weights.any():
            raise ValueError(
                f"every problem has weight 0: pass rates are {np.unique(rates).tolist()} over "
                f"{self.rollouts} rollouts; take problems nearer the student's frontier, or more rollouts"
            )
        if self.norm == "dataset_mean1":
            weights = weights / (weights[weights > 0] if self.drop_zeros else weights).mean()
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
