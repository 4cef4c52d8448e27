"""Models behind an OpenAI-compatible server: one that writes, as a teacher, and one that is asked yes or no, as a judge."""

from __future__ import annotations

import math
import threading
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import httpx2

from harness.config import Server
from harness.models.codec import Codec, Coded
from harness.models.decoding import Block, largest_power
from harness.models.endpoint import Endpoint, Unusable
from harness.models.noise import sample_seed
from harness.models.text import Text
from harness.store import digest
from harness.types import Batch, Capability, Ids, Request, Sampling, Scores, Trace
from harness.verifiers import opens_think
from harness.verifiers.completion import CLOSE, OPEN

TOP = 20  # alternatives to the first token that a judge is asked for
ROWS = 64  # samples of a block, at least: what is asked between two writes to the store
WAVES = 4  # of requests side by side in a block, so that few threads wait for its last ones
SEED = (1 << 31) - 1  # seeds that every server can read
ENDS = {"stop": True, "length": False, "content_filter": False}  # finish_reason -> finished

Pair = tuple[int, int]  # (place of the request, sample index)


class Answer(NamedTuple):
    """What one reply says, in tokens of the codec."""

    text: str  # without EOS or stop string
    written: Ids
    finished: bool
    logprobs: tuple[float, ...] | None
    usage: tuple[int, int]  # (prompt, written) tokens, by the server's count where it gives one


class Unfinished(ConnectionError):
    """Samples of a block that failed; `traces` holds those that were finished."""

    def __init__(self, reason: str, traces: Mapping[Pair, Trace]) -> None:
        super().__init__(reason)
        self.traces = traces


class ServerModel(Coded):
    """A `LanguageModel` that only writes. Its samples do not depend on what is asked beside them, so each is asked for once.

    Text becomes tokens by `codec`, the student's or the server model's own; only vLLM can be asked for the tokens themselves.
    """

    capabilities: frozenset[Capability] = frozenset(("generate",))
    num_parameters = 0  # not known: its FLOPs are not counted, its tokens are

    def __init__(self, spec: Server, codec: Codec, *, pause: float = 1.0) -> None:
        if spec.api == "completions" and not isinstance(codec, Text):
            raise ValueError(
                f"{spec.model}: api: completions needs the model's chat template; name its `tokenizer:`, or use api: chat"
            )
        self.spec, self.codec, self.name = spec, codec, spec.model
        self.endpoint = Endpoint(spec, pause=pause)
        self.price = dict(spec.price)
        self.vocabulary, self.vocabulary_digest = codec.vocabulary, codec.vocabulary_digest
        # The address is in it: two servers may serve different weights under one name.
        self.identity = digest(
            [
                "server",
                *(self.endpoint.url, spec.model, spec.api, spec.tokens, spec.body),
                codec.vocabulary_digest,
            ]
        )
        self._lost = (0, 0)
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"ServerModel({self.endpoint.url!r}, {self.name!r})"

    @cached_property
    def end(self) -> int:
        return self.tokenize("")[-1]

    # Writing

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Trace]]:
        traces: dict[Pair, Trace] = {}
        for block in self.plan(requests, sampling):
            traces |= zip(block.pairs, self.generate_block(block), strict=True)
        return [[traces[place, i] for i in range(sampling.n)] for place in range(len(requests))]

    def plan(self, requests: Sequence[Request], sampling: Sampling) -> list[Block]:
        """Blocks of some requests and sample indices; none beyond `n`, as each costs."""
        rows = max(ROWS, WAVES * self.endpoint.threads)
        most = largest_power(max(1, rows // max(1, len(requests))))
        return [
            Block(
                tuple(requests[start : start + rows]),
                tuple(range(start, min(start + rows, len(requests)))),
                range(sample, min(sample + most, sampling.n)),
                sampling,
                width=0,
                apart=True,
            )
            for sample in range(0, sampling.n, most)
            for start in range(0, len(requests), rows)
        ]

    def generate_block(self, block: Block, skip: Collection[Pair] = ()) -> list[Trace]:
        """The traces of `block.pairs` but for those to skip, in their order whatever is finished first."""
        requests = dict(zip(block.places, block.requests, strict=True))
        todo = [pair for pair in block.pairs if pair not in skip]

        def ask(client: httpx2.Client, pair: Pair) -> Trace:
            return self._write(client, requests[pair[0]], block.sampling, pair[1])

        for request in block.requests:
            self._check(request)
        found, failure = self.endpoint.each(ask, todo)
        traces = {todo[place]: trace for place, trace in sorted(found.items())}
        if isinstance(failure, (ConnectionError, ValueError)):
            kept = f"{len(traces)} of {len(todo)} samples of this block are kept"
            raise Unfinished(f"{failure} ({kept})", traces) from failure
        if failure is not None:
            raise failure
        return [traces[pair] for pair in todo]

    def take_lost(self) -> tuple[int, int]:
        """(prompt, written) tokens of replies that could not be used, since the last time this was asked."""
        with self._lock:
            lost, self._lost = self._lost, (0, 0)
        return lost

    def _check(self, request: Request) -> None:
        if self.spec.api == "completions":
            return
        if request.raw:
            raise ValueError(
                f"{self.name}: text to continue without a chat template needs api: completions (problem {request.problem.id!r})"
            )
        if request.prefix and self.spec.prefix == "refuse":
            raise ValueError(
                f"{self.name} was asked to go on from a begun answer (problem {request.problem.id!r}): use api: completions, or "
                "prefix: continue if the server knows continue_final_message (vLLM and SGLang do)"
            )

    def _write(
        self, client: httpx2.Client, request: Request, sampling: Sampling, index: int
    ) -> Trace:
        prompt = request.encoded(self)
        if request.prefix[-1:] == (self.end,):  # it is over already
            answer = Answer("", (), True, (), (0, 0))
        else:
            path, body = self._body(request, prompt, sampling, index)
            given = len(prompt) + len(request.prefix)
            reserved = given + sampling.max_new_tokens

            def read(reply: Mapping[str, Any]) -> Answer:
                answer = self._read(reply, request, prompt, sampling)
                self.endpoint.tokens.settle(sum(answer.usage) - reserved)
                return answer

            answer = self.endpoint.post(client, path, body, read, reserved)
        return Trace(
            problem=request.problem,
            tokens=(*request.prefix, *answer.written),
            text=self.decode(request.prefix) + answer.text,
            finished=answer.finished,
            prefix=len(request.prefix),
            index=index,
            author=self.identity,
            logprobs=answer.logprobs,
            usage=answer.usage,
        )

    def _body(
        self, request: Request, prompt: Ids, sampling: Sampling, index: int
    ) -> tuple[str, dict[str, Any]]:
        """The path and what is sent there. What the suite's `body` sets to null is left out."""
        exact = self.spec.tokens == "ids"
        body: dict[str, Any] = {
            "model": self.spec.model,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sample_seed(prompt, request.prefix, sampling, index) & SEED,
        }
        if sampling.top_k or exact:  # vLLM would take the top_k of the model's generation_config
            body["top_k"] = sampling.top_k
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if exact:
            body["return_token_ids"] = True
        if self.spec.api == "completions":
            path = "completions"
            ids = (*prompt, *request.prefix)
            body["prompt"] = list(ids) if exact else self._rendered(ids)
            if exact:
                body["logprobs"] = 0  # of the token itself, with no others
        else:
            path = "chat/completions"
            body["messages"] = [{"role": "user", "content": request.prompt}]
            if exact:
                body["logprobs"] = True
            if request.prefix:
                begun = {"role": "assistant", "content": self.decode(request.prefix)}
                body["messages"].append(begun)
                body |= {"continue_final_message": True, "add_generation_prompt": False}
        body |= self.spec.body
        return path, {key: value for key, value in body.items() if value is not None}

    def _rendered(self, ids: Ids) -> str:
        """Text that the server's tokenizer splits into these ids again; it puts what begins a text there itself."""
        assert isinstance(self.codec, Text)
        start = self.codec.raw("")
        ids = ids[len(start) :] if ids[: len(start)] == start else ids
        return str(
            self.codec.tokenizer.decode(
                list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    def _read(
        self, reply: Mapping[str, Any], request: Request, prompt: Ids, sampling: Sampling
    ) -> Answer:
        usage = _usage(reply)
        try:
            choice = reply["choices"][0]
            finished = ENDS[choice["finish_reason"]]
            text = self._text(choice, request)
        except (LookupError, TypeError, AttributeError):
            with self._lock:  # it was paid for
                read, written = usage or (0, 0)
                self._lost = self._lost[0] + read, self._lost[1] + written
            raise Unusable("the reply holds no finished answer") from None
        stopped = choice.get("stop_reason")
        stop = stopped if isinstance(stopped, str) and stopped in sampling.stop else ""
        logprobs = None
        if self.spec.tokens == "ids":
            text, written_ids, logprobs = self._exact(choice, stop)
        else:
            written_ids = self.tokenize(text + stop, end=finished and not stop)
        given = len(prompt) + len(request.prefix)
        if (
            usage is not None
            and self.spec.api == "completions"
            and not (request.prefix or request.raw)
            and usage[0] != given
        ):
            raise ValueError(
                f"{self.name}: the server read {usage[0]} tokens of a prompt that has {given} by {self._codec_name()}: name the "
                "model's own with `tokenizer:`, or use api: chat"
            )
        return Answer(text, written_ids, finished, logprobs, usage or (given, len(written_ids)))

    def _text(self, choice: Mapping[str, Any], request: Request) -> str:
        """The answer; reasoning that came apart from it stands before it, in the think that the model wrote it in."""
        if self.spec.api == "completions":
            return str(choice["text"])
        message = choice["message"]
        content = str(message.get("content") or "")
        reasoning = message.get("reasoning_content") or message.get("reasoning")
        if request.prefix:
            if reasoning and self.spec.tokens == "text":
                raise ValueError(
                    f"{self.name}: the server takes reasoning apart, and of a begun answer nobody can say where its think ended: use "
                    "`tokens: ids` (vLLM), api: completions, or a server without a reasoning parser"
                )
            return content
        if reasoning:
            content = f"{_line(reasoning)}{CLOSE}{_begun(content)}" if content else str(reasoning)
            return content if self._opened else OPEN + _begun(content)
        return content.removeprefix(OPEN).removeprefix("\n") if self._opened else content

    @cached_property
    def _opened(self) -> bool:
        return opens_think(self)

    def _exact(self, choice: Mapping[str, Any], stop: str) -> tuple[str, Ids, tuple[float, ...]]:
        """Text, tokens and log-probabilities of a reply with `token_ids`; what a reasoning parser took apart is whole there."""
        ids, found = choice.get("token_ids"), choice.get("logprobs") or {}
        if ids is None:
            raise ValueError(
                f"{self.endpoint.url}: the reply holds no token_ids, which only vLLM gives: leave out `tokens: ids`"
            )
        given = found.get("token_logprobs") or [item["logprob"] for item in found.get("content") or ()]  # fmt: skip
        whole = self.decode(ids)
        said = choice.get("text") or (choice.get("message") or {}).get("content") or ""
        if max(ids, default=0) >= self.vocabulary or said.strip() not in whole:
            raise ValueError(
                f"{self.name}: the server's tokens are not those of {self._codec_name()}: name the model's own with `tokenizer:`"
            )
        if len(given) != len(ids):
            raise ValueError(
                f"{self.endpoint.url}: {len(given)} log-probabilities of {len(ids)} tokens; leave out `tokens: ids`"
            )
        cut = whole.find(stop) if stop else -1
        return whole[:cut] if cut >= 0 else whole, tuple(ids), tuple(map(float, given))

    def _codec_name(self) -> str:
        return str(self.spec.tokenizer or getattr(self.codec, "name", "its tokenizer"))

    # What it cannot do

    def score(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[Scores]:
        raise ValueError(self._only("scores"))

    def hidden(self, batch: Batch) -> Any:
        raise ValueError(self._only("hidden states"))

    def head(self, hidden: Any) -> Any:
        raise ValueError(self._only("logits"))

    def _only(self, what: str) -> str:
        return (
            f"{self.name} is behind a server, which writes and has no {what}; use a Transformers model as the teacher, or a method "
            "that trains on text alone"
        )


def _usage(reply: Mapping[str, Any]) -> tuple[int, int] | None:
    """(prompt, written) tokens as the server counted them; None where it does not say."""
    usage = reply.get("usage")
    if not isinstance(usage, Mapping):
        return None
    counts = usage.get("prompt_tokens"), usage.get("completion_tokens")
    read, written = counts
    return (read, written) if isinstance(read, int) and isinstance(written, int) else None


def _line(text: str) -> str:
    return text if text.endswith("\n") else f"{text}\n"


def _begun(text: str) -> str:
    return text if text.startswith("\n") else f"\n{text}"


class JudgeServer:
    """A `RewardModel` that asks a chat model: P(yes) / (P(yes) + P(no)) of the first token of its answer."""

    capabilities: frozenset[Capability] = frozenset(("reward",))
    num_parameters = 0  # not known

    def __init__(self, spec: Server, *, pause: float = 1.0) -> None:
        self.endpoint, self.name = Endpoint(spec, pause=pause), spec.model
        self.identity = digest(["yes or no", self.endpoint.url, spec.model])
        self.unread = 0  # answers so far with neither yes nor no, which count as 0.5

    def __repr__(self) -> str:
        return f"JudgeServer({self.endpoint.url!r}, {self.name!r})"

    def lengths(self, pairs: Sequence[tuple[str, str]]) -> list[int]:
        """0 of each: the server's tokenizer is not known, and its FLOPs are not counted."""
        return [0] * len(pairs)

    def reward(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """P(yes) of each pair's question, which is its user turn."""
        if any(response for _, response in pairs):
            raise ValueError(
                f"{self.name}: a judge gets its whole question in the user turn; leave the response so far empty"
            )
        answers, failure = self.endpoint.each(self._ask, [question for question, _ in pairs])
        if failure is not None:
            raise failure
        self.unread += [*answers.values()].count(None)
        found = [answers[place] for place in range(len(pairs))]
        return [0.5 if answer is None else answer for answer in found]

    def _ask(self, client: httpx2.Client, question: str) -> float | None:
        """P(yes), or None if the server thinks of neither yes nor no."""
        body = {
            "model": self.name,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": TOP,
        }
        return self.endpoint.post(client, "chat/completions", body, self._read)

    def _read(self, reply: Mapping[str, Any]) -> float | None:
        try:
            first: dict[str, Any] = reply["choices"][0]["logprobs"]["content"][0]
            top = [(item["token"], item["logprob"]) for item in first["top_logprobs"]]
        except (LookupError, TypeError):
            raise ValueError(
                f"{self.endpoint.url}: the reply holds no log-probabilities of its first token; the server must support logprobs "
                f"and top_logprobs: {str(reply)[:200]}"
            ) from None
        mass = {"yes": 0.0, "no": 0.0}
        for token, logprob in top:
            word = token.strip().lower()
            if word in mass:
                mass[word] += math.exp(logprob)
        total = sum(mass.values())
        return mass["yes"] / total if total > 0 else None
