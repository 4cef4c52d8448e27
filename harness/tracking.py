"""The record in MLflow: a mirror of results folders, which are the truth.

A comparison is a parent run in the experiment of its name, a trained student a child run. One process writes at a time; recording
a folder again updates what is there; and whatever goes wrong costs one line, never a run.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

DEFAULT = "sqlite:///results/mlflow.db"
ARTIFACTS = ("report.html", "report.md", "table.tex", "summary.json")
CURVE = ("loss", "lr", "tokens", "grad_norm")
BATCH = 1000  # metrics that MLflow takes at once
NOTE = 7000  # characters of a description; a tag holds 8000

Row = Mapping[str, Any]


def record(folder: Path, uri: str | None = None) -> str | None:
    """Mirror a results folder, finished or not, and return the parent run's id; on failure say so and return None.

    Without a uri: MLFLOW_TRACKING_URI, else `mlflow.db` beside the folder, which is results/mlflow.db.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.parent / 'mlflow.db'}"
    try:
        with _one_writer(uri):
            return _Mirror(uri, folder).write()
    except Exception as error:  # a mirror must not break what it shows
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        print(f"retort: not recorded in MLflow ({uri}): {reason}", file=sys.stderr)
        return None


def ui(uri: str | None = None, port: int | None = None) -> None:
    """Start the MLflow UI, print its address, and stay until interrupted."""
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT
    if uri.startswith(("http://", "https://")):
        print(f"The record is on a server: {uri}")
        return
    database = _database(uri)
    if database is not None and not database.is_file():
        raise ValueError(
            f"{database} does not exist: nothing was recorded yet; run `retort compare` first"
        )
    port = port or _free_port()
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        server = subprocess.Popen(
            command, env={**os.environ, **quiet}, stdout=log, stderr=log, start_new_session=True
        )
        try:
            while server.poll() is None and not _answers(port):
                time.sleep(0.2)
            if server.poll() is None:
                print(f"MLflow: http://127.0.0.1:{port} (Ctrl-C ends it)", flush=True)
            if server.wait():
                log.seek(0)
                said = "\n".join(log.read().splitlines()[-5:])
                raise ValueError(f"`mlflow ui` ended with status {server.returncode}:\n{said}")
        except KeyboardInterrupt:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)  # its workers too
            server.wait()


class _Mirror:
    """One folder and the runs that show it."""

    def __init__(self, uri: str, folder: Path) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic"):  # the tables of a new database are made silently
            logging.getLogger(name).setLevel(logging.WARNING)
        self.folder = folder
        summary = folder / "summary.json"
        self.summary: dict[str, Any] = _read(summary) if summary.is_file() else {}
        self.client = MlflowClient(tracking_uri=uri)
        self.experiment = self._experiment(self.summary.get("name", folder.name), uri)

    def write(self) -> str:
        parent = self._parent()
        known = {
            run.data.tags["retort.key"]: run
            for run in self._search(f"tags.`mlflow.parentRunId` = '{parent}'")
        }
        runs = [(_read(path), path) for path in sorted((self.folder / "runs").rglob("run.json"))]
        for run, path in runs:
            key = path.parent.relative_to(self.folder / "runs").as_posix()
            self._child(parent, key, run, known.get(key), int(path.stat().st_mtime * 1000))
        if any(cell["method"] == "base" for cell in self.summary.get("cells", ())):
            base = {"method": "base", "label": "base", "seed": 0}
            self._child(parent, "base/0", base, known.get("base/0"), 0)
        return parent

    def _experiment(self, name: str, uri: str) -> str:
        found = self.client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        database = _database(uri)
        place = (database.parent / "mlartifacts").resolve().as_uri() if database else None
        return str(self.client.create_experiment(name, artifact_location=place))

    def _search(self, query: str) -> list[Any]:
        found: list[Any] = []
        token = None
        while True:
            page = self.client.search_runs(
                [self.experiment], query, max_results=1000, page_token=token
            )
            found += page
            if not (token := page.token):
                return found

    def _parent(self) -> str:
        """The comparison's run; its key is the folder, so that equal names of two people stay apart."""
        key = _digest([platform.node(), str(self.folder.resolve())])
        environment, protocol = (
            self.summary.get("environment", {}),
            self.summary.get("protocol", ""),
        )
        tags = {
            "retort.key": key,
            "name": self.folder.name,
            "protocol": protocol.get("hash", "") if isinstance(protocol, dict) else protocol,
            "config_hash": self.summary.get("config_hash", ""),
            "commit": environment.get("commit") or "",
            "version": environment.get("version", ""),
            "mlflow.note.content": self._leaderboard(),
        }
        found = self._search(f"tags.`retort.key` = '{key}'")
        if found:
            run = found[0].info.run_id
        else:
            run = self.client.create_run(
                self.experiment, tags={"retort.key": key}, run_name=self.folder.name
            ).info.run_id
        self._tag(run, found[0].data.tags if found else {}, tags)
        for name in ARTIFACTS:
            if (self.folder / name).is_file():
                self.client.log_artifact(run, str(self.folder / name))
        self.client.update_run(run, status="FINISHED" if self.summary else "RUNNING")
        return str(run)

    def _leaderboard(self) -> str:
        """The report up to its verdicts."""
        report = self.folder / "report.md"
        text = report.read_text(encoding="utf-8") if report.is_file() else ""
        return text.split("\n## Verdicts")[0][:NOTE]

    def _child(self, parent: str, key: str, run: Row, found: Any, written: int) -> None:
        """A trained student's run. A curve that grew is continued; another student under the same key replaces the run."""
        params = self._params(run)
        curve = run.get("curve", [])
        logged = int(found.data.tags["retort.points"]) if found else 0
        if found and found.data.tags["retort.digest"] != _digest([params, curve[:logged]]):
            self.client.delete_run(found.info.run_id)
            found, logged = None, 0
        if found:
            child = found.info.run_id
        else:
            start = {"retort.key": key, "mlflow.parentRunId": parent, "retort.points": "0"}
            start["retort.digest"] = _digest([params, []])
            child = self.client.create_run(self.experiment, tags=start, run_name=key).info.run_id
        config = self.summary.get("config", {})
        tags = {name: str(run[name]) for name in ("method", "label", "seed")}
        tags |= {name: str(config[name]) for name in ("student", "teacher") if name in config}
        self._tag(child, found.data.tags if found else {}, tags)
        self._log(child, params=[] if found else params.items())
        self._log(child, metrics=_curve(curve[logged:], written))
        if len(curve) > logged:  # only now: what was cut before this line is logged again, not lost
            done = {"retort.points": str(len(curve)), "retort.digest": _digest([params, curve])}
            self._tag(child, {}, done)
        final = {_name(name): value for name, value in self._final(run).items()}
        old = found.data.metrics if found else {}
        changed = [
            (name, value, written, 0) for name, value in final.items() if old.get(name) != value
        ]
        self._log(child, metrics=changed)
        self.client.update_run(child, status="FINISHED")

    def _params(self, run: Row) -> dict[str, str]:
        config = self.summary.get("config", {})
        shared = {name: config[name] for name in ("budget", "training") if name in config}
        fields = {**run.get("config", {}), **shared, "seed": run["seed"]}
        return {_name(name): str(value)[:6000] for name, value in _flat(fields)}

    def _final(self, run: Row) -> dict[str, float]:
        """Scores of this student, and what it cost."""
        found = {
            f"{quantity}/{cell['benchmark']}": float(cell[quantity])
            for cell in self.summary.get("cells", ())
            if (cell["method"], cell["seed"]) == (run["label"], run["seed"])
            and cell.get("data_seed", 0) == run.get("data_seed", cell.get("data_seed", 0))
            for quantity in ("accuracy", "truncated", "unparsed")
            if quantity in cell
        }
        for column, amounts in run.get("ledger", {}).items():
            found |= {f"{column}/{name}": float(value) for name, value in _flat(amounts)}
        return found

    def _tag(self, run: str, old: Row, new: Mapping[str, str]) -> None:
        for name, value in new.items():
            if old.get(name) != value:
                self.client.set_tag(run, name, value)

    def _log(
        self,
        run: str,
        metrics: Iterable[tuple[str, float, int, int]] = (),
        params: Iterable[tuple[str, str]] = (),
    ) -> None:
        from mlflow.entities import Metric, Param

        points = [Metric(*metric) for metric in metrics]
        for start in range(0, len(points), BATCH):
            self.client.log_batch(run, metrics=points[start : start + BATCH])
        fields = [Param(*param) for param in params]
        for start in range(0, len(fields), 100):
            self.client.log_batch(run, params=fields[start : start + 100])


def _curve(rows: Iterable[Row], written: int) -> Iterator[tuple[str, float, int, int]]:
    for row in rows:
        for name in CURVE:
            if name in row:
                yield name, float(row[name]), written, int(row["step"])


@contextlib.contextmanager
def _one_writer(uri: str) -> Iterator[None]:
    """Wait for the database's lock: parallel writers, above all to a database without tables, break sqlite."""
    database = _database(uri)
    if database is None:
        yield
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{database}.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # falls with the process
        yield


def _database(uri: str) -> Path | None:
    """The file of a sqlite address."""
    prefix = "sqlite:///"
    return Path(uri.removeprefix(prefix)) if uri.startswith(prefix) else None


def _read(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def _flat(data: Row, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value


def _name(text: str) -> str:
    """A key that MLflow takes."""
    return re.sub(r"[^\w\-./ ]", "_", text)[:250]


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0
