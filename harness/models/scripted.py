"""A language model that says what a script says: the double for tests, of this package and of others."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.models.codec import Bytes, Codec, Coded
from harness.types import Batch, Capability, Ids, Request, Sampling, Scores, Trace

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Reply:
    """One scripted answer. Log-probabilities and entropies are one a written token, the end token included."""

    text: str
    finished: bool = True  # False: the end token is missing, as if it had been cut
    logprobs: tuple[float, ...] | None = None
    entropies: tuple[float, ...] | None = None


GENERATES: frozenset[Capability] = frozenset(("generate",))
Answer = str | Reply
Script = Sequence[Answer] | Callable[[Request, int], Answer]


class Scripted(Coded):
    """Answers from a table: problem id -> texts (taken in turn, over and over), or a function of (request, sample index).

    An answer is what the model writes, after the request's prefix if there is one. `scores` and `logits` serve models that
    are to be scored or trained against: `logits(batch)` gives [N, V] at `batch.index`. Whatever `capabilities` lacks is refused.
    """

    def __init__(
        self,
        table: Mapping[str, Script] | Callable[[Request, int], Answer],
        *,
        name: str = "scripted",
        codec: Codec | None = None,
        capabilities: Collection[Capability] = GENERATES,
        scores: Callable[[Ids, Ids], Scores] | None = None,
        logits: Callable[[Batch], Tensor] | None = None,
    ) -> None:
        self.name = name
        self.capabilities: frozenset[Capability] = frozenset(capabilities)
        self.codec = codec or Bytes()
        self._table, self._scores, self._logits = table, scores, logits
        self.identity = hashlib.sha256(f"scripted {name} {table!r}".encode()).hexdigest()
        self.vocabulary = self.codec.vocabulary
        self.vocabulary_digest = self.codec.vocabulary_digest

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Trace]]:
        self._need("generate")
        return [[self._trace(r, i, sampling) for i in range(sampling.n)] for r in requests]

    def score(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[Scores]:
        self._need("score")
        if self._scores is None:
            raise ValueError(
                f"{self.name}: no scores are scripted; pass scores=function(prompt, response)"
            )
        return [self._scores(prompt, response) for prompt, response in pairs]

    def hidden(self, batch: Batch) -> Tensor:
        """The scripted logits themselves; `head` hands them on."""
        self._need("logits")
        if self._logits is None:
            raise ValueError(f"{self.name}: no logits are scripted; pass logits=function(batch)")
        return self._logits(batch)

    def head(self, hidden: Tensor) -> Tensor:
        self._need("logits")
        return hidden[:, : self.vocabulary]

    def _need(self, capability: Capability) -> None:
        if capability not in self.capabilities:
            able = ", ".join(sorted(self.capabilities)) or "nothing"
            raise ValueError(f"{self.name} cannot {capability}: it was scripted to do {able} only")

    def _answer(self, request: Request, index: int) -> Reply:
        script: Script
        if callable(self._table):
            script = self._table
        elif request.problem.id in self._table:
            script = self._table[request.problem.id]
        else:
            known = ", ".join(map(repr, [*self._table][:5]))
            raise ValueError(
                f"{self.name} has no answer to problem {request.problem.id!r}; its table begins with {known}"
            )
        answer = script(request, index) if callable(script) else script[index % len(script)]
        return answer if isinstance(answer, Reply) else Reply(answer)

    def _trace(self, request: Request, index: int, sampling: Sampling) -> Trace:
        reply = self._answer(request, index)
        cuts = [(reply.text.find(stop), stop) for stop in sampling.stop if stop in reply.text]
        text = reply.text[: min(cuts)[0]] if cuts else reply.text
        said = (
            text + min(cuts)[1] if cuts else text
        )  # the tokens keep the stop string, as a model's do
        written = self.tokenize(said, end=reply.finished and not cuts)
        finished = reply.finished or bool(cuts)
        if len(written) > sampling.max_new_tokens:
            written, finished = written[: sampling.max_new_tokens], False
            text = self.decode(written)
        return Trace(
            problem=request.problem,
            tokens=(*request.prefix, *written),
            text=self.decode(request.prefix) + text,
            finished=finished,
            prefix=len(request.prefix),
            index=index,
            author=self.identity,
            logprobs=self._given("logprobs", reply.logprobs, len(written)),
            entropies=self._given("entropies", reply.entropies, len(written)),
        )

    def _given(
        self, what: str, values: tuple[float, ...] | None, length: int
    ) -> tuple[float, ...] | None:
        """The scripted values of the written tokens; more are those that a stop or a limit cut off."""
        if values is not None and len(values) < length:
            raise ValueError(
                f"{self.name}: {len(values)} {what} are scripted for {length} written tokens (the end token counts)"
            )
        return None if values is None else values[:length]
