"""Hard filter: train only on problems whose pass rate lies in a band (a baseline of PACED, arXiv:2603.11178).

The weight of a problem is 1[low <= p <= high], p its share of correct student rollouts, measured once. Problems outside the band are
not in the loader at all, so those inside come round more often than under a weight of zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
from pydantic import model_validator

from harness.config import search
from harness.objectives import forward_kl, reverse_kl
from harness.registry import Method, method
from harness.types import MEAN, Lab, OffPolicy, OnPolicy, Reduction, Stage


@method("hard_filter", paper="arXiv:2603.11178")
class HardFilter(Method):
    needs = frozenset({"teacher.generate", "teacher.logits"})

    low: float = search(0.0, 0.0, 0.4, le=1.0)  # least pass rate (reading)
    high: float = search(1.0, 0.6, 1.0, ge=0.0)  # largest pass rate (reading)
    bounds: Literal["exclusive", "inclusive"] = (
        "exclusive"  # is a rate at a bound out or in (reading)
    )
    rollouts: int = search(8, 4, 32, ge=1, le=1024)  # K student samples a problem (sec. 3.1)
    kl: Literal["forward", "reverse"] = "forward"  # on the teacher's text, or on the student's
    references: int = search(
        1, 1, 8, le=1024
    )  # teacher samples a problem, first good one (reading)
    keep_wrong_teacher: bool = False  # train on unverified references too (reading)
    reduction: Reduction = "seq_mean"  # tokens to problem (reading)

    @model_validator(mode="after")
    def _has_room(self) -> HardFilter:
        if self.low > self.high or (self.bounds == "exclusive" and self.low == self.high):
            raise ValueError(
                f"low: no pass rate lies in {self._band}; take a low below high ({self.high:g})"
            )
        return self

    def required(self) -> frozenset[str]:
        return self.needs - {"teacher.generate"} if self.kl == "reverse" else self.needs

    def stages(self, lab: Lab) -> Iterator[Stage]:
        kept = self._kept(lab)
        source: OffPolicy | OnPolicy
        if self.kl == "forward":
            verified = not self.keep_wrong_teacher
            examples = lab.references(kept.tolist(), n=self.references, verified=verified)
            source = OffPolicy([e for e in examples if e.weight])
        else:
            problems = [p for p, keep in zip(lab.problems, kept, strict=True) if keep]
            source = OnPolicy(problems, lab.rollouts(temperature=1.0, top_p=1.0, top_k=0))
        objective = forward_kl if self.kl == "forward" else reverse_kl
        yield Stage(self.kl, source, objective, mean=MEAN[self.reduction])

    def _kept(self, lab: Lab) -> np.ndarray:
        """[P], for each problem whether it is trained on"""
        rates = lab.pass_rates(lab.student, self.rollouts, temperature=1.0, top_p=1.0, top_k=0)
        kept = inside(rates, self.low, self.high, self.bounds)
        counts, edges = np.histogram(rates, bins=np.linspace(0, 1, self.rollouts + 2))
        lab.note("pass rates", {"edges": edges.tolist(), "counts": counts.tolist()})
        lab.note("problems", {"kept": int(kept.sum()), "filtered out": int((~kept).sum())})
        if not kept.any():
            raise ValueError(
                f"no problem has a pass rate in {self._band}: they are {np.unique(rates).tolist()} over {self.rollouts} "
                "rollouts; widen low and high, or take more rollouts, or problems nearer the student's frontier"
            )
        return kept

    @property
    def _band(self) -> str:
        opening, closing = "()" if self.bounds == "exclusive" else "[]"
        return f"{opening}{self.low:g}, {self.high:g}{closing}"


def inside(p: np.ndarray, low: float, high: float, bounds: str) -> np.ndarray:
    """w(p) = 1[low <= p <= high], or 1[low < p < high] where the bounds are exclusive; elementwise"""
    return (low < p) & (p < high) if bounds == "exclusive" else (low <= p) & (p <= high)
