"""Statistics: numbers worked out by hand, brute force, and simulated coverage."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from harness import statistics as st

# --- estimators --------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 3), (6, 1, 2), (4, 0, 1), (4, 4, 4), (7, 5, 3)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n, c, k):
    outcomes = [1] * c + [0] * (n - c)
    subsets = list(itertools.combinations(outcomes, k))
    assert st.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_wants_enough_samples():
    with pytest.raises(ValueError, match="n=4"):
        st.pass_at_k(4, 2, 5)
    with pytest.raises(ValueError, match="7 right"):
        st.pass_at_k(4, 7, 2)


def majority_by_enumeration(answers, correct, k):
    total = []
    for subset in itertools.combinations(range(len(answers)), k):
        votes = {}
        for i in subset:
            key = "right" if correct[i] else answers[i]
            if key is not None:
                votes[key] = votes.get(key, 0) + 1
        best = [key for key, count in votes.items() if count == max(votes.values())]
        total.append(("right" in best) / max(1, len(best)))
    return sum(total) / len(total)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 7])
def test_maj_at_k_equals_enumeration(k):
    answers = ["4", "5", "4.0", None, "5", "6", "5"]
    correct = [True, False, True, False, False, False, False]
    expected = majority_by_enumeration(answers, correct, k)
    assert st.maj_at_k(answers, correct, k) == pytest.approx(expected)


def test_maj_at_k_by_hand():
    # Two right ones (written differently), two times "7": a tie of two.
    assert st.maj_at_k(["1/2", "0.5", "7", "7"], [True, True, False, False]) == 0.5
    assert st.maj_at_k([None, None], [False, False]) == 0.0
    with pytest.raises(ValueError, match="n=2"):
        st.maj_at_k(["1", "2"], [True, False], 3)


def test_pass_at_of_outcomes_scores_each_problem():
    # Problem 0: 1 of 4 right, pass@2 = 1 - C(3,2)/C(4,2) = 1/2. Problem 1: 3 of 4, 1 - 0 = 1.
    outcomes = st.Outcomes("b", {"a": [[[1, 0, 0, 0], [1, 1, 1, 0]]]}).pass_at(2)
    assert outcomes["a"].mean(2).tolist() == [[0.5, 1.0]]


# --- by hand -----------------------------------------------------------------------------------

A = np.array([[1, 1, 1, 1], [0, 1, 0, 0]])[..., None]  # [2 seeds, 4 problems, 1 sample]
B = np.array([[0, 1, 0, 0]] * 3)[..., None]  # [3, 4, 1]


def test_seed_variance_by_hand():
    # A: seed means 1 and 1/4, grand 5/8, mean square 2 (3/8)^2 / 1 = 9/32; residuals of seed 0 are 1/8 three times and -3/8
    # once, squares 12/64, both seeds 3/8, over P 3/32. B: none. Degrees of freedom 1 + 2, and 3 + 6.
    found = st.seed_variance([A.mean(2), B.mean(2)])
    assert found == pytest.approx((9 / 32 / 3, 3 / 32 / 9, 3, 9))
    assert found.component == pytest.approx(3 / 32 - 1 / 96)


def test_difference_by_hand():
    # d = (1/2, 0, 1/2, 1/2): mean 3/8, s^2 = 1/16, s^2/P = 1/64. Seeds: (1/2 + 1/3) 1/12 = 5/72. V = 49/576.
    found = st.difference(A, B, st.seed_variance([A.mean(2), B.mean(2)]))
    assert found.value == pytest.approx(3 / 8)
    assert found.se == pytest.approx(7 / 24)
    bottom = (1 / 64) ** 2 / 3 + (5 / 6 * 3 / 32) ** 2 / 3 + (5 / 6 / 96) ** 2 / 9
    assert found.df == pytest.approx((49 / 576) ** 2 / bottom) == pytest.approx(3.40673, abs=1e-4)
    assert found.p == pytest.approx(2 * stats.t.sf(9 / 7, found.df))  # t = (3/8) / (7/24)
    assert found.ci95[0] == pytest.approx(3 / 8 - stats.t.ppf(0.975, found.df) * 7 / 24)
    assert found.ci95[1] == 1.0  # 1.24 is no difference of fractions


def test_an_untrained_arm_has_no_seed_variance():
    # Same d, but only A's two seeds vary: V = 1/64 + (1/2)(9/32 - 1/32) = 9/64.
    seeds = st.seed_variance([A.mean(2)])
    found = st.difference(A, B[:1], seeds, (True, False))
    assert found.se == pytest.approx(3 / 8)
    assert found.df == 1.0  # 81 / (1/3 + 81 + 1/3) = 0.99, but no less than that of the seeds


def test_mde_is_detected_with_80_percent_power():
    found = st.Estimate(0.0, 0.02, 4.3)
    noncentral = stats.nct(found.df, found.mde / found.se)
    assert noncentral.sf(stats.t.ppf(0.975, found.df)) == pytest.approx(0.8, abs=1e-6)
    assert st.Estimate(0.0, 0.01, 1e6).mde == pytest.approx((1.95996 + 0.84162) * 0.01, rel=1e-4)


def test_holm_by_hand():
    # .005 x 4 = .02; .01 x 3 = .03; .03 x 2 = .06; .04 x 1 = .04, but never below the one before: .06.
    assert st.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert st.holm([0.6, 0.7]) == [1.0, 1.0]
    assert st.holm([]) == []


def test_wilson_by_hand():
    # 8 of 10, z = 1.96: (0.8 + 0.19207 -+ 1.96 sqrt(0.016 + 0.009604)) / 1.38415
    ten = np.array([1] * 8 + [0] * 2).reshape(1, 10, 1)
    assert st.interval(ten) == pytest.approx([0.49016, 0.94331], abs=1e-4)
    assert st.interval(ten * 0) == pytest.approx([0, 0.27753], abs=1e-4)  # z^2 / (n + z^2)


def test_samples_of_a_problem_are_a_cluster():
    once = np.array([1, 0] * 20).reshape(1, 40, 1)
    same = np.repeat(once, 8, axis=2)  # eight equal samples tell no more than one
    mixed = np.array([[1, 0] * 4] * 40).reshape(1, 40, 8)  # problems all alike: 320 free samples
    width = {k: np.diff(st.interval(y))[0] for k, y in {"1": once, "8": same, "m": mixed}.items()}
    assert width["8"] >= width["1"]
    assert width["m"] < width["1"] / 2


# --- the summary -------------------------------------------------------------------------------


def arm(rates, seeds, problems=400, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.random((seeds, problems, 1)) < rates).astype(float)


def test_families_and_verdicts():
    outcomes = st.Outcomes(
        "b",
        {
            "base": arm(0.2, 1),
            "sft": arm(0.5, 3, seed=1),
            "good": arm(0.8, 3, seed=2),
            "bad": arm(0.3, 3, seed=3),
            "same": arm(0.5, 3, seed=1),
        },
    )
    summary = st.summarise(outcomes, "sft")
    pairs = {(row["a"], row["b"]): row for row in summary.pairs}
    family = [key for key, row in pairs.items() if row["family"] == "reference"]
    assert family == [("good", "sft"), ("bad", "sft"), ("same", "sft")]
    assert [key for key, row in pairs.items() if row["family"] == "base"] == [
        (name, "base") for name in ("sft", "good", "bad", "same")
    ]
    assert [key for key, row in pairs.items() if row["exploratory"]] == [
        ("good", "bad"),
        ("good", "same"),
        ("bad", "same"),
    ]
    assert len(pairs) == 10
    assert pairs["good", "sft"]["verdict"] == "better"
    assert pairs["bad", "sft"]["verdict"] == "worse"
    assert pairs["sft", "base"]["verdict"] == "better"
    same = pairs["same", "sft"]
    assert (same["delta"], same["p"], same["p_holm"]) == (0, 1, 1)
    assert same["verdict"] == "cannot tell"
    assert same["mde"] > 0
    in_family = [row for row in summary.pairs if not row["exploratory"]]
    assert [row["p_holm"] for row in in_family] == st.holm([row["p"] for row in in_family])
    assert all(row["p_holm"] is None for row in summary.pairs if row["exploratory"])


def test_swapping_a_pair_turns_its_sign():
    a, b = arm(0.6, 3, seed=4), arm(0.5, 3, seed=5)
    seeds = st.seed_variance([a.mean(2), b.mean(2)])
    there, back = st.difference(a, b, seeds), st.difference(b, a, seeds)
    assert there.value == -back.value
    assert there.se == back.se
    assert there.ci95 == pytest.approx([-x for x in reversed(back.ci95)])


def test_identical_arms_leave_room_for_a_difference():
    y = arm(0.5, 1, problems=50)
    found = st.difference(y, y, trained=(False, False))
    assert (found.value, found.p) == (0.0, 1.0)
    # One outcome of 50 turned: se = 1/50.
    assert found.se == pytest.approx(1 / 50)
    assert found.ci95[0] < 0 < found.ci95[1]


def test_repeats_of_base_are_no_training_seeds():
    runs = {"sft": arm(0.5, 3, seed=1), "x": arm(0.6, 3, seed=2)}
    several = {"base": np.stack([arm(rate, 1)[0] for rate in (0.1, 0.5, 0.9)]), **runs}
    once = {"base": arm(0.2, 1), **runs}
    first, second = (
        st.summarise(st.Outcomes("b", arms), "sft").pairs[0] for arms in (several, once)
    )
    assert (first["a"], first["se"]) == (second["a"], second["se"])


def test_one_seed_gives_no_verdict_on_methods():
    outcomes = st.Outcomes("b", {"base": arm(0.1, 1), "sft": arm(0.5, 1), "good": arm(0.9, 1)})
    for row in st.summarise(outcomes, "sft").pairs:
        assert row["p"] < 1e-6
        assert row["verdict"] == "cannot tell"
        assert row["note"] == st.ONE_SEED


def test_one_problem_gives_no_interval():
    outcomes = st.Outcomes("b", {"base": [[[0]]], "sft": [[[1]], [[1]]]})
    (row,) = st.summarise(outcomes, "sft").pairs
    assert (row["ci95"], row["p"], row["mde"], row["verdict"]) == ([-1, 1], 1, None, "cannot tell")
    assert row["note"] == st.ONE_PROBLEM


def test_reference_may_be_base_and_must_be_there():
    outcomes = st.Outcomes("b", {"base": arm(0.2, 1), "sft": arm(0.5, 2), "x": arm(0.5, 2)})
    families = [(r["a"], r["b"], r["family"]) for r in st.summarise(outcomes, "base").pairs]
    assert families == [("sft", "base", "base"), ("x", "base", "base"), ("sft", "x", None)]
    with pytest.raises(ValueError, match="'sfft' is not among"):
        st.summarise(outcomes, "sfft")


def test_outcomes_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="differ in their problems"):
        st.Outcomes("b", {"a": np.zeros((1, 3, 1)), "b": np.zeros((1, 4, 1))})
    with pytest.raises(ValueError, match=r"expected \[seeds, problems, samples\]"):
        st.Outcomes("b", {"a": np.zeros((3, 4))})
    with pytest.raises(ValueError, match="outside 0 to 1"):
        st.Outcomes("b", {"a": np.full((1, 2, 1), 2)})
    with pytest.raises(ValueError, match="2 seeds"):
        st.Outcomes("b", {"a": np.zeros((1, 3, 1))}, seeds={"a": (0, 1)})


# --- records -----------------------------------------------------------------------------------


def records(table):
    """{(method, seed): {problem: [correct, ...]}} as rows."""
    return [
        {
            "benchmark": "b",
            "method": method,
            "seed": seed,
            "data_seed": 0,
            "problem": problem,
            "sample": index,
            "correct": bool(correct),
            "status": "ok" if correct else "unparsed",
            "truncated": problem == "p10",
            "extracted": "1" if correct else None,
        }
        for (method, seed), run in table.items()
        for problem, samples in run.items()
        for index, correct in enumerate(samples)
    ]


TABLE = {
    ("base", 0): {"p2": [0, 0], "p10": [0, 1]},
    ("sft", 1): {"p10": [1, 1], "p2": [0, 0]},
    ("sft", 0): {"p2": [1, 0], "p10": [1, 1]},
}


def test_records_are_aligned_by_problem_and_seed():
    rows = records(TABLE)
    found = st.from_records(rows)["b"]
    # sorted by id: p10, p2
    assert found["sft"].tolist() == [[[1, 1], [1, 0]], [[1, 1], [0, 0]]]
    assert found.seeds["sft"] == (0, 1)
    turned = st.from_records(pa.Table.from_pylist(rows[::-1]), arms=["base", "sft", "absent"])["b"]
    assert list(turned.arms) == ["base", "sft"]
    assert turned["base"].tolist() == [[[0, 1], [0, 0]]]  # samples by their index
    assert st.summarise(turned, "sft") == st.summarise(found, "sft")


def test_cells_count_what_was_cut_or_unreadable():
    summary = st.summarise_records(records(TABLE), "sft")
    cells = {(row["method"], row["seed"]): row for row in summary.cells}
    assert cells["sft", 0]["accuracy"] == 0.75
    assert (cells["sft", 0]["n_problems"], cells["sft", 0]["n_samples"]) == (2, 2)
    assert (cells["sft", 0]["truncated"], cells["sft", 0]["unparsed"]) == (2, 1)
    assert cells["sft", 0]["pass_at_k"] == {"1": 0.75, "2": 1.0}
    assert cells["sft", 0]["maj_at_k"] == {"1": 0.75, "2": 1.0}
    arms = {row["method"]: row for row in summary.arms}
    assert arms["sft"]["unparsed"] == 3
    assert arms["sft"]["seed_sd"] == pytest.approx(0.25 / math.sqrt(2))


def test_majorities_and_disputes_of_records():
    def row(sample, extracted, correct, second, domain="math", method="sft"):
        return {
            "benchmark": "b", "method": method, "seed": 0, "problem": "p", "sample": sample,
            "correct": correct, "extracted": extracted, "second": second, "domain": domain,
        }  # fmt: skip

    rows = [  # two spellings of one wrong answer outvote the right one
        row(0, r"\frac{1}{2}", False, "wrong"),
        row(1, r"\dfrac12", False, "wrong"),
        row(2, "7.0", True, "wrong"),
        row(3, None, False, None),
    ]
    summary = st.summarise_records(rows, None)
    (cell,) = summary.cells
    # of two samples: the right one wins against none, ties with a wrong one
    assert cell["maj_at_k"] == pytest.approx({"1": 0.25, "2": (1 + 0.5 + 0.5) / 6, "4": 0.0})
    assert cell["disputed"] == summary.arms[0]["disputed"] == 1
    assert summary.arms[0]["maj_at_k"] == cell["maj_at_k"]
    assert st.summarise_records(pa.Table.from_pylist(rows), None) == summary
    (programs,) = st.summarise_records(
        [{**r, "domain": "code", "second": None} for r in rows], None
    ).cells
    assert not {"maj_at_k", "disputed"} & programs.keys() and "pass_at_k" in programs


@pytest.mark.parametrize(
    ("n", "expected"), [(1, [1]), (2, [1, 2]), (5, [1, 2, 4, 5]), (8, [1, 2, 4, 8])]
)
def test_the_k_that_are_reported(n, expected):
    assert st.sizes(n) == expected


def test_missing_problems_and_double_rows_are_refused():
    rows = records(TABLE)
    with pytest.raises(ValueError, match=r"'sft' seed 1 lacks 1 of 2 problems.*'p10'"):
        st.from_records([r for r in rows if (r["seed"], r["problem"]) != (1, "p10")])
    with pytest.raises(ValueError, match="two rows for sample 0"):
        st.from_records([*rows, rows[0]])
    with pytest.raises(ValueError, match="1 samples of some problems and 2 of others"):
        st.from_records(rows[:-1])


# --- simulated ---------------------------------------------------------------------------------


def simulate(rng, arms, seeds, problems, seed_sd, n=1):
    """Arms of one true accuracy: problems of all difficulties, arms that differ on problems, seeds that differ in skill."""
    problem = rng.beta(0.8, 0.8, size=(1, 1, problems))
    rate = (
        problem
        + 0.1 * rng.standard_normal((arms, 1, problems))
        + seed_sd * rng.standard_normal((arms, seeds, 1))
        + 0.1 * rng.standard_normal((arms, seeds, problems))
    )
    return rng.random((arms, seeds, problems, n)) < np.clip(rate, 0, 1)[..., None]


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("seed_sd", [0.02, 0.05])
def test_interval_covers_and_the_test_holds_its_level(seeds, seed_sd):
    """95 % intervals cover at least 93 %, type I at most 5.5 %, each with 2.6 standard errors of the simulation."""
    rng = np.random.default_rng(seeds)
    rounds, outside = 2000, 0
    for _ in range(rounds):
        y = simulate(rng, 3, seeds, 300, seed_sd).astype(float)
        found = st.difference(y[0], y[1], st.seed_variance(y.mean(3)))
        low, high = found.ci95
        assert (found.p < 0.05) == (not low <= 0 <= high)
        outside += found.p < 0.05
    assert outside / rounds <= 0.055 + 2.6 * math.sqrt(0.05 * 0.95 / rounds)


def test_the_family_errs_in_at_most_5_percent_of_experiments():
    rng = np.random.default_rng(7)
    rounds, false = 500, 0
    for _ in range(rounds):
        y = simulate(rng, 4, 3, 300, 0.02).astype(float)
        names = dict(zip(("sft", "a", "b", "c"), y, strict=True))
        pairs = st.summarise(st.Outcomes("b", names), "sft").pairs
        false += any(row["verdict"] != "cannot tell" for row in pairs if not row["exploratory"])
    assert false / rounds <= 0.05 + 2.6 * math.sqrt(0.05 * 0.95 / rounds)


def test_a_difference_of_the_mde_is_found_four_times_in_five():
    rng = np.random.default_rng(3)
    rounds, found = 1500, 0
    for _ in range(rounds):
        y = (
            0.5
            + 0.1 * rng.standard_normal((3, 5, 300, 1))
            + 0.03 * rng.standard_normal((3, 5, 1, 1))
        )
        # true standard error: (2/5)(.03^2 + .1^2/300), with 12 degrees of freedom
        se = math.sqrt(0.4 * (0.03**2 + 0.01 / 300))
        y[0] += st.Estimate(0.0, se, 12.0).mde
        found += st.difference(y[0], y[1], st.seed_variance(y.mean(3))).p < 0.05
    assert found / rounds == pytest.approx(0.8, abs=0.035)


def test_interval_of_an_arm_covers():
    rng = np.random.default_rng(11)
    rounds, inside = 1500, 0
    for _ in range(rounds):
        y = simulate(rng, 3, 3, 300, 0.02).astype(float)
        low, high = st.interval(y[0], st.seed_variance(y.mean(3)))
        inside += low <= 0.5 <= high
    assert inside / rounds >= 0.93


def test_bootstrap_agrees_with_the_closed_form():
    rng = np.random.default_rng(5)
    y = simulate(rng, 2, 40, 300, 0.05, n=2).astype(
        float
    )  # many seeds, so that both know the variance
    closed = st.difference(y[0], y[1], st.seed_variance(y.mean(3)))
    drawn = st.bootstrap(y[0], y[1], resamples=400)
    assert drawn.delta == pytest.approx(closed.value)
    assert drawn.se == pytest.approx(closed.se, rel=0.2)
    assert st.bootstrap(y[0], y[1], resamples=50) == st.bootstrap(y[0], y[1], resamples=50)


def test_bootstrap_of_seeds_alone_is_unbiased():
    # Seeds at 0.2, 0.5, 0.8 on every problem: s^2 = 0.09, se = sqrt(0.09 / 3), against an arm that does not vary.
    a = np.broadcast_to(np.array([0.2, 0.5, 0.8])[:, None, None], (3, 10, 1))
    drawn = st.bootstrap(a, np.zeros((1, 10, 1)), trained=(True, False), resamples=4000)
    assert drawn.se == pytest.approx(math.sqrt(0.03), rel=0.04)
    df_2 = 4.30265 * drawn.se
    assert drawn.ci95 == pytest.approx((0.5 - df_2, 0.5 + df_2), rel=1e-4)


def test_bootstrap_covers_at_three_seeds():
    rng = np.random.default_rng(6)
    rounds, inside = 150, 0
    for _ in range(rounds):
        y = simulate(rng, 2, 3, 200, 0.03).astype(float)
        low, high = st.bootstrap(y[0], y[1], resamples=100).ci95
        inside += low <= 0 <= high
    assert inside / rounds >= 0.92


def test_bootstrap_of_samples_and_of_another_statistic():
    y = np.zeros((1, 20, 8))
    y[:, :, :4] = 1  # every problem alike: only the samples vary
    assert st.bootstrap(y, y, trained=(False, False), resamples=50).se == 0
    assert st.bootstrap(y, y, trained=(False, False), samples=True, resamples=50).se > 0
    worst = st.bootstrap(y, 0 * y, lambda z: float(z.mean((0, 2)).min()), resamples=20)
    assert worst.delta == 0.5
    with pytest.raises(ValueError, match="20 and 19"):
        st.bootstrap(y, y[:, 1:])
