"""The report of a sweep: what it must contain, on made-up studies."""

from __future__ import annotations

import io
import json
import math
import re

import numpy as np
import pytest
from rich.console import Console

from harness import statistics
from harness.ledger import Ledger, total
from harness.report import plots, reading, sweep
from harness.report.plots import Scale, Spot
from tests.harness.test_report import Page

MINUS = reading.MINUS
PLAIN = {
    "alpha": {"kind": "float", "low": 0.0, "high": 3.0, "log": False},
    "beta": {"kind": "float", "low": 0.0, "high": 3.0, "log": False},
}
WIDE = {
    "rollouts": {"kind": "int", "low": 4, "high": 32, "log": False},
    "schedule": {"kind": "choice", "choices": ["fkl", "rkl", "fkl_then_rkl"]},
    "switch": {"kind": "float", "low": 0.25, "high": 0.75, "log": False, "when": {"schedule": ["fkl_then_rkl"]}},
    "training.learning_rate": {"kind": "float", "low": 1e-4, "high": 1e-2, "log": True},
    "references": {"kind": "int", "low": 4, "high": 4, "log": False},
}  # fmt: skip


def ledger(flops: float, seconds: float = 50.0, spent: float = 0.5) -> dict:
    """A trial's, of which this share was spent."""
    made = Ledger()
    for quantity, amount in (("flops", flops), ("seconds", seconds), ("teacher_generated", 8e4)):
        made.charge(quantity, amount)
        made.spend(quantity, spent * amount)
    return made.summary()


def accuracy(params: dict) -> float:
    """A smooth hill, highest at alpha = 0.5, beta = 1.8, learning rate 2e-3."""
    a, b = params.get("alpha", 1.0), params.get("beta", 1.0)
    rate = math.log10(params.get("training.learning_rate", 2e-3) / 2e-3)
    bonus = {"rkl": 0.02, "fkl_then_rkl": 0.05}.get(params.get("schedule"), 0.0)
    return 0.54 - 0.05 * (a - 0.5) ** 2 - 0.03 * (b - 1.8) ** 2 - 0.06 * rate**2 + bonus


def draw(space: dict, rng: np.random.Generator) -> dict:
    params: dict = {}
    for name, each in space.items():
        if any(params.get(other) not in wanted for other, wanted in each.get("when", {}).items()):
            continue
        if each["kind"] == "choice":
            params[name] = str(rng.choice(each["choices"]))
        elif each["kind"] == "int":
            params[name] = int(rng.integers(each["low"], each["high"] + 1))
        elif each["log"]:
            params[name] = float(10 ** rng.uniform(*np.log10([each["low"], each["high"]])))
        else:
            params[name] = float(rng.uniform(each["low"], each["high"]))
    return params


def trial(number: int, params: dict, value: float | None, **other: object) -> dict:
    """A complete trial, or what `other` makes of it."""
    made = {
        "number": number,
        "state": "complete",
        "params": params,
        "value": value,
        "ci95": None if value is None else [value - 0.07, value + 0.07],
        "points": [] if value is None else [{"share": 0.5, "value": round(value - 0.1, 3)}],
        "reason": None,
        "default": number == 0,
        "tries": 1,
        "started": f"2026-11-28T05:{number % 60:02d}:02",
        "seconds": 50.0,
        "ledger": ledger(1e12),
        "lost": {},
    }
    return made | other


def pruned(number: int, params: dict, at: float = 0.3) -> dict:
    points = [{"share": 0.25, "value": round(at - 0.02, 3)}, {"share": 0.5, "value": at}]
    return trial(
        number, params, None, state="pruned", points=points, ledger=ledger(5e11), reason="pruned at 50 % of the budget"
    )  # fmt: skip


def confirm(label: str, gain: float = 0.04, seeds: int = 3, benchmarks: tuple = ("micro_math",)) -> dict:  # fmt: skip
    """Both settings on the test benchmarks, judged as a comparison judges them."""
    rng = np.random.default_rng(3)
    labels = {"default": label, "tuned": f"{label}-tuned"}
    records = []
    for place, benchmark in enumerate(benchmarks):
        ease = rng.beta(2, 2, 300)
        for side, name in labels.items():
            for seed in range(1, 1 + seeds):
                for p in range(300):
                    right = rng.random() < ease[p] + (gain - 0.02 * place) * (side == "tuned")
                    records.append(
                        {"benchmark": benchmark, "method": name, "seed": seed, "data_seed": 0, "problem": str(p),
                         "sample": 0, "correct": bool(right), "status": "ok" if right else "wrong",
                         "extracted": None, "truncated": False}
                    )  # fmt: skip
    judged = statistics.summarise_records(records, label)
    for cell in judged.cells:
        cell["ledger"] = ledger(4e12)
    return {
        "seeds": list(range(1, 1 + seeds)),
        "labels": labels,
        "cells": judged.cells,
        "arms": judged.arms,
        "pairs": judged.pairs,
        "ledger": total([Ledger.from_dict(ledger(4e12))] * 2 * seeds).summary(),
    }


def study(
    label: str, trials: list[dict], space: dict = PLAIN, asked: int | None = None, **other: object
) -> dict:
    """A study of these trials; what follows from them is worked out here."""
    complete = [t for t in trials if t["state"] == "complete"]
    best = max(complete, key=lambda t: t["value"], default=None)
    values = [t["value"] for t in complete]
    rising = []
    for n in range(1, len(values) + 1):
        ordered = sorted(values)
        ways = [math.comb(i, n - 1) * v for i, v in enumerate(ordered)]  # v is the largest of n
        rising.append(
            {"n": n, "expected": sum(ways) / math.comb(len(values), n), "best": max(values[:n])}
        )
    ledgers = [Ledger.from_dict(t["ledger"]) for t in trials if t["ledger"]]
    own = {"alpha": 1.0, "beta": 1.0, "rollouts": 8, "schedule": "fkl", "training.learning_rate": 4e-3, "references": 4}  # fmt: skip
    made = {
        "label": label,
        "method": "paced",
        "study": f"quickstart/{label}",
        "storage": "results/quickstart/study.log",
        "sampler": "tpe",
        "pruner": "wilcoxon",
        "trials_asked": asked or len(trials),
        "seeds": [0],
        "share": 0.25,
        "budget": {"steps": 125, "trained_tokens": None},
        "dev": {"micro_math": 100, "micro_code": 100, "dropped": 3},
        "space": space,
        "default": {name: own[name] for name in space if name in own},
        "trials": trials,
        "best": best and {key: best[key] for key in ("number", "params", "value")},
        "importance": None,
        "best_of_n": rising,
        "ledger": total(ledgers).summary(),
        "confirm": None,
    }
    return made | other


def data(*studies: dict, name: str = "quickstart") -> dict:
    return {"name": name, "environment": {"python": "3.11", "gpu": None}, "studies": list(studies)}


def large(label: str = "paced", n: int = 40, space: dict | None = None, seed: int = 0) -> dict:
    """Forty trials of everything: log, int, choice and conditional parameters, one that never varies; some pruned, one taken
    up again, one failed."""
    rng = np.random.default_rng(seed)
    space = PLAIN | WIDE if space is None else space
    own = {"alpha": 1.0, "beta": 1.0, "rollouts": 8, "schedule": "fkl", "training.learning_rate": 4e-3, "references": 4}  # fmt: skip
    trials = []
    for number in range(n):
        params = draw(space, rng) if number else {k: v for k, v in own.items() if k in space}
        value = round(accuracy(params) + 0.02 * rng.standard_normal(), 3)
        if number % 7 == 5:
            trials.append(pruned(number, params, max(0.05, value - 0.15)))
            continue
        points = [{"share": s, "value": round(value * (0.6 + 0.4 * s), 3)} for s in (0.25, 0.5, 0.75)]  # fmt: skip
        trials.append(trial(number, params, value, points=points))
    trials[8] |= {"same_as": 3}
    trials[7] |= {"tries": 2, "lost": {"teacher_generated": 1200, "flops": 3e11}}
    trials[9] |= {"state": "failed", "value": None, "ci95": None, "reason": "<b>no|example</b> left", "points": []}  # fmt: skip
    shares = {"alpha": 0.41, "beta": 0.22, "training.learning_rate": 0.2, "rollouts": 0.03, "schedule": 0.14}  # fmt: skip
    importance = {name: share for name, share in shares.items() if name in space}
    return study(label, trials, space, importance=importance, confirm=confirm(label))


def asymmetric() -> dict:
    """Three trials by hand: the suite's own 50.3 %, then 52.1 % at 0.4 and 1.7, then 41 %."""
    return study(
        "paced",
        [
            trial(0, {"alpha": 1.0, "beta": 1.0}, 0.503),
            trial(1, {"alpha": 0.4, "beta": 1.7}, 0.521),
            trial(2, {"alpha": 2.9, "beta": 0.2}, 0.41),
        ],
        importance={"alpha": 0.7, "beta": 0.3},
    )


def paired(**values: object) -> dict:
    """A confirmation whose one pair is given, said of the default."""
    arms = [
        {"method": name, "benchmark": "micro_math", "accuracy": value, "ci95": [value - 0.02, value + 0.02]}
        for name, value in (("paced", 0.51), ("paced-tuned", 0.519))
    ]  # fmt: skip
    cells = [{**arm, "seed": 1, "n_problems": 100, "n_samples": 1, "ledger": None} for arm in arms]
    pair = {"a": "paced", "b": "paced-tuned", "benchmark": "micro_math", "delta": -0.009, "ci95": [-0.026, 0.008],
            "p": 0.3, "p_holm": 0.3, "mde": 0.03, "verdict": "cannot tell", "exploratory": False, **values}  # fmt: skip
    labels = {"default": "paced", "tuned": "paced-tuned"}
    return {"seeds": [1, 2], "labels": labels, "cells": cells, "arms": arms, "pairs": [pair], "ledger": ledger(8e12)}  # fmt: skip


@pytest.fixture(scope="module")
def whole() -> dict:
    return data(large())


@pytest.fixture(scope="module")
def written(whole: dict, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("results") / "quickstart"
    folder.mkdir()
    (folder / "sweep.json").write_text(json.dumps(whole))
    paths = sweep.write(folder)
    assert [p.name for p in paths] == ["sweep.html", "sweep.md"]
    return {p.name: p.read_text(encoding="utf-8") for p in paths}


# --- the sentence and the tables -----------------------------------------------------------------


def test_sentence_has_the_numbers():
    own = asymmetric()
    said = sweep.sentence(sweep.Study(own | {"confirm": paired()}))
    assert said == (
        "Tuning paced over 3 trials: α 0.4, β 1.7 gives 52.1 % on dev, the suite's own setting 50.3 %; on fresh seeds and the "
        f"test benchmarks the difference is +0.9 points ({MINUS}0.8 to 2.6) on micro_math: cannot tell"
    )
    said = sweep.sentence(sweep.Study(own | {"trials_asked": 12}))
    assert said.startswith("Tuning paced over 3 of 12 trials: α 0.4")
    assert said.endswith("50.3 %; not confirmed on fresh seeds")


def test_sentence_where_there_is_less_to_say():
    one = sweep.Study(study("sft", [trial(0, {"alpha": 1.0, "beta": 1.0}, 0.503)]))
    same = {**paired(), "labels": {"default": "sft", "tuned": "sft"}, "pairs": []}
    assert sweep.sentence(sweep.Study(one.row | {"confirm": same})).endswith("; nothing to confirm")
    assert sweep.sentence(one) == (
        "Tuning sft over 1 trial: no setting did better on dev than the suite's own, 50.3 %; not confirmed on fresh seeds"
    )
    none = sweep.Study(study("sft", [pruned(0, {"alpha": 1.0}), pruned(1, {"alpha": 2.0})]))
    assert sweep.sentence(none) == (
        "Tuning sft over 2 trials: none is complete (2 pruned), so there is no best setting"
    )
    other = sweep.Study(study("sft", [pruned(0, {"alpha": 1.0}), trial(1, {"alpha": 2.0}, 0.4)]))
    assert "α 2 gives 40.0 % on dev, the suite's own was not measured" in sweep.sentence(other)
    single = paired(verdict="cannot tell", note=statistics.ONE_SEED)
    assert f"no verdict ({statistics.ONE_SEED})" in sweep.sentence(
        sweep.Study(asymmetric() | {"confirm": single})
    )


def test_a_parameter_that_never_varied_is_left_out_of_the_sentence():
    trials = [trial(i, {"alpha": float(i), "references": 4}, 0.4 + i / 10) for i in range(2)]
    space = {name: (PLAIN | WIDE)[name] for name in ("alpha", "references")}
    said = sweep.sentence(sweep.Study(study("heal", trials, space)))
    assert "trials: α 1 gives 50.0 %" in said


def test_confirmation_is_said_of_the_tuned_setting():
    (line,) = sweep.confirmed(sweep.Study(asymmetric() | {"confirm": paired()}))
    assert line == [
        "micro_math", "51.0 %", "49.0 to 53.0", "51.9 %", "49.9 to 53.9", "+0.9", f"{MINUS}0.8 to 2.6", "cannot tell", "0.300"
    ]  # fmt: skip


def test_costs_hold_what_did_not_end_well(whole):
    found = sweep.Study(whole["studies"][0])
    lines = {line[0]: line[1:] for line in sweep.costs(found)}
    assert lines["all trials, charged"][4] == "3.8e13"  # 35 at 1e12 and 5 at 5e11: 3.75e13
    assert lines["all trials, spent"][4] == "1.9e13"
    assert (
        lines["of it pruned and failed, spent"][4] == "1.8e12"
    )  # (5 at 5e11 and 1 at 1e12) / 2: 1.75e12
    assert lines["lost with killed workers"][0] == "1.2k"
    assert lines["confirmation, spent"][4] == "1.2e13"  # 6 of 4e12, half of it
    assert sweep.lost(found) == (
        "Lost with killed workers and done again: teacher generated 1.2k, FLOPs 3.0e11."
    )
    assert sweep.states(found) == (
        "34 complete, 5 pruned, 1 failed; 1 taken up again after a worker's end"
    )
    plain = sweep.Study(asymmetric())
    assert sweep.lost(plain) == ""
    assert [line[0] for line in sweep.costs(plain)] == ["all trials, charged", "all trials, spent"]


def test_leaderboard_puts_confirmed_methods_first():
    two = ("micro_math", "micro_code")
    three = (*two, "micro_math/high")  # a band of levels, which the mean leaves out
    strong = study(
        "heal", [trial(0, {"alpha": 1.0}, 0.2)], confirm=confirm("heal", 0.3, benchmarks=three)
    )
    weak = study("limo", [trial(0, {"alpha": 1.0}, 0.9)], confirm=confirm("limo", 0.05))
    dev = study("sft", [trial(0, {"alpha": 1.0}, 0.3), trial(1, {"alpha": 2.0}, 0.95)])
    none = study("vcrd", [pruned(0, {"alpha": 1.0})])
    rows = sweep.leaderboard(data(none, dev, weak, strong))
    assert [row["label"] for row in rows] == ["heal", "limo", "sft", "vcrd"]
    arms = {(a["method"], a["benchmark"]): a["accuracy"] for a in strong["confirm"]["arms"]}
    mean = sum(arms["heal-tuned", name] for name in two) / 2
    assert rows[0]["tuned"] == {"accuracy": pytest.approx(mean), "ci95": None}
    assert (
        rows[1]["tuned"]["ci95"] and rows[1]["default"]["accuracy"] < rows[1]["tuned"]["accuracy"]
    )
    assert (rows[2]["default"]["accuracy"], rows[2]["tuned"]["accuracy"]) == (0.3, 0.95)
    assert rows[3]["tuned"] is None
    lines = sweep.ranks(data(none, dev, weak, strong))
    assert [line[5] for line in lines] == [
        "mean", "micro_math", "micro_code", "micro_math", "dev, not confirmed", "dev, not confirmed"
    ]  # fmt: skip
    assert [line[6] for line in lines] == ["1 of 1", "", "", "1 of 1", "2 of 2", "0 of 1"]


# --- the surface -------------------------------------------------------------------------------


X, Y = Scale(0, 4, 46, 342), Scale(0, 2, 230, 30)


def plane(x: float, y: float) -> float:
    return 0.2 + 0.05 * x + 0.13 * y


def planar(n: int = 30) -> list[tuple[float, float, float]]:
    rng = np.random.default_rng(5)
    at = [
        (float(x), float(y))
        for x, y in zip(rng.uniform(0, 4, n), rng.uniform(0, 2, n), strict=True)
    ]
    return [(X(x), Y(y), plane(x, y)) for x, y in at]


def inside(polygon, x, y):
    """Even-odd rule."""
    found = False
    for (ax, ay), (bx, by) in zip(polygon, [*polygon[1:], polygon[0]], strict=True):
        if (ay > y) != (by > y) and x < ax + (y - ay) / (by - ay) * (bx - ax):
            found = not found
    return found


def test_surface_of_a_plane_is_the_plane():
    """Where a band begins, the plane has its level; a point is in a band just when the plane is that high there."""
    flat = plots.triangles(planar(), X, Y)
    rng = np.random.default_rng(1)
    seen = {True: 0, False: 0}
    for level in (0.3, 0.41, 0.52):
        polygons = [p for corners in flat if (p := plots.above(corners, level))]
        for px, py in zip(rng.uniform(46, 342, 200), rng.uniform(30, 230, 200), strict=True):
            if any(inside([c[:2] for c in corners], px, py) for corners in flat):
                x, y = (px - 46) / 74, (230 - py) / 100
                high = plane(x, y) >= level
                seen[high] += 1
                assert any(inside(p, px, py) for p in polygons) == high
    assert min(seen.values()) > 100


def test_a_triangle_is_cut_where_its_value_is_the_level():
    triangle = [(0.0, 0.0, 0.0), (6.0, 0.0, 3.0), (0.0, 8.0, 1.0)]
    assert plots.above(triangle, 2) == [(4.0, 0.0), (6.0, 0.0), (3.0, 4.0)]
    assert plots.above(triangle, -1) == [corner[:2] for corner in triangle]
    assert plots.above(triangle, 3.5) == []


def test_nothing_is_drawn_outside_the_hull():
    """Of trials in the triangle x + y <= 2 no band goes beyond its long side."""
    rng = np.random.default_rng(2)
    spots = [Spot(0, 0, 0.5, "corner"), Spot(2, 0, 0.3, "corner"), Spot(0, 2, 0.4, "corner")]
    for _ in range(20):
        x, y = sorted(rng.uniform(0, 2, 2))
        spots.append(Spot(float(x), float(2 - y), float(rng.uniform(0.2, 0.6)), "inner"))
    svg = plots.contour("t", spots, "a", "b", x_range=(0, 3), y_range=(0, 3))
    paths = re.findall(r'<path d="([^"]+)" style="fill:var\(--r\d\)"', svg)
    assert len(paths) == plots.NUM_BANDS
    at = [
        tuple(map(float, pair.split()))
        for path in paths
        for pair in re.findall(r"[\d.]+ [\d.]+", path)
    ]
    assert len(at) > 60
    x, y = Scale(0, 3, 46, 342), Scale(0, 3, 230, 30)
    assert (
        max((px - 46) / (x.end - x.start) * 3 + (230 - py) / (y.start - y.end) * 3 for px, py in at)
        < 2.003
    )
    assert min(px for px, _ in at) == 46 and max(py for _, py in at) == 230


def test_equal_points_count_once_with_their_mean():
    points = [(46.0, 30.0, 0.1), (342.0, 30.0, 0.1), (46.0, 230.0, 0.1), (342.0, 230.0, 0.1)]
    flat = plots.triangles([*points, (100.0, 100.0, 0.2), (100.0, 100.0, 0.6)], X, Y)
    values = {corner[:2]: corner[2] for corners in flat for corner in corners}
    assert values[100.0, 100.0] == pytest.approx(0.4) and len(values) == 5


@pytest.mark.parametrize(
    "at",
    [
        [(0, 0), (1, 2), (3, 1)],
        [(0, 0), (1, 1), (2, 2), (3, 3), (0.5, 0.5)],
        [(1, 0), (1, 1), (1, 3), (1, 2)],
        [(2, 2)] * 6,
    ],
    ids=["three", "a line", "one x", "one point"],
)
def test_too_little_for_a_surface_gives_dots_only(at):
    spots = [Spot(x, y, 0.3 + 0.1 * i, f"trial {i}") for i, (x, y) in enumerate(at)]
    svg = plots.contour("t", spots, "a", "b")
    assert not re.findall(r'<path d="[^"]+" style="fill:var\(--r\d\)"', svg)
    assert svg.count("<title>trial") == len(at)


def test_the_surface_marks_best_default_and_pruned():
    one = sweep.Study(study("paced", [*asymmetric()["trials"], pruned(3, {"alpha": 2.0, "beta": 1.0}), trial(4, {"alpha": 1.5, "beta": 2.5}, 0.45)]))  # fmt: skip
    svg = str(sweep.surface(one))
    shown = svg.split("<g ")[0]
    assert shown.count('r="8"') == 2 and shown.count("h15v15") == 2  # each with its halo
    hollow = re.findall(r'r="3.6" style="fill:var\(--paper\)[^>]*><title>([^<]*)', shown)
    assert hollow == ["trial 3: α 2, β 1; pruned at 50 % with 30.0 %"]
    colours = dict(re.findall(r'style="fill:(var\(--r\d\));[^>]*><title>trial (\d)', shown))
    assert {v: k for k, v in colours.items()} == {"2": "var(--r0)", "0": "var(--r5)", "1": "var(--r6)", "4": "var(--r2)"}  # fmt: skip
    # 41 to 52.1 % in seven bands of 1.59: 50.3 is in the sixth, 45 in the third.
    assert [f"{41 + 11.1 * i / 7:.1f}" in svg for i in range(8)] == [True] * 8
    assert "Also varied" not in svg
    again = plots.contour("t", [Spot(1, 1, None, "x")], "a", "b")  # nothing measured
    assert 'r="3.6"' in again


def test_the_surface_is_over_alpha_and_beta_or_what_matters_most():
    every = sweep.Study(large())
    assert sweep.surface_of(every) == ("alpha", "beta")
    other = sweep.Study(large() | {"importance": {"rollouts": 0.8, "training.learning_rate": 0.2}})
    assert sweep.surface_of(other) == ("alpha", "beta")
    assert "Also varied: rollouts, schedule, switch and learning rate." in " ".join(
        re.findall(r'class="tick" x="4"[^>]*>([^<]*)', str(sweep.surface(every)))
    )
    without = sweep.Study(large("heal", space=WIDE))
    assert sweep.surface_of(without) == ("training.learning_rate", "rollouts")
    assert "0.001" in str(sweep.surface(without))
    few = {name: WIDE[name] for name in ("schedule", "references", "rollouts")}
    assert sweep.surface(sweep.Study(large("limo", n=12, space=few))) is None


# --- the page ----------------------------------------------------------------------------------


def test_page_is_one_file_that_opens_offline(written):
    page = Page(written["sweep.html"])
    assert {"script", "link", "img", "iframe"}.isdisjoint(page.tags)
    assert not [v for k, v in page.attributes if k in {"src", "href", "xlink:href"}]
    assert "url(" not in written["sweep.html"] and "http" not in written["sweep.html"]
    assert page.open == []
    assert "<b>no" not in written["sweep.html"] and "&lt;b&gt;no|example" in written["sweep.html"]
    assert "nan" not in re.sub(r"nan\w", "", written["sweep.html"].lower())


def test_page_draws_every_chart(written):
    labels = [v for k, v in Page(written["sweep.html"]).attributes if k == "aria-label"]
    assert labels == [
        "Best of n trials: dev accuracy", "Dev accuracy over α and β", "α", "β", "rollouts", "schedule", "switch",
        "learning rate", "Importance", "Dev accuracy on the way",
    ]  # fmt: skip


def test_trials_are_listed_best_first(written, whole):
    own = whole["studies"][0]
    table = next(t for t in Page(written["sweep.html"]).tables if t[0][0] == "trial")
    assert len(table) == 1 + 40
    assert table[1][0] == f"{own['best']['number']} (best)"
    shown = [float(row[9].removesuffix(" %")) for row in table[1:] if row[1].startswith("complete")]
    assert len(shown) == 34 and shown == sorted(shown, reverse=True)
    by_number = {row[0].split()[0]: row for row in table[1:]}
    assert by_number["0"][0] == "0 (the suite's own)"
    assert by_number["7"][1] == "complete, 2 tries"
    assert by_number["5"][1] == "pruned" and by_number["5"][-1] == "pruned at 50 % of the budget"
    assert by_number["8"][-1] == "the same setting as trial 3"
    assert by_number["5"][9:11] == ["–", "–"] and by_number["5"][-2] == "5.0e11"
    switch = table[0].index("switch")
    for row, one in ((by_number[str(t["number"])], t) for t in own["trials"]):
        assert (row[switch] == "–") == ("switch" not in one["params"])


def test_markdown_says_the_same(written, whole):
    found = sweep.Study(whole["studies"][0])
    text = written["sweep.md"]
    assert "## Study: paced\n" in text and "\n### Trials\n" in text
    assert f"\n{sweep.sentence(found)}." in text
    assert text.count("\n| ") > 40 and "&lt;b\\>no\\|example" in text


def test_best_of_n_is_drawn_in_steps():
    found = sweep.Study(asymmetric())
    svg = str(sweep.best_of_n(found))
    steps, _ = re.findall(r'<path d="M([^"]+)" style="fill:none;stroke:var\(--c0\)', svg)
    places = [tuple(map(float, p.split())) for p in steps.split("L")]
    assert [y for _, y in places] == sorted((y for _, y in places), reverse=True)
    assert len(places) == 5 and places[1][1] == places[0][1] and places[1][0] == places[2][0]
    assert sweep.best_of_n(sweep.Study(study("sft", [trial(0, {"alpha": 1.0}, 0.5)]))) is None


def test_a_choice_has_a_categorical_axis():
    svg = str(sweep.each_parameter(sweep.Study(large()))[3])
    ticks = re.findall(r'class="tick"[^>]*text-anchor="middle">([^<]*)', svg)
    assert ticks == ["fkl", "rkl", "fkl_then_rkl"]
    assert len(set(re.findall(r'translate\(([\d.]+) [\d.]+\)" style="fill:var\(--c0\)', svg))) == 3


def test_pruned_trials_end_early_on_the_chart():
    one = study(
        "paced",
        [trial(0, {"alpha": 1.0}, 0.5), pruned(1, {"alpha": 2.0}), trial(2, {"alpha": 0.5}, 0.4)],
    )
    svg = str(sweep.on_the_way(sweep.Study(one)))
    ends = {
        colour: float(path.split("L")[-1].split()[0])
        for path, colour in re.findall(
            r'<path d="M([^"]+)" style="fill:none;stroke:var\(--(\w+)\)', svg
        )
    }
    x = plots.linear([25, 50, 100], plots.LEFT, plots.WIDTH - plots.RIGHT)
    assert ends["c0"] == ends["c1"] == pytest.approx(x(100), abs=0.1)
    assert ends["base"] == pytest.approx(x(50), abs=0.1)
    assert "trial 1, pruned: 30.0 % at 50" in svg


@pytest.mark.parametrize(
    "made",
    [
        study("sft", [trial(0, {"alpha": 1.0, "beta": 1.0}, 0.5)]),
        study("sft", [pruned(i, {"alpha": float(i), "beta": 1.0}) for i in range(4)]),
        study("sft", []),
        study("sft", [trial(0, {"alpha": 1.0}, None, state="running", seconds=None, ledger=None, ci95=None),
                      trial(1, {}, None, state="waiting", started=None, seconds=None, ledger=None, points=[])]),
        large("sft", n=12, space={"references": WIDE["references"]}),
        large("sft", n=10) | {"confirm": None, "importance": None},
    ],
    ids=["one trial", "all pruned", "none", "running", "one value", "no confirmation"],
)  # fmt: skip
def test_whatever_there_is_can_be_shown(made, tmp_path):
    (tmp_path / "sweep.json").write_text(json.dumps(data(made, large("paced", n=10))))
    for path in sweep.write(tmp_path):
        assert "Tuning sft over" in path.read_text(encoding="utf-8")
    text = screen_text(sweep.terminal, made)
    assert "Tuning sft over" in text


def screen_text(show, *values: object) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    show(*values, console)
    return console.export_text()


def test_terminal_fits_100_columns(whole):
    study = whole["studies"][0]
    text = screen_text(sweep.terminal, study)
    assert max(map(len, text.splitlines())) <= 100
    flat = " ".join(text.split())
    assert sweep.sentence(sweep.Study(study)) in flat
    for said in ("training.learning_rate", "0.0001 to 0.01, log", "cannot tell", "41 %", "34 complete, 5 pruned", "3.8e13"):  # fmt: skip
        assert said in flat
    board = screen_text(sweep.board, data(study, asymmetric() | {"label": "heal"}))
    assert max(map(len, board.splitlines())) <= 100
    assert "dev, not confirmed" in board and "34 of 40" in board
