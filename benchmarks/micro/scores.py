"""How good the micro models are.

Accuracy by family and level, with and without hints, and where derivations first go wrong; for the process reward model, how
well it tells right steps from wrong ones, and how well its probabilities are calibrated.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.micro import CODE, MATH
from benchmarks.micro.code import INPUTS, Value, after, pipeline, run
from benchmarks.micro.problems import MICRO_VERSION, MicroSet, family_of
from harness.mechanisms import auc
from harness.models.hf import HFModel
from harness.models.reward import RewardHF
from harness.problems import render
from harness.types import Problem, Request, Sampling, Split, Trace
from harness.verifiers import verify_many

MAX_NEW_TOKENS = 128
BATCH = 256
BINS = 10  # of the expected calibration error
MODES = {"greedy": (False, 0.0), "T=0.7": (False, 0.7), "hint T=0.7": (True, 0.7)}


@torch.inference_mode()
def write(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerFast,
    turns: Sequence[str],
    temperature: float,
    seed: int = 0,
    label: str = "sampling",
) -> list[str]:
    """One response to each user turn; temperature 0 is greedy."""
    torch.manual_seed(seed)
    prompts = [
        tok.apply_chat_template(
            [{"role": "user", "content": turn}], add_generation_prompt=True, tokenize=False
        )
        for turn in turns
    ]
    by_length = sorted(range(len(turns)), key=lambda i: len(prompts[i]))
    chunks = [by_length[i : i + BATCH] for i in range(0, len(turns), BATCH)]
    choice = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}  # fmt: skip
    texts = [""] * len(turns)
    for chunk in track(chunks, label):
        batch = tok([prompts[i] for i in chunk], return_tensors="pt", padding=True)
        out = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=MAX_NEW_TOKENS,
            **choice,
        )
        new = out[:, batch["input_ids"].shape[1] :]
        for i, text in zip(chunk, tok.batch_decode(new, skip_special_tokens=True), strict=True):
            texts[i] = text
    return texts


def correct(problem: Problem, text: str) -> bool:
    """Whether what follows the think is right; programs run line by line in the micro interpreter."""
    _, closed, conclusion = text.rpartition("</think>")
    if not closed:
        return False
    if problem.domain != "code":
        return conclusion.strip() == problem.answer
    block = re.fullmatch(r"\s*```python\ndef f\(xs\):\n((?: {4}.*\n)+)```\s*", conclusion)
    lines = block[1].splitlines() if block else []
    if not lines or lines[-1] != "    return xs":
        return False
    return [_execute(lines[:-1], value) for value in INPUTS] == after(
        pipeline(problem.prompt), list(INPUTS)
    )


def _execute(lines: Sequence[str], value: Value | None) -> Value | None:
    for line in lines:
        value = None if value is None else run(line.strip(), value)
    return value


def score(problems: MicroSet, texts: Mapping[Problem, str]) -> dict[str, Any]:
    """Accuracy, share of right answers whose every step is valid, and first errors of wrong ones by position."""
    oracle = problems.oracle
    assert oracle is not None
    right = [p for p, text in texts.items() if correct(p, text)]
    sound = sum(oracle.first_invalid(p, texts[p]) is None for p in right)
    errors = Counter(
        "none" if (first := oracle.first_invalid(p, text)) is None else str(first + 1)
        for p, text in texts.items()
        if p not in set(right)
    )
    return {
        "n": len(texts),
        "accuracy": len(right) / len(texts),
        "sound": sound / len(right) if right else None,
        "first_error": dict(sorted(errors.items())),
    }


def measure(
    model: PreTrainedModel, tok: PreTrainedTokenizerFast, num_problems: int, label: str
) -> dict[str, dict[str, Any]]:
    """Scores by `family level`, then by mode, on test problems."""
    table: dict[str, dict[str, Any]] = {}
    for problems in (MATH, CODE):
        chosen = [
            problem
            for family, levels in problems.levels.items()
            for level in levels
            for problem in problems.load("test", num_problems, families=(family,), levels=(level,))
        ]
        for mode, (hint, temperature) in MODES.items():
            turns = [render(p, p.answer if hint else None) for p in chosen]
            texts = write(model, tok, turns, temperature, label=f"{label} {problems.name} {mode}")
            cells: dict[str, dict[Problem, str]] = {}
            for problem, text in zip(chosen, texts, strict=True):
                cells.setdefault(f"{family_of(problem)} {problem.level}", {})[problem] = text
            for cell, answers in cells.items():
                table.setdefault(cell, {})[mode] = score(problems, answers)
    return table


# The reward model ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """Where a step of a response ends, and whether it is right."""

    kind: str  # line, close (of the think: is the derivation whole?) or answer
    end: int  # characters of the text so far
    right: bool


def steps(trace: Trace) -> Iterator[Step]:
    """The steps of a judged trace in their order; what was cut inside a line is none."""
    oracle = (CODE if trace.problem.domain == "code" else MATH).oracle
    assert oracle is not None
    start, opened, rest = trace.text.partition("<think>")
    body, closed, tail = rest.partition("</think>")
    valid = iter(oracle.valid_steps(trace.problem, trace.text))
    end = len(start) + len(opened)
    for line in body.splitlines(keepends=True):
        end += len(line)
        if line.strip():
            right = next(valid)
            if line.endswith("\n"):
                yield Step("line", end, right)
    if closed and tail.startswith("\n"):
        end += len("</think>\n")
        yield Step("close", end, oracle.sound(trace.problem, trace.text[:end]))
        if trace.finished and len(trace.text) > end:
            yield Step("answer", len(trace.text), trace.correct)


def spread(split: Split, n: int) -> list[Problem]:
    """n problems (fewer where small levels run dry), in equal parts over all families and levels."""
    cells = [
        (problems, family, level)
        for problems in (MATH, CODE)
        for family, levels in problems.levels.items()
        for level in levels
    ]
    share = -(-n // len(cells))
    return [
        problem
        for problems, family, level in cells
        for problem in problems.load(split, share, families=(family,), levels=(level,))
    ]


def sampled(model: HFModel, problems: Sequence[Problem], seed: int) -> list[Trace]:
    """One judged response to each problem at temperature 1."""
    requests = [Request(render(problem), problem) for problem in problems]
    sampling = Sampling(temperature=1.0, max_new_tokens=MAX_NEW_TOKENS, seed=seed)
    traces = [trace for (trace,) in model.generate(requests, sampling)]
    verdicts = verify_many([(t.problem, t.text, t.finished) for t in traces])
    return [replace(t, verdict=v) for t, v in zip(traces, verdicts, strict=True)]


def measure_judge(folder: Path, num_problems: int) -> dict[str, Any]:
    """How the reward model in `folder` does on steps of both models on test problems: all lines, parts of them, other steps."""
    judge = RewardHF.load(folder / "prm", device="cpu")
    chosen = spread("test", num_problems * CELLS)
    cases, pairs = [], []
    for author in ("teacher", "student"):
        model = HFModel.load(folder / author, device="cpu")
        for trace in sampled(model, chosen, seed=0):
            for step in steps(trace):
                cases.append((author, trace.problem, step))
                pairs.append((render(trace.problem), trace.text[: step.end]))
    rewards = np.array(judge.reward(pairs))
    right = np.array([step.right for _, _, step in cases])
    table = {}
    for name, belongs in PARTS.items():
        part = np.array([belongs(*case) for case in cases])
        table[name] = judged(rewards[part], right[part])
    return table


Part = Callable[[str, Problem, Step], bool]  # of author, problem, step


def _lines(belongs: Callable[[str, Problem], bool]) -> Part:
    return lambda author, problem, step: step.kind == "line" and belongs(author, problem)


def _band(low: int, high: int) -> Part:
    return _lines(lambda author, problem: low <= (problem.level or 0) <= high)


PARTS: dict[str, Part] = {
    "all lines": _lines(lambda author, problem: True),
    "math": _lines(lambda author, problem: problem.domain == "math"),
    "reduce": _lines(lambda author, problem: family_of(problem) == "reduce"),
    "solve": _lines(lambda author, problem: family_of(problem) == "solve"),
    "code": _lines(lambda author, problem: problem.domain == "code"),
    "the teacher's": _lines(lambda author, problem: author == "teacher"),
    "the student's": _lines(lambda author, problem: author == "student"),
    "levels 1-2": _band(1, 2),
    "levels 3-4": _band(3, 4),
    "levels 5-7": _band(5, 7),
    "end of the think": lambda author, problem, step: step.kind == "close",
    "answer": lambda author, problem, step: step.kind == "answer",
}
CELLS = sum(len(levels) for problems in (MATH, CODE) for levels in problems.levels.values())


def judged(rewards: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    """AUC, Brier score and expected calibration error of probabilities, all [N]."""
    bins = np.minimum((rewards * BINS).astype(int), BINS - 1)
    gaps = np.bincount(
        bins, rewards - right, minlength=BINS
    )  # in each bin: N * (mean reward - share right)
    area = auc(rewards, right, np.zeros(len(right), dtype=int), np.ones((1, 1)))
    return {
        "n": len(right),
        "right": float(right.mean()),
        "auc": float(area[0]),
        "brier": float(np.mean((rewards - right) ** 2)),
        "ece": float(np.abs(gaps).sum() / len(right)),
    }


@contextmanager
def recorded(
    folder: Path, name: str, model: PreTrainedModel, recipe: Mapping[str, Any], seconds: float
) -> Iterator[dict[str, Any]]:
    """Renew a model's part of scores.json and SCORES.md by the table that the block fills."""
    start = time.perf_counter()
    table: dict[str, Any] = {}
    yield table
    path = folder / "scores.json"
    scores = json.loads(path.read_text()) if path.exists() else {}
    scores["micro_version"] = MICRO_VERSION
    scores[name] = {
        "recipe": {**recipe, "parameters": model.num_parameters()},
        "train_seconds": round(seconds),
        "score_seconds": round(time.perf_counter() - start),
        "scores": table,
    }
    path.write_text(json.dumps(scores, indent=1) + "\n")
    (folder / "SCORES.md").write_text(markdown(scores))


def markdown(scores: Mapping[str, Any]) -> str:
    """The scores as tables for people."""
    lines = [
        "# The micro models",
        "",
        "Written by `python -m benchmarks.micro.forge`. Accuracy in % on test problems, one sample each. *Sound*: share of the",
        "right answers whose every line is valid. *First errors*: of the wrong answers at T=0.7 without a hint, how many have",
        "their first invalid line at step 1, 2, … (none: every line is valid, the rest is missing or wrong).",
    ]
    for name in ("teacher", "student", "either"):
        if name not in scores:
            continue
        facts = ", ".join(f"{key} {value}" for key, value in scores[name]["recipe"].items())
        head = [*MODES, "sound", "sound, hint", "first errors"]
        lines += ["", f"## {name}", ""]
        lines += [f"{facts}; trained in {scores[name]['train_seconds']} s.", ""]
        lines += [f"| level | n | {' | '.join(head)} |", f"|---|--:|{'--:|' * (len(head) - 1)}---|"]
        for cell, modes in scores[name]["scores"].items():
            plain, hinted = modes["T=0.7"], modes["hint T=0.7"]
            errors = ", ".join(f"{step}: {count}" for step, count in plain["first_error"].items())
            row = [f"{100 * modes[mode]['accuracy']:.0f}" for mode in MODES]
            row += [
                "" if s is None else f"{100 * s:.0f}" for s in (plain["sound"], hinted["sound"])
            ]
            lines.append(f"| {cell} | {plain['n']} | {' | '.join(row)} | {errors} |")
    if "prm" in scores:
        lines += ["", *_judge_lines(scores["prm"])]
    return "\n".join(lines) + "\n"


def _judge_lines(judge: Mapping[str, Any]) -> list[str]:
    """The reward model's section."""
    facts = ", ".join(f"{key} {value}" for key, value in judge["recipe"].items())
    lines = [
        "## prm",
        "",
        f"{facts}; sampled and trained in {judge['train_seconds']} s.",
        "",
        "A token classifier that reads a user turn and a response so far, and says how likely its last step is right: a line of",
        "the think (the oracle's verdict on it), the end of the think (whether the derivation is whole), the answer. On steps",
        "that both models sampled at T=1 on test problems. *Right*: share of the steps that are. AUC of right against wrong",
        "steps; Brier score; expected calibration error over 10 bins. The trunk was chosen by the first AUC here, so on the test",
        "split: 0.857 from the student's, 0.853 from the teacher's.",
        "",
        "| steps | n | right | AUC | Brier | ECE |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for part, row in judge["scores"].items():
        figures = " | ".join(f"{row[key]:.3f}" for key in ("auc", "brier", "ece"))
        lines.append(f"| {part} | {row['n']} | {100 * row['right']:.1f} % | {figures} |")
    return lines
