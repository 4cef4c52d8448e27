"""Tuning at equal effort: Optuna over a method's search fields, judged on dev problems, confirmed on fresh seeds.

A trial trains one student a seed at a share of the budget and answers dev problems; what it needs of teacher samples, pass
rates and verdicts comes out of the store. A test benchmark is never an objective: it only judges the setting that was chosen.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import cell, evaluation, study, tracking
from harness.capsule import environment
from harness.cell import Job, write_json
from harness.compare import (
    Silent,
    check,
    check_writable,
    experiment,
    prepare,
    summarise,
    use_data,
)
from harness.compare import chosen as chosen_arms
from harness.compare import run as run_cells
from harness.config import Experiment, nearest
from harness.ledger import QUANTITIES, Ledger, total
from harness.progress import Display
from harness.report import sweep as pages
from harness.space import Space, changed, of, space
from harness.store import Store, short_digest
from harness.trial import Progress, Trial, dev_problems, read_data, smaller

if TYPE_CHECKING:
    import optuna

EVERY = 20.0  # seconds between two records of a sweep that is running
ENDED = ("complete", "pruned")
Report = Callable[[str, int, int], None]  # phase, done, total


def sweep(
    suite: str | Path | Experiment,
    method: str | None = None,
    *,
    trials: int,
    workers: int | None = None,
    sampler: str = "tpe",
    pruner: str = "wilcoxon",
    storage: str | None = None,
    overrides: Sequence[str] = (),
    results: Path = Path("results"),
    store: Path | None = None,
    quiet: bool = False,
    track: bool = True,
) -> dict[str, Any]:
    """Tune one arm, or with no `method` every arm of the suite that has something to tune; returns what sweep.json holds.

    Every arm gets the same number of trials, the same budget and the same seeds a trial. What is done already is not done
    again, and a larger `trials` adds to it.
    """
    setting = experiment(suite, overrides)
    if workers is not None:
        setting = setting.model_copy(update={"workers": workers})
    labels = chosen_arms(setting, None if method is None else [method])
    use_data(setting)
    check_objective(setting)
    spaces = {label: space(setting, label) for label in labels}
    tunable = {label: each for label, each in spaces.items() if each.dimensions}
    if not tunable:
        raise ValueError(
            f"{', '.join(labels)} of {setting.name!r}: no field to search, so there is nothing to tune; name one "
            "under sweep: in the suite"
        )
    check(setting, labels)
    for label in labels:
        if label not in tunable and not quiet:
            print(f"{label}: no field to search, it stays as it is", file=sys.stderr)
    results = Path(results)
    home = results / setting.name
    folder = home / "sweep"
    store = store or Path(os.environ.get("RETORT_STORE", results / "store"))
    check_writable(folder, store)
    where = storage or str(home / "study.log")
    plans = {
        label: study.Plan(
            name=f"{setting.name}/{label}",
            storage=where,
            trials=min(trials, each.size(trials)) if sampler == "grid" else trials,
            space=each,
            sampler=sampler,
            pruner=pruner,
            first=(each.default,) if each.default_inside and sampler != "grid" else (),
            heartbeat=setting.sweep.heartbeat,
        )
        for label, each in tunable.items()
    }
    for label, plan in plans.items():
        now = {"space": spaces[label].describe(), "setting": of(setting, label)}
        _same(study.open_study(plan), "retort", now, study.shown(plan))
    contamination = prepare(setting, folder)
    dev = dev_problems(setting, folder)
    data = read_data(setting, folder)
    for plan in plans.values():
        _same(study.open_study(plan), "data", data, study.shown(plan))
    with tracking.watching(home, track):
        for label, plan in plans.items():
            book = Book(home, setting, spaces[label], plan, dev)
            objective = Trial(setting.model_dump(mode="json"), label, folder, store)
            with Display(trials) if not quiet else Silent() as display:
                study.run(plan, objective, setting.workers, Recording(display, book))
            book.show(track)
            book.confirm = confirm(
                setting, spaces[label], book.entry(), folder, store, contamination, quiet=quiet
            )
            book.show(track)
    found: dict[str, Any] = json.loads((home / "sweep.json").read_text(encoding="utf-8"))
    return {**found, "studies": [each for each in found["studies"] if each["label"] in labels]}


def check_objective(setting: Experiment) -> None:
    """Refuse to tune on what is reported."""
    name = setting.sweep.objective
    allowed = ["dev", *(f"dev/{each}" for each in setting.problems)]
    if name in allowed:
        return
    if name in setting.benchmarks or name in evaluation.own():
        raise ValueError(
            f"{setting.name}: sweep.objective: {name!r} is a test benchmark, and a score that was tuned on is no test "
            f"of anything: write {' or '.join(allowed)}, problems that are held out of training and never reported"
        )
    raise ValueError(f"{setting.name}: sweep.objective: unknown {name!r}: {nearest(name, allowed)}")


# -- the record ---------------------------------------------------------------------------------


@dataclass
class Book:
    """One study as sweep.json tells it."""

    home: Path  # results/NAME
    setting: Experiment
    space: Space
    plan: study.Plan
    dev: Mapping[str, Any]
    confirm: dict[str, Any] | None = None

    def entry(self) -> dict[str, Any]:
        """The study as it stands."""
        label = self.space.label
        opened = study.open_study(self.plan)
        rows = [self._trial(each) for each in study.lines(opened, self.plan)]
        ended = [row for row in rows if row["state"] in ENDED]
        complete = [row for row in rows if row["state"] == "complete"]
        best = max(complete, key=lambda row: row["value"], default=None)
        ledgers = [Ledger.from_dict(row["ledger"]) for row in rows if row["ledger"]]
        arms = {
            each.number: each.user_attrs.get("arm") for each in opened.get_trials(deepcopy=False)
        }
        _, _, budget = cell.recipe(self.setting, label)
        return {
            "label": label,
            "method": self.setting.methods[label].get("method", label),
            "study": self.plan.name,
            "storage": study.shown(self.plan),
            "sampler": self.plan.sampler,
            "pruner": self.plan.pruner,
            "trials_asked": self.plan.trials,
            "seeds": list(range(self.setting.sweep.seeds)),
            "share": self.setting.sweep.share,
            "budget": smaller(budget, self.setting.sweep.share).model_dump(exclude_none=True),
            "dev": dict(self.dev),
            "of": of(self.setting, label),
            "space": self.space.describe(),
            "default": self.space.default,
            "trials": rows,
            "best": best
            and {
                **{k: best[k] for k in ("number", "params", "value")},
                "arm": arms[best["number"]],
            },
            "importance": study.importance(opened),
            "best_of_n": best_of_n([_standing(row) for row in ended]),
            "ledger": total(ledgers).summary(),
            "confirm": self.confirm,
        }

    def show(self, track: bool) -> None:
        """Write the study as it stands, its page, and its mirror in MLflow."""
        self.write()
        pages.write(self.home)
        if track:
            tracking.record_sweep(self.home)

    def write(self) -> None:
        """Put the study into sweep.json, beside those of other arms."""
        path = self.home / "sweep.json"
        with Store(self.home / "sweep").claim("sweep", {}, "json"):
            found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            others = [s for s in found.get("studies", ()) if s["label"] != self.space.label]
            old = next((s for s in found.get("studies", ()) if s not in others), None)
            entry = self.entry()
            if entry["confirm"] is None and old and old["best"] == entry["best"]:
                entry["confirm"] = old["confirm"]
            order = [*self.setting.methods]
            studies = sorted(
                [*others, entry],
                key=lambda s: order.index(s["label"]) if s["label"] in order else len(order),
            )
            data = {
                "name": self.setting.name,
                "student": self.setting.student,
                "teacher": self.setting.teacher,
                "studies": studies,
                "environment": environment(),
            }
            write_json(path, data)

    def _trial(self, trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
        attributes = trial.user_attrs
        complete = trial.state.name == "COMPLETE"
        return {
            "number": trial.number,
            "state": trial.state.name.lower().replace("fail", "failed"),
            "params": trial.params,
            "value": trial.value if complete else None,
            "ci95": attributes.get("ci95") if complete else None,
            "points": attributes.get("points", []),
            "reason": attributes.get("reason"),
            "default": trial.params == self.space.default,
            "same_as": attributes.get("same_as"),
            "tries": len(study.history(trial)) + 1,
            "started": trial.datetime_start and trial.datetime_start.isoformat(timespec="seconds"),
            "seconds": attributes.get("seconds"),
            **self._paid(attributes),
        }

    def _paid(self, attributes: Mapping[str, Any]) -> dict[str, Any]:
        """What a trial cost; of one that has not come to its end, or never will, what its tries have spent so far."""
        if "ledger" in attributes:
            return {"ledger": attributes["ledger"], "lost": attributes["lost"]}
        file = self.home / "sweep" / "runs" / attributes.get("run", "") / "progress.json"
        try:
            kept = Progress(**json.loads(file.read_text(encoding="utf-8")))
        except FileNotFoundError:  # it has not begun, or ends just now
            return {"ledger": None, "lost": {}}
        ledger = total(map(Ledger.from_dict, kept.ledgers)).summary() if kept.ledgers else None
        lost = {
            name: kept.lost.get(name, 0) + kept.spent.get(name, 0)
            for name in QUANTITIES
            if kept.lost.get(name) or kept.spent.get(name)
        }
        return {"ledger": ledger, "lost": lost}


class Recording:
    """A display that also writes the record as trials end."""

    def __init__(self, display: Any, book: Book) -> None:
        self.display, self.book, self.last = display, book, time.monotonic()

    def __call__(self, *event: Any) -> None:
        self.display(*event)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.display, name)

    def finish(self, name: str, note: str = "done") -> None:
        self.display.finish(name, note)
        if time.monotonic() - self.last > EVERY:
            self.book.show(track=False)  # MLflow is told meanwhile, by another process
            self.last = time.monotonic()


def best_of_n(values: Sequence[float]) -> list[dict[str, float]]:
    """What n trials would have found: the expected best of n random ones of these, and the best of the first n.

    E max of n = sum_i v_(i) C(i-1, n-1) / C(N, n), v sorted upwards   (cf. Dodge et al. 2019, arXiv:1909.03004, eq. 2, which
    draws with replacement). Of trials that a sampler proposed in turn it is a description, no forecast.
    """
    ordered, size = sorted(values), len(values)
    return [
        {
            "n": n,
            "expected": sum(
                v * math.comb(i, n - 1) / math.comb(size, n) for i, v in enumerate(ordered)
            ),
            "best": max(values[:n]),
        }
        for n in range(1, size + 1)
    ]


def _standing(row: Mapping[str, Any]) -> float:
    """A trial's value; of a pruned one what it had reached, of one that could not run nothing."""
    if row["value"] is not None:
        return float(row["value"])
    return float(row["points"][-1]["value"]) if row["points"] else 0.0


# -- the confirmation ---------------------------------------------------------------------------


def confirm(
    setting: Experiment,
    arm: Space,
    entry: Mapping[str, Any],
    folder: Path,
    store: Path,
    contamination: Mapping[str, Any],
    *,
    quiet: bool = False,
) -> dict[str, Any] | None:
    """The best setting beside the suite's own: fresh training seeds, the full budget, the suite's benchmarks."""
    if not setting.sweep.confirm_seeds or entry["best"] is None or not setting.benchmarks:
        return None
    label, best = arm.label, entry["best"]
    arms = {label: dict(arm.arm(setting.methods[label], {}))}
    names = {"default": label, "tuned": label}
    if best["params"] != arm.default:
        names["tuned"] = f"{label}+{short_digest([entry['of'], best['params']])[:8]}"
        arms[names["tuned"]] = best["arm"]
    data = setting.model_dump(mode="json")
    chosen = Experiment.model_validate({**data, "methods": arms, "reference": label, "sweep": {}})
    first = setting.sweep.seeds
    jobs = [job for job in cell.jobs(chosen, list(arms), folder, store) if job.label == "base"]
    jobs += [
        Job(chosen.model_dump(mode="json"), name, seed, data_seed, folder, store)
        for name in arms
        for data_seed in chosen.data_seeds
        for seed in range(first, first + setting.sweep.confirm_seeds)
    ]
    for job in jobs:
        if job.label != "base":
            cell.recorded(job, chosen)
    with Display(len(jobs)) if not quiet else Silent() as display:
        run_cells(jobs, setting.workers, display)
    summary = summarise(chosen, list(arms), jobs, contamination)
    seeds = list(range(first, first + setting.sweep.confirm_seeds))
    kept = ("protocol", "cells", "arms", "pairs", "ledger")
    return {
        "seeds": seeds,
        "labels": names,
        "number": best["number"],
        **{k: summary[k] for k in kept},
    }


def _same(opened: optuna.Study, key: str, now: Mapping[str, Any], where: str) -> None:
    """Refuse to go on with a study of another space or setting, or of other problems and models."""
    if "id" not in opened.user_attrs:
        opened.set_user_attr("id", uuid.uuid4().hex)
    was = opened.user_attrs.get(key)
    if was is None:
        opened.set_user_attr(key, now)
        return
    lines = changed(was, json.loads(json.dumps(now)))
    if lines:
        more = f" and {len(lines) - 4} more" if len(lines) > 4 else ""
        raise ValueError(
            f"the study {opened.study_name!r} in {where} was of another sweep: {'; '.join(lines[:4])}{more}. Say it as it "
            "was to go on, or give this sweep a name of its own (--set name=…)"
        )
