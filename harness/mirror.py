"""What MLflow shows of a results folder: a comparison is a parent run in the experiment of its name, a trained student a child run.

So are a study of a sweep and its trials. Everything here is made from the folder's files, which are the truth, and found again by
its key: a second pass changes what has changed and nothing else, and one that was cut anywhere is completed by the next.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache, partial
from html import escape, unescape
from pathlib import Path
from typing import Any

from harness import problems
from harness.config import Training
from harness.folder import LOG, Answers, Cell, Row, Student, cell_of, read, written_at
from harness.store import short_digest

ARTIFACTS = ("report.html", "report.md", "table.tex", "cells.csv", "pairs.csv", "summary.json")
SWEEP_ARTIFACTS = ("sweep.html", "sweep.md", "sweep.json")
STATUS = {"complete": "FINISHED", "pruned": "KILLED", "running": "RUNNING", "waiting": "SCHEDULED"}
STATES = (*STATUS, "failed")  # a state that is in neither is a failure too
CURVE = ("loss", "lr", "tokens", "grad_norm")
BATCH = 1000  # metrics that MLflow takes at once
NOTE = 7000  # characters of a description; a tag holds 8000
VIEW = "retort"  # the view of an experiment's runs that has the columns which matter

MARKS = "mlflow.retort"  # a tag that pages do not show


@dataclass(frozen=True)
class Dataset:
    """What MLflow calls an input of a run."""

    name: str
    digest: str
    context: str  # training, dev or evaluation
    source: str  # the problem set, or a file
    size: int  # problems


class _Run:
    """A run being brought up to date: `found` is what MLflow has of it, None if it is new."""

    def __init__(self, client: Any, run: str, found: Any, start: int = 0) -> None:
        self.client, self.id, self.found, self.start = client, run, found, start
        self.tags: dict[str, str] = found.data.tags if found else {}
        self.marks: dict[str, Any] = json.loads(self.tags.get(MARKS, "{}"))

    def log(
        self,
        metrics: Iterable[tuple[str, float, int, int]] = (),  # name, value, time, step
        params: Iterable[tuple[str, str]] = (),
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """In as few calls as MLflow takes; tags come last."""
        from mlflow.entities import Metric, Param, RunTag

        points = [Metric(*metric) for metric in metrics]
        fields = [Param(*param) for param in params]
        changed = [RunTag(k, v) for k, v in (tags or {}).items() if self.tags.get(k) != v]
        for start in range(0, len(points), BATCH):
            self.client.log_batch(self.id, metrics=points[start : start + BATCH])
        for start in range(0, max(len(fields), len(changed)), 100):
            part = slice(start, start + 100)
            self.client.log_batch(self.id, params=fields[part], tags=changed[part])

    def final(self, values: Mapping[str, float], written: int) -> None:
        """Numbers without a step; those that changed."""
        old = self.found.data.metrics if self.found else {}
        named = {_name(name): value for name, value in values.items()}
        self.log([(n, v, written, 0) for n, v in named.items() if old.get(n) != v])

    def once(self, name: str, content: Any, write: Callable[[], object]) -> None:
        """Write what no mark vouches for yet; the marks are kept last, so what was cut is written again."""
        mark = short_digest(content)
        if self.marks.get(name) != mark:
            write()
            self.marks[name] = mark

    def files(self, files: Iterable[Path]) -> None:
        for file in files:
            if file.is_file():
                content = hashlib.sha256(file.read_bytes()).hexdigest()
                self.once(
                    f"file.{file.name}",
                    content,
                    partial(self.client.log_artifact, self.id, str(file)),
                )

    def charts(self, report: Path) -> None:
        def write() -> None:
            for name, text in found.items():
                self.client.log_text(self.id, text, name)

        if report.is_file():
            found = charts(report.read_text(encoding="utf-8"))
            self.once("charts", found, write)

    def table(self, path: str, content: Any, rows: Callable[[], Sequence[Row]]) -> None:
        def write() -> None:
            import pandas

            frame = pandas.DataFrame(list(rows()))
            there = self.client.list_artifacts(self.id, path.rpartition("/")[0])
            if any(item.path == path for item in there):  # log_table would append to it
                self.client.log_text(self.id, frame.to_json(orient="split", index=False), path)
            else:
                self.client.log_table(self.id, frame, path)

        self.once(f"table.{path}", content, write)

    def inputs(self, datasets: Sequence[Dataset]) -> None:
        def write() -> None:
            from mlflow.data.meta_dataset import MetaDataset
            from mlflow.entities import DatasetInput, InputTag

            given = []
            for each in datasets:
                entity = MetaDataset(
                    _source(each.source), each.name, each.digest
                )._to_mlflow_entity()
                entity._profile = json.dumps({"problems": each.size})
                context = InputTag("mlflow.data.context", each.context)
                given.append(DatasetInput(entity, [context]))
            self.client.log_inputs(self.id, given)

        if datasets:
            self.once("inputs", [vars(each) for each in datasets], write)

    def close(self, status: str, end: int | None = None) -> None:
        """With its marks and its status; without an end the status alone."""
        self.log(tags={MARKS: json.dumps(self.marks)})
        info = self.found.info if self.found else None
        if end is None:
            if info is None or info.status != status:
                self.client.update_run(self.id, status=status)
        elif info is None or (info.status, info.end_time) != (status, end):
            self.client.set_terminated(self.id, status, end)


class _Mirror:
    """One folder in the experiment of its name: parent runs with their children, each found again by its key."""

    def __init__(self, uri: str, folder: Path, name: str) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # A server that is down is tried again by the next pass, not for minutes by this one.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        from mlflow import MlflowClient

        for logger in ("mlflow", "alembic"):  # the tables of a new database are made silently
            logging.getLogger(logger).setLevel(logging.WARNING)
        self.folder, self.name = folder, name
        self.client = MlflowClient(tracking_uri=uri)
        self.experiment = self._experiment(uri)

    def _experiment(self, uri: str) -> str:
        found = self.client.get_experiment_by_name(self.name)
        if found is not None:
            return str(found.experiment_id)
        file = database(uri)
        place = (file.parent / "mlartifacts").resolve().as_uri() if file else None
        # Otherwise the page opens on tabs for chat applications.
        kind = {"mlflow.experimentKind": "custom_model_development"}
        return str(self.client.create_experiment(self.name, artifact_location=place, tags=kind))

    def _view(self, parent: str, columns: Sequence[str]) -> None:
        """Offer the runs with these columns, at an address that `retort ui` prints: by itself MLflow shows no metric."""
        group = [{"mode": "tag", "groupByData": "group"}]
        state = {
            "selectedColumns": ["attributes.`Duration`", *columns],
            "groupBy": {"aggregateFunction": "average", "groupByKeys": group},
            "runsHiddenMode": "SHOW_ALL",
        }
        address = f"#/{page(self.experiment)}"
        note = (
            f"[Runs by method, with accuracies and costs]({address}). "
            f"[Leaderboard and report](#/experiments/{self.experiment}/runs/{parent}). "
            f"A mirror of `{self.folder.resolve().parent.name}/{self.folder.name}`."
        )
        wanted = {f"mlflow.sharedViewState.{VIEW}": json.dumps(state), "mlflow.note.content": note}
        tags = self.client.get_experiment(self.experiment).tags
        for name, value in wanted.items():
            if tags.get(name) != value:
                self.client.set_experiment_tag(self.experiment, name, value)

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
        self, what: Sequence[str], name: str, tags: Mapping[str, str], start: int | None = None
    ) -> _Run:
        """A run whose key is the folder (and what of it), so that equal names of two people stay apart."""
        key = parent_key(self.folder, *what)
        tags = {**tags, "retort.key": key, "folder": str(self.folder.resolve())}
        found = next(iter(self._search(f"tags.`retort.key` = '{key}'")), None)
        if found is None:
            run = self.client.create_run(
                self.experiment, start_time=start, tags={"retort.key": key}, run_name=name
            )
        parent = _Run(self.client, (found or run).info.run_id, found)
        parent.log(tags=tags)
        return parent

    def _children(self, parent: str) -> dict[str, Any]:
        runs = self._search(f"tags.`mlflow.parentRunId` = '{parent}'")
        # A run without a key is somebody's own.
        return {key: run for run in runs if (key := run.data.tags.get("retort.key"))}

    def _child(
        self,
        parent: str,
        key: str,
        found: Any,
        *,
        params: Mapping[str, str],
        curve: Sequence[Row],
        points: Callable[[Sequence[Row]], Iterable[tuple[str, float, int]]],  # name, value, step
        tags: Mapping[str, str],
        written: int,
        start: int | None = None,
        times: Mapping[int, int] | None = None,  # of the steps; otherwise when it was written
    ) -> _Run:
        """A run under a parent. A curve that grew is continued; another content under the same key replaces the run."""
        logged = int(found.data.tags["retort.points"]) if found else 0
        if found and found.data.tags["retort.digest"] != _digest([params, curve[:logged]]):
            self.client.delete_run(found.info.run_id)
            found, logged = None, 0
        if found is None:
            fresh = {"retort.key": key, "mlflow.parentRunId": parent, "retort.points": "0"}
            fresh["retort.digest"] = _digest([params, []])
            made = self.client.create_run(
                self.experiment, start_time=start, tags={**fresh, **tags}, run_name=key
            )
            run = _Run(self.client, made.info.run_id, None, made.info.start_time)
            told = {}
        else:
            run = _Run(self.client, found.info.run_id, found, found.info.start_time)
            run.log(tags=tags)
            told = found.data.params  # not all of them, where the first pass was cut
        run.log(params=[field for field in params.items() if field[0] not in told])
        when = times or {}
        grown = points(curve[logged:])
        run.log([(name, value, when.get(step, written), step) for name, value, step in grown])
        if len(curve) > logged:  # only now: what was cut before this line is logged again, not lost
            done = {"retort.points": str(len(curve)), "retort.digest": _digest([params, curve])}
            run.log(tags=done)
        return run


class Comparison(_Mirror):
    """A comparison and its students, trained or in training."""

    def __init__(self, uri: str, folder: Path) -> None:
        summary = folder / "summary.json"
        self.summary: dict[str, Any] = read(summary) if summary.is_file() else {}
        self.written = written_at(summary) if summary.is_file() else int(1000 * time.time())
        self.config: Row = self.summary.get("config", {})
        self.cells: Sequence[Row] = self.summary.get("cells", ())
        protocol = self.summary.get("protocol", "")
        self.protocol: Row = protocol if isinstance(protocol, dict) else {"hash": protocol}
        super().__init__(uri, folder, self.summary.get("name", folder.name))
        self.answers = Answers(folder)
        self.students = self._students()

    def write(self, models: bool = False) -> str:
        """Bring MLflow up to date, and return the parent run's id."""
        kind = {"kind": "comparison", "mlflow.note.content": self._note()}
        starts = [student.start for student in self.students.values() if student.start]
        parent = self._parent(
            [], self.folder.name, {**self._tags(), **kind}, min(starts, default=None)
        )
        known = self._children(parent.id)
        for key, student in self.students.items():
            self._student(parent.id, key, student, known.get(key), models)
        parent.files(self.folder / name for name in ARTIFACTS)
        parent.charts(self.folder / "report.html")
        parent.inputs([*self._training(), *self._benchmarks(self.answers.benchmarks())])
        names = list(dict.fromkeys(cell["benchmark"] for cell in self.cells))
        for name in names:
            if self.answers.benchmark(name):
                rows = partial(self.answers.by_problem, name, self._labels())
                parent.table(f"problems/{_name(name)}.json", self.answers.mark(), rows)
        tuned = ["metrics.`dev_accuracy`"] if (self.folder / "sweep.json").is_file() else []
        self._view(
            parent.id,
            [
                *(f"metrics.`accuracy/{_name(name)}`" for name in names),
                *(f"tags.`{name}`" for name in ("seed", "stage")),
                *(f"metrics.`charged/{name}`" for name in ("teacher_generated", "flops")),
                *tuned,
            ],
        )
        if self.summary:
            parent.close("FINISHED", self.written)
        else:
            ended = all(student.silent for student in self.students.values())
            parent.close("KILLED" if ended else "RUNNING")
        return parent.id

    def _students(self) -> dict[str, Student]:
        """By key LABEL/SEED, in the suite's order: what lies under runs/, and what the summary alone knows."""
        runs = self.folder / "runs"
        folders = {path.parent for name in ("run.json", LOG) for path in runs.rglob(name)}
        found = {path.relative_to(runs).as_posix(): Student.of(path) for path in folders}
        there = {student.cell for student in found.values()}
        data_seeds = {cell.get("data_seed", 0) for cell in self.cells if cell["method"] != "base"}
        for cell in self.cells:
            label, seed, data_seed = at = cell_of(cell)
            if at not in there:
                tail = f"-data{data_seed}" if len(data_seeds) > 1 and label != "base" else ""
                found[f"{label}/{seed}{tail}"] = Student.told(cell, self.config, self.written)
        order = self._labels()
        place = {label: index for index, label in enumerate(order)}
        return {
            key: found[key]
            for key in sorted(found, key=lambda key: (place.get(found[key].cell[0], 99), key))
        }

    def _labels(self) -> list[str]:
        return list(
            dict.fromkeys(
                ["base", *self.config.get("methods", {}), *(cell["method"] for cell in self.cells)]
            )
        )

    def _tags(self, student: Student | None = None) -> dict[str, str]:
        """What is said of the comparison; where it has no summary yet, by what a student says of itself."""
        heads = [each.logged.about for each in ([student] if student else self.students.values())]
        about = {**next(filter(None, heads), {}), **self.config}
        environment = self.summary.get("environment", {})
        tags = {
            "name": self.folder.name,
            "benchmark": ", ".join(about.get("benchmarks", ())),
            "protocol": str(self.protocol.get("hash", "")),
            "config_hash": self.summary.get("config_hash", about.get("config_hash", "")),
            "commit": environment.get("commit") or "",
            "version": environment.get("version", ""),
        }
        return tags | {name: str(about[name]) for name in ("student", "teacher") if name in about}

    def _note(self) -> str:
        """The report up to its verdicts; while it runs, how far it is."""
        report = self.folder / "report.md"
        if self.summary and report.is_file():
            return report.read_text(encoding="utf-8").split("\n## Verdicts")[0][:NOTE]
        lines = ["Not finished.", "", "| student | at | step | loss |", "|---|---|---|---|"]
        for key, student in self.students.items():
            last = student.curve[-1] if student.curve else {}
            loss = f"{last['loss']:.4f}" if last else ""
            lines.append(f"| {key} | {student.phase} | {last.get('step', '')} | {loss} |")
        return "\n".join(lines)[:NOTE]

    def _training(self) -> list[Dataset]:
        return _problem_files(self.folder, "problems.jsonl", "training")

    def _benchmarks(self, names: Iterable[str]) -> list[Dataset]:
        found = []
        for name in names:
            protocol = self.protocol.get("benchmarks", {}).get(name, {})
            asked = sorted(
                {problem for each in self.answers.benchmark(name).values() for problem in each}
            )
            content = short_digest([protocol.get("revision"), protocol.get("chosen"), asked])[:8]
            source = protocol.get("problems", name)
            found.append(Dataset(name, content, "evaluation", source, len(asked)))
        return found

    def _student(self, parent: str, key: str, student: Student, found: Any, models: bool) -> None:
        about, cell = student.about, student.cell
        judged = [each for each in self.cells if cell_of(each) == cell]
        answered = [
            name for name in self.answers.benchmarks() if cell in self.answers.benchmark(name)
        ]
        scores = {f"accuracy/{name}": self.answers.accuracy(name, cell) for name in answered}
        for each in judged:
            for quantity in ("accuracy", "truncated", "unparsed"):
                if quantity in each:
                    scores[f"{quantity}/{each['benchmark']}"] = float(each[quantity])
        run = self._child(
            parent,
            key,
            found,
            params=self._params(about),
            curve=student.curve,
            points=_curve,
            tags={
                **self._tags(student),
                "kind": "student",
                "group": cell[0],
                **{name: str(about[name]) for name in ("method", "label", "seed")},
                "data_seed": str(cell[2]),
                "stage": student.stages,
                "mlflow.note.content": self._said(scores, cell),
            },
            written=student.written,
            start=student.start,
            times=student.times,
        )
        run.final(scores | _costs(about.get("ledger")) | student.used(), student.written)
        self._system(run, student)
        run.files([student.file] if student.file else [])
        training = [] if cell[0] == "base" else self._training()
        run.inputs([*training, *self._benchmarks(answered)])
        for name in answered:
            rows = partial(self.answers.shown, name, cell)
            run.table(f"samples/{_name(name)}.json", self.answers.mark(cell), rows)
        if models and student.file:
            self._model(run, key, student, scores)
        if judged:
            run.close("FINISHED", student.ended)
        else:
            run.close("KILLED" if student.silent else "RUNNING")

    def _said(self, scores: Mapping[str, float], cell: Cell) -> str:
        """A student's description: its accuracies, and where its samples are."""
        lines = [
            f"{name.removeprefix('accuracy/')}: {100 * value:.1f} %"
            for name, value in scores.items()
            if name.startswith("accuracy/")
        ]
        files = ", ".join(
            f"`{file.relative_to(self.folder.parent)}`" for file in self.answers.files(cell)
        )
        return "\n\n".join([*lines, f"Samples: {files}"] if files else lines)[:NOTE]

    def _params(self, about: Row) -> dict[str, str]:
        """The method's fields, the seed, the budget, and what of the training is not the bench's default."""
        fields: dict[str, Any] = {**about.get("config", {}), "seed": about["seed"]}
        if about["label"] != "base":
            budget = about.get("budget") or self.config.get("budget", {})
            training = about.get("training") or self.config.get("training", {})
            default = Training().model_dump(mode="json")
            fields["budget"] = budget if isinstance(budget, Mapping) else {"as": budget}
            fields["training"] = {k: v for k, v in training.items() if default.get(k) != v}
        return _params(fields)

    def _system(self, run: _Run, student: Student) -> None:
        """What the run's process used, under MLflow's prefix: its own sampler works only inside the process, on a live run."""
        logged = run.marks.get("samples", 0)
        rows = [
            (f"system/{name}", value, row["time"], logged + index)
            for index, row in enumerate(student.logged.samples[logged:])
            for name, value in _used(row["used"]).items()
        ]
        run.log(rows)
        run.marks["samples"] = len(student.logged.samples)

    def _model(self, run: _Run, key: str, student: Student, scores: Mapping[str, float]) -> None:
        """The student's Transformers folder as an artifact, and a version of the registered model NAME-LABEL."""
        from mlflow.exceptions import MlflowException

        folder = self.folder / "models" / key
        name = f"{self.name}-{student.cell[0]}"

        def write() -> None:
            self.client.log_artifacts(run.id, str(folder), "student")
            try:
                self.client.create_registered_model(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            if not self.client.search_model_versions(f"run_id = '{run.id}'"):
                tags = {"seed": str(student.cell[1])}
                tags |= {_name(quantity): f"{value:.4f}" for quantity, value in scores.items()}
                self.client.create_model_version(name, f"runs:/{run.id}/student", run.id, tags=tags)

        if folder.is_dir():
            run.once("student", student.about.get("student"), write)


def _problem_files(folder: Path, name: str, context: str) -> list[Dataset]:
    """The data sets in a file of problems."""
    path, record = folder / name, folder / "contamination.json"
    if not path.is_file():
        return []
    given = read(record)["of"]["problems"] if record.is_file() else {}
    return [
        Dataset(
            f"{source} {context}",
            content,
            context,
            str(given.get(source, {}).get("path", source)),
            size,
        )
        for source, content, size in _sets(path, path.stat().st_mtime_ns)
    ]


@lru_cache(maxsize=64)
def _sets(path: Path, when: int) -> list[tuple[str, str, int]]:
    """Source, digest and size of each set of problems in a file."""
    lines: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        lines.setdefault(json.loads(line).get("source") or path.stem, []).append(line)
    return [(source, short_digest(mine)[:8], len(mine)) for source, mine in lines.items()]


def _source(name: str) -> Any:
    """Where a problem set's rows come from, as MLflow says it."""
    from mlflow.data.code_dataset_source import CodeDatasetSource
    from mlflow.data.http_dataset_source import HTTPDatasetSource

    try:
        hub = getattr(problems.find(name), "hub", None)
    except ValueError:  # a file, a task of lm-eval, or a plug-in that is not here
        hub = None
    if hub:
        return HTTPDatasetSource(f"https://huggingface.co/datasets/{hub}")
    return CodeDatasetSource({"mlflow.source.name": name})


class Sweep(_Mirror):
    """The studies of a sweep and their trials."""

    def __init__(self, uri: str, folder: Path) -> None:
        self.data = read(folder / "sweep.json")
        self.written = written_at(folder / "sweep.json")
        super().__init__(uri, folder, self.data["name"])

    def write(self) -> list[str]:
        studies = self.data["studies"]
        notes = self._notes(len(studies))
        runs = [self._study(study, note) for study, note in zip(studies, notes, strict=True)]
        if runs and not (self.folder / "summary.json").is_file():
            self._view(runs[0], ["metrics.`dev_accuracy`", "tags.`trial.state`"])
        return runs

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
        starts = [_milliseconds(t["started"]) for t in study["trials"] if t["started"]]
        parent = self._parent(
            ["sweep", study["study"]], f"sweep {study['label']}", tags, min(starts, default=None)
        )
        known = self._children(parent.id)
        for trial in study["trials"]:
            key = f"{study['label']} {trial['number']:03d}"
            self._trial(parent.id, key, study, trial, known.get(key))
        parent.files(self.folder / name for name in SWEEP_ARTIFACTS)
        home = self.folder / "sweep"
        parent.inputs(
            [
                *_problem_files(home, "problems.jsonl", "training"),
                *_problem_files(home, "dev.jsonl", "dev"),
            ]
        )
        parent.final(final, self.written)
        parent.close("FINISHED", self.written) if finished else parent.close("RUNNING")
        return parent.id

    def _named(self, study: Row) -> dict[str, str]:
        tags = {"kind": "sweep", "method": study["method"], "label": study["label"]}
        return tags | {
            name: str(self.data[name]) for name in ("student", "teacher") if name in self.data
        }

    def _trial(self, parent: str, key: str, study: Row, trial: Row, found: Any) -> None:
        curve = [point for point in trial["points"] if point["share"] < 1]
        if trial["state"] == "complete":
            curve.append({"share": 1.0, "value": trial["value"]})
        ended = trial["state"] not in ("running", "waiting")
        start = _milliseconds(trial["started"]) if trial["started"] else None
        run = self._child(
            parent,
            key,
            found,
            params=_params(trial["params"]),
            curve=curve,
            points=_by_share,
            tags=self._named(study)
            | {
                "group": f"sweep {study['label']}",
                "trial.state": trial["state"],
                "trial.number": str(trial["number"]),
                "trial.tries": str(trial["tries"]),
                "trial.reason": trial["reason"] or "",
                "default": str(bool(trial.get("default"))).lower(),
            },
            written=self.written,
            start=start,
        )
        run.final(_costs({**(trial["ledger"] or {}), "lost": trial["lost"] or {}}), self.written)
        lasted = int(1000 * trial["seconds"]) if ended and trial["seconds"] is not None else None
        end = None if lasted is None else run.start + lasted
        run.close(STATUS.get(trial["state"], "FAILED"), end)


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


def database(uri: str) -> Path | None:
    """The file of a sqlite address."""
    prefix = "sqlite:///"
    return Path(uri.removeprefix(prefix)) if uri.startswith(prefix) else None


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


def charts(report: str) -> dict[str, str]:
    """The charts of a report's page, each as a file that shows alone: plots/NN TITLE.svg."""
    style = "".join(re.findall(r"<style>(.*?)</style>", report, re.DOTALL))
    found: dict[str, str] = {}
    for drawn in re.finditer(r'<svg class="chart"([^>]*)>(.*?)</svg>', report, re.DOTALL):
        label = re.search(r'aria-label="([^"]*)"', drawn[1])
        title = re.sub(r"[^\w,.-]+", " ", unescape(label[1] if label else "")).strip()[:60]
        name = f"plots/{len(found) + 1:02d} {title}".rstrip() + ".svg"
        head = f'<svg xmlns="http://www.w3.org/2000/svg" class="chart"{drawn[1]}>'
        found[name] = f"{head}<style>{escape(style)}</style>{drawn[2]}</svg>"
    return found


def page(experiment: str) -> str:
    """Where the UI shows an experiment's runs as `_view` says."""
    return f"experiments/{experiment}/runs?viewStateShareKey={VIEW}&workflowType=machine_learning"


def parent_key(folder: Path, *what: str) -> str:
    return _digest([platform.node(), str(folder.resolve()), *what])


def forget(uri: str, folder: Path) -> None:
    """Delete the runs of a folder, as MLflow deletes: out of sight until `mlflow gc`."""
    for kind in (Comparison, Sweep):
        if kind is Sweep and not (folder / "sweep.json").is_file():
            continue
        there = kind(uri, folder)
        mine = {run.info.run_id for run in there._search(f"tags.folder = '{folder.resolve()}'")}
        for run in there._search(""):
            if {run.info.run_id, run.data.tags.get("mlflow.parentRunId")} & mine:
                there.client.delete_run(run.info.run_id)


def _used(used: Row) -> dict[str, float]:
    """A sample as MLflow's System metrics tab shows it; 100 % is one core."""
    names = {"memory_mb": "process_memory_megabytes", "gpu_memory_mb": "gpu_memory_megabytes"}
    found = {names[name]: value for name, value in used.items() if name in names}
    if used["seconds"]:
        found["process_cpu_percentage"] = 100 * used["cpu_seconds"] / used["seconds"]
    return found
