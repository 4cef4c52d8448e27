"""Scorecards: what each method decides, held against the problem set's oracle; nothing is trained."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
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
BINS = 10  # of a calibration


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
    student = cell.student_model(cell.plain(setting.student)).freeze()
    card: dict[str, Any] = {"arms": {}}
    with Display(len(jobs)) if not quiet else Silent() as display:
        for job in jobs:
            if rows := _rows(job, setting, student, limit, display):  # a control may have none
                card["arms"][job.label] = rows
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
    line: dict[str, Any] = {"name": name}
    if not isinstance(measure, Measure):
        value = float(measure) if math.isfinite(measure) else None
        return line | {"value": value, "ci95": None, "n": None, "problems": None, "kind": "number"}
    line["value"], line["ci95"] = estimate(name, measure)
    line |= {"n": len(measure.values), "problems": len(set(measure.problems)), "kind": measure.kind}
    return line | ({"bins": bins(name, measure)} if measure.calibration else {})


def estimate(name: str, measure: Measure) -> tuple[float | None, list[float] | None]:
    """A measure's number, and its 95 % percentile interval by bootstrap over problems.

    A share of 0 or 1 has Wilson's interval, its problems as the cases. A calibration error has the basic bootstrap's
    interval: chance alone makes it larger than it is, and in a resample once more, which reflecting at the value undoes.
    """
    _check(name, measure)
    ids, cluster = np.unique(np.asarray(measure.problems, dtype=str), return_inverse=True)
    if len(ids) < 2:
        return None, None
    statistic = _statistic(measure, cluster)
    value = float(statistic(np.ones((1, len(ids))))[0])
    if not math.isfinite(value):
        return None, None
    if measure.kind == "mean" and value in (0.0, 1.0):  # resamples of all or none are all alike
        found = binomtest(round(value * len(ids)), len(ids)).proportion_ci(method="wilson")
        return value, [float(found.low), float(found.high)]
    drawn = np.random.default_rng(0).multinomial(
        len(ids), np.full(len(ids), 1 / len(ids)), RESAMPLES
    )
    # A resample may hold labels of one kind only and then has no AUC; without variance, no correlation.
    low, high = np.nanpercentile(statistic(drawn), [2.5, 97.5])
    if measure.calibration:
        low, high = max(0.0, 2 * value - high), min(1.0, max(value, 2 * value - low))
    return value, [float(low), float(high)]


def _check(name: str, measure: Measure) -> None:
    values, sides = measure.values, [measure.labels, measure.truth]
    given = [side for side in sides if side is not None]
    if len(given) > 1 or (measure.calibration and measure.labels is None):
        raise ValueError(
            f"measure {name!r}: give labels (for an AUC, or with calibration=True for a calibration error), "
            "truth (for a correlation) or neither (for a mean)"
        )
    if {len(side) for side in (measure.problems, *given)} != {len(values)} or any(
        np.isnan(np.asarray(side, dtype=float)).any() for side in (values, *given)
    ):
        raise ValueError(
            f"measure {name!r}: give each case a value that is a number, a problem and, "
            "for an AUC or a calibration, a label, or for a correlation, a truth that is a number"
        )
    if measure.calibration and any(not 0 <= value <= 1 for value in values):
        raise ValueError(
            f"measure {name!r}: values from {min(values):.4g} to {max(values):.4g} are not probabilities: "
            "a calibration needs values from 0 to 1 (an AUC takes any scores)"
        )


def _statistic(measure: Measure, cluster: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """What a measure reports under each row of problem weights, [R, P] -> [R]."""
    values = np.asarray(measure.values, dtype=float)
    if measure.truth is not None:
        truth = np.asarray(measure.truth, dtype=float)
        return lambda weights: correlation(values, truth, cluster, weights)
    if measure.labels is None:
        return lambda weights: mean(values, cluster, weights)
    labels = np.asarray(measure.labels, dtype=bool)
    of_labels = calibration_error if measure.calibration else auc
    return lambda weights: of_labels(values, labels, cluster, weights)


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


def correlation(
    values: np.ndarray, truth: np.ndarray, cluster: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Pearson's r under each row of problem weights, [R, P] -> [R]; NaN where a side has no variance."""
    sides = [values, truth]
    if not all(
        np.isfinite(side).all() and np.ptp(side) > 1e-12 * np.abs(side).max() for side in sides
    ):
        return np.full(len(weights), np.nan)
    x, y = ((side - side.mean()) / side.std() for side in sides)
    products = (np.ones(len(x)), x, y, x * x, y * y, x * y)
    sums = weights @ np.stack(
        [np.bincount(cluster, each, weights.shape[1]) for each in products], axis=1
    )
    mean_x, mean_y, xx, yy, xy = (sums[:, 1:] / sums[:, :1]).T
    variances = np.stack([xx - mean_x**2, yy - mean_y**2])
    variances[variances < 1e-12] = np.nan  # where it is 1 over all cases, this is rounding
    return np.clip((xy - mean_x * mean_y) / np.sqrt(variances.prod(0)), -1, 1)


def calibration_error(
    values: np.ndarray, labels: np.ndarray, cluster: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """The expected calibration error under each row of problem weights, [R, P] -> [R].

    ECE = sum_b n_b / N |mean value_b - share true_b| = sum_b |sum over b of value - label| / N
    """
    num = weights.shape[1]
    gaps = np.bincount(cluster * BINS + _bin(values), values - labels, num * BINS)
    counts = np.bincount(cluster, minlength=num)
    return np.abs(weights @ gaps.reshape(num, BINS)).sum(1) / (weights @ counts)


def _bin(values: np.ndarray) -> np.ndarray:
    """Which of the equal bins of [0, 1] holds each value; 1 is in the last."""
    return np.minimum((values * BINS).astype(int), BINS - 1)


def bins(name: str, measure: Measure) -> list[dict[str, Any]]:
    """A reliability diagram: each bin that has cases, its mean value and the share of True with an interval."""
    values, labels = np.asarray(measure.values, dtype=float), np.asarray(measure.labels, dtype=bool)
    place, problems = _bin(values), np.asarray(measure.problems, dtype=str)
    found = []
    for index in np.unique(place):
        here = place == index
        shares = Measure(labels[here].astype(float).tolist(), problems[here].tolist())
        found.append(
            {
                "low": int(index) / BINS,
                "high": (int(index) + 1) / BINS,
                "n": int(here.sum()),
                "mean": float(values[here].mean()),
                "share": float(labels[here].mean()),
                "ci95": estimate(name, shares)[1],  # null where one problem has all cases
            }
        )
    return found
