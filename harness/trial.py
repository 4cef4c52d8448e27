"""One trial of a sweep: a student a seed at a share of the budget, judged on dev problems, taken up again where it was cut."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Container, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from harness import cell, evaluation, problems, statistics, study, verifiers
from harness.cell import Job, read_problems, write_json
from harness.config import Budget, Experiment
from harness.ledger import QUANTITIES, Ledger, total
from harness.space import of, space
from harness.store import Store, short_digest
from harness.trainer import Trainer
from harness.types import Problem, Request, Sampling

if TYPE_CHECKING:
    import optuna

NEAR = 0.05  # of the budget: the end of a stage this close to a point stands for it
Report = Callable[[str, int, int], None]  # phase, done, total


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
        all_of_it = [of(setting, self.label), read_data(setting, self.folder), params]
        name = f"{self.label}+{short_digest(all_of_it)[:8]}"
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
        write_json(path, {**result, "number": trial.number, "study": _identity(trial)})
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
        self.dev = read_problems(of.folder / "dev.jsonl")
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
            between = trainer.state.step == 0  # a stage has ended
            reach = share + (NEAR if between else 1e-9)
            due = [p for p in points if p <= reach and not any(s >= p for s in seen)]
            new = between and not any(abs(s - share) <= NEAR for s in seen)
            if share < 1 - 1e-9 and (due or new):
                trainer.student.model.eval()
                self._look(trainer.student, seed, due[-1] if due else share)
                trainer.student.model.train()

        if cell.recorded(job, setting):
            ledger.load(json.loads(job.run_file.read_text(encoding="utf-8"))["ledger"])
            student = cell.student_model(setting.student, saved=job.model_folder)
        else:
            fresh = cell.student_model(setting.student, seed)
            # To the bit what a trial that is taken up again finds.
            student = cell.train(job, setting, fresh, self.store, heard, ledger=ledger, watch=watch)
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
        if not last and surely_worse(point, self.trial):
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


def _reports(point: Mapping[str, Any], trial: optuna.Trial) -> dict[int, float]:
    """What Optuna is told of a look: with paired pruning each outcome, at a step of its seed, share and problem, so that pairs meet."""
    at = point["seed"] * 101 + round(100 * point["share"])
    if not _paired(trial):
        return {at: point["value"]}
    outcomes = point["outcomes"]
    return {at * len(outcomes) + place: outcome for place, outcome in enumerate(outcomes)}


def _paired(trial: optuna.Trial) -> bool:
    import optuna

    return isinstance(trial.study.pruner, optuna.pruners.WilcoxonPruner)


def _tell(point: Mapping[str, Any], trial: optuna.Trial, known: Container[int] = ()) -> None:
    for step, value in _reports(point, trial).items():
        if step not in known:
            trial.report(value, step)


def surely_worse(point: Mapping[str, Any], trial: optuna.Trial) -> bool:
    """Whether the pruner would end the trial; with paired outcomes by this look alone.

    A problem that was asked in several looks is not several pairs: pooled over 4 looks that resemble each other, Wilcoxon's test at
    0.1 ended 18 % of the trials that were as good as the best, and 5 % by one look (simulated, 200 problems).
    """
    if not _paired(trial):
        return trial.should_prune()
    stored = copy.copy(trial.study.get_trials(deepcopy=False)[trial.number])
    look = _reports(point, trial).keys()
    stored.intermediate_values = {s: v for s, v in stored.intermediate_values.items() if s in look}
    return trial.study.pruner.prune(trial.study, stored)


def _identity(trial: optuna.Trial) -> str:
    """Of the study: two in different storages may share a folder and a name."""
    return str(trial.study.user_attrs["id"])


def _told(result: Mapping[str, Any], trial: optuna.Trial) -> float:
    """End an Optuna trial as its result says; one whose params another has tried costs nothing more."""
    import optuna

    stored = trial.study.get_trials(deepcopy=False)[trial.number]
    mine = (trial.number, *study.history(stored))
    again = result["study"] != _identity(trial) or result["number"] not in mine
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


# -- what trials are of ------------------------------------------------------------------------


def dev_problems(setting: Experiment, folder: Path) -> dict[str, Any]:
    """Draw the dev problems, keep them in FOLDER/dev.jsonl, and count them by set.

    Equal parts of the training sets; none that overlaps a training problem or a benchmark; the same for every arm and trial.
    """
    path, record = folder / "dev.jsonl", folder / "dev.json"
    only = setting.sweep.objective.removeprefix("dev").removeprefix("/")
    sets = [only] if only else list(setting.problems)
    train = read_problems(folder / "problems.jsonl")
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
        # What a suite lets into its training is its own affair; tuning on a test problem never is.
        rule = setting.contamination.rule if setting.contamination.rule != "none" else "half"
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


def read_data(setting: Experiment, folder: Path) -> dict[str, str]:
    """Digests of what trials train on and are judged on: a file, a set, what overlaps it, or a model may change under its name."""
    specs = (setting.student, setting.teacher, *setting.models.values())
    return {
        "training problems": short_digest((folder / "problems.jsonl").read_text(encoding="utf-8")),
        "dev problems": short_digest((folder / "dev.jsonl").read_text(encoding="utf-8")),
        "models": short_digest([cell.fingerprint(spec) for spec in specs]),
    }
