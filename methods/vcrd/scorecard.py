"""VCRD against the oracle: who proposes the better step, and how well each estimator of validity knows it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.types import Lab, Measure
from harness.verifiers.completion import CLOSE
from methods.vcrd.proposals import Action, Pair, pairs
from methods.vcrd.validity import judge

if TYPE_CHECKING:
    from methods.vcrd import VCRD

Rows = dict[str, Measure | float]


def scorecard(lab: Lab, vcrd: VCRD) -> Rows:
    """Shares over all pairs, then each estimator's V; nothing for controls, whose validity is another arm's or none."""
    if vcrd.weight != "sigmoid" or vcrd.granularity == "token":
        return {}
    made = pairs(lab, vcrd, lab.problems, fresh=False)
    truth = vcrd.model_copy(update={"validity": "oracle"})
    teacher, student = _values(lab, truth, made)
    rows = _shares(made, teacher, student)
    # Where both propose the same step nobody is asked; a step that ends the response counts by its answer; what follows the
    # think without ending it has no truth.
    open_ = [
        not (p.same or p.teacher.terminal or p.student.terminal or CLOSE in _before(lab, p.teacher))
        for p in made
    ]
    judged = [pair for pair, keep in zip(made, open_, strict=True) if keep]
    facts = teacher[open_], student[open_]
    for name, settings in _estimators(lab, vcrd):
        found = _values(lab, vcrd.model_copy(update=settings), judged)
        rows |= _quality(name, judged, facts, found)
        if settings.get("rollouts", vcrd.rollouts) == vcrd.rollouts:
            for level in sorted({_level(pair) for pair in judged}):
                rows |= _at_level(name, level, judged, facts, found)
    return rows


def _estimators(lab: Lab, vcrd: VCRD) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The arm's own; an arm with rollouts shows all that can be had, by completer and by K."""
    if vcrd.validity != "rollout":
        if vcrd.validity != "oracle":
            yield vcrd.validity, {}
        return
    for completer in ("teacher", "student", "both"):
        for k in sorted({2, vcrd.rollouts, 8}):
            yield f"rollouts by {completer}, K = {k}", {"completer": completer, "rollouts": k}
    if "score" in lab.teacher.capabilities:
        yield "likelihood", {"validity": "likelihood"}
    if "prm" in lab.models:
        yield "process reward model", {"validity": "prm"}


def _values(lab: Lab, vcrd: VCRD, made: Sequence[Pair]) -> tuple[np.ndarray, np.ndarray]:
    """V of the teacher's and of the student's steps, [N] each; NaN where a cap left none."""
    actions = {a.key: a for pair in made for a in (pair.teacher, pair.student)}
    found = dict(zip(actions, judge(lab, vcrd, [*actions.values()], False), strict=True))
    return (
        np.array([found[pair.teacher.key] for pair in made], dtype=float),
        np.array([found[pair.student.key] for pair in made], dtype=float),
    )


def _shares(made: Sequence[Pair], teacher: np.ndarray, student: np.ndarray) -> Rows:
    """What the truth is, over all prefixes."""
    names = [pair.teacher.problem.id for pair in made]
    same = np.array([pair.same for pair in made])
    facts = {
        "the teacher's step is valid": teacher == 1,
        "the student's step is valid": student == 1,
        "both propose the same step": same,
        "both are valid and differ": (teacher == 1) & (student == 1) & ~same,
        "the teacher's step is the better one": teacher > student,
        "the student's step is the better one": student > teacher,
    }
    rows: Rows = {"prefixes": float(len(made))}
    rows |= {name: Measure(values.astype(float).tolist(), names) for name, values in facts.items()}
    levels = np.array([_level(pair) for pair in made])
    for name in ("the student's step is valid", "the student's step is the better one"):
        for level in sorted(set(levels.tolist())):
            mine = levels == level
            ids = [i for i, keep in zip(names, mine, strict=True) if keep]
            rows[f"{name}, level {level}"] = Measure(facts[name][mine].astype(float).tolist(), ids)
    return rows


def _quality(
    name: str,
    judged: Sequence[Pair],
    facts: tuple[np.ndarray, np.ndarray],
    found: tuple[np.ndarray, np.ndarray],
) -> Rows:
    """How V ranks each model's steps, what it says of their difference, and whether it means what it says."""
    ids = [pair.teacher.problem.id for pair in judged]
    alike = (facts[0] == 1) & (facts[1] == 1)
    delta, true = found[0] - found[1], facts[0] - facts[1]
    even = [i for i, keep in zip(ids, alike, strict=True) if keep]
    v, label = np.concatenate(found), np.concatenate(facts) == 1
    return {
        f"AUC of V on the teacher's steps: {name}": Measure(found[0].tolist(), ids, (facts[0] == 1).tolist()),
        f"AUC of V on the student's steps: {name}": Measure(found[1].tolist(), ids, (facts[1] == 1).tolist()),
        f"correlation of Delta with the truth: {name}": Measure(delta.tolist(), ids, truth=true.tolist()),
        f"Delta where both are valid and differ: {name}": Measure(delta[alike].tolist(), even),
        f"calibration of V: {name}": Measure(v.tolist(), ids * 2, label.tolist(), calibration=True),
    }  # fmt: skip


def _at_level(
    name: str,
    level: int,
    judged: Sequence[Pair],
    facts: tuple[np.ndarray, np.ndarray],
    found: tuple[np.ndarray, np.ndarray],
) -> Rows:
    mine = np.array([_level(pair) == level for pair in judged])
    ids = [p.teacher.problem.id for p, keep in zip(judged, mine, strict=True) if keep] * 2
    v = np.concatenate([side[mine] for side in found])
    true = np.concatenate([side[mine] for side in facts])
    short = name.partition(",")[0]
    return {
        f"correlation of V with the truth: {short}, level {level}": Measure(v.tolist(), ids, truth=true.tolist()),
        f"calibration of V: {short}, level {level}": Measure(v.tolist(), ids, (true == 1).tolist(), calibration=True),
    }  # fmt: skip


def _level(pair: Pair) -> int:
    return pair.teacher.problem.level or 0


def _before(lab: Lab, action: Action) -> str:
    return lab.teacher.decode(action.tokens[: action.prefix])
