"""Reverse KL: match the teacher token by token on the student's own fresh responses (PACED's unweighted on-policy arm, arXiv:2603.11178).

The KL of every position is taken over the whole vocabulary; no gradient flows through the sampling.
"""

from __future__ import annotations

from collections.abc import Iterator

from harness.objectives import reverse_kl
from harness.registry import Method, method
from harness.types import MEAN, Lab, OnPolicy, Reduction, Stage


@method("rkl", paper="arXiv:2603.11178")
class ReverseKL(Method):
    needs = frozenset({"teacher.logits"})

    reduction: Reduction = "seq_mean"  # tokens to problem (reading)

    def stages(self, lab: Lab) -> Iterator[Stage]:
        make = lab.rollouts(temperature=1.0, top_p=1.0, top_k=0)
        yield Stage("reverse", OnPolicy(lab.problems, make), reverse_kl, mean=MEAN[self.reduction])
