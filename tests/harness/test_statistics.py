"""Statistics: numbers worked out by hand, brute force, and simulated coverage."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from scipy import integrate, optimize, stats

from harness import plan, standing
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


def ratio_by_quadrature(problems_part, rest, seeds_part, df, problems):
    """Half-width over se where problems alone give s^2/P, of which `rest` is no seed's noise."""
    se = math.sqrt(rest + seeds_part)

    def p(x, ratio):
        variance = rest + seeds_part * df / x
        freedom = (problems - 1) * max(1, variance / problems_part) ** 2
        return 2 * stats.t.sf(ratio * se / math.sqrt(variance), freedom) * stats.chi2.pdf(x, df)

    def excess(ratio):
        parts = [(1e-12, 1), (1, 10), (10, 200)]
        return sum(integrate.quad(p, *part, args=(ratio,), limit=200)[0] for part in parts) - 0.05

    return optimize.brentq(excess, 1, 40)


def test_difference_by_hand():
    # d = (1/2, 0, 1/2, 1/2): mean 3/8, s^2 = 1/16, s^2/P = 1/64. Seeds: 1/2 + 1/3 = 5/6 of 3/32 and of 1/96.
    # V = (1/64 - 5/576) + 5/64 = 49/576.
    found = st.difference(A, B, st.seed_variance([A.mean(2), B.mean(2)]))
    assert found.value == pytest.approx(3 / 8)
    assert found.se == pytest.approx(7 / 24)
    ratio = ratio_by_quadrature(1 / 64, 1 / 144, 5 / 64, 3, 4)
    assert stats.t.ppf(0.975, found.df) == pytest.approx(ratio, rel=1e-4)
    assert 2 < found.df < 4
    assert found.p == pytest.approx(2 * stats.t.sf(9 / 7, found.df))  # t = (3/8) / (7/24)
    assert found.ci95[0] == pytest.approx(3 / 8 - stats.t.ppf(0.975, found.df) * 7 / 24)
    assert found.ci95[1] == 1.0  # 1.24 is no difference of fractions


def test_an_untrained_arm_has_no_seed_variance():
    # Same d, but only A's two seeds vary: V = (1/64 - 1/64) + (1/2)(9/32) = 9/64.
    seeds = st.seed_variance([A.mean(2)])
    found = st.difference(A, B[:1], seeds, (True, False))
    assert found.se == pytest.approx(3 / 8)
    ratio = ratio_by_quadrature(1 / 64, 0.0, 9 / 64, 1, 4)
    assert stats.t.ppf(0.975, found.df) == pytest.approx(ratio, rel=1e-3)


def test_seeds_that_agree_more_than_their_noise_leave_the_problems():
    # Both seeds 1/2, on opposite problems: between 0, within (4 x 2 x 1/4) / 4 / 3 = 1/6; so V is one outcome turned, (1/8)^2.
    a = np.array([[1, 1, 0, 0], [0, 0, 1, 1]])[..., None]
    seeds = st.seed_variance([a.mean(2)])
    assert seeds == pytest.approx((0, 1 / 6, 1, 3))
    assert st.difference(a, a, seeds).se == pytest.approx(1 / 8)


def test_no_design_is_too_small_for_an_interval():
    rng = np.random.default_rng(9)
    for _ in range(300):
        y = rng.random((2, 2, 2, 1)) < rng.random()
        (row,) = st.pairs(st.Outcomes("b", {"base": y[0][:1], "x": y[1]}), "x")
        assert -1 <= row["ci95"][0] <= row["delta"] <= row["ci95"][1] <= 1
        assert row["df"] > 0 and row["mde"] > 0
    seeds = st.SeedVariance(1e-6, 2e-4, 1, 1)  # that agree by luck, on two problems
    assert 0 < st.estimate(np.array([0.0, 0.01]), seeds, 0.5).df < 1


@pytest.mark.parametrize(("seeds", "arms"), [(2, 1), (2, 2), (3, 2), (5, 4)])
def test_where_seeds_are_all_t_has_their_degrees_of_freedom(seeds, arms):
    found = st.planned(10**6, seeds, arms=arms, interaction=0.0, seed=0.01)
    assert found.se == pytest.approx(math.sqrt(2 / seeds * 0.01))
    assert found.df == pytest.approx(arms * (seeds - 1), rel=1e-3)


def test_a_planned_design_by_hand():
    # within (0.06 + 0.2/4)/400, s^2/P = 2 0.05/400 + within; V = that + (2/2) seed.
    found = st.planned(400, 2, 4, interaction=0.05, seed=0.0003, noise=0.06, sampling=0.2)
    assert found.se**2 == pytest.approx(0.1 / 400 + 0.11 / 400 + 0.0003)
    more = [st.planned(400, s, interaction=0.05, seed=0.0003, noise=0.1).mde for s in (2, 3, 5)]
    assert more == sorted(more, reverse=True)
    single = st.planned(400, 1, interaction=0.05, seed=0.0003, noise=0.1)
    assert (single.se**2, single.df) == pytest.approx((0.3 / 400, 399))


def test_a_plan_from_a_summary_is_what_the_summary_found():
    y = simulate(np.random.default_rng(2), 3, 3, 500, 0.04).astype(float)
    summary = st.summarise(st.Outcomes("b", dict(zip("abc", y, strict=True))), "a", base="")
    row = summary.pairs[0]
    assert summary.arms[0]["variance"]["seed"] > 0
    plan = st.planned(500, 3, arms=3, interaction=row["interaction"], **summary.arms[0]["variance"])
    assert (plan.se, plan.mde) == pytest.approx((row["se"], row["mde"]))


def test_single_samples_have_exact_tests_by_hand():
    # 5 problems only a solves, 1 only b: 2 (1 + 6) / 64 = 14/64.
    a, b = [1] * 5 + [0, 1, 0], [0] * 5 + [1, 1, 0]
    a, b = (np.array(y).reshape(1, 8, 1) for y in (a, b))
    assert st.mcnemar(a, b) == {"b": 5, "c": 1, "p": pytest.approx(14 / 64)}
    assert st.mcnemar(a, a) == {"b": 0, "c": 0, "p": 1.0}
    # By problem 2/3 to 1/3, 1 to 1/3, 0 to 2/3 and a draw: 2 to 1, p = 1.
    a = np.array([[[1, 1, 0], [1, 1, 1], [0, 0, 0], [1, 0, 0]]])
    b = np.array([[[1, 0, 0], [0, 0, 1], [1, 1, 0], [0, 0, 1]]])
    assert st.sign_test(a, b) == {"wins": 2, "losses": 1, "p": 1.0}
    several = {"base": a[:, :, :1], "x": np.concatenate([a, b])[:, :, :1], "y": b[:, :, :1]}
    rows = {(r["a"], r["b"]): r for r in st.pairs(st.Outcomes("b", several), "x")}
    assert rows["y", "base"]["mcnemar"]["b"] == int((b[..., 0] > a[..., 0]).sum())
    assert not {"mcnemar", "sign"} & rows["x", "base"].keys()
    rows = st.pairs(st.Outcomes("b", {"x": a, "y": b}), "y")
    assert rows[0]["sign"]["wins"] == 2 and "mcnemar" not in rows[0]


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


# --- ranks, the chance of being best, costs ----------------------------------------------------


def test_ranks_by_hand():
    accuracy = {"a": 0.6, "b": 0.5, "c": 0.5, "d": 0.1}
    rows = [("a", "b", 0.1, 0.04), ("a", "c", 0.1, 0.2), ("d", "a", -0.5, 0.01)]
    rows += [("b", "c", 0.0, 1.0), ("d", "b", -0.4, 0.01), ("c", "d", 0.4, 0.05)]
    rows = [dict(zip(("a", "b", "delta", "p_all"), row, strict=True)) for row in rows]
    assert standing.ranks(accuracy, rows) == {
        "a": {"rank": 1, "rank_ci95": [1, 2]},
        "b": {"rank": 2, "rank_ci95": [2, 3]},
        "c": {"rank": 2, "rank_ci95": [1, 4]},
        "d": {"rank": 4, "rank_ci95": [3, 4]},
    }


def test_ranks_rest_on_holm_over_all_pairs():
    y = {name: arm(0.5 + 0.06 * i, 3, seed=i) for i, name in enumerate(("sft", "x", "y", "z"))}
    rows = st.pairs(st.Outcomes("b", {"base": arm(0.3, 1), **y}), "sft")
    assert [row["p_all"] for row in rows] == st.holm([row["p"] for row in rows])
    assert len(rows) == 10


def test_chance_of_best_by_hand():
    # Two arms that never disagree in their variance: mean gap 0.1, sd of the gap from problems 0.5 on 100 of them.
    gap = np.repeat([0.6, -0.4], 50)
    found = standing.chance_of_best(
        {"x": gap, "y": np.zeros(100)}, {"x": 0, "y": 0}, lambda rng, n: np.zeros(n)
    )
    expected = stats.t.cdf(0.1 / (gap.std(ddof=1) / 10), 99)
    assert found["x"] == pytest.approx(expected, abs=0.006)
    # Seeds alone: gap 0.1, variance (1/2 + 1/4) 0.02.
    flat = {"x": np.full(50, 0.5), "y": np.full(50, 0.4)}
    found = standing.chance_of_best(flat, {"x": 0.5, "y": 0.25}, lambda rng, n: np.full(n, 0.02))
    assert found["x"] == pytest.approx(stats.norm.cdf(0.1 / math.sqrt(0.015)), abs=0.015)


def test_base_has_no_seeds_in_the_chance_of_being_best():
    y = {"base": arm(0.5, 1), "x": arm(0.47, 2, seed=1), "y": arm(0.41, 2, seed=1)}
    y["x"][0, :40] = y["y"][0, :40] = 1  # seeds that differ
    runs = {"base": 0.0, "x": 0.5, "y": 0.5}
    found = {r["method"]: r["p_best"] for r in st.summarise(st.Outcomes("b", y), "x").arms}
    pooled = st.seed_variance([y["x"].mean(2), y["y"].mean(2)])
    scores = {name: values.mean((0, 2)) for name, values in y.items()}
    assert found == standing.chance_of_best(scores, runs, pooled.draws)
    assert found != standing.chance_of_best(scores, {**runs, "base": 1.0}, pooled.draws)


def test_draws_of_the_seed_variance():
    drawn = st.SeedVariance(0.03, 0.01, 4, 100).draws(np.random.default_rng(0), 40_000)
    # 0.03 x 4 / chi^2_4 - 0.01 is above 0 where chi^2_4 < 12, and above 0.02 where it is below 4.
    assert (drawn > 0).mean() == pytest.approx(stats.chi2.cdf(12, 4), abs=0.005)
    assert (drawn > 0.02).mean() == pytest.approx(stats.chi2.cdf(4, 4), abs=0.01)


def test_chances_sum_to_one_and_ties_are_shared():
    y = arm(0.5, 2, problems=50)
    for arms in ({"a": y, "b": y, "c": y}, {n: np.ones((2, 9, 1)) for n in "abcd"}):
        best = [row["p_best"] for row in st.summarise(st.Outcomes("b", arms), "a").arms]
        assert sum(best) == pytest.approx(1)
        assert best == pytest.approx([1 / len(arms)] * len(arms), abs=0.02)


def test_order_of_arms_and_of_problems_changes_nothing():
    y = {"base": arm(0.4, 1), **{n: arm(0.5, 3, seed=i) for i, n in enumerate("xyz")}}
    mixed = np.random.default_rng(0).permutation(400)
    turned = {name: y[name][:, mixed] for name in ("z", "base", "x", "y")}
    first, second = (
        {row["method"]: row for row in st.summarise(st.Outcomes("b", arms), "x").arms}
        for arms in (y, turned)
    )
    for name, row in first.items():
        assert second[name]["p_best"] == pytest.approx(row["p_best"], abs=2e-4)
        assert [second[name][k] for k in ("rank", "rank_ci95")] == [row["rank"], row["rank_ci95"]]


def test_one_seed_has_no_rank_and_no_best():
    outcomes = st.Outcomes("b", {"base": arm(0.1, 1), "sft": arm(0.5, 1), "good": arm(0.9, 1)})
    for row in st.summarise(outcomes, "sft").arms:
        assert (row["rank_ci95"], row["p_best"]) == ([1, 3], None)
    outcomes = st.Outcomes("b", {"base": arm(0.1, 1), "sft": arm(0.5, 3), "good": arm(0.9, 1)})
    rows = {row["method"]: row for row in st.summarise(outcomes, "sft").arms}
    assert rows["good"]["rank_ci95"] == [1, 3] and rows["sft"]["rank_ci95"] == [1, 2]
    assert rows["sft"]["p_best"] is None


def test_costs_by_hand():
    def charged(seeds, trained, teacher, flops):
        one = {"teacher_scored": 0, "student_generated": 0, "flops": flops * seeds}
        return {"charged": one | {"trained": trained * seeds, "teacher_generated": teacher * seeds}}

    table = {  # seeds, trained, teacher_generated, FLOPs: of one student
        "base": (1, 0, 0, 0), "sft": (3, 60, 40, 1000), "same": (2, 60, 40.5, 1005), "dear": (3, 60, 140, 900),
        "poor": (5, 80, 20, 1000),
    }  # fmt: skip
    arms = [
        {"benchmark": "b", "method": name, "seeds": row[0], "ledger": charged(*row)}
        for name, row in table.items()
    ]

    def pair(a, b, delta, verdict, p_all):
        return {
            "benchmark": "b",
            "a": a,
            "b": b,
            "delta": delta,
            "verdict": verdict,
            "p_all": p_all,
        }

    pairs = [
        pair("same", "sft", 0.1, "better", 0.06),
        pair("dear", "sft", 0.1, "better", 0.01),
        pair("sft", "base", -0.1, "worse", 0.2),
        pair("sft", "poor", 0.3, "better", 0.001),
        pair("poor", "dear", -0.4, "worse", 0.001),
        pair("same", "dear", 0.0, "cannot tell", 1.0),
    ]
    standing.add_costs(arms, pairs)
    assert arms[1]["cost"] == {"tokens": 100, "flops": 1000, "pareto": True}  # dear costs more
    assert [arm["cost"]["pareto"] for arm in arms] == [True, True, True, True, False]
    assert [row["at_cost"] for row in pairs] == [
        "better at no more cost",  # half a percent more is the same
        "better but costlier",
        "worse at no less cost",
        "better at no more cost",
        "worse but cheaper",
        "cannot tell",
    ]
    assert pairs[1]["cost_ratio"] == {"tokens": 2.0, "flops": 0.9}
    assert pairs[2]["cost_ratio"] == {"tokens": None, "flops": None}


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


def simulate(rng, arms, seeds, problems, seed_sd, n=1, mean=0.0):
    """Arms of one true accuracy, or `mean` apart: problems of all difficulties, arms that differ on problems, seeds that differ in skill."""
    problem = rng.beta(0.8, 0.8, size=(1, 1, problems))
    rate = (
        problem
        + np.reshape(mean, (-1, 1, 1))
        + 0.1 * rng.standard_normal((arms, 1, problems))
        + seed_sd * rng.standard_normal((arms, seeds, 1))
        + 0.1 * rng.standard_normal((arms, seeds, problems))
    )
    return rng.random((arms, seeds, problems, n), dtype=np.float32) < np.clip(rate, 0, 1)[..., None]


def covered(seeds, problems, samples, seed_sd, rounds, arms=3, seed=0):
    """Share of the pairs whose interval holds the true difference, 0, through Outcomes and pairs; and one standard error of it.

    Pairs of one round share arms, so the error is that of the rounds.
    """
    rng = np.random.default_rng([seeds, problems, samples, int(1000 * seed_sd), seed])
    names = "abcdef"[:arms]
    shares = []
    for _ in range(rounds):
        y = simulate(rng, arms, seeds, problems, seed_sd, samples)
        rows = st.pairs(st.Outcomes("b", dict(zip(names, y, strict=True))), "a", base="")
        shares.append(np.mean([row["ci95"][0] <= 0 <= row["ci95"][1] for row in rows]))
        assert all((row["p"] < 0.05) == (not row["ci95"][0] <= 0 <= row["ci95"][1]) for row in rows)
    return float(np.mean(shares)), max(float(np.std(shares)), 0.05) / math.sqrt(rounds)


def check_coverage(seeds, problems, samples, seed_sd, rounds, arms=3):
    """At least 93 %, at most 97 % where seeds vary, and type I at most 5.5 %: each within 2.6 standard errors of the simulation."""
    share, error = covered(seeds, problems, samples, seed_sd, rounds, arms)
    assert share >= 0.945 - 2.6 * error  # which is type I, and more than 93 %
    assert share >= 0.93
    if seed_sd:
        assert share <= 0.97 + 2.6 * error
    return share


@pytest.mark.parametrize(
    ("seeds", "problems", "samples", "seed_sd", "arms"),
    [
        (2, 30, 1, 0.05, 3),
        (2, 1000, 1, 0.02, 2),
        (2, 100, 16, 0.05, 2),  # the worst of Satterthwaite's: 92 %
        (3, 300, 1, 0.02, 3),
        (3, 100, 4, 0.05, 3),
        (5, 300, 1, 0.05, 3),
        (5, 30, 16, 0.0, 3),
    ],
)
def test_interval_covers_and_the_test_holds_its_level(seeds, problems, samples, seed_sd, arms):
    check_coverage(seeds, problems, samples, seed_sd, 600, arms)


GRID = list(
    itertools.product(
        (2, 3, 5), ((30, 1), (30, 16), (200, 4), (1000, 1), (1000, 16)), (0.0, 0.02, 0.05)
    )
)


@pytest.mark.slow
def test_intervals_cover_in_every_design():
    shares = [
        check_coverage(seeds, problems, samples, seed_sd, 400)
        for seeds, (problems, samples), seed_sd in GRID
    ]
    assert 0.95 <= np.mean(shares) <= 0.97


def test_ranks_and_the_family_hold_together():
    """True ranks inside all intervals at once in 95 % of experiments, of five arms of which two and two are equal."""
    rng = np.random.default_rng(12)
    shift = np.array([0.0, 0.0, 0.04, 0.1, 0.1])
    true = [(4, 5), (4, 5), (3, 3), (1, 2), (1, 2)]  # the ranks that ties may take
    rounds, inside, best = 400, 0, []
    for _ in range(rounds):
        y = simulate(rng, 5, 3, 200, 0.02, mean=shift)
        outcomes = st.Outcomes("b", dict(zip("vwxyz", y, strict=True)))
        accuracy = {name: float(outcomes[name].mean()) for name in outcomes.arms}
        rows = list(standing.ranks(accuracy, st.pairs(outcomes, "v", base="")).values())
        inside += all(
            row["rank_ci95"][0] <= low and high <= row["rank_ci95"][1]
            for row, (low, high) in zip(rows, true, strict=True)
        )
        assert all(row["rank_ci95"][0] <= row["rank"] <= row["rank_ci95"][1] for row in rows)
        if len(best) < 50:
            best.append(sum(row["p_best"] for row in st.summarise(outcomes, "v").arms[3:]))
    assert inside / rounds >= 0.95 - 2.6 * math.sqrt(0.05 * 0.95 / rounds)
    assert np.mean(best) > 0.9


def test_the_family_errs_in_at_most_5_percent_of_experiments():
    rng = np.random.default_rng(7)
    rounds, false = 500, 0
    for _ in range(rounds):
        y = simulate(rng, 4, 3, 300, 0.02).astype(float)
        names = dict(zip(("sft", "a", "b", "c"), y, strict=True))
        pairs = st.pairs(st.Outcomes("b", names), "sft")
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


def test_power_of_the_quickstart_design():
    """3 seeds x 1,000 problems find 3.6 points with 80 % power, by the committed variances; docs/statistics.md says so."""
    path = Path(st.__file__).parents[1] / "results" / "reference" / "quickstart" / "summary.json"
    summary = json.loads(path.read_text(encoding="utf-8"))
    rows = [row for row in summary["pairs"] if row["benchmark"] == "micro_math"]
    arms = {row["method"]: row for row in summary["arms"] if row["benchmark"] == "micro_math"}
    pairs = [row for row in rows if "base" not in (row["a"], row["b"])]
    variances = {
        "interaction": float(np.median([row["interaction"] for row in pairs])),
        **arms["sft"]["variance"],
    }
    assert variances == pytest.approx(plan.PILOT, rel=0.02)  # what a plan takes for granted
    mde = {s: st.planned(1000, s, arms=5, **variances).mde for s in (2, 3, 5, 10)}
    assert {s: round(100 * x, 1) for s, x in mde.items()} == {2: 4.3, 3: 3.6, 5: 3.1, 10: 2.8}
    assert min(row["mde"] for row in pairs) < mde[3] < max(row["mde"] for row in pairs)
    rng = np.random.default_rng(8)
    rounds, found = 500, 0
    for _ in range(rounds):
        y = 0.5 + variances["interaction"] ** 0.5 * rng.standard_normal((5, 1, 1000))
        y = y + variances["seed"] ** 0.5 * rng.standard_normal((5, 3, 1))
        y = y + variances["noise"] ** 0.5 * rng.standard_normal((5, 3, 1000))
        y[0] += mde[3]
        found += st.difference(y[0][..., None], y[1][..., None], st.seed_variance(y)).p < 0.05
    assert found / rounds == pytest.approx(0.8, abs=0.05)


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
