"""Tuning at equal effort: Optuna over a method's search fields, judged on dev problems, confirmed on fresh seeds.

A trial trains one student a seed at a share of the budget and answers dev problems; what it needs of teacher samples, pass
rates and verdicts comes out of the store. A test benchmark is never an objective: it only judges the setting that was chosen.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from harness import cell, evaluation, problems, statistics, study, tracking, verifiers
from harness.cell import Job, write_json
from harness.compare import (
    Silent,
    check,
    check_writable,
    environment,
    experiment,
    prepare,
    summarise,
    use_data,
)
from harness.compare import chosen as chosen_arms
from harness.compare import run as run_cells
from harness.config import Budget, Experiment, nearest
from harness.ledger import QUANTITIES, Ledger, total
from harness.progress import Display
from harness.report import sweep as pages
from harness.space import Space, changed, of, space
from harness.store import Store, short_digest
from harness.trainer import Trainer
from harness.types import Problem, Request, Sampling

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
            trials=trials,
            space=each,
            sampler=sampler,
            pruner=pruner,
            first=(each.default,) if each.default_inside and sampler != "grid" else (),
            heartbeat=setting.sweep.heartbeat,
        )
        for label, each in tunable.items()
    }
    for label, plan in plans.items():
        _same(study.open_study(plan), setting, spaces[label], study.shown(plan))
    contamination = prepare(setting, folder)
    dev = dev_problems(setting, folder)
    for label, plan in plans.items():
        book = Book(home, setting, spaces[label], plan, dev)
        objective = Trial(setting.model_dump(mode="json"), label, folder, store)
        with Display(trials) if not quiet else Silent() as display:
            study.run(plan, objective, setting.workers, Recording(display, book, track))
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


def dev_problems(setting: Experiment, folder: Path) -> dict[str, Any]:
    """Draw the dev problems, keep them in FOLDER/dev.jsonl, and count them by set.

    Equal parts of the training sets; none that overlaps a training problem or a benchmark; the same for every arm and trial.
    """
    path, record = folder / "dev.jsonl", folder / "dev.json"
    only = setting.sweep.objective.removeprefix("dev").removeprefix("/")
    sets = [only] if only else list(setting.problems)
    train = _problems(folder / "problems.jsonl")
    tests = {
        name: found
        for name, given in setting.benchmarks.items()
        if (
            found := evaluation.problems_of(
                name, options=evaluation.Setting.of(name, given).options
            )
        )
    }
    drawn: list[Problem] = []
    counts: dict[str, Any] = {}
    dropped = 0
    for index, name in enumerate(sets):
        options = {key: value for key, value in setting.problems[name].items() if key != "n"}
        found = problems.load(name, "dev", **options)
        rule = setting.contamination.rule
        kept, overlap = problems.decontaminate(found, {"train": train, **tests}, rule=rule)
        dropped += overlap["dropped"]
        size = setting.sweep.dev_problems
        size = size * (index + 1) // len(sets) - size * index // len(sets)
        order = np.random.default_rng(0).permutation(len(kept))[:size]
        if not len(order):
            raise ValueError(
                f"{name}: no dev problems are left of {len(found)}: contamination {overlap}"
            )
        drawn += [kept[int(place)] for place in sorted(order)]
        counts[name] = len(order)
    lines = "".join(json.dumps(asdict(problem)) + "\n" for problem in drawn)
    if not path.is_file() or path.read_text(encoding="utf-8") != lines:
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(lines, encoding="utf-8")
        os.replace(partial, path)
    counts["dropped"] = dropped
    write_json(record, counts)
    return counts


# -- one trial ----------------------------------------------------------------------------------


@dataclass
class Progress:
    """What a trial keeps beside its checkpoint: what was seen of it, and what its tries spent."""

    points: list[dict[str, Any]] = field(default_factory=list)  # seed, share, value, outcomes
    spent: dict[str, float] = field(default_factory=dict)  # by the seed in training, so far
    lost: dict[str, float] = field(
        default_factory=dict
    )  # by tries that were ended, beyond their checkpoint
    ledgers: list[dict[str, Any]] = field(default_factory=list)  # of the seeds that have ended
    seconds: float = 0.0


@dataclass(frozen=True)
class Trial:
    """The objective: the mean over seeds and dev problems of a student's verdicts. Plain data, so that it travels."""

    experiment: Mapping[str, Any]
    label: str
    folder: Path  # results/NAME/sweep
    store: Path

    def __call__(self, params: dict[str, Any], trial: optuna.Trial, report: Report) -> float:
        setting = Experiment.model_validate(self.experiment)
        torch.set_num_threads(setting.threads or max(1, (os.cpu_count() or 1) // setting.workers))
        arm = space(setting, self.label).arm(setting.methods[self.label], params)
        name = f"{self.label}+{short_digest([of(setting, self.label), params])[:8]}"
        store = Store(self.store)
        claimed = {"folder": str(self.folder.resolve())}
        with store.claim("trials", claimed, name):  # equal params of two workers: one trains
            return self._value(setting, name, arm, trial, store, report)

    def _value(
        self,
        setting: Experiment,
        name: str,
        arm: Mapping[str, Any],
        trial: optuna.Trial,
        store: Store,
        report: Report,
    ) -> float:
        path = self.folder / "runs" / name / "trial.json"
        trial.set_user_attr("run", name)
        if path.is_file():  # a trial of the same params, or this one's end before it was told
            return _told(json.loads(path.read_text(encoding="utf-8")), trial)
        run = _Run(setting, self, name, arm, trial, store, report, path.parent)
        result = run.result()
        write_json(path, {**result, "number": trial.number})
        for leftover in (self.folder / "models" / name, path.with_name("progress.json")):
            shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(
                missing_ok=True
            )
        for checkpoint in path.parent.glob("*/checkpoint*.pt"):
            checkpoint.unlink(missing_ok=True)
        return _told(json.loads(path.read_text(encoding="utf-8")), trial)


class _Run:
    """The seeds of one trial, one after the other; taken up again where they were cut."""

    def __init__(
        self,
        setting: Experiment,
        of: Trial,
        name: str,
        arm: Mapping[str, Any],
        trial: optuna.Trial,
        store: Store,
        report: Report,
        folder: Path,
    ) -> None:
        self.setting, self.name, self.trial, self.store, self.report = (
            setting,
            name,
            trial,
            store,
            report,
        )
        self.at, self.file = of, folder / "progress.json"
        self.arm = arm
        self.dev = _problems(of.folder / "dev.jsonl")
        self.kept = Progress()
        if self.file.is_file():
            self.kept = Progress(**json.loads(self.file.read_text(encoding="utf-8")))
        known = trial.study.get_trials(deepcopy=False)[trial.number].intermediate_values
        for point in self.kept.points:  # those that a try was ended before it could tell
            _tell(point, trial, known)
        self.began = time.perf_counter() - self.kept.seconds
        self.saved = 0.0

    def result(self) -> dict[str, Any]:
        """How it ended, with everything that was seen and paid."""
        import optuna

        state: dict[str, Any] = {"state": "complete", "reason": None}
        ledger = Ledger()
        try:
            for seed in range(len(self.kept.ledgers), self.setting.sweep.seeds):
                ledger = Ledger()
                self._train(seed, ledger)
                self.kept.ledgers.append(ledger.summary())
                self.kept.spent = {}
                self._keep(None)
        except optuna.TrialPruned as error:
            state = {"state": "pruned", "reason": str(error)}
            self.kept.ledgers.append(ledger.summary())
        except (ValueError, torch.OutOfMemoryError) as error:
            state = {"state": "infeasible", "reason": str(error).splitlines()[0]}
            self.kept.ledgers.append(ledger.summary())
        ledgers = [Ledger.from_dict(each) for each in self.kept.ledgers]
        return {
            **state,
            "points": self.kept.points,
            "ledger": total(ledgers).summary(),
            "lost": self.kept.lost,
            "seconds": round(time.perf_counter() - self.began, 1),
            "arm": self.arm,
        }

    def _train(self, seed: int, ledger: Ledger) -> None:
        setting = scaled(self.setting, self.name, self.arm)
        data = setting.model_dump(mode="json")
        job = Job(data, self.name, seed, setting.data_seeds[0], self.at.folder, self.at.store)
        points = sorted(self.setting.sweep.points)
        first = True

        def heard(phase: str, done: int, total: int) -> None:
            nonlocal first
            if first:  # what the last try spent beyond its checkpoint was spent all the same
                first = False
                self._lose(ledger)
            self._keep(ledger)
            self.report(phase, done, total)

        def watch(trainer: Trainer) -> None:
            share = trainer.progress
            seen = [point["share"] for point in self.kept.points if point["seed"] == seed]
            due = [p for p in points if p <= share + 1e-9 and not any(s >= p for s in seen)]
            between = trainer.state.step == 0  # a stage has ended
            if share < 1 - 1e-9 and (due or (between and share not in seen)):
                trainer.student.model.eval()
                self._look(trainer.student, seed, due[-1] if due else share)
                trainer.student.model.train()

        if cell.recorded(job, setting):
            ledger.load(json.loads(job.run_file.read_text(encoding="utf-8"))["ledger"])
            student = cell.student_model(str(job.model_folder))
        else:
            student = cell.student_model(setting.student)
            cell.train(job, setting, student, self.store, heard, ledger=ledger, watch=watch)
        student.freeze()
        self._look(student, seed, 1.0)

    def _look(self, student: Any, seed: int, share: float) -> None:
        """Answer the dev problems, tell Optuna each outcome, and end the trial if it is surely not the best."""
        at = (seed, share)
        point = next((p for p in self.kept.points if (p["seed"], p["share"]) == at), None)
        if point is None:  # not seen by a try that was ended before it could go on
            outcomes = self._answer(student)
            value = float(np.mean(outcomes))
            point = {"seed": seed, "share": share, "value": value, "outcomes": outcomes}
            self.kept.points.append(point)
            self._keep(None)
            _tell(point, self.trial)
        last = share == 1 and seed == self.setting.sweep.seeds - 1
        if not last and self.trial.should_prune():
            import optuna

            where = f"at {100 * share:.0f} %" + (f" of seed {seed}" if seed else "")
            raise optuna.TrialPruned(f"{where}: {100 * point['value']:.1f} % of the dev problems")

    def _answer(self, student: Any) -> list[int]:
        """1 for each dev problem that the student solves, greedily, 0 for the others."""
        longest = self.setting.sampling.max_new_tokens
        sampling = Sampling(n=1, temperature=0.0, max_new_tokens=longest, seed=0)
        asked = [Request(problems.render(problem), problem) for problem in self.dev]
        answers = evaluation.respond(student, asked, sampling, self.store, self.report)
        verdicts = verifiers.verify_many(
            [(p, a[0].text, a[0].finished) for p, a in zip(self.dev, answers, strict=True)],
            opened=verifiers.opens_think(student),
        )
        return [int(verdict.correct) for verdict in verdicts]

    # -- what it cost ---------------------------------------------------------------------------

    def _lose(self, ledger: Ledger) -> None:
        for quantity, amount in self.kept.spent.items():
            if amount > ledger.spent[quantity]:
                lost = self.kept.lost.get(quantity, 0) + amount - ledger.spent[quantity]
                self.kept.lost[quantity] = lost
        self.kept.spent = {}

    def _keep(self, ledger: Ledger | None) -> None:
        """Write progress.json: at once, or for a ledger that grows step by step at most once a second."""
        now = time.perf_counter()
        if ledger is not None:
            self.kept.spent = dict(ledger.spent)
            if now - self.saved < 1:
                return
        self.saved, self.kept.seconds = now, round(now - self.began, 1)
        write_json(self.file, asdict(self.kept))


def scaled(setting: Experiment, name: str, arm: Mapping[str, Any]) -> Experiment:
    """The suite of one trial: the arm alone, under its name, on the sweep's share of every part of the budget."""
    whole = setting.model_copy(update={"methods": {**setting.methods, name: dict(arm)}})
    method, training, budget = cell.recipe(whole, name)
    data = setting.model_dump(mode="json")
    data |= {
        "budget": smaller(budget, setting.sweep.share).model_dump(),
        "training": training.model_dump(),
        "methods": {name: {"method": method.name, **method.model_dump(mode="json")}},
        "benchmarks": {},
        "reference": "base",
        "seeds": setting.sweep.seeds,
        "sweep": {},
    }
    return Experiment.model_validate(data)


def smaller(budget: Budget, share: float) -> Budget:
    """A share of a budget and of its caps; at least one of each."""
    part: dict[str, Any] = {
        name: None if amount is None else max(1, round(amount * share))
        for name, amount in (("steps", budget.steps), ("trained_tokens", budget.trained_tokens))
    }
    part["flops"] = None if budget.flops is None else budget.flops * share
    part["caps"] = {name: math.ceil(cap * share) for name, cap in budget.caps.items()}
    return Budget.model_validate(part)


def _tell(point: Mapping[str, Any], trial: optuna.Trial, known: Container[int] = ()) -> None:
    """Each outcome is an intermediate value; its step is the seed's, the share's and the problem's, so that pairs meet."""
    import optuna

    at = point["seed"] * 101 + round(100 * point["share"])
    values = {at: point["value"]}
    if isinstance(trial.study.pruner, optuna.pruners.WilcoxonPruner):
        outcomes = point["outcomes"]
        values = {at * len(outcomes) + place: outcome for place, outcome in enumerate(outcomes)}
    for step, value in values.items():
        if step not in known:
            trial.report(value, step)


def _told(result: Mapping[str, Any], trial: optuna.Trial) -> float:
    """End an Optuna trial as its result says; one whose params another has tried costs nothing more."""
    import optuna

    stored = trial.study.get_trials(deepcopy=False)[trial.number]
    again = result["number"] not in (trial.number, *study.history(stored))
    ledger = result["ledger"]
    if again:
        ledger = {**ledger, "spent": dict.fromkeys(QUANTITIES, 0)}
        for point in result["points"]:
            _tell(point, trial)
    ends = [p for p in result["points"] if p["share"] == 1]
    attributes = {
        "points": [{k: p[k] for k in ("seed", "share", "value")} for p in result["points"]],
        "ledger": ledger,
        "lost": {} if again else result["lost"],
        "seconds": 0.0 if again else result["seconds"],
        "reason": result["reason"],
        "same_as": result["number"] if again else None,
        "arm": result["arm"],
    }
    if ends:
        outcomes = np.mean([p["outcomes"] for p in ends], axis=0)
        attributes["ci95"] = [max(0.0, v) for v in statistics.estimate(outcomes).ci95]
    for key, value in attributes.items():
        trial.set_user_attr(key, value)
    if result["state"] == "infeasible":
        raise study.Infeasible(result["reason"])
    if result["state"] == "pruned":
        raise optuna.TrialPruned(result["reason"])
    return float(np.mean([p["value"] for p in ends]))


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
        if "run" not in attributes or not file.is_file():
            return {"ledger": None, "lost": {}}
        kept = Progress(**json.loads(file.read_text(encoding="utf-8")))
        ledger = total(map(Ledger.from_dict, kept.ledgers)).summary() if kept.ledgers else None
        lost = {
            name: kept.lost.get(name, 0) + kept.spent.get(name, 0)
            for name in QUANTITIES
            if kept.lost.get(name) or kept.spent.get(name)
        }
        return {"ledger": ledger, "lost": lost}


class Recording:
    """A display that also writes the record as trials end."""

    def __init__(self, display: Any, book: Book, track: bool) -> None:
        self.display, self.book, self.track, self.last = display, book, track, time.monotonic()

    def __call__(self, *event: Any) -> None:
        self.display(*event)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.display, name)

    def finish(self, name: str, note: str = "done") -> None:
        self.display.finish(name, note)
        if time.monotonic() - self.last > EVERY:
            self.book.show(self.track)
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


def _same(opened: optuna.Study, setting: Experiment, arm: Space, where: str) -> None:
    """Refuse to go on with a study of another space or setting."""
    now = {"space": arm.describe(), "setting": of(setting, arm.label)}
    was = opened.user_attrs.get("retort")
    if was is None:
        opened.set_user_attr("retort", now)
        return
    lines = changed(was, json.loads(json.dumps(now)))
    if lines:
        more = f" and {len(lines) - 4} more" if len(lines) > 4 else ""
        raise ValueError(
            f"the study {opened.study_name!r} in {where} was of another sweep: {'; '.join(lines[:4])}{more}. Say it as it "
            "was to go on, or give this sweep a name of its own (--set name=…)"
        )


def _problems(path: Path) -> list[Problem]:
    return [Problem(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
