"""Cells as jobs of SLURM through submitit, one array; `cluster=local` runs them as processes of this machine."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import cell
from harness.cell import Job, write_json
from harness.config import Experiment, nearest
from harness.executors import remote
from harness.executors.remote import Died, Order
from harness.store import short_digest

MINUTES = 24 * 60  # of a job, unless the user says otherwise
CLUSTERS = ("slurm", "local")
ONE = ("nodes", "tasks_per_node", "ntasks_per_node")  # a cell is one process


def parameters(given: Sequence[str]) -> dict[str, Any]:
    """`--slurm KEY=VALUE`, numbers and lists as JSON."""
    found: dict[str, Any] = {}
    for each in given:
        key, equals, text = each.partition("=")
        if not equals or not key:
            raise ValueError(
                f"--slurm {each!r}: write KEY=VALUE, for example partition=gpu or timeout_min=600"
            )
        if key in ONE:
            raise ValueError(f"--slurm {each!r}: a cell is one process, so leave {key} out")
        try:
            found[key] = json.loads(text)
        except ValueError:
            found[key] = text
    if found.get("cluster", "slurm") not in CLUSTERS:
        raise ValueError(f"--slurm cluster={found['cluster']}: use {' or '.join(CLUSTERS)}")
    return found


@dataclass
class Slurm:
    """`--executor slurm`: every cell is a job."""

    parameters: Mapping[str, Any]  # of submitit, with `cluster`
    gpus: float | None  # of a cell; default none is asked for
    cpus: (
        int | None
    )  # of a cell, and its threads; default the suite's threads, or this machine's cores over workers

    def __post_init__(self) -> None:
        if self.gpus is not None and self.gpus != int(self.gpus):
            raise ValueError(f"--gpus-per-cell {self.gpus:g}: SLURM gives whole GPUs")

    def run(self, jobs: Sequence[Job], experiment: Experiment, display: Any) -> None:
        cpus = self.cpus or cell.threads_of(experiment)
        notes = jobs[0].folder / "slurm"
        notes.mkdir(parents=True, exist_ok=True)
        tasks = _Jobs(self._submitter(experiment, cpus, notes), notes / "jobs.json")
        remote.run(jobs, experiment, display, tasks, remote.common(jobs, cpus, logs=False), notes)

    def _submitter(self, experiment: Experiment, cpus: int, notes: Path) -> Any:
        import submitit

        given = {
            "name": f"retort-{experiment.name}",
            "cpus_per_task": cpus,
            "timeout_min": MINUTES,
            "stderr_to_stdout": True,
            **({"gpus_per_node": int(self.gpus)} if self.gpus else {}),
            **self.parameters,
        }
        cluster = given.pop("cluster", "slurm")
        shared = submitit.AutoExecutor._typed_parameters()
        known = {*shared, *submitit.SlurmExecutor._valid_parameters()} - {*ONE}
        for key in given:
            if key not in known:
                raise ValueError(f"--slurm: unknown parameter {key!r}: {nearest(key, known)}")
        try:
            submitter = submitit.AutoExecutor(notes, cluster=cluster)
            submitter.update_parameters(
                **{key if key in shared else f"slurm_{key}": value for key, value in given.items()}
            )
        except (RuntimeError, AssertionError, NameError, ValueError) as error:
            raise ValueError(f"--executor slurm: {' '.join(str(error).split())}") from None
        return submitter


@dataclass
class _Jobs:
    """A `Cluster` of remote.py. The file says which job is whose, for a driver that is started again."""

    submitter: Any
    file: Path

    def submit(self, orders: Sequence[Order]) -> list[Any]:
        import submitit

        known = json.loads(self.file.read_text(encoding="utf-8")) if self.file.is_file() else {}
        tasks = [self._running(known.get(_name(order)), order) for order in orders]
        fresh = [order for order, task in zip(orders, tasks, strict=True) if task is None]
        try:
            with self.submitter.batch() if fresh else contextlib.nullcontext():
                jobs = [self.submitter.submit(_entry(), order) for order in fresh]
        except submitit.core.utils.JobError as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise ValueError(f"SLURM does not take the jobs: {lines[-1]}") from None
        for order, job in zip(fresh, jobs, strict=True):
            known[_name(order)] = {"id": job.job_id, "of": _digest(order)}
        write_json(self.file, known)
        left = iter(jobs)
        return [next(left) if task is None else task for task in tasks]

    def _running(self, entry: Mapping[str, str] | None, order: Order) -> Any:
        """The job of an earlier driver that does the same work still. Without SLURM nobody knows of it: the cell's claim does."""
        import submitit

        if entry is None or entry["of"] != _digest(order) or self.submitter.cluster != "slurm":
            return None
        job: Any = submitit.SlurmJob(self.submitter.folder, entry["id"])
        there = job.get_info(mode="force").get("State")
        return job if there and not job.done() else None

    def ended(self, tasks: Sequence[Any]) -> Sequence[Any]:
        done = [task for task in tasks if task.done()]
        if not done:
            time.sleep(remote.PAUSE)
        return done

    def result(self, task: Any) -> Exception | None:
        from submitit.core.utils import UncompletedJobError

        try:
            return task.result()
        except (
            UncompletedJobError
        ):  # an error of ours is a FailedJobError, and a bug keeps its traceback
            raise Died(f"job {task.job_id} ended as {_state(task, 'force')}") from None

    def state(self, task: Any) -> tuple[str, int, int] | None:
        return _state(task, "cache").lower(), 0, 1

    def log(self, task: Any) -> Path:
        return Path(task.paths.stdout)

    def cancel(self, tasks: Sequence[Any]) -> None:
        for task in tasks:
            if not task.done():
                task.cancel(check=False)


def _state(task: Any, mode: str) -> str:
    info = task.get_info(mode=mode)
    return info.get("State") or info.get("jobState") or "UNKNOWN"


def _name(order: Order) -> str:
    return Path(order["notes"]).name


def _digest(order: Order) -> str:
    return short_digest(json.loads(json.dumps(order["job"], default=str)))


def _entry() -> Callable[[Order], Exception | None]:
    """As any machine is sent, but signals end it: submitit would ignore them, or call a death an error of ours."""
    inner = remote.entry()

    def enter(order: Order) -> Exception | None:
        import signal

        for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(name, signal.SIG_DFL)
        return inner(order)

    return enter
