"""Scorecards: estimates by hand, errors before compute, and the command on a small suite of the micro world."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import rankdata
from typer.testing import CliRunner

from harness import cli, compare, mechanisms, registry
from harness.mechanisms import auc, estimate, row, scorecard
from harness.models.hf import HFModel
from harness.objectives import nll
from harness.registry import Method
from harness.types import Lab, Measure, OffPolicy, Stage

SUITE: dict[str, Any] = {
    "name": "small",
    "student": "micro/student",
    "teacher": "micro/teacher",
    "problems": {"micro_math": {"n": 24, "levels": [1, 2]}},
    "benchmarks": {"micro_math": {"limit": 8, "max_new_tokens": 64}},
    "seeds": 1,
    "budget": {"steps": 2},
    "methods": {"judged": {"n": 2}, "sft": {"samples": 2}, "more": {"method": "judged"}},
    "training": {"batch_size": 4},
    "sampling": {"max_new_tokens": 64},
    "threads": 1,
}


class Judged(Method):
    """Trains on the teacher's samples, and lets the oracle look at them."""

    name, paper = "judged", "none"
    n: int = 3

    def stages(self, lab: Lab) -> Iterator[Stage]:
        traces = lab.samples(lab.teacher, self.n)
        yield Stage("s", OffPolicy([lab.example(t) for group in traces for t in group]), nll)

    def mechanisms(self, lab: Lab) -> Mapping[str, Measure | float]:
        assert lab.oracle is not None and lab.student.identity == lab.base.identity
        traces = [t for group in lab.samples(lab.teacher, self.n) for t in group]
        valid = [lab.oracle.first_invalid(t.problem, t.text) is None for t in traces]
        ids = [t.problem.id for t in traces]
        return {
            "valid [share]": Measure(valid, ids),
            "length tells": Measure(
                [len(t.tokens) for t in traces], ids, [i % 3 == 0 for i in range(len(ids))]
            ),
            "one kind": Measure([float(v) for v in valid], ids, [True] * len(ids)),
            "traces": len(traces),
        }


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {**registry.methods(), "judged": Judged}
    monkeypatch.setattr(registry, "methods", lambda: known)


def suite(folder: Path, **changes: Any) -> str:
    path = folder / "small.yaml"
    path.write_text(json.dumps({**SUITE, **changes}))  # JSON is YAML
    return str(path)


# -- estimates ----------------------------------------------------------------------------------


def test_the_auc_counts_a_tie_half() -> None:
    # pairs of a True and a False: 3>1, 3>2, 2>1 and 2=2
    line = row("m", Measure([3, 1, 2, 2], list("abcd"), [True, False, True, False]))
    assert line["value"] == 3.5 / 4
    assert (line["kind"], line["n"], line["problems"]) == ("auc", 4, 4)


def test_a_problems_weight_is_that_many_copies_of_its_cases() -> None:
    rng = np.random.default_rng(1)
    scores, labels = rng.integers(0, 8, 60).astype(float), rng.random(60) < 0.4
    cluster, weights = rng.integers(0, 9, 60), rng.integers(0, 4, (5, 9))
    for weight, found in zip(weights, auc(scores, labels, cluster, weights), strict=True):
        s, true = (np.repeat(a, weight[cluster]) for a in (scores, labels))
        n, m = true.sum(), (~true).sum()
        assert found == pytest.approx((rankdata(s)[true].sum() - n * (n + 1) / 2) / (n * m))


def test_a_mean_is_over_cases_and_its_interval_over_problems() -> None:
    line = row("m", Measure([1, 1, 1, 0], ["a", "a", "a", "b"]))
    assert line["value"] == 0.75 and (line["n"], line["problems"]) == (4, 2)
    assert line["ci95"] == [0.0, 1.0]  # either problem alone
    assert line["kind"] == "mean"


@pytest.mark.parametrize("kind", ["mean", "auc"])
def test_cases_of_one_problem_that_agree_widen_the_interval(kind: str) -> None:
    rng = np.random.default_rng(0)
    ids = [str(i) for i in range(50) for _ in range(20)]
    labels = [i % 20 < 10 for i in range(1000)] if kind == "auc" else None
    noise = {"agree": np.repeat(rng.random(50), 20), "independent": rng.random(1000)}
    sign = np.where(labels, 1.0, -1.0) if labels else 1.0  # a problem is told right or wrong whole
    width = {}
    for name, draws in noise.items():
        line = row("m", Measure((sign * (draws < 0.6)).tolist(), ids, labels))
        low, high = line["ci95"]
        assert low < line["value"] < high
        width[name] = high - low
    assert width["agree"] > 2.5 * width["independent"]  # sqrt(20) = 4.5 in the mean


@pytest.mark.parametrize(
    "measure",
    [
        Measure([], []),
        Measure([1, 0], ["a", "a"]),
        Measure([1, 0], ["a", "b"], [True, True]),
        Measure([1, float("inf")], ["a", "b"]),
        Measure([0.1, 0.1, 0.1], list("abc"), truth=[1, 2, 3]),
        Measure([1, 2, 3], list("abc"), truth=[0.3, 0.3, 0.1 + 0.2]),
        Measure([1, 2, float("inf")], list("abc"), truth=[1, 2, 3]),
        Measure([1, 2], ["a", "a"], truth=[1, 2]),
        Measure([], [], [], calibration=True),
        Measure([0.4, 0.6], ["a", "a"], [True, False], calibration=True),
        float("nan"),
    ],
)
def test_what_cannot_be_said_is_null(measure: Measure | float) -> None:
    line = row("m", measure)
    assert line["value"] is None and line["ci95"] is None
    json.dumps(line, allow_nan=False)


def test_resamples_with_labels_of_one_kind_are_left_out() -> None:
    line = row("m", Measure([2, 1], ["a", "b"], [True, False]))
    assert line["value"] == 1 and line["ci95"] == [1.0, 1.0]


def test_a_plain_number_has_no_cases() -> None:
    expected = {"ci95": None, "n": None, "problems": None, "kind": "number"}
    assert row("m", 3) == {"name": "m", "value": 3.0, **expected}


@pytest.mark.parametrize(
    "measure",
    [
        Measure([1, 0], ["a"]),
        Measure([1, 0], ["a", "b"], [True]),
        Measure([1, float("nan")], ["a", "b"]),
        Measure([1, 0], ["a", "b"], truth=[1]),
        Measure([1, 0], ["a", "b"], truth=[1, float("nan")]),
        Measure([1, 0], ["a", "b"], [True], calibration=True),
    ],
)
def test_a_case_lacks_nothing(measure: Measure) -> None:
    with pytest.raises(ValueError, match="measure 'm': give each case a value"):
        row("m", measure)


@pytest.mark.parametrize(
    ("measure", "expected"),
    [
        (Measure([1, 0], ["a", "b"], calibration=True), "give labels .* or neither"),
        (Measure([1, 0], ["a", "b"], [True, False], [1, 0]), "give labels .* or neither"),
        (Measure([1, 0], ["a", "b"], None, [1, 0], True), "give labels .* or neither"),
        (
            Measure([0.5, 1.25, -0.5], list("abc"), [True, False, True], calibration=True),
            "values from -0.5 to 1.25 are not probabilities: a calibration needs values from 0 to 1",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(measure: Measure, expected: str) -> None:
    with pytest.raises(ValueError, match=f"measure 'm': {expected}"):
        row("m", measure)


def test_many_cases_take_seconds() -> None:
    rng = np.random.default_rng(0)
    ids = [str(i) for i in rng.integers(0, 2000, 50_000)]
    scores, labels = rng.random(50_000).tolist(), (rng.random(50_000) < 0.5).tolist()
    start = time.monotonic()
    low, high = row("m", Measure(scores, ids, labels))["ci95"]
    assert time.monotonic() - start < 30  # about 2 on an idle core
    assert low < 0.5 < high


def test_a_calibration_error_by_hand() -> None:
    """Bin 0.2 to 0.3: mean 0.25, 1 of 4 right, gap 0. Bin 0.9 to 1: 0.9, 1, 1 and 0.95 with 2 of 4, gap 0.4625."""
    values = [0.2, 0.25, 0.25, 0.3 - 1e-9, 0.9, 1.0, 1.0, 0.95]
    labels = [False, True, False, False, True, True, False, False]
    problems = list("abcdabcd")
    line = row("m", Measure(values, problems, labels, calibration=True))
    assert line["value"] == pytest.approx((4 * 0 + 4 * 0.4625) / 8)
    assert (line["kind"], line["n"], line["problems"]) == ("calibration", 8, 4)
    low, high = line["bins"]
    expected = {"low": 0.2, "high": 0.3, "n": 4, "mean": pytest.approx(0.25), "share": 0.25}
    assert low == {**expected, "ci95": low["ci95"]}
    assert (high["low"], high["high"], high["n"], high["share"]) == (0.9, 1, 4, 0.5)
    assert high["mean"] == pytest.approx(0.9625)
    assert low["ci95"][0] <= 0.25 <= low["ci95"][1]
    assert line["ci95"][0] <= line["value"] <= line["ci95"][1]
    assert json.loads(json.dumps(line, allow_nan=False)) == line


def test_gaps_of_opposite_sign_do_not_cancel_across_bins() -> None:
    # too low by 0.4 in one bin of 1 case, too high by 0.2 in one of 3: (1 * 0.4 + 3 * 0.2) / 4
    values, labels = [0.6, 0.2, 0.2, 0.2], [True, False, False, False]
    line = row("m", Measure(values, ["a", "b", "b", "b"], labels, calibration=True))
    assert line["value"] == pytest.approx(0.25)
    assert [(b["n"], b["ci95"]) for b in line["bins"]] == [(3, None), (1, None)]  # a problem each


def test_a_share_of_all_in_a_bin_is_not_certain() -> None:
    problems = [f"p{i % 4}" for i in range(40)]  # Wilson's interval of 4 of 4
    line = row("m", Measure([0.95] * 40, problems, [True] * 40, calibration=True))
    assert line["bins"][0]["ci95"] == pytest.approx([0.51011, 1], abs=1e-4)


def test_the_interval_of_a_calibrated_measure_reaches_down() -> None:
    rng = np.random.default_rng(0)
    values, ids = rng.random(400), [str(i) for i in range(400)]

    def interval(labels: np.ndarray) -> tuple[float, float]:
        line = row("m", Measure(values.tolist(), ids, labels.tolist(), calibration=True))
        low, high = line["ci95"]
        assert 0 <= low <= line["value"] <= high <= 1
        return low, high

    right = [interval(rng.random(400) < values)[0] for _ in range(30)]
    assert np.median(right) < 0.01  # resamples alone would start at about 0.04
    low, high = interval(rng.random(400) < 0.5 * values)
    assert low < 0.25 < high


def test_a_correlation_by_hand() -> None:
    """x 1, 2, 3, 6 (mean 3), y 2, 1, 4, 5 (mean 3): sum of products 10, of squares 14 and 10."""
    line = row("m", Measure([1, 2, 3, 6], list("abcd"), truth=[2, 1, 4, 5]))
    assert line["value"] == pytest.approx(10 / math.sqrt(14 * 10))
    assert line["ci95"][0] <= line["value"] <= line["ci95"][1] <= 1
    assert line["kind"] == "correlation" and "bins" not in line
    falling = row("m", Measure([1, 2, 3], list("abc"), truth=[3, 2, 1]))
    assert falling["value"] == pytest.approx(-1) and falling["ci95"] == pytest.approx([-1, -1])


@pytest.mark.parametrize("statistic", ["correlation", "calibration_error"])
def test_weights_of_unequal_problems_are_copies(statistic: str) -> None:
    rng = np.random.default_rng(2)
    cluster = np.repeat(np.arange(5), [1, 2, 9, 4, 14])
    values, noise = rng.random(30), rng.random(30)
    truth = values + noise if statistic == "correlation" else noise < values
    weights = rng.integers(0, 4, (6, 5))
    weights[:, 2] += 1  # never without a problem of several cases
    found = getattr(mechanisms, statistic)(values, truth, cluster, weights)
    for weight, one in zip(weights, found, strict=True):
        x, y = (np.repeat(a, weight[cluster]) for a in (values, truth))
        if statistic == "correlation":
            expected = np.corrcoef(x, y)[0, 1]
        else:
            bins = [(x >= b / 10) & (x < (b + 1) / 10) for b in range(10)]
            expected = sum(abs(x[b].mean() - y[b].mean()) * b.mean() for b in bins if b.any())
        assert one == pytest.approx(expected)


def test_resamples_without_variance_are_left_out() -> None:
    """Only resamples that hold both problems have a correlation, and theirs is 1; 0.1 + 0.2 is not 0.3, yet no variance."""
    values, truth = [0.1, 0.1, 0.7], [0.3, 0.1 + 0.2, 0.9]
    line = row("m", Measure(values, ["a", "a", "b"], truth=truth))
    assert line["value"] == pytest.approx(1) and line["ci95"] == pytest.approx([1, 1])
    weights, cluster = np.array([[k, 0] for k in range(1, 50)]), np.array([0, 0, 1])
    alone = mechanisms.correlation(np.array(values), np.array(truth), cluster, weights)
    assert np.isnan(alone).all()


# -- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "methods", "expected"),
    [
        (
            {"problems": {"micro_math": {"n": 9}, "micro_code": {"n": 9}}},
            None,
            r"small: no oracle .* micro_math with micro_code: give one of micro_math, micro_code alone",
        ),
        (
            {"problems": {"gsm8k": {"n": 9}}},
            None,
            r"no oracle .* gsm8k: .* a mixture has none \(--set",
        ),
        (
            {},
            ["sft"],
            r"none of the arms \(sft\) has a scorecard; methods that have one, .*: .*judged",
        ),
        ({}, ["jugded"], "unknown method 'jugded' in suite 'small': did you mean 'judged'"),
    ],
)
def test_a_mistake_is_found_before_anything_is_written(
    tmp_path: Path, changes: dict[str, Any], methods: list[str] | None, expected: str
) -> None:
    with pytest.raises(ValueError, match=expected):
        scorecard(
            suite(tmp_path, **changes), methods=methods, results=tmp_path / "results", quiet=True
        )
    assert not (tmp_path / "results").exists()


# -- the command --------------------------------------------------------------------------------


def test_the_command_scores_what_a_comparison_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, path = tmp_path / "results", suite(tmp_path)
    compare(path, results=results, quiet=True, track=False)
    folder = results / "small"
    (folder / "report.md").unlink()

    def refuse(*_: object) -> None:
        raise AssertionError("sampled again")

    monkeypatch.setattr(HFModel, "generate_block", refuse)
    monkeypatch.setattr(cli, "out", Console(width=120))
    given = ["mechanisms", path, "--results", str(results)]
    done = CliRunner().invoke(cli.app, given, catch_exceptions=False)
    assert done.exit_code == 0
    card = json.loads((folder / "mechanisms.json").read_text())
    assert list(card["arms"]) == ["judged", "more"]  # sft has none
    share, length, one, number = card["arms"]["judged"]
    assert (share["name"], share["kind"], share["n"], share["problems"]) == (
        "valid [share]",
        "mean",
        48,
        24,
    )
    assert share["ci95"][0] <= share["value"] <= share["ci95"][1]
    assert length["kind"] == "auc" and 0 < length["value"] < 1
    assert one["value"] is None and number == {**number, "value": 48.0, "kind": "number"}
    assert card["arms"]["more"][0]["n"] == 72
    assert (folder / "report.md").is_file()  # written again
    for text in (
        "\nmore\n",
        "valid [share]",
        f"{100 * share['value']:.1f} %",
        f"{length['value']:.3f}",
    ):
        assert text in done.stdout
    assert str(folder / "mechanisms.json") in done.stdout

    few = [*given, "--methods", "judged", "--limit", "3"]
    assert CliRunner().invoke(cli.app, few, catch_exceptions=False).exit_code == 0
    card = json.loads((folder / "mechanisms.json").read_text())
    assert list(card["arms"]) == ["judged"] and card["arms"]["judged"][0]["problems"] == 3

    with pytest.raises(ValueError, match="trained with another configuration"):
        scorecard(path, overrides=["methods.judged.n=1"], results=results, quiet=True)


def test_a_share_of_all_or_none_is_not_certain() -> None:
    """Wilson by hand for n = 4 problems: 1 / (1 + z^2 / n) = 1 / (1 + 3.8415 / 4) = 0.51011; many cases of a problem are one."""
    names = [f"p{i % 4}" for i in range(40)]
    value, interval = estimate("all", Measure([1.0] * 40, names))
    assert value == 1 and interval == pytest.approx([0.51011, 1], abs=1e-4)
    value, interval = estimate("none", Measure([0.0] * 40, names))
    assert value == 0 and interval == pytest.approx([0, 0.48989], abs=1e-4)
