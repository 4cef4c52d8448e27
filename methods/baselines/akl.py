"""Adaptive KL: at every token mix forward and reverse KL by where teacher and student disagree (AKL, arXiv:2404.02657).

Where the gap lies among the teacher's likely tokens forward KL leads, where it lies among the unlikely ones reverse KL. Written from
the authors' public code and not the paper; which text it is run on is our reading.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from harness.config import search
from harness.objectives import Divergence, forward_kl, reverse_kl
from harness.registry import Method, method
from harness.types import MEAN, Lab, OffPolicy, OnPolicy, Reduction, Stage

if TYPE_CHECKING:
    from torch import Tensor

HeadRule = Literal["cum_le_mu", "smallest_ge_mu"]


@method("akl", paper="arXiv:2404.02657")
class AKL(Method):
    needs = frozenset({"teacher.generate", "teacher.logits"})

    mu: float = search(
        0.5, 0.1, 0.9, ge=0, le=1
    )  # mu: teacher probability of the head (authors' code)
    head_rule: HeadRule = "cum_le_mu"  # is the token that crosses mu out (authors' code) or in
    responses: Literal["teacher", "student"] = "teacher"  # whose text; student: fresh (reading)
    references: int = search(
        1, 1, 8, le=1024
    )  # teacher samples a problem, first good one (reading)
    keep_wrong_teacher: bool = False  # train on unverified references too (reading)
    reduction: Reduction = "token_mean"  # tokens to step (authors' code)

    def required(self) -> frozenset[str]:
        return self.needs - {"teacher.generate"} if self.responses == "student" else self.needs

    def stages(self, lab: Lab) -> Iterator[Stage]:
        source: OffPolicy | OnPolicy
        if self.responses == "teacher":
            verified = not self.keep_wrong_teacher
            source = OffPolicy(lab.references(n=self.references, verified=verified))
        else:
            make = lab.rollouts(temperature=1.0, top_p=1.0, top_k=0)
            source = OnPolicy(lab.problems, make)
        yield Stage("akl", source, AdaptiveKL(self.mu, self.head_rule), mean=MEAN[self.reduction])


def head(teacher: Tensor, mu: float, rule: HeadRule) -> Tensor:
    """[N, V], the teacher's likeliest tokens: as many as have p_1 + ... + p_k <= mu, or the fewest with p_1 + ... + p_k >= mu

    p_1 >= p_2 >= ...; the likeliest token is always one of them, and of equal ones the first in the vocabulary goes first.
    """
    ordered, order = teacher.sort(dim=-1, descending=True, stable=True)
    mass = ordered.cumsum(-1)
    chosen = mass <= mu
    if rule == "smallest_ge_mu":
        chosen[..., 1:] = mass[..., :-1] < mu
    chosen[..., 0] = True
    return chosen.scatter(-1, order, chosen)  # back from ranks to the vocabulary's own order


@dataclass(frozen=True)
class AdaptiveKL(Divergence):
    """g_h/(g_h+g_t) KL(p || q) + g_t/(g_h+g_t) KL(q || p), g_h = sum_head |p - q|, g_t = sum_tail |p - q|.

    The two coefficients are constants of the gradient, so dz is the same mixture of the two KLs' gradients.
    """

    mu: float
    rule: HeadRule = "cum_le_mu"

    @property
    def name(self) -> str:
        return f"adaptive_kl({self.mu!r}, {self.rule})"

    def coefficients(self, teacher_logp: Tensor, student_logp: Tensor) -> tuple[Tensor, Tensor]:
        """[N] each: what forward and reverse KL count; both 0 where p = q"""
        teacher = teacher_logp.exp()
        gap = (teacher - student_logp.detach().exp()).abs()
        inside = head(teacher, self.mu, self.rule)
        ahead, behind = (gap * inside).sum(-1), (gap * ~inside).sum(-1)
        total = (ahead + behind).clamp_min(1e-8)
        return ahead / total, behind / total

    def value(self, teacher_logp: Tensor, student_logp: Tensor) -> Tensor:
        ahead, behind = self.coefficients(teacher_logp, student_logp)
        forward = forward_kl.value(teacher_logp, student_logp)
        return ahead * forward + behind * reverse_kl.value(teacher_logp, student_logp)

    def slope(self, teacher_logp: Tensor, student_logp: Tensor) -> tuple[Tensor, Tensor]:
        ahead, behind = self.coefficients(teacher_logp, student_logp)
        forward, pull = forward_kl.slope(teacher_logp.clone(), student_logp.clone())
        reverse, push = reverse_kl.slope(teacher_logp, student_logp)
        loss = ahead * forward + behind * reverse
        return loss, pull.mul_(ahead[:, None]).add_(push.mul_(behind[:, None]))
