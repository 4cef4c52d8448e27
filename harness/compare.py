"""Methods x seeds x benchmarks: run every cell that is not done, then judge, report and record."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import sys
import threading
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil

from harness import (
    cell,
    evaluation,
    models,
    problems,
    ranks,
    registry,
    report,
    sizes,
    space,
    standing,
    statistics,
    tracking,
)
from harness.capsule import environment
from harness.cell import Job, write_json
from harness.config import Benchmark, Experiment, find_suite, load, model_spec, nearest
from harness.executors import Executor
from harness.ledger import Ledger, total
from harness.progress import Display, Event, end_with_parent, throttled
from harness.types import Problem

FREE_BYTES = 200 * 2**20  # a comparison wants at least this much disk


def experiment(suite: str | Path | Experiment, overrides: Sequence[str] = ()) -> Experiment:
    """A suite by name, path or value, with overrides applied."""
    if isinstance(suite, Experiment):
        if overrides:
            raise ValueError("overrides apply to a suite by name or path, not to an Experiment")
        return suite
    return load(find_suite(suite, [*problems.suite_folders(), Path.cwd()]), overrides)


def compare(
    suite: str | Path | Experiment,
    *,
    methods: Sequence[str] | None = None,
    seeds: int | None = None,
    limit: int | None = None,
    tuned: bool = False,
    overrides: Sequence[str] = (),
    results: Path = Path("results"),
    store: Path | None = None,
    quiet: bool = False,
    track: bool = True,
    executor: Executor | None = None,
) -> dict[str, Any]:
    """Run a comparison and return its summary; what is done already is not done again.

    With `tuned` every arm has the best setting of its sweep, and the comparison is named NAME-tuned. Cells run on this machine
    unless `executors.choose` gives another executor.
    """
    setting = experiment(suite, overrides)
    labels = chosen(setting, methods)
    setting = _smaller(setting, seeds, limit)
    use_data(setting)
    results = Path(results)
    effort: dict[str, Any] = {}
    if tuned:
        setting, effort = space.tuned(setting, labels, results / setting.name / "sweep.json")
    folder = results / setting.name
    store = store or Path(os.environ.get("RETORT_STORE", results / "store"))

    def ready() -> tuple[dict[str, Any], list[Job]]:
        check(setting, labels)
        check_writable(folder, store)
        contamination = prepare(setting, folder)
        jobs = cell.jobs(setting, labels, folder, store)
        for job in jobs:
            if job.label != "base":
                cell.recorded(job, setting)  # refuses another configuration before anything runs
        return contamination, jobs

    contamination, jobs = ranks.agree(ready)
    with (
        Display(len(jobs)) if ranks.first() and not quiet else Silent() as display,
        tracking.watching(folder, track),
    ):
        if executor is None:
            run(jobs, setting.workers, display)
        else:
            executor.run(jobs, setting, display)
    if not ranks.first():
        return {}
    summary = summarise(setting, labels, jobs, contamination)
    if effort:
        summary["tuned"] = effort
    write_json(folder / "summary.json", summary)
    report.write(folder)
    if track:
        tracking.record(folder)
    return summary


def check(setting: Experiment, labels: Sequence[str]) -> None:
    """Everything that can be wrong is found here, before compute is spent."""
    check_engines(setting)
    check_models(setting, needs(setting, labels))
    check_tasks(setting)


def check_engines(setting: Experiment) -> None:
    """Refuse vLLM where there is none, and on several ranks: each would start engines of its own on the same GPUs, and only the
    first writes weights for one."""
    specs = {"student": setting.student, "teacher": setting.teacher, **setting.models}
    for name, spec in specs.items():
        described = model_spec(spec, name)
        if ranks.world() > 1 and getattr(described, "engine", "hf") == "vllm":
            raise ValueError(
                f"{name}: `engine: vllm` does not run under `accelerate launch`, whose processes share out the writing "
                "themselves: take `engine: hf`, or start `retort compare` as one process"
            )
        models.check_here(described)


def check_tasks(setting: Experiment) -> None:
    """Refuse problem sets and benchmarks that there are not, or options that they do not know."""
    for name, options in setting.problems.items():
        problems.check(name, **options)
    for name, given in setting.benchmarks.items():
        evaluation.check(name)
        evaluation.Setting.of(name, given)
        if given.options:
            evaluation.problems_of(name, limit=1, levels=given.levels, options=given.options)
        if given.bands:
            _check_bands(name, given)


def needs(setting: Experiment, labels: Sequence[str]) -> dict[str, frozenset[str]]:
    """What each arm needs of the models."""
    return {label: cell.recipe(setting, label)[0].required() for label in labels}


def _check_bands(name: str, given: Benchmark) -> None:
    """Refuse a band without problems, which would vanish from the tables."""
    found = evaluation.problems_of(
        name, limit=given.limit, levels=given.levels, options=given.options
    )
    there = sorted({problem.level for problem in found if problem.level is not None})
    for band, levels in given.bands.items():
        if not set(levels) & set(there):
            raise ValueError(
                f"benchmarks.{name}.bands.{band}: none of the {len(found)} problems is of level "
                f"{', '.join(map(str, levels))}; they are of {', '.join(map(str, there)) or 'no level'}"
            )


def check_models(
    setting: Experiment, needed: Mapping[str, frozenset[str]], among: Collection[str] | None = None
) -> None:
    """Refuse a suite whose models (or those named) cannot do what each label needs of them (`model.capability`)."""
    checkpoints = problems.checkpoints()
    specs = {"student": setting.student, "teacher": setting.teacher, **setting.models}
    offers = {
        name: models.capabilities(
            spec, checkpoints, trained=name == "student", writes=name == "teacher"
        )
        for name, spec in specs.items()
        if among is None or name in among
    }
    if "student" in offers:
        sizes.check_adapter(setting.student, checkpoints)
        offers["base"] = offers["student"]
    for label, needs in needed.items():
        for need in sorted(needs):
            who, _, what = need.partition(".")
            if among is not None and who not in among:
                continue
            if who not in offers:
                raise ValueError(
                    f"{label} needs a model {who!r}: name one under `models:` in the suite"
                )
            if what not in offers[who]:
                able = [
                    name
                    for name in sorted(registry.methods())
                    if not any(
                        each.startswith(f"{who}.") and each.partition(".")[2] not in offers[who]
                        for each in registry.get(name).needs
                    )
                ]
                take = f"a Transformers model (`engine: hf`) as {who}"
                if what == "reward":
                    take = (
                        "a token or sequence classifier, {ask: MODEL} or {server: URL, model: NAME}"
                    )
                raise ValueError(
                    f"{label} needs the {who}'s {what}, and {specs[who]!r} offers only "
                    f"{', '.join(sorted(offers[who]))}: use {take}, or a method that does without ({', '.join(able)})"
                )
    if among is None and any("teacher.logits" in needs for needs in needed.values()):
        models.check_vocabularies(setting.student, setting.teacher, checkpoints)


def prepare(setting: Experiment, folder: Path) -> dict[str, Any]:
    """Load the training problems, drop those that overlap a benchmark, and keep the list."""
    path = folder / "problems.jsonl"
    record = folder / "contamination.json"
    chosen = {
        name: dict(evaluation.Setting.of(name, given).options)
        for name, given in setting.benchmarks.items()
    }
    wanted = {
        "problems": setting.problems,
        "rule": setting.contamination.rule,
        "benchmarks": chosen,
        "sources": {name: _source(name, options) for name, options in setting.problems.items()},
        "micro_version": problems.micro_version(),
        "data": os.environ.get("RETORT_DATA"),
    }
    if path.is_file() and record.is_file():
        kept = json.loads(record.read_text(encoding="utf-8"))
        if kept["of"] == wanted:
            return kept
    train: list[Problem] = []
    for name, options in setting.problems.items():
        train += problems.load(name, "train", **options)
    tests = {
        name: found
        for name, options in chosen.items()
        if (found := evaluation.problems_of(name, options=options))
    }
    kept_problems, counts = problems.decontaminate(train, tests, rule=setting.contamination.rule)
    if not kept_problems:
        raise ValueError(f"no training problems are left of {len(train)}: contamination {counts}")
    partial = path.with_suffix(f".{os.getpid()}.partial")
    lines = [json.dumps(asdict(problem)) for problem in kept_problems]
    partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(partial, path)
    result = {"of": wanted, "loaded": len(train), "kept": len(kept_problems), **counts}
    write_json(record, result)
    return result


# -- running ------------------------------------------------------------------------------------

_SEND: Any = None  # a worker's end of the event queue


def run(jobs: Sequence[Job], workers: int, display: Any) -> None:
    """Run cells in order, `workers` at a time."""
    workers = 1 if ranks.world() > 1 else min(workers, len(jobs))
    if workers == 1:
        for job in jobs:
            cell.run(job, throttled(lambda event: display(*event), job.name))
            display.finish(job.name)
        return
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    pump = threading.Thread(target=_pump, args=(queue, display), daemon=True)
    pump.start()
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(queue,))
    running: dict[Future[None], Job] = {pool.submit(_work, job): job for job in jobs}
    try:
        while running:
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                job = running.pop(future)
                try:
                    future.result()
                except BrokenProcessPool:
                    raise ValueError(
                        "a worker process was ended from outside (out of memory?); what it had finished is "
                        "kept: run the same command again, with --set workers=1 if memory is short"
                    ) from None
                display.finish(job.name)
    except BaseException:
        processes = list(pool._processes.values())  # shutdown forgets them
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        raise
    finally:
        queue.put(None)
    pool.shutdown()
    pump.join(timeout=5)


def _start_worker(queue: Any) -> None:
    global _SEND
    _SEND = queue.put
    end_with_parent()


def _work(job: Job) -> None:
    cell.run(job, throttled(_SEND, job.name))


def _pump(queue: Any, display: Any) -> None:
    event: Event | None
    while (event := queue.get()) is not None:
        with suppress(Exception):  # a display that fails must not leave workers before a full pipe
            display(*event)


class Silent:
    """A display that shows nothing."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def __call__(self, *event: object) -> None:
        pass

    def finish(self, name: str, note: str = "") -> None:
        pass


# -- judging ------------------------------------------------------------------------------------


def summarise(
    setting: Experiment,
    labels: Sequence[str],
    jobs: Sequence[Job],
    contamination: Mapping[str, Any],
) -> dict[str, Any]:
    """What design calls summary.json."""
    records = [
        record
        for job in jobs
        for name in setting.benchmarks
        for record in evaluation.read_records(job.samples_file(name))
    ]
    records += in_bands(records, setting)
    reference = setting.reference if setting.reference in labels else "base"
    judged = statistics.summarise_records(records, reference, arms=["base", *labels])
    runs = {
        (job.label, job.seed, job.data_seed): json.loads(job.run_file.read_text(encoding="utf-8"))
        for job in jobs
        if job.label != "base"
    }
    ledgers = {name: run["ledger"] for name, run in runs.items()}
    free = Ledger().summary()
    for row in judged.cells:
        row["ledger"] = ledgers.get((row["method"], row["seed"], row["data_seed"]), free)
    for row in judged.arms:
        mine = [Ledger.from_dict(ledgers[at]) for at in ledgers if at[0] == row["method"]]
        row["ledger"] = total(mine).summary() if mine else free
    standing.add_costs(judged.arms, judged.pairs)
    protocol = evaluation.protocol(setting.benchmarks, setting.student)
    return {
        "name": setting.name,
        "protocol": protocol,
        "config": setting.model_dump(mode="json"),
        "config_hash": setting.hash,
        "contamination": {k: v for k, v in contamination.items() if k != "of"},
        "cells": judged.cells,
        "arms": judged.arms,
        "pairs": judged.pairs,
        "ledger": total(Ledger.from_dict(ledger) for ledger in ledgers.values()).summary(),
        "environment": environment(),
    }


def in_bands(records: Sequence[Mapping[str, Any]], setting: Experiment) -> list[dict[str, Any]]:
    """The records of each band of levels again, as those of a benchmark `NAME/BAND`."""
    return [
        {**record, "benchmark": f"{name}/{band}"}
        for name, given in setting.benchmarks.items()
        for band, levels in given.bands.items()
        for record in records
        if record["benchmark"] == name and record["level"] in levels
    ]


def use_data(setting: Experiment) -> None:
    """A suite's `data_dir` stands for RETORT_DATA, here and in the workers."""
    if setting.data_dir is not None:
        os.environ["RETORT_DATA"] = str(setting.data_dir)


def _smaller(setting: Experiment, seeds: int | None, limit: int | None) -> Experiment:
    """The suite under --seeds and --limit, as if it said so itself."""
    data = setting.model_dump()
    data["seeds"] = seeds or setting.seeds
    if limit is not None:
        for options in data["benchmarks"].values():
            options["limit"] = min(limit, options["limit"] or limit)
    return Experiment.model_validate(data)


def _source(name: str, options: Mapping[str, Any]) -> str:
    """What decides the rows of a training set: a file's bytes, or a generated set's version."""
    path = Path(options.get("path", name))
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return name


def chosen(setting: Experiment, methods: Sequence[str] | None) -> list[str]:
    """The arms asked for, in the suite's order."""
    if methods is None:
        return list(setting.methods)
    for label in methods:
        if label not in setting.methods:
            raise ValueError(
                f"unknown method {label!r} in suite {setting.name!r}: {nearest(label, setting.methods)}"
            )
    return [label for label in setting.methods if label in methods]


def check_writable(*folders: Path) -> None:
    """Refuse folders that cannot be written to, or a disk that is nearly full."""
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".probe-{os.getpid()}"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise ValueError(
                f"cannot write to {folder}: {error.strerror}; choose another place with --results or RETORT_STORE"
            ) from None
        free = psutil.disk_usage(str(folder)).free
        if free < FREE_BYTES:
            raise ValueError(
                f"{folder}: {free >> 20} MiB of disk are free, {FREE_BYTES >> 20} MiB are needed"
            )


class _Callable(ModuleType):
    """Lets `from harness import compare` be called: the import system binds that name to this module."""

    def __call__(self, *args: Any, **options: Any) -> dict[str, Any]:
        return compare(*args, **options)


sys.modules[__name__].__class__ = _Callable
