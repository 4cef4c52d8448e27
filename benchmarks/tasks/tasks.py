"""What the YAML files beside this one refer to: documents, prompts, and scores of all samples of a problem."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from harness.fewshot import prompt as few_shot
from harness.problems import load, render
from harness.types import Problem, Split
from harness.verifiers import recall

Document = Mapping[str, Any]


def documents(
    problems: str,
    split: Split = "test",
    n: int | None = None,
    options: Mapping[str, Any] | None = None,
    **_: Any,  # lm-eval's own metadata
) -> dict[str, Any]:
    """A split of a problem set as the dataset of a task; a document is a Problem, field by field."""
    import datasets

    found = load(problems, split, n, **(options or {}))
    return {"test": datasets.Dataset.from_list([asdict(problem) for problem in found])}


def prompt(document: Document) -> str:
    return render(Problem(**document))


def continuation(document: Document) -> str:
    """For base models: solved examples, then the problem. The task says `raw`, so that no chat template is applied."""
    return few_shot(Problem(**document))


def target(document: Document) -> str:
    return document["answer"] or ""


def results(document: Document, responses: Sequence[Sequence[str]]) -> dict[str, float]:
    """Means over the samples of one problem."""
    verdicts = recall(Problem(**document), responses[0])
    return {
        "accuracy": sum(verdict.correct for verdict in verdicts) / len(verdicts),
        "unparsed": sum(verdict.status == "unparsed" for verdict in verdicts) / len(verdicts),
    }
