"""PACE, progressive answer-guided curriculum evolution: base, then hint, then repair.

The order is [secondary]; how the stages share data and budget is [reading].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from harness.types import Example

Leg = tuple[str, list[Example], float]  # name, examples, share of the budget
LEAST = 0.01  # of the budget: a leg of few examples gets a step all the same


def curriculum(
    parts: Sequence[tuple[str, Sequence[Example]]],
    mode: str,
    replay: float,
    rng: np.random.Generator,
) -> list[Leg]:
    """The legs of training, each with a share of the budget in proportion to its examples (at least LEAST, before rounding to 1).

    sequential_increment: a part's new data, and `replay` times as many examples of the parts before it; sequential_cumulative: all
    data up to a part; data_only: all data at once; reversed: increments from the last part to the first.
    """
    if mode == "data_only":
        parts = [("data", [example for _, examples in parts for example in examples])]
    legs: list[tuple[str, list[Example]]] = []
    seen: list[Example] = []
    for name, examples in parts[::-1] if mode == "reversed" else parts:
        earlier = seen
        if mode != "sequential_cumulative":
            count = min(int(replay * len(examples)), len(seen))
            earlier = [seen[i] for i in sorted(rng.choice(len(seen), count, replace=False))] if count else []  # fmt: skip
        legs.append((name, [*earlier, *examples]))
        seen = [*seen, *examples]
    total = sum(len(examples) for _, examples in legs) or 1
    shares = [max(LEAST, len(examples) / total) for _, examples in legs]
    return [(*leg, share / sum(shares)) for leg, share in zip(legs, shares, strict=True)]
