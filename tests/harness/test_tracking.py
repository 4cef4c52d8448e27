"""The MLflow mirror: one database, made once, and read back through the client."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request

import pytest

from harness import mirror, report, tracking
from harness.report import sweep
from tests.harness.test_report import example
from tests.harness.test_sweep_report import confirm, data, pruned, study, trial

pytest.importorskip("mlflow")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A small comparison, recorded as it grew: unfinished, finished, and once more."""
    from mlflow import MlflowClient

    root = tmp_path_factory.mktemp("results")
    folder = example(root / "paced-frontier", seeds=2, problems=24, arms=["sft", "paced"], steps=30)
    report.write(folder)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_DISABLE_TELEMETRY"):
        os.environ.pop(name, None)
    file = folder / "runs" / "arm1" / "1" / "run.json"
    whole = json.loads(file.read_text())
    whole["training"] = {"learning_rate": 0.25}  # of this arm alone
    whole["ledger"]["purposes"] = {"teacher_generated": {"hint": 120, "repair": 30}}
    file.write_text(json.dumps({**whole, "curve": whole["curve"][:20]}))
    assert tracking.record(folder)
    file.write_text(json.dumps(whole))
    first = tracking.record(folder)
    second = tracking.record(folder)
    client = MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}")
    return folder, first, second, client


def test_round_trip(recorded):
    """Everything in one test, as the database costs seconds."""
    folder, first, second, client = recorded
    assert first == second
    experiment = client.get_experiment_by_name("paced-frontier")
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 1 + 1 + 2 * 2  # parent, base, two methods of two seeds: no doubles
    parent = client.get_run(first)
    assert parent.info.status == "FINISHED"
    tags = parent.data.tags
    assert (tags["name"], tags["protocol"], tags["config_hash"]) == (
        "paced-frontier",
        "5f0c2a91",
        "c0ffee42",
    )
    assert (tags["commit"], tags["version"]) == ("abc1234", "0.1.0")
    assert "## Leaderboard: micro_code" in tags["mlflow.note.content"]
    assert "## Verdicts" not in tags["mlflow.note.content"]
    artifacts = {item.path for item in client.list_artifacts(first)}
    assert artifacts == {*mirror.ARTIFACTS, "problems", "plots"}
    assert (folder.parent / "mlartifacts").is_dir()

    children = {r.data.tags["retort.key"]: r for r in runs if r.info.run_id != first}
    assert all(run.data.tags["mlflow.parentRunId"] == first for run in children.values())
    paced = children["arm1/1"]
    assert paced.data.params["beta"] == "2.0"
    assert paced.data.params["budget.steps"] == "30"
    assert paced.data.params["training.learning_rate"] == "0.25"
    assert children["arm1/0"].data.params.get("training.learning_rate") != "0.25"
    assert paced.data.params["seed"] == "1"
    assert paced.data.metrics["purposes/teacher_generated.repair"] == 30
    assert paced.data.tags["method"] == "paced"
    assert paced.data.tags["teacher"] == "micro/teacher"
    summary = json.loads((folder / "summary.json").read_text())
    cell = next(
        c
        for c in summary["cells"]
        if (c["method"], c["seed"], c["benchmark"]) == ("paced", 1, "micro_math")
    )
    assert paced.data.metrics["accuracy/micro_math"] == pytest.approx(cell["accuracy"])
    assert paced.data.metrics["charged/teacher_generated"] == pytest.approx(3.2e5 * 1.6)
    assert paced.data.metrics["spent/teacher_generated"] == pytest.approx(1e5)
    assert children["base/0"].data.metrics.keys() >= {"accuracy/micro_math", "unparsed/micro_code"}

    curve = json.loads((folder / "runs" / "arm1" / "1" / "run.json").read_text())["curve"]
    history = client.get_metric_history(paced.info.run_id, "loss")  # grown from 20 points to 30
    assert [(p.step, p.value) for p in sorted(history, key=lambda p: p.step)] == [
        (row["step"], row["loss"]) for row in curve
    ]
    assert len(client.get_metric_history(paced.info.run_id, "accuracy/micro_math")) == 1
    _another_student_replaces_its_run(folder, client, paced, experiment.experiment_id)


def _another_student_replaces_its_run(folder, client, paced, experiment):
    file = folder / "runs" / "arm1" / "1" / "run.json"
    run = json.loads(file.read_text())
    run["curve"][0]["loss"] += 1
    file.write_text(json.dumps(run))
    tracking.record(folder)
    runs = client.search_runs([experiment])
    (new,) = [r for r in runs if r.data.tags["retort.key"] == "arm1/1"]
    assert new.info.run_id != paced.info.run_id
    assert new.data.metrics["accuracy/micro_math"] == paced.data.metrics["accuracy/micro_math"]
    assert len(runs) == 6


def sweep_record(folder, *studies):
    folder.mkdir(exist_ok=True)
    found = {**data(*studies, name="tuned"), "student": "micro/student"}
    (folder / "sweep.json").write_text(json.dumps(found))
    sweep.write(folder)
    return tracking.record_sweep(folder)


def by_key(client, parent):
    experiment = client.get_experiment_by_name("tuned").experiment_id
    runs = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert len(runs) == len({run.data.tags["retort.key"] for run in runs})
    return {run.info.run_name: run for run in runs}


def test_a_sweep_is_a_run_a_study_and_a_child_a_trial(recorded):
    """Recorded while trials run, at its end, and once more; in the database that is there."""
    folder, _, _, client = recorded
    folder = folder.parent / "sweep_1"
    unfinished = {"value": None, "ci95": None, "seconds": None, "ledger": None}
    trials = [
        trial(0, {"alpha": 1.0, "beta": 1.0}, 0.503),
        pruned(1, {"alpha": 2.5, "beta": 0.25}),
        trial(2, {"alpha": 0.4, "beta": 1.7}, None, state="running")
        | {**unfinished, "points": [{"share": 0.25, "value": 0.4}]},
        trial(3, {}, None, state="waiting", started=None, points=[]) | unfinished,
    ]
    (first,) = sweep_record(folder, study("_paced_", trials, asked=4))
    assert client.get_run(first).info.status == "RUNNING"
    before = by_key(client, first)
    assert {name: run.info.status for name, run in before.items()} == {
        "_paced_ 000": "FINISHED",
        "_paced_ 001": "KILLED",
        "_paced_ 002": "RUNNING",
        "_paced_ 003": "SCHEDULED",
    }

    trials[2] = trial(2, {"alpha": 0.4, "beta": 1.7}, 0.521, tries=2, lost={"trained": 70})
    trials[2]["points"] = [{"share": 0.25, "value": 0.4}, {"share": 0.5, "value": 0.45}]
    trials[3] = trial(3, {"alpha": 9.0}, None, state="failed", reason="no example left", points=[])
    trials.append(
        trial(4, {"alpha": 3.0, "beta": 3.0}, 0.2, points=[{"share": 1.0, "value": 0.21}])
    )
    both = [study("_paced_", trials, confirm=confirm("_paced_", 0.3)), study("heal", trials[:2])]
    again = [sweep_record(folder, *both) for _ in range(2)]
    assert again[0] == again[1] and again[0][0] == first and len(again[0]) == 2

    parent = client.get_run(first)
    assert (parent.info.run_name, parent.info.status) == ("sweep _paced_", "FINISHED")
    tags = parent.data.tags
    assert (tags["kind"], tags["method"], tags["label"]) == ("sweep", "paced", "_paced_")
    assert (tags["sampler"], tags["pruner"], tags["student"]) == (
        "tpe",
        "wilcoxon",
        "micro/student",
    )
    assert tags["states"] == "3 complete, 1 failed, 1 pruned" and "teacher" not in tags
    note = tags["mlflow.note.content"]
    assert "α 0.4, β 1.7 gives 52.1 % on dev" in note and "better |" in note
    assert "### Trials" not in note and "Tuning heal" not in note
    assert "Tuning heal" in client.get_run(again[0][1]).data.tags["mlflow.note.content"]
    metrics = parent.data.metrics
    assert (metrics["best_value"], metrics["default_value"]) == (0.521, 0.503)
    assert [metrics[f"trials/{state}"] for state in mirror.STATES] == [3, 1, 0, 0, 1]
    accuracy = {arm["method"]: arm["accuracy"] for arm in both[0]["confirm"]["arms"]}
    assert metrics["confirmed_tuned/micro_math"] == pytest.approx(accuracy["_paced_-tuned"])
    assert metrics["confirmed_default/micro_math"] == pytest.approx(accuracy["_paced_"])
    assert metrics["spent/flops"] == pytest.approx((4 * 1e12 + 5e11) / 2)
    assert {item.path for item in client.list_artifacts(first)} == set(mirror.SWEEP_ARTIFACTS)

    after = by_key(client, first)
    assert len(after) == 5
    assert {name[-3:]: run.info.status for name, run in after.items()} == {
        "000": "FINISHED",
        "001": "KILLED",
        "002": "FINISHED",
        "003": "FAILED",
        "004": "FINISHED",
    }
    for number in "012":  # went on in their runs; what was only waiting had no parameters yet
        name = f"_paced_ 00{number}"
        assert after[name].info.run_id == before[name].info.run_id
    tuned, cut, failed = (after[f"_paced_ 00{number}"] for number in (2, 1, 3))
    assert tuned.data.params == {"alpha": "0.4", "beta": "1.7"}
    assert (
        failed.data.params == {"alpha": "9.0"}
        and failed.data.tags["trial.reason"] == "no example left"
    )
    for run in (tuned, cut):
        assert run.info.end_time - run.info.start_time == 50_000
    assert (tuned.data.metrics["dev_accuracy"], cut.data.metrics["dev_accuracy"]) == (0.521, 0.3)
    assert tuned.data.metrics["charged/flops"] == 1e12 and tuned.data.metrics["spent/flops"] == 5e11
    assert tuned.data.metrics["lost/trained"] == 70
    tags = tuned.data.tags
    assert (tags["trial.state"], tags["trial.number"], tags["trial.tries"]) == (
        "complete",
        "2",
        "2",
    )
    assert (tags["default"], after["_paced_ 000"].data.tags["default"]) == ("false", "true")
    assert cut.data.tags["trial.reason"] == "pruned at 50 % of the budget"
    history = {
        number: sorted(
            (point.step, point.value)
            for point in client.get_metric_history(
                after[f"_paced_ 00{number}"].info.run_id, "dev_accuracy"
            )
        )
        for number in (1, 2, 4)
    }
    assert history == {
        1: [(25, 0.28), (50, 0.3)],
        2: [(25, 0.4), (50, 0.45), (100, 0.521)],
        4: [(100, 0.2)],
    }


def test_a_sweep_that_cannot_be_recorded_costs_one_line(tmp_path, capsys):
    assert tracking.record_sweep(tmp_path, uri=f"sqlite:///{tmp_path / 'x.db'}") is None
    assert capsys.readouterr().err.count("\n") == 1


def test_failure_is_one_line_and_no_error(tmp_path, capsys):
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "summary.json").write_text("{")
    assert tracking.record(folder, uri=f"sqlite:///{tmp_path / 'dir' / 'x.db'}") is None
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("retort: not recorded in MLflow (sqlite:///")


def test_one_writer_at_a_time(tmp_path):
    uri = f"sqlite:///{tmp_path / 'deep' / 'mlflow.db'}"
    order = []

    def other():
        with tracking._one_writer(uri, tmp_path):
            order.append("second")

    with tracking._one_writer(uri, tmp_path):
        thread = threading.Thread(target=other)
        thread.start()
        time.sleep(0.2)
        order.append("first")
    thread.join(timeout=5)
    assert order == ["first", "second"]


def test_names_are_made_to_fit():
    assert mirror._name("charged/<b>|x:y") == "charged/_b__x_y"
    assert dict(mirror._flat({"a": {"b": 1, "c": None}, "d": [2]})) == {"a.b": 1, "d": [2]}


def test_ui_needs_a_record(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ValueError, match=r"results/mlflow.db does not exist.*retort compare"):
        tracking.ui()
    tracking.ui("http://127.0.0.1:1/")
    assert "on a server: http://127.0.0.1:1/" in capsys.readouterr().out


FAKE_SERVER = """
import http.server, sys
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])),
                       http.server.SimpleHTTPRequestHandler).serve_forever()
"""


def test_ui_prints_its_address_and_ends_when_interrupted(tmp_path):
    """With a stand-in for `mlflow ui`, which takes long to start."""
    (tmp_path / "mlflow.py").write_text(FAKE_SERVER)
    (tmp_path / "x.db").write_bytes(b"")
    command = [sys.executable, "-c", "from harness import tracking; tracking.ui('sqlite:///x.db')"]
    paths = os.pathsep.join([str(tmp_path), os.getcwd()])
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as process:
        line = process.stdout.readline()  # at once; the server takes its time
        address = line.split()[1]
        assert line.startswith("MLflow: http://127.0.0.1:")
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(address, timeout=5)
                break
        assert urllib.request.urlopen(address, timeout=5).status == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 0
    with pytest.raises(OSError):
        urllib.request.urlopen(address, timeout=1)
