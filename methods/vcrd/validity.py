"""How valid a step is where it stands: V(prefix, action) in [0, 1]. The paper's estimator is not known; each of these is a reading.

An estimator maps (lab, vcrd, actions, fresh) to values, without a gradient; a step that a cap left unjudged has None. A step that
ends the response counts by its answer, where that can be judged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from harness.types import Lab, Request, Trace
from harness.verifiers.completion import CLOSE
from methods.vcrd.proposals import Action, Pair, write

if TYPE_CHECKING:
    from methods.vcrd import VCRD

Values = list[float | None]
Estimator = Callable[[Lab, "VCRD", Sequence[Action], bool], Values]

QUESTION = (
    "Problem:\n{problem}\n\nSolution so far:\n{before}\n\nNext step:\n{step}\n\n"
    "Is this next step correct and useful, given what stands before it? Answer yes or no."
)


def validities(
    lab: Lab, vcrd: VCRD, pairs: Sequence[Pair], fresh: bool
) -> tuple[np.ndarray, np.ndarray]:
    """V of the teacher's and of the student's step, two arrays [N].

    Equal proposals, and pairs that a cap left unjudged, are not scored: both sides have 1/2, so that Delta is exactly 0.
    """
    actions = {a.key: a for p in pairs if not p.same for a in (p.teacher, p.student)}
    known = dict(zip(actions, judge(lab, vcrd, [*actions.values()], fresh), strict=True))
    both = [(known.get(p.teacher.key), known.get(p.student.key)) for p in pairs]
    if unjudged := sum(value is None for value in known.values()):
        lab.note("steps that could not be judged", unjudged)
    even = [p.same or None in values for p, values in zip(pairs, both, strict=True)]
    table = np.array(
        [(0.5, 0.5) if skip else values for skip, values in zip(even, both, strict=True)],
        dtype=float,
    ).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def judge(lab: Lab, vcrd: VCRD, actions: Sequence[Action], fresh: bool) -> Values:
    """V of each action by the setting's estimator, or 1[correct] where it ends a response whose answer can be judged."""
    values: Values = [None] * len(actions)
    settled: set[int] = set()
    if vcrd.validity not in ("const", "random"):
        last = [place for place, action in enumerate(actions) if action.terminal]
        traces = [Trace(actions[i].problem, actions[i].tokens, actions[i].text, True) for i in last]
        for place, trace in zip(last, lab.judged(traces) if traces else [], strict=True):
            if trace.verdict and trace.verdict.status != "error":
                values[place] = float(trace.correct)
                settled.add(place)
    rest = [place for place in range(len(actions)) if place not in settled]
    found = ESTIMATORS[vcrd.validity](lab, vcrd, [actions[i] for i in rest], fresh) if rest else []
    for place, value in zip(rest, found, strict=True):
        values[place] = value
    return values


def rollout(lab: Lab, vcrd: VCRD, actions: Sequence[Action], fresh: bool) -> Values:
    """V = (c + 1) / (K + 2), c of K completions correct: the same completer, K, temperature 1 and seed for both proposals.

    `both` splits K between the models (the teacher has the odd one) and pools the counts. None where fewer than K could be judged.
    """
    shares = {vcrd.completer: vcrd.rollouts}
    if vcrd.completer == "both":
        shares = {"teacher": -(-vcrd.rollouts // 2), "student": vcrd.rollouts // 2}
    requests = [Request(lab.prompt(a.problem), a.problem, a.tokens) for a in actions]
    right, drawn = np.zeros(len(actions)), np.zeros(len(actions))
    for who, n in shares.items():
        if not n:
            continue
        how = {"temperature": 1.0, "top_p": 1.0, "judge": True}
        for place, traces in enumerate(
            write(lab, vcrd, who, fresh, requests, "validity", n, **how)
        ):
            read = [t for t in traces if t.verdict and t.verdict.status != "error"]
            right[place] += sum(trace.correct for trace in read)
            drawn[place] += len(read)
    return [
        (c + 1) / (k + 2) if k == vcrd.rollouts else None for c, k in zip(right, drawn, strict=True)
    ]


def prm(lab: Lab, vcrd: VCRD, actions: Sequence[Action], fresh: bool) -> Values:
    """What a process reward model says of the new last step."""
    pairs = [(lab.prompt(action.problem), action.text) for action in actions]
    return [*lab.rewards(lab.models["prm"], pairs, purpose="validity")]


def asked(lab: Lab, vcrd: VCRD, actions: Sequence[Action], fresh: bool) -> Values:
    """V = P(yes) / (P(yes) + P(no)), each proposal judged alone."""
    turns = []
    for action in actions:
        before = lab.teacher.decode(action.tokens[: action.prefix])
        step = action.text.removeprefix(before)
        turns.append(QUESTION.format(problem=action.problem.prompt, before=before, step=step))
    return [*lab.rewards(lab.models["judge"], [(turn, "") for turn in turns], purpose="validity")]


def likelihood(lab: Lab, vcrd: VCRD, actions: Sequence[Action], fresh: bool) -> Values:
    """V = exp( 1/|a| sum_i [log pi_T(a_i) + log pi_0(a_i)] / 2 ), pi_0 the student before training.

    With the teacher alone its arg-max step would always win: the student's half keeps P3.
    """
    seen = []
    for model in (lab.teacher, lab.base):
        pairs = [(model.encode(lab.prompt(action.problem)), action.tokens) for action in actions]
        seen.append(lab.scores(model, pairs, purpose="validity"))
    values: Values = []
    for action, *scores in zip(actions, *seen, strict=True):
        known = [s.logprobs[action.prefix :] for s in scores if s is not None]
        values.append(float(np.exp(np.mean(known))) if len(known) == 2 else None)
    return values


def oracle(lab: Lab, vcrd: VCRD, actions: Sequence[Action], fresh: bool) -> Values:
    """The truth: 1 if every line that the step adds is valid, and the derivation is sound where the step closes it.

    What follows the think without ending the response (a function's lines) is not judged and has 1.
    """
    assert lab.oracle is not None
    values: Values = []
    for action in actions:
        before = lab.teacher.decode(action.tokens[: action.prefix])
        new = lab.oracle.valid_steps(action.problem, action.text)
        new = new[len(lab.oracle.valid_steps(action.problem, before)) :]
        closes = CLOSE in action.text and CLOSE not in before
        valid = all(new) and (not closes or lab.oracle.sound(action.problem, action.text))
        values.append(float(valid))
    return values


def const(lab: Lab, vcrd: VCRD, actions: Sequence[Action], fresh: bool) -> Values:
    """1/2 for all."""
    return [0.5] * len(actions)


def chance(lab: Lab, vcrd: VCRD, actions: Sequence[Action], fresh: bool) -> Values:
    """Uniform in [0, 1), a function of the step alone."""
    marks = [hashlib.sha256(repr(action.key).encode()).digest() for action in actions]
    return [int.from_bytes(mark[:6], "big") / 2**48 for mark in marks]


ESTIMATORS: Mapping[str, Estimator] = {
    "rollout": rollout,
    "prm": prm,
    "judge": asked,
    "likelihood": likelihood,
    "oracle": oracle,
    "const": const,
    "random": chance,
}
