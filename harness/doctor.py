"""What would go wrong with a suite, found without training anything."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import psutil
import torch

from harness import evaluation, models, problems, registry
from harness.compare import check, experiment, use_data
from harness.config import Experiment
from harness.models.hf import HFModel
from harness.types import LanguageModel, Problem
from harness.verifiers import sandbox

GIB = 2**30
SAMPLE = 200  # problems whose lengths are looked at


class Finding(NamedTuple):
    level: Literal["ok", "note", "problem"]
    subject: str
    text: str


def examine(suite: str, overrides: Sequence[str] = ()) -> list[Finding]:
    """All findings, in the order in which a run would meet them."""
    setting = experiment(suite, overrides)
    use_data(setting)
    try:
        check(setting, list(setting.methods))
    except ValueError as error:
        return [Finding("problem", "suite", str(error))]
    findings = [Finding("ok", "suite", f"{len(setting.methods)} arms, {setting.seeds} seeds")]
    checkpoints = problems.checkpoints()
    student = models.load(setting.student, checkpoints=checkpoints)
    assert isinstance(student, HFModel)
    teacher = models.load(setting.teacher, checkpoints=checkpoints, tokenizer_of=student)
    findings += _tokenizers(student, teacher)
    findings += _templates(student, teacher)
    findings += _lengths(setting, student)
    findings += _memory(setting, student, teacher)
    findings += _extras(setting)
    return findings


def _tokenizers(student: LanguageModel, teacher: LanguageModel) -> Iterator[Finding]:
    sizes = f"student {student.vocabulary} tokens, teacher {teacher.vocabulary}"
    if student.vocabulary_digest == teacher.vocabulary_digest:
        yield Finding("ok", "vocabulary", f"the same for both ({sizes})")
    else:
        yield Finding(
            "note", "vocabulary", f"differs ({sizes}): only methods that train on text will run"
        )
    if isinstance(student, HFModel) and isinstance(teacher, HFModel):
        ours, theirs = sorted(student.eos), sorted(teacher.eos)
        same = set(ours) & set(theirs)
        text = f"student {ours}, teacher {theirs}"
        if same:
            yield Finding("ok", "end tokens", text)
        else:
            yield Finding(
                "problem",
                "end tokens",
                text + ": a response that the teacher ends would not end for the student",
            )
    tags = [tag for tag in ("<think>", "</think>") if len(student.tokenize(tag, end=False)) != 1]
    if tags:
        yield Finding(
            "note", "thinking tags", f"{', '.join(tags)} are several tokens for the student"
        )
    else:
        yield Finding("ok", "thinking tags", "one token each")


def _templates(student: LanguageModel, teacher: LanguageModel) -> Iterator[Finding]:
    probe = "What is 2+3?"
    if "generate" not in teacher.capabilities or not isinstance(teacher, HFModel):
        return
    ours, theirs = student.encode(probe), teacher.encode(probe)
    if student.vocabulary_digest == teacher.vocabulary_digest and ours != theirs:
        yield Finding(
            "note",
            "chat template",
            "student and teacher render a prompt differently: KL compares them under the student's",
        )
    else:
        yield Finding("ok", "chat template", f"{len(ours)} tokens for a short question")
    if student.decode(ours).rstrip().endswith("<think>"):
        yield Finding(
            "note",
            "chat template",
            "it opens <think>: a response that never closes it counts as unparsed",
        )


def _lengths(setting: Experiment, student: HFModel) -> Iterator[Finding]:
    longest = getattr(student.model.config, "max_position_embeddings", None)
    sets: dict[str, list[Problem]] = {
        f"training on {name}": problems.load(name, "train", **{**options, "n": SAMPLE})
        for name, options in setting.problems.items()
    }
    sets |= {
        f"benchmark {name}": evaluation.problems_of(name)[:SAMPLE] for name in setting.benchmarks
    }
    for subject, found in sets.items():
        if not found:
            continue
        prompt = max(len(student.encode(problems.render(problem))) for problem in found)
        total = prompt + setting.sampling.max_new_tokens
        text = f"prompts up to {prompt} tokens, with the response {total}"
        if longest is not None and total > longest:
            yield Finding("problem", subject, f"{text}, beyond the student's {longest} positions")
        elif total > setting.training.max_length:
            yield Finding(
                "note",
                subject,
                f"{text}; examples beyond training.max_length = {setting.training.max_length} are dropped",
            )
        else:
            yield Finding("ok", subject, text)


def _memory(setting: Experiment, student: HFModel, teacher: LanguageModel) -> Iterator[Finding]:
    """Weights, gradients and two Adam moments of the student; the teacher's and the base's weights."""
    trained = student.num_parameters * (4 + 4 + 8)
    frozen = getattr(teacher, "num_parameters", 0) + student.num_parameters
    frozen *= 2 if torch.cuda.is_available() else 4
    need = (trained + frozen) * setting.workers
    if torch.cuda.is_available():
        room, where = torch.cuda.mem_get_info()[0], "GPU memory"
    else:
        room, where = psutil.virtual_memory().available, "memory"
    text = f"models and optimizer {need / GIB:.2f} GiB of {room / GIB:.1f} GiB {where}, activations apart"
    yield Finding(
        "problem" if need > room else "note" if need > 0.6 * room else "ok", "memory", text
    )


def _extras(setting: Experiment) -> Iterator[Finding]:
    code = [
        name
        for name in setting.benchmarks
        if any(problem.verifier == "code" for problem in evaluation.problems_of(name)[:1])
    ]
    if code:
        try:
            kinds = {sandbox.kind(evaluation.source_of(name)) for name in code}
        except ValueError as error:
            yield Finding("problem", "sandbox", str(error))
        else:
            text = "programs run in bubblewrap"
            if "fallback" in kinds:
                text = "programs run with namespaces and resource limits only: install bubblewrap for isolation"
            yield Finding("note" if "fallback" in kinds else "ok", "sandbox", text)
    if importlib.util.find_spec("vllm") is None and torch.cuda.is_available():
        yield Finding("note", "vllm", "not installed: sampling runs through Transformers")
    missing = [
        name
        for name in setting.methods
        if not registry.card(registry.get(setting.methods[name].get("method", name)))
    ]
    if missing:
        yield Finding("note", "cards", f"no card for {', '.join(missing)}")
