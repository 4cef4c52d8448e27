"""VCRD: the update is as strong as the teacher's next step is more valid than the student's (arXiv:2605.04078).

Fidelity: reconstruction from the abstract; the paper's method section was not available to us. Each field says what its default
rests on: [paper], [secondary] (DistiLLM-2's released settings, the likely parent), [reading] (ours), or [measured] (on the micro
world). The card lists the properties P1 to P7 that any faithful form has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
from pydantic import model_validator

from harness.config import search
from harness.objectives import forward_kl, jsd, nll, reverse_kl, skew_kl, skew_reverse_kl
from harness.registry import Method, method
from harness.types import Example, Lab, Measure, Objective, OnPolicy, Problem, Stage
from methods.vcrd import loss
from methods.vcrd.proposals import Pair, pairs, responses
from methods.vcrd.validity import validities
from methods.vcrd.weights import weights

Form = Literal["sigmoid", "linear", "ratio", "exp", "hard", "relu", "teacher_only", "student_only", "inverted", "shuffled", "uniform"]  # fmt: skip
Make = Callable[[Sequence[Problem]], list[Example]]


@method("vcrd", paper="arXiv:2605.04078")
class VCRD(Method):
    needs = frozenset({"teacher.generate", "teacher.logits"})

    # Prefixes and proposals
    prefixes: Literal["mixed", "student", "teacher"] = (
        "mixed"  # whose responses they are cut from [reading]
    )
    mix: float = search(0.5, 0.0, 1.0)  # lambda: share of problems with the student's [reading]
    positions: int = search(4, 1, 8, ge=1, le=1024)  # M step positions of a response [reading]
    refresh: int = search(
        32, 8, 64, ge=0, le=10**6
    )  # R steps between rollouts; 0: once, by the base student [reading]
    steps: Literal["auto", "blank", "line", "statement", "block", "sentence"] = (
        "auto"  # what a step is; auto: blank in math, statement in code, else sentence [reading]
    )
    max_step: int = search(
        128, 16, 256, ge=1, le=10**6
    )  # tokens of a step; a longer one is cut into lines [reading]
    temperature: float = search(
        0.8, 0.5, 1.0, ge=0, le=10
    )  # of responses and proposals [secondary]
    top_p: float = search(0.95, 0.8, 1.0, ge=0.01, le=1)  # of responses and proposals [secondary]
    # Validity
    validity: Literal["rollout", "prm", "judge", "likelihood", "oracle", "const", "random"] = (
        "rollout"  # who says how valid a step is [reading]
    )
    completer: Literal["teacher", "student", "both"] = (
        "teacher"  # who completes, in rollouts [measured]
    )
    rollouts: int = search(8, 2, 16, ge=1, le=1024)  # K completions of each proposal [reading]
    # Weight
    weight: Form = "sigmoid"  # from the two validities; the last five are controls [reading]
    tau: float = search(0.25, 0.1, 1.0, log=True, ge=1e-3, le=100)  # of sigmoid and exp [reading]
    strength: float = search(1.0, 0.0, 1.0, le=100)  # lambda of linear [reading]
    delta: float = search(
        0.1, 0.0, 0.5, le=1
    )  # of hard: how far the student may be ahead [reading]
    low: float = search(0.05, 0.0, 0.2, le=1)  # least weight [reading]
    high: float = search(2.0, 1.0, 10.0, ge=1, le=1000)  # largest weight [reading]
    normalise: Literal["batch_mean", "none"] = (
        "batch_mean"  # mean weight 1 in every optimizer step [reading]
    )
    # Loss
    base_loss: Literal["skl_srkl", "fkl", "rkl", "gjsd", "ce"] = (
        "skl_srkl"  # skew KLs; fkl, ce: on the teacher's step alone, rkl: on the student's [secondary]
    )
    skew: float = search(0.1, 0.0, 0.5, le=0.99)  # alpha of the skew KLs [secondary]
    beta: float = search(0.5, 0.1, 0.9, ge=0, le=1)  # of gjsd [secondary]
    gamma: float = search(1.0, 0.0, 2.0, le=100)  # weight of the student's step [secondary]
    granularity: Literal["step", "token"] = (
        "step"  # token: an ablation, judged by the teacher's likelihood; no weight form, validity or normalisation applies [reading]
    )

    @model_validator(mode="after")
    def _consistent(self) -> VCRD:
        if self.gamma == 0 and self.base_loss == "rkl":
            raise ValueError(
                "gamma: rkl trains on the student's steps alone, which gamma 0 switches off"
            )
        if self.granularity == "token" and self.base_loss == "ce":
            raise ValueError(
                "granularity: token weighs a divergence from the teacher; base_loss ce is none"
            )
        if self.granularity == "token" and self.prefixes not in ("mixed", *self.objectives):
            raise ValueError(
                f"granularity: token trains on the responses themselves, and base_loss {self.base_loss} has nothing for the "
                f"{self.prefixes}'s; take prefixes mixed or {next(iter(self.objectives))}"
            )
        return self

    @property
    def asks(self) -> bool:
        """Whether anybody is asked how valid a step is."""
        return self.weight != "uniform" and self.granularity == "step"

    def required(self) -> frozenset[str]:
        if not self.asks:
            return self.needs
        more = {"prm": "prm.reward", "judge": "judge.reward", "likelihood": "teacher.score"}
        return self.needs | {more[self.validity]} if self.validity in more else self.needs

    @property
    def objectives(self) -> dict[str, Objective]:
        """What pulls on each proposal: D_T on the teacher's step, D_S on the student's."""
        chosen: dict[str, dict[str, Objective]] = {
            "skl_srkl": {"teacher": skew_kl(self.skew), "student": skew_reverse_kl(self.skew)},
            "fkl": {"teacher": forward_kl},
            "rkl": {"student": reverse_kl},
            "gjsd": {"teacher": jsd(self.beta), "student": jsd(self.beta)},
            "ce": {"teacher": nll},
        }
        terms = chosen[self.base_loss]
        return {who: of for who, of in terms.items() if who == "teacher" or self.gamma > 0}

    def stages(self, lab: Lab) -> Iterator[Stage]:
        if self.asks and self.validity == "oracle" and lab.oracle is None:
            raise ValueError(
                "vcrd: validity 'oracle' needs problems whose steps can be judged (one set of the micro world alone); "
                "use rollout, prm or judge"
            )
        every = max(1, self.refresh)
        if self.granularity == "token":
            terms = {who: loss.TokenWeighted(of) for who, of in self.objectives.items()}
            yield Stage(
                "vcrd", OnPolicy(lab.problems, self._whole(lab), every), terms, mean="sequence"
            )
            return
        problems, make = lab.problems, self._fresh(lab)
        if not self.refresh:
            made = self.examples(lab, lab.problems, fresh=False)
            problems, make = self._stored(lab.problems, made)
        normalise: Literal["step", "none"] = "step" if self.normalise == "batch_mean" else "none"
        objective = loss.StepLoss(self.objectives)
        yield Stage(
            "vcrd", OnPolicy(problems, make, every), objective, mean="sum", normalise=normalise
        )

    def examples(self, lab: Lab, problems: Sequence[Problem], fresh: bool) -> list[Example]:
        """The sequences that hold the loss of both steps of every pair, each weighed as its pair."""
        made = pairs(lab, self, problems, fresh)
        teacher = student = np.full(len(made), 0.5)
        if self.asks:
            teacher, student = validities(lab, self, made, fresh)
        strength = weights(self, teacher, student, lab.rng("vcrd: shuffle", on_policy=fresh))
        lab.note("pairs", summary(made, teacher, student, strength))
        sides = {who: {"teacher": 1.0, "student": self.gamma}[who] for who in self.objectives}
        return [*loss.examples(lab, made, strength.tolist(), sides)]

    def _few(self, block: Sequence[Problem]) -> list[Problem]:
        """As many problems as make the step's sequences at most, and one at least: a response, and M proposals of the other model."""
        every = max(1, self.refresh)
        each = max(1, len(block) // every // (1 + self.positions))
        return [*{problem.id: problem for problem in block}.values()][: each * every]

    def _fresh(self, lab: Lab) -> Make:
        return lambda block: self.examples(lab, self._few(block), fresh=True)

    def _stored(
        self, problems: Sequence[Problem], made: Sequence[Example]
    ) -> tuple[list[Problem], Make]:
        """Proposals of the base student, made once: a step takes those of its problems."""
        groups: dict[str, list[Example]] = {}
        for example in made:
            groups.setdefault(example.problem, []).append(example)
        kept = [problem for problem in problems if problem.id in groups]
        return kept, lambda block: [e for p in self._few(block) for e in groups[p.id]]

    def _whole(self, lab: Lab) -> Make:
        """Whole responses, whose tokens the objective weighs."""

        def make(block: Sequence[Problem]) -> list[Example]:
            unique = [*{problem.id: problem for problem in block}.values()]
            drawn = responses(lab, self, unique, fresh=self.refresh > 0)
            return [lab.example(t, term=who) for t, who in drawn if who in self.objectives]

        return make

    def mechanisms(self, lab: Lab) -> Mapping[str, Measure | float]:
        from methods.vcrd.scorecard import scorecard

        return scorecard(lab, self)


def summary(
    made: Sequence[Pair], teacher: np.ndarray, student: np.ndarray, strength: np.ndarray
) -> dict[str, float | list[float]]:
    """What the report shows of a set of pairs: the last one, where they are made anew."""
    if not made:
        return {"prefixes": 0}
    judged = ~np.array([pair.same for pair in made])
    delta = (teacher - student)[judged]

    def spread(values: np.ndarray) -> list[float]:
        return np.quantile(values, [0.1, 0.5, 0.9]).round(4).tolist() if len(values) else []

    return {
        "prefixes": len(made),
        "prefixes by the student": sum(pair.source == "student" for pair in made),
        "both propose the same step": int((~judged).sum()),
        "teacher's step ends the response": sum(pair.teacher.terminal for pair in made),
        "student's step ends the response": sum(pair.student.terminal for pair in made),
        "V of the teacher's step, deciles 1, 5, 9": spread(teacher[judged]),
        "V of the student's step, deciles 1, 5, 9": spread(student[judged]),
        "Delta, deciles 1, 5, 9": spread(delta),
        "share where the student's step is the better one": float((delta < 0).sum() / len(made)),
        "weight, deciles 1, 5, 9": spread(strength),
        "effective share of the pairs": float(strength.sum() ** 2 / max(1e-12, (strength**2).sum()) / len(made)),
    }  # fmt: skip
