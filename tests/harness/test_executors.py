"""Cells on other machines: a real Ray cluster of two nodes, and jobs of submitit, both on this machine."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness import cell, compare, executors
from harness.cell import Job
from harness.executors import remote
from harness.executors.remote import Died, Order
from harness.store import Store
from tests import slurm
from tests.harness.test_compare import suite

ray = pytest.importorskip("ray", reason="Ray is not installed (it has no build for this platform)")
submitit = pytest.importorskip("submitit", reason="submitit is not installed")

FEW: dict[str, Any] = {
    "benchmarks": {"micro_math": {"limit": 20, "max_new_tokens": 64}},
    "methods": {"sft": {"samples": 2}},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What this machine makes of the suite."""
    folder = tmp_path_factory.mktemp("local")
    return compare(suite(folder, **FEW), results=folder / "results", quiet=True, track=False)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one core each beside the head, which runs no cell; either may be killed."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RETORT_DATA", "/nowhere")  # a node may have been started under any settings
        node = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 100 * 2**20}
        quick = {"health_check_period_ms": 500, "health_check_failure_threshold": 2}
        made = Cluster(
            initialize_head=True,
            head_node_args={
                **node, "num_cpus": 0, "include_dashboard": False, "_system_config": quick
            },
        )  # fmt: skip
        made.add_node(**node)
        made.add_node(**node)
    yield made
    made.shutdown()


def titled(pattern: str, within: int | None = None) -> list[tuple[psutil.Process, str]]:
    """Processes whose title says so, of this process's user, and the part in brackets."""
    found = []
    processes = psutil.Process(within).children(True) if within else psutil.process_iter()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if match := re.search(pattern, " ".join(process.cmdline())):
                found.append((process, match.group(1)))
    return found


def lasting(value: Any) -> Any:
    """A summary without what differs from run to run: the machine, seconds, and what was really spent."""
    if isinstance(value, dict):
        fleeting = {"environment", "seconds", "spent"}
        return {k: lasting(each) for k, each in value.items() if k not in fleeting}
    return [lasting(each) for each in value] if isinstance(value, list) else value


def run(tmp_path: Path, executor: Any, **changes: Any) -> dict[str, Any]:
    return compare(
        suite(tmp_path, **{**FEW, **changes}), results=Path("results"), quiet=True, track=False, executor=executor
    )  # fmt: skip


def half_way(name: str) -> bool:
    """Whether this cell has a checkpoint, or its student (then it is being judged, or has ended)."""
    cell = name.replace("--", "/")
    points = (f"runs/{cell}/checkpoint.pt", f"models/{cell}/model.safetensors")
    return any((Path("results/small") / point).is_file() for point in points)


@pytest.mark.slow
def test_a_node_is_killed_half_way_and_the_summary_is_the_same(
    whole: dict[str, Any],
    cluster: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RETORT_DATA", raising=False)
    raylets = [node.all_processes["raylet"][0].process.pid for node in cluster.worker_nodes]
    killed: list[str] = []

    def kill() -> None:
        while not killed:
            for raylet in raylets:
                for _, name in titled(r"^ray::(sft--\d)", raylet):
                    if not killed and half_way(name):
                        parent = psutil.Process(raylet)
                        for each in [parent, *parent.children(True)]:
                            with contextlib.suppress(psutil.Error):
                                each.kill()
                        killed.append(name)
            time.sleep(0.01)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    summary = run(tmp_path, executors.choose("ray", ray_address=cluster.address))
    assert killed and f"{killed[0].replace('--', '/')}: " in capsys.readouterr().err
    assert lasting(summary) == lasting(whole)
    assert lasting(json.loads(Path("results/small/summary.json").read_text())) == lasting(whole)
    cluster.add_node(num_cpus=1, num_gpus=0, object_store_memory=100 * 2**20)


EMPTY: dict[str, Any] = {
    "methods": {"sft": {}},
    "sampling": {"max_new_tokens": 2},
    "benchmarks": {"micro_math": {"limit": 2, "max_new_tokens": 2}},
    "seeds": 1,
}


def mistake(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as error:
        call()
    return str(error.value)


def test_a_mistake_that_a_cell_finds_is_the_same_line_everywhere(
    cluster: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The teacher has no room to answer, so there is nothing to learn; that is no death, and not tried again."""
    lines = []
    for name, where in (
        ("here", None),
        ("ray", executors.choose("ray", ray_address=cluster.address)),
        ("slurm", executors.choose("slurm", slurm=["cluster=local"])),
    ):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        lines.append(mistake(lambda where=where: run(Path.cwd(), where, **EMPTY)))  # type: ignore[misc]
    assert lines[0] == lines[1] == lines[2] and "\n" not in lines[0]
    assert "death" not in capsys.readouterr().err


def test_settings_and_folder_reach_the_workers(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A benchmark that only RETORT_DATA has, by a path that only this folder knows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RETORT_DATA", "data")
    rows = [{"question": f"{i} + {i} = ?", "answer": f"so\n#### {2 * i}"} for i in range(3)]
    for split in ("train", "test"):
        path = Path("data/gsm8k") / f"{split}.jsonl.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    changes = {"benchmarks": {"gsm8k": {"max_new_tokens": 8}}, "seeds": 1, "budget": {"steps": 1}}
    summary = run(tmp_path, executors.choose("ray", ray_address=cluster.address), **changes)
    assert [row["n_problems"] for row in summary["cells"]] == [3, 3]


def test_a_machine_with_other_versions_is_refused(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    here = {**remote.versions(), "torch": "0.1", "retort-more": "2"}
    monkeypatch.setattr(remote, "versions", lambda: here)
    line = mistake(lambda: run(tmp_path, executors.choose("ray", ray_address=cluster.address)))
    assert re.search(r"retort-more not installed for 2, torch [\d.]+ for 0\.1\)", line), line
    assert not Path("results/small/runs").exists()
    assert ray.is_initialized() is False


def test_more_than_a_node_has_is_refused(cluster: Any, tmp_path: Path) -> None:
    where = executors.choose("ray", ray_address=cluster.address, cpus_per_cell=2)
    line = mistake(lambda: compare(suite(tmp_path, **FEW), results=tmp_path / "results", quiet=True, track=False, executor=where))  # fmt: skip
    assert "a cell needs 2 CPUs and 0 GPUs" in line and "1 CPUs and 0 GPUs" in line


@pytest.mark.slow
def test_interrupting_leaves_no_cell_and_leaves_the_cluster(cluster: Any, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "harness",
        "compare",
        str(suite(tmp_path, **FEW, budget={"steps": 500})),
    ]
    command += ["--executor", "ray", "--ray-address", cluster.address]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    point = tmp_path / "results/small/runs/sft/0/checkpoint.pt"
    while process.poll() is None and not point.is_file():
        time.sleep(0.02)
    assert titled(r"^ray::(sft--0)")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and said.splitlines()[-1].startswith("retort: stopped"), said
    until = time.monotonic() + 30
    while titled(r"^ray::(\w+--\d)") and time.monotonic() < until:
        time.sleep(0.1)
    assert not titled(r"^ray::(\w+--\d)")
    ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
    assert sum(node["Alive"] for node in ray.nodes()) >= 1
    ray.shutdown()


# -- slurm --------------------------------------------------------------------------------------


def test_a_job_that_its_time_limit_ends_goes_on(
    whole: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """SIGUSR2 is what SLURM sends a job before its time is up."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(submitit.core.core.Job, "_results_timeout_s", 1)
    ended: list[int] = []

    def end() -> None:
        while not half_way("sft--0"):
            time.sleep(0.01)
        jobs = json.loads((tmp_path / "results/small/slurm/jobs.json").read_text())
        for process in psutil.Process(int(jobs["sft--0"]["id"])).children():
            process.send_signal(signal.SIGUSR2)
            ended.append(process.pid)

    thread = threading.Thread(target=end, daemon=True)
    thread.start()
    summary = run(tmp_path, executors.choose("slurm", slurm=["cluster=local", "partition=gpu"]))
    thread.join()
    assert ended and re.search(r"sft/0: job \d+ ended as .*death 1 of 3", capsys.readouterr().err)
    assert lasting(summary) == lasting(whole)
    assert list(Path("results/small/slurm").glob("*_log.out"))


@pytest.mark.slow
def test_a_driver_that_is_killed_and_started_again_finds_its_jobs(
    whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One array of jobs, and none is sent twice: those that run are waited for, those that are done are done."""
    slurm.install(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-m", "harness", "compare", str(suite(tmp_path, **FEW))]
    command += ["--executor", "slurm", "--slurm", "partition=gpu"]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(Path("results").glob("small/runs/sft/*/checkpoint.pt")):
        assert driver.poll() is None
        time.sleep(0.02)
    driver.kill()
    driver.wait()
    assert not list(Path("results").glob("small/samples/*sft*"))  # they run still
    summary = run(tmp_path, executors.choose("slurm", slurm=["partition=gpu"]))
    assert lasting(summary) == lasting(whole)
    (script,) = Path("bin/jobs").glob("*.script")
    assert (
        re.search(r"--partition=gpu\n", script.read_text()) and "--array=0-2" in script.read_text()
    )


# -- what both share ----------------------------------------------------------------------------


class Scripted:
    """A cluster that does as it is told: each cell's tasks end in turn with what is listed for it."""

    def __init__(self, ends: dict[str, list[Any]]) -> None:
        self.ends, self.cancelled, self.orders = ends, [], []  # type: ignore[var-annotated]

    def submit(self, orders: Sequence[Order]) -> list[Any]:
        self.orders += orders
        return [(Path(order["notes"]).name, len(self.orders) + i) for i, order in enumerate(orders)]

    def ended(self, tasks: Sequence[Any]) -> Sequence[Any]:
        found = [task for task in tasks if self.ends[task[0]]][:1]
        assert found, "nothing more will happen"
        return found

    def result(self, task: Any) -> Exception | None:
        end = self.ends[task[0]].pop(0)
        if isinstance(end, Died):
            raise end
        return end

    def state(self, task: Any) -> tuple[str, int, int] | None:
        return ("pending", 0, 1)

    def log(self, task: Any) -> Path:
        return Path(f"{task[0]}.log")

    def cancel(self, tasks: Sequence[Any]) -> None:
        self.cancelled += [name for name, _ in tasks]


@pytest.mark.parametrize(
    ("ends", "words", "orders"),
    [
        ([Died("one"), Died("two"), Died("three")], "sft/0 died 3 times, at last so: three; its log is sft--0.log", 4),
        ([Died("one"), ValueError("the teacher is empty")], "the teacher is empty", 3),
    ],
)  # fmt: skip
def test_a_cell_that_dies_starts_again_so_often(
    ends: list[Any], words: str, orders: int, tmp_path: Path
) -> None:
    """The first ends at the third death, the second at an error; the other cell, which runs still, is cancelled."""
    from harness.compare import Silent, experiment

    setting = experiment(suite(tmp_path, **FEW, seeds=2))
    jobs = cell.jobs(setting, ["sft"], tmp_path / "small", tmp_path / "store")[1:]
    script = Scripted({"sft--0": ends, "sft--1": []})
    line = mistake(lambda: remote.run(jobs, setting, Silent(), script, {}, tmp_path))
    assert line.startswith(words) and "\n" not in line
    assert script.cancelled == ["sft--1"] and len(script.orders) == orders


def test_a_folder_of_the_same_name_on_another_disk_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what a machine was set to before does not stay."""
    for name in ("mine", "other"):
        (tmp_path / name / "results").mkdir(parents=True)
        (tmp_path / name / "store").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    monkeypatch.setenv("RETORT_SANDBOX", "of the driver")
    monkeypatch.delenv("RETORT_DATA", raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    job = Job({}, "base", 0, 0, Path("results"), Path("store"))
    order = remote.common([job], 1, logs=False)
    assert remote.common([job], 1, logs=False) == order
    assert "hf_secret" not in str(order)
    monkeypatch.setenv("RETORT_SANDBOX", "of the node")
    monkeypatch.setenv("RETORT_DATA", "of the node")
    assert remote.entry()(order) is None
    assert os.environ["RETORT_SANDBOX"] == "of the driver" and "RETORT_DATA" not in os.environ
    for marked in (False, True):  # the other folder has served a command of its own
        if marked:
            for name in ("results", "store"):
                (tmp_path / "other" / name / remote.MARK).write_text("of another")
        line = str(remote.entry()({**order, "folder": str(tmp_path / "other")}))
        assert "does not see the results of" in line and "--results and RETORT_STORE" in line
    assert "every machine needs" in str(remote.entry()({**order, "folder": str(tmp_path / "no")}))


def test_two_machines_that_run_one_cell_do_not_mix_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without locks a second finishes the cell while the first trains, and has other weights, as on another GPU."""
    from harness.compare import experiment, prepare

    monkeypatch.setattr(Store, "claim", lambda *given, **more: contextlib.nullcontext(True))
    setting = experiment(suite(tmp_path, **FEW))
    folder = tmp_path / "small"
    folder.mkdir()
    prepare(setting, folder)
    job = cell.jobs(setting, ["sft"], folder, tmp_path / "store")[1]
    kept: dict[str, bytes] = {}

    def files() -> dict[str, bytes]:
        paths = [
            job.run_file,
            job.model_folder / "model.safetensors",
            job.samples_file("micro_math"),
        ]
        return {str(path): path.read_bytes() for path in paths}

    def other(phase: str, done: int, total: int) -> None:
        if (job.run_file.parent / "checkpoint.pt").is_file() and not kept:
            kept["begun"] = b""
            (job.run_file.parent / "checkpoint.pt").unlink()
            with monkeypatch.context() as elsewhere:
                elsewhere.setattr("harness.trainer.Trainer._learning_rate", lambda self: 3e-3)
                cell.run(job, lambda *event: None)
            kept.update(files())

    judged: list[str] = []
    evaluate = cell.evaluate

    def seen(job: Job, experiment: Any, name: str, student: Any, *more: Any) -> None:
        judged.append(student.identity)
        evaluate(job, experiment, name, student, *more)

    monkeypatch.setattr(cell, "evaluate", seen)
    cell.run(job, other)
    del kept["begun"]
    assert files() == kept
    assert judged == 2 * [json.loads(job.run_file.read_text())["student"]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "rey"}, "unknown --executor 'rey': did you mean 'ray'? known: local, ray, slurm"),
        ({"name": "local", "ray_address": "auto"}, "--ray-address is for --executor ray"),
        ({"name": "slurm", "ray_address": "auto"}, "--ray-address is for --executor ray"),
        ({"name": "ray", "slurm": ["time=1"]}, "--slurm is for --executor slurm"),
        ({"name": "local", "gpus_per_cell": 0.5}, "--gpus-per-cell is for --executor ray or slurm"),
        ({"name": "slurm", "gpus_per_cell": 0.5}, "SLURM gives whole GPUs"),
        ({"name": "slurm", "slurm": ["time"]}, "write KEY=VALUE"),
        ({"name": "slurm", "slurm": ["nodes=2"]}, "a cell is one process"),
        ({"name": "slurm", "slurm": ["cluster=debug"]}, "use slurm or local"),
    ],
)
def test_options_that_do_not_fit_are_one_line(options: dict[str, Any], words: str) -> None:
    line = mistake(lambda: executors.choose(**options))
    assert words in line and "\n" not in line


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert mistake(lambda: executors.choose("ray")).endswith("pip install 'retort[ray]'")
    assert mistake(lambda: executors.choose("slurm")).endswith("pip install 'retort[slurm]'")


def test_ranks_and_executors_exclude_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    assert "accelerate launch" in mistake(lambda: executors.choose("ray"))
    assert executors.choose("local") is None


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ({"name": "slurm", "slurm": ["cluster=local", "partion=gpu"]}, "did you mean 'partition'"),
        ({"name": "slurm", "slurm": ["cluster=local", "timeout_min=x"]}, "timeout_min"),
        ({"name": "ray", "ray_address": "127.0.0.1:9"}, "no Ray cluster answers there"),
        ({"name": "ray", "ray_address": "ray://127.0.0.1:9"}, "on a machine of the cluster"),
    ],
)
def test_a_cluster_that_is_not_there_is_one_line(
    where: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = mistake(lambda: run(tmp_path, executors.choose(**where)))
    assert words in line and "\n" not in line
    assert not Path("results/small/runs").exists()
