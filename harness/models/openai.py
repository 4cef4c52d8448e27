"""A judge behind an OpenAI-compatible server: asked yes or no, it answers with the probability of yes."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2

from harness.store import digest
from harness.types import Capability

TOP = 20  # alternatives to the first token that the server is asked for
BUSY = 429  # the status of a server that wants to be asked more slowly


class JudgeServer:
    """A `RewardModel` that asks a chat model: P(yes) / (P(yes) + P(no)) of the first token of its answer.

    `key` names the environment variable that holds the server's key; it is read with every call and kept nowhere.
    """

    capabilities: frozenset[Capability] = frozenset(("reward",))
    num_parameters = 0  # not known

    def __init__(
        self,
        url: str,
        model: str,
        key: str = "OPENAI_API_KEY",
        *,
        threads: int = 8,  # requests at a time
        attempts: int = 5,
        pause: float = 1.0,  # seconds before the second attempt, doubled before each further one
        timeout: float = 120.0,  # seconds of one attempt
    ) -> None:
        self.url, self.model, self.key = url.rstrip("/"), model, key
        self.threads, self.attempts, self.pause, self.timeout = threads, attempts, pause, timeout
        self.name = model
        self.identity = digest(["yes or no", self.url, model])
        self.unread = 0  # answers so far with neither yes nor no, which count as 0.5

    def __repr__(self) -> str:
        return f"JudgeServer({self.url!r}, {self.model!r})"

    def lengths(self, pairs: Sequence[tuple[str, str]]) -> list[int]:
        """0 of each: the server's tokenizer is not known, and its FLOPs are not counted."""
        return [0] * len(pairs)

    def reward(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """P(yes) of each pair's question, which is its user turn."""
        if any(response for _, response in pairs):
            raise ValueError(
                f"{self.name}: a judge gets its whole question in the user turn; leave the response so far empty"
            )
        secret = os.environ.get(self.key)
        headers = {"Authorization": f"Bearer {secret}"} if secret else {}
        with (
            httpx2.Client(headers=headers, timeout=self.timeout) as client,
            ThreadPoolExecutor(self.threads) as executor,
        ):
            answers = list(executor.map(lambda pair: self._ask(client, pair[0]), pairs))
        self.unread += answers.count(None)
        return [0.5 if answer is None else answer for answer in answers]

    def _ask(self, client: httpx2.Client, question: str) -> float | None:
        """P(yes), or None if the server thinks of neither yes nor no."""
        address = f"{self.url}/chat/completions"
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": TOP,
        }
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(self.pause * 2 ** (attempt - 1))
            try:
                reply = client.post(address, json=body)
            except httpx2.TransportError as error:
                trouble = f"{type(error).__name__} {error}"
                continue
            if reply.is_success:
                return self._read(reply)
            trouble = f"status {reply.status_code}: {reply.text[:200]}"
            if reply.status_code != BUSY and reply.status_code < 500:
                raise ConnectionError(f"{address} refused the question with {trouble}")
        raise ConnectionError(f"{address} gave no answer in {self.attempts} attempts: {trouble}")

    def _read(self, reply: httpx2.Response) -> float | None:
        try:
            first: dict[str, Any] = reply.json()["choices"][0]["logprobs"]["content"][0]
            top = [(item["token"], item["logprob"]) for item in first["top_logprobs"]]
        except (ValueError, LookupError, TypeError):
            raise ValueError(
                f"{self.url}: the reply holds no log-probabilities of its first token; the server must support logprobs "
                f"and top_logprobs: {reply.text[:200]}"
            ) from None
        mass = {"yes": 0.0, "no": 0.0}
        for token, logprob in top:
            word = token.strip().lower()
            if word in mass:
                mass[word] += math.exp(logprob)
        total = sum(mass.values())
        return mass["yes"] / total if total > 0 else None
