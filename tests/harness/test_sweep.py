"""A sweep from YAML to the confirmation: dev problems only, equal effort, shared samples, nothing lost, nothing paid twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from math import isclose
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from harness import cell, compare, problems, trial
from harness import sweep as sweeps
from harness.config import Budget, Experiment, parse
from harness.ledger import Ledger
from harness.report.sweep import leaderboard
from harness.sweep import best_of_n, check_objective, sweep
from harness.trainer import Trainer
from harness.trial import _reports, _tell, dev_problems, scaled, smaller, surely_worse

SUITE: dict[str, Any] = {
    "name": "small",
    "student": "micro/student",
    "teacher": "micro/teacher",
    "problems": {"micro_math": {"n": 40, "levels": [1, 2]}},
    "benchmarks": {"micro_math": {"limit": 20, "max_new_tokens": 64}},
    "budget": {"steps": 16},
    "methods": {"sft": {"samples": 2}, "paced": {"rollouts": 4, "references": 2}},
    "training": {"batch_size": 8, "checkpoint_every": 1},
    "sampling": {"max_new_tokens": 64},
    "sweep": {
        "dev_problems": 24,
        "share": 0.5,
        "confirm_seeds": 2,
        "paced": {"only": ["alpha", "beta"]},
        "sft": {"only": ["keep"], "keep": {"choices": [1, 2]}},
    },
    "threads": 1,
}


def changed(**changes: Any) -> dict[str, Any]:
    """The suite with changes, those of `sweep` key by key."""
    inner = {**SUITE["sweep"], **changes.pop("sweep", {})}
    return {**SUITE, **changes, "sweep": inner}


def suite(folder: Path, **changes: Any) -> Path:
    path = folder / "small.yaml"
    path.write_text(json.dumps(changed(**changes)))  # JSON is YAML
    return path


def tune(path: Path, method: str | None = "paced", *, trials: int, **more: Any) -> dict[str, Any]:
    return sweep(
        path,
        method,
        trials=trials,
        results=path.parent / "results",
        quiet=True,
        track=False,
        **more,
    )


def outcomes(study: dict[str, Any]) -> Any:
    """What may not differ between two sweeps of one suite."""
    return [
        (row["state"], row["params"], row["value"], row["points"], row["ci95"], paid(row))
        for row in study["trials"]
    ]


def paid(row: dict[str, Any]) -> dict[str, float]:
    return {k: v for k, v in row["ledger"]["charged"].items() if k != "seconds"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("whole")
    path = suite(folder)
    return path, tune(path, trials=4)["studies"][0]


def test_a_sweep_finds_confirms_and_records(whole: tuple[Path, dict[str, Any]]) -> None:
    path, study = whole
    home = path.parent / "results/small"
    assert json.loads((home / "sweep.json").read_text())["studies"] == [study]
    assert [row["state"] for row in study["trials"]] == ["complete"] * 4
    first, *others = study["trials"]
    assert first["params"] == study["default"] == {"alpha": 1.0, "beta": 1.0} and first["default"]
    assert all(set(row["params"]) == {"alpha", "beta"} for row in others)
    assert study["budget"] == {"steps": 8, "caps": {}}
    assert all(row["ledger"]["charged"]["steps"] == 8 for row in study["trials"])
    assert study["best"]["value"] == max(row["value"] for row in study["trials"])
    assert study["best"]["arm"] == {
        "method": "paced",
        **SUITE["methods"]["paced"],
        **study["best"]["params"],
    }
    for row in study["trials"]:
        assert [p["share"] for p in row["points"]] == [0.5, 1.0]
        assert row["points"][-1]["value"] == row["value"]
        assert row["ci95"][0] <= row["value"] <= row["ci95"][1]
    confirm = study["confirm"]
    assert confirm["seeds"] == [1, 2]  # not the trials' seed 0
    cells = {(c["method"], c["seed"]) for c in confirm["cells"]}
    tuned = confirm["labels"]["tuned"]
    assert cells == {("base", 0), *((label, s) for label in ("paced", tuned) for s in (1, 2))}
    assert all(c["ledger"]["charged"]["steps"] in (0, 16) for c in confirm["cells"])
    assert any((p["a"], p["b"]) == (tuned, "paced") for p in confirm["pairs"])
    for name in ("sweep.html", "sweep.md", "study.log"):
        assert (home / name).is_file()


def test_trials_share_what_the_store_has(whole: tuple[Path, dict[str, Any]]) -> None:
    _, study = whole
    first, *others = [row["ledger"] for row in study["trials"]]
    assert first["spent"]["teacher_generated"] > 0 and first["spent"]["student_generated"] > 0
    for ledger in others:  # the second trial of PACED makes no teacher call
        assert ledger["spent"]["teacher_generated"] == 0
        assert ledger["charged"]["teacher_generated"] > 0
    for column in ("charged", "spent"):
        whole_sum = sum(row["ledger"][column]["flops"] for row in study["trials"])
        assert isclose(study["ledger"][column]["flops"], whole_sum)


def test_no_trials_student_stays_on_disk(whole: tuple[Path, dict[str, Any]]) -> None:
    path, study = whole
    folder = path.parent / "results/small/sweep"
    kept = {p.parent.name for p in (folder / "models").glob("*/*")}
    assert kept == {"paced", study["confirm"]["labels"]["tuned"]}  # the confirmation's
    assert not [*folder.rglob("*.pt"), *folder.rglob("progress.json")]


def test_a_trial_is_the_mean_over_its_seeds(tmp_path: Path) -> None:
    path = suite(tmp_path, sweep={"seeds": 2, "confirm_seeds": 1})
    study = tune(path, trials=1)["studies"][0]
    (row,) = study["trials"]
    seen = [(p["seed"], p["share"]) for p in row["points"]]
    assert seen == [(0, 0.5), (0, 1.0), (1, 0.5), (1, 1.0)]
    ends = [p["value"] for p in row["points"] if p["share"] == 1]
    assert ends[0] != ends[1] and isclose(row["value"], sum(ends) / 2)
    assert row["ledger"]["charged"]["steps"] == 16  # 8 of each
    assert study["confirm"]["seeds"] == [2]


def test_a_grid_ends_with_its_points_and_a_second_study_pays_nothing_again(
    tmp_path: Path,
) -> None:
    path = suite(tmp_path, sweep={"confirm_seeds": 0})
    first = tune(path, "sft", trials=7, sampler="grid")["studies"][0]
    assert first["trials_asked"] == 2
    assert sorted(row["params"]["keep"] for row in first["trials"]) == [1, 2]
    other = f"sqlite:///{tmp_path}/study.db"  # the same trials' folder
    second = tune(path, "sft", trials=2, sampler="grid", storage=other)["studies"][0]
    assert [row["value"] for row in second["trials"]] == [row["value"] for row in first["trials"]]
    assert first["ledger"]["spent"]["steps"] == 16 and second["ledger"]["spent"]["steps"] == 0
    assert second["ledger"]["charged"]["steps"] == 16


def test_what_is_done_is_not_done_again_and_more_trials_add(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = suite(tmp_path, sweep={"confirm_seeds": 0})
    two = tune(path, trials=2)["studies"][0]
    assert two["confirm"] is None
    monkeypatch.setattr(cell, "train", _never)
    assert tune(path, trials=2)["studies"][0] == two
    monkeypatch.undo()
    three = tune(path, trials=3)["studies"][0]
    assert outcomes(three)[:2] == outcomes(two) and len(three["trials"]) == 3


def _never(*_: Any, **__: Any) -> None:
    raise AssertionError("trained again")


def test_looking_changes_nothing(tmp_path: Path) -> None:
    """A student that was looked at on the way, in either kind of stage, is the same to the bit."""
    students = []
    # A stage ends at 0.5: a look of its own, unless a point is near, which it then stands for.
    for points, seen in (([], [0.5]), ([0.2, 0.3, 0.8], [0.2, 0.3, 0.5, 0.8]), ([0.54], [0.54])):
        folder = tmp_path / str(len(points))
        folder.mkdir()
        path = suite(folder, sweep={"points": points, "confirm_seeds": 0})
        study = tune(path, trials=1, pruner="none")["studies"][0]
        (run,) = (folder / "results/small/sweep/runs").rglob("run.json")
        record = json.loads(run.read_text())
        students.append((record["student"], record["curve"], study["trials"][0]["value"]))
        assert [p["share"] for p in study["trials"][0]["points"]] == [*seen, 1.0]
    assert students[0] == students[1] == students[2]


def test_a_trial_that_is_surely_worse_is_pruned_and_its_cost_counts(tmp_path: Path) -> None:
    """A learning rate that destroys the student, after one that keeps it."""
    space = {"only": [], "training": {"learning_rate": {"choices": [1e-5, 3.0]}}}
    path = suite(tmp_path, sweep={"paced": space, "dev_problems": 60, "confirm_seeds": 1})
    study = tune(path, trials=2, sampler="grid")["studies"][0]
    by = {row["params"]["training.learning_rate"]: row for row in study["trials"]}
    assert by[1e-5]["state"] == "complete" and study["best"]["params"] == by[1e-5]["params"]
    pruned = by[3.0]
    if (
        pruned["number"] == 1
    ):  # the grid's order is its seed's; the first has nobody to be worse than
        assert pruned["state"] == "pruned" and pruned["value"] is None
        assert "at 50 %: 0.0 % of the dev problems" in pruned["reason"]
        assert pruned["ledger"]["charged"]["steps"] == 4
    assert study["ledger"]["charged"]["steps"] == sum(
        row["ledger"]["charged"]["steps"] for row in study["trials"]
    )
    assert study["best"]["arm"]["training"] == {"learning_rate": 1e-5}


def test_a_setting_that_cannot_run_is_a_trial_with_its_reason(tmp_path: Path) -> None:
    space = {"only": [], "budget": {"steps": {"choices": [1, 2]}}}
    path = suite(tmp_path, sweep={"paced": space, "confirm_seeds": 0})
    study = tune(path, trials=2, sampler="grid")["studies"][0]
    assert [row["state"] for row in study["trials"]] == ["pruned", "pruned"]
    for row in study["trials"]:  # one step for two stages
        assert "gets no step" in row["reason"] and row["ledger"]["charged"]["student_generated"] > 0
    assert study["best"] is None


def test_a_student_trains_on_after_a_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout, if it has any: not as it answers."""
    real, modes = Trainer._step, []

    def step(self: Trainer, *given: Any) -> None:
        modes.append(self.student.model.training)
        real(self, *given)

    monkeypatch.setattr(Trainer, "_step", step)
    study = tune(suite(tmp_path, sweep={"confirm_seeds": 0}), "sft", trials=1)["studies"][0]
    assert [point["share"] for point in study["trials"][0]["points"]] == [0.5, 1.0]
    assert modes == [True] * 8


def test_equal_settings_are_trained_once(tmp_path: Path) -> None:
    path = suite(tmp_path, sweep={"confirm_seeds": 0})
    study = tune(path, "sft", trials=4, sampler="random")["studies"][0]
    rows = study["trials"]
    assert {row["params"]["keep"] for row in rows} == {1, 2}
    seen: dict[int, dict[str, Any]] = {}
    for row in rows:
        first = seen.setdefault(row["params"]["keep"], row)
        if row is first:
            assert row["same_as"] is None and row["ledger"]["spent"]["steps"] == 8
        else:
            assert row["same_as"] == first["number"] and row["value"] == first["value"]
            assert row["ledger"]["spent"]["steps"] == 0 and paid(row) == paid(first)
    assert study["ledger"]["spent"]["steps"] == 16
    # The pruner has heard of a copy what it heard of the first; what the first lost, a copy did not lose again.
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "results/small/study.log"))
    storage = optuna.storages.JournalStorage(backend)
    heard: dict[int, list[dict[int, float]]] = {1: [], 2: []}
    for each in optuna.load_study(study_name="small/sft", storage=storage).trials:
        heard[each.params["keep"]].append(each.intermediate_values)
    assert all(told and told == values[0] for values in heard.values() for told in values)
    for record in (tmp_path / "results/small/sweep/runs").rglob("trial.json"):
        record.write_text(json.dumps({**json.loads(record.read_text()), "lost": {"steps": 3}}))
    last = tune(path, "sft", trials=5, sampler="random")["studies"][0]["trials"][-1]
    assert last["same_as"] is not None and last["lost"] == {}


@pytest.mark.slow
def test_kill_9_anywhere_ends_in_the_same_trials(
    tmp_path: Path, whole: tuple[Path, dict[str, Any]]
) -> None:
    """The process, its only worker, is killed again and again; what was spent on steps done twice is on the record."""
    path = suite(tmp_path, sweep={"confirm_seeds": 0})
    code = (
        "import sys; from tests.harness.test_sweep import dying; from pathlib import Path; "
        "dying(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))"
    )
    # Twice in one trial (a third death would end it), then in the one that follows it.
    for nth, steps in ((0, 3), (0, 6), (1, 5)):
        command = [sys.executable, "-c", code, str(path), str(nth), str(steps)]
        assert subprocess.run(command).returncode == -signal.SIGKILL
    study = tune(path, trials=4)["studies"][0]
    assert outcomes(study) == outcomes(whole[1])
    assert [row["tries"] for row in study["trials"]] == [3, 2, 1, 1]
    assert [row["lost"].get("steps", 0) for row in study["trials"]] == [2, 1, 0, 0]


def dying(path: Path, nth: int, steps: int) -> None:
    """The sweep until this trial of the process has so many steps on its record, and no checkpoint of the last."""
    seen: list[trial._Run] = []
    real = trial._Run._keep

    def keep(self: trial._Run, ledger: Ledger | None) -> None:
        if self not in seen:
            seen.append(self)
        last = len(seen) == nth + 1 and ledger is not None and ledger.spent["steps"] >= steps
        if last:
            self.saved = 0.0  # a record is written once a second otherwise
        real(self, ledger)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)

    trial._Run._keep = keep  # type: ignore[method-assign]
    tune(path, trials=4)


@dataclass(frozen=True)
class Known:
    """A fast objective: how good a method is at its best, how far the default is from that, known beforehand."""

    experiment: Any
    label: str
    folder: Path
    store: Path

    BEST = (("a", 0.9, 0.3), ("b", 0.7, 2.6), ("c", 0.5, 1.0))  # label, top, where

    def __call__(self, params: dict[str, Any], trial: Any, report: Any) -> float:
        _, top, where = next(each for each in self.BEST if each[0] == self.label)
        return top - 0.15 * (params["alpha"] - where) ** 2 - 0.1 * abs(params["beta"] - 1)


def test_all_recovers_the_ranking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At their defaults (alpha 1) the order is a, c, b: only tuning shows a, b, c."""
    monkeypatch.setattr(sweeps, "Trial", Known)
    arms = {name: {"method": "paced", "rollouts": 4} for name in ("c", "b", "a")}
    path = suite(
        tmp_path,
        methods=arms,
        reference="c",
        sweep={"only": ["alpha", "beta"], "confirm_seeds": 0, "paced": None, "sft": None},
    )
    data = json.loads(path.read_text())
    for name in ("paced", "sft"):
        del data["sweep"][name]
    path.write_text(json.dumps(data))
    found = tune(path, None, trials=25)
    defaults = {s["label"]: s["trials"][0]["value"] for s in found["studies"]}
    assert sorted(defaults, key=lambda k: -defaults[k]) == ["a", "c", "b"]
    assert [row["label"] for row in leaderboard(found)] == ["a", "b", "c"]
    assert {len(s["trials"]) for s in found["studies"]} == {25}
    best = {s["label"]: s["best"] for s in found["studies"]}
    for label, top, where in Known.BEST:
        assert best[label]["value"] > 0.95 * top
        assert abs(best[label]["params"]["alpha"] - where) < 0.5


# -- dev problems, budgets, best of n -----------------------------------------------------------


def test_dev_problems_are_nobody_elses(tmp_path: Path) -> None:
    rows = [{"problem": f"What is {i} plus {i * i}?", "answer": i + i * i} for i in range(400)]
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *rows[:200]]))
    setting = parse(
        changed(problems={"micro_math": {"n": 100, "levels": [1]}, "own": {"path": str(train)}})
    )
    compare.prepare(setting, tmp_path)
    counts = dev_problems(setting, tmp_path)
    dev = [json.loads(line) for line in (tmp_path / "dev.jsonl").read_text().splitlines()]
    trained = [json.loads(line) for line in (tmp_path / "problems.jsonl").read_text().splitlines()]
    assert counts["micro_math"] == counts["own"] == 12 and len(dev) == 24
    tested = problems.load("micro_math", "test")
    assert not {p["prompt"] for p in dev} & {p["prompt"] for p in trained}
    assert not {p["prompt"] for p in dev} & {p.prompt for p in tested}
    before = (tmp_path / "dev.jsonl").read_bytes()
    assert dev_problems(setting, tmp_path) == counts
    assert (tmp_path / "dev.jsonl").read_bytes() == before
    only = setting.model_copy(
        update={"sweep": setting.sweep.model_copy(update={"objective": "dev/own"})}
    )
    assert dev_problems(only, tmp_path) == {"own": 24, "dropped": 0}


def test_dev_problems_are_no_test_problems_whatever_training_may_hold(tmp_path: Path) -> None:
    tested = problems.load("micro_math", "test")
    rows = [{"problem": each.prompt, "answer": each.answer} for each in tested[:300]]
    rows += [{"problem": f"What is {i} plus {i * i}?", "answer": i + i * i} for i in range(300)]
    story = "A farmer has ten cows and buys some more of them at the market, how many are {} days?"
    rows += [{"problem": story.format(i), "answer": i} for i in range(100)]  # alike, in both splits
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    setting = parse(changed(problems={"own": {"path": str(train)}}, contamination={"rule": "none"}))
    compare.prepare(setting, tmp_path)
    assert dev_problems(setting, tmp_path)["dropped"] > 0
    dev = [json.loads(line) for line in (tmp_path / "dev.jsonl").read_text().splitlines()]
    prompts = {each["prompt"] for each in dev}
    assert prompts and not prompts & {each.prompt for each in tested}
    assert not any("farmer" in prompt for prompt in prompts)


def test_a_share_of_every_part_of_a_budget() -> None:
    budget = smaller(Budget(steps=10, caps={"teacher_generated": 1001, "teacher_scored": 0}), 0.25)
    assert budget.steps == 2 and budget.caps == {"teacher_generated": 251, "teacher_scored": 0}
    assert smaller(Budget(trained_tokens=1000), 0.3).trained_tokens == 300
    assert smaller(Budget(flops=2e12), 0.25).flops == 5e11
    assert smaller(Budget(steps=2), 0.1).steps == 1


def test_a_trials_suite_has_the_arms_own_training_and_steps() -> None:
    setting = parse(changed(budget={"steps": 100}))
    arm = {
        "method": "paced",
        "rollouts": 4,
        "alpha": 0.25,
        "training": {"learning_rate": 0.5},
        "budget": {"steps": 60},
    }
    trial = scaled(setting, "paced+x", arm)
    method, training, budget = cell.recipe(trial, "paced+x")
    assert (method.alpha, method.rollouts, method.beta) == (0.25, 4, 1.0)  # type: ignore[attr-defined]
    assert training.learning_rate == 0.5 and training.batch_size == 8
    assert budget.steps == 30
    paper = scaled(parse(changed(budget="paper")), "paced+x", {"method": "paced", "alpha": 2.5})
    whole = cell.recipe(
        parse(changed(budget="paper", methods={"paced": {}}, reference="paced")), "paced"
    )
    method, training, budget = cell.recipe(paper, "paced+x")
    assert method.model_dump() == {**whole[0].model_dump(), "alpha": 2.5}
    assert training == whole[1]
    assert isinstance(paper.budget, Budget)


def test_a_problem_asked_twice_is_not_two_pairs() -> None:
    """4 of 40 problems lost in each of two looks: p is 0.13 by either, 0.05 if they were 8 of 80."""
    import optuna

    with pytest.warns(optuna.exceptions.ExperimentalWarning):
        pruner = optuna.pruners.WilcoxonPruner(p_threshold=0.1, n_startup_steps=20)
    study = optuna.create_study(direction="maximize", pruner=pruner)
    looks = [{"seed": 0, "share": share, "value": 1.0, "outcomes": [1] * 40} for share in (0.4, 1)]
    best = study.ask()
    for look in looks:
        _tell(look, best)
    told = [_reports({**look, "seed": seed}, best).keys() for look in looks for seed in (0, 1)]
    assert len(set().union(*told)) == 4 * 40  # each look of each seed by itself
    study.tell(best, 1.0)
    for lost, ends in ((4, False), (30, True)):
        trial = study.ask()
        for look in looks:
            worse = {**look, "outcomes": [0] * lost + [1] * (40 - lost)}
            _tell(worse, trial)
            assert surely_worse(worse, trial) == ends
        if not ends:
            assert trial.should_prune()  # pooled


def test_the_expected_best_of_n() -> None:
    rows = best_of_n([3.0, 1.0, 2.0])
    assert [row["best"] for row in rows] == [3.0, 3.0, 3.0]
    # n = 2: the pairs (1, 2), (1, 3), (2, 3)
    assert np.allclose([row["expected"] for row in rows], [2.0, (2 + 3 + 3) / 3, 3.0])
    assert [row["best"] for row in best_of_n([1.0, 3.0, 2.0])] == [1.0, 3.0, 3.0]


# -- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "objective, said",
    [
        ("micro_math", "'micro_math' is a test benchmark.*write dev or dev/micro_math"),
        ("math500", "'math500' is a test benchmark"),
        ("dev/micro_mth", "unknown 'dev/micro_mth': did you mean 'dev/micro_math'"),
    ],
)
def test_a_test_benchmark_is_no_objective(tmp_path: Path, objective: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_objective(parse(changed(sweep={"objective": objective})))
    with pytest.raises(ValueError, match=said):
        tune(suite(tmp_path, sweep={"objective": objective}), trials=1)
    assert not (tmp_path / "results").exists()  # before anything


def test_another_space_or_setting_is_another_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeps, "Trial", Fixed)
    path = suite(tmp_path, sweep={"confirm_seeds": 0})
    tune(path, trials=1)
    narrower = {"paced": {"only": ["alpha", "beta"], "alpha": {"high": 2}}, "confirm_seeds": 0}
    with pytest.raises(
        ValueError, match=r"space.alpha.high was 3, is 2. Say it as it was.*--set name="
    ):
        tune(suite(tmp_path, sweep=narrower), trials=2)
    with pytest.raises(ValueError, match=r"setting.budget.steps was 16, is 20"):
        tune(suite(tmp_path, sweep={"confirm_seeds": 0}, budget={"steps": 20}), trials=2)
    with pytest.raises(ValueError, match=r"setting.sweep.share was 0.5, is 0.25"):
        tune(suite(tmp_path, sweep={"confirm_seeds": 0, "share": 0.25}), trials=2)
    # The number of trials, workers and what the confirmation takes may change.
    tune(suite(tmp_path, sweep={"confirm_seeds": 0}, workers=2, seeds=5), trials=1)


def test_other_problems_under_the_same_name_are_another_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeps, "Trial", Fixed)
    rows = [{"problem": f"What is {i} plus {i * i}?", "answer": i + i * i} for i in range(400)]
    train = tmp_path / "train.jsonl"
    own = {"problems": {"own": {"path": str(train)}}, "sweep": {"confirm_seeds": 0}}
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tune(suite(tmp_path, **own), trials=1)
    train.write_text("".join(json.dumps(row) + "\n" for row in rows[:300]))
    with pytest.raises(ValueError, match=r"another sweep: training problems was .*--set name="):
        tune(suite(tmp_path, **own), trials=2)


@dataclass(frozen=True)
class Rising:
    """Each trial is better than the one before."""

    experiment: Any
    label: str
    folder: Path
    store: Path

    def __call__(self, params: dict[str, Any], trial: Any, report: Any) -> float:
        trial.set_user_attr("arm", params)
        return 0.1 + 0.1 * trial.number


def test_a_confirmation_is_of_the_best_that_it_confirmed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep that goes on and is cut before it confirms does not show the old confirmation beside a new best."""
    monkeypatch.setattr(sweeps, "Trial", Rising)
    monkeypatch.setattr(
        sweeps.pages, "write", lambda home: []
    )  # the page of a whole one is elsewhere
    path, file = suite(tmp_path), tmp_path / "results/small/sweep.json"

    def kept() -> Any:
        return json.loads(file.read_text())["studies"][0]["confirm"]

    def cut(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweeps, "confirm", lambda *_, **__: {"of": "the first"})
    tune(path, trials=2)
    monkeypatch.setattr(sweeps, "confirm", cut)
    for trials, found in ((2, {"of": "the first"}), (3, None)):
        with pytest.raises(KeyboardInterrupt):
            tune(path, trials=trials)
        assert kept() == found


@dataclass(frozen=True)
class Fixed:
    experiment: Any
    label: str
    folder: Path
    store: Path

    def __call__(self, params: dict[str, Any], trial: Any, report: Any) -> float:
        arm = {"method": SUITE["methods"][self.label].get("method", self.label)}
        trial.set_user_attr("arm", {**arm, **SUITE["methods"][self.label], **params})
        return 0.5


def test_bad_input_is_one_line_before_anything_runs(tmp_path: Path) -> None:
    path = suite(tmp_path, methods={**SUITE["methods"], "rkl": {}})
    for method, more, said in (
        ("pacd", {}, "unknown method 'pacd' in suite 'small': did you mean 'paced'"),
        ("rkl", {}, "rkl of 'small': no field to search"),
        ("paced", {"sampler": "tpee"}, "unknown sampler 'tpee'.*did you mean 'tpe'"),
        ("paced", {"pruner": "wilcox"}, "unknown pruner 'wilcox'.*did you mean 'wilcoxon'"),
        ("paced", {"storage": "sqlite:////no/such/place/x.db"}, "cannot use sqlite:///"),
    ):
        with pytest.raises(ValueError, match=said) as error:
            tune(path, method, trials=1, **more)
        assert "\n" not in str(error.value)


def test_a_comparison_takes_the_best_settings_of_equal_effort(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = suite(tmp_path, sweep={"confirm_seeds": 0}, methods={**SUITE["methods"], "rkl": {}})
    results = tmp_path / "results"
    with pytest.raises(
        ValueError, match=r"no finished sweep of sft: run retort sweep small --method"
    ):
        compare(path, tuned=True, results=results, quiet=True, track=False)
    monkeypatch.setattr(sweeps, "Trial", Fixed)
    tune(path, "sft", trials=1)
    tune(path, "paced", trials=2)
    with pytest.raises(ValueError, match=r"not tuned with equal effort .trials_asked was 1, is 2"):
        compare(path, tuned=True, results=results, quiet=True, track=False)
    tune(path, "sft", trials=2)
    record = results / "small/sweep.json"
    whole = record.read_text()
    running = json.loads(whole)  # as it is written while trials run
    running["studies"][0]["trials"][1]["state"] = "running"
    record.write_text(json.dumps(running))
    with pytest.raises(ValueError, match=r"the sweep of sft has ended 1 of 2 trials: run"):
        compare(path, tuned=True, results=results, quiet=True, track=False)
    record.write_text(whole)
    with pytest.raises(ValueError, match=r"of another setting .budget.steps was 16, is 2"):
        compare(path, tuned=True, overrides=["budget.steps=2"], results=results, quiet=True)
    ran: list[Experiment] = []

    def jobs(setting: Experiment, *rest: Any) -> Any:
        ran.append(setting)
        raise KeyboardInterrupt  # only what would run

    monkeypatch.setattr(cell, "jobs", jobs)
    with pytest.raises(KeyboardInterrupt):
        compare(path, tuned=True, results=results, quiet=True, track=False)
    (setting,) = ran
    best = {
        s["label"]: s["best"]["params"]
        for s in json.loads((results / "small/sweep.json").read_text())["studies"]
    }
    assert setting.name == "small-tuned"
    assert setting.methods["paced"] == {
        "method": "paced",
        **SUITE["methods"]["paced"],
        **best["paced"],
    }
    assert setting.methods["rkl"] == {}  # nothing to tune
