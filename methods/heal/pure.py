"""PURE, perplexity-uncertainty ratio estimator: tell derivations from shortcuts among traces that saw the answer.

A shortcut is a step that is hard to predict (high perplexity) and yet makes the answer certain (uncertainty near 0). All formulas
are [reading]: the paper's method section was not available to us. Everything is scored by the teacher without the hint.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from harness.types import Ids, Lab, Scores, Trace
from harness.verifiers.completion import CLOSE
from methods.heal.gear import reader

if TYPE_CHECKING:
    from methods.heal import Heal

ENOUGH = 10  # candidates of one problem that are pooled by themselves
SLICE = 256  # traces whose scoring requests are in memory at a time


def anomalies(lab: Lab, heal: Heal, traces: Sequence[Trace]) -> list[np.ndarray | None]:
    """R_k of each trace from its repair point on, the last `exclude_last` steps left out; None where a cap forbade to score.

    The uncertainty after each of K steps takes K + 1 passes over ever longer prefixes: about K/2 times the trace's tokens.
    """
    parts = [traces[i : i + SLICE] for i in range(0, len(traces), SLICE)]
    return [values for part in parts for values in _anomalies(lab, heal, part)]


def _anomalies(lab: Lab, heal: Heal, traces: Sequence[Trace]) -> list[np.ndarray | None]:
    steps = reader(lab, heal)
    cut = [[step for step in steps(t) if step.stop > t.prefix] for t in traces]
    prompts = [lab.teacher.encode(lab.prompt(trace.problem)) for trace in traces]
    whole = lab.scores(
        lab.teacher, [(prompt, t.tokens) for prompt, t in zip(prompts, traces, strict=True)]
    )
    certain = _uncertainties(lab, heal, traces, prompts, cut)
    found: list[np.ndarray | None] = []
    for trace, mine, score, uncertainty in zip(traces, cut, whole, certain, strict=True):
        if score is None or uncertainty is None:
            found.append(None)
            continue
        parts = [score.logprobs[max(step.start, trace.prefix) : step.stop] for step in mine]
        log_ppl = np.array([-float(np.mean(part)) for part in parts])
        values = ratio(log_ppl, np.array(uncertainty), heal.anomaly, heal.eps)
        found.append(values[: max(0, len(values) - heal.exclude_last)])
    return found


def ratio(log_ppl: np.ndarray, uncertainty: np.ndarray, form: str, eps: float) -> np.ndarray:
    """R_k, [K], from log PPL_k [K] and U_0 .. U_K [K + 1] (before the first step, and after each).

    log_ratio: log PPL_k / (U_k + eps); ratio: PPL_k / (U_k + eps); jump: log PPL_k relu(U_{k-1} - U_k) / (U_k + eps);
    perplexity: log PPL_k, the uncertainty switched off.
    """
    if form == "perplexity":
        return log_ppl
    after = uncertainty[1:] + eps
    if form == "ratio":
        return np.exp(log_ppl) / after
    if form == "jump":
        return log_ppl * np.maximum(uncertainty[:-1] - uncertainty[1:], 0) / after
    return log_ppl / after


def aggregate(values: np.ndarray, form: str) -> float:
    """A(trace): the largest R_k, or the mean of the top tenth of them; -inf for a trace without a scored step."""
    if not len(values):
        return -np.inf
    top = 1 if form == "max" else max(1, round(len(values) / 10))
    return float(np.sort(values)[-top:].mean())


def kept(heal: Heal, names: Sequence[str], values: Sequence[np.ndarray]) -> np.ndarray:
    """Which traces stay, [traces]: by the share to reject, a threshold, or the tolerated share of outlier steps."""
    scores = np.array([aggregate(v, heal.aggregate) for v in values])
    if heal.keep_rule == "log_threshold":
        return scores <= heal.lmbda
    if heal.keep_rule == "outlier_share":
        steps = np.concatenate([*values, np.zeros(0)])
        low, high = np.percentile(steps, [25, 75]) if len(steps) else (0.0, 0.0)
        fence = high + 1.5 * (high - low)  # Tukey's
        return np.array([not len(v) or np.mean(v > fence) <= heal.lmbda for v in values])
    return _without_worst(names, scores, heal.lmbda)


def _without_worst(names: Sequence[str], scores: np.ndarray, share: float) -> np.ndarray:
    """Drop the worst share: of each problem with ENOUGH candidates, and of all the others together."""
    pools: dict[str, list[int]] = defaultdict(list)
    for place, name in enumerate(names):
        pools[name].append(place)
    small = [place for pool in pools.values() if len(pool) < ENOUGH for place in pool]
    stays = np.ones(len(scores), dtype=bool)
    for pool in [*(p for p in pools.values() if len(p) >= ENOUGH), small]:
        worst = sorted(pool, key=lambda place: (-scores[place], place))
        stays[worst[: int(share * len(pool))]] = False
    return stays


def _uncertainties(
    lab: Lab,
    heal: Heal,
    traces: Sequence[Trace],
    prompts: Sequence[Ids],
    cut: Sequence[Sequence[range]],
) -> list[list[float] | None]:
    """U_0 .. U_K of each trace: how unsure the teacher is of the answer when it must state it there.

    gold_answer_nll: -(1/|y*|) sum_j ln pi_T(y*_j | x, s_<=k, lead, y*_<j); entropy: the mean entropy there; first_token: the
    entropy of the first answer token.
    """
    if heal.anomaly == "perplexity":
        return [[0.0] * (len(mine) + 1) for mine in cut]
    pairs, counts = [], []
    for trace, prompt, mine in zip(traces, prompts, cut, strict=True):
        lead, answer = forced(lab, trace)
        # Where the text stood before the repair, then after each step.
        places = [max(mine[0].start, trace.prefix), *(step.stop for step in mine)] if mine else []
        pairs += [((*prompt, *trace.tokens[:place], *lead), answer) for place in places]
        counts.append(len(places))
    scored = iter(lab.scores(lab.teacher, pairs))
    found: list[list[float] | None] = []
    for count in counts:
        mine_scored = [next(scored) for _ in range(count)]
        known = [_uncertainty(score, heal.uncertainty) for score in mine_scored if score]
        found.append(known if len(known) == count else None)
    return found


def _uncertainty(score: Scores, form: str) -> float:
    if form == "entropy":
        return float(np.mean(score.entropies))
    return score.entropies[0] if form == "first_token" else -float(np.mean(score.logprobs))


def forced(lab: Lab, trace: Trace) -> tuple[Ids, Ids]:
    """What makes the teacher state its answer after a step, and the answer.

    Mathematics: the gold answer after `Final answer: \\boxed{`, the think closed first. Elsewhere the trace's own verified conclusion.
    """
    _, closed, tail = trace.text.rpartition(CLOSE)
    if trace.problem.verifier == "math":
        lead, answer = f"{CLOSE if closed else ''}\n\nFinal answer: \\boxed{{", trace.problem.answer
    elif closed:
        lead, answer = CLOSE + tail[: len(tail) - len(tail.lstrip())], tail.strip()
    else:
        lead, answer = "\n\nFinal answer: ", trace.verdict.extracted if trace.verdict else None
    # Tokenized as one text, since a token may join the two; it counts as the answer's.
    tokens = lab.teacher.tokenize(lead + (answer or "?"), end=False)
    stops = accumulate(len(lab.teacher.decode((token,))) for token in tokens)
    split = sum(stop <= len(lead) for stop in stops)
    return tokens[:split], tokens[split:]
