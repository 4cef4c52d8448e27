"""Signal-to-noise: estimates by hand, intervals that cover, a fit that recovers, gradients against autograd, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from harness import cli, problems, report, snr
from harness.lab import Workbench
from harness.models.hf import HFModel
from harness.objectives import forward_kl, reverse_kl
from harness.snr import INTERIOR, Bin, Projection, extremes, fit, interval, signal_and_noise
from harness.snr import bin_of as bin_index
from harness.types import Example
from tests.benches import model
from tests.tiny import tiny_model


def bin_of(index: int, vectors: np.ndarray, rate: float = 0.5) -> Bin:
    n = len(vectors)
    return Bin(index, np.full(n, rate), vectors.astype(np.float32), np.zeros(n), np.zeros(n))


# -- estimates ----------------------------------------------------------------------------------


def test_signal_and_noise_by_hand() -> None:
    g = np.array([[1.0, 0], [0, 1], [1, 2]])
    # pairs: g.g = 0, 1, 2; |difference|^2 / 2 = 1, 2, 1
    signal, noise = signal_and_noise(g @ g.T, np.ones((1, 3)))
    assert signal[0] == pytest.approx(1) and noise[0] == pytest.approx(4 / 3)
    mean = g.mean(0)
    variance = ((g - mean) ** 2).sum() / 2
    assert noise[0] == pytest.approx(variance)
    assert signal[0] == pytest.approx(mean @ mean - variance / 3)


def test_a_resample_does_not_pair_a_problem_with_itself() -> None:
    g = np.array([[1.0, 0], [0, 1], [1, 2]])
    # the first twice and another: all pairs are of these two
    signal, noise = signal_and_noise(g @ g.T, np.array([[2.0, 1, 0], [2, 0, 1], [3, 0, 0]]))
    assert signal[:2] == pytest.approx([0, 1]) and noise[:2] == pytest.approx([1, 2])
    assert np.isnan(signal[2])  # one problem alone says nothing


def test_the_estimate_is_unbiased_and_its_interval_covers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of unequal size around a mean: SNR = |mean|^2 / (d E scale^2), E scale^2 = exp(2 s^2)."""
    monkeypatch.setattr(snr, "RESAMPLES", 300)
    rng = np.random.default_rng(3)
    for true in (0.0, 0.03):
        found, covered, trials = [], 0, 120
        for _ in range(trials):
            g = rng.normal(size=(60, 80)) * np.exp(0.4 * rng.normal(size=(60, 1)))
            g[:, 0] += np.sqrt(true * 80 * np.exp(2 * 0.4**2))
            made = bin_of(3, g)
            low, high = interval(made.snr[1:])
            found.append(made.snr[0])
            covered += low <= true <= high
        assert np.mean(found) == pytest.approx(true, abs=0.002)
        assert covered >= 0.9 * trials


def test_a_bin_of_equal_gradients_says_nothing_and_breaks_nothing() -> None:
    row = snr.judge([bin_of(1, np.ones((4, 3)))])["bins"][0]
    assert row["n"] == 4 and row["snr"] is None and row["ci95"] is None and not row["counts"]


def test_bins_and_their_edges() -> None:
    counts = {0: 0, 1: 1, 4: 1, 5: 2, 16: 4, 17: 5, 31: 8, 32: 9}  # of 32 right
    assert {right: bin_index(right / 32, 32) for right in counts} == counts
    edges = {index: bin_of(index, np.ones((2, 1))).edges for index in range(10)}
    assert edges[0] == (0, 0) and edges[9] == (1, 1) and edges[1] == (0, 0.125) and edges[8][1] == 1
    assert [bin_index(right / 8, 8) for right in range(9)] == [
        *range(9)[:8],
        9,
    ]  # K = 8: each alone


def test_what_the_best_weight_follows_by_hand() -> None:
    made = bin_of(3, np.array([[1.0, 0], [0, 1], [1, 2]]))  # U = 1, V = 4/3
    assert made.snr[0] == pytest.approx(0.75) and made.pull[0] == pytest.approx(0.75)
    longer = bin_of(3, np.array([[2.0, 0], [0, 2], [2, 4]]))  # U = 4, V = 16/3
    assert longer.snr[0] == pytest.approx(0.75) and longer.pull[0] == pytest.approx(2 / (16 / 3))


def test_unit_gradients_do_not_hang_on_a_large_one() -> None:
    g = np.array([[1.0, 0], [3, 0], [0, 5], [0, 0]])
    unit = bin_of(3, g).unit
    assert (
        unit.vectors == pytest.approx(np.array([[1, 0], [1, 0], [0, 1]])) and len(unit.rates) == 3
    )
    # pairs: cosines 1, 0, 0 -> U = 1/3; |difference|^2 / 2 = 0, 1, 1 -> V = 2/3
    assert unit.snr[0] == pytest.approx(0.5)
    rng = np.random.default_rng(0)
    same = rng.normal(size=(80, 30)) + 0.6
    scale = np.exp(1.6 * rng.normal(size=(80, 1)))
    assert bin_of(3, same * scale).unit.snr[0] == pytest.approx(
        bin_of(3, same).unit.snr[0], rel=1e-5
    )


def test_bins_are_resampled_apart() -> None:
    g = np.random.default_rng(0).normal(size=(30, 8)) + 0.5
    one, other = bin_of(3, g), bin_of(4, g)
    assert one.snr[0] == other.snr[0] and not np.allclose(one.snr[1:], other.snr[1:])


def test_the_protocol_says_what_it_does() -> None:
    assert f"from {snr.LEAST} problems on" in report.snr.MEANING
    assert "from {:g} to {:g}".format(*snr.MIDDLE) in report.snr.MEANING


# -- fit and verdict ----------------------------------------------------------------------------

RATES = (0.06, 0.2, 0.33, 0.5, 0.7, 0.94)


def kernel(alpha: float, beta: float, noise: float = 0.0) -> tuple[list[Any], list[np.ndarray]]:
    rng = np.random.default_rng(1)
    values = [
        0.02 * p**alpha * (1 - p) ** beta * np.exp(noise * np.r_[0, rng.normal(size=500)])
        for p in RATES
    ]
    return [SimpleNamespace(rate=p) for p in RATES], values


def test_the_fit_recovers_the_exponents() -> None:
    found = fit(*kernel(0.7, 1.6, noise=0.1))
    assert found is not None
    assert (found["alpha"], found["beta"]) == pytest.approx((0.7, 1.6))
    assert found["scale"] == pytest.approx(0.02)
    for name, true in (("alpha", 0.7), ("beta", 1.6)):
        low, high = found[f"{name}_ci95"]
        assert low < true < high < low + 0.5
    assert found["kernels"]["fitted"] == pytest.approx({"delta": 0, "lost": 0}, abs=1e-9)
    # against alpha = beta = 1 the residual is -0.3 log p + 0.6 log(1-p), over its range
    residual = [-0.3 * np.log(p) + 0.6 * np.log(1 - p) for p in RATES]
    delta = (max(residual) - min(residual)) / 2
    expected = {"delta": delta, "lost": np.tanh(delta) ** 2}
    assert found["kernels"]["alpha = beta = 1"] == pytest.approx(expected)


def test_a_bin_that_is_positive_by_luck_counts_for_nothing() -> None:
    bins, values = kernel(0.7, 1.6, noise=0.02)
    rng = np.random.default_rng(2)
    values[3] = np.r_[1e-7, 0.005 * rng.normal(size=500)]
    found = fit(bins, values)
    assert found is not None and found["alpha"] == pytest.approx(0.7, abs=0.02)
    assert found["kernels"]["fitted"]["delta"] < 0.05  # nor is it in delta


def test_noisy_bins_count_less() -> None:
    bins, values = kernel(1.0, 0.5, noise=0.02)
    rng = np.random.default_rng(2)
    values[0] = values[0][0] * 9 * np.exp(3 * np.r_[0, rng.normal(size=500)])  # far off, and unsure
    found = fit(bins, values)
    assert found is not None and found["alpha"] == pytest.approx(1.0, abs=0.05)


def test_bins_without_signal_are_left_out_and_named() -> None:
    bins, values = kernel(0.7, 1.6)
    values[2] = -values[2]
    found = fit(bins, values)
    assert found is not None and found["skipped"] == [0.33] and found["bins"] == 5
    assert found["alpha"] == pytest.approx(0.7)
    for place in (0, 1):
        values[place] = -values[place]
    assert fit(bins, values) is None


def test_the_bound_on_what_a_weight_loses() -> None:
    """1 - (E e^eps)^2 / E e^(2 eps) <= tanh^2(delta) for |eps| <= delta, reached by two points."""
    rng = np.random.default_rng(0)
    for delta in (0.1, 0.4, 1.5):
        share = np.exp(-delta) / (2 * np.cosh(delta))
        two, mass = np.exp(np.array([delta, -delta])), np.array([share, 1 - share])
        assert 1 - (mass @ two) ** 2 / (mass @ two**2) == pytest.approx(np.tanh(delta) ** 2)
        for _ in range(50):
            any_, weight = np.exp(rng.uniform(-delta, delta, 9)), rng.dirichlet(np.ones(9))
            assert 1 - (weight @ any_) ** 2 / (weight @ any_**2) <= np.tanh(delta) ** 2


def at(index: int, level: float) -> Any:
    draws = level + 0.001 * np.r_[0, np.random.default_rng(index).normal(size=400)]
    rate = {0: 0.0, INTERIOR + 1: 1.0}.get(index, (index - 0.5) / INTERIOR)
    return SimpleNamespace(index=index, rate=rate, snr=draws)


@pytest.mark.parametrize(("ends", "bell"), [
    ((0.001, 0.002), "yes"), ((0.02, 0.001), "cannot tell"), ((0.04, 0.001), "no"), ((0.001, 0.04), "no"), ((0.001, None), "cannot tell"),
])  # fmt: skip
def test_the_bell_needs_both_ends_lower_than_the_middle(
    ends: tuple[float | None, float | None], bell: str
) -> None:
    outer = [at(i, level) for i, level in zip((0, INTERIOR + 1), ends, strict=True) if level]
    # bins 3 to 6 lie from 0.25 to 0.75; the others do not count as the middle
    found = extremes([*outer, at(3, 0.018), at(4, 0.022), at(5, 0.02), at(1, 0.9), at(8, 0.7)])
    assert found["bell"] == bell
    assert found["middle"]["snr"] == pytest.approx(0.02)
    assert found["ends"]["p = 0"]["difference"] == pytest.approx((ends[0] or 0) - 0.02, abs=1e-9)


# -- gradients ----------------------------------------------------------------------------------


def small() -> tuple[HFModel, HFModel, list[Example]]:
    student, teacher = tiny_model(0), tiny_model(1).freeze()
    student.model.eval()
    examples = [
        Example(
            str(i), tuple(range(5, 8 + i)), tuple((11 * i + 3 * t) % 250 for t in range(4 + 5 * i))
        )
        for i in range(3)
    ]
    return student, teacher, examples


@pytest.mark.parametrize("objective", [forward_kl, reverse_kl])
def test_gradients_are_those_of_the_mean_over_the_response(objective: Any) -> None:
    student, teacher, examples = small()
    project = Projection(student.model, 10**9)
    assert project.dimensions == project.parameters  # exact
    vectors, losses, norms = snr.gradients(student, teacher, examples, objective, project)
    for row, e in enumerate(examples):
        ids = torch.tensor([(*e.prompt, *e.response)])
        logps = [
            m.model(ids).logits[0, len(e.prompt) - 1 : -1, : student.vocabulary].log_softmax(-1)
            for m in (teacher, student)
        ]
        loss = objective.value(*logps).mean()
        student.model.zero_grad()
        loss.backward()
        flat = torch.cat([
            (p.grad * s).flatten()  # type: ignore[operator]
            for p, s in zip(project.tensors, project.signs, strict=True)
        ])  # fmt: skip
        assert losses[row] == pytest.approx(loss.item(), rel=1e-4)
        assert norms[row] == pytest.approx(float(flat.norm()), rel=1e-4)
        assert vectors[row] == pytest.approx(flat.numpy(), rel=1e-3, abs=1e-6)


def test_the_projection_keeps_inner_products() -> None:
    student, teacher, examples = small()
    exact, _, norms = snr.gradients(
        student, teacher, examples, forward_kl, Projection(student.model, 10**9)
    )
    assert np.linalg.norm(exact, axis=1) == pytest.approx(norms, rel=1e-4)
    off = []
    for seed in range(6):
        project = Projection(student.model, 2039, seed)
        assert project.dimensions == 2039
        vectors, _, same = snr.gradients(student, teacher, examples, forward_kl, project)
        assert same == pytest.approx(norms, rel=1e-5)
        off.append(
            vectors @ vectors.T / np.outer(norms, norms) - exact @ exact.T / np.outer(norms, norms)
        )
    assert np.abs(off).max() < 0.2 and np.abs(np.mean(off, axis=0)).max() < 0.06


def test_the_projections_signs_are_random() -> None:
    """Without them a gradient of one sign would add up: (D / d)^2 d instead of D."""
    network = torch.nn.Linear(200, 100, bias=False)
    network.weight.grad = torch.ones_like(network.weight)
    vector, norm = Projection(network, 401)()
    assert norm == pytest.approx(20_000**0.5)
    assert float(vector @ vector) == pytest.approx(20_000, rel=0.4)


# -- the command --------------------------------------------------------------------------------

SUITE: dict[str, Any] = {
    "name": "small",
    "student": "micro/either",
    "teacher": "micro/teacher",
    "problems": {"micro_math": {"n": 60, "levels": [1, 4, 5], "families": ["reduce"]}},
    "benchmarks": {"micro_math": {"limit": 8, "max_new_tokens": 64}},
    "seeds": 1,
    "budget": {"steps": 2},
    "methods": {"sft": {"samples": 2}},
    "training": {"batch_size": 4},
    "sampling": {"max_new_tokens": 120},
    "threads": 1,
}


def test_the_command_measures_prints_and_reads_what_it_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(snr, "LEAST", 4)
    (tmp_path / "small.yaml").write_text(json.dumps(SUITE))
    seen: list[tuple[str, list[Example]]] = []
    drawn: list[tuple[int, bool]] = []
    take, samples = snr.gradients, Workbench.samples

    def gradients(student: Any, teacher: Any, examples: Any, objective: Any, *rest: Any) -> Any:
        seen.append((objective.name, examples))
        assert rested.pop() is student  # nothing that writes holds memory meanwhile
        return take(student, teacher, examples, objective, *rest)

    rested: list[Any] = []
    monkeypatch.setattr(HFModel, "rest", lambda self: rested.append(self))

    def sampled(lab: Any, model: Any, n: int = 1, **given: Any) -> Any:
        drawn.append((n, given.get("on_policy", False)))
        return samples(lab, model, n, **given)

    monkeypatch.setattr(snr, "gradients", gradients)
    monkeypatch.setattr(Workbench, "samples", sampled)
    words = ["snr", "small.yaml", "--rollouts", "6", "--per-bin", "12", "--dimensions", "500"]
    done = CliRunner().invoke(cli.app, words, env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.output
    for text in (
        "forward KL, teacher's response",
        "reverse KL, student's response",
        "bell curve",
        "of unit gradients",
    ):
        assert text in done.output
    found = json.loads((tmp_path / "results/small/snr.json").read_text())
    assert found["dimensions"] == 500 and found["rollouts"] == 6 and found["problems"] == 60
    forward, reverse = found["losses"].values()
    assert [(r["p"], r["n"]) for r in forward["bins"]] == [
        (r["p"], r["n"]) for r in reverse["bins"]
    ]
    for loss in (forward, reverse):
        assert [row["p"] for row in loss["bins"]] == sorted(row["p"] for row in loss["bins"])
        assert loss["bins"][0]["p"] == 0 and loss["bins"][-1]["p"] == 1
        assert all(2 <= row["n"] <= 12 and row["loss"] > 0 for row in loss["bins"])
        assert all(low <= high for low, high in (row["ci95"] for row in loss["bins"]))
        assert loss["bell"] in ("yes", "no", "cannot tell")
    # the same problems, each loss on its own author's text; the student's is no rollout that counted
    half = len(seen) // 2
    assert {name for name, _ in seen[:half]} == {"forward_kl"}
    assert {name for name, _ in seen[half:]} == {"reverse_kl"}
    for (_, taught), (_, own) in zip(seen[:half], seen[half:], strict=True):
        assert [e.problem for e in taught] == [e.problem for e in own]
        assert [e.response for e in taught] != [e.response for e in own]
    assert [on for n, on in drawn if n == 1] == [True] * half
    answers = {
        p.id: p.answer
        for p in problems.load("micro_math", "train", **SUITE["problems"]["micro_math"])
    }
    decode = model("either").decode
    for _, examples in seen[:half]:
        for e in examples:
            assert decode(e.response).rpartition("</think>")[2].strip() == answers[e.problem]
    spent, charged = found["ledger"]["spent"], found["ledger"]["charged"]
    assert spent["trained"] == 0 and spent["student_generated"] > 0
    tokens = sum(len(e.prompt) + len(e.response) for _, examples in seen for e in examples)
    assert charged["teacher_scored"] == spent["teacher_scored"] == tokens
    page = (tmp_path / "results/small/snr.html").read_text()
    assert page.count('<svg class="chart"') == 2 and "measured" in page

    def refuse(*_: Any) -> None:
        raise AssertionError("this bin was finished")

    monkeypatch.setattr(snr, "gradients", refuse)
    again = snr.measure("small.yaml", rollouts=6, per_bin=12, dimensions=500, quiet=True)
    assert json.loads(json.dumps(again["losses"])) == found["losses"]
    assert again["ledger"]["charged"]["teacher_scored"] == tokens
    assert again["ledger"]["spent"]["teacher_scored"] == 0


def test_responses_that_training_would_drop_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snr, "LEAST", 4)
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps({**SUITE, "training": {"max_length": 60}}))
    found = snr.measure(path, rollouts=4, per_bin=8, dimensions=50, quiet=True, results=tmp_path)
    assert found["without_reference"] > 5
    assert [row["p"] for row in found["losses"]["forward KL, teacher's response"]["bins"]]


def test_bins_too_small_to_count_are_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a bin counts from 50 problems on; take at least 50"):
        snr.measure("paced-frontier", per_bin=49, results=tmp_path / "r", quiet=True)
    assert not (tmp_path / "r").exists()


def test_the_report_of_a_comparison_shows_it(tmp_path: Path) -> None:
    row = {
        "low": 0.0,
        "high": 0.0,
        "p": 0.0,
        "n": 60,
        "counts": True,
        "snr": 0.004,
        "ci95": [0, 0.01],
        "loss": 1.5,
    }
    row |= {"unit_snr": 0.1, "unit_ci95": [0.05, 0.2], "norm": 9.0, "norm_spread": 1.25}
    other = {
        **row,
        "low": 0.25,
        "high": 0.5,
        "p": 0.4,
        "n": 12,
        "counts": False,
        "snr": None,
        "ci95": None,
    }
    made = fit(*kernel(0.7, 1.6, noise=0.1))
    end = {"difference": -0.026, "ci95": [-0.04, -0.01], "is": "lower"}
    loss = {"bins": [row, other], "fit": made, "best_weight": None, "unit_fit": None}
    loss |= {
        "bell": "cannot tell",
        "middle": {"snr": 0.03, "ci95": [0.02, 0.05]},
        "ends": {"p = 0": end},
    }
    loss |= {"unit_bell": "cannot tell", "unit_middle": None, "unit_ends": {}}
    found = {
        "name": "x",
        "rollouts": 32,
        "problems": 99,
        "without_reference": 7,
        "dimensions": 8191,
        "parameters": 9999,
    }
    found |= {"losses": {"reverse KL": loss}}
    assert report.snr.table(loss)[1][2:4] == ["12, too few", "–"]
    line, unit = report.snr.sentences(found)
    assert line == (
        "reverse KL: cannot tell whether there is a bell curve: SNR 0.0300 (0.0200 to 0.0500) in the middle; "
        "at p = 0 lower (−0.0260, −0.0400 to −0.0100)"
    )
    assert unit == (
        "reverse KL, unit gradients: cannot tell whether there is a bell curve, as no bin from 0.25 to 0.75 has 50 problems"
    )
    assert report.snr.fed_back(loss) == "As fields of paced: alpha: 0.70, beta: 1.60"
    negative = {**loss, "fit": {**(made or {}), "alpha": -0.3}}  # paced takes none below 0
    assert report.snr.fed_back(negative) == "As fields of paced: alpha: 0.00, beta: 1.60"
    assert report.snr.exponents(loss)[1] == ["of |g| / V", *["–"] * 3]
    from tests.harness.test_report import example

    folder = example(tmp_path / "c")
    (folder / "snr.json").write_text(json.dumps(found))
    report.write(folder)
    for name in ("report.md", "report.html"):
        text = (folder / name).read_text()
        for said in (
            "Signal-to-noise by pass rate",
            "SNR 0.0300",
            "alpha: 0.70, beta: 1.60",
            "7 problems passed",
        ):
            assert said in text
