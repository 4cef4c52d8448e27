"""A model that is not here, played for a plan: responses of an assumed length that are right at an assumed rate.

A token is a byte of its text, and of a prompt every fourth character (a token of English has about four).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from scipy.special import betaincinv

from harness.lab import Workbench
from harness.models.decoding import Block, sample_ranges
from harness.models.scripted import Reply, Scripted
from harness.problems import render
from harness.types import Capability, Ids, Problem, Request, Sampling, Scores, Trace, Verdict

CHARACTERS = 4  # of a token
SPREAD = 0.5  # of pass rates: 0 is all or nothing, large is all alike
STEP = 48  # tokens of a reasoning step
GOLDEN = (5**0.5 - 1) / 2
PROMPT = 400  # characters of a problem that is not here
RIGHT, WRONG = "right", "wrong"


class StandIn(Scripted):
    """A language model whose traces have the assumed length (times 0.5 to 1.5), and whose pass rates over the problems follow
    Beta(SPREAD r, SPREAD (1 - r)) around the assumed r: most are near 0 or 1. What is hard for one is hard for all. Shown a hint it is
    right at r at least."""

    capabilities: frozenset[Capability] = frozenset(("generate", "score", "logits"))
    pad = 256
    version: str | None = None

    def __init__(
        self,
        name: str,
        parameters: int,
        length: int,
        rate: float,
        trained: int | None = None,
        price: Mapping[Any, float] | None = None,  # of a server's tokens
        difficulty: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(self._write, name=name, capabilities=self.capabilities)
        self.price = price
        self.num_parameters, self.length, self.rate = parameters, length, rate
        self.num_trained = parameters if trained is None else trained
        self.difficulty = difficulty or {}  # quantiles by problem; else drawn from its id
        self.model = torch.nn.Linear(1, 1)  # what a trainer may hold
        self.device = torch.device("cpu")
        self.trained = 0

    @property
    def identity(self) -> str:
        return f"stand-in {self.name}, {self.trained}"

    @identity.setter
    def identity(self, value: str) -> None:
        """Its own, not the script's."""

    def encode(self, prompt: str, system: str | None = None) -> Ids:
        """As many tokens as the prompt would have, with a few of its digest: other prompts stay others."""
        told = f"{system or ''}{prompt}"
        return super().encode(told[::CHARACTERS] + f"{_share(told):.6f}"[2:])

    def touch(self) -> None:
        self.trained += 1

    def rest(self) -> None:
        """It holds nothing."""

    recompute = rest

    def freeze(self) -> StandIn:
        return self

    def plan(self, requests: Sequence[Request], sampling: Sampling) -> list[Block]:
        return [
            Block(tuple(requests), tuple(range(len(requests))), samples, sampling, 0)
            for samples in sample_ranges(sampling.n, 1 << 20)
            if requests
        ]

    def generate_block(self, block: Block) -> list[Trace]:
        return [
            self._trace(block.requests[row], sample, block.sampling)
            for row in range(len(block.requests))
            for sample in block.samples
        ]

    def _trace(self, request: Request, index: int, sampling: Sampling) -> Trace:
        trace = super()._trace(request, index, sampling)
        if self.price is None:
            return trace
        read = len(request.encoded(self)) + trace.prefix
        return replace(trace, usage=(read, len(trace.tokens) - trace.prefix))

    def take_lost(self) -> tuple[int, int]:
        return 0, 0

    def score(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[Scores]:
        return [self._view(len(response)) for _, response in pairs]

    def _view(self, length: int) -> Scores:
        values = tuple(0.1 + 0.9 * _share(self.name, place) for place in range(min(length, 97)))
        entropies = (values * (length // 97 + 1))[:length]
        return Scores(tuple(-e for e in entropies), entropies)

    def _write(self, request: Request, index: int) -> Reply:
        problem = request.problem
        drawn = self.length * (0.5 + _share(self.name, problem.id, index, "length"))
        left = max(STEP, int(drawn) - len(request.prefix))
        shape = SPREAD * self.rate, SPREAD * (1 - self.rate)
        quantile = self.difficulty.get(problem.id) or _share("difficulty", problem.id)
        mine = float(betaincinv(*shape, quantile))
        if request.prompt != render(problem):  # told more than the problem, such as its answer
            mine = max(mine, self.rate)
        end = RIGHT if _share(self.name, problem.id, index, request.prefix[:8]) < mine else WRONG
        opening = "" if request.prefix else "<think>\n"
        closing = f"</think>\n{end}"
        body = max(STEP, left - len(opening) - len(closing))
        lines = [
            hashlib.sha256(f"{problem.id} {index} {line}".encode()).hexdigest()[: STEP - 2] + "\n\n"
            for line in range(-(-body // STEP))
        ]
        text = opening + "".join(lines) + closing
        view = self._view(len(text) + 1)
        return Reply(text, True, view.logprobs, view.entropies)


class Assumed(Workbench):
    """A lab of stand-ins: a response is right if it says so."""

    def _judge(
        self, items: Sequence[tuple[Problem, str, bool]], opened: bool = False
    ) -> list[Verdict]:
        for problem, text, _ in items:
            self._ledger.charge("verifier_calls", 1, f"{problem.source} {problem.id} {text}")
        self._ledger.spend("verifier_calls", len({(p.id, text) for p, text, _ in items}))
        return [
            Verdict("ok" if text.endswith(RIGHT) else "wrong", text[-5:]) for _, text, _ in items
        ]


class Judge:
    """A reward model that is not here."""

    capabilities: frozenset[Capability] = frozenset(("reward",))

    def __init__(self, name: str, parameters: int) -> None:
        self.name, self.num_parameters, self.identity = name, parameters, f"stand-in {name}"

    def lengths(self, pairs: Sequence[tuple[str, str]]) -> list[int]:
        return [len(turn) + len(text) for turn, text in pairs]

    def reward(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        return [_share(self.name, *pair) for pair in pairs]


def problems(name: str, domain: str, count: int) -> list[Problem]:
    """Problems of a set that is not here; with an answer, or with tests in code."""
    code = domain == "code"
    return [
        Problem(
            f"{name}/{i}",
            f"{name} {i} ".ljust(PROMPT, "."),
            answer=None if code else "1",
            tests="" if code else None,
            domain=domain,
            source=name,
            verifier="code" if code else "math",
        )
        for i in range(count)
    ]


def spaced(sample: Sequence[Problem]) -> dict[str, float]:
    """Difficulties of a sample that leave no gap: quantiles 1/2 + k phi, modulo 1, phi the golden ratio (Weyl's sequence)."""
    return {problem.id: (0.5 + k * GOLDEN) % 1 for k, problem in enumerate(sample)}


def _share(*parts: Any) -> float:
    """A number of [0, 1) that the parts decide."""
    return int(hashlib.sha256(repr(parts).encode()).hexdigest()[:12], 16) / 16**12
