"""HEAL against the oracle: does GEAR find the first wrong step, and does PURE tell shortcuts from derivations?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from harness.types import Lab, Measure, Oracle, Trace
from methods.heal import gear, pure

if TYPE_CHECKING:
    from methods.heal import Heal

THIRD = 1 / 3
SEARCHES: Mapping[str, Mapping[str, Any]] = {  # read beside the suite's own setting
    "largest surge, first third": {"search_fraction": THIRD, "first_step": "never", "breakpoint": "surge"},
    "largest surge, whole trace": {"search_fraction": 1.0, "first_step": "never", "breakpoint": "surge"},
    "largest surge, whole trace, step 1 too": {"search_fraction": 1.0, "first_step": "reference", "breakpoint": "surge"},
    "random step, first third": {"search_fraction": THIRD, "first_step": "never", "breakpoint": "random"},
    "random step, whole trace": {"search_fraction": 1.0, "first_step": "reference", "breakpoint": "random"},
}  # fmt: skip
FILTERS: Mapping[str, Mapping[str, Any]] = {
    "perplexity alone": {"anomaly": "perplexity", "exclude_last": 0},
    "log ratio, all steps": {"anomaly": "log_ratio", "exclude_last": 0},
    "jump form, all steps": {"anomaly": "jump", "exclude_last": 0},
    "raw ratio, all steps": {"anomaly": "ratio", "exclude_last": 0},
    "raw ratio without the last step": {"anomaly": "ratio", "exclude_last": 1},
}


def scorecard(lab: Lab, heal: Heal) -> dict[str, Measure | float]:
    """Shares and AUCs over the problems that HEAL would hint and repair."""
    assert lab.oracle is not None
    drawn = lab.samples(lab.teacher, heal.samples, purpose="base")
    hard, extreme = heal.selected(lab, drawn)
    rows: dict[str, Measure | float] = {
        "problems": float(len(lab.problems)),
        "hard problems": float(len(hard)),
        "extremely hard problems": float(len(extreme)),
    }
    wanted = {problem.id for problem in extreme}
    failed = [t for traces in drawn for t in gear.broken(heal, traces) if t.problem.id in wanted]
    solved = [t for traces in drawn for t in traces if t.correct]
    rows |= _breakpoints(lab, heal, solved, failed)
    hints = heal.hinted(lab, hard) if "hint" in heal.parts else {}
    repairs = heal.repaired(lab, drawn, extreme)
    rows |= _filter(lab, heal, "hints", hints, heal.verified(lab, "hint", hints, Counter()))
    rows |= _filter(lab, heal, "repairs", repairs, heal.verified(lab, "repair", repairs, Counter()))
    return rows


def _breakpoints(
    lab: Lab, heal: Heal, solved: Sequence[Trace], failed: Sequence[Trace]
) -> dict[str, Measure | float]:
    steps, oracle = gear.reader(lab, heal), lab.oracle
    assert oracle is not None
    truth: dict[int, int] = {}  # trace -> its first invalid step, from 1
    for trace in failed:
        line = oracle.first_invalid(trace.problem, trace.text)
        if line is not None and (mine := steps(trace)):
            truth[id(trace)] = _step_of_line(lab, trace, mine, line)
    failed = [trace for trace in failed if id(trace) in truth]
    names = [trace.problem.id for trace in failed]
    lengths = {id(trace): len(steps(trace)) for trace in failed}
    first = [truth[id(t)] for t in failed]
    early = [float(truth[id(t)] <= -(-lengths[id(t)] // 3)) for t in failed]
    rows: dict[str, Measure | float] = {
        "first invalid step: is step 1": Measure([float(k == 1) for k in first], names),
        "first invalid step: in the first third": Measure(early, names),
        "first third: offers more than one step to choose": Measure(
            [float(gear.last_searched(steps(t), THIRD, "steps") > 2) for t in failed], names
        ),
    }
    for name, fields in {"breakpoint": {}, **SEARCHES}.items():
        twin = heal.model_copy(update=dict(fields))
        found = [k for _, k, _ in gear.prefixes(lab, twin, solved, failed)]
        sides = {
            "at the first invalid step": [float(k == t) for k, t in zip(found, first, strict=True)],
            "before it": [float(k < t) for k, t in zip(found, first, strict=True)],
            "after it": [float(k > t) for k, t in zip(found, first, strict=True)],
        }
        rows |= {f"{name}: {side}": Measure(values, names) for side, values in sides.items()}
    return rows


def _step_of_line(lab: Lab, trace: Trace, steps: Sequence[range], line: int) -> int:
    """Which step, from 1, holds the reasoning line of this index."""
    seen = 0
    for k, step in enumerate(steps, 1):
        text = lab.teacher.decode(trace.tokens[step.start : step.stop])
        seen += sum(bool(part.strip()) for part in text.splitlines())
        if seen > line:
            return k
    return len(steps)


def _filter(
    lab: Lab,
    heal: Heal,
    name: str,
    groups: Mapping[str, Sequence[Trace]],
    verified: Sequence[Trace],
) -> dict[str, Measure | float]:
    oracle: Oracle | None = lab.oracle
    assert oracle is not None
    stays = heal.filtered(lab, verified, Counter())
    problems = [trace.problem.id for trace in verified]
    sound = [oracle.sound(trace.problem, trace.text) for trace in verified]
    kept = [place for place, stay in enumerate(stays) if stay]
    solved = {problems[place] for place in range(len(verified))}
    honest = {problems[place] for place in range(len(verified)) if sound[place]}
    rows: dict[str, Measure | float] = {
        f"{name}: problems with a verified trace": Measure([float(p in solved) for p in groups], [*groups]),
        f"{name}: problems with a verified and valid trace": Measure([float(p in honest) for p in groups], [*groups]),
        f"{name}: verified traces that are valid at every step": Measure([float(s) for s in sound], problems),
        f"{name}: the same among those that PURE keeps": Measure([float(sound[i]) for i in kept], [problems[i] for i in kept]),
        f"{name}: verified traces that PURE keeps": Measure([float(s) for s in stays], problems),
    }  # fmt: skip
    for label, fields in {"as set": {}, **FILTERS}.items():
        twin = heal.model_copy(update=dict(fields))
        if twin.anomaly == "random":
            continue
        values = [v for v in pure.anomalies(lab, twin, verified) if v is not None]
        scores = [pure.aggregate(v, twin.aggregate) for v in values]
        if len(scores) == len(verified):
            rows[f"{name}: AUC for an invalid or skipped step, {label}"] = Measure(
                scores, problems, [not s for s in sound]
            )
    return rows
