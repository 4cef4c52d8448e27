"""A teacher that only replays: traces that exist already, from a JSONL file in our layout or a public data set's."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from harness.models.codec import Codec, Coded
from harness.types import Batch, Capability, Ids, Problem, Request, Sampling, Scores, Trace

Row = Mapping[str, Any]


class Response(NamedTuple):
    text: str
    complete: bool = True  # False: known to have been cut


class Coverage(NamedTuple):
    """How a file and a list of problems meet."""

    matched: int  # problems with at least one trace
    unmatched: tuple[str, ...]  # ids of the problems without
    unused: int  # problems of the file that were not asked for


class TraceFile(Coded):
    """Replays a file's traces, matched by problem id or by the problem's text, white space apart.

    It writes nothing new: a problem gets as many samples as the file has, at most `n`. Verdicts in the file are not
    taken over, since the bench judges every trace by its own verifier.
    """

    capabilities: frozenset[Capability] = frozenset(("generate",))

    def __init__(self, path: str | Path, codec: Codec, *, name: str | None = None) -> None:
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"traces: {path} is not a file; give a JSONL file, one object a line")
        self.name = name or str(path)
        self.codec = codec
        self.vocabulary = codec.vocabulary
        self.vocabulary_digest = codec.vocabulary_digest
        self._responses: dict[str, list[Response]] = defaultdict(list)
        data = path.read_bytes()
        for problem, responses in parsed(path, data):
            self._responses[normalised(problem)] += responses
        digest = hashlib.sha256(b"traces" + data + codec.vocabulary_digest.encode())
        self.identity = digest.hexdigest()

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Trace]]:
        """The first `n` traces of each problem, or those there are; longer than the limit, they are cut."""
        return [self._replay(request, sampling) for request in requests]

    def score(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[Scores]:
        raise ValueError(self._only("scores"))

    def hidden(self, batch: Batch) -> Any:
        raise ValueError(self._only("hidden states"))

    def head(self, hidden: Any) -> Any:
        raise ValueError(self._only("logits"))

    def coverage(self, problems: Sequence[Problem]) -> Coverage:
        """How many of the problems have traces, and how many of the file's problems are not among them."""
        keys = {problem.id: self._key(problem) for problem in problems}
        unmatched = tuple(id for id, key in keys.items() if key is None)
        used = {key for key in keys.values() if key is not None}
        return Coverage(len(keys) - len(unmatched), unmatched, len(self._responses.keys() - used))

    def _only(self, what: str) -> str:
        return (
            f"{self.name} only replays traces and has no {what}; use a model as the teacher, or a method that trains "
            "on text alone"
        )

    def _key(self, problem: Problem) -> str | None:
        keys = (normalised(problem.id), normalised(problem.prompt))
        return next((key for key in keys if key in self._responses), None)

    def _replay(self, request: Request, sampling: Sampling) -> list[Trace]:
        if request.prefix:
            raise ValueError(
                f"{self.name} only replays traces and cannot continue from a prefix (problem {request.problem.id!r})"
            )
        key = self._key(request.problem)
        found = [] if key is None else self._responses[key][: sampling.n]
        return [self._trace(request, sampling, i, response) for i, response in enumerate(found)]

    def _trace(self, request: Request, sampling: Sampling, index: int, response: Response) -> Trace:
        tokens = self.tokenize(response.text, end=response.complete)
        text, finished = response.text, response.complete
        if len(tokens) > sampling.max_new_tokens:
            tokens, finished = tokens[: sampling.max_new_tokens], False
            text = self.decode(tokens)
        return Trace(request.problem, tokens, text, finished, index=index, author=self.identity)


def normalised(text: str) -> str:
    """Text with compatible characters unified and white space collapsed."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def parsed(path: Path, data: bytes) -> Iterator[tuple[str, list[Response]]]:
    """(problem, responses) of each row; a broken row is named by file and line."""
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: not JSON ({error}); expected one object a line") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected an object, found {type(row).__name__}")
        layout = next((read for keys, read in LAYOUTS.items() if keys <= row.keys()), None)
        if layout is None:
            expected = "; or ".join(", ".join(sorted(keys)) for keys in LAYOUTS)
            found = ", ".join(sorted(row)) or "nothing"
            raise ValueError(f"{where}: expected the keys {expected}; found {found}")
        try:
            yield layout(row)
        except (TypeError, LookupError) as error:
            raise ValueError(f"{where}: {error.args[0]}") from None


def ours(row: Row) -> tuple[str, list[Response]]:
    return text(row, "problem"), [Response(text(row, "response"))]


def open_r1(row: Row) -> tuple[str, list[Response]]:
    """OpenR1-Math: several generations a problem, and whether each came to its end."""
    generations = texts(row, "generations")
    complete = row.get("is_reasoning_complete") or [True] * len(generations)
    if not isinstance(complete, list) or len(complete) != len(generations):
        raise TypeError(
            f"is_reasoning_complete must be a list of {len(generations)}, one a generation"
        )
    pairs = zip(generations, complete, strict=True)
    return text(row, "problem"), [Response(g, bool(done)) for g, done in pairs]


def s1k(row: Row) -> tuple[str, list[Response]]:
    """s1K: the thought apart from the attempt that follows it."""
    thoughts, attempt = texts(row, "thinking_trajectories"), text(row, "attempt")
    return text(row, "question"), [
        Response(f"<think>\n{t}\n</think>\n\n{attempt}") for t in thoughts
    ]


def limo(row: Row) -> tuple[str, list[Response]]:
    return text(row, "question"), [Response(text(row, "solution"))]


def chat(row: Row) -> tuple[str, list[Response]]:
    """A conversation: its last user turn is the problem, the assistant turn after it the response."""
    turns = row["messages"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise TypeError("messages must be a list of {role, content}")
    if [turn.get("role") for turn in turns][-2:] != ["user", "assistant"]:
        raise TypeError("messages must end with a user turn and an assistant turn")
    return text(turns[-2], "content"), [Response(text(turns[-1], "content"))]


def text(row: Row, key: str) -> str:
    if not isinstance(row.get(key), str):
        raise TypeError(f"{key} must be a string, found {type(row.get(key)).__name__}")
    return str(row[key])


def texts(row: Row, key: str) -> list[str]:
    value = row[key]
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise TypeError(f"{key} must be a list of strings")
    return value


LAYOUTS: dict[frozenset[str], Callable[[Row], tuple[str, list[Response]]]] = {
    frozenset({"problem", "response"}): ours,
    frozenset({"problem", "generations"}): open_r1,
    frozenset({"question", "thinking_trajectories", "attempt"}): s1k,
    frozenset({"question", "solution"}): limo,
    frozenset({"messages"}): chat,
}
