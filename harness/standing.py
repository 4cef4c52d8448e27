"""Where each arm stands on a benchmark: its rank with an interval, its chance of being best, and what its accuracy cost.

Ranks are read off simultaneous pairwise tests (Mogstad, Romano, Shaikh and Wilhelm 2024, "Inference for Ranks", Review of
Economic Studies 91). Their tests are max-t; ours are Holm's over all pairs of a benchmark, because our pairs differ in their
degrees of freedom and Holm's needs no draws.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Row = MutableMapping[str, Any]

ALPHA = 0.05
DRAWS = 10_000
TOKENS = ("teacher_generated", "teacher_scored", "student_generated", "trained")
SAME_COST = 0.01  # budgets end with a batch: costs so near are equal


def ranks(accuracy: Mapping[str, float], pairs: Sequence[Mapping[str, Any]]) -> dict[str, Row]:
    """Rank of each arm, 1 the best, and the ranks that no pair's `p_all` rules out.

    rank_ci95 = [1 + arms that are better, K - arms that are worse],  both at p_all < 0.05
    """
    above = dict.fromkeys(accuracy, 0)
    below = dict.fromkeys(accuracy, 0)
    for pair in pairs:
        if pair["p_all"] < ALPHA:
            best, worst = pair["a"], pair["b"]
            if pair["delta"] < 0:
                best, worst = worst, best
            above[worst] += 1
            below[best] += 1
    return {
        name: {
            "rank": 1 + sum(other > own + 1e-12 for other in accuracy.values()),
            "rank_ci95": [1 + above[name], len(accuracy) - below[name]],
        }
        for name, own in accuracy.items()
    }


def chance_of_best(
    scores: Mapping[str, Array],
    runs: Mapping[str, float],
    seed_variance: Callable[[np.random.Generator, int], Array],
) -> dict[str, float]:
    """How often each arm's accuracy is the highest among draws of what all of them may truly be; ties are shared.

    draw = mean + problems + seeds,  problems ~ t_{P-1}(0, cov / P), seeds ~ N(0, runs * sigma^2_seed)

    scores: [P] of each arm; runs: 1 / S of a trained arm, 0 of another; seed_variance: draws of what it may be.
    """
    names = sorted(scores)  # so that the order of the arms changes nothing
    y = np.stack([scores[name] for name in names])  # [K, P]
    problems = y.shape[1]
    rng = np.random.default_rng(0)
    covariance = np.atleast_2d(np.cov(y)) / problems
    shape = np.sqrt(rng.chisquare(problems - 1, DRAWS) / (problems - 1))[:, None]
    drawn = rng.multivariate_normal(np.zeros(len(names)), covariance, DRAWS, method="eigh") / shape
    spread = np.sqrt(seed_variance(rng, DRAWS)[:, None] * [runs[name] for name in names])
    drawn += y.mean(1) + spread * rng.standard_normal(drawn.shape)
    best = drawn >= drawn.max(1, keepdims=True) - 1e-9
    shares = (best / best.sum(1, keepdims=True)).mean(0)
    return dict(zip(names, map(float, shares), strict=True))


def add_costs(arms: Sequence[Row], pairs: Sequence[Row]) -> None:
    """Put what a student was charged into each arm, and into each pair the ratio and what it makes of the verdict.

    An arm is off the Pareto set when another of no greater cost is better at p_all < 0.05.
    """
    for arm in arms:
        charged = arm["ledger"]["charged"]
        students = max(1, arm["seeds"])
        arm["cost"] = {
            "tokens": sum(charged[name] for name in TOKENS) / students,
            "flops": charged["flops"] / students,
        }
    cost = {(arm["benchmark"], arm["method"]): arm["cost"] for arm in arms}
    off: set[tuple[str, str]] = set()
    for pair in pairs:
        a, b = (cost[pair["benchmark"], pair[side]] for side in "ab")
        pair["cost_ratio"] = {name: a[name] / b[name] if b[name] else None for name in a}
        pair["at_cost"] = _at_cost(pair["verdict"], a, b)
        if pair["p_all"] < ALPHA:
            sides, costs = ["a", "b"], [a, b]
            if pair["delta"] < 0:
                sides, costs = sides[::-1], costs[::-1]
            if _no_more(*costs):
                off.add((pair["benchmark"], pair[sides[1]]))
    for arm in arms:
        arm["cost"]["pareto"] = (arm["benchmark"], arm["method"]) not in off


def _no_more(a: Mapping[str, float], b: Mapping[str, float]) -> bool:
    """Whether a costs no more than b, in tokens and in FLOPs."""
    return all(a[name] <= (1 + SAME_COST) * b[name] for name in ("tokens", "flops"))


def _at_cost(verdict: str, a: Mapping[str, float], b: Mapping[str, float]) -> str:
    if verdict == "better":
        return "better at no more cost" if _no_more(a, b) else "better but costlier"
    if verdict == "worse":
        return "worse at no less cost" if _no_more(b, a) else "worse but cheaper"
    return verdict
