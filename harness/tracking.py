"""The record in MLflow: a mirror of results folders, which are the truth.

A comparison is a parent run in the experiment of its name, a trained student a child run; so are a study of a sweep and its trials.
One process writes at a time; recording a folder again updates what is there; and whatever goes wrong costs one line, never a run.
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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

DEFAULT = "sqlite:///results/mlflow.db"
ARTIFACTS = ("report.html", "report.md", "table.tex", "summary.json")
SWEEP_ARTIFACTS = ("sweep.html", "sweep.md", "sweep.json")
STATUS = {"complete": "FINISHED", "pruned": "KILLED", "running": "RUNNING", "waiting": "SCHEDULED"}
STATES = (*STATUS, "failed")  # a state that is in neither is a failure too
CURVE = ("loss", "lr", "tokens", "grad_norm")
BATCH = 1000  # metrics that MLflow takes at once
NOTE = 7000  # characters of a description; a tag holds 8000

Row = Mapping[str, Any]


def record(folder: Path, uri: str | None = None) -> str | None:
    """Mirror a results folder, finished or not, and return the parent run's id; on failure say so and return None.

    Without a uri: MLFLOW_TRACKING_URI, else `mlflow.db` beside the folder, which is results/mlflow.db.
    """
    return _recorded(folder, uri, lambda at: _Comparison(at, folder).write())


def record_sweep(folder: Path, uri: str | None = None) -> list[str] | None:
    """Mirror a folder's sweep.json, finished or not, and return the ids of its studies' runs; otherwise as `record`."""
    return _recorded(folder, uri, lambda at: _Sweep(at, folder).write())


def _recorded(folder: Path, uri: str | None, write: Callable[[str], Any]) -> Any:
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.parent / 'mlflow.db'}"
    try:
        with _one_writer(uri):
            return write(uri)
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
    """One folder in the experiment of its name: parent runs with their children, each found again by its key."""

    def __init__(self, uri: str, folder: Path, name: str) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        for logger in ("mlflow", "alembic"):  # the tables of a new database are made silently
            logging.getLogger(logger).setLevel(logging.WARNING)
        self.folder = folder
        self.client = MlflowClient(tracking_uri=uri)
        self.experiment = self._experiment(name, uri)

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

    def _parent(
        self,
        what: Sequence[str],
        name: str,
        tags: Mapping[str, str],
        artifacts: Iterable[str],
        final: Mapping[str, float],
        status: str,
        written: int,
    ) -> str:
        """A run whose key is the folder (and what of it), so that equal names of two people stay apart."""
        key = _digest([platform.node(), str(self.folder.resolve()), *what])
        found = next(iter(self._search(f"tags.`retort.key` = '{key}'")), None)
        run = (
            found.info.run_id
            if found
            else self.client.create_run(
                self.experiment, tags={"retort.key": key}, run_name=name
            ).info.run_id
        )
        self._tag(run, found, tags)
        for file in artifacts:
            if (self.folder / file).is_file():
                self.client.log_artifact(run, str(self.folder / file))
        self._final(run, found, final, written)
        self._end(run, found, status)
        return str(run)

    def _children(self, parent: str) -> dict[str, Any]:
        runs = self._search(f"tags.`mlflow.parentRunId` = '{parent}'")
        return {run.data.tags["retort.key"]: run for run in runs}

    def _child(
        self,
        parent: str,
        key: str,
        found: Any,
        *,
        params: Mapping[str, str],
        curve: Sequence[Row],
        points: Callable[[Sequence[Row]], Iterable[tuple[str, float, int]]],  # name, value, step
        final: Mapping[str, float],
        tags: Mapping[str, str],
        written: int,
        status: str = "FINISHED",
        start: int | None = None,
        lasted: int | None = None,  # milliseconds
    ) -> None:
        """A run under a parent. A curve that grew is continued; another content under the same key replaces the run."""
        logged = int(found.data.tags["retort.points"]) if found else 0
        if found and found.data.tags["retort.digest"] != _digest([params, curve[:logged]]):
            self.client.delete_run(found.info.run_id)
            found, logged = None, 0
        if found:
            child, start = found.info.run_id, found.info.start_time
        else:
            fresh = {"retort.key": key, "mlflow.parentRunId": parent, "retort.points": "0"}
            fresh["retort.digest"] = _digest([params, []])
            made = self.client.create_run(
                self.experiment, start_time=start, tags=fresh, run_name=key
            )
            child, start = made.info.run_id, made.info.start_time
        self._tag(child, found, tags)
        self._log(child, params=[] if found else params.items())
        grown = points(curve[logged:])
        self._log(child, metrics=[(name, value, written, step) for name, value, step in grown])
        if len(curve) > logged:  # only now: what was cut before this line is logged again, not lost
            done = {"retort.points": str(len(curve)), "retort.digest": _digest([params, curve])}
            self._tag(child, None, done)
        self._final(child, found, final, written)
        self._end(child, found, status, None if lasted is None else start + lasted)

    def _final(self, run: str, found: Any, values: Mapping[str, float], written: int) -> None:
        """Numbers without a step; those that changed."""
        old = found.data.metrics if found else {}
        named = {_name(name): value for name, value in values.items()}
        self._log(run, [(n, v, written, 0) for n, v in named.items() if old.get(n) != v])

    def _end(self, run: str, found: Any, status: str, end: int | None = None) -> None:
        if found and found.info.status == status:
            return
        if end is None:
            self.client.update_run(run, status=status)
        else:
            self.client.set_terminated(run, status, end)

    def _tag(self, run: str, found: Any, new: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        old = found.data.tags if found else {}
        changed = [RunTag(name, value) for name, value in new.items() if old.get(name) != value]
        if changed:
            self.client.log_batch(run, tags=changed)

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


class _Comparison(_Mirror):
    """A comparison and its trained students."""

    def __init__(self, uri: str, folder: Path) -> None:
        summary = folder / "summary.json"
        self.summary: dict[str, Any] = _read(summary) if summary.is_file() else {}
        self.written = _written(summary) if summary.is_file() else 0
        super().__init__(uri, folder, self.summary.get("name", folder.name))

    def write(self) -> str:
        environment, protocol = (
            self.summary.get("environment", {}),
            self.summary.get("protocol", ""),
        )
        tags = {
            "name": self.folder.name,
            "protocol": protocol.get("hash", "") if isinstance(protocol, dict) else protocol,
            "config_hash": self.summary.get("config_hash", ""),
            "commit": environment.get("commit") or "",
            "version": environment.get("version", ""),
            "mlflow.note.content": self._leaderboard(),
        }
        status = "FINISHED" if self.summary else "RUNNING"
        parent = self._parent([], self.folder.name, tags, ARTIFACTS, {}, status, self.written)
        known = self._children(parent)
        for path in sorted((self.folder / "runs").rglob("run.json")):
            key = path.parent.relative_to(self.folder / "runs").as_posix()
            self._student(parent, key, _read(path), known.get(key), _written(path))
        if any(cell["method"] == "base" for cell in self.summary.get("cells", ())):
            base = {"method": "base", "label": "base", "seed": 0}
            self._student(parent, "base/0", base, known.get("base/0"), 0)
        return parent

    def _leaderboard(self) -> str:
        """The report up to its verdicts."""
        report = self.folder / "report.md"
        text = report.read_text(encoding="utf-8") if report.is_file() else ""
        return text.split("\n## Verdicts")[0][:NOTE]

    def _student(self, parent: str, key: str, run: Row, found: Any, written: int) -> None:
        config = self.summary.get("config", {})
        tags = {name: str(run[name]) for name in ("method", "label", "seed")}
        tags |= {name: str(config[name]) for name in ("student", "teacher") if name in config}
        self._child(
            parent,
            key,
            found,
            params=self._params(run),
            curve=run.get("curve", []),
            points=_curve,
            final=self._scores(run) | _costs(run.get("ledger")),
            tags=tags,
            written=written,
        )

    def _params(self, run: Row) -> dict[str, str]:
        config = self.summary.get("config", {})
        given = {**config, **run}  # an arm may have a training and steps of its own
        shared = {name: given[name] for name in ("budget", "training") if name in given}
        return _params({**run.get("config", {}), **shared, "seed": run["seed"]})

    def _scores(self, run: Row) -> dict[str, float]:
        return {
            f"{quantity}/{cell['benchmark']}": float(cell[quantity])
            for cell in self.summary.get("cells", ())
            if (cell["method"], cell["seed"]) == (run["label"], run["seed"])
            and cell.get("data_seed", 0) == run.get("data_seed", cell.get("data_seed", 0))
            for quantity in ("accuracy", "truncated", "unparsed")
            if quantity in cell
        }


class _Sweep(_Mirror):
    """The studies of a sweep and their trials."""

    def __init__(self, uri: str, folder: Path) -> None:
        self.data = _read(folder / "sweep.json")
        self.written = _written(folder / "sweep.json")
        super().__init__(uri, folder, self.data["name"])

    def write(self) -> list[str]:
        studies = self.data["studies"]
        notes = self._notes(len(studies))
        return [self._study(study, note) for study, note in zip(studies, notes, strict=True)]

    def _notes(self, count: int) -> list[str]:
        """Each study's part of the report, up to its trials."""
        report = self.folder / "sweep.md"
        if not report.is_file():
            return [""] * count
        parts = report.read_text(encoding="utf-8").split("\n## ")
        mine = [part for part in parts if part.startswith("Study: ")]
        return [("## " + part.split("\n### Trials")[0])[:NOTE] for part in mine]

    def _study(self, study: Row, note: str) -> str:
        counts = Counter(trial["state"] for trial in study["trials"])
        ended = sum(counts.values()) - counts["running"] - counts["waiting"]
        finished = ended == sum(counts.values()) >= study["trials_asked"]
        tags = self._named(study) | {
            "sampler": study["sampler"],
            "pruner": str(study["pruner"]),
            "study": study["study"],
            "storage": study["storage"],
            "states": ", ".join(f"{n} {state}" for state, n in sorted(counts.items())),
            "mlflow.note.content": note,
        }
        default = next((t["value"] for t in study["trials"] if t.get("default")), None)
        final = {f"trials/{state}": float(counts[state]) for state in {*STATES, *counts}}
        final |= {"best_value": study["best"]["value"]} if study["best"] else {}
        final |= {"default_value": default} if default is not None else {}
        final |= _confirmed(study["confirm"]) | _costs(study["ledger"])
        parent = self._parent(
            ["sweep", study["study"]],
            f"sweep {study['label']}",
            tags,
            SWEEP_ARTIFACTS,
            final,
            "FINISHED" if finished else "RUNNING",
            self.written,
        )
        known = self._children(parent)
        for trial in study["trials"]:
            key = f"{study['label']} {trial['number']:03d}"
            self._trial(parent, key, study, trial, known.get(key))
        return parent

    def _named(self, study: Row) -> dict[str, str]:
        tags = {"kind": "sweep", "method": study["method"], "label": study["label"]}
        return tags | {
            name: str(self.data[name]) for name in ("student", "teacher") if name in self.data
        }

    def _trial(self, parent: str, key: str, study: Row, trial: Row, found: Any) -> None:
        curve = [point for point in trial["points"] if point["share"] < 1]
        if trial["state"] == "complete":
            curve.append({"share": 1.0, "value": trial["value"]})
        ended = trial["state"] not in ("running", "waiting") and trial["seconds"] is not None
        self._child(
            parent,
            key,
            found,
            params=_params(trial["params"]),
            curve=curve,
            points=_by_share,
            final=_costs({**(trial["ledger"] or {}), "lost": trial["lost"] or {}}),
            tags=self._named(study)
            | {
                "trial.state": trial["state"],
                "trial.number": str(trial["number"]),
                "trial.tries": str(trial["tries"]),
                "trial.reason": trial["reason"] or "",
                "default": str(bool(trial.get("default"))).lower(),
            },
            written=self.written,
            status=STATUS.get(trial["state"], "FAILED"),
            start=_milliseconds(trial["started"]) if trial["started"] else None,
            lasted=int(1000 * trial["seconds"]) if ended else None,
        )


def _by_share(rows: Sequence[Row]) -> Iterator[tuple[str, float, int]]:
    """Accuracy by percent of the trial's budget."""
    for row in rows:
        yield "dev_accuracy", float(row["value"]), round(100 * row["share"])


def _confirmed(confirm: Row | None) -> dict[str, float]:
    """Both settings on the test benchmarks."""
    if confirm is None:
        return {}
    return {
        f"confirmed_{side}/{arm['benchmark']}": float(arm["accuracy"])
        for side, label in confirm["labels"].items()
        for arm in confirm["arms"]
        if arm["method"] == label
    }


def _costs(ledger: Row | None) -> dict[str, float]:
    """charged/…, spent/… and purposes/…"""
    return {
        f"{column}/{name}": float(value)
        for column, amounts in (ledger or {}).items()
        for name, value in _flat(amounts)
    }


def _params(fields: Row) -> dict[str, str]:
    return {_name(name): str(value)[:6000] for name, value in _flat(fields)}


def _curve(rows: Sequence[Row]) -> Iterator[tuple[str, float, int]]:
    for row in rows:
        for name in CURVE:
            if name in row:
                yield name, float(row[name]), int(row["step"])


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


def _written(path: Path) -> int:
    """When, in milliseconds."""
    return int(path.stat().st_mtime * 1000)


def _milliseconds(when: str) -> int:
    """A local time in ISO 8601, since 1970."""
    return int(datetime.fromisoformat(when).timestamp() * 1000)


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
