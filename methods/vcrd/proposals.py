"""What either model would do next: one step each, under the same prefix (P1 and P7 of the card)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.types import Ids, Lab, LanguageModel, Problem, Request, Trace
from harness.verifiers.steps import STOPS, Separator, actions, whole

if TYPE_CHECKING:
    from methods.vcrd import VCRD

OTHER = {"teacher": "student", "student": "teacher"}
BY_DOMAIN: dict[str, Separator] = {"math": "blank", "code": "statement"}  # other text: sentence


@dataclass(frozen=True)
class Action:
    """One step under a prefix."""

    problem: Problem
    prefix: int  # how many of the tokens stand before the step
    tokens: Ids  # of the response up to the step's end
    text: str  # of the tokens, without the end token
    terminal: bool  # the response ends with it

    @property
    def step(self) -> Ids:
        return self.tokens[self.prefix :]

    @property
    def key(self) -> tuple[str, int, Ids]:
        return self.problem.id, self.prefix, self.tokens


@dataclass(frozen=True)
class Pair:
    """The next steps of both models under one prefix."""

    teacher: Action
    student: Action
    source: str  # who wrote the prefix: teacher or student

    @property
    def own(self) -> Action:
        """The step of the response that the prefix is cut from."""
        return self.teacher if self.source == "teacher" else self.student

    @property
    def other(self) -> Action:
        return self.student if self.source == "teacher" else self.teacher

    @property
    def same(self) -> bool:
        return self.teacher.tokens == self.student.tokens


def separator(vcrd: VCRD, problem: Problem) -> Separator:
    return BY_DOMAIN.get(problem.domain, "sentence") if vcrd.steps == "auto" else vcrd.steps


def responses(
    lab: Lab, vcrd: VCRD, problems: Sequence[Problem], fresh: bool
) -> list[tuple[Trace, str]]:
    """One response to each problem and who wrote it: the student with probability lambda, else the teacher."""
    share = {"student": 1.0, "teacher": 0.0, "mixed": vcrd.mix}[vcrd.prefixes]
    writers = ["student" if _rng(lab, p, "writer", fresh).random() < share else "teacher" for p in problems]  # fmt: skip
    found: dict[str, tuple[Trace, str]] = {}
    for who in ("teacher", "student"):
        mine = [p for p, writer in zip(problems, writers, strict=True) if writer == who]
        requests = [Request(lab.prompt(problem), problem) for problem in mine]
        for traces in write(lab, vcrd, who, fresh, requests, "prefixes"):
            found |= {trace.problem.id: (trace, who) for trace in traces}  # none beyond a cap
    return [found[problem.id] for problem in problems if problem.id in found]


def pairs(lab: Lab, vcrd: VCRD, problems: Sequence[Problem], fresh: bool) -> list[Pair]:
    """Both proposals at M positions of one response to each problem, in the problems' order.

    The response's own step is its author's proposal; the other model writes one. `fresh`: on-policy, by the student as it is now;
    else by its base, out of the store, the same for every arm and training seed.
    """
    own: list[tuple[Action, str, Separator]] = []
    for trace, who in responses(lab, vcrd, problems, fresh):
        for step, cut in _chosen(lab, vcrd, trace, fresh):
            ends = trace.finished and step.stop == len(trace.tokens)
            own.append(
                (_action(lab, trace.problem, step.start, trace.tokens[: step.stop], ends), who, cut)
            )
    answers: dict[tuple[str, Ids, str], Action] = {}
    for who in OTHER:
        asked = [(action, cut) for action, author, cut in own if OTHER[author] == who]
        for found in propose(lab, vcrd, who, fresh, asked):
            answers[found.problem.id, found.tokens[: found.prefix], who] = found
    made = []
    for action, who, _ in own:
        answer = answers.get((action.problem.id, action.tokens[: action.prefix], OTHER[who]))
        if answer is not None:
            # A model is stopped before the blank lines or the end token that may follow: the same step for all that.
            alike = answer.text.rstrip() == action.text.rstrip()
            both = {who: action, OTHER[who]: action if alike else answer}
            made.append(Pair(both["teacher"], both["student"], who))
    return made


def _chosen(lab: Lab, vcrd: VCRD, trace: Trace, fresh: bool) -> list[tuple[range, Separator]]:
    """The steps at the positions, and what sets each apart: lines, inside a step that was too long."""
    cut, text = separator(vcrd, trace.problem), _pieces(lab.teacher, trace.tokens)
    steps, uncut = actions(text, cut, vcrd.max_step), set(actions(text, cut, len(text) + 1))
    steps = steps if trace.finished else steps[:-1]  # the last one was cut off
    chosen = positions(_rng(lab, trace.problem, "positions", fresh), len(steps), vcrd.positions)
    return [(steps[k], cut if steps[k] in uncut else "line") for k in chosen]


def positions(rng: np.random.Generator, steps: int, most: int) -> list[int]:
    """At most M of the positions 0 .. steps-1, without replacement; position 0 is put among them with probability 1/2."""
    chosen = rng.permutation(steps)[:most].tolist()
    if rng.random() < 0.5 and chosen and 0 not in chosen:
        chosen[0] = 0
    return sorted(chosen)


def propose(
    lab: Lab, vcrd: VCRD, who: str, fresh: bool, given: Sequence[tuple[Action, Separator]]
) -> list[Action]:
    """One step by a model under the prefix of each given action; fewer where a cap leaves nothing.

    The model is stopped at a boundary. Where that is none (a blank line, a bracket that is open) it goes on.
    """
    found = []
    for cut in sorted({cut for _, cut in given}):
        going = {
            (a.problem.id, a.tokens[: a.prefix]): (a.problem, a.prefix, a.tokens[: a.prefix])
            for a, own in given
            if own == cut
        }
        while going:
            requests = [Request(lab.prompt(problem), problem, so_far) for problem, _, so_far in going.values()]  # fmt: skip
            one: dict[str, Any] = {"max_new_tokens": vcrd.max_step, "stop": STOPS[cut]}
            drawn = write(lab, vcrd, who, fresh, requests, "proposals", **one)
            items, going = [*going.items()], {}
            for (key, (problem, prefix, so_far)), traces in zip(items, drawn, strict=True):
                for trace in traces:
                    if len(trace.tokens) == len(so_far):  # nothing can follow: no proposal
                        continue
                    said = lab.teacher.decode(trace.tokens).removeprefix(lab.teacher.decode(so_far))
                    ends = trace.finished and not any(stop in said for stop in STOPS[cut])
                    step = _first(lab.teacher, trace, prefix, cut, vcrd.max_step, ends)
                    if step is None:
                        going[key] = (problem, prefix, trace.tokens)
                    elif step:
                        tokens = (*trace.tokens[:prefix], *step)
                        ends = ends and len(tokens) == len(trace.tokens)
                        found.append(_action(lab, problem, prefix, tokens, ends))
    return found


def write(
    lab: Lab,
    vcrd: VCRD,
    who: str,
    fresh: bool,
    requests: Sequence[Request],
    purpose: str,
    n: int = 1,
    **how: Any,
) -> list[list[Trace]]:
    """Samples of the teacher, or of the student: as it is now (fresh), or of its base out of the store."""
    if not requests:
        return []
    how = {"temperature": vcrd.temperature, "top_p": vcrd.top_p, "judge": False, **how}
    how |= {"requests": requests, "purpose": purpose}
    if who == "teacher":
        return lab.samples(lab.teacher, n, **how)
    if fresh:
        return lab.samples(lab.student, n, on_policy=True, **how)
    return lab.samples(lab.base, n, **how)


def _first(
    model: LanguageModel, trace: Trace, prefix: int, cut: Separator, longest: int, ends: bool
) -> Ids | None:
    """The first step of what was written after a prefix; None where it is open and may go on."""
    written = trace.tokens[prefix:]
    text = _pieces(model, written)
    steps = actions(text, cut, longest)
    over = not trace.finished or ends or len(written) >= longest
    if not over and len(steps) < 2 and not (steps and whole("".join(text), cut)):
        return None
    if not trace.finished and len(steps) == 1:  # no boundary within the limit: its first line
        steps = actions(text, "line", longest)
    return written[: steps[0].stop] if steps else written[:longest]


def _action(lab: Lab, problem: Problem, prefix: int, tokens: Ids, ends: bool) -> Action:
    return Action(problem, prefix, tokens, lab.teacher.decode(tokens), ends)


def _pieces(model: LanguageModel, tokens: Ids) -> list[str]:
    """The text of each token, as it stands after another one: some tokenizers drop the first one's space."""
    before = model.tokenize("a", end=False)
    start = len(model.decode(before))
    known = {token: model.decode([*before, token])[start:] for token in set(tokens)}
    return [known[token] for token in tokens]


def _rng(lab: Lab, problem: Problem, purpose: str, fresh: bool) -> np.random.Generator:
    """On-policy a function of training seed and step, else of the problem alone, so that all arms and seeds draw alike."""
    if fresh:
        return lab.rng(f"vcrd: {purpose} {problem.id}", on_policy=True)
    return np.random.default_rng([*hashlib.sha256(f"{purpose} {problem.id}".encode()).digest()])
