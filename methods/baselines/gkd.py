"""GKD: a divergence between forward and reverse KL, on the student's own text in a share of the steps (arXiv:2306.13649).

Which text a step trains on is drawn anew for each step, as the paper's algorithm does. Defaults are those of TRL's trainer, which is
not the authors'; the loss is taken at softmax temperature 1, where TRL also divides the logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from harness.config import search
from harness.objectives import jsd
from harness.registry import Method, method
from harness.types import MEAN, Example, Lab, OnPolicy, Problem, Reduction, Stage


@method("gkd", paper="arXiv:2306.13649")
class GKD(Method):
    needs = frozenset({"teacher.generate", "teacher.logits"})

    lam: float = search(
        0.5, 0.0, 1.0
    )  # lambda: share of steps on the student's text (TRL's default)
    beta: float = search(0.5, 0.0, 1.0)  # beta: 0 forward KL, 1 reverse KL (TRL's default)
    temperature: float = search(0.9, 0.5, 1.2, ge=0, le=2)  # of student samples (TRL's default)
    references: int = search(
        1, 1, 8, le=1024
    )  # teacher samples a problem, first good one (reading)
    keep_wrong_teacher: bool = False  # train on unverified references too (reading)
    reduction: Reduction = "token_mean"  # tokens to step (TRL's default)

    def required(self) -> frozenset[str]:
        return self.needs - {"teacher.generate"} if self.lam == 1 else self.needs

    def stages(self, lab: Lab) -> Iterator[Stage]:
        written = self._written(lab)
        rollouts = lab.rollouts(temperature=self.temperature, top_p=1.0, top_k=0)

        def make(problems: Sequence[Problem]) -> list[Example]:
            # A function of seed and step alone, so that a run that was cut draws the same again; u < 1 always.
            if lab.rng("gkd: whose text", on_policy=True).random() < self.lam:
                return rollouts(problems)
            return [written[problem.id] for problem in problems]

        problems = [p for p in lab.problems if self.lam == 1 or p.id in written]
        yield Stage("gkd", OnPolicy(problems, make), jsd(self.beta), mean=MEAN[self.reduction])

    def _written(self, lab: Lab) -> dict[str, Example]:
        """The teacher's response to each problem; none are asked for where no step needs one."""
        if self.lam == 1:
            return {}
        examples = lab.references(n=self.references, verified=not self.keep_wrong_teacher)
        return {example.problem: example for example in examples}
