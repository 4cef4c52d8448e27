"""Steps and completions under many prefixes at once, against one request at a time: generated tokens a second.

    python -m benchmarks.speed.steps    # about a minute on two idle cores

The micro teacher writes what VCRD asks of it: one step after each prefix (stopped at the line's end), and four completions
of each. Both ways answer the same requests with the same sampling noise, in turns; the median over repeats counts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import CHECKPOINTS, PROBLEMS
from benchmarks.speed import machine, write
from harness.models.hf import HFModel
from harness.problems import render
from harness.types import Request, Sampling, Trace

WORK = {
    "one step": Sampling(temperature=0.8, top_p=0.95, max_new_tokens=64, stop=("\n",)),
    "four completions": Sampling(n=4, max_new_tokens=160),
}


def requests(count: int) -> list[Request]:
    """Every third line of solutions of level 4 and 5 as a prefix, `count` in all."""
    model = HFModel.load(CHECKPOINTS["micro/teacher"], name="micro/teacher")
    found: list[Request] = []
    for problem in PROBLEMS["micro_math"].load("train", count, levels=[4, 5]):
        lines = (problem.solution or "").splitlines(keepends=True)
        prefix = "".join(lines[: 1 + len(found) % 3])
        found.append(Request(render(problem), problem, model.tokenize(prefix, end=False)))
    return found


def timed(
    model: HFModel, calls: Sequence[Sequence[Request]], sampling: Sampling
) -> tuple[float, list[Trace]]:
    """Seconds of all calls, and what they wrote."""
    start = time.perf_counter()
    groups = [group for call in calls for group in model.generate(call, sampling)]
    return time.perf_counter() - start, [trace for group in groups for trace in group]


def measure(
    model: HFModel, work: Sequence[Request], sampling: Sampling, single: int, repeats: int
) -> dict[str, Any]:
    """Tokens a second both ways; one at a time answers the first `single` requests only, as it is slow."""
    ways: dict[str, Sequence[Sequence[Request]]] = {
        "batched": [work],
        "one at a time": [[request] for request in work[:single]],
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    wrote: dict[str, list[Trace]] = {}
    for _ in range(repeats):
        for way, calls in ways.items():
            took, wrote[way] = timed(model, calls, sampling)
            seconds[way].append(took)
    rates = {
        way: sum(len(t.tokens) - t.prefix for t in traces) / statistics.median(seconds[way])
        for way, traces in wrote.items()
    }
    one = wrote["one at a time"]
    alike = sum(a.tokens == b.tokens for a, b in zip(wrote["batched"], one, strict=False))
    return {
        "tokens_per_second": rates,
        "ratio": rates["batched"] / rates["one at a time"],
        "requests": {"batched": len(work), "one at a time": single},
        "equal_samples": alike / len(one),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=2048)
    parser.add_argument(
        "--single", type=int, default=128, help="requests that are sent one at a time"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results/reference/speed/steps.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    here = machine()
    model = HFModel.load(CHECKPOINTS["micro/teacher"], name="micro/teacher").freeze()
    work = requests(arguments.requests)
    rows = {
        name: measure(model, work, sampling, arguments.single, arguments.repeats)
        for name, sampling in WORK.items()
    }
    for name, row in rows.items():
        rate = row["tokens_per_second"]
        print(
            f"{name}: {rate['batched']:,.0f} tokens/s over {arguments.requests} prefixes, "
            f"{rate['one at a time']:,.0f} one at a time: {row['ratio']:.1f} times; "
            f"{row['equal_samples']:.1%} of the samples are equal"
        )
    here |= {
        "torch": torch.__version__,
        "device": str(model.device),
        "threads": arguments.threads,
    }
    write(arguments.out, {"environment": here, "repeats": arguments.repeats, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
