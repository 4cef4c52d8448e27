"""Forward KL: match the teacher token by token on its own verified responses (word-level distillation; PACED's unweighted arm, arXiv:2603.11178).

Every problem counts alike, solved or not: what weighted and filtered methods are measured against.
"""

from __future__ import annotations

from collections.abc import Iterator

from harness.config import search
from harness.objectives import forward_kl
from harness.registry import Method, method
from harness.types import MEAN, Lab, OffPolicy, Reduction, Stage


@method("fkl", paper="arXiv:2603.11178")
class ForwardKL(Method):
    needs = frozenset({"teacher.generate", "teacher.logits"})

    references: int = search(
        1, 1, 8, le=1024
    )  # teacher samples a problem, first good one (reading)
    keep_wrong_teacher: bool = False  # train on unverified references too (reading)
    reduction: Reduction = "seq_mean"  # tokens to problem (reading)

    def stages(self, lab: Lab) -> Iterator[Stage]:
        examples = lab.references(n=self.references, verified=not self.keep_wrong_teacher)
        yield Stage("forward", OffPolicy(examples), forward_kl, mean=MEAN[self.reduction])
