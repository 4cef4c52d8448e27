"""What MLflow gets of a results folder, in real stores: tables, inputs, models, runs in progress, a server that goes and comes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from xml.etree import ElementTree

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harness import mirror, points, report, tracking
from harness.cli import app
from tests.harness.test_report import example

mlflow = pytest.importorskip("mlflow")
STEPS = 7


@pytest.fixture(autouse=True)
def _no_server(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def student(folder: Path, label: str, seed: int, steps: int = STEPS, *, done: bool = True) -> None:
    """A run folder as harness.cell writes it, in small."""
    run = folder / "runs" / label / str(seed)
    about = {"method": label, "label": label, "seed": seed, "data_seed": 0, "key": f"{label}{seed}"}
    about |= {"config": {"alpha": 0.5}, "student": "micro/student", "benchmarks": ["micro_math"]}
    about |= {"budget": {"steps": 9}, "training": {"batch_size": 16, "learning_rate": 1e-3}}
    log = points.Points(run / "points.jsonl", about)
    log.sample("train")
    curve = [{"step": s, "stage": "sft", "loss": 1 / s, "lr": 1e-3} for s in range(1, steps + 1)]
    have = len(points.read(log.path).steps)
    for row in curve[have:]:
        log.log(**row, time=1_700_000_000_000 + 1000 * row["step"] + seed)
    if done:
        stages = [{"name": "sft"}]
        ledger = {"charged": {"flops": 5.0}, "spent": {"flops": 4.0, "seconds": 2.5}}
        record = {**about, "student": "digest", "stages": stages, "curve": curve, "ledger": ledger}
        (run / "run.json").write_text(json.dumps(record))


def samples(folder: Path, label: str, seed: int, correct: dict[str, list[int]]) -> None:
    rows = [
        {
            "benchmark": "micro_math",
            "problem": problem,
            "sample": index,
            "correct": bool(right),
            "status": "ok" if right else "wrong",
            "extracted": "4",
            "gold": "4",
            "text": f"{label} " + "x" * 3000 + " end",
            "level": len(problem),
            "method": label,
            "seed": seed,
            "data_seed": 0,
        }
        for problem, all_ in correct.items()
        for index, right in enumerate(all_)
    ]
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.Table.from_pylist(rows), folder / "samples" / f"micro_math--{label}--{seed}.parquet"
    )


def comparison(folder: Path, *, finished: bool = True) -> Path:
    """Two methods; `b` solves p2 where `a` does not."""
    student(folder, "a", 0)
    student(folder, "b", 0)
    student(folder, "b", 1)
    samples(folder, "base", 0, {"p1": [1, 1], "p22": [0, 0]})
    samples(folder, "a", 0, {"p1": [1, 1], "p22": [0, 0]})
    samples(folder, "b", 0, {"p1": [1, 0], "p22": [1, 1]})
    samples(folder, "b", 1, {"p1": [1, 1], "p22": [1, 0]})
    train = [{"id": str(i), "source": "micro_math"} for i in range(5)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in train))
    cells = [("base", 0, 0.5), ("a", 0, 0.5), ("b", 0, 0.75), ("b", 1, 0.75)]
    summary = {
        "name": folder.name,
        "protocol": {"hash": "5f0c", "benchmarks": {"micro_math": {"problems": "micro_math"}}},
        "config": {"methods": {"a": {}, "b": {}}, "benchmarks": {"micro_math": {}}},
        "config_hash": "c0ffee",
        "environment": {"commit": "abc1234", "version": "0.1.0"},
        "cells": [
            {"method": m, "seed": s, "data_seed": 0, "benchmark": "micro_math", "accuracy": a}
            for m, s, a in cells
        ],
    }
    if finished:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def client(uri: str):
    return mlflow.MlflowClient(tracking_uri=uri)


def runs(uri: str, name: str):
    """The runs of an experiment by key; the parent is ""."""
    there = client(uri)
    experiment = there.get_experiment_by_name(name)
    if experiment is None:
        return {}
    found = there.search_runs([experiment.experiment_id])
    keyed = {
        r.data.tags["retort.key"] if "mlflow.parentRunId" in r.data.tags else "": r for r in found
    }
    assert len(keyed) == len(found)  # none twice
    return keyed


def history(uri: str, run, name: str = "loss"):
    found = client(uri).get_metric_history(run.info.run_id, name)
    return sorted((point.step, point.value) for point in found)


def everything(database: Path):
    """The content of the experiment `duel` but for MLflow's own ids."""
    of = (
        "join runs r using (run_uuid) join experiments e using (experiment_id) "
        "where r.lifecycle_stage = 'active' and e.name = 'duel'"
    )
    with contextlib.closing(sqlite3.connect(database)) as opened:
        return [
            opened.execute(query).fetchall()
            for query in (
                f"select r.name, m.key, m.value, m.timestamp, m.step from metrics m {of} order by 1, 2, 5, 4, 3",
                f"select r.name, p.key, p.value from params p {of} order by 1, 2",
                f"select r.name, t.key, t.value from tags t {of} and t.key not in "
                "('mlflow.parentRunId', 'mlflow.loggedArtifacts') order by 1, 2",
            )
        ]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    results = tmp_path_factory.mktemp("results")
    comparison(results / "duel")
    assert tracking.sync(results) == ["duel"]
    return results


def uri_of(results: Path) -> str:
    return f"sqlite:///{results / 'mlflow.db'}"


def table(uri: str, run, path: str) -> pandas.DataFrame:
    there = client(uri)
    return pandas.read_json(there.download_artifacts(run.info.run_id, path), orient="split")


def test_what_a_researcher_sees_first(recorded):
    uri = uri_of(recorded)
    found = runs(uri, "duel")
    assert set(found) == {"", "base/0", "a/0", "b/0", "b/1"}
    best = found["b/1"]
    tags = best.data.tags
    wanted = {"method": "b", "seed": "1", "student": "micro/student", "benchmark": "micro_math"}
    wanted |= {"protocol": "5f0c", "stage": "sft", "kind": "student", "group": "b"}
    assert {name: tags[name] for name in wanted} == wanted
    assert "`duel/samples/micro_math--b--1.parquet`" in tags["mlflow.note.content"]
    # The default of the bench's training is not shown, what differs from it is.
    assert best.data.params == {
        "alpha": "0.5",
        "seed": "1",
        "budget.steps": "9",
        "training.batch_size": "16",
    }
    assert best.data.metrics["accuracy/micro_math"] == 0.75
    assert best.data.metrics["peak_memory_mb"] > 5 and best.data.metrics["cpu_seconds"] >= 0
    assert len(history(uri, best, "system/process_memory_megabytes")) == 1
    assert history(uri, best) == [(s, 1 / s) for s in range(1, STEPS + 1)]
    log = points.read(recorded / "duel/runs/b/1/points.jsonl")
    times = {p.step: p.timestamp for p in client(uri).get_metric_history(best.info.run_id, "loss")}
    assert times == {row["step"]: row["time"] for row in log.steps}
    assert (best.info.start_time, best.info.end_time) == tuple(log.times)
    experiment = client(uri).get_experiment_by_name("duel")
    view = json.loads(experiment.tags[f"mlflow.sharedViewState.{mirror.VIEW}"])
    assert "metrics.`accuracy/micro_math`" in view["selectedColumns"]
    assert f"/runs/{found[''].info.run_id}" in experiment.tags["mlflow.note.content"]


def test_problems_and_samples_are_tables(recorded):
    uri = uri_of(recorded)
    found = runs(uri, "duel")
    rows = table(uri, found[""], "problems/micro_math.json")
    # p22 first: b's two seeds solve 1 and 1/2 of it, a and base none; of p1 b solves 3/4, the others all.
    assert rows.to_dict("records") == [
        {"problem": "p22", "level": 3, "base": 0.0, "a": 0.0, "b": 0.75},
        {"problem": "p1", "level": 2, "base": 1.0, "a": 1.0, "b": 0.75},
    ]
    shown = table(uri, found["b/0"], "samples/micro_math.json")
    assert list(shown["problem"]) == ["p1", "p22"] and list(shown["correct"]) == [True, True]
    assert shown["text"][0].startswith("b x") and shown["text"][0].endswith("x end")
    assert len(shown["text"][0]) < 2100


def test_charts_of_the_report_are_pictures_of_their_own(tmp_path):
    report.write(example(tmp_path / "r", seeds=2, problems=24, arms=["sft", "paced"], steps=30))
    found = mirror.charts((tmp_path / "r" / "report.html").read_text())
    names = list(found)
    assert len(names) >= 5 and names[0].startswith("plots/01 ") and len(set(names)) == len(names)
    for name, text in found.items():
        assert name.endswith(".svg") and "/" not in name.removeprefix("plots/")
        drawn = ElementTree.fromstring(text)
        assert drawn.tag == "{http://www.w3.org/2000/svg}svg"
        assert ".chart" in drawn[0].text  # the page's style, without which they are black


def test_data_sets_are_inputs(recorded):
    found = runs(uri_of(recorded), "duel")
    for key, contexts in (
        ("", ["training", "evaluation"]),
        ("base/0", ["evaluation"]),
        ("b/0", ["training", "evaluation"]),
    ):
        inputs = {i.tags[0].value: i.dataset for i in found[key].inputs.dataset_inputs}
        assert sorted(inputs) == sorted(contexts)
        assert json.loads(inputs["evaluation"].profile) == {"problems": 2}
        assert len(inputs["evaluation"].digest) == 8
        if "training" in contexts:
            assert inputs["training"].name == "micro_math training"
            assert json.loads(inputs["training"].profile) == {"problems": 5}
    assert len({i.dataset.digest for r in found.values() for i in r.inputs.dataset_inputs}) == 2


def test_a_second_pass_changes_nothing_and_new_samples_replace_a_table(recorded, tmp_path):
    results = tmp_path / "results"
    shutil.copytree(recorded, results)  # another folder: other keys, so another parent
    uri = uri_of(results)
    comparison(results / "duel")
    tracking.sync(results)
    (parent,) = (r for r in _all(uri, "duel") if r.data.tags.get("folder") == str(results / "duel"))
    before, files = everything(results / "mlflow.db"), written(recorded / "mlartifacts")
    tracking.sync(results, "duel")
    assert everything(results / "mlflow.db") == before
    assert written(recorded / "mlartifacts") == files  # not even once more
    samples(results / "duel", "a", 0, {"p1": [0, 0], "p22": [0, 0]})
    tracking.sync(results)
    rows = table(uri, parent, "problems/micro_math.json")
    assert list(rows["a"]) == [0.0, 0.0] and len(rows) == 2  # not appended


def written(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.*")}


def _all(uri, name):
    there = client(uri)
    return there.search_runs([there.get_experiment_by_name(name).experiment_id])


def test_students_are_registered_once(recorded):
    uri = uri_of(recorded)
    for seed in (0, 1):
        folder = recorded / "duel" / "models" / "b" / str(seed)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    for _ in range(2):
        tracking.sync(recorded, "duel", models=True)
    found = runs(uri, "duel")
    versions = client(uri).search_model_versions("name = 'duel-b'")
    assert {v.tags["seed"]: v.run_id for v in versions} == {
        str(seed): found[f"b/{seed}"].info.run_id for seed in (0, 1)
    }
    assert len(versions) == 2 and versions[0].tags["accuracy/micro_math"] == "0.7500"
    there = client(uri).download_artifacts(found["b/1"].info.run_id, "student/config.json")
    assert Path(there).read_text() == "{}"


def test_a_comparison_that_runs_is_shown_and_goes_on_in_the_same_runs(recorded):
    """By the process that watches, without a word of the one that trains."""
    uri, folder = uri_of(recorded), recorded / "live"
    student(folder, "a", 0, steps=3, done=False)
    with tracking.watching(folder, every=0.1):
        early = _until(lambda: runs(uri, "live").get("a/0"))
        _until(lambda: runs(uri, "live")["a/0"].data.tags["retort.points"] == "3")
        student(folder, "a", 0)
        samples(folder, "a", 0, {"p1": [1], "p2": [0]})
        _until(lambda: "accuracy/micro_math" in runs(uri, "live")["a/0"].data.metrics)
    now = runs(uri, "live")
    assert now["a/0"].info.run_id == early.info.run_id
    assert now["a/0"].data.metrics["accuracy/micro_math"] == 0.5
    assert (now["a/0"].info.status, now[""].info.status) == ("RUNNING", "RUNNING")
    tracking.sync(recorded, "live")  # whatever it was doing when it was ended
    assert history(uri, runs(uri, "live")["a/0"]) == [(s, 1 / s) for s in range(1, STEPS + 1)]
    assert "| a/0 |" in runs(uri, "live")[""].data.tags["mlflow.note.content"]
    for path in (folder / "runs").rglob("*.*"):
        os.utime(path, (1, 1))  # silent for long
    tracking.sync(recorded, "live")
    assert {run.info.status for run in runs(uri, "live").values()} == {"KILLED"}


def test_a_pass_that_was_cut_before_the_parameters_is_completed(recorded, monkeypatch):
    student(recorded / "cut", "a", 0)
    log = mirror._Run.log

    def cut(self, metrics=(), params=(), tags=None):
        if list(params):
            raise OSError("cut")
        log(self, metrics, params, tags)

    with monkeypatch.context() as patched:
        patched.setattr(mirror._Run, "log", cut)
        with pytest.raises(ValueError, match="cut: cut"):
            tracking.sync(recorded, "cut")
    early = runs(uri_of(recorded), "cut")["a/0"]
    assert not early.data.params
    tracking.sync(recorded, "cut")
    now = runs(uri_of(recorded), "cut")["a/0"]
    assert now.info.run_id == early.info.run_id
    fields = {"alpha": "0.5", "seed": "0", "budget.steps": "9", "training.batch_size": "16"}
    assert now.data.params == fields


def _until(true, seconds=120):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := true():
            return found
        time.sleep(0.2)
    raise AssertionError("it did not happen")


def test_rebuild_makes_the_store_again(recorded):
    from typer.testing import CliRunner

    student(recorded / "other", "a", 0)
    tracking.sync(recorded)
    names = sorted(path.parent.name for path in recorded.glob("*/runs"))
    file, uri = recorded / "mlflow.db", uri_of(recorded)
    before = everything(file)
    old = {run.info.run_id for name in names for run in runs(uri, name).values()}
    with contextlib.closing(sqlite3.connect(file)) as opened:  # as a UI has it, open all the while
        opened.execute("delete from metrics")
        opened.commit()
        ended = CliRunner().invoke(
            app, ["sync", "--rebuild", "--models", "--results", str(recorded)]
        )
        assert ended.output == f"Recorded in MLflow: {', '.join(names)}\n", ended.output
        assert opened.execute("select count(*) from metrics").fetchone()[0] > len(before[0]) > 50
    assert everything(file) == before
    new = {run.info.run_id for name in names for run in runs(uri, name).values()}
    assert not old & new and not list(recorded.glob("*.partial*"))
    there = {path.name for path in (recorded / "mlartifacts").iterdir()}
    assert not old & there and len(new & there) >= 6

    stranger = client(uri).create_run("0")
    with pytest.raises(ValueError, match=r"runs that are not, or no longer, of .*would lose"):
        tracking.rebuild(recorded)
    assert client(uri).get_run(stranger.info.run_id)
    client(uri).set_tag(stranger.info.run_id, "retort.key", "1")
    client(uri).set_tag(stranger.info.run_id, "folder", "/elsewhere/results/duel")
    with pytest.raises(ValueError, match=r"such as those of /elsewhere/results/duel"):
        tracking.rebuild(recorded)


def test_a_run_that_somebody_put_under_a_comparison_is_left_alone(recorded):
    student(recorded / "guest", "a", 0)
    tracking.sync(recorded, "guest")
    there = client(uri_of(recorded))
    parent = runs(uri_of(recorded), "guest")[""].info
    tags = {"mlflow.parentRunId": parent.run_id}
    guest = there.create_run(parent.experiment_id, tags=tags).info.run_id
    assert tracking.sync(recorded, "guest") == ["guest"]
    assert (
        there.get_run(guest).data.tags.keys() >= tags.keys()
        and len(_all(uri_of(recorded), "guest")) == 3
    )


def test_rebuild_keeps_what_only_the_database_still_holds(tmp_path):
    results = tmp_path / "results"
    student(results / "duel", "a", 0)
    with contextlib.closing(sqlite3.connect(results / "mlflow.db")) as opened:
        opened.execute("create table runs (run_uuid)")
        opened.execute("create table tags (run_uuid, key, value)")
        opened.executemany("insert into runs values (?)", [("1",), ("2",)])
        for run, name in (("1", "duel"), ("2", "gone")):
            rows = [(run, "retort.key", name), (run, "folder", str(results / name))]
            opened.executemany("insert into tags values (?, ?, ?)", rows)
        opened.commit()
    with pytest.raises(ValueError, match=r"no longer, of .*such as those of .*/gone\)"):
        tracking.rebuild(results)


def test_a_database_that_is_busy_is_not_taken_for_empty(tmp_path):
    """Otherwise --rebuild would write over the runs of others as soon as it is free."""
    results = tmp_path / "results"
    student(results / "duel", "a", 0)
    file = results / "mlflow.db"
    assert tracking._asked(file, "select 1") == []  # there is none
    with contextlib.closing(sqlite3.connect(file)) as opened:
        opened.execute("create table t (x)")
        assert tracking._runs(file) == {}  # it holds none
        opened.execute("begin exclusive")
        with pytest.raises(ValueError, match=r"mlflow.db cannot be read: .*locked; try again"):
            tracking.rebuild(results)


def test_a_damaged_database_is_replaced(tmp_path):
    aside, file = tmp_path / "aside", tmp_path / "mlflow.db"
    for path, value in ((aside, 2), (tmp_path / "good", 1)):
        with contextlib.closing(sqlite3.connect(path)) as opened:
            opened.execute("create table t (x)")
            opened.execute(f"insert into t values ({value})")
            opened.commit()
    for content in (b"no database" * 100, (tmp_path / "good").read_bytes(), None):
        file.unlink() if content is None else file.write_bytes(content)
        new = tmp_path / "new"
        shutil.copy(aside, new)
        tracking._swap(new, file)
        with contextlib.closing(sqlite3.connect(file)) as opened:
            assert opened.execute("select x from t").fetchall() == [(2,)]


def test_sync_says_what_it_cannot_find(tmp_path):
    with pytest.raises(ValueError, match="holds no comparison and no sweep"):
        tracking.sync(tmp_path)
    student(tmp_path / "duel", "a", 0)
    with pytest.raises(ValueError, match=r"no comparison or sweep 'dual'.*did you mean 'duel'"):
        tracking.sync(tmp_path, "dual")


# -- one writer, many that log ------------------------------------------------------------------

WRITER = """
import sys
from pathlib import Path
from harness.points import Points
folder, me, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
about = {"method": "m", "label": f"m{me}", "seed": 0, "data_seed": 0, "key": str(me)}
with Points(folder / "runs" / f"m{me}" / "0" / "points.jsonl", about) as points:
    for step in range(1, count + 1):
        points.log(step=step, stage="only", loss=me + step / 2**14)
"""


@pytest.mark.slow
def test_32_processes_of_10_000_points_lose_none_and_wait_for_nobody(tmp_path):
    """They end while the database is locked in both ways; what they logged is all there afterwards."""
    results, count = tmp_path / "results", 10_000
    student(results / "first", "a", 0)
    tracking.sync(results)
    file = results / "mlflow.db"
    with (
        tracking._one_writer(uri_of(results), results),
        contextlib.closing(sqlite3.connect(file)) as opened,
    ):
        opened.execute("begin exclusive")
        with (  # and it is locked: nobody else reads from it
            contextlib.closing(sqlite3.connect(file, timeout=0)) as other,
            pytest.raises(sqlite3.OperationalError, match="locked"),
        ):
            other.execute("begin immediate")
        command = [sys.executable, "-c", WRITER, str(results / "many")]
        writers = [subprocess.Popen([*command, str(me), str(count)]) for me in range(32)]
        assert [writer.wait(timeout=120) for writer in writers] == [0] * 32
        assert opened.in_transaction
        opened.execute("rollback")
    for _ in range(2):
        tracking.sync(results)
        with contextlib.closing(sqlite3.connect(file)) as opened:
            rows = opened.execute(
                "select r.name, count(*), count(distinct m.step), min(m.step), max(m.step), sum(m.value) "
                "from metrics m join runs r using (run_uuid) where m.key = 'loss' and r.name like 'm%' group by 1"
            ).fetchall()
        ramp = count * (count + 1) / 2 / 2**14
        assert sorted(rows) == sorted(
            (f"m{me}/0", count, count, 1, count, count * me + ramp) for me in range(32)
        )


# -- a server -----------------------------------------------------------------------------------


@contextlib.contextmanager
def server(root: Path, port: int):
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--backend-store-uri",
        f"sqlite:///{root}/server.db",
    ]
    command += [
        "--artifacts-destination",
        str(root / "artifacts"),
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    process = subprocess.Popen(
        command, env={**os.environ, **quiet}, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        _until(lambda: process.poll() is None and _healthy(port))
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        _until(lambda: not tracking._answers("127.0.0.1", port))  # its workers die a little later


def _healthy(port: int) -> bool:
    with contextlib.suppress(OSError):
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
    return False


@pytest.mark.slow
def test_a_server_that_goes_and_comes(tmp_path, capsys, monkeypatch):
    results, port = tmp_path / "results", tracking._free_port()
    uri = f"http://127.0.0.1:{port}"
    folder = results / "duel"
    student(folder, "a", 0, steps=3, done=False)

    def down():
        assert tracking.record(folder, uri) is None
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "does not answer" in said and "`retort sync duel`" in said
        with pytest.raises(ValueError, match=f"{uri} does not answer"):
            tracking.sync(results, uri=uri)

    down()
    with server(tmp_path, port):
        tracking.sync(results, uri=uri)
        early = runs(uri, "duel")
        assert history(uri, early["a/0"]) == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    comparison(folder)  # goes on all the same
    down()
    with server(tmp_path, port):
        for _ in range(2):
            tracking.sync(results, uri=uri)
            late = runs(uri, "duel")
            assert set(late) == {"", "base/0", "a/0", "b/0", "b/1"}
            assert late["a/0"].info.run_id == early["a/0"].info.run_id
            assert history(uri, late["a/0"]) == [(s, 1 / s) for s in range(1, STEPS + 1)]
        assert table(uri, late[""], "problems/micro_math.json")["b"].tolist() == [0.75, 0.75]
        stranger = client(uri).create_run(late[""].info.experiment_id)

        with pytest.raises(ValueError, match=r"deletes the runs of duel .*add --yes"):
            tracking.rebuild(results, uri=uri)
        assert runs_but(uri, stranger) == {run.info.run_id for run in late.values()}
        tracking.rebuild(results, uri=uri, sure=True)
        again = runs_but(uri, stranger)
        assert len(again) == 5 and not again & {run.info.run_id for run in late.values()}
        assert client(uri).get_run(stranger.info.run_id).info.lifecycle_stage == "active"


def runs_but(uri, stranger):
    return {run.info.run_id for run in _all(uri, "duel")} - {stranger.info.run_id}
