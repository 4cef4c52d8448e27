"""Per-token objectives: what pulls at the student's next-token distribution.

Each is a small frozen object that maps (student logits [N, V], teacher logits [N, V] or None, Tokens) to a loss
per token [N], in nats. It never masks and never reduces. In the equations p is the teacher's distribution, q the
student's, z the student's logits, y the target token; softmax temperature is 1 and the sum runs over the whole
vocabulary. Gradients flow to the student only. Logits must be finite: log-probabilities then are too, and no
equation divides by a probability.

Each also states its gradient in closed form, `gradient(student, teacher, tokens) -> (loss [N], dloss/dz [N, V])`,
which `harness.objectives.chunked` uses. It leaves its arguments as they are. Any other callable with a `name` and
`needs_teacher` is an objective too; its gradient comes from autograd.

N loss tokens, V vocabulary.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.types import Objective, Tokens

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "forward_kl",
    "jsd",
    "nll",
    "reverse_kl",
    "skew_kl",
    "skew_reverse_kl",
]


def log_probabilities(logits: Tensor) -> Tensor:
    """Log-softmax in fp32, or in the logits' own type where that is wider."""
    return (logits if logits.dtype.itemsize >= 4 else logits.float()).log_softmax(-1)


def kl(from_logp: Tensor, to_logp: Tensor) -> Tensor:
    """KL(a || b) = sum_v a_v (log a_v - log b_v)."""
    return (from_logp.exp() * (from_logp - to_logp)).sum(-1)


def mixture(first_logp: Tensor, second_logp: Tensor, share: float) -> Tensor:
    """log(share a + (1 - share) b), with 0 < share < 1."""
    return (first_logp + math.log(share)).logaddexp(second_logp + math.log1p(-share))


def through_softmax(probabilities: Tensor, slope: Tensor) -> Tensor:
    """dD/dz = q (dD/dq - sum_v q_v dD/dq_v); a constant added to the slope drops out."""
    mean = (probabilities * slope).sum(-1, keepdim=True)
    return (slope - mean).mul_(probabilities)


@dataclass(frozen=True)
class NegativeLogLikelihood:
    """-log q(y);  dz = q - 1[v = y]   (cross-entropy on the written token)."""

    @property
    def name(self) -> str:
        return "nll"

    @property
    def needs_teacher(self) -> bool:
        return False

    def __call__(self, student: Tensor, teacher: Tensor | None, tokens: Tokens) -> Tensor:
        return -log_probabilities(student).gather(-1, tokens.targets[:, None])[:, 0]

    def gradient(
        self, student: Tensor, teacher: Tensor | None, tokens: Tokens
    ) -> tuple[Tensor, Tensor]:
        student_logp = log_probabilities(student)
        target = tokens.targets[:, None]
        loss = -student_logp.gather(-1, target)[:, 0]
        gradient = student_logp.exp_()
        return loss, gradient.scatter_add_(-1, target, gradient.new_full(target.shape, -1.0))


class Divergence(ABC):
    """A distance between the teacher's and the student's next-token distributions.

    A subclass gives `value`, the equation, and `slope`, its closed-form gradient with respect to the student's
    logits along with the value; `slope` may overwrite the log-probabilities it gets.
    """

    @property
    def needs_teacher(self) -> bool:
        return True

    @abstractmethod
    def value(self, teacher_logp: Tensor, student_logp: Tensor) -> Tensor: ...

    @abstractmethod
    def slope(self, teacher_logp: Tensor, student_logp: Tensor) -> tuple[Tensor, Tensor]: ...

    def __call__(self, student: Tensor, teacher: Tensor | None, tokens: Tokens) -> Tensor:
        assert teacher is not None, "a divergence compares with a teacher's logits"
        return self.value(log_probabilities(teacher.detach()), log_probabilities(student))

    def gradient(
        self, student: Tensor, teacher: Tensor | None, tokens: Tokens
    ) -> tuple[Tensor, Tensor]:
        assert teacher is not None, "a divergence compares with a teacher's logits"
        return self.slope(log_probabilities(teacher), log_probabilities(student))


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(p || q) = sum_v p_v log(p_v / q_v);  dz = q - p   (word-level distillation; PACED sec. 3.3)."""

    @property
    def name(self) -> str:
        return "forward_kl"

    def value(self, teacher_logp: Tensor, student_logp: Tensor) -> Tensor:
        return kl(teacher_logp, student_logp)

    def slope(self, teacher_logp: Tensor, student_logp: Tensor) -> tuple[Tensor, Tensor]:
        teacher = teacher_logp.exp()
        loss = teacher_logp.sub_(student_logp).mul_(teacher).sum(-1)
        return loss, student_logp.exp_().sub_(teacher)


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(q || p) = sum_v q_v log(q_v / p_v);  dz = q (log(q / p) - KL(q || p))   (PACED sec. 3.3)."""

    @property
    def name(self) -> str:
        return "reverse_kl"

    def value(self, teacher_logp: Tensor, student_logp: Tensor) -> Tensor:
        return kl(student_logp, teacher_logp)

    def slope(self, teacher_logp: Tensor, student_logp: Tensor) -> tuple[Tensor, Tensor]:
        log_ratio = teacher_logp.neg_().add_(student_logp)
        student = student_logp.exp_()
        loss = (student * log_ratio).sum(-1)
        return loss, log_ratio.sub_(loss[:, None]).mul_(student)


@dataclass(frozen=True)
class JensenShannon(Divergence):
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q   (GKD, arXiv:2306.13649).

    dz = (1 - beta) q (log(q / m) - KL(q || m)).
    """

    beta: float  # near 0 like forward KL, near 1 like reverse KL

    @property
    def name(self) -> str:
        return f"jsd({self.beta!r})"

    def value(self, teacher_logp: Tensor, student_logp: Tensor) -> Tensor:
        middle = mixture(teacher_logp, student_logp, self.beta)
        return self.beta * kl(teacher_logp, middle) + (1 - self.beta) * kl(student_logp, middle)

    def slope(self, teacher_logp: Tensor, student_logp: Tensor) -> tuple[Tensor, Tensor]:
        middle = mixture(teacher_logp, student_logp, self.beta)
        loss = self.beta * kl(teacher_logp, middle) + (1 - self.beta) * kl(student_logp, middle)
        log_ratio = middle.neg_().add_(student_logp)
        return loss, through_softmax(student_logp.exp_(), log_ratio).mul_(1 - self.beta)


@dataclass(frozen=True)
class SkewKL(Divergence):
    """SKL_alpha = KL(p || m), m = alpha p + (1 - alpha) q   (DistiLLM, arXiv:2402.03898).

    dD/dq = -(1 - alpha) p / m. The constant sum_v p_v log p_v is kept, so the loss is a divergence.
    """

    alpha: float  # the teacher's share in the mixture

    @property
    def name(self) -> str:
        return f"skew_kl({self.alpha!r})"

    def value(self, teacher_logp: Tensor, student_logp: Tensor) -> Tensor:
        return kl(teacher_logp, mixture(teacher_logp, student_logp, self.alpha))

    def slope(self, teacher_logp: Tensor, student_logp: Tensor) -> tuple[Tensor, Tensor]:
        log_ratio = teacher_logp - mixture(teacher_logp, student_logp, self.alpha)
        loss = (teacher_logp.exp_() * log_ratio).sum(-1)
        return loss, through_softmax(student_logp.exp_(), log_ratio.exp_().mul_(self.alpha - 1))


@dataclass(frozen=True)
class SkewReverseKL(Divergence):
    """SRKL_alpha = KL(q || m), m = (1 - alpha) p + alpha q   (DistiLLM, arXiv:2402.03898).

    dD/dq = log(q / m) + 1 - alpha q / m: the gradient flows through q inside the mixture too.
    """

    alpha: float  # the student's share in the mixture

    @property
    def name(self) -> str:
        return f"skew_reverse_kl({self.alpha!r})"

    def value(self, teacher_logp: Tensor, student_logp: Tensor) -> Tensor:
        return kl(student_logp, mixture(student_logp, teacher_logp, self.alpha))

    def slope(self, teacher_logp: Tensor, student_logp: Tensor) -> tuple[Tensor, Tensor]:
        log_ratio = student_logp - mixture(student_logp, teacher_logp, self.alpha)
        student = student_logp.exp_()
        loss = (student * log_ratio).sum(-1)
        return loss, through_softmax(student, log_ratio.sub_(log_ratio.exp(), alpha=self.alpha))


nll = NegativeLogLikelihood()
forward_kl = ForwardKL()
reverse_kl = ReverseKL()


def jsd(beta: float) -> Objective:
    """Generalised Jensen-Shannon divergence; beta = 0 is forward KL and beta = 1 reverse KL.

    The ends are special-cased, because the divergence itself vanishes there: JSD_beta / beta -> KL(p || q) as
    beta -> 0, and JSD_beta / (1 - beta) -> KL(q || p) as beta -> 1.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"jsd: beta = {beta} is outside [0, 1]; 0 is forward KL, 1 reverse KL")
    if beta in (0, 1):
        return reverse_kl if beta else forward_kl
    return JensenShannon(float(beta))


def skew_kl(alpha: float = 0.1) -> Objective:
    """Skew KL; alpha = 0 is forward KL."""
    return SkewKL(_skew("skew_kl", alpha)) if alpha else forward_kl


def skew_reverse_kl(alpha: float = 0.1) -> Objective:
    """Skew reverse KL; alpha = 0 is reverse KL."""
    return SkewReverseKL(_skew("skew_reverse_kl", alpha)) if alpha else reverse_kl


def _skew(name: str, alpha: float) -> float:
    if not 0 <= alpha < 1:
        raise ValueError(
            f"{name}: alpha = {alpha} is outside [0, 1); at 1 the loss is zero whatever the student does"
        )
    return float(alpha)
