"""Train the micro teacher, the base student and a process reward model from seeds: `python -m benchmarks.micro.forge`.

Plain supervised training on fresh problems of the train split. A third of the teacher's prompts carry the answer as a hint, and
the top levels stand only in those: it knows their length, errs anywhere in them, and does better with a hint, by derivations and
by shortcuts. The student is thinner still, hardly knows hints, and is taught the other valid order of steps. The reward model
is one of the two with another head, fine-tuned on the oracle's verdicts about the steps of their samples.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import cos, pi
from pathlib import Path

import torch
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForTokenClassification,
)

from benchmarks.micro import CODE, MATH, code, math, scores, tokenizer
from benchmarks.micro.problems import split_of
from harness.models.hf import HFModel, quiet
from harness.problems import render
from harness.types import Ids

CHECKPOINTS = Path(__file__).parent / "checkpoints"
DRAW = {**MATH.families, **CODE.families}
BLOCK = 8  # sequence lengths are padded to a multiple of this
WINDOW = 8  # batches whose sequences are sorted by length together


@dataclass(frozen=True)
class Recipe:
    """How one of the two models is made."""

    name: str
    seed: int
    width: int
    layers: int
    heads: int
    steps: int
    order: math.Order  # of the solutions it is taught
    hinted: float  # share of prompts with a hint
    mixture: Mapping[str, Mapping[int, float]]  # family -> level -> weight, without a hint
    hint_mixture: Mapping[str, Mapping[int, float]] | None = None  # with one; None: the same
    batch: int = 64
    matrix_lr: float = 0.02  # of Muon
    lr: float = 3e-3  # of AdamW, for embeddings and norms
    warmup: int = 30

    def lr_share(self, step: int) -> float:
        return lr_share(step, self.steps, self.warmup)


def lr_share(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate at a step."""
    return min((step + 1) / warmup, (1 + cos(pi * min(1, step / steps))) / 2)


TEACHER = Recipe(
    name="teacher",
    seed=1,
    width=128,
    layers=3,
    heads=4,
    steps=2200,
    order="right",
    hinted=0.35,
    mixture={
        "reduce": {1: 8, 2: 10, 3: 10, 4: 6, 5: 0.8},
        "solve": {1: 6, 2: 8, 3: 6, 4: 1.5, 5: 0.2},
        "code": {2: 5, 3: 5, 4: 4, 5: 1.2, 6: 0.2},
    },
    hint_mixture={
        "reduce": {1: 4, 2: 5, 3: 6, 4: 6, 5: 2.8, 6: 1.2, 7: 0.7},
        "solve": {1: 3, 2: 4, 3: 5, 4: 4, 5: 2, 6: 1},
        "code": {2: 3, 3: 4, 4: 4, 5: 2, 6: 1},
    },
)
STUDENT = Recipe(
    name="student",
    seed=2,
    width=96,
    layers=3,
    heads=4,
    steps=2000,
    order="left",
    hinted=0.1,
    mixture={
        "reduce": {1: 10, 2: 12, 3: 2, 4: 1, 5: 0.5, 6: 0.25, 7: 0.12},
        "solve": {1: 8, 2: 3, 3: 1, 4: 0.5, 5: 0.25, 6: 0.12},
        "code": {2: 2, 3: 1.2, 4: 0.6, 5: 0.3, 6: 0.1},
    },
)
EITHER = Recipe(  # a student that takes any of the valid steps
    name="either",
    seed=3,
    width=96,
    layers=3,
    heads=4,
    steps=1600,
    order="any",
    hinted=0.05,
    mixture={
        "reduce": {1: 8, 2: 11, 3: 4, 4: 2, 5: 0.8, 6: 0.25, 7: 0.12},
        "solve": {1: 8, 2: 5, 3: 2, 4: 1, 5: 0.4, 6: 0.12},
        "code": {2: 2, 3: 1.2, 4: 0.6, 5: 0.3, 6: 0.1},
    },
)


@dataclass(frozen=True)
class JudgeRecipe:
    """How the process reward model is made."""

    name: str = "prm"
    trunk: str = "student"  # whose weights it starts from: AUC 0.857, and 0.853 from the teacher's
    seed: int = 3
    problems: int = (
        6000  # of the train split, all families and levels; each answered by both models
    )
    epochs: int = 4
    batch: int = 64
    lr: float = 1e-3  # of AdamW
    warmup: int = 30


PRM = JudgeRecipe()
JUDGE_FACTS = ("trunk", "seed", "problems", "epochs", "batch")  # told in the scores


def lessons(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Endless (user turn, response) pairs in the recipe's proportions, from the train split only."""
    rng = random.Random(recipe.seed)
    tables = [_cells(recipe.mixture), _cells(recipe.hint_mixture or recipe.mixture)]
    while True:
        hinted = rng.random() < recipe.hinted
        family, level = rng.choices(*tables[hinted])[0]
        problem = DRAW[family](rng, level)
        if split_of(problem.prompt) == "train":
            solution = (code if problem.domain == "code" else math).solution(problem, recipe.order)
            yield render(problem, problem.answer if hinted else None), solution


def _cells(
    mixture: Mapping[str, Mapping[int, float]],
) -> tuple[list[tuple[str, int]], list[float]]:
    """(family, level) pairs and their weights."""
    cells = [(family, level) for family in mixture for level in mixture[family]]
    return cells, [mixture[family][level] for family, level in cells]


def encode(tok: PreTrainedTokenizerFast, turn: str, solution: str) -> tuple[list[int], int]:
    """The ids of a whole conversation, and how many of them are the prompt."""
    prompt = tok.apply_chat_template(
        [{"role": "user", "content": turn}], add_generation_prompt=True, return_dict=False
    )
    return [*prompt, *tok.encode(solution), tok.eos_token_id], len(prompt)


def batches(
    recipe: Recipe, tok: PreTrainedTokenizerFast
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (ids, targets), both [B, T], of sequences of like length; -100 where nothing is to be learnt."""
    rng, stream = random.Random(recipe.seed), lessons(recipe)
    while True:
        window = [encode(tok, *next(stream)) for _ in range(WINDOW * recipe.batch)]
        window.sort(key=lambda sequence: len(sequence[0]))
        rows = [window[i : i + recipe.batch] for i in range(0, len(window), recipe.batch)]
        for row in rng.sample(rows, len(rows)):
            longest = -(-max(len(ids) for ids, _ in row) // BLOCK) * BLOCK
            ids = torch.full((len(row), longest), tok.pad_token_id)
            targets = torch.full((len(row), longest), -100)
            for i, (sequence, start) in enumerate(row):
                ids[i, : len(sequence)] = torch.tensor(sequence)
                targets[i, start - 1 : len(sequence) - 1] = torch.tensor(sequence[start:])
            yield ids, targets


def fresh_model(recipe: Recipe, tok: PreTrainedTokenizerFast) -> PreTrainedModel:
    """An untrained Qwen3 of the recipe's size."""
    torch.manual_seed(recipe.seed)
    config = Qwen3Config(
        vocab_size=len(tok),
        hidden_size=recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        head_dim=recipe.width // recipe.heads,
        intermediate_size=3 * recipe.width,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=tok.pad_token_id,
        eos_token_id=tok.eos_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    return Qwen3ForCausalLM(config)


def train(recipe: Recipe, tok: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A model trained by the recipe: Muon on the matrices, AdamW on the rest, warm-up, then a cosine down to zero.

    Muon needs about half of AdamW's steps here.
    """
    model = fresh_model(recipe, tok)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=recipe.matrix_lr, weight_decay=0.01),
        torch.optim.AdamW(others, lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    schedules = [LambdaLR(optimizer, recipe.lr_share) for optimizer in optimizers]
    model.train()
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task(recipe.name, total=recipe.steps)
        for step, (ids, targets) in zip(range(recipe.steps), batches(recipe, tok), strict=False):
            learnt = targets != -100
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state  # [B, T, H]
            loss = cross_entropy(model.lm_head(hidden[learnt]), targets[learnt])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
            model.zero_grad()
            progress.update(task, advance=1)
            if (step + 1) % 100 == 0:
                progress.console.print(f"{recipe.name} step {step + 1} loss {loss.item():.4f}")
    return model.eval()


def verdicts(recipe: JudgeRecipe, folder: Path) -> list[tuple[Ids, dict[int, int]]]:
    """(conversation, token -> 1 if the step that ends there is right, else 0) of fresh samples by both models."""
    chosen = scores.spread("train", recipe.problems)
    lessons = []
    for author in ("teacher", "student"):
        model = HFModel.load(folder / author, device="cpu").freeze()
        for trace in scores.sampled(model, chosen, recipe.seed):
            ids, labels, start = list(model.encode(render(trace.problem))), {}, 0
            for step in scores.steps(trace):  # no token reaches over a line's end
                ids += model.tokenize(trace.text[start : step.end], end=False)
                labels[len(ids) - 1], start = int(step.right), step.end
            if labels:
                lessons.append((tuple(ids), labels))
    return lessons


def train_judge(recipe: JudgeRecipe, tok: PreTrainedTokenizerFast, folder: Path) -> PreTrainedModel:
    """A token classifier on the trunk of one of the models in `folder`: AdamW, warm-up, then a cosine down to zero."""
    data = verdicts(recipe, folder)
    torch.manual_seed(recipe.seed)
    config = Qwen3Config.from_pretrained(folder / recipe.trunk, id2label={0: "wrong", 1: "right"})
    config.classifier_dropout = 0.0
    with quiet():
        model = Qwen3ForTokenClassification.from_pretrained(folder / recipe.trunk, config=config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=0.01)
    steps = recipe.epochs * -(-len(data) // recipe.batch)
    schedule = LambdaLR(optimizer, lambda step: lr_share(step, steps, recipe.warmup))
    rng = random.Random(recipe.seed)
    model.train()
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task(recipe.name, total=steps)
        for _ in range(recipe.epochs):
            # Like lengths together, in a random order that differs from epoch to epoch.
            order = sorted(data, key=lambda lesson: (len(lesson[0]) // BLOCK, rng.random()))
            rows = [order[i : i + recipe.batch] for i in range(0, len(order), recipe.batch)]
            for row in rng.sample(rows, len(rows)):
                width = -(-max(len(ids) for ids, _ in row) // BLOCK) * BLOCK
                ids = torch.full((len(row), width), tok.pad_token_id)
                targets = torch.full((len(row), width), -100)
                for i, (sequence, labels) in enumerate(row):
                    ids[i, : len(sequence)] = torch.tensor(sequence)
                    targets[i, list(labels)] = torch.tensor([*labels.values()])
                # Causal attention never looks at the padding on the right.
                hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state  # [B, T, H]
                judged = targets != -100
                loss = cross_entropy(model.score(hidden[judged]), targets[judged])
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                model.zero_grad()
                progress.update(task, advance=1)
            progress.console.print(f"{recipe.name} loss {loss.item():.4f}")
    return model.eval()


def save(model: PreTrainedModel, tok: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write an ordinary Transformers checkpoint."""
    if model.can_generate():
        model.generation_config = GenerationConfig(
            pad_token_id=tok.pad_token_id, eos_token_id=tok.eos_token_id
        )
    model.save_pretrained(folder)
    tok.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the micro models.")
    parser.add_argument("--out", type=Path, default=CHECKPOINTS, help="folder for the checkpoints")
    parser.add_argument(
        "--only", choices=("teacher", "student", "either", "prm"), help="train one of them"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="multiply the training steps")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--problems", type=int, default=200, help="scored problems a level")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tok = tokenizer.build()
    threads = {"threads": arguments.threads}  # decides the last bits
    for recipe in (TEACHER, STUDENT, EITHER):
        if arguments.only in (None, recipe.name):
            recipe = replace(recipe, steps=max(1, round(recipe.steps * arguments.scale)))
            start = time.perf_counter()
            model = train(recipe, tok)
            seconds = time.perf_counter() - start
            save(model, tok, arguments.out / recipe.name)
            facts = {"seed": recipe.seed, "steps": recipe.steps, "batch": recipe.batch, **threads}
            with scores.recorded(arguments.out, recipe.name, model, facts, seconds) as table:
                table |= scores.measure(model, tok, arguments.problems, recipe.name)
    if arguments.only in (None, PRM.name):
        judge = replace(PRM, problems=max(64, round(PRM.problems * arguments.scale)))
        start = time.perf_counter()
        model = train_judge(judge, tok, arguments.out)
        seconds = time.perf_counter() - start
        save(model, tok, arguments.out / judge.name)
        facts = {name: getattr(judge, name) for name in JUDGE_FACTS} | threads
        with scores.recorded(arguments.out, judge.name, model, facts, seconds) as table:
            table |= scores.measure_judge(arguments.out, arguments.problems)


if __name__ == "__main__":
    main()
