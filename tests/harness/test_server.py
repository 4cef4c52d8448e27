"""A server that writes: scripted ones on this machine, which fail as servers do. A real one is in test_vllm_serve.py."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks import CHECKPOINTS
from harness import cell, config, models, problems, verifiers
from harness.cli import app
from harness.config import SamplingSettings
from harness.doctor import _servers
from harness.evaluation import read_records
from harness.lab import Workbench
from harness.ledger import Ledger
from harness.models.endpoint import Endpoint, Pace
from harness.models.noise import sample_seed
from harness.models.openai import ServerModel, Unfinished
from harness.models.text import Text
from harness.plan import forecast
from harness.report import plan as said
from harness.report.reading import Comparison, conditions
from harness.store import Store
from harness.types import Problem, Request, Sampling
from tests.tiny import tiny_model

Reply = Any  # a body of status 200, (status, body, headers), raw bytes, "drop" or "hang"
CANARY = "sk-canary-3141592653"


class Server(ThreadingHTTPServer):
    """Answers each request by `answer(path, body, how many came before)`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer: Callable[[str, dict[str, Any], int], Reply] = lambda path, body, nth: chat("4")
        self.seen: list[tuple[str, dict[str, Any], str | None]] = []
        self.lock, self.ended = threading.Lock(), threading.Event()
        self.listed: Reply = {"data": [{"id": "m"}, {"id": "other"}]}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [body for _, body, _ in self.seen]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A caller that has gone is no news."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            nth = len(self.server.seen)
            self.server.seen.append((self.path, body, self.headers["Authorization"]))
        self.send(self.server.answer(self.path, body, nth))

    def do_GET(self) -> None:
        self.send(self.server.listed)

    def send(self, reply: Reply) -> None:
        if reply == "drop":
            self.connection.close()
            return
        if reply == "hang":
            self.server.ended.wait()
            return
        status, content, headers = reply if isinstance(reply, tuple) else (200, reply, {})
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.ended.set()
        server.shutdown()
        thread.join()


def chat(text: Any, reason: str = "stop", usage: Any = (7, 5), **message: Any) -> dict[str, Any]:
    counts = usage and {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    return {
        "choices": [{"message": {"content": text, **message}, "finish_reason": reason}],
        "usage": counts,
    }


def plain(text: str, reason: str = "stop", usage: Any = None, **choice: Any) -> dict[str, Any]:
    counts = usage and {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    return {"choices": [{"text": text, "finish_reason": reason, **choice}], "usage": counts}


@cache
def codec() -> Text:
    return Text.of(CHECKPOINTS["micro/student"], "micro/student")


def spec(server: Server, **options: Any) -> dict[str, Any]:
    return {"server": server.url, "model": "m", **options}


def writer(server: Server, **options: Any) -> ServerModel:
    model = ServerModel(config.Server(**spec(server, **options)), codec(), pause=0.001)
    return model


def asked(*prompts: str, prefix: str = "", raw: bool = False) -> list[Request]:
    begun = codec().tokenize(prefix, end=False)
    return [Request(p, Problem(p, p, answer="4", verifier="exact"), begun, raw) for p in prompts]


def waits(model: ServerModel) -> list[float]:
    """The pauses that it makes from now on, which take no time."""
    made: list[float] = []
    model.endpoint.wait = made.append
    return made


PLAIN = Sampling(n=1, temperature=0.7, top_p=0.9, max_new_tokens=30, seed=3)


# What is asked


def test_a_chat_gets_the_user_turn(server: Server) -> None:
    ((trace,),) = writer(server, body={"seed": None, "min_p": 0.1}).generate(asked("2+2=?"), PLAIN)
    ((path, body, _),) = server.seen
    assert path == "/v1/chat/completions"
    assert body == {
        "model": "m",
        "messages": [{"role": "user", "content": "2+2=?"}],
        **{"max_tokens": 30, "temperature": 0.7, "top_p": 0.9, "min_p": 0.1},
    }
    assert trace.text == "4" and trace.tokens == codec().tokenize("4") and trace.finished
    assert trace.usage == (7, 5) and trace.logprobs is None and trace.entropies is None


def test_completions_get_the_rendered_prompt(server: Server) -> None:
    server.answer = lambda path, body, nth: plain("4")
    model = writer(server, api="completions")
    sampling = Sampling(top_k=5, stop=("\n\n", "so"), max_new_tokens=9)
    model.generate(asked("2+2=?"), sampling)
    ((path, body, _),) = server.seen
    seed = sample_seed(codec().encode("2+2=?"), (), sampling, 0) & (2**31 - 1)
    assert path == "/v1/completions"
    assert body == {
        **{"model": "m", "prompt": "<|user|>2+2=?<|assistant|>", "max_tokens": 9},
        **{"temperature": 1.0, "top_p": 1.0, "top_k": 5, "stop": ["\n\n", "so"], "seed": seed},
    }


def test_the_server_itself_puts_what_begins_a_text(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would stand there twice."""
    server.answer = lambda path, body, nth: plain("4", usage=(10, 2))
    lm, model = codec(), writer(server, api="completions")
    monkeypatch.setattr(model, "codec", begins := Text.of(CHECKPOINTS["micro/student"]))
    pad = begins.tokenizer.pad_token_id
    monkeypatch.setattr(begins, "raw", lambda text: (pad, *lm.raw(text)))
    monkeypatch.setattr(begins, "encode", lambda prompt, system=None: (pad, *lm.encode(prompt)))
    model.generate(asked("(3+4)*2"), PLAIN)
    assert server.bodies[0]["prompt"] == "<|user|>(3+4)*2<|assistant|>"


def test_vllm_gets_tokens_and_gives_them(server: Server) -> None:
    ids = codec().tokenize("<think>\n4\n</think>\n4")
    logprobs = [-0.5 - i for i in range(len(ids))]
    content = [{"logprob": value} for value in logprobs]
    server.answer = lambda path, body, nth: (
        plain("<think>\n4\n</think>\n4", token_ids=ids, logprobs={"token_logprobs": logprobs})
        if path == "/v1/completions"
        else {
            "choices": [
                {
                    "message": {"content": "4", "reasoning": "4"},
                    **{"finish_reason": "stop", "token_ids": ids, "logprobs": {"content": content}},
                }
            ]
        }
    )
    for api in ("completions", "chat"):
        ((trace,),) = writer(server, api=api, tokens="ids").generate(asked("2+2=?"), PLAIN)
        assert trace.tokens == ids and trace.logprobs == tuple(logprobs)
        assert trace.text == "<think>\n4\n</think>\n4"
    one, two = server.bodies
    assert one["prompt"] == list(codec().encode("2+2=?")) and one["logprobs"] == 0
    assert two["logprobs"] is True and "prompt" not in two
    assert all(body["return_token_ids"] is True and body["top_k"] == 0 for body in (one, two))


def test_tokens_of_another_tokenizer_are_refused(server: Server) -> None:
    model = writer(server, api="completions", tokens="ids")
    server.answer = lambda path, body, nth: plain("44", token_ids=[5, 1], logprobs={"token_logprobs": [0, 0]})  # fmt: skip
    with pytest.raises(ConnectionError, match="tokens are not those of micro/student: name the"):
        model.generate(asked("2+2=?"), PLAIN)
    server.answer = lambda path, body, nth: plain("4")
    with pytest.raises(ConnectionError, match="no token_ids, which only vLLM gives"):
        model.generate(asked("2+2=?"), PLAIN)
    server.answer = lambda path, body, nth: plain("4", usage=(12, 3))
    with pytest.raises(
        ConnectionError, match="read 12 tokens of a prompt that has 7 by micro/stud"
    ):
        writer(server, api="completions").generate(asked("2+2=?"), PLAIN)
    assert len(server.seen) == 3  # none is asked twice


def test_seeds_are_of_the_sample(server: Server) -> None:
    server.answer = lambda path, body, nth: chat(str(body["seed"]))
    model = writer(server)
    few = model.generate(asked("2+2=?", "1+1=?"), Sampling(n=2))
    many = model.generate(asked("2+2=?", "1+1=?"), Sampling(n=5))
    texts = [[trace.text for trace in group] for group in many]
    assert [[trace.text for trace in group] for group in few] == [group[:2] for group in texts]
    assert len({text for group in texts for text in group}) == 10
    assert all(0 <= int(text) < 2**31 for group in texts for text in group)
    assert [trace.index for trace in many[1]] == [0, 1, 2, 3, 4]
    assert len(server.seen) == 4 + 10  # none beyond n, as each costs


# What comes back


@pytest.mark.parametrize(
    ("reply", "text", "tokens", "finished"),
    [
        (plain("12", "stop"), "12", "12<|end|>", True),
        (plain("12", "length"), "12", "12", False),
        (plain("12", "content_filter"), "12", "12", False),
        (plain("12", "stop", stop_reason=";"), "12", "12;", True),
        (plain("12", "stop", stop_reason=None), "12", "12<|end|>", True),
        (plain("12", "stop", stop_reason=77), "12", "12<|end|>", True),
    ],
)
def test_how_an_answer_ends(
    server: Server, reply: Reply, text: str, tokens: str, finished: bool
) -> None:
    server.answer = lambda path, body, nth: reply
    sampling = Sampling(stop=(";",), max_new_tokens=9)
    ((trace,),) = writer(server, api="completions").generate(asked("2+2=?"), sampling)
    assert (trace.text, trace.finished) == (text, finished)
    assert codec().tokenizer.decode(list(trace.tokens)) == tokens


def test_reasoning_stands_before_the_answer(server: Server) -> None:
    (request,) = asked("2+2=?")
    model = writer(server)
    for field in ("reasoning_content", "reasoning"):
        server.answer = lambda path, body, nth, f=field: chat("4", **{f: "\n5-1\n"})
        ((trace,),) = model.generate([request], PLAIN)
        assert trace.text == "<think>\n5-1\n</think>\n4"
        assert verifiers.verify_many([(request.problem, trace.text, True)])[0].status == "ok"
    server.answer = lambda path, body, nth: chat(None, "length", reasoning_content="5-1 is 4")
    ((trace,),) = model.generate([request], PLAIN)
    assert trace.text == "<think>\n5-1 is 4" and not trace.finished
    assert verifiers.verify_many([(request.problem, trace.text, False)])[0].status == "unparsed"
    server.answer = lambda path, body, nth: chat(None, "stop", reasoning="so 4")
    ((trace,),) = model.generate([request], PLAIN)
    assert trace.text == "<think>\nso 4"  # nobody saw it closed
    server.answer = lambda path, body, nth: chat("\n4", reasoning="\n5-1\n")  # as vLLM cuts it
    assert model.generate([request], PLAIN)[0][0].text == "<think>\n5-1\n</think>\n4"
    begun = asked("2+2=?", prefix="<think>\n2+2\n")
    with pytest.raises(
        ConnectionError, match="of a begun answer nobody can say where its think ended"
    ):
        writer(server, prefix="continue").generate(begun, PLAIN)


def test_a_prompt_that_opens_the_think_is_not_opened_again(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    opening = Text.of(CHECKPOINTS["micro/student"])
    opening.tokenizer.chat_template += "<think>\n"
    model = writer(server)
    monkeypatch.setattr(model, "codec", opening)
    server.answer = lambda path, body, nth: chat("4", reasoning="5-1")
    assert model.generate(asked("2+2=?"), PLAIN)[0][0].text == "5-1\n</think>\n4"
    server.answer = lambda path, body, nth: chat("<think>\n5-1\n</think>\n4")
    assert model.generate(asked("2+2=?"), PLAIN)[0][0].text == "5-1\n</think>\n4"


def test_answers_come_in_order(server: Server) -> None:
    def later_first(path: str, body: dict[str, Any], nth: int) -> Reply:
        time.sleep(0.002 * (40 - nth))
        return chat(body["messages"][0]["content"])

    server.answer = later_first
    prompts = [f"{i}+1=?" for i in range(40)]
    found = writer(server, concurrency=8).generate(asked(*prompts), PLAIN)
    assert [group[0].text for group in found] == prompts
    assert writer(server).generate([], PLAIN) == []


# Begun answers


def test_completions_go_on_from_a_prefix(server: Server) -> None:
    server.answer = lambda path, body, nth: plain("4")
    begun = "<think>\n2+2\n"
    for tokens in ("text", "ids"):
        ids = codec().tokenize("4")
        if tokens == "ids":
            server.answer = lambda path, body, nth, ids=ids: plain(
                "4", token_ids=ids, logprobs={"token_logprobs": [0.0] * len(ids)}
            )
        model = writer(server, api="completions", tokens=tokens)
        ((trace,),) = model.generate(asked("2+2=?", prefix=begun), PLAIN)
        assert trace.text == begun + "4" and trace.tokens[trace.prefix :] == codec().tokenize("4")
        assert trace.tokens[: trace.prefix] == codec().tokenize(begun, end=False)
    one, two = (body["prompt"] for body in server.bodies)
    assert one == "<|user|>2+2=?<|assistant|>" + begun
    assert two == [*codec().encode("2+2=?"), *codec().tokenize(begun, end=False)]


def test_a_chat_refuses_prefixes_unless_told(server: Server) -> None:
    requests = asked("2+2=?", prefix="<think>\n2+2\n")
    with pytest.raises(ValueError, match=r"'2\+2=\?'\): use api: completions, or prefix: continue"):
        writer(server).generate([*asked("1+1=?"), *requests], PLAIN)
    assert server.seen == []
    ((trace,),) = writer(server, prefix="continue").generate(requests, PLAIN)
    (body,) = server.bodies
    begun = {"role": "assistant", "content": "<think>\n2+2\n"}
    assert body["messages"] == [{"role": "user", "content": "2+2=?"}, begun]
    assert body["continue_final_message"] is True and body["add_generation_prompt"] is False
    assert trace.text == "<think>\n2+2\n4"


def test_an_answer_that_is_over_is_not_asked_for(server: Server) -> None:
    requests = [Request("2+2=?", asked("a")[0].problem, codec().tokenize("4"))]
    ((trace,),) = writer(server, api="completions").generate(requests, PLAIN)
    assert trace.finished and trace.text == "4" and trace.usage == (0, 0) and server.seen == []


def test_text_to_continue(server: Server) -> None:
    server.answer = lambda path, body, nth: plain("4", usage=(99, 1))
    with pytest.raises(ValueError, match="without a chat template needs api: completions"):
        writer(server).generate(asked("2+2=", raw=True), PLAIN)
    writer(server, api="completions").generate(asked("2+2=", raw=True), PLAIN)
    assert [body["prompt"] for body in server.bodies] == ["2+2="]


# Trouble


@pytest.mark.parametrize(
    "trouble",
    [
        (429, {"error": "slow down"}, {}),
        (500, {"error": {"message": "oops"}}, {}),
        (503, b"<html>", {}),
        "drop",
        b'{"choices": [',
        b"[1]",
        {"choices": []},
        {"choices": [{"message": None, "finish_reason": "stop"}]},
        chat("half", "insufficient_system_resource"),
        chat("half", None),  # type: ignore[arg-type]
    ],
)
def test_what_may_pass_is_tried_again(server: Server, trouble: Reply) -> None:
    server.answer = lambda path, body, nth: trouble if nth < 3 else chat("4")
    model = writer(server)
    pauses = waits(model)
    assert model.generate(asked("2+2=?"), PLAIN)[0][0].text == "4"
    assert len(server.seen) == 4
    # The pauses double, each by a random factor around 1.
    assert all(0.5 <= p / (0.001 * 2**k) <= 1.5 for k, p in enumerate(pauses)) and len(pauses) == 3


def test_a_server_that_hangs_is_left(server: Server) -> None:
    server.answer = lambda path, body, nth: "hang" if nth == 0 else chat("4")
    assert writer(server, timeout=1.0).generate(asked("2+2=?"), PLAIN)[0][0].text == "4"
    assert len(server.seen) == 2


@pytest.mark.parametrize("date", [False, True])
def test_retry_after_is_honoured(server: Server, date: bool) -> None:
    def busy(path: str, body: dict[str, Any], nth: int) -> Reply:
        after = formatdate(time.time() + 40, usegmt=True) if date else "40"
        return (429, {"error": "later"}, {"Retry-After": after}) if nth == 0 else chat("4")

    server.answer = busy
    model, begun = writer(server), time.monotonic()
    (pause,) = [waits(model), model.generate(asked("2+2=?"), PLAIN)][0]
    assert 39 - (time.monotonic() - begun) <= pause <= 40  # a date has whole seconds
    with pytest.raises(
        ConnectionError, match=r"asks to come back in \d+ s, with status 429: later"
    ):
        server.seen.clear()
        writer(server, timeout=30).generate(asked("2+2=?"), PLAIN)
    assert len(server.seen) == 1


def test_refusals_are_final_and_say_what_to_do(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", CANARY)
    monkeypatch.delenv("NO_KEY", raising=False)
    context = "This model's maximum context length is 2048 tokens"
    for status, options, message, expected in (
        (401, {"key": "MY_KEY"}, f"no such key {CANARY}", r"status 401: no such key \*\*\*; the environment variable MY_KEY is set"),
        (401, {"key": "NO_KEY"}, "no key", "NO_KEY is not set"),
        (404, {}, "no such model", "'m' was asked for, and the server has m, other"),
        (400, {}, context, f"{context}; the prompt and sampling.max_new_tokens do not fit: lower it"),
        (400, {}, "bad\nseed", "status 400: bad seed"),
        (402, {}, "pay first", "status 402: pay first"),
    ):  # fmt: skip
        server.seen.clear()
        server.answer = lambda *_, s=status, m=message: (s, {"error": {"message": m}}, {})
        with pytest.raises(ConnectionError, match=expected) as refused:
            writer(server, **options).generate(asked("2+2=?"), PLAIN)
        assert len(server.seen) == 1 and CANARY not in str(refused.value)
        assert "\n" not in str(refused.value)
    server.listed = (500, {}, {})
    server.answer = lambda *_: (404, b"not here", {})
    with pytest.raises(ConnectionError, match=r"not here; .* does the address end in /v1\?"):
        writer(server).generate(asked("2+2=?"), PLAIN)


def test_it_gives_up(server: Server) -> None:
    server.answer = lambda path, body, nth: (503, {"error": "down"}, {})
    model = writer(server, attempts=3, concurrency=2)
    waits(model)
    with pytest.raises(
        ConnectionError, match=r"no answer in 3 attempts: status 503: down \(0 of 9"
    ):
        model.generate(asked(*"123456789"), PLAIN)
    assert len(server.seen) <= 2 * 3  # after the first failure none is begun


def test_ctrl_c_does_not_wait_for_answers(server: Server) -> None:
    server.answer = lambda path, body, nth: "hang"
    code = (
        "from harness import models\n"
        "from harness.types import Problem, Request, Sampling\n"
        f"model = models.load({spec(server, timeout=3600)}, writes=True)\n"
        "model.generate([Request(x, Problem(x, x)) for x in 'ab'], Sampling())"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    while len(server.seen) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1].strip().endswith("KeyboardInterrupt")


# Pace


class Clock:
    """Time that passes only where somebody waits."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


def test_what_was_taken_flows_off() -> None:
    clock = Clock()
    pace = Pace(120, clock, clock.wait)  # two a second
    starts = []
    for amount in (1, 3, 0.5, 1):
        pace.take(amount)
        starts.append(clock.now - 100)
    assert starts == pytest.approx([0, 0.5, 2.0, 2.25])
    clock.now += 60  # nothing is saved up
    first = clock.now
    for _ in range(3):
        pace.take(1)
    assert clock.now - first == pytest.approx(1.0)
    pace.settle(-1)  # the last cost nothing after all
    before = clock.now
    pace.take(5)
    pace.settle(3)  # and this one cost 8
    pace.take(1)
    assert clock.now - before == pytest.approx(4.0)
    free = Pace(None, clock, clock.wait)
    free.take(1e9)
    free.take(1)
    assert clock.now - before == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("limits", "last"),
    [
        ({"requests_per_minute": 60}, 5.0),
        # Each takes 7 + 30 tokens, 7 + 5 were used: 12 flow off in 1.2 s.
        ({"tokens_per_minute": 600}, 6.0),
        ({"requests_per_minute": 60, "tokens_per_minute": 6e6}, 5.0),
    ],
)
def test_requests_keep_the_pace(server: Server, limits: dict[str, float], last: float) -> None:
    clock = Clock()
    server.answer = lambda path, body, nth: chat("4", usage=(7, 5))
    model = writer(server, concurrency=1)
    given = config.Server(**spec(server, concurrency=1, **limits))
    model.endpoint = Endpoint(given, clock=clock, wait=clock.wait)
    model.generate(asked(*"123456"), PLAIN)
    assert clock.now - 100 == pytest.approx(last, abs=1e-3)


def test_a_retry_keeps_the_pace_too(server: Server) -> None:
    clock = Clock()
    server.answer = lambda path, body, nth: (500, {}, {}) if nth < 2 else chat("4")
    model = writer(server)
    given = config.Server(**spec(server, requests_per_minute=3))
    model.endpoint = Endpoint(given, pause=0.001, clock=clock, wait=clock.wait)
    model.generate(asked("1"), PLAIN)
    assert clock.now - 100 == pytest.approx(40.0, abs=1e-2)
    # What was refused wrote no tokens.
    server.seen.clear()
    given = config.Server(**spec(server, tokens_per_minute=60))
    model.endpoint = Endpoint(given, pause=0.001, clock=clock, wait=clock.wait)
    before = clock.now
    model.generate(asked("1"), PLAIN)
    assert clock.now - before < 0.01 and len(server.seen) == 3


# Store and ledger


def bench(server: Server, store: Path, **options: Any) -> tuple[Workbench, ServerModel, Ledger]:
    model, ledger = writer(server, **options), Ledger()
    waits(model)
    items = [request.problem for request in asked("1+1=?", "2+2=?", "3+3=?")]
    lab = Workbench(
        tiny_model(0),
        {"teacher": lambda: model},
        items,
        Store(store),
        ledger,
        SamplingSettings(max_new_tokens=30),
    )
    return lab, model, ledger


def test_what_a_server_counts_is_in_the_ledger(server: Server, tmp_path: Path) -> None:
    usage = {"1+1=?": (10, 4), "2+2=?": (11, 60), "3+3=?": (12, 7)}  # more than is shown
    server.answer = lambda path, body, nth: chat("4", usage=usage[body["messages"][0]["content"]])
    price = {"input": 0.5, "output": 2.0}
    lab, model, ledger = bench(server, tmp_path, price=price)
    lab.samples(model, 2)
    read, written = 2 * (10 + 11 + 12), 2 * (4 + 60 + 7)
    for column in (ledger.charged, ledger.spent):
        assert (column["teacher_read"], column["teacher_generated"]) == (read, written)
        assert column["cost"] == pytest.approx((0.5 * read + 2.0 * written) / 1e6)
        assert column["flops"] == 0
    # Another cell out of the same store is charged the same, and spends nothing.
    lab, model, again = bench(server, tmp_path, price=price)
    lab.samples(model, 2)
    assert again.charged == {**ledger.charged, "seconds": again.charged["seconds"]}
    assert again.spent["cost"] == again.spent["teacher_read"] == again.spent["teacher_generated"] == 0  # fmt: skip
    # A third sample costs one more of each; without the server's count, by the tokenizer's.
    server.answer = lambda path, body, nth: chat("456", usage=None)
    lab, model, more = bench(server, tmp_path, price=price)
    lab.samples(model, 3)
    prompts = sum(len(codec().encode(p)) for p in usage)
    assert more.spent["teacher_generated"] == 3 * 4 and more.spent["teacher_read"] == prompts
    assert more.charged["teacher_read"] == read + prompts
    assert len(server.seen) == 9


def test_what_was_paid_for_and_lost_is_spent(server: Server, tmp_path: Path) -> None:
    server.answer = lambda path, body, nth: chat("half", "odd") if nth < 2 else chat("4")
    lab, model, ledger = bench(server, tmp_path, concurrency=1, price={"output": 1.0})
    lab.samples(model, 1)
    assert ledger.charged["teacher_generated"] == 3 * 5 and ledger.charged["teacher_read"] == 3 * 7
    assert ledger.spent["teacher_generated"] == 5 * 5 and ledger.spent["teacher_read"] == 5 * 7
    assert ledger.spent["cost"] == pytest.approx(25e-6) and model.take_lost() == (0, 0)


def test_what_was_finished_before_a_failure_is_kept(server: Server, tmp_path: Path) -> None:
    def fails(path: str, body: dict[str, Any], nth: int) -> Reply:
        if body["messages"][0]["content"] == "3+3=?":
            return (400, {"error": "no threes"}, {})
        return chat("half", "odd") if nth == 0 else chat("4")

    server.answer = fails
    lab, model, ledger = bench(server, tmp_path, concurrency=1)
    with pytest.raises(Unfinished, match=r"no threes \(4 of 6 samples of this block are kept\)"):
        lab.samples(model, 2)
    assert ledger.spent["teacher_generated"] == (4 + 1) * 5
    server.answer = lambda path, body, nth: chat("4")
    server.seen.clear()
    lab, model, ledger = bench(server, tmp_path)
    assert [len(group) for group in lab.samples(model, 2)] == [2, 2, 2]
    assert [body["messages"][0]["content"] for body in server.bodies] == ["3+3=?"] * 2
    assert ledger.spent["teacher_generated"] == 2 * 5 and ledger.charged["teacher_generated"] == 30


def test_blocks_are_of_moderate_size(server: Server) -> None:
    model = writer(server)
    requests = asked(*map(str, range(150)))
    sizes = [len(block.pairs) for block in model.plan(requests, Sampling(n=3))]
    assert max(sizes) == 64 and sum(sizes) == 450
    few = [block.samples for block in model.plan(requests[:2], Sampling(n=40))]
    assert few == [range(0, 32), range(32, 40)]
    wide = writer(server, concurrency=100).plan(requests, Sampling(n=1))
    assert [len(block.pairs) for block in wide] == [150]


# In a suite


def suite(teacher: Any, **changes: Any) -> dict[str, Any]:
    return {
        **{"name": "served", "student": "micro/student", "teacher": teacher, "seeds": 1},
        **{"problems": {"micro_math": {"n": 8, "levels": [2], "families": ["reduce"]}}},
        **{"benchmarks": {"micro_math": {"n": 1, "limit": 4}}, "methods": ["sft"]},
        **{"budget": {"steps": 2}, "training": {"batch_size": 4}, "threads": 1},
        **{"sampling": {"max_new_tokens": 100}},
        **changes,
    }


def test_what_a_server_writes_is_in_the_key_and_how_it_is_asked_is_not(server: Server) -> None:
    line = spec(server)
    known = cell.fingerprint(line)
    for how in ({"concurrency": 3}, {"price": {"input": 1.0}}, {"timeout": 5.0}, {"key": "OTHER"}):
        assert cell.fingerprint({**line, **how}) == known
    what = ({"body": {"reasoning": "low"}}, {"api": "completions"}, {"tokens": "ids"}, {"tokenizer": "x"}, {"model": "other"})  # fmt: skip
    assert all(cell.fingerprint({**line, **other}) != known for other in what)


def test_a_line_of_a_suite(server: Server) -> None:
    line = spec(server, tokenizer="micro/teacher", concurrency=3)
    known = problems.checkpoints()
    found = models.load(line, checkpoints=known, tokenizer_of=codec(), writes=True)
    assert isinstance(found, ServerModel) and found.capabilities == {"generate"}
    assert found.vocabulary_digest == codec().vocabulary_digest and found.endpoint.threads == 3
    assert models.capabilities(line, known, writes=True) == {"generate"}
    plain = models.load(spec(server), tokenizer_of=codec(), writes=True)
    assert plain.codec is codec()
    others = [
        *(writer(server, **o) for o in ({"api": "completions"}, {"body": {"min_p": 0}}, {"tokens": "ids"})),
        ServerModel(config.Server(server="http://x/v1", model="m"), codec()),
        ServerModel(config.Server(server=server.url, model="n"), codec()),
    ]  # fmt: skip
    assert len({plain.identity, *(other.identity for other in others)}) == 6
    same = {"concurrency": 2, "key": "K", "price": {"input": 1}, "timeout": 9, "attempts": 2}
    assert writer(server, **same).identity == plain.identity
    with pytest.raises(
        ValueError, match="'micro/teachr' was not found; did you mean 'micro/teacher'"
    ):
        models.load({**line, "tokenizer": "micro/teachr"}, checkpoints=known, writes=True)
    with pytest.raises(ValueError, match="needs the model's chat template; name its `tokenizer:`"):
        models.load({**line, "tokenizer": None, "api": "completions"}, writes=True)
    for what in (lambda: plain.score([]), lambda: plain.head(None)):
        with pytest.raises(ValueError, match="behind a server, which writes and has no"):
            what()


def test_a_key_in_place_of_its_name_is_not_shown(server: Server) -> None:
    with pytest.raises(ValueError, match="the name of an environment variable, not the key") as bad:
        config.parse(suite(spec(server, key=CANARY)))
    assert CANARY not in str(bad.value)


def test_a_judge_does_not_write(server: Server) -> None:
    judge = spec(server, price={"input": 1}, api="chat")
    with pytest.raises(ValueError, match=r"models.judge: api, price say how a server writes"):
        config.parse(suite("micro/teacher", models={"judge": judge}))


@pytest.mark.parametrize(
    ("method", "what"), [("heal", "score"), ("paced", "logits"), ("vcrd", "logits")]
)
def test_methods_that_need_more_are_refused_before_anything_runs(
    server: Server, tmp_path: Path, method: str, what: str
) -> None:
    from harness.compare import compare

    given = config.parse(suite(spec(server), methods=[method, "sft"]))
    expected = rf"{method} needs the teacher's {what}, and .* offers only generate: use a Transformers model .* as teacher, .*sft"
    with pytest.raises(ValueError, match=expected):
        compare(given, results=tmp_path, quiet=True, track=False)
    with pytest.raises(ValueError, match=expected):
        forecast(given, quiet=True)
    assert server.seen == [] and not [*tmp_path.rglob("*.json")]


def answers(count: int) -> Callable[[str, dict[str, Any], int], Reply]:
    """A teacher that is right, and says how much it wrote."""
    options = {"levels": (2,), "families": ("reduce",)}
    known = {problems.render(p): p.answer for p in problems.load("micro_math", "train", n=count, **options)}  # fmt: skip

    def answer(path: str, body: dict[str, Any], nth: int) -> Reply:
        found = known[body["messages"][0]["content"]]
        return chat(found, reasoning=f"it is {found}", usage=(20, 30))

    return answer


def test_a_comparison_and_no_trace_of_the_key(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    from harness.compare import compare
    from harness.report import terminal

    caplog.set_level("DEBUG")
    monkeypatch.setenv("MY_KEY", CANARY)
    server.answer = answers(8)
    line = spec(server, key="MY_KEY", price={"input": 1.0, "output": 10.0})
    given = config.parse(suite(line, methods={"sft": {"samples": 2}, "seqkd": {"method": "sft", "samples": 2}}))  # fmt: skip
    found = compare(given, results=tmp_path, track=True)
    terminal(found)
    assert {key for _, _, key in server.seen} == {f"Bearer {CANARY}"} and len(server.seen) == 16
    arms = {row["method"]: row["ledger"] for row in found["arms"]}
    cost = 16 * (20 * 1.0 + 30 * 10.0) / 1e6
    assert arms["sft"]["charged"]["cost"] == pytest.approx(cost)
    assert arms["seqkd"]["charged"]["cost"] == pytest.approx(cost)
    assert arms["sft"]["spent"]["cost"] + arms["seqkd"]["spent"]["cost"] == pytest.approx(cost)
    told = conditions(Comparison(found))
    assert f"sft charged 320 for {cost:.4g}, spent 320 for {cost:.4g}" in told
    assert f"seqkd charged 320 for {cost:.4g}, spent 0" in told
    assert told.split("server.")[1] in (tmp_path / "served" / "report.md").read_text()
    server.answer = lambda *_: (401, {"error": f"I do not know {CANARY}"}, {})
    with pytest.raises(ConnectionError, match=r"I do not know \*\*\*") as refused:
        compare(config.parse(suite(line, name="other", methods=["sft"], data_seeds=[1])), results=tmp_path, quiet=True, track=False)  # fmt: skip
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 20 and any(path.suffix == ".arrow" for path in files)
    assert not [path for path in files if CANARY.encode() in path.read_bytes()]
    shown = capfd.readouterr()
    assert "sft" in shown.out and CANARY not in shown.out + shown.err + caplog.text
    assert CANARY not in str(refused.value) + repr(writer(server, key="MY_KEY").__dict__)


def test_a_plan_asks_nothing_and_says_the_price(server: Server) -> None:
    line = spec(server, price={"input": 0.5, "output": 2.0})
    found = forecast(config.parse(suite(line, seeds=2)), quiet=True)
    charged, spent = found["total"]["charged"], found["total"]["spent"]
    assert server.seen == [] and charged["teacher_generated"] > 0 and charged["teacher_read"] > 0
    for column in (charged, spent):
        money = 0.5 * column["teacher_read"] + 2.0 * column["teacher_generated"]
        assert column["cost"] == pytest.approx(money / 1e6)
    assert charged["cost"] == pytest.approx(2 * spent["cost"])  # two seeds share the samples
    assert any("teacher is a server" in line for line in found["assumed"])
    assert any("costs" in line and "with sharing" in line for line in said.sentences(found))
    usual = forecast(config.parse(suite("micro/teacher")), quiet=True)
    assert usual["total"]["charged"]["cost"] == 0
    assert not any("server" in line for line in said.sentences(usual))


def test_doctor_asks_which_models_there_are(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", CANARY)
    monkeypatch.delenv("NO_KEY", raising=False)

    def first(line: dict[str, Any]) -> tuple[str, str]:
        found = next(iter(_servers(config.parse(suite(line)))))
        assert CANARY not in found.text and found.subject == "teacher's server"
        return found.level, found.text

    level, text = first(spec(server, key="MY_KEY"))
    assert level == "ok" and "MY_KEY is set; it has m" in text
    level, text = first({**spec(server, key="NO_KEY"), "model": "othr"})
    assert level == "problem" and "NO_KEY is not set; it does not list 'othr': did you mean 'other'" in text  # fmt: skip
    server.listed = (401, {"error": f"who is {CANARY}"}, {})
    level, text = first(spec(server, key="MY_KEY"))
    assert level == "problem" and "status 401: who is ***; the environment variable MY_KEY" in text
    level, text = first({"server": "http://127.0.0.1:9/v1", "model": "m"})
    assert level == "note" and "did not answer (ConnectError), so its model could not" in text
    assert server.seen == []  # nothing that costs
    assert [*_servers(config.parse(suite("micro/teacher")))] == []


def test_a_whole_suite_is_examined(server: Server) -> None:
    from harness.doctor import examine

    findings = examine(config.parse(suite(spec(server))))
    assert not [each for each in findings if each.level == "problem"]
    assert {"teacher's server", "student's responses", "loss"} <= {f.subject for f in findings}


def test_a_server_is_evaluated(server: Server, tmp_path: Path) -> None:
    tests = problems.load("micro_math", "test")
    known = {problems.render(problem): problem.answer for problem in tests}
    server.answer = lambda path, body, nth: chat(known[body["messages"][0]["content"]] if nth % 2 else "no")  # fmt: skip
    command = ["eval", json.dumps(spec(server)), "--tasks", "micro_math", "--limit", "6"]
    done = CliRunner().invoke(app, [*command, "--results", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert len(server.seen) == 6
    (file,) = tmp_path.rglob("*.parquet")
    records = read_records(file)
    assert [record["correct"] for record in records].count(True) == 3
    assert all(record["tokens"] == 5 for record in records)  # by the server's count


def test_a_line_that_cannot_be_read_is_one_line() -> None:
    done = CliRunner().invoke(app, ["eval", "{server: 'x", "--tasks", "micro_math"])
    assert isinstance(done.exception, ValueError), done.exception
    assert "not a line of a suite" in str(done.exception) and "\n" not in str(done.exception)
