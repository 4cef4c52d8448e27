"""The micro teacher behind a real `vllm serve`, against the same checkpoint by Transformers.

RETORT_VLLM is the path of a Python that has vLLM; without it there is nothing to serve with.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import CHECKPOINTS
from benchmarks.speed.throughput import NAME, serving
from harness import config, models, problems
from harness.models.hf import HFModel
from harness.models.openai import ServerModel, Unfinished
from harness.types import Request, Sampling, Trace
from tests.benches import TINY, model

VLLM = os.environ.get("RETORT_VLLM")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not VLLM, reason="RETORT_VLLM names no Python with vLLM"),
]
GREEDY = Sampling(temperature=0.0, max_new_tokens=200)
TIE = 1e-3  # nats between hf's two likeliest tokens: either may come out likeliest
WAYS = [(api, tokens) for api in ("chat", "completions") for tokens in ("text", "ids")]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("vllm") / "serve.log"
    options = {"dtype": "float32", "max-logprobs": "20", "reasoning-parser": "qwen3"}
    with serving(CHECKPOINTS["micro/teacher"], log, **options) as address:
        yield address


@pytest.fixture(scope="module")
def hf() -> HFModel:
    return model("teacher").freeze()


def served(url: str, **options: Any) -> ServerModel:
    line = {"server": url, "model": NAME, "concurrency": 32, **options}
    found = models.load(line, tokenizer_of=model("student"), writes=True)
    assert isinstance(found, ServerModel)
    return found


def requests(n: int, **options: Any) -> list[Request]:
    found = problems.load("micro_math", "test", n=n, **options)
    return [Request(problems.render(problem), problem) for problem in found]


def flat(groups: Sequence[Sequence[Trace]]) -> list[Trace]:
    return [trace for group in groups for trace in group]


@torch.no_grad()
def gap(hf: HFModel, ours: Trace, theirs: Trace, prompt: tuple[int, ...]) -> float:
    """hf's log-probability of its token over the other's, where two greedy responses part."""
    pairs = zip((*ours.tokens, -1), (*theirs.tokens, -1), strict=False)
    place = next(i for i, (a, b) in enumerate(pairs) if a != b)
    ids = torch.tensor([[*prompt, *ours.tokens[:place]]])
    logits = hf.model(input_ids=ids).logits[0, -1, : hf.vocabulary]
    return float(logits[ours.tokens[place]] - logits[theirs.tokens[place]])


def ties(hf: HFModel, ours: Sequence[Trace], theirs: Sequence[Trace]) -> int:
    """How many of the greedy responses differ; each must part at a tie."""
    gaps = [
        gap(hf, a, b, Request(problems.render(a.problem), a.problem).encoded(hf))
        for a, b in zip(ours, theirs, strict=True)
        if a.tokens != b.tokens
    ]
    assert all(0 <= g < TIE for g in gaps), gaps
    assert all(a.text == b.text and a.finished == b.finished for a, b in zip(ours, theirs, strict=True) if a.tokens == b.tokens)  # fmt: skip
    return len(gaps)


@pytest.fixture(scope="module")
def greedy(hf: HFModel) -> list[Trace]:
    return flat(hf.generate(requests(500), GREEDY))


@pytest.mark.parametrize(("api", "tokens"), WAYS)
def test_greedy_outputs_are_those_of_transformers(
    url: str, hf: HFModel, greedy: list[Trace], api: str, tokens: str
) -> None:
    found = flat(served(url, api=api, tokens=tokens).generate(requests(500), GREEDY))
    differ = ties(hf, greedy, found)
    print(f"{api} {tokens}: {differ} of 500 greedy responses part, each at a tie")
    assert differ <= 5
    assert all(t.usage == (len(hf.encode(problems.render(t.problem))), len(t.tokens)) for t in found)  # fmt: skip


@pytest.mark.parametrize("api", ["chat", "completions"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_log_probabilities_are_those_of_transformers(
    url: str, hf: HFModel, api: str, temperature: float
) -> None:
    sampling = Sampling(temperature=temperature, max_new_tokens=200)
    found = flat(served(url, api=api, tokens="ids").generate(requests(200), sampling))
    scores = hf.score([(hf.encode(problems.render(t.problem)), t.tokens) for t in found])
    off = [
        abs(a - b)
        for trace, score in zip(found, scores, strict=True)
        for a, b in zip(trace.logprobs or (), score.logprobs, strict=True)
    ]
    print(f"{api}, temperature {temperature}: {len(off)} log-probabilities, at most {max(off):.2g} off")  # fmt: skip
    assert len(off) > 2000 and max(off) < 1e-3


@pytest.mark.parametrize(
    "options", [{"api": "completions"}, {"api": "completions", "tokens": "ids"}, {"prefix": "continue", "tokens": "ids"}]
)  # fmt: skip
def test_begun_answers_go_on_as_transformers_goes_on(
    url: str, hf: HFModel, greedy: list[Trace], options: dict[str, Any]
) -> None:
    newline = hf.tokenize("\n", end=False)[0]
    begun = []
    for trace in greedy[:60]:
        ends = [i + 1 for i, token in enumerate(trace.tokens) if token == newline]
        prefix = trace.tokens[: ends[len(ends) // 2]]
        begun.append(Request(problems.render(trace.problem), trace.problem, prefix))
    ours = flat(hf.generate(begun, GREEDY))
    found = flat(served(url, **options).generate(begun, GREEDY))
    assert ties(hf, ours, found) <= 2
    assert all(t.prefix == len(r.prefix) > 1 for t, r in zip(found, begun, strict=True))
    if "prefix" in options:  # this server takes reasoning apart
        with pytest.raises(Unfinished, match="nobody can say where its think ended"):
            served(url, prefix="continue").generate(begun, GREEDY)


@pytest.mark.parametrize("tokens", ["text", "ids"])
def test_stop_strings_and_limits_are_those_of_transformers(
    url: str, hf: HFModel, tokens: str
) -> None:
    server = served(url, api="completions", tokens=tokens)
    for sampling in (
        Sampling(temperature=0.0, max_new_tokens=200, stop=("\n</think>", "zzz")),
        Sampling(temperature=0.0, max_new_tokens=11),
    ):
        ours = flat(hf.generate(requests(100), sampling))
        assert ties(hf, ours, flat(server.generate(requests(100), sampling))) <= 2
        ends = {trace.finished for trace in ours}
        assert (True in ends) if sampling.stop else (False in ends)


def test_seeds(url: str) -> None:
    server = served(url)
    few, many, other = (
        server.generate(requests(20, levels=[6, 7]), Sampling(n=n, max_new_tokens=200, seed=seed))
        for n, seed in ((2, 0), (4, 0), (4, 1))
    )
    texts = [[trace.text for trace in group] for group in many]
    same = sum(a.text == b for g, h in zip(few, texts, strict=True) for a, b in zip(g, h, strict=False))  # fmt: skip
    assert same >= 38  # batches move logits by 1e-6, which may turn a sample
    assert sum(len(set(group)) > 1 for group in texts) >= 10
    assert [[t.text for t in group] for group in other] != texts


def test_accuracy_is_within_the_noise_of_transformers_itself(url: str, hf: HFModel) -> None:
    """Two draws of hf differ by a noise that they measure; the server's draw differs from either by no more."""
    asked, sampling = requests(250), {"n": 2, "temperature": 1.0, "max_new_tokens": 200}
    draws = {
        "hf": hf.generate(asked, Sampling(**sampling, seed=0)),
        "hf again": hf.generate(asked, Sampling(**sampling, seed=1)),
        "server": served(url).generate(asked, Sampling(**sampling, seed=0)),
    }
    from harness.verifiers import verify_many

    rates = {}
    for name, groups in draws.items():
        verdicts = verify_many([(t.problem, t.text, t.finished) for t in flat(groups)])
        rates[name] = np.array([v.correct for v in verdicts]).reshape(len(asked), -1).mean(axis=1)
    noise = float(np.std(rates["hf"] - rates["hf again"], ddof=1)) / len(asked) ** 0.5
    apart = [float(np.mean(rates["server"] - rates[name])) for name in ("hf", "hf again")]
    print({name: round(float(rate.mean()), 4) for name, rate in rates.items()}, f"A/A standard error {noise:.4f}")  # fmt: skip
    assert 0.1 < rates["hf"].mean() < 0.99 and 0 < noise < 0.03
    assert all(abs(difference) < 3 * noise for difference in apart)


def test_refusals_of_a_real_server(url: str) -> None:
    with pytest.raises(Unfinished, match=r"status 404: .*'nope' was asked for, and the server has served"):  # fmt: skip
        served(url, model="nope").generate(requests(1), GREEDY)
    with pytest.raises(Unfinished, match=r"do not fit: lower it, or start the server with more"):
        served(url).generate(requests(1), Sampling(max_new_tokens=4000))


def test_a_comparison_with_the_teacher_behind_a_server(url: str, tmp_path: Path) -> None:
    from harness.compare import compare

    line = {"server": url, "model": NAME, "api": "completions", "tokens": "ids", "price": {"input": 1, "output": 2}}  # fmt: skip
    setting = config.parse(
        {
            **{"name": "served", "student": "micro/student", "teacher": line, "seeds": 1},
            **{"problems": {"micro_math": {"n": 24, "levels": [2, 3], "families": ["reduce"]}}},
            **{"benchmarks": {"micro_math": {"limit": 20}}, "threads": 1},
            **{"methods": {"sft": TINY["sft"], "limo": TINY["limo"]}},
            **{"budget": {"steps": 4}, "training": {"batch_size": 8}},
            **{"sampling": {"max_new_tokens": 120}},
        }
    )
    found = compare(setting, results=tmp_path, quiet=True, track=False)
    arms = {row["method"]: row["ledger"]["charged"] for row in found["arms"]}
    assert set(arms) == {"base", "sft", "limo"} and (tmp_path / "served/summary.json").is_file()
    for label in ("sft", "limo"):
        read, written = arms[label]["teacher_read"], arms[label]["teacher_generated"]
        assert read > 0 and written > 1000
        assert arms[label]["cost"] == pytest.approx((read + 2 * written) / 1e6)
