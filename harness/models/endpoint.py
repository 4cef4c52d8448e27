"""An OpenAI-compatible server as a caller sees it: several requests at a time, paced, patient with what passes, plain about what does not.

The key is read from its environment variable with every request and kept nowhere; what a server says is told without it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx2

from harness.config import Server

T = TypeVar("T")
R = TypeVar("R")

PASSING = frozenset((408, 409, 425, 429))  # refusals that may pass; so may every 5xx
SLICE = 1.0  # seconds after which a waiting thread looks again
SHOWN = 300  # characters of a server's message
JITTER = random.Random()  # of its own: the bench's seeds are not touched


class Unusable(Exception):
    """A reply that came and cannot be read; it may be better the next time."""


class Stopped(Exception):
    """A request that was given up because another failed for good."""


class Pace:
    """A token bucket without a reserve: what was taken flows off at the rate, and the next may take once nothing is left of it."""

    def __init__(
        self,
        per_minute: float | None,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], object] = time.sleep,
    ) -> None:
        self.rate = math.inf if per_minute is None else per_minute / 60  # a second
        self.clock, self.wait = clock, wait
        self.level, self.at = 0.0, clock()
        self.lock = threading.Lock()

    def take(self, amount: float) -> None:
        while self.rate < math.inf and (delay := self._try(amount)) > 0:
            self.wait(min(delay, SLICE))

    def _try(self, amount: float) -> float:
        """Take it, or say in how many seconds that may be asked again."""
        with self.lock:
            now = self.clock()
            self.level, self.at = max(0.0, self.level - (now - self.at) * self.rate), now
            if self.level > 1e-6:
                return self.level / self.rate
            self.level += amount
            return 0.0

    def settle(self, difference: float) -> None:
        """Take so much more than was said, or less."""
        with self.lock:
            self.level += difference


class Endpoint:
    """One server, shared by all threads that ask it."""

    def __init__(
        self,
        spec: Server,
        *,
        pause: float = 1.0,  # seconds before the second attempt, doubled before each further one
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], object] | None = None,
    ) -> None:
        self.url, self.model, self.key = spec.server.rstrip("/"), spec.model, spec.key
        self.threads, self.attempts = spec.concurrency, spec.attempts
        self.timeout, self.pause = spec.timeout, pause
        self.stop = threading.Event()
        self.wait = wait or self._wait
        self.requests = Pace(spec.requests_per_minute, clock, self.wait)
        self.tokens = Pace(spec.tokens_per_minute, clock, self.wait)

    def __repr__(self) -> str:
        return f"Endpoint({self.url!r}, {self.model!r})"

    def each(
        self, work: Callable[[httpx2.Client, T], R], items: Sequence[T]
    ) -> tuple[dict[int, R], Exception | None]:
        """What `work` makes of each item, by its place, and the first failure: after it no further item is begun.

        The threads are daemons, so that Ctrl-C need not wait for an answer.
        """
        todo = queue.SimpleQueue[tuple[int, T]]()
        done = queue.SimpleQueue[tuple[int, R] | Exception | None]()
        for pair in enumerate(items):
            todo.put(pair)
        stop = self.stop = threading.Event()
        limits = httpx2.Limits(max_connections=self.threads)
        client = httpx2.Client(timeout=self.timeout, limits=limits)

        def worker() -> None:
            while not stop.is_set():
                try:
                    place, item = todo.get_nowait()
                except queue.Empty:
                    break
                try:
                    done.put((place, work(client, item)))
                except Exception as error:  # handed to the caller, who raises it
                    stop.set()
                    done.put(error)
            done.put(None)

        live = min(self.threads, len(items))
        for _ in range(live):
            threading.Thread(target=worker, daemon=True).start()
        found: dict[int, R] = {}
        failure: Exception | None = None
        try:
            while live:
                each = done.get()
                if each is None:
                    live -= 1
                elif not isinstance(each, Exception):
                    found[each[0]] = each[1]
                elif failure is None or isinstance(failure, Stopped):
                    failure = each
        finally:
            stop.set()
        client.close()
        return found, failure

    def post(
        self,
        client: httpx2.Client,
        path: str,
        body: Mapping[str, Any],
        read: Callable[[Mapping[str, Any]], R],
        tokens: float = 0.0,
    ) -> R:
        """What `read` makes of the reply. Trouble that may pass is waited out: exponentially, with jitter, and as `Retry-After` says.

        `tokens` are those that the request may cost; whoever reads the reply settles the difference.
        """
        address, trouble, least = f"{self.url}/{path}", "", 0.0
        for attempt in range(self.attempts):
            if attempt:
                pause = self.pause * 2.0 ** (attempt - 1) * JITTER.uniform(0.5, 1.5)
                self.wait(max(least, pause))
            self.requests.take(1.0)
            self.tokens.take(tokens)
            least = 0.0
            secret = os.environ.get(self.key)
            headers = {"Authorization": f"Bearer {secret}"} if secret else {}
            try:
                reply = client.post(address, json=body, headers=headers)
            except httpx2.TransportError as error:
                trouble = _without(f"{type(error).__name__} {error}", secret)
                continue
            if reply.is_success:
                try:
                    return read(_plain(reply))
                except Unusable as error:
                    trouble = f"{error}: {_without(reply.text, secret)[:SHOWN]}"
                    continue
            said = _without(_message(reply), secret)
            trouble = f"status {reply.status_code}: {said}"
            self.tokens.settle(-tokens)  # nothing was written
            if reply.status_code not in PASSING and reply.status_code < 500:
                raise ConnectionError(self._refusal(client, address, reply.status_code, said))
            least = _retry_after(reply)
            if least > self.timeout:
                raise ConnectionError(
                    f"{address} asks to come back in {least:.0f} s, with {trouble}; run the same command again then"
                )
        raise ConnectionError(f"{address} gave no answer in {self.attempts} attempts: {trouble}")

    def models(self, client: httpx2.Client) -> list[str]:
        """The names that the server lists."""
        secret = os.environ.get(self.key)
        headers = {"Authorization": f"Bearer {secret}"} if secret else {}
        reply = client.get(f"{self.url}/models", headers=headers)
        if not reply.is_success:
            said = _without(_message(reply), secret)
            raise ConnectionError(
                self._refusal(None, f"{self.url}/models", reply.status_code, said)
            )
        try:
            return [str(model["id"]) for model in reply.json()["data"]]
        except (ValueError, LookupError, TypeError):
            raise ConnectionError(f"{self.url}/models lists no models") from None

    def key_state(self) -> str:
        return f"the environment variable {self.key} is {'set' if os.environ.get(self.key) else 'not set'}"

    def _refusal(self, client: httpx2.Client | None, address: str, status: int, said: str) -> str:
        """What a user can do about it, in one line."""
        text = f"{address} refused the question with status {status}: {said}"
        if status in (401, 403):
            return f"{text}; {self.key_state()}"
        if status == 404:
            listed = "lists no models: does the address end in /v1?"
            if client is not None:
                with contextlib.suppress(ConnectionError, httpx2.TransportError):
                    listed = f"has {', '.join(self.models(client))}"
            return f"{text}; {self.model!r} was asked for, and the server {listed}"
        if status == 400 and any(
            word in said for word in ("max_tokens", "context", "max_model_len")
        ):
            return f"{text}; the prompt and sampling.max_new_tokens do not fit: lower it, or start the server with more context"
        return text

    def _wait(self, seconds: float) -> None:
        if self.stop.wait(seconds):
            raise Stopped("given up, as another request failed for good")


def _plain(reply: httpx2.Response) -> Mapping[str, Any]:
    try:
        data = reply.json()
    except ValueError:
        raise Unusable("the reply is not JSON") from None
    if not isinstance(data, Mapping):
        raise Unusable("the reply is no JSON object")
    return data


def _message(reply: httpx2.Response) -> str:
    """The server's own words, on one line."""
    text = reply.text
    try:
        error = json.loads(text)["error"]
        text = str(error["message"] if isinstance(error, Mapping) else error)
    except (ValueError, LookupError, TypeError):
        pass
    return " ".join(text.split())[:SHOWN]


def _without(text: str, secret: str | None) -> str:
    """Some servers repeat the key that they refuse."""
    return text.replace(secret, "***") if secret else text


def _retry_after(reply: httpx2.Response) -> float:
    """Seconds, given as such or as a date; 0 where nothing is said."""
    said = reply.headers.get("Retry-After", "")
    try:
        return max(0.0, float(said))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(said).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0
