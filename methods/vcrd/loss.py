"""The step loss, and the fewest sequences that hold it.

    L = sum_k w_k [ mean_i D_T(i of a^T_k) + gamma mean_i D_S(i of a^S_k) ] / sum_k w_k (1 + gamma)

A response carries every proposal that is a step of its own in one sequence, and of the other model's those that are the same step;
only a proposal that differs needs a sequence for itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.types import Example, Lab, Objective, Tokens
from methods.vcrd.proposals import OTHER, Action, Pair

if TYPE_CHECKING:
    from torch import Tensor


def examples(
    lab: Lab, made: Sequence[Pair], weights: Sequence[float], sides: Mapping[str, float]
) -> Iterator[Example]:
    """The sequences of all pairs; `sides`: what a teacher's and a student's proposal count, 1 and gamma.

    Two scalars of each token say what part of the sequence's weight it has, as the teacher's step and as the student's. Each sequence
    that was saved stands as a zero, so that there are as many examples as proposals.
    """
    groups: dict[str, list[tuple[Pair, float]]] = {}
    for pair, weight in zip(made, weights, strict=True):
        groups.setdefault(pair.own.problem.id, []).append((pair, weight))
    for members in groups.values():
        together = [(p.own, p.source, w) for p, w in members]
        together += [(p.other, OTHER[p.source], w) for p, w in members if p.same]
        apart = [[(p.other, OTHER[p.source], w)] for p, w in members if not p.same]
        parts = [[part for part in some if part[1] in sides] for some in (together, *apart)]
        parts = [some for some in parts if some]
        for some in parts:
            yield _sequence(lab, some, sides)
        saved = len(members) * len(sides) - len(parts)
        yield from [Example.zero(members[0][0].own.problem)] * saved


def _sequence(
    lab: Lab, parts: Sequence[tuple[Action, str, float]], sides: Mapping[str, float]
) -> Example:
    """One sequence with the loss of (step, whose proposal, weight): a token counts w / |a| of its step."""
    longest = max((action for action, _, _ in parts), key=lambda action: len(action.tokens))
    total = sum(weight * sides[who] for _, who, weight in parts)
    share = {who: [0.0] * len(longest.tokens) for who in ("teacher", "student")}
    loss = [False] * len(longest.tokens)
    for action, who, weight in parts:
        for place in range(action.prefix, len(action.tokens)):
            loss[place] = True
            if total:
                share[who][place] = weight * sides[who] / len(action.step) / total
    prompt = lab.student.encode(lab.prompt(longest.problem))
    scalars = {who: tuple(values) for who, values in share.items()}
    return Example(longest.problem.id, prompt, longest.tokens, total, tuple(loss), None, scalars)


@dataclass(frozen=True)
class StepLoss:
    """t D_T + s D_S for each token, t and s its parts of the weight as the teacher's and as the student's step."""

    sides: Mapping[str, Objective]  # teacher: D_T, student: D_S

    @property
    def name(self) -> str:
        return " + ".join(f"{who} {of.name}" for who, of in self.sides.items())

    @property
    def needs_teacher(self) -> bool:
        return any(of.needs_teacher for of in self.sides.values())

    def __call__(self, student: Tensor, teacher: Tensor | None, tokens: Tokens) -> Tensor:
        loss = student.new_zeros(len(student))
        for who, objective in self.sides.items():
            share, rows = self._rows(tokens, who)
            if len(rows):
                there = None if teacher is None else teacher[rows]
                value = objective(student[rows], there, tokens.rows(rows))
                loss = loss.index_add(0, rows, share * value)
        return loss

    def gradient(
        self, student: Tensor, teacher: Tensor | None, tokens: Tokens
    ) -> tuple[Tensor, Tensor]:
        loss, slope = student.new_zeros(len(student)), student.new_zeros(student.shape)
        for who, objective in self.sides.items():
            share, rows = self._rows(tokens, who)
            if len(rows):
                there = None if teacher is None else teacher[rows]
                value, pull = objective.gradient(student[rows], there, tokens.rows(rows))  # type: ignore[attr-defined]
                loss.index_add_(0, rows, share * value)
                slope.index_add_(0, rows, share[:, None] * pull)
        return loss, slope

    @staticmethod
    def _rows(tokens: Tokens, who: str) -> tuple[Tensor, Tensor]:
        """The parts that are not zero, and the rows where they stand."""
        rows = tokens.scalars[who].nonzero()[:, 0]
        return tokens.scalars[who][rows], rows


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
