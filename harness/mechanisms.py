"""Scorecards: what each method decides, held against the problem set's oracle; nothing is trained."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest

from harness import cell, problems, registry, report
from harness.cell import Job
from harness.compare import Silent, check, check_writable, chosen, experiment, prepare, use_data
from harness.config import Experiment
from harness.lab import Workbench
from harness.ledger import Ledger
from harness.models.hf import HFModel
from harness.progress import Display, throttled
from harness.registry import Method
from harness.store import Store
from harness.types import Measure

RESAMPLES = 1000


def scorecard(
    suite: str | Path | Experiment,
    *,
    methods: Sequence[str] | None = None,
    limit: int | None = None,
    overrides: Sequence[str] = (),
    results: Path = Path("results"),
    store: Path | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Score every arm that defines `mechanisms`, write results/NAME/mechanisms.json and return what it holds."""
    setting = experiment(suite, overrides)
    labels = chosen(setting, methods)
    use_data(setting)
    check(setting, labels)
    _check_oracle(setting)
    arms = _scored(setting, labels)
    results = Path(results)
    folder = results / setting.name
    store = store or Path(os.environ.get("RETORT_STORE", results / "store"))
    check_writable(folder, store)
    prepare(setting, folder)
    data = setting.model_dump(mode="json")
    jobs = [Job(data, label, 0, setting.data_seeds[0], folder, store) for label in arms]
    for job in jobs:
        cell.recorded(job, setting)  # refuses to stand beside a comparison of another configuration
    torch.set_num_threads(setting.threads or max(1, (os.cpu_count() or 1) // setting.workers))
    student = cell.student_model(setting.student).freeze()
    card: dict[str, Any] = {"arms": {}}
    with Display(len(jobs)) if not quiet else Silent() as display:
        for job in jobs:
            card["arms"][job.label] = _rows(job, setting, student, limit, display)
            display.finish(job.name)
    cell.write_json(folder / "mechanisms.json", card)
    if (folder / "summary.json").is_file():
        report.write(folder)
    return card


def _check_oracle(setting: Experiment) -> None:
    if problems.oracle(setting.problems) is None:
        able = [name for name, found in problems.sets().items() if found.oracle is not None]
        raise ValueError(
            f"{setting.name}: no oracle knows the steps of {' with '.join(setting.problems)}: give one of "
            f"{', '.join(able)} alone, as an oracle judges one set and a mixture has none "
            f"(--set 'problems={{{able[0]}: {{n: 500}}}}' --set name=…)"
        )


def _scored(setting: Experiment, labels: Sequence[str]) -> list[str]:
    """The arms whose method has a scorecard."""
    arms = [label for label in labels if _has(type(cell.recipe(setting, label)[0]))]
    if not arms:
        able = [name for name, method in registry.methods().items() if _has(method)]
        raise ValueError(
            f"{setting.name}: none of the arms ({', '.join(labels)}) has a scorecard; "
            f"methods that have one, to be named under `methods:`: {', '.join(able) or 'none yet'}"
        )
    return arms


def _has(method: type[Method]) -> bool:
    return method.mechanisms is not Method.mechanisms


def _rows(
    job: Job, setting: Experiment, student: HFModel, limit: int | None, display: Any
) -> list[dict[str, Any]]:
    """One arm's scorecard; what a comparison sampled before comes out of the store."""
    method, _, _ = cell.recipe(setting, job.label)
    torch.manual_seed(job.seed)
    lab = Workbench(
        student,
        cell.loaders(setting, student),
        cell.training_problems(job)[:limit],
        Store(job.store),
        Ledger(),
        setting.sampling,
        seed=job.seed,
        data_seed=job.data_seed,
        oracle=problems.oracle(setting.problems),
        report=throttled(lambda event: display(*event), job.name),
    )
    return [row(name, measure) for name, measure in method.mechanisms(lab).items()]


# -- estimates ----------------------------------------------------------------------------------


def row(name: str, measure: Measure | float) -> dict[str, Any]:
    """One line of a scorecard, as mechanisms.json holds it; null where the cases say nothing."""
    if isinstance(measure, Measure):
        value, ci95 = estimate(name, measure)
        n, num = len(measure.values), len(set(measure.problems))
        kind = "mean" if measure.labels is None else "auc"
    else:
        value = float(measure) if math.isfinite(measure) else None
        ci95, n, num, kind = None, None, None, "number"
    return {"name": name, "value": value, "ci95": ci95, "n": n, "problems": num, "kind": kind}


def estimate(name: str, measure: Measure) -> tuple[float | None, list[float] | None]:
    """A measure's mean or AUC, and its 95 % percentile interval by bootstrap over problems.

    A share of 0 or 1 has Wilson's interval, its problems as the cases.
    """
    values = np.asarray(measure.values, dtype=float)
    labels = None if measure.labels is None else np.asarray(measure.labels, dtype=bool)
    lengths = {len(values), len(measure.problems), len(values if labels is None else labels)}
    if len(lengths) > 1 or np.isnan(values).any():
        raise ValueError(
            f"measure {name!r}: give each case a value that is a number, a problem and, for an AUC, a label"
        )
    ids, cluster = np.unique(np.asarray(measure.problems, dtype=str), return_inverse=True)
    if len(ids) < 2:
        return None, None

    def statistic(weights: np.ndarray) -> np.ndarray:
        if labels is None:
            return mean(values, cluster, weights)
        return auc(values, labels, cluster, weights)

    value = float(statistic(np.ones((1, len(ids))))[0])
    if not math.isfinite(value):
        return None, None
    if labels is None and value in (0.0, 1.0):  # resamples of all or none are all alike
        found = binomtest(round(value * len(ids)), len(ids)).proportion_ci(method="wilson")
        return value, [float(found.low), float(found.high)]
    drawn = np.random.default_rng(0).multinomial(
        len(ids), np.full(len(ids), 1 / len(ids)), RESAMPLES
    )
    # A resample may hold labels of one kind only and then has no AUC.
    low, high = np.nanpercentile(statistic(drawn), [2.5, 97.5])
    return value, [float(low), float(high)]


def mean(values: np.ndarray, cluster: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The mean over cases under each row of problem weights, [R, P] -> [R]."""
    num = weights.shape[1]
    sums, counts = np.bincount(cluster, values, num), np.bincount(cluster, minlength=num)
    return (weights @ sums) / (weights @ counts)


def auc(
    scores: np.ndarray, labels: np.ndarray, cluster: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """The AUC under each row of problem weights, [R, P] -> [R]; NaN where one kind of label is absent.

    AUC = P(score of a True > score of a False) + P(equal) / 2, over weighted pairs
    """
    distinct, rank = np.unique(scores, return_inverse=True)
    areas = np.empty(len(weights))
    for place, weight in enumerate(weights):
        true, false = (
            np.bincount(rank[kind], weight[cluster[kind]], len(distinct))
            for kind in (labels, ~labels)
        )
        pairs = true.sum() * false.sum()
        beaten = np.cumsum(false) - false / 2  # a tie counts half
        areas[place] = true @ beaten / pairs if pairs else np.nan
    return areas
