"""A micro problem set: endless generated problems, cut into disjoint splits by a hash of their text."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from harness.types import Oracle, Problem, Split

MICRO_VERSION = 2  # raise it when a problem, a split, a token or a checkpoint changes

SIZES: Mapping[Split, int] = {"train": 10_000, "dev": 500, "test": 1_000}
PATIENCE = 500  # draws without a new problem after which a level counts as used up

Draw = Callable[[random.Random, int], Problem]  # one random problem of a level


def split_of(prompt: str) -> Split:
    """The split a problem belongs to: 80 % train, 10 % dev, 10 % test, decided by its text alone."""
    bucket = int(hashlib.sha256(prompt.encode()).hexdigest()[:8], 16) % 10
    return "test" if bucket == 0 else "dev" if bucket == 1 else "train"


def problem_id(source: str, family: str, level: int, prompt: str) -> str:
    """A name that depends on the problem alone: `micro_math/reduce-3-1f2e3d4c5b`."""
    return f"{source}/{family}-{level}-{hashlib.sha256(prompt.encode()).hexdigest()[:10]}"


def family_of(problem: Problem) -> str:
    """The family that a problem's id names: reduce, solve or code."""
    return problem.id.split("/")[1].split("-")[0]


def reasoning_lines(text: str) -> list[str]:
    """The lines between <think> and </think> that are not blank; an unclosed think runs to the end."""
    _, opened, rest = text.partition("<think>")
    body = rest.partition("</think>")[0] if opened else ""
    return [line.strip() for line in body.splitlines() if line.strip()]


def response(lines: Sequence[str], conclusion: str) -> str:
    """Reasoning lines and what follows them, in the form that every micro response has."""
    return "\n".join(["<think>", *lines, "</think>", conclusion])


@dataclass(frozen=True)
class MicroSet:
    """A problem set of the micro world; loading is deterministic, balanced and stable under a larger n."""

    name: str
    families: Mapping[str, Draw]
    levels: Mapping[str, tuple[int, ...]]  # of each family; all of them unless told otherwise
    oracle: Oracle | None

    @property
    def revision(self) -> str:
        return f"micro_version {MICRO_VERSION}"

    def load(
        self,
        split: Split,
        n: int | None = None,
        *,
        levels: Sequence[int] | None = None,
        families: Sequence[str] | None = None,
        **options: Any,
    ) -> list[Problem]:
        """The first n problems of a split, families and levels in turn; without n, the split's usual size."""
        if options:
            raise ValueError(
                f"{self.name} has no option {', '.join(sorted(options))}; it knows levels and families"
            )
        if split not in SIZES:
            raise ValueError(f"{self.name} has no split {split!r}; it has {', '.join(SIZES)}")
        size = SIZES[split] if n is None else n
        streams = [self._stream(split, *cell) for cell in self._cells(levels, families)]
        problems: list[Problem] = []
        for row in zip_longest(*streams):
            problems += [problem for problem in row if problem is not None]
            if len(problems) >= size:
                break
        return problems[:size]

    def _cells(
        self, levels: Sequence[int] | None, families: Sequence[str] | None
    ) -> list[tuple[str, int]]:
        """The (family, level) pairs asked for, low levels first."""
        for family in families or ():
            if family not in self.families:
                known = ", ".join(self.families)
                raise ValueError(f"{self.name} has no family {family!r}; it has {known}")
        cells = [
            (family, level)
            for family in self.families
            if families is None or family in families
            for level in self.levels[family]
            if levels is None or level in levels
        ]
        if missing := sorted(set(levels or ()) - {level for _, level in cells}):
            raise ValueError(f"{self.name} has no level {missing}; it has {dict(self.levels)}")
        return sorted(cells, key=lambda cell: cell[1])

    def _stream(self, split: Split, family: str, level: int) -> Iterator[Problem]:
        """The distinct problems of one family and level, until hardly any new one turns up."""
        rng = random.Random(f"{self.name}/{split}/{family}/{level}")
        seen: set[str] = set()
        failures = 0
        while failures < PATIENCE:
            problem = self.families[family](rng, level)
            if problem.prompt in seen or split_of(problem.prompt) != split:
                failures += problem.prompt in seen
                continue
            failures = 0
            seen.add(problem.prompt)
            yield problem
