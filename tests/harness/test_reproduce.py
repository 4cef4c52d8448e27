"""A run again from its capsule: bit for bit, also after a kill, and where it parts if it is not the same run."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from harness import capsule, cell, cli, compare, evaluation
from harness.compare import prepare
from harness.config import parse
from harness.reproduce import (
    Answers,
    Outcome,
    answers,
    contents,
    differences,
    find,
    first_step,
    reproduce,
)

SUITE: dict[str, Any] = {
    "name": "small",
    "student": "micro/student",
    "teacher": "micro/teacher",
    "problems": {"micro_math": {"n": 24, "levels": [1, 2]}},
    "benchmarks": {"micro_math": {"limit": 12, "levels": [1, 2, 3], "max_new_tokens": 48}},
    "seeds": 2,
    "budget": {"steps": 5},
    "methods": {"sft": {"samples": 2}, "own": {"method": "rkl"}},  # off and on policy
    "training": {"batch_size": 6, "checkpoint_every": 2},
    "sampling": {"max_new_tokens": 48},
    "threads": 1,
}


def killed_at(step: int, job: cell.Job) -> None:
    def report(phase: str, done: int, total: int) -> None:
        if (phase, done) == ("train", step):
            os.kill(os.getpid(), signal.SIGKILL)

    cell.run(job, report)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison whose on-policy run was killed at step 3 and taken up again."""
    root = tmp_path_factory.mktemp("repeat") / "results"
    setting = parse(SUITE)
    folder = root / "small"
    folder.mkdir(parents=True)
    prepare(setting, folder)
    job = next(j for j in cell.jobs(setting, ["own"], folder, root / "store") if j.label == "own")
    child = multiprocessing.get_context("spawn").Process(target=killed_at, args=(3, job))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert job.capsule_file.is_file() and not job.run_file.is_file()
    assert (
        torch.load(job.run_file.with_name("checkpoint.pt"), weights_only=False)["state"]["step"]
        == 2
    )
    compare(setting, seeds=1, results=root, quiet=True, track=False)
    return root


@pytest.mark.parametrize("label", ["sft", "own", "base"])
def test_a_run_is_the_same_bit_for_bit(results: Path, tmp_path: Path, label: str) -> None:
    said: list[str] = []
    if label == "base":  # a repetition that was cut is gone on with
        (tmp_path / "again").mkdir()
        of = {"of": str((results / "small/runs/base/0").resolve())}
        (tmp_path / "again/reproduced.json").write_text(json.dumps(of))
    found = reproduce(
        f"small/{label}/0",
        results=results,
        into=tmp_path / "again",
        tier="T1",
        say=said.append,
        quiet=True,
    )
    assert found.identical and found.equal, found.lines()
    same = "12 samples and their verdicts"  # all that there is of the untrained student
    same = same if label == "base" else f"weights, loss curve, {same}, charged costs"
    assert found.lines() == [f"identical bit for bit: {same}"]
    assert (
        said[0].endswith(str(tmp_path / "again"))
        and "T1: equal bit for bit is expected" in said[-1]
    )
    if label == "base":
        return
    first, second = (
        json.loads((folder / f"runs/{label}/0/run.json").read_text())
        for folder in (results / "small", tmp_path / "again")
    )
    assert first["student"] == second["student"] and first["curve"] == second["curve"]
    assert len(first["curve"]) == 5 and first["student"] != first["start"]
    # the teacher wrote and scored anew; the samples were not taken from the comparison's store
    paid, spent = second["ledger"]["charged"], second["ledger"]["spent"]
    for quantity in ("teacher_generated", "teacher_scored", "student_generated"):
        assert spent[quantity] == paid[quantity]
    assert spent["teacher_generated" if label == "sft" else "student_generated"] > 0


def test_a_capsule_holds_all_that_decides_a_run(results: Path) -> None:
    """The suite's own settings are written out, down to a method's defaults."""
    kept = json.loads((results / "small/runs/own/0/capsule.json").read_text())
    arm = kept["experiment"]["methods"]["own"]
    assert arm["method"] == "rkl" and "reduction" in arm  # a default
    assert kept["experiment"]["training"]["weight_decay"] == 0.0
    assert (kept["label"], kept["seed"], kept["data_seed"]) == ("own", 0, 0)
    assert kept["problems"] == capsule.file_digest(results / "small/problems.jsonl")
    (conditions,) = kept["conditions"]  # killed and taken up under the same
    assert conditions["threads"] == 1 and conditions["packages"]["torch"] == capsule.lock()["torch"]
    assert {"cpu", "torch build", "commit", "instructions", "processes"} <= set(conditions)
    run = json.loads((results / "small/runs/own/0/run.json").read_text())
    weights = results / "small/models/own/0/model.safetensors"
    assert run["weights"] == {"model.safetensors": capsule.file_digest(weights)}
    teacher = cell.loaders(parse(SUITE), cell.student_model("micro/student"))["teacher"]()
    assert run["models"]["teacher"] == teacher.identity


def altered(results: Path, tmp_path: Path, **changes: Any) -> Path:
    """A copy of the comparison in which a capsule says something else."""
    import shutil

    shutil.copytree(
        results / "small", tmp_path / "results/small", ignore=shutil.ignore_patterns("reproduced")
    )
    file = tmp_path / "results/small/runs/sft/0/capsule.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return file


def test_another_seed_differs_from_the_first_step(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the command: exit status 1, and the second time the folder is refused."""
    altered(results, tmp_path, seed=1)
    monkeypatch.chdir(tmp_path)
    words = ["reproduce", "small/sft/0", "--store", str(results / "store"), "--tier", "T1"]
    done = CliRunner().invoke(cli.app, words, catch_exceptions=False)
    assert done.exit_code == 1, done.output
    text = done.output.replace("\n", " ")
    assert "different at T1: the loss curve differs first in stage sft, step 1: loss" in text
    assert "the student's weights differ" in text
    with pytest.raises(ValueError, match=r"holds a finished repetition.*--into"):
        CliRunner().invoke(cli.app, words, catch_exceptions=False)


def test_an_old_run_goes_by_its_summary(results: Path, tmp_path: Path) -> None:
    """One without capsule, whose run.json has neither weights nor models."""
    file = altered(results, tmp_path)
    file.unlink()
    run = file.with_name("run.json")
    data = json.loads(run.read_text())
    del data["weights"], data["models"]
    run.write_text(json.dumps(data))
    said: list[str] = []
    found = reproduce(
        str(run), results=tmp_path, store=results / "store", say=said.append, quiet=True
    )
    assert found.identical and found.tier == "T0"
    assert any("from before capsule.json" in line for line in said)
    kept = contents(file.parent)
    assert kept["experiment"]["methods"] == {"sft": {"method": "sft", **data["config"]}}


def test_an_old_run_that_goes_on_does_not_pass_for_a_new_one(results: Path, tmp_path: Path) -> None:
    """Its student was trained under conditions that nobody knows, its answers under those of now."""
    file = altered(results, tmp_path)
    (now,) = json.loads(file.read_text())["conditions"]
    file.unlink()
    folder = tmp_path / "results/small"
    jobs = cell.jobs(parse({**SUITE, "seeds": 1}), ["sft"], folder, results / "store")
    jobs[1].samples_file("micro_math").unlink()
    for _ in range(2):
        cell.run(jobs[1], lambda phase, done, total: None)
        assert json.loads(file.read_text())["conditions"] == [{}, now]
    found = reproduce(str(file), store=results / "store", say=lambda line: None, quiet=True)
    assert found.identical and found.tier == "T0"


def test_training_problems_that_are_gone_are_loaded_again(results: Path, tmp_path: Path) -> None:
    file = altered(results, tmp_path)
    problems = tmp_path / "results/small/problems.jsonl"
    kept = problems.read_bytes()
    problems.write_bytes(kept[: kept.index(b"\n") + 1])
    said: list[str] = []
    found = reproduce(str(file.parent), store=results / "store", say=said.append, quiet=True)
    assert found.identical and not any("training problems" in line for line in said)
    assert (tmp_path / "results/small/reproduced/sft/0/problems.jsonl").read_bytes() == kept


# -- by hand ------------------------------------------------------------------------------------

HERE = {
    "commit": "abc", "threads": 2, "cpu": "A", "packages": {"torch": "1", "numpy": "2", "zip": "3"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({}, []),
        ({"threads": 4}, ["threads: 2 then, 4 now"]),
        ({"commit": "abd-dirty"}, ["commit: abc then, abd-dirty now", "commit abd-dirty has changes that no commit holds"]),
        (
            {"packages": {"torch": "1.1", "numpy": "2", "new": "5"}},
            ["packages: torch 1 then, 1.1 now; new none then, 5 now; zip 3 then, none now"],
        ),
    ],
)  # fmt: skip
def test_the_environment_is_compared_in_words(changes: dict[str, Any], lines: list[str]) -> None:
    assert differences(HERE, {**HERE, **changes}) == lines


def test_a_summary_knows_few_packages_and_others_are_no_difference() -> None:
    then = {"packages": {"torch": "1"}}
    assert differences(then, HERE) == []


def row(step: int, loss: float, **more: Any) -> dict[str, Any]:
    return {"step": step, "stage": "a" if step < 3 else "b", "loss": loss, "lr": 0.5, **more}


def test_the_first_step_that_differs() -> None:
    curve = [row(1, 2.0), row(2, 1.0), row(3, float("nan"))]
    assert first_step(curve, [dict(r) for r in curve]) is None
    later = [*curve[:2], row(3, 0.25)]
    assert first_step(curve, later) == "stage b, step 3: loss nan then, 0.25 now"
    nearly = [row(1, 2.0), row(2, 1.0 + 2**-52), row(3, 0.0)]
    assert first_step(curve, nearly) == "stage a, step 2: loss 1.0 then, 1.0000000000000002 now"
    rate = [{**row(1, 2.0), "lr": 0.25}, *curve[1:]]
    assert first_step(curve, rate) == "stage a, step 1: lr 0.5 then, 0.25 now"
    assert first_step(curve[:2], curve) == "stage b, step 3, which only the run of now has"


def test_samples_are_paired_by_problem_and_index() -> None:
    def sample(
        problem: str, index: int, correct: bool, text: str = "t", status: str = ""
    ) -> dict[str, Any]:
        return {"problem": problem, "sample": index, "correct": correct, "text": text, "status": status or ("ok" if correct else "wrong")}  # fmt: skip

    first = [sample("p", 0, True), sample("p", 1, False), sample("q", 0, False), sample("r", 0, True), sample("s", 0, True)]  # fmt: skip
    second = [
        sample("q", 0, True, "u"),  # up
        sample("p", 1, True),  # up on p, and the next takes it back
        sample("p", 0, False, "v"),
        sample("r", 0, True, status="late"),  # another verdict, as right as before
        sample("x", 0, True),  # s is missing there, x here
    ]
    found = answers(first, second)
    assert found == Answers(samples=4, missing=2, texts=2, verdicts=4, delta=0.25, up=1, down=0)
    assert not found.same and answers(first, list(reversed(first))).same


def test_what_each_tier_takes() -> None:
    """At T0 the sign test decides: 9 problems of 10 one way have p = 22/1024 = 0.021, 8 of 10 have 0.109."""
    few = Answers(100, 0, 40, 10, 0.06, 8, 2)
    many = replace(few, up=9, down=1)
    assert few.p == pytest.approx(112 / 1024) and many.p == pytest.approx(22 / 1024)
    assert Outcome("T0", [], "step 1", answers={"m": few}).equal
    assert not Outcome("T0", [], "step 1", answers={"m": few, "n": many}).equal
    assert not Outcome("T1", [], "step 1", answers={"m": few}).equal
    assert not Outcome("T0", [], "step 1", steps=False, answers={"m": few}).equal
    assert not Outcome("T0", [], answers={"m": replace(few, missing=1)}).equal
    same = Answers(100, 0, 0, 0, 0.0, 0, 0)
    assert Outcome("T1", [], answers={"m": same}).equal and same.p == 1
    for change in ({"weights": False}, {"curve": "x"}, {"charged": {"flops": (1.0, 2.0)}}):
        assert not Outcome("T1", [], answers={"m": same}, **change).equal  # type: ignore[arg-type]
    assert Outcome("T0", [], steps=False).lines() == [
        "different at T0: the stages have other steps"
    ]
    lines = Outcome("T0", [], "stage a, step 1", answers={"m": few}).lines()
    assert lines[0] == "equal within T0: the loss curve differs first in stage a, step 1"
    assert (
        lines[1]
        == "m: 40 of 100 texts and 10 verdicts differ, accuracy +6.00 points (sign test p = 0.11)"
    )


@pytest.mark.parametrize(
    ("run", "more", "words"),
    [
        ("small/sfd/0", {}, r"no run 'small/sfd/0'.*did you mean 'small/sft/0'"),
        ("small/sft/0", {"tier": "T2"}, r"'T2': one of T0, T1 \(T2, batch-invariant kernels, is not offered\)"),
    ],
)  # fmt: skip
def test_what_cannot_be_repeated_is_one_line(
    results: Path, run: str, more: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words) as error:
        reproduce(run, results=results, quiet=True, **more)
    assert "\n" not in str(error.value)


def test_a_folder_with_other_files_is_refused_before_anything_runs(
    results: Path, tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds other files: remove it, or give another folder"):
        reproduce("small/sft/0", results=results, into=tmp_path, quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    (tmp_path / "reproduced.json").write_text('{"of": "/another/runs/sft/0"}')
    with pytest.raises(ValueError, match=r"holds other files"):
        reproduce("small/sft/0", results=results, into=tmp_path, quiet=True)


def test_a_run_is_found_by_its_folder_too(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = results / "small/runs/sft/0"
    for run in (str(home), str(home / "run.json"), str(home / "capsule.json"), "small/sft/0"):
        assert find(run, results) == home
    monkeypatch.chdir(home.parent)
    assert find("0", results) == home


def test_an_unfinished_run_is_refused(results: Path, tmp_path: Path) -> None:
    file = altered(results, tmp_path)
    evaluation.read_records(tmp_path / "results/small/samples/micro_math--sft--0.parquet")
    (tmp_path / "results/small/samples/micro_math--sft--0.parquet").unlink()
    with pytest.raises(ValueError, match=r"is not finished: there is no .*micro_math--sft--0"):
        reproduce(str(file), quiet=True)
