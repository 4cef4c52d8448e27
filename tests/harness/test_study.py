"""A study: exactly N trials on a journal, sqlite and PostgreSQL, whoever is killed; what comes out of it; and every bad storage."""

from __future__ import annotations

import io
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from rich.console import Console

from harness import study as module
from harness.progress import Display
from harness.store import lock, release
from harness.study import Infeasible, Plan, Report, open_study, run

FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Unit:
    """One number between 0 and 1."""

    name: str = "x"

    def suggest(self, trial: optuna.trial.BaseTrial) -> dict[str, Any]:
        return {self.name: trial.suggest_float(self.name, 0.0, 1.0)}

    def grid(self, trials: int) -> dict[str, list[Any]]:
        return {self.name: [i / (trials - 1) for i in range(trials)]}

    def describe(self) -> dict[str, Any]:
        return {self.name: {"kind": "float", "low": 0.0, "high": 1.0}}


@dataclass
class Shown:
    """A display that keeps what it is shown."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.finished: list[tuple[str, str]] = []

    def __call__(self, *event: Any) -> None:
        self.events.append(event)

    def finish(self, name: str, note: str = "") -> None:
        self.finished.append((name, note))


def journal(tmp_path: Path, trials: int, **changes: Any) -> Plan:
    plan = Plan("quick/paced", str(tmp_path / "study.log"), trials, Unit(), sampler="random")
    return replace(plan, **changes)


def states(study: optuna.Study) -> list[str]:
    return [trial.state.name for trial in study.get_trials()]


def ended(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))


def identity(params: dict[str, Any], trial: optuna.Trial, report: Report) -> float:
    return params["x"]


# -- many workers, some killed ------------------------------------------------------------------


@dataclass(frozen=True)
class Steps:
    """Spends 8 to 15 units on a setting, keeps a checkpoint after each and a line for each in a log that all share.

    Its workers kill themselves when the log has so many lines: the first in the middle of a trial, with a checkpoint
    behind it and units before it; the others a random time later, wherever they are then.
    """

    folder: Path
    seconds: float
    kills: tuple[tuple[int, float], ...] = ()  # lines in the log, seconds after them

    def __call__(self, params: dict[str, Any], trial: optuna.Trial, report: Report) -> float:
        x = params["x"]
        checkpoint = self.folder / f"{x!r}.json"
        start = json.loads(checkpoint.read_text()) if checkpoint.exists() else 0
        for unit in range(start, self.units(x)):
            if unit == 6 and x > 0.75:  # before the unit: a retry may begin here
                raise optuna.TrialPruned
            time.sleep(self.seconds)
            with (self.folder / "units.log").open("a") as log:
                log.write(f"{x!r} {unit} {trial.number} {os.getpid()}\n")
            self.die(unit)
            partial = checkpoint.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps(unit + 1))
            os.replace(partial, checkpoint)
            trial.report(-abs(x - 0.3), unit)
            report("step", unit + 1, self.units(x))
        return -abs(x - 0.3)

    def die(self, unit: int) -> None:
        for nth, (lines, delay) in enumerate(self.kills):
            doomed = any(thread.name == "doom" for thread in threading.enumerate())
            if doomed or len(self.spent()) < lines or (nth == 0 and not 1 <= unit < 5):
                continue
            with suppress(FileExistsError):  # another's turn
                (self.folder / f"killed-{nth}").touch(exist_ok=False)
                doom = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL))
                doom.name, doom.daemon = "doom", True
                doom.start()
                if nth == 0:
                    doom.join()

    @staticmethod
    def units(x: float) -> int:
        return 8 + int(x * 8)

    def spent(self) -> list[tuple[float, int, int, int]]:
        """Setting, unit, trial, process of each unit in order."""
        path = self.folder / "units.log"
        rows = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        return [(float(x), int(unit), int(trial), int(pid)) for x, unit, trial, pid in rows]


def work_and_kill(
    plan: Plan, folder: Path, workers: int, kills: int, seed: int
) -> tuple[optuna.Study, Steps, str]:
    """Run the plan while workers die at random times, the first one in the middle of a trial."""
    folder.mkdir()
    rng = random.Random(seed)
    others = [(rng.randrange(2 * workers, 3 * plan.trials), rng.uniform(0, 0.2)) for _ in range(1, kills)]  # fmt: skip
    objective = Steps(folder, 0.04, ((2 * workers, 0.0), *others))  # a trial has 6 units or more
    said = io.StringIO()
    with Display(plan.trials, console=Console(file=said, width=120)) as display:
        study = run(plan, objective, workers, display)
    assert said.getvalue().count("was ended from outside (SIGKILL; out of memory?)") == kills
    return study, objective, said.getvalue()


def account(plan: Plan, study: optuna.Study, objective: Steps, kills: int) -> None:
    """Exactly N ended, nothing else is left, a killed trial went on where it was, and each unit that was spent is accounted for."""
    trials = study.get_trials()
    assert len(ended(study)) == plan.trials
    assert Counter(trial.state.name for trial in trials) == Counter(
        COMPLETE=sum(trial.state == TrialState.COMPLETE for trial in trials),
        PRUNED=sum(trial.state == TrialState.PRUNED for trial in trials),
        FAIL=len(trials) - plan.trials,
    )
    failed = {
        t.number for t in trials if t.state == TrialState.FAIL and "surplus" not in t.user_attrs
    }
    retried = {
        t.system_attrs["retry_history"][-1] for t in trials if "retry_history" in t.system_attrs
    }
    assert failed <= retried
    spent = objective.spent()
    due: set[tuple[float, int]] = set()
    for trial in ended(study):
        x = trial.params["x"]
        pruned = trial.state == TrialState.PRUNED
        assert pruned == (x > 0.75)
        due |= {(x, unit) for unit in range(6 if pruned else objective.units(x))}
    assert {row[:2] for row in spent} == due
    redone = [row for at, row in enumerate(spent) if row[:2] in {r[:2] for r in spent[:at]}]
    assert len(spent) == len(due) + len(redone)
    assert len(redone) <= kills  # at most the one unit between its log line and its checkpoint
    assert {row[2] for row in redone} <= {
        t.number for t in trials if "retry_history" in t.system_attrs
    }
    resumed = [
        t.number
        for t in ended(study)
        if "retry_history" in t.system_attrs
        and min((row[1] for row in spent if row[2] == t.number), default=1) > 0
        and any(row[2] in t.system_attrs["retry_history"] for row in spent)
    ]
    assert resumed, "no killed trial went on from its checkpoint"


@pytest.mark.slow
def test_eight_workers_three_killed_forty_trials(tmp_path: Path) -> None:
    plan = journal(tmp_path, 40, sampler="tpe")
    study, objective, said = work_and_kill(plan, tmp_path / "work", workers=8, kills=3, seed=5)
    account(plan, study, objective, kills=3)
    assert said.count("quick/paced/") >= 40 - 3 and "[40/40] " in said
    assert not [name for name in os.listdir(tmp_path / "study.log.leases") if name != "guard"]
    before = len(objective.spent())
    again = run(plan, objective, 8, Shown())  # the same N: nothing to do
    assert len(objective.spent()) == before and len(again.get_trials()) == len(study.get_trials())


def test_sqlite_with_a_heartbeat(tmp_path: Path) -> None:
    # SQLite's clock has whole seconds: with a heartbeat of 1, a second of silence could count as two.
    plan = journal(tmp_path, 10, storage=f"sqlite:///{tmp_path}/study.db", heartbeat=2)
    study, objective, _ = work_and_kill(plan, tmp_path / "work", workers=3, kills=1, seed=6)
    account(plan, study, objective, kills=1)


def test_sqlite_gives_a_waiting_trial_to_one_worker(tmp_path: Path) -> None:
    plan = journal(tmp_path, 60, storage=f"sqlite:///{tmp_path}/study.db")
    study = open_study(plan)
    for at in range(60):
        study.enqueue_trial({"x": at / 60})
    workers, taken = FORK.Barrier(4), FORK.SimpleQueue()

    def ask() -> None:
        mine = open_study(plan)
        workers.wait()
        taken.put([mine.ask().number for _ in range(15)])

    processes = [FORK.Process(target=ask) for _ in range(4)]
    for process in processes:
        process.start()
    numbers = [number for _ in processes for number in taken.get()]
    for process in processes:
        process.join()
    assert sorted(numbers) == list(range(60))


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """A PostgreSQL of our own, reached by a socket alone; Debian's cluster is left as it is."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    if not found:
        pytest.skip("no PostgreSQL binaries in /usr/lib/postgresql (apt-get install postgresql)")
    pytest.importorskip("psycopg")
    folder = Path(tempfile.mkdtemp(prefix="retort-pg-"))  # short: a socket's path has 107 bytes
    asroot = os.getuid() == 0
    if asroot:
        shutil.chown(folder, "postgres", "postgres")

    def call(*command: str) -> None:
        user = ["runuser", "-u", "postgres", "--"] if asroot else []
        line = [*user, str(found[-1].parent / command[0]), *command[1:]]
        subprocess.run(line, check=True, stdout=subprocess.DEVNULL, cwd=folder, timeout=120)

    data = str(folder / "data")
    try:
        call("initdb", "-D", data, "--auth=trust", "--username=postgres", "--no-sync")
        options = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off"
        call("pg_ctl", "-D", data, "-l", str(folder / "log"), "-w", "-o", options, "start")
        yield f"postgresql+psycopg://postgres@/postgres?host={folder}"
        call("pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_postgresql_with_a_heartbeat(tmp_path: Path, postgres: str) -> None:
    plan = journal(tmp_path, 12, storage=postgres, heartbeat=1)
    study, objective, _ = work_and_kill(plan, tmp_path / "work", workers=4, kills=2, seed=7)
    account(plan, study, objective, kills=2)


def test_machines_that_begin_at_once_share_one_study(tmp_path: Path, postgres: str) -> None:
    plan = journal(tmp_path, 9, storage=postgres, name="at once", first=({"x": 0.5},), heartbeat=1)
    machines = [FORK.Process(target=run, args=(plan, slowly, 1, Shown())) for _ in range(3)]
    for machine in machines:
        machine.start()
    for machine in machines:
        machine.join()
    assert [machine.exitcode for machine in machines] == [0, 0, 0]
    study = open_study(plan)
    assert len(ended(study)) == 9 and not study.get_trials(
        states=(TrialState.RUNNING, TrialState.WAITING)
    )
    settings = Counter(trial.params["x"] for trial in ended(study))
    assert len(settings) == 9 and settings[0.5] == 1  # nobody proposed what another did


def slowly(params: dict[str, Any], trial: optuna.Trial, report: Report) -> float:
    time.sleep(0.1)
    return params["x"]


@dataclass(frozen=True)
class Fatal:
    """Kills its process once, at a point of the work that has no unit of the objective in it."""

    flag: Path
    name: str = "x"

    def suggest(self, trial: optuna.trial.BaseTrial) -> dict[str, Any]:
        x = trial.suggest_float("x", 0.0, 1.0)
        if not self.flag.exists():
            self.flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {"x": x}

    def grid(self, trials: int) -> dict[str, list[Any]]:
        return {}

    def describe(self) -> dict[str, Any]:
        return {"x": {}}


def in_a_fork(plan: Plan, objective: Any, workers: int = 1) -> int:
    process = FORK.Process(target=run, args=(plan, objective, workers, Shown()))
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def test_killed_while_it_holds_the_guard_and_a_fresh_lease(tmp_path: Path) -> None:
    plan = journal(tmp_path, 3, space=Fatal(tmp_path / "flag"))
    assert in_a_fork(plan, identity) == -signal.SIGKILL
    assert states(open_study(plan)) == ["RUNNING"]
    study = run(plan, identity, 1, Shown())
    assert states(study) == ["FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]
    assert study.trials[1].params == study.trials[0].params


def test_a_journal_goes_on_after_a_kill_inside_a_write(tmp_path: Path) -> None:
    plan = journal(tmp_path, 3)
    run(plan, identity, 1, Shown())

    def die() -> None:
        held = module._JournalLock(Path(plan.storage))
        held.acquire()
        with open(plan.storage, "a") as file:
            file.write('{"op_code":4,"worker')
        os.kill(os.getpid(), signal.SIGKILL)

    process = FORK.Process(target=die)
    process.start()
    process.join()
    study = run(replace(plan, trials=5), identity, 1, Shown())  # the lock fell, the stump is cut
    assert states(study) == ["COMPLETE"] * 5
    assert states(open_study(plan)) == ["COMPLETE"] * 5


def test_every_worker_killed(tmp_path: Path) -> None:
    plan = journal(tmp_path, 4)
    with pytest.raises(
        ValueError, match=r"every worker .* with 4 of 4 trials left; .* same command"
    ):
        run(plan, suicide, 2, Shown())
    study = run(plan, identity, 1, Shown())
    assert len(ended(study)) == 4 and states(study).count("FAIL") == 2


def suicide(params: dict[str, Any], trial: optuna.Trial, report: Report) -> float:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0.0


def test_an_error_of_one_worker_stops_the_others(tmp_path: Path) -> None:
    plan = journal(tmp_path, 6)
    with pytest.raises(ValueError, match=r"^too large by 3$"):
        run(plan, refuse_or_wait, 2, Shown())
    assert not multiprocessing.active_children()
    trials = open_study(plan).get_trials()  # the other one was asked to end, not killed
    assert [(t.state.name, t.user_attrs["stopped"]) for t in trials] == [("FAIL", 0), ("FAIL", 1)]
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*KeyError: 'y'"):
        run(replace(plan, name="other"), lookup, 2, Shown())


def refuse_or_wait(params: dict[str, Any], trial: optuna.Trial, report: Report) -> float:
    if trial.number == 1:
        raise ValueError("too large by 3")
    time.sleep(60)
    return 0.0


def lookup(params: dict[str, Any], trial: optuna.Trial, report: Report) -> float:
    return params["y"]


@dataclass(frozen=True)
class Held(Steps):
    """Its trials stop in their middle until somebody lets them go on."""

    def die(self, unit: int) -> None:
        while unit == 3 and not (self.folder / "go").exists():
            time.sleep(0.02)


def test_ctrl_c_loses_nothing(tmp_path: Path) -> None:
    plan = journal(tmp_path, 4)
    objective = Held(tmp_path, 0.05)
    process = FORK.Process(target=run, args=(plan, objective, 2, Shown()))
    process.start()
    while [row[1] for row in objective.spent()].count(3) < 2:
        assert process.is_alive()
        time.sleep(0.02)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(30)
    assert process.exitcode == 1  # KeyboardInterrupt
    study = open_study(plan)
    assert states(study) == ["FAIL", "FAIL"]
    assert all(t.user_attrs["stopped"] == t.number for t in study.trials)
    (tmp_path / "go").touch()
    study = run(plan, objective, 1, Shown())
    account(plan, study, objective, kills=2)


# -- one worker ---------------------------------------------------------------------------------


def test_n_is_over_all_runs(tmp_path: Path) -> None:
    plan = journal(tmp_path, 3, first=({"x": 0.25}, {"x": 0.75}))
    display = Shown()
    study = run(plan, identity, 1, display)
    assert states(study) == ["COMPLETE"] * 3 and study.direction.name == "MAXIMIZE"
    assert [t.params["x"] for t in study.trials][:2] == [0.25, 0.75]
    assert display.finished[:2] == [("quick/paced/0", "0.25"), ("quick/paced/1", "0.75")]
    run(plan, identity, 1, display)
    assert len(display.finished) == 3
    study = run(replace(plan, trials=5), identity, 1, display)
    assert states(study) == ["COMPLETE"] * 5 and len(display.finished) == 5
    assert len({t.params["x"] for t in study.trials}) == 5
    assert len(run(replace(plan, trials=2), identity, 1, display).trials) == 5


def test_first_settings_wait_for_their_room(tmp_path: Path) -> None:
    plan = journal(tmp_path, 1, first=({"x": 0.25}, {"x": 0.75}))
    assert [t.params["x"] for t in run(plan, identity, 1, Shown()).trials] == [0.25]
    study = run(replace(plan, trials=2), identity, 1, Shown())
    assert [t.params["x"] for t in study.trials] == [0.25, 0.75]


def test_a_first_setting_that_two_machines_queued_counts_once(tmp_path: Path) -> None:
    plan = journal(tmp_path, 2, first=({"x": 0.25},))
    study = open_study(plan)
    for _ in range(2):
        study.enqueue_trial({"x": 0.25}, user_attrs={"first": 0})
    study = run(plan, identity, 1, Shown())
    assert states(study) == ["COMPLETE", "FAIL", "COMPLETE"]
    assert [t.params.get("x") == 0.25 for t in study.trials] == [True, False, False]


def test_two_studies_share_a_journal(tmp_path: Path) -> None:
    one, two = journal(tmp_path, 2), journal(tmp_path, 3, name="quick/sft")
    values = [[t.value for t in run(plan, identity, 1, Shown()).trials] for plan in (one, two)]
    assert [len(v) for v in values] == [2, 3] and values[0][0] != values[1][0]


def test_infeasible_and_pruned_count_with_their_reason(tmp_path: Path) -> None:
    def objective(params: dict[str, Any], trial: optuna.Trial, report: Report) -> float:
        if trial.number == 0:
            raise Infeasible("batch 64 > 32 problems")
        if trial.number == 1:
            raise optuna.TrialPruned("at 50 %")
        return math.nan if trial.number == 2 else 0.5

    display = Shown()
    study = run(journal(tmp_path, 4), objective, 1, display)
    assert states(study) == ["PRUNED", "PRUNED", "PRUNED", "COMPLETE"]
    reasons = [t.user_attrs.get("reason") for t in study.trials]
    assert reasons == ["batch 64 > 32 problems", "at 50 %", "its value is nan", None]
    assert [note for _, note in display.finished] == [
        "infeasible: batch 64 > 32 problems",
        "pruned: at 50 %",
        "infeasible: its value is nan",
        "0.5",
    ]


@pytest.mark.parametrize("error", [KeyError("boom"), KeyboardInterrupt()])
def test_a_failed_trial_is_retried_when_the_sweep_goes_on(
    tmp_path: Path, error: BaseException
) -> None:
    seen: list[tuple[int, float]] = []

    def objective(params: dict[str, Any], trial: optuna.Trial, report: Report) -> float:
        seen.append((trial.number, params["x"]))
        if len(seen) == 2:
            trial.report(0.125, 7)
            raise error
        return params["x"]

    plan = journal(tmp_path, 3)
    with pytest.raises(type(error)):
        run(plan, objective, 1, Shown())
    assert states(open_study(plan)) == ["COMPLETE", "FAIL"]
    display = Shown()
    study = run(plan, objective, 1, display)
    assert states(study) == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert seen[2] == (2, seen[1][1]) and study.trials[2].intermediate_values == {7: 0.125}
    assert [name for name, _ in display.finished] == ["quick/paced/1", "quick/paced/3"]


def test_a_trial_that_ends_three_workers_is_given_up(tmp_path: Path) -> None:
    plan = journal(tmp_path, 2, first=({"x": 0.25},))
    for deaths in range(1, 4):
        assert in_a_fork(plan, suicide) == -signal.SIGKILL
        assert states(open_study(plan)) == ["FAIL"] * (deaths - 1) + ["RUNNING"]
    ran: list[float] = []

    def objective(params: dict[str, Any], trial: optuna.Trial, report: Report) -> float:
        ran.append(params["x"])
        return 1.0

    study = run(plan, objective, 1, Shown())
    assert states(study) == ["FAIL", "FAIL", "FAIL", "PRUNED", "COMPLETE"]
    assert study.trials[3].user_attrs["reason"] == "its worker was ended 3 times (out of memory?)"
    assert len(ran) == 1 and ran != [0.25]


def test_ctrl_c_is_no_death(tmp_path: Path) -> None:
    plan, calls = journal(tmp_path, 1), Counter[str]()

    def objective(params: dict[str, Any], trial: optuna.Trial, report: Report) -> float:
        calls["n"] += 1
        if calls["n"] <= 4:
            raise KeyboardInterrupt
        return 1.0

    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            run(plan, objective, 1, Shown())
    assert states(run(plan, objective, 1, Shown())) == ["FAIL"] * 4 + ["COMPLETE"]


def test_a_trial_beyond_n_is_surplus_until_n_grows(tmp_path: Path) -> None:
    plan = journal(tmp_path, 2, storage=f"sqlite:///{tmp_path}/study.db", heartbeat=1)
    study = open_study(plan)

    def race(params: dict[str, Any], trial: optuna.Trial, report: Report) -> float:
        if trial.number == 1:  # another machine asked in the same moment
            worker = module._Worker(plan, identity, study, lambda *sent: None)
            worker._attempt()
        return params["x"]

    study = run(plan, race, 1, Shown())
    assert states(study) == ["COMPLETE", "COMPLETE", "FAIL"]
    assert study.trials[2].user_attrs["surplus"] is True and not study.trials[2].params
    assert states(run(plan, identity, 1, Shown())) == states(study)
    study = run(replace(plan, trials=3), identity, 1, Shown())
    assert states(study) == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE"]
    assert "surplus" not in study.trials[3].user_attrs


def test_a_worker_that_died_over_a_surplus_trial_leaves_nothing_running(tmp_path: Path) -> None:
    plan = journal(tmp_path, 1, storage=f"sqlite:///{tmp_path}/study.db", heartbeat=1)

    def objective(params: dict[str, Any], trial: optuna.Trial, report: Report) -> float:
        if trial.number == 0:
            with pytest.warns(UserWarning, match="Heartbeat of storage"):
                open_study(plan).ask()  # another machine, killed before it looked
        return params["x"]

    assert states(run(plan, objective, 1, Shown())) == ["COMPLETE", "FAIL"]


def test_of_two_retries_of_one_trial_one_counts(tmp_path: Path) -> None:
    plan = journal(tmp_path, 2)
    study = open_study(plan)
    study.tell(
        study.ask({"x": optuna.distributions.FloatDistribution(0, 1)}), state=TrialState.FAIL
    )
    with module._quiet():
        for _ in range(2):  # two machines at once
            module._retry(study, study.trials[0])
    study = run(plan, identity, 1, Shown())
    assert states(study) == ["FAIL", "COMPLETE", "FAIL", "COMPLETE"]
    assert study.trials[1].params == study.trials[0].params != study.trials[3].params
    assert study.trials[2].user_attrs == {"surplus": True}


def test_a_trial_that_never_had_a_heartbeat_is_retried(tmp_path: Path) -> None:
    plan = journal(tmp_path, 2, storage=f"sqlite:///{tmp_path}/study.db", heartbeat=1)
    with module._quiet(), pytest.warns(UserWarning, match="Heartbeat of storage"):
        open_study(plan).ask()  # killed between asking and the first heartbeat
    assert states(run(plan, identity, 1, Shown())) == ["FAIL", "COMPLETE", "COMPLETE"]


def test_a_worker_that_was_held_for_dead_leaves_its_trial_to_others(tmp_path: Path) -> None:
    plan = journal(tmp_path, 2, storage=f"sqlite:///{tmp_path}/study.db", heartbeat=5)

    def objective(params: dict[str, Any], trial: optuna.Trial, report: Report) -> float:
        if trial.number == 0:  # asleep for long; meanwhile:
            trial.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        return params["x"]

    display = Shown()
    study = run(plan, objective, 1, display)
    assert states(study) == ["FAIL", "COMPLETE", "COMPLETE"] and len(display.finished) == 2
    assert study.trials[1].params == study.trials[0].params


def test_the_last_trial_of_a_database_is_taken_up_too(tmp_path: Path) -> None:
    plan = journal(tmp_path, 1, storage=f"sqlite:///{tmp_path}/study.db", heartbeat=1)
    assert in_a_fork(plan, suicide) == -signal.SIGKILL
    assert states(run(plan, identity, 1, Shown())) == ["FAIL", "COMPLETE"]


def test_the_guard_is_held_until_the_trial_has_its_lease(tmp_path: Path) -> None:
    folder = tmp_path / "study.log.leases"

    class Looks(Unit):
        def suggest(self, trial: optuna.trial.BaseTrial) -> dict[str, Any]:
            assert lock(folder / "guard", wait=False) is None
            assert lock(folder / "0", wait=False) is None
            return super().suggest(trial)

    def objective(params: dict[str, Any], trial: optuna.Trial, report: Report) -> float:
        free = lock(folder / "guard", wait=False)
        assert free is not None and lock(folder / "0", wait=False) is None
        release(free)
        return 1.0

    assert states(run(journal(tmp_path, 1, space=Looks()), objective, 1, Shown())) == ["COMPLETE"]


def test_a_live_lease_is_respected(tmp_path: Path) -> None:
    plan = journal(tmp_path, 1)
    study = open_study(plan)
    trial = study.ask()
    claims = module._Leases(Path(plan.storage))
    claims.take(trial)
    path = tmp_path / "study.log.leases" / "0"
    assert f"quick/paced, trial 0: process {os.getpid()} on" in path.read_text()
    other = module._Leases(Path(plan.storage))
    other.reap(study)
    assert states(study) == ["RUNNING"]
    claims.drop()
    other.reap(study)
    assert states(study) == ["FAIL"] and not path.exists()


# -- samplers and pruners -----------------------------------------------------------------------


@dataclass(frozen=True)
class Mixed:
    """A choice, a log float, and an int or a float that depends on the choice."""

    def suggest(self, trial: optuna.trial.BaseTrial) -> dict[str, Any]:
        kind = trial.suggest_categorical("kind", ["forward", "reverse"])
        params = {"kind": kind, "rate": trial.suggest_float("rate", 1e-4, 1.0, log=True)}
        if kind == "forward":
            return {**params, "share": trial.suggest_float("share", 0.0, 1.0)}
        return {**params, "rollouts": trial.suggest_int("rollouts", 1, 16)}

    def grid(self, trials: int) -> dict[str, list[Any]]:
        return {
            "kind": ["forward", "reverse"],
            "rate": [1e-4, 1e-2],
            "share": [0.5],
            "rollouts": [3],
        }

    def describe(self) -> dict[str, Any]:
        return {"kind": ["forward", "reverse"], "rate": [1e-4, 1.0]}


def peak(params: dict[str, Any], trial: optuna.Trial, report: Report) -> float:
    """Between 0 and 1; 1 at forward, 3e-2, 0.7."""
    off = (math.log10(params["rate"]) - math.log10(3e-2)) / 4
    if params["kind"] == "forward":
        return 1 / (1 + 16 * off**2 + 4 * (params["share"] - 0.7) ** 2)
    return 0.6 / (1 + 16 * off**2 + 4 * ((params["rollouts"] - 5) / 16) ** 2)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_tpe_finds_a_known_optimum_within_5_percent(tmp_path: Path, seed: int) -> None:
    plan = journal(tmp_path, 60, space=Mixed(), sampler="tpe", seed=seed)
    best = run(plan, peak, 1, Shown()).best_trial
    assert best.params["kind"] == "forward" and best.value is not None and best.value >= 0.95


@pytest.mark.parametrize("sampler", ["tpe", "random", "qmc"])
def test_seeds_decide_what_one_worker_tries(tmp_path: Path, sampler: str) -> None:
    def tried(folder: str, seed: int) -> list[dict[str, Any]]:
        plan = journal(tmp_path / folder, 8, space=Mixed(), sampler=sampler, seed=seed)
        run(replace(plan, trials=5), peak, 1, Shown())  # in two runs
        return [t.params for t in run(plan, peak, 1, Shown()).trials]

    first = tried("a", 0)
    assert first == tried("b", 0) != tried("c", 1)
    assert len({json.dumps(params) for params in first}) == 8


def test_the_grid_is_gone_through_once(tmp_path: Path) -> None:
    plan = journal(tmp_path, 5, sampler="grid", first=({"x": 0.1},))
    study = run(plan, identity, 1, Shown())
    assert sorted(t.params["x"] for t in study.trials) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert states(run(replace(plan, space=Mixed(), name="m"), peak, 1, Shown())) == ["COMPLETE"] * 5


@pytest.mark.parametrize("pruner", ["wilcoxon", "none"])
def test_wilcoxon_prunes_the_clearly_worse_on_outcomes_of_problems(
    tmp_path: Path, pruner: str
) -> None:
    right = {  # of 60 problems: 48 right; 18 right; 48 right, others
        0: [i % 5 != 0 for i in range(60)],
        1: [i % 10 < 3 for i in range(60)],
        2: [i % 5 != 2 for i in range(60)],
    }

    def objective(params: dict[str, Any], trial: optuna.Trial, report: Report) -> float:
        outcomes = right[trial.number]
        for problem, correct in enumerate(outcomes):
            trial.report(float(correct), problem)
            if problem % 10 == 9 and trial.should_prune():
                raise optuna.TrialPruned(f"after {problem + 1} problems")
        return sum(outcomes) / 60

    study = run(journal(tmp_path, 3, pruner=pruner), objective, 1, Shown())
    if pruner == "none":
        assert states(study) == ["COMPLETE"] * 3
    else:
        assert states(study) == ["COMPLETE", "PRUNED", "COMPLETE"]
        assert study.trials[1].user_attrs["reason"] == "after 20 problems"  # no earlier look


@pytest.mark.parametrize("pruner", ["median", "halving"])
def test_the_other_pruners_prune_too(tmp_path: Path, pruner: str) -> None:
    def objective(params: dict[str, Any], trial: optuna.Trial, report: Report) -> float:
        value = 0.1 if trial.number == 7 else 0.9 + trial.number / 100
        for step in range(1, 9):
            trial.report(value, step)
            if trial.should_prune():
                raise optuna.TrialPruned
        return value

    study = run(journal(tmp_path, 8, pruner=pruner), objective, 1, Shown())
    assert study.trials[7].state.name == "PRUNED" and study.trials[6].state.name == "COMPLETE"


# -- bad input ----------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def a_folder(tmp_path: Path) -> str:
    return str(tmp_path)


def under_a_file(tmp_path: Path) -> str:
    (tmp_path / "file").write_text("")
    return str(tmp_path / "file" / "study.log")


def another_file(tmp_path: Path) -> str:
    (tmp_path / "notes.txt").write_text("not to be cut off")
    return str(tmp_path / "notes.txt")


def damaged(tmp_path: Path) -> str:
    path = tmp_path / "study.log"
    path.write_text('{"op_code":0,"worker_id\n{"op_code":0}\n')
    return str(path)


def not_a_database(tmp_path: Path) -> str:
    (tmp_path / "x.db").write_text("no database " * 100)
    return f"sqlite:///{tmp_path}/x.db"


@pytest.mark.parametrize(
    ("storage", "says"),
    [
        (a_folder, "Is a directory"),
        (under_a_file, r"Not a directory|File exists"),
        (another_file, "is not the journal of a study"),
        (damaged, "damaged"),
        (not_a_database, "file is not a database"),
        (lambda p: f"sqlite:///{p}/missing/study.db", "unable to open database file"),
        (lambda p: "sqlite://", "in memory"),
        (lambda p: "sqlite:///:memory:", "in memory"),
        (lambda p: "postgres+nothing://me:secret@host/db", "no dialect 'postgres"),
        (lambda p: "mysql+mysqldb://me:secret@127.0.0.1/db", "MySQLdb.*install it with pip"),
        (lambda p: f"postgresql+psycopg://me:secret@127.0.0.1:{free_port()}/db", "refused"),
        (lambda p: "postgresql+psycopg://me:secret@127.0.0.1:port/db", "no URL of the form"),
        (lambda p: "://secret", "no URL of the form"),
    ],
)
def test_a_storage_that_cannot_be_used_is_one_line(
    tmp_path: Path, storage: Callable[[Path], str], says: str
) -> None:
    plan = journal(tmp_path, 2, storage=storage(tmp_path))
    with pytest.raises(ValueError, match=says) as caught:
        run(plan, identity, 1, Shown())
    line = str(caught.value)
    assert "\n" not in line and "--storage" in line and "secret" not in line
    notes = tmp_path / "notes.txt"
    assert not notes.exists() or notes.read_text() == "not to be cut off"


def test_a_login_that_the_server_refuses(tmp_path: Path, postgres: str) -> None:
    plan = journal(
        tmp_path, 2, storage=postgres.replace("postgres@/postgres", "me:secret@/nowhere")
    )
    with pytest.raises(ValueError, match=r'(role|database) ".*" does not exist') as caught:
        open_study(plan)
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sampler": "tpee"}, "unknown sampler 'tpee': did you mean 'tpe'\\? known: grid, qmc"),
        ({"pruner": "wilcox"}, "unknown pruner 'wilcox': did you mean 'wilcoxon'\\?"),
        ({"trials": 0}, "at least 1"),
    ],
)
def test_unknown_parts(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        open_study(journal(tmp_path, **{"trials": 2, **changes}))
    assert not (tmp_path / "study.log").exists()


def test_optuna_is_silent_and_left_as_it_was(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, capfd: pytest.CaptureFixture[str]
) -> None:
    before = optuna.logging.get_verbosity()
    assert before == optuna.logging.INFO

    def objective(params: dict[str, Any], trial: optuna.Trial, report: Report) -> float:
        assert optuna.logging.get_verbosity() == optuna.logging.ERROR
        return params["x"]

    for sampler in ("tpe", "qmc", "grid"):
        run(journal(tmp_path / sampler, 6, sampler=sampler), objective, 1, Shown())
    assert optuna.logging.get_verbosity() == before and not recwarn.list
    assert capfd.readouterr().err == ""


def test_importing_the_module_loads_no_optuna() -> None:
    code = "import harness.study, sys; print('optuna' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
