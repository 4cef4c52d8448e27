"""How good the micro models are: accuracy by family and level, with and without hints, and where derivations first go wrong."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.micro import CODE, MATH
from benchmarks.micro.code import INPUTS, Value, after, pipeline, run
from benchmarks.micro.problems import MICRO_VERSION, MicroSet, family_of
from harness.problems import render
from harness.types import Problem

MAX_NEW_TOKENS = 128
BATCH = 256
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


def record(
    folder: Path,
    name: str,
    model: PreTrainedModel,
    tok: PreTrainedTokenizerFast,
    num_problems: int,
    recipe: Mapping[str, Any],
    seconds: float,
) -> None:
    """Score a model and renew its part of scores.json and SCORES.md."""
    start = time.perf_counter()
    table = measure(model, tok, num_problems, name)
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
    for name in ("teacher", "student"):
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
    return "\n".join(lines) + "\n"
