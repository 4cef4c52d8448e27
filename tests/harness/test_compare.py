"""A comparison from YAML to summary: resumes after kill -9 anywhere, shares samples, refuses bad input before compute."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from harness import compare, points
from harness.compare import check, experiment, in_bands, prepare
from harness.config import parse

SUITE: dict[str, Any] = {
    "name": "small",
    "student": "micro/student",
    "teacher": "micro/teacher",
    "problems": {"micro_math": {"n": 40, "levels": [1, 2]}},
    "benchmarks": {"micro_math": {"limit": 30, "max_new_tokens": 64}},
    "seeds": 2,
    "budget": {"steps": 6},
    "methods": {"sft": {"samples": 2}, "paced": {"rollouts": 4, "references": 2}},
    "training": {"batch_size": 8, "checkpoint_every": 2},
    "sampling": {"max_new_tokens": 64},
    "threads": 1,
}


def suite(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps({**SUITE, **changes}))  # JSON is YAML
    return path


def judged(summary: dict[str, Any]) -> Any:
    """What may not differ between two runs of one suite."""
    cells = [{k: v for k, v in cell.items() if k != "ledger"} for cell in summary["cells"]]
    return cells, summary["pairs"], summary["protocol"], summary["config_hash"]


def charged(summary: dict[str, Any]) -> Any:
    return [
        {k: v for k, v in cell["ledger"]["charged"].items() if k != "seconds"}
        for cell in summary["cells"]
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An uninterrupted run, in this process."""
    folder = tmp_path_factory.mktemp("whole")
    path = suite(folder)
    return folder, compare(path, results=folder / "results", quiet=True, track=False)


def test_a_log_without_its_end_gets_one(whole: tuple[Path, dict[str, Any]]) -> None:
    """A cell that was killed when all its files were there has nothing left to do but this."""
    folder, _ = whole
    log = folder / "results/small/runs/sft/0/points.jsonl"
    *lines, last = log.read_bytes().splitlines(keepends=True)
    assert b'"end"' in last
    log.write_bytes(b"".join(lines))
    compare(folder / "small.yaml", results=folder / "results", quiet=True, track=False)
    logged(folder / "results/small")


def test_the_summary_has_the_documented_form(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = whole
    assert json.loads((folder / "results/small/summary.json").read_text()) == summary
    assert {"name", "protocol", "environment", "cells", "pairs", "ledger"} <= set(summary)
    arms = [(cell["method"], cell["seed"]) for cell in summary["cells"]]
    assert arms == [("base", 0), ("sft", 0), ("sft", 1), ("paced", 0), ("paced", 1)]
    for cell in summary["cells"]:
        assert cell["n_problems"] == 30 and 0 <= cell["accuracy"] <= 1
        assert {"ci95", "truncated", "unparsed", "ledger", "n_samples", "benchmark"} <= set(cell)
    pairs = {(pair["a"], pair["b"]): pair for pair in summary["pairs"]}
    assert {("paced", "sft"), ("sft", "base"), ("paced", "base")} == set(pairs)
    accuracy = {
        arm: sum(c["accuracy"] for c in summary["cells"] if c["method"] == arm)
        / sum(c["method"] == arm for c in summary["cells"])
        for arm in ("base", "sft", "paced")
    }
    for (a, b), pair in pairs.items():
        assert pair["delta"] == pytest.approx(accuracy[a] - accuracy[b])
        assert pair["verdict"] in ("better", "worse", "cannot tell")
        assert {"ci95", "p", "p_holm", "mde"} <= set(pair)
    for name in ("report.html", "report.md", "table.tex"):
        assert (folder / "results/small" / name).stat().st_size > 200
    assert (folder / "results/small/models/sft/1/model.safetensors").is_file()


def logged(folder: Path) -> None:
    """What the runs logged as they went on is what they kept at their end."""
    kept = sorted(folder.glob("runs/*/*/run.json"))
    assert len(kept) == 4
    for path in kept:
        found = points.read(path.with_name("points.jsonl"))
        steps = [{k: v for k, v in row.items() if k != "time"} for row in found.steps]
        assert steps == json.loads(path.read_text())["curve"] and len(steps) == 6
        assert found.samples[-1]["phase"] == "end"


def test_runs_log_their_points_as_they_go(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = whole
    logged(folder / "results/small")
    assert points.read(folder / "results/small/runs/base/0/points.jsonl").samples


def test_arms_share_the_teachers_samples(whole: tuple[Path, dict[str, Any]]) -> None:
    _, summary = whole
    ledgers = {(c["method"], c["seed"]): c["ledger"] for c in summary["cells"]}
    first, rest = ledgers["sft", 0], [ledgers["sft", 1], ledgers["paced", 1]]
    assert first["spent"]["teacher_generated"] > 0
    assert all(ledger["spent"]["teacher_generated"] == 0 for ledger in rest)
    assert all(ledger["charged"]["teacher_generated"] > 0 for ledger in rest)


def test_a_second_run_does_nothing(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = whole
    files = {
        path: path.stat().st_mtime_ns
        for part in ("models", "runs", "samples")
        for path in (folder / "results/small" / part).rglob("*")
    }
    again = compare(suite(folder), results=folder / "results", quiet=True, track=False)
    assert judged(again) == judged(summary)
    assert files == {path: path.stat().st_mtime_ns for path in files}


def test_more_test_problems_reuse_what_is_there(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = whole
    path = suite(folder, benchmarks={"micro_math": {"limit": 34, "max_new_tokens": 64}})
    more = compare(
        path, methods=["sft"], seeds=1, results=folder / "results", quiet=True, track=False
    )
    assert [cell["n_problems"] for cell in more["cells"]] == [34, 34]
    assert [pair["note"] for pair in more["pairs"]] and more["pairs"][0]["verdict"] == "cannot tell"


def test_another_configuration_under_the_same_name_is_refused(
    whole: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything runs."""
    folder, _ = whole
    path = suite(folder, training={"batch_size": 4})
    monkeypatch.setattr("harness.compare.run", lambda *given: pytest.fail("it ran"))
    with pytest.raises(ValueError, match=r"another configuration.*--set name="):
        compare(path, results=folder / "results", quiet=True, track=False)


def test_data_seeds_redraw_the_teachers_samples(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = whole
    path = suite(folder, name="redrawn", data_seeds=[0, 1], seeds=1)
    both = compare(path, methods=["sft"], results=folder / "results", quiet=True, track=False)
    cells = [cell for cell in both["cells"] if cell["method"] == "sft"]
    assert [(cell["seed"], cell["data_seed"]) for cell in cells] == [(0, 0), (0, 1)]
    first, second = (cell["ledger"] for cell in cells)
    assert first["spent"]["teacher_generated"] == 0 < second["spent"]["teacher_generated"]


# Each point is a file that a run makes on its way; the process group is killed when it appears.
POINTS = [
    "store/samples/**/*.arrow",  # while the teacher generates
    "results/small/runs/sft/0/checkpoint.pt",  # while it trains
    "results/small/models/sft/0/model.safetensors",  # trained, not evaluated
    "results/small/samples/*--sft--0.parquet",  # evaluated
    "results/small/runs/paced/0/checkpoint.pt",  # between a forward and a reverse stage
    "results/small/samples/*--paced--1.parquet",  # before the summary
]


@pytest.mark.slow
def test_kill_9_anywhere_ends_in_the_same_cells_and_pairs(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    _, summary = whole
    path = suite(tmp_path)
    command = [
        sys.executable,
        "-m",
        "harness",
        "compare",
        str(path),
        "--results",
        str(tmp_path / "results"),
    ]
    environment = {
        **os.environ,
        "RETORT_STORE": str(tmp_path / "store"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "OMP_NUM_THREADS": "1",
    }
    killed = 0
    for point in POINTS:
        before = set(tmp_path.glob(point))
        process = subprocess.Popen(
            command, env=environment, cwd=tmp_path, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while process.poll() is None and set(tmp_path.glob(point)) <= before:
            time.sleep(0.005)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            killed += 1
        process.wait()
    assert killed >= 5
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    resumed = json.loads((tmp_path / "results/small/summary.json").read_text())
    assert judged(resumed) == judged(summary)
    assert charged(resumed) == charged(summary)
    logged(tmp_path / "results/small")


@pytest.mark.slow
def test_two_workers_end_in_the_same_cells_and_pairs(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    _, summary = whole
    two = compare(suite(tmp_path, workers=2), results=tmp_path / "results", quiet=True, track=False)
    assert judged(two)[:2] == judged(summary)[:2]
    assert charged(two) == charged(summary)
    spent = [c["ledger"]["spent"]["teacher_generated"] for c in two["cells"]]
    alone = [c["ledger"]["spent"]["teacher_generated"] for c in summary["cells"]]
    assert sum(spent) == sum(alone)  # no block was sampled twice


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_nothing_is_lost(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Files may not grow beyond 300 kB, as on a disk that fills up; then they may."""
    _, summary = whole
    limited = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY));"
        "from harness.cli import main; main()"
    )
    words = ["compare", str(suite(tmp_path)), "--results", str(tmp_path / "results")]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    options: Any = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    full = subprocess.run([sys.executable, "-c", limited, *words], **options)
    assert full.returncode == 2
    last = full.stderr.strip().splitlines()[-1]
    assert last.startswith("retort: ") and "could not be written" in last, full.stderr
    assert "Traceback" not in full.stderr
    assert not list(tmp_path.rglob("*.partial"))
    done = subprocess.run([sys.executable, "-m", "harness", *words], **options)
    assert done.returncode == 0, done.stderr
    assert judged(json.loads((tmp_path / "results/small/summary.json").read_text())) == judged(
        summary
    )


def test_bands_of_levels_are_judged_by_themselves() -> None:
    """Records of one benchmark serve its bands again; a level in no band serves none."""
    bands = {"easy": [1], "hard": [2, 4]}
    setting = parse({**SUITE, "benchmarks": {"micro_math": {"bands": bands}, "micro_code": {}}})
    records = [
        {"benchmark": benchmark, "level": level, "correct": level == 1}
        for benchmark in ("micro_math", "micro_code")
        for level in (1, 2, 3, 4)
    ]
    found = in_bands(records, setting)
    assert [(r["benchmark"], r["level"]) for r in found] == [
        ("micro_math/easy", 1),
        ("micro_math/hard", 2),
        ("micro_math/hard", 4),
    ]
    assert records[0]["benchmark"] == "micro_math" and found[0]["correct"]


def test_a_comparison_gives_its_bands_tables_and_verdicts(
    whole: tuple[Path, dict[str, Any]],
) -> None:
    folder, summary = whole
    options = {"limit": 30, "max_new_tokens": 64, "bands": {"low": [1, 2]}}
    path = suite(folder, benchmarks={"micro_math": options})
    again = compare(path, methods=["sft"], results=folder / "results", quiet=True, track=False)
    by_name = {
        name: [c for c in again["cells"] if c["benchmark"] == name]
        for name in ("micro_math", "micro_math/low")
    }
    assert [c["n_problems"] for c in by_name["micro_math"]] == [30] * 3
    counts = {c["n_problems"] for c in by_name["micro_math/low"]}
    assert len(counts) == 1 and 0 < counts.pop() < 30
    assert {p["benchmark"] for p in again["pairs"]} == set(by_name)
    # nothing was answered again: a band is a way to read what is there
    held = {c["seed"]: c["accuracy"] for c in summary["cells"] if c["method"] == "sft"}
    assert {c["seed"]: c["accuracy"] for c in by_name["micro_math"] if c["method"] == "sft"} == held


# -- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"methods": {"sftt": {}}, "reference": "base"},
            ["unknown method 'sftt'", "did you mean 'sft'"],
        ),
        ({"benchmarks": {"micro_maths": {}}}, ["micro_maths", "micro_math"]),
        (
            {"benchmarks": {"micro_math": {"options": {"families": ["redoce"]}}}},
            ["no family 'redoce'", "reduce"],
        ),
        ({"problems": {"micro_meth": {}}}, ["micro_meth", "micro_math"]),
        ({"student": "micro/studnt"}, ["micro/studnt", "micro/student"]),
        ({"student": "./nowhere"}, ["./nowhere"]),
        (
            {"methods": {"paced": {"alpha": -1}}, "reference": "base"},
            ["alpha", "greater than or equal to 0"],
        ),
        ({"budget": "paper", "methods": {"sft": {}}}, []),
        ({"teacher": {"traces": "missing.jsonl"}}, ["missing.jsonl"]),
    ],
)
def test_bad_input_is_one_line_before_any_compute(
    tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    if not words:  # a valid one among them: the check itself must be able to pass
        check(experiment(suite(tmp_path, **changes)), ["sft"])
        return
    with pytest.raises(ValueError) as error:
        compare(suite(tmp_path, **changes), results=tmp_path / "results", quiet=True, track=False)
    assert "\n" not in str(error.value).strip()
    for word in words:
        assert word in str(error.value)
    assert not (tmp_path / "results").exists()


def test_a_teacher_that_only_replays_is_refused_where_logits_are_needed(tmp_path: Path) -> None:
    traces = tmp_path / "traces.jsonl"
    traces.write_text(
        json.dumps({"problem": "1+1=?", "response": "<think>\n2\n</think>\n2"}) + "\n"
    )
    setting = parse({**SUITE, "teacher": {"traces": str(traces)}})
    with pytest.raises(ValueError, match=r"paced needs the teacher's logits.*sft"):
        check(setting, ["sft", "paced"])
    check(setting, ["sft"])


def test_a_read_only_results_folder_is_refused(tmp_path: Path) -> None:
    blocked = tmp_path / "results"
    blocked.write_text("a file where a folder should be")
    with pytest.raises(ValueError, match=r"cannot write to .*results.*--results"):
        compare(suite(tmp_path), results=blocked, quiet=True, track=False)


def test_training_problems_that_overlap_a_benchmark_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [{"id": str(i), "problem": f"{i}+1=?", "answer": str(i + 1)} for i in range(3)]
    from benchmarks import PROBLEMS

    (planted,) = PROBLEMS["micro_math"].load("test", 1, levels=(1,))
    rows.append({"id": "planted", "problem": planted.prompt, "answer": str(planted.answer)})
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    setting = parse({**SUITE, "problems": {str(data): {}}})
    folder = tmp_path / "out"
    folder.mkdir()
    counts = prepare(setting, folder)
    assert (counts["loaded"], counts["kept"]) == (4, 3)
    assert "planted" not in (folder / "problems.jsonl").read_text()
