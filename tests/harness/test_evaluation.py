"""The lm-eval driver: what is asked, what is recorded, and what survives a kill."""

from __future__ import annotations

import gzip
import json
import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from harness import evaluation, problems, verifiers
from harness.evaluation import evaluate, protocol, read_records, write_records
from harness.models.scripted import Reply, Scripted
from harness.store import Store
from harness.types import Ids, Problem, Request, Sampling, Scores, Trace
from harness.verifiers import sandbox

ROOT = Path(__file__).parents[2]
SAMPLED = {"n": 3, "temperature": 1.0, "limit": 6}


def solve(request: Request, sample: int) -> str:
    """Sample 0 is right, 1 is wrong, 2 never closes its think."""
    answer = request.problem.answer
    return [f"<think>\nx\n</think>\n{answer}", "<think>\nx\n</think>\n-1", f"<think>\n{answer}"][
        sample % 3
    ]


class Counting(Scripted):
    """Keeps what it was asked."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.asked: list[tuple[Sequence[Request], Sampling]] = []

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Trace]]:
        self.asked.append((requests, sampling))
        return super().generate(requests, sampling)


# Records


def test_a_record_for_each_problem_and_sample() -> None:
    model = Counting(solve)
    records = evaluate(model, {"micro_math": SAMPLED}, seed=5)["micro_math"]
    expected = problems.load("micro_math", "test", 6)
    assert [(r["problem"], r["sample"]) for r in records] == [
        (p.id, i) for p in expected for i in range(3)
    ]
    assert [r["status"] for r in records] == ["ok", "wrong", "unparsed"] * 6
    assert [r["correct"] for r in records] == [True, False, False] * 6
    first = records[0]
    assert first["extracted"] == expected[0].answer and first["text"].startswith("<think>")
    assert (first["level"], first["domain"], first["sampling_seed"]) == (
        expected[0].level,
        "math",
        5,
    )
    assert first["prompt"] == expected[0].prompt and first["gold"] == expected[0].answer
    assert first["tokens"] == len(model.tokenize(first["text"])) and not first["truncated"]
    ((requests, sampling),) = model.asked
    assert sampling == Sampling(n=3, temperature=1.0, max_new_tokens=128, seed=5)
    assert [(r.prompt, r.problem, r.prefix) for r in requests] == [
        (problems.render(p), p, ()) for p in expected
    ]


def test_settings_reach_the_model() -> None:
    model = Counting(solve)
    given = {
        "n": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "max_new_tokens": 9,
        "limit": 8,
        "levels": [2],
        "split": "dev",
    }
    records = evaluate(model, {"micro_math": given}, limit=4)["micro_math"]
    ((requests, sampling),) = model.asked
    assert sampling == Sampling(2, 0.5, 0.9, 7, 9)
    dev = problems.load("micro_math", "dev", 4, levels=[2])
    assert [r.problem for r in requests] == dev and len(records) == 8


def test_several_benchmarks_and_config_objects() -> None:
    from harness.config import Benchmark

    def answer(request: Request, sample: int) -> str:
        return request.problem.solution or ""

    wanted = {
        "micro_code": Benchmark(limit=4, max_new_tokens=999),
        "micro_math": Benchmark(limit=5, n=2, temperature=1.0),
    }
    found = evaluate(Counting(answer), wanted)
    assert {name: len(records) for name, records in found.items()} == {
        "micro_code": 4,
        "micro_math": 10,
    }
    assert all(r["correct"] for records in found.values() for r in records)
    assert {r["domain"] for r in found["micro_code"]} == {"code"}


def use_sums(folder: Path, monkeypatch: pytest.MonkeyPatch, first: str = "0 + 0?") -> None:
    """Five sums in place of GSM8K."""
    questions = [first, *(f"{i} + {i}?" for i in range(1, 5))]
    rows = [{"question": q, "answer": f"x\n#### {2 * i}"} for i, q in enumerate(questions)]
    (folder / "gsm8k").mkdir(parents=True)
    text = "\n".join(map(json.dumps, rows))
    (folder / "gsm8k/test.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    monkeypatch.setenv("RETORT_DATA", str(folder))


def test_real_problems_through_a_data_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_sums(tmp_path, monkeypatch)
    model = Counting(lambda request, i: rf"It is \boxed{{{request.problem.answer}.0}}.")
    records = evaluate(model, {"gsm8k": {}})["gsm8k"]
    assert [r["status"] for r in records] == ["ok"] * 5
    assert [(r["second"], r["gold"]) for r in records] == [("ok", str(2 * i)) for i in range(5)]
    ((requests, sampling),) = model.asked
    assert requests[0].prompt.endswith(r"within \boxed{}.") and sampling.max_new_tokens == 2048
    assert evaluation.problems_of("gsm8k")[4].answer == "8"


def test_truncation_is_recorded() -> None:
    model = Scripted(
        lambda request, i: Reply(f"<think>a</think>{request.problem.answer}", finished=False)
    )
    records = evaluate(model, {"micro_math": {"limit": 2}})["micro_math"]
    assert [(r["truncated"], r["status"]) for r in records] == [(True, "unparsed")] * 2


def test_a_template_that_opens_the_think_counts() -> None:
    class Opening(Scripted):
        def encode(self, prompt: str) -> Ids:
            return super().encode(prompt + "<think>\n")

    never = Opening(lambda request, i: str(request.problem.answer))
    closed = Opening(lambda request, i: f"x</think>{request.problem.answer}")
    assert evaluate(never, {"micro_math": {"limit": 2}})["micro_math"][0]["status"] == "unparsed"
    assert evaluate(closed, {"micro_math": {"limit": 2}})["micro_math"][0]["status"] == "ok"


def test_equal_texts_of_different_problems_are_judged_apart() -> None:
    records = evaluate(Scripted(lambda request, i: "7"), {"micro_math": {"limit": 200}})[
        "micro_math"
    ]
    answers = {p.id: p.answer for p in problems.load("micro_math", "test", 200)}
    assert [r["correct"] for r in records] == [answers[r["problem"]] == "7" for r in records]
    assert any(r["correct"] for r in records)


def test_answers_are_judged_once_and_in_bulk(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    many = verifiers.verify_many
    monkeypatch.setattr(
        verifiers, "verify_many", lambda items, **k: calls.append(len(items)) or many(items, **k)
    )
    evaluate(Scripted(solve), {"micro_math": SAMPLED})
    assert calls == [18]


# Mistakes


@pytest.mark.parametrize(
    ("benchmarks", "message"),
    [
        ({"micro_math": {"temprature": 1}}, "unknown key 'temprature': did you mean 'temperature'"),
        ({"micro_math": {"n": 4}}, "n = 4 greedy samples are equal"),
        ({"micro_math": {"levels": [99]}}, "no level"),
        ({"micro_math": {"options": {"families": ["x"]}}}, "no family 'x'"),
        ({"micro_math": {"options": {"levels": [1]}}}, "levels is a key of its own"),
    ],
)
def test_bad_settings(benchmarks: dict[str, Any], message: str) -> None:
    model = Counting(solve)
    with pytest.raises(ValueError, match=message):
        evaluate(model, benchmarks)
    assert not model.asked


def test_unknown_benchmarks_name_the_nearest(other_tasks: None) -> None:
    model = Counting(solve)
    with pytest.raises(
        ValueError,
        match=r"unknown benchmark 'micro_maths': did you mean 'micro_math'\? known: .*micro_math",
    ):
        evaluate(model, {"micro_math": {}, "micro_maths": {}})
    with pytest.raises(ValueError, match="did you mean 'colours'"):
        evaluation.check("colour")
    assert not model.asked


# The store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_a_second_evaluation_asks_nothing(store: Store) -> None:
    model = Counting(solve)
    first = evaluate(model, {"micro_math": SAMPLED}, cache=store)
    assert evaluate(model, {"micro_math": SAMPLED}, cache=store) == first and len(model.asked) == 1
    fewer = evaluate(model, {"micro_math": {**SAMPLED, "n": 2}}, cache=store)["micro_math"]
    assert fewer == [r for r in first["micro_math"] if r["sample"] < 2] and len(model.asked) == 1
    evaluate(model, {"micro_math": SAMPLED}, cache=store, seed=1)
    evaluate(model, {"micro_math": {**SAMPLED, "temperature": 0.9}}, cache=store)
    evaluate(Counting(solve, name="other"), {"micro_math": SAMPLED}, cache=store)
    assert len(model.asked) == 3


def test_a_killed_evaluation_goes_on(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "CHUNK", 4)
    whole = evaluate(Counting(solve), {"micro_math": {"limit": 12}})

    class Dying(Counting):
        def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Trace]]:
            if len(self.asked) == 2:
                raise KeyboardInterrupt
            return super().generate(requests, sampling)

    with pytest.raises(KeyboardInterrupt):
        evaluate(Dying(solve), {"micro_math": {"limit": 12}}, cache=store)
    model = Counting(solve)
    assert evaluate(model, {"micro_math": {"limit": 12}}, cache=store) == whole
    assert [len(requests) for requests, _ in model.asked] == [4]


def test_a_network_resumes_bit_for_bit_and_a_larger_n_adds(store: Store) -> None:
    from tests.tiny import tiny_model

    model = tiny_model()
    settings = {"n": 4, "temperature": 1.0, "limit": 5, "max_new_tokens": 6}
    fresh = evaluate(model, {"micro_math": settings})
    first = evaluate(model, {"micro_math": {**settings, "n": 2}}, cache=store)["micro_math"]
    blocks, write = [], model.generate_block
    model.generate_block = lambda block: blocks.append(block) or write(block)  # type: ignore[method-assign]
    assert evaluate(model, {"micro_math": settings}, cache=store) == fresh
    assert first == [r for r in fresh["micro_math"] if r["sample"] < 2]
    assert blocks and all(block.samples.start >= 2 for block in blocks)


def test_progress_counts_samples(store: Store) -> None:
    events: list[tuple[str, int, int]] = []
    evaluate(
        Scripted(solve), {"micro_math": SAMPLED}, progress=lambda *e: events.append(e), cache=store
    )
    assert events == [
        ("answers", 0, 18),
        ("answers", 18, 18),
        ("verdicts", 0, 18),
        ("verdicts", 18, 18),
    ]


# Tasks of others

YAML = """
task: {name}
custom_dataset: !function parts.documents
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: {target}
{more}
"""
PARTS = """
import datasets

def documents(**_):
    rows = [{"question": "Grass is", "choices": ["green", "red"], "gold": 0, "answer": "green"},
            {"question": "Blood is", "choices": ["green", "red"], "gold": 1, "answer": "red"},
            {"question": "Snow is", "choices": ["green", "red"], "gold": 0, "answer": "white"}]
    return {"test": datasets.Dataset.from_list(rows)}

def missing(**_):
    raise ConnectionError("no such data")
"""


@pytest.fixture
def other_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few tasks in place of lm-eval's fourteen thousand."""
    from lm_eval.tasks import TaskManager

    folder = tmp_path / "others"
    folder.mkdir()
    (folder / "parts.py").write_text(PARTS)
    acc = "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]"
    match = "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]"
    stop = 'generation_kwargs: {until: ["\\n"], max_gen_toks: 12}'
    shape = {
        "colours": ("multiple_choice", "gold", 'doc_to_choice: "{{choices}}"\n' + acc),
        "write": ("generate_until", '"{{answer}}"', f"{match}\n{stop}"),
        "unsafe": ("generate_until", '"{{answer}}"', f"{match}\n{stop}\nunsafe_code: true"),
        "greedy": ("loglikelihood", '"{{answer}}"', acc),
        "surprise": ("loglikelihood_rolling", '"{{question}}"', "metric_list: [{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]"),
    }  # fmt: skip
    for name, (kind, target, more) in shape.items():
        text = YAML.format(name=name, kind=kind, target=target, more=more)
        (folder / f"{name}.yaml").write_text(text)
    broken = (folder / "colours.yaml").read_text().replace("colours", "broken")
    (folder / "broken.yaml").write_text(broken.replace("parts.documents", "parts.missing"))
    (folder / "both.yaml").write_text("group: both\ntask: [colours, write]\n")
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    monkeypatch.setattr(evaluation, "_other_tasks", lambda: manager)


def prefer_green(prompt: Ids, response: Ids) -> Scores:
    text = bytes(i for i in response if i < 256).decode()
    return Scores((-1.0 if "green" in text else -2.0,), (0.0,))


def test_multiple_choice_tasks(other_tasks: None) -> None:
    model = Scripted({}, capabilities=("generate", "score"), scores=prefer_green)
    records = evaluate(model, {"colours": {}})["colours"]
    assert [r["correct"] for r in records] == [True, False, True]
    assert [r["problem"] for r in records] == ["colours/0", "colours/1", "colours/2"]
    assert len(evaluate(model, {"colours": {"limit": 2}})["colours"]) == 2
    assert evaluation.problems_of("colours") == []


def test_generation_tasks_and_groups(other_tasks: None) -> None:
    model = Counting(
        lambda request, i: "green", capabilities=("generate", "score"), scores=prefer_green
    )
    found = evaluate(model, {"both": {}, "micro_math": {"limit": 2}})
    assert [(r["problem"], r["correct"]) for r in found["both"]] == [
        ("colours/0", True), ("colours/1", False), ("colours/2", True),
        ("write/0", True), ("write/1", False), ("write/2", False),
    ]  # fmt: skip
    assert [r["text"] for r in found["both"][3:]] == ["green"] * 3 and len(found["micro_math"]) == 2
    assert found["both"][3]["prompt"] == "Grass is"
    requests, sampling = model.asked[0]
    assert requests[0].prompt == "Grass is" and (sampling.stop, sampling.max_new_tokens) == (
        ("\n",),
        12,
    )


@pytest.mark.parametrize(
    ("benchmarks", "message"),
    [
        ({"unsafe": {}}, "without isolation"),
        ({"greedy": {}}, "greedy one, which scores do not tell"),
        ({"surprise": {}}, "word_perplexity, none of which is an accuracy"),
        ({"colours": {"n": 2, "temperature": 1.0}}, "knows no n"),
        ({"broken": {}}, "'broken': lm-eval cannot load it: no such data"),
    ],
)
def test_tasks_that_cannot_be_scored_here(
    other_tasks: None, benchmarks: dict[str, Any], message: str
) -> None:
    model = Scripted({}, capabilities=("generate", "score"), scores=prefer_green)
    with pytest.raises(ValueError, match=message):
        evaluate(model, benchmarks)


def test_likelihoods_against_the_network() -> None:
    from tests.tiny import tiny_model

    model = tiny_model()
    prompt, response = evaluation._pair(model, "one two ", "three")
    assert model.decode(prompt) == "one two" and model.decode(response) == " three"
    assert evaluation._pair(model, "", "three") == (
        model.tokenize(""),
        model.tokenize("three", end=False),
    )
    lm = evaluation._adapter()(model, {}, {}, 0, lambda *e: None, None)

    class Asked:
        def __init__(self, *args: str) -> None:
            self.args = args

    (total, _), (again, _) = lm.loglikelihood(
        [Asked("one two ", "three"), Asked("one two", " three")]
    )
    assert total == again == pytest.approx(math.fsum(model.score([(prompt, response)])[0].logprobs))
    (whole,) = lm.loglikelihood_rolling([Asked("one two three")])
    parts = model.score([(model.tokenize(""), model.tokenize("one two three", end=False))])[0]
    assert whole == pytest.approx(math.fsum(parts.logprobs))


# By itself, and beside other things


def test_plain_lm_eval_runs_the_tasks(tmp_path: Path) -> None:
    """The YAML files serve without the driver, judged on the spot."""
    from lm_eval import evaluator
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    class Plain(LM):
        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            return [request.doc["solution"] for request in requests]

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any: ...
        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> Any: ...

    manager = TaskManager(include_path=str(ROOT / "benchmarks/tasks"), include_defaults=False)
    assert {"micro_math", "micro_code", "gsm8k", "math500", "aime24"} <= set(manager.all_tasks)
    with evaluation._quiet():
        result = evaluator.simple_evaluate(
            Plain(), tasks=["micro_math", "micro_code"], limit=3, task_manager=manager,
            bootstrap_iters=0, confirm_run_unsafe_code=True,
        )  # fmt: skip
    for name in ("micro_math", "micro_code"):
        assert result["results"][name]["accuracy,samples"] == 1.0
        assert result["results"][name]["unparsed,samples"] == 0.0


def test_lm_eval_is_silent_and_leaves_things_as_they_were(
    capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    import random

    state, level = random.getstate(), logging.getLogger("lm_eval").level
    evaluate(Scripted(solve), {"micro_math": {"limit": 2}})
    assert capfd.readouterr() == ("", "")
    assert random.getstate() == state and logging.getLogger("lm_eval").level == level
    assert not [w for w in recwarn if "lm_eval" in str(w.filename)]


def test_the_overhead_is_small() -> None:
    evaluate(Scripted(solve), {"micro_math": {}})
    start = time.monotonic()
    assert len(evaluate(Scripted(solve), {"micro_math": {}})["micro_math"]) == 1000
    assert time.monotonic() - start < 8  # 0.7 s on a free core


def test_importing_the_driver_loads_no_lm_eval() -> None:
    code = "import sys, harness.evaluation; assert not {'lm_eval', 'torch', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# Files


def test_records_survive_a_file(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    records = evaluate(Scripted(solve), {"micro_math": SAMPLED})["micro_math"]
    for record in records:
        record |= {"method": "sft", "seed": 3}
    path = tmp_path / "deep" / "a.parquet"
    write_records(path, records, {"key": "k"})
    assert read_records(path) == records
    assert pq.read_schema(path).metadata[b"key"] == b"k"
    write_records(path, [])
    assert read_records(path) == []
    assert os.listdir(path.parent) == ["a.parquet"]


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.parquet"
    record = evaluate(Scripted(solve), {"micro_math": {"limit": 1}})["micro_math"][0]
    write_records(path, [record])

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_records(path, [record, record])
    assert read_records(path) == [record] and os.listdir(tmp_path) == ["a.parquet"]


# The protocol


def test_the_protocol_hash_follows_what_decides_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    def hashed(settings: dict[str, Any] | None = None, model: Any = None) -> str:
        return str(protocol({"micro_math": settings or {}}, model)["hash"])

    base = hashed()
    assert hashed() == base == hashed({"n": 1, "levels": None})
    assert hashed({"temperature": 0.5}) != base
    assert hashed({"max_new_tokens": 64}) != base
    assert hashed({"options": {"families": ["solve"]}}) != base == hashed({"options": {}})
    assert hashed({"bands": {"low": [1]}}) == base  # another way to read the same answers
    assert hashed(model=Scripted(solve)) != base
    assert hashed(model=Scripted(solve)) == hashed(
        model=Scripted({})
    )  # the weights are no part of it
    assert hashed(model="some/model") == base
    with monkeypatch.context() as patch:
        patch.setattr(verifiers, "READING", "of another day")
        assert hashed() != base
    with monkeypatch.context() as patch:
        patch.setitem(problems.TEMPLATES, "bare", "{prompt} ")
        assert hashed() != base
    with monkeypatch.context() as patch:
        patch.setattr(type(problems.find("micro_math")), "revision", "other")
        assert hashed() != base
    with monkeypatch.context() as patch:
        patch.setattr(sandbox, "kind", lambda source: "elsewhere")
        assert protocol({"micro_code": {}})["benchmarks"]["micro_code"]["sandbox"] == "elsewhere"
        assert hashed() == base  # no program runs there
    assert json.dumps(protocol({"micro_math": {}}))


@pytest.mark.parametrize(
    ("target", "name", "value"),
    [
        (verifiers, "READING", "other"),
        (verifiers.second, "VERSION", "other"),
        (verifiers.math, "SECONDS", 3.0),
        (verifiers.math, "MEMORY", 1 << 20),
        (verifiers.code, "LIMITS", {"seconds": 1.0}),
        (problems, "TEMPLATES", {**problems.TEMPLATES, "math": "{prompt} Answer:"}),
        (evaluation.metadata, "version", lambda name: "0"),
    ],
)
def test_the_protocol_of_mathematics_follows_every_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: Any, name: str, value: Any
) -> None:
    use_sums(tmp_path, monkeypatch)
    before = protocol({"gsm8k": {}})["hash"]
    monkeypatch.setattr(target, name, value)
    assert protocol({"gsm8k": {}})["hash"] != before


@pytest.mark.parametrize(
    "package",
    ["lm-eval", "math-verify", "sympy", "latex2sympy2_extended", "torch", "transformers"],
)
def test_the_protocol_follows_the_versions(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    before, version = protocol({"micro_math": {}})["hash"], evaluation.metadata.version
    monkeypatch.setattr(
        evaluation.metadata, "version", lambda name: "0" if name == package else version(name)
    )
    assert protocol({"micro_math": {}})["hash"] != before


@pytest.mark.parametrize("key", ["max_gen_toks", "until"])
def test_the_protocol_follows_what_the_task_says(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    before = protocol({"micro_math": {}})["hash"]
    monkeypatch.setitem(evaluation.own()["micro_math"]["generation_kwargs"], key, "other")
    assert protocol({"micro_math": {}})["hash"] != before


def test_the_protocol_follows_the_data_and_all_of_the_sampling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_sums(tmp_path / "a", monkeypatch)
    first = protocol({"gsm8k": {}})["hash"]
    drawn = {"n": 2, "temperature": 0.5}
    others = [
        drawn, {**drawn, "n": 4}, {**drawn, "top_p": 0.9}, {**drawn, "top_k": 4},
        {"limit": 2}, {"split": "train"}, {"levels": [1]}, {"max_new_tokens": 7},
    ]  # fmt: skip
    hashes = {protocol({"gsm8k": settings})["hash"] for settings in others}
    assert len(hashes | {first}) == len(others) + 1
    use_sums(tmp_path / "b", monkeypatch)
    assert protocol({"gsm8k": {}})["hash"] == first  # the same rows in another place
    use_sums(tmp_path / "c", monkeypatch, first="another question")
    assert protocol({"gsm8k": {}})["hash"] != first


def test_the_protocol_knows_the_precision() -> None:
    import torch

    from tests.tiny import tiny_model

    model = tiny_model()
    single = protocol({"micro_math": {}}, model)
    assert single["engine"]["dtype"] == "float32"
    assert single["hash"] == protocol({"micro_math": {}})["hash"]
    model.model.to(torch.bfloat16)
    assert protocol({"micro_math": {}}, model)["hash"] != single["hash"]


def test_how_a_benchmark_is_sampled() -> None:
    said = protocol(
        {"micro_math": {"n": 2, "temperature": 0.5}, "micro_code": {"max_new_tokens": 9}}
    )
    found = {name: evaluation.decoding(one) for name, one in said["benchmarks"].items()}
    one = {"n": 2, "temperature": 0.5, "top_p": 1.0, "top_k": 0, "max_tokens": 128}
    assert found["micro_math"] == one
    assert found["micro_code"] == {**one, "n": 1, "temperature": 0.0, "max_tokens": 9}
    assert evaluation.several("micro_math", {"n": 2, "limit": None}) == {"n": 2, "temperature": 0.6}
    assert evaluation.several("aime24", {"n": 2}) == {"n": 2}  # the task samples already
    assert evaluation.several("micro_math", {"n": 2, "temperature": 1.0})["temperature"] == 1.0
    assert evaluation.several("micro_math", {"n": None}) == {}


def test_the_protocol_of_a_task_of_others(other_tasks: None) -> None:
    assert evaluation.protocol_of("colours")["task"] == "lm-eval colours"


def test_problems_of_a_benchmark() -> None:
    found = evaluation.problems_of("micro_math", limit=3, split="dev")
    assert found == problems.load("micro_math", "dev", 3) and isinstance(found[0], Problem)
    solve_only = evaluation.problems_of(
        "micro_math", limit=4, levels=[1, 2], options={"families": ["solve"]}
    )
    assert all("x" in problem.prompt for problem in solve_only) and len(solve_only) == 4
    assert {problem.level for problem in solve_only} == {1, 2}
