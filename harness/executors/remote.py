"""Cells on other machines: what is sent, what comes back, and what happens when a machine dies.

All that machines share is a file system: a cell's files are there, and so are its progress and its log. An order is plain
data, so that nothing of ours is imported on a machine before its environment is set.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import secrets
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from harness import cell
from harness.cell import Job
from harness.config import Experiment
from harness.progress import throttled
from harness.store import draft

DEATHS = 3  # of one cell; then the run ends
MARK = ".retort-folder"
PAUSE = 1.0  # seconds between two looks
LATE = 60.0  # seconds after which a shared file system shows what another machine wrote
PACKAGES = ("retort", "torch", "transformers")  # whose versions decide results
PLUGINS = ("retort.methods", "retort.problems")

Order = Mapping[str, Any]


class Died(Exception):
    """The process or the machine of a cell ended without a word."""


class Cluster(Protocol):
    """Takes orders."""

    def submit(self, orders: Sequence[Order]) -> list[Any]:
        """A task for each."""

    def ended(self, tasks: Sequence[Any]) -> Sequence[Any]:
        """Those that have ended, after waiting for one for `PAUSE` seconds at most."""

    def result(self, task: Any) -> Exception | None:
        """The user's mistake that ended a task, if one did; raises `Died`, or whatever else went wrong."""

    def state(self, task: Any) -> tuple[str, int, int] | None:
        """What to show of a task that has not reported yet."""

    def log(self, task: Any) -> Path:
        """Where its output is."""

    def cancel(self, tasks: Sequence[Any]) -> None:
        """End them."""


# -- on this machine ----------------------------------------------------------------------------


def run(
    jobs: Sequence[Job],
    experiment: Experiment,
    display: Any,
    cluster: Cluster,
    common: Order,
    notes: Path,
) -> None:
    """Run cells to their end; one whose process or machine dies starts again, from its checkpoint."""
    cells = {job.name: job for job in jobs}
    orders = {
        name: {**common, "job": asdict(job), "notes": str(notes / name.replace("/", "--"))}
        for name, job in cells.items()
    }
    deaths: Counter[str] = Counter()
    running: dict[Any, str] = {}

    def submit(names: Sequence[str]) -> None:
        for name in names:
            _progress(orders[name]).unlink(missing_ok=True)
        tasks = cluster.submit([orders[name] for name in names])
        running.update(zip(tasks, names, strict=True))

    try:
        submit([name for name, job in cells.items() if not _done(job, experiment, display)])
        while running:
            for task in cluster.ended(list(running)):
                name, log = running.pop(task), cluster.log(task)
                try:
                    error = cluster.result(task)
                except Died as death:
                    deaths[name] += 1
                    _tell(name, death, deaths[name], log)
                    submit([name])
                    continue
                if error is not None:
                    raise error
                _appears(cells[name], experiment, log)
                display.finish(name)
            for task, name in running.items():
                if event := _heard(orders[name]) or cluster.state(task):
                    display(name, *event)
    except BaseException:
        cluster.cancel(list(running))
        raise


def common(jobs: Sequence[Job], threads: int, logs: bool) -> Order:
    """What every machine has to know to work as this one would."""
    return {
        "threads": threads,
        "logs": logs,
        "environment": {k: v for k, v in os.environ.items() if _sent(k)},
        "folder": os.getcwd(),
        "versions": versions(),
        "marks": {str(path): _mark(path) for path in (jobs[0].folder, jobs[0].store)},
    }


def _sent(variable: str) -> bool:
    """Settings, but no secret: submitit writes an order to a file beside the results."""
    return variable.startswith(("RETORT_", "HF_")) and "TOKEN" not in variable


def versions() -> dict[str, str]:
    """What must be the same on all machines: Python, packages, plug-ins, and the source of Retort."""
    plugins = {
        point.dist.name
        for group in PLUGINS
        for point in metadata.entry_points(group=group)
        if point.dist
    }
    source = hashlib.sha256()
    root = Path(__file__).parents[2]
    for package in ("harness", "methods", "benchmarks"):
        for path in sorted((root / package).rglob("*.py")):
            source.update(path.read_bytes())
    return {
        "python": platform.python_version(),
        "source": source.hexdigest()[:12],
        # a build for another device, such as +cpu, is the same version
        **{name: metadata.version(name).split("+")[0] for name in {*PACKAGES, *plugins}},
    }


def _mark(folder: Path) -> str:
    """A word that tells a folder from one of the same name on another disk."""
    path = folder / MARK
    if not path.is_file():
        fresh = draft(path)
        fresh.write_text(secrets.token_hex(8), encoding="utf-8")
        os.replace(fresh, path)
    return path.read_text(encoding="utf-8")


def _done(job: Job, experiment: Experiment, display: Any) -> bool:
    if not cell.finished(job, experiment):
        return False
    cell.run(job, lambda phase, done, total: None)  # ends a log that a kill cut short
    display.finish(job.name)
    return True


def _tell(name: str, death: Died, count: int, log: Path) -> None:
    if count == DEATHS:
        raise ValueError(
            f"{name} died {count} times, at last so: {death}; its log is {log}. What was finished is kept: run the same "
            "command again to go on"
        ) from None
    print(f"retort: {name}: {death}; it starts again (death {count} of {DEATHS})", file=sys.stderr)


def _progress(order: Order) -> Path:
    return Path(order["notes"] + ".progress")


def _heard(order: Order) -> tuple[str, int, int] | None:
    """The last word of a cell's progress."""
    with contextlib.suppress(OSError, ValueError):  # none yet, or a file system that is behind
        phase, done, total = json.loads(_progress(order).read_text(encoding="utf-8"))
        return phase, done, total
    return None


def _appears(job: Job, experiment: Experiment, log: Path) -> None:
    """Wait until this machine, too, sees the files of a cell that ended on another."""
    until = time.monotonic() + LATE
    while not cell.finished(job, experiment):
        if time.monotonic() > until:
            raise ValueError(
                f"{job.name} has ended, but its files do not appear in {job.folder}: --results must be on a file system that all "
                f"machines share; its log is {log}"
            )
        time.sleep(PAUSE)


# -- on another machine -------------------------------------------------------------------------


def entry() -> Callable[[Order], Exception | None]:
    """What a machine is sent; by value, so that the environment is set before anything of ours is imported."""

    def enter(order: Order) -> Exception | None:
        import os
        import platform

        try:
            for name in [name for name in os.environ if name.startswith("RETORT_")]:
                del os.environ[name]
            os.environ.update(order["environment"])
            os.chdir(order["folder"])
            from harness.executors.remote import work
        except (OSError, ImportError) as error:
            return ValueError(
                f"{platform.node()}: {error}; every machine needs Retort installed and the folder {order['folder']}"
            )
        return work(order)

    return enter


def work(order: Order) -> Exception | None:
    """Run a cell, or without one say whether this machine could; returns the user's mistake if there is one."""
    try:
        _same(order)
        if "job" in order:
            report = throttled(lambda event: _note(order, event[1:]), "", PAUSE)
            with _logged(order):
                cell.run(Job(**order["job"]), report, order["threads"])
    except ValueError as error:
        return ValueError(str(error))  # some kinds do not travel
    except OSError as error:
        return error
    return None


def _same(order: Order) -> None:
    """Refuse to work where the code or the files are others."""
    here, theirs = versions(), order["versions"]
    differ = [
        f"{name} {here.get(name, 'not installed')} for {theirs.get(name, 'not installed')}"
        for name in sorted({*here, *theirs})
        if here.get(name) != theirs.get(name)
    ]
    if differ:
        raise ValueError(
            f"{platform.node()} differs from the machine that asks ({', '.join(differ)}): install the same versions on all machines"
        )
    for folder, mark in order["marks"].items():
        path = Path(folder, MARK)
        if not path.is_file() or path.read_text(encoding="utf-8") != mark:
            raise ValueError(
                f"{platform.node()} does not see the {folder} of the machine that asks: --results and RETORT_STORE must be on a "
                "file system that all machines share"
            )


def _note(order: Order, event: Sequence[Any]) -> None:
    path = _progress(order)
    with contextlib.suppress(OSError):  # progress must not stop what it shows
        fresh = draft(path)
        fresh.write_text(json.dumps(event), encoding="utf-8")
        os.replace(fresh, path)


@contextlib.contextmanager
def _logged(order: Order) -> Iterator[None]:
    """Output goes to the cell's own log where the executor keeps none."""
    if not order["logs"]:
        yield
        return
    kept = [os.dup(1), os.dup(2)]
    with open(order["notes"] + ".log", "a", encoding="utf-8") as log:
        try:
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                yield
        finally:
            for stream, old in zip((1, 2), kept, strict=True):
                os.dup2(old, stream)
                os.close(old)
