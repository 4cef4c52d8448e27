"""A judge behind a server: a real one on this machine, which answers in OpenAI's format."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from harness import cell, config, models
from harness.models.openai import JudgeServer


class Server(ThreadingHTTPServer):
    """Says yes with the probability that the question is; fails first as often as it is told."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.failures = 0  # replies still to be refused
        self.status = 503
        self.tokens: dict[str, float] | None = None  # of every answer; None: by the question
        self.reply: Any = None  # another body altogether
        self.seen: list[tuple[str, dict[str, Any], str | None]] = []  # path, body, authorization
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append((self.path, body, self.headers["Authorization"]))
            fails = self.server.failures > 0
            self.server.failures -= fails
        if fails:
            return self.send(self.server.status, {"error": "not now"})
        question = body["messages"][0]["content"]
        tokens = self.server.tokens
        if tokens is None:
            share = float(question)
            time.sleep(0.03 * share)  # later questions are answered first
            tokens = {" Yes": share / 2, "no": (1 - share) / 2, "Perhaps": 0.5}
        top = [{"token": t, "logprob": math.log(p)} for t, p in tokens.items()]
        content = [{"token": top[0]["token"], "logprob": 0.0, "top_logprobs": top}]
        self.send(200, self.server.reply or {"choices": [{"logprobs": {"content": content}}]})

    def send(self, status: int, reply: Any) -> None:
        data = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
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
        server.shutdown()
        thread.join()


def judge(server: Server, **options: Any) -> JudgeServer:
    pause = options.pop("pause", 0.001)
    return JudgeServer(config.Server(server=server.url, model="m", **options), pause=pause)


def test_the_probability_of_yes(server: Server) -> None:
    server.tokens = {"Yes": 0.3, " yes": 0.3, "NO": 0.2, "yes!": 0.1, "maybe": 0.1}
    asked = judge(server)
    assert asked.reward([("is it?", "")]) == pytest.approx([0.75])
    ((path, body, _),) = server.seen
    assert path == "/v1/chat/completions" and asked.unread == 0
    assert body == {
        "model": "m",
        "messages": [{"role": "user", "content": "is it?"}],
        **{"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 20},
    }
    assert asked.capabilities == {"reward"} and asked.num_parameters == 0
    assert asked.lengths([("a", ""), ("b", "")]) == [0, 0]


def test_answers_come_in_the_order_of_the_questions(server: Server) -> None:
    shares = [0.9 - 0.02 * i for i in range(40)]
    found = judge(server, concurrency=8).reward([(str(share), "") for share in shares])
    assert found == pytest.approx(shares)
    assert judge(server).reward([]) == []


def test_neither_yes_nor_no_is_a_half_and_counted(server: Server) -> None:
    server.tokens = {"Maybe": 0.9, "yesterday": 0.1}
    asked = judge(server)
    assert asked.reward([("a", ""), ("b", "")]) == [0.5, 0.5] and asked.unread == 2


@pytest.mark.parametrize("status", [503, 429])
def test_a_busy_server_is_asked_again(server: Server, status: int) -> None:
    server.failures, server.status = 2, status
    assert judge(server).reward([("0.25", "")]) == pytest.approx([0.25])
    assert len(server.seen) == 3


def test_it_gives_up_and_says_where(server: Server) -> None:
    server.failures = 100
    with pytest.raises(
        ConnectionError, match=rf"{server.url}/chat.* in 3 attempts: status 503: .*not"
    ):
        judge(server, attempts=3).reward([("0.5", "")])
    assert len(server.seen) == 3
    server.status = 401
    with pytest.raises(ConnectionError, match=r"/chat/completions refused .* status 401"):
        judge(server).reward([("0.5", "")])
    assert len(server.seen) == 4
    spec = config.Server(server="http://127.0.0.1:9", model="m", attempts=2)
    gone = JudgeServer(spec, pause=0.001)
    with pytest.raises(ConnectionError, match=r"127.0.0.1:9/chat.* in 2 attempts: ConnectError"):
        gone.reward([("0.5", "")])


def test_a_server_without_log_probabilities(server: Server) -> None:
    server.reply = {"choices": [{"message": {"content": "yes"}, "logprobs": None}]}
    with pytest.raises(ValueError, match=r"holds no log-probabilities .* must support logprobs"):
        judge(server).reward([("0.5", "")])


def test_the_question_is_the_user_turn(server: Server) -> None:
    with pytest.raises(ValueError, match="whole question in the user turn"):
        judge(server).reward([("0.5", ""), ("0.5", "so far")])
    assert server.seen == []


def test_the_key_is_sent_and_never_shown(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    plain = judge(server)
    plain.reward([("0.5", "")])
    monkeypatch.setenv("MY_KEY", "secret-1")
    keyed = judge(server, key="MY_KEY")
    keyed.reward([("0.5", "")])
    assert [key for _, _, key in server.seen] == [None, "Bearer secret-1"]
    assert "secret" not in repr(keyed) + str(vars(keyed)) and keyed.identity == plain.identity
    others = [
        JudgeServer(config.Server(server=address, model=name))
        for address, name in ((server.url, "n"), ("http://x/v1", "m"))
    ]
    assert len({plain.identity, *(other.identity for other in others)}) == 3


def test_a_suite_names_a_server(server: Server) -> None:
    spec = {"server": server.url, "model": "m"}
    loaded = models.load(spec)
    assert isinstance(loaded, JudgeServer) and loaded.identity == judge(server).identity
    assert models.load({**spec, "key": "MY_KEY"}).endpoint.key == "MY_KEY"
    assert models.capabilities(spec, {}) == {"reward"} and models.find(spec, {})[0] == "m"
    assert cell.fingerprint({**spec, "key": "MY_KEY"}) == [server.url, "m"]
    for bad, why in (
        ({"server": server.url}, "key 'model' is missing"),
        ({**spec, "modle": "m"}, "unknown key 'modle': did you mean 'model'"),
        ({**spec, "server": "host:80"}, "key 'server': string should match"),
    ):
        with pytest.raises(ValueError, match=why):
            models.capabilities(bad, {})


def test_an_experiment_takes_it() -> None:
    spec = {"server": "http://x/v1", "model": "m"}
    suite = {
        **{"name": "x", "student": "micro/student", "teacher": "micro/teacher"},
        **{"problems": ["micro_math"], "benchmarks": ["micro_math"], "methods": ["sft"]},
        **{"budget": {"steps": 1}, "models": {"judge": spec, "prm": "micro/prm"}},
    }
    assert config.parse(suite).models == {"judge": spec, "prm": "micro/prm"}
