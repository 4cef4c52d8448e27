"""Time and memory of a divergence's value and gradient: ours in chunks, the dense form, and TRL's kernel.

    pip install -e '.[bench]'                # TRL; without it the comparison goes on and says so
    python -m benchmarks.speed.objectives    # about ten minutes on two idle cores

Every case runs in a process of its own, all cases once before any of them again, on the same random hidden states
and heads in fp32. Time is that of one forward and backward pass, the median over repeats. Extra memory is the
highest resident size during the pass above that before it (Linux), so it holds the gradients too: the head's alone
takes 4 V H bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed import machine, write
from harness.objectives import forward_kl, reverse_kl
from harness.objectives.chunked import chunked_loss
from harness.types import Objective, Tokens

OBJECTIVES: dict[str, Objective] = {o.name: o for o in (forward_kl, reverse_kl)}
IMPLEMENTATIONS = {
    "closed": "ours, closed-form gradient",
    "any": "ours, any objective (autograd)",
    "trl": "TRL, chunked divergence",
    "dense": "dense",
}
WANTED = {"closed": (0.45, 0.25), "any": (0.7, 0.5)}  # of TRL's time and extra memory, at most
MISSING = 3  # exit status of a case whose library is not there


@dataclass(frozen=True)
class Inputs:
    """A student and a teacher of one width, as the last layer leaves them."""

    hidden: Tensor  # [N, H]
    head: Tensor  # [V, H]
    teacher_hidden: Tensor  # [N, H]
    teacher_head: Tensor  # [V, H]
    coefficients: Tensor  # [N]
    tokens: Tokens

    @classmethod
    def random(cls, tokens: int, vocabulary: int, width: int) -> Inputs:
        generator = torch.Generator().manual_seed(0)

        def normal(rows: int, scale: float = 1.0) -> Tensor:
            return torch.randn(rows, width, generator=generator).mul_(scale)

        return cls(
            normal(tokens).requires_grad_(),
            normal(vocabulary, width**-0.5).requires_grad_(),
            normal(tokens),
            normal(vocabulary, width**-0.5),
            torch.full((tokens,), 1 / tokens),
            Tokens(torch.zeros(tokens, dtype=torch.long), torch.ones(tokens), {}),
        )


@dataclass(frozen=True)
class WithoutGradient:
    """What a user writes: an objective that leaves its gradient to autograd."""

    inner: Objective

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def needs_teacher(self) -> bool:
        return self.inner.needs_teacher

    def __call__(self, student: Tensor, teacher: Tensor | None, tokens: Tokens) -> Tensor:
        return self.inner(student, teacher, tokens)


def ours(inputs: Inputs, objective: Objective) -> Tensor:
    return chunked_loss(
        inputs.hidden,
        inputs.head,
        None,
        inputs.tokens,
        objective,
        inputs.coefficients,
        inputs.teacher_hidden,
        (inputs.teacher_head, None),
        len(inputs.head),
    )[0]


def dense(inputs: Inputs, objective: Objective) -> Tensor:
    student = inputs.hidden @ inputs.head.t()
    teacher = inputs.teacher_hidden @ inputs.teacher_head.t()
    return (inputs.coefficients * objective(student, teacher, inputs.tokens)).sum()


def trl(inputs: Inputs, objective: Objective) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    divergence, _ = ChunkedDivergenceFunction.apply(
        inputs.hidden,
        inputs.head,
        None,
        inputs.teacher_hidden,
        inputs.teacher_head,
        None,
        {"forward_kl": 0.0, "reverse_kl": 1.0}[objective.name],
    )
    return (inputs.coefficients * divergence).sum()


RUN: dict[str, Callable[[Inputs, Objective], Tensor]] = {
    "closed": ours,
    "any": lambda inputs, objective: ours(inputs, WithoutGradient(objective)),
    "trl": trl,
    "dense": dense,
}


def resident(which: str) -> int:
    """VmRSS (now) or VmHWM (highest so far) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{which}:"))


def measure(
    implementation: str, objective: Objective, size: tuple[int, int, int]
) -> dict[str, float]:
    """One forward and backward pass in this process."""
    run = RUN[implementation]
    run(Inputs.random(4, 64, 8), objective).backward()  # imports and thread pools
    inputs = Inputs.random(*size)
    Path("/proc/self/clear_refs").write_text("5")  # the highest size starts anew
    before, start = resident("VmRSS"), time.perf_counter()
    loss = run(inputs, objective)
    loss.backward()
    seconds = time.perf_counter() - start
    assert inputs.head.grad is not None
    return {
        "seconds": seconds,
        "extra_bytes": resident("VmHWM") - before,
        "loss": loss.item(),
        "gradient": inputs.head.grad.norm().item(),
    }


@dataclass(frozen=True)
class Row:
    """One implementation at one size, over the repeats."""

    implementation: str
    objective: str
    width: int
    seconds: float  # median
    fastest: float
    slowest: float
    extra_bytes: float  # median
    loss: float
    gradient: float  # norm of the head's

    @classmethod
    def of(
        cls, implementation: str, objective: str, width: int, runs: list[dict[str, float]]
    ) -> Row:
        seconds = [run["seconds"] for run in runs]
        return cls(
            implementation,
            objective,
            width,
            statistics.median(seconds),
            min(seconds),
            max(seconds),
            statistics.median(run["extra_bytes"] for run in runs),
            runs[0]["loss"],
            runs[0]["gradient"],
        )


def compare(arguments: argparse.Namespace) -> list[Row]:
    """All cases, repeat by repeat, each in a fresh process."""
    cases = [
        (implementation, objective, width)
        for width in arguments.widths
        for objective in OBJECTIVES
        for implementation in IMPLEMENTATIONS
    ]
    runs: dict[tuple[str, str, int], list[dict[str, float]]] = {case: [] for case in cases}
    absent: set[str] = set()
    for repeat in range(arguments.repeats):
        for case in cases:
            if case[0] in absent:
                continue
            done = subprocess.run(
                [
                    *(
                        sys.executable,
                        "-m",
                        "benchmarks.speed.objectives",
                        "--case",
                        *map(str, case),
                    ),
                    *("--tokens", str(arguments.tokens), "--vocabulary", str(arguments.vocabulary)),
                    *("--threads", str(arguments.threads)),
                ],
                capture_output=True,
                text=True,
            )
            if done.returncode == MISSING:
                absent.add(case[0])
                print(
                    f"left out: {IMPLEMENTATIONS[case[0]]} ({done.stderr.strip()})", file=sys.stderr
                )
                continue
            if done.returncode:
                raise RuntimeError(f"{case} failed:\n{done.stderr}")
            run = json.loads(done.stdout.splitlines()[-1])
            runs[case].append(run)
            print(
                f"{repeat + 1}/{arguments.repeats} {case[1]} H={case[2]} {case[0]}: {run['seconds']:.2f} s, "
                f"{run['extra_bytes'] / 1e9:.2f} GB",
                file=sys.stderr,
            )
    return [Row.of(*case, runs[case]) for case in cases if runs[case]]


def agree(rows: list[Row]) -> bool:
    """The same value and gradient from every implementation."""
    first = {(row.objective, row.width): row for row in reversed(rows)}
    pairs = [(row, first[row.objective, row.width]) for row in rows]
    return all(
        abs(row.loss - other.loss) < 1e-4 * abs(other.loss)
        and abs(row.gradient - other.gradient) < 1e-3 * other.gradient
        for row, other in pairs
    )


def ratios(rows: list[Row], row: Row) -> tuple[float, float] | None:
    """Time and extra memory as shares of TRL's, where that was measured."""
    for peer in rows:
        if (peer.implementation, peer.objective, peer.width) == ("trl", row.objective, row.width):
            return row.seconds / peer.seconds, row.extra_bytes / peer.extra_bytes
    return None


def table(rows: list[Row]) -> str:
    """Markdown; a ratio that misses what is wanted is marked."""
    lines = [
        "| objective | H | implementation | seconds (range) | extra GB | time / TRL | memory / TRL |",
        "|---|--:|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        found = ratios(rows, row)
        limits = WANTED.get(row.implementation, (float("inf"), float("inf")))
        shares = ["-", "-"]
        if found is not None:
            shares = [
                f"{share:.2f}" + (f" (wanted {limit})" if share > limit else "")
                for share, limit in zip(found, limits, strict=True)
            ]
        lines.append(
            f"| {row.objective} | {row.width} | {IMPLEMENTATIONS[row.implementation]} "
            f"| {row.seconds:.2f} ({row.fastest:.2f}-{row.slowest:.2f}) | {row.extra_bytes / 1e9:.2f} "
            f"| {shares[0]} | {shares[1]} |"
        )
    return "\n".join(lines)


def environment(threads: int) -> dict[str, Any]:
    try:
        peer: str | None = metadata.version("trl")
    except metadata.PackageNotFoundError:
        peer = None
    return {**machine(), "torch": torch.__version__, "trl": peer, "threads": threads}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=Path("results/reference/speed/objectives.json"))
    parser.add_argument("--case", nargs=3, metavar=("IMPLEMENTATION", "OBJECTIVE", "WIDTH"))
    arguments = parser.parse_args()
    if arguments.case:
        implementation, objective, width = arguments.case
        torch.set_num_threads(arguments.threads)
        size = (arguments.tokens, arguments.vocabulary, int(width))
        try:
            print(json.dumps(measure(implementation, OBJECTIVES[objective], size)))
        except ImportError as error:
            print(error, file=sys.stderr)
            return MISSING
        return 0

    found = environment(arguments.threads)
    rows = compare(arguments)
    print(table(rows))
    record = {
        "tokens": arguments.tokens,
        "vocabulary": arguments.vocabulary,
        "repeats": arguments.repeats,
        "environment": found,
        "rows": [asdict(row) | {"of_trl": ratios(rows, row)} for row in rows],
    }
    write(arguments.out, record)
    if not agree(rows):
        print("the implementations disagree: see loss and gradient in the record", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
