"""An Optuna study that many processes work on: exactly N trials, whoever dies.

A trial that counts is a *line*: a first try and, where that one failed, its retry, and so on. The first N lines in order of their
first tries are the study's; each is tried until it ends COMPLETE or PRUNED. Trials get their numbers in the order in which they are
stored, and whoever sees one sees all lower ones: so every worker, at any time and on any machine, agrees on which lines are the
first N. That is why exactly N end without a lock over machines. A trial outside them was asked for in a race: it is told FAIL.

Whether a RUNNING trial still has a worker is told by a locked file (a journal) or by Optuna's heartbeat (a database).
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, cast

from harness.config import nearest
from harness.progress import end_with_parent, throttled
from harness.store import lock, release

if TYPE_CHECKING:
    import optuna
    import sqlalchemy
    from optuna.trial import FrozenTrial

Report = Callable[[str, int, int], None]  # phase, done, total
Objective = Callable[[dict[str, Any], "optuna.Trial", Report], float]  # maximised
Send = Callable[[str, tuple[Any, ...]], None]  # "event" or "finish", and what the display gets

SAMPLERS = ("tpe", "random", "qmc", "grid")
PRUNERS = ("wilcoxon", "median", "halving", "none")
TRIES = 3  # so many workers may die of one trial
HEAD = b'{"op_code":'  # how a journal begins


class Infeasible(Exception):
    """A setting that cannot run: the trial counts, as PRUNED, with the reason."""


class Space(Protocol):
    """What a study needs of a search space; picklable."""

    def suggest(self, trial: optuna.trial.BaseTrial) -> dict[str, Any]:
        """Ask the trial for a setting."""

    def grid(self, trials: int) -> dict[str, list[Any]]:
        """The values of each parameter for the grid sampler."""


@dataclass(frozen=True)
class Plan:
    """What a study is; it travels to the workers."""

    name: str  # e.g. "quickstart/paced"
    storage: str  # a path to a journal file, or an RDB URL
    trials: int  # over all workers, runs and machines
    space: Space
    sampler: str = "tpe"
    pruner: str = "wilcoxon"
    first: tuple[dict[str, Any], ...] = ()  # settings tried first; not for the grid
    seed: int = 0
    heartbeat: int = 60  # seconds, of a database; silent for twice as long = dead


class _Surplus(Exception):
    """This trial is not among the first N."""


# -- opening ------------------------------------------------------------------------------------


def open_study(plan: Plan) -> optuna.Study:
    """Create or load the study."""
    import optuna

    for name, known, what in (
        (plan.sampler, SAMPLERS, "sampler"),
        (plan.pruner, PRUNERS, "pruner"),
    ):
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}: {nearest(name, known)}")
    if plan.trials < 1 or plan.heartbeat < 1:
        raise ValueError(
            f"trials and heartbeat are at least 1, not {plan.trials} and {plan.heartbeat}"
        )

    with _quiet():
        sampler, pruner = _sampler(plan, 0), _pruner(plan)

        def create(storage: optuna.storages.BaseStorage) -> optuna.Study:
            return optuna.create_study(
                study_name=plan.name,
                storage=storage,
                direction="maximize",
                load_if_exists=True,
                sampler=sampler,
                pruner=pruner,
            )

        study = (_open_database if "://" in plan.storage else _open_journal)(plan, create)
    return study


def _open_journal(
    plan: Plan, create: Callable[[optuna.storages.BaseStorage], optuna.Study]
) -> optuna.Study:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    path = Path(plan.storage)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            with path.open("rb") as file:
                head = file.read(len(HEAD))
            if not HEAD.startswith(head):
                raise ValueError(
                    f"{path} is not the journal of a study: give another path to --storage, "
                    f"or a database as a URL (sqlite:///{path.name})"
                )
        backend = JournalFileBackend(str(path), lock_obj=cast(Any, _JournalLock(path)))
        return create(JournalStorage(backend))
    except OSError as error:
        raise ValueError(
            f"cannot use {path} as the journal of a study: {error.strerror}; give another path to --storage"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: the journal of the study is damaged ({error}); give another path to --storage"
        ) from None


class _JournalLock:
    """The journal's own lock, around every line that is appended: flock on the journal itself.

    Optuna's symlink and open locks stay behind when their holder is killed, and then every other process waits for 30 seconds; this
    one falls with its process. A kill can also cut a line short, and the next line appended to it would make the journal
    unreadable for ever: so the stump is cut off first. Nobody has read it, as readers wait for the end of a line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.held: int | None = None

    def acquire(self) -> bool:
        self.held = lock(self.path, wait=True)
        assert self.held is not None
        size = os.fstat(self.held).st_size
        if size and os.pread(self.held, 1, size - 1) != b"\n":
            os.ftruncate(self.held, self.path.read_bytes().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        if self.held is not None:
            release(self.held)
            self.held = None


def _open_database(
    plan: Plan, create: Callable[[optuna.storages.BaseStorage], optuna.Study]
) -> optuna.Study:
    import sqlalchemy
    from optuna.exceptions import StorageInternalError
    from optuna.storages import RDBStorage
    from sqlalchemy.exc import (
        IntegrityError,
        NoSuchModuleError,
        OperationalError,
        ProgrammingError,
        SQLAlchemyError,
    )

    def refuse(why: object) -> NoReturn:
        raise ValueError(
            f"cannot use {shown} as the storage of a study: {str(why).strip().splitlines()[0]}; "
            "give a path (a journal) or the URL of a database that runs to --storage"
        ) from None

    shown = plan.storage.partition("://")[0] + "://…"
    try:
        url = sqlalchemy.make_url(plan.storage)
    except (SQLAlchemyError, ValueError):
        refuse("this is no URL of the form dialect://user:password@host:port/database")
    shown = url.render_as_string(hide_password=True)
    dialect = url.get_backend_name()
    if dialect == "sqlite" and url.database in (None, "", ":memory:"):
        refuse("a database in memory is not shared and ends with its process")
    # A server that does not answer would otherwise be waited for for minutes; a database file is locked for moments by each worker.
    patience = {"sqlite": {"timeout": 60}}.get(dialect, {"connect_timeout": 10})
    for last in (False, False, False, True):
        try:
            storage = RDBStorage(
                plan.storage,
                engine_kwargs={"pool_pre_ping": True, "connect_args": patience},
                heartbeat_interval=plan.heartbeat,
                grace_period=2 * plan.heartbeat,
            )
            if dialect == "sqlite":
                _one_at_a_time(storage.engine)
            return create(storage)
        except NoSuchModuleError:
            refuse(f"SQLAlchemy knows no dialect {url.drivername!r}")
        except ImportError as error:
            cause = error.__cause__ or error
            refuse(f"{cause} (the driver of {url.drivername}: install it with pip)")
        except (IntegrityError, ProgrammingError, StorageInternalError, OperationalError) as error:
            inner = error.__cause__ if isinstance(error, StorageInternalError) else error
            # Two machines that begin at once both create the tables; the second try finds them.
            if last or not _created_meanwhile(inner):
                refuse(getattr(inner, "orig", None) or inner)
            time.sleep(0.5)
        except (SQLAlchemyError, RuntimeError) as error:
            refuse(getattr(error, "orig", None) or error)
    raise AssertionError("unreachable")


def _one_at_a_time(engine: sqlalchemy.Engine) -> None:
    """Lock the file from the first read of a transaction on.

    Optuna reads a trial FOR UPDATE before it takes it. SQLite has no such clause, so two workers that read WAITING at once would
    both take the trial.
    """
    from sqlalchemy import event

    def own(connection: Any, record: object) -> None:
        # or the driver begins by itself, later and without the lock
        connection.isolation_level = None

    def begin(connection: sqlalchemy.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    event.listen(engine, "connect", own)
    event.listen(engine, "begin", begin)
    engine.dispose()  # connections of before


def _created_meanwhile(error: BaseException | None) -> bool:
    return any(word in str(error) for word in ("already exists", "UNIQUE constraint", "duplicate"))


def shown(plan: Plan) -> str:
    """Where a study lies, without its password."""
    if "://" not in plan.storage:
        return plan.storage
    import sqlalchemy

    return sqlalchemy.make_url(plan.storage).render_as_string(hide_password=True)


def _sampler(plan: Plan, place: int) -> optuna.samplers.BaseSampler:
    """The sampler of one line: its seed is a function of the line's place, so no two workers propose the same, and no death changes it."""
    from optuna import samplers

    seed, common = _seed(plan.seed, plan.name, place), _seed(plan.seed, plan.name)
    if plan.sampler == "tpe":
        startup = max(4, min(10, plan.trials // 4))
        return samplers.TPESampler(
            multivariate=True, group=True, n_startup_trials=startup, seed=seed
        )
    if plan.sampler == "random":
        return samplers.RandomSampler(seed=seed)
    if plan.sampler == "qmc":  # all take points of one sequence
        return samplers.QMCSampler(
            scramble=True,
            seed=common,
            independent_sampler=samplers.RandomSampler(seed=seed),
            warn_independent_sampling=False,
        )
    return samplers.GridSampler(plan.space.grid(plan.trials), seed=common)


def _seed(*parts: object) -> int:
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big")


def _pruner(plan: Plan) -> optuna.pruners.BasePruner:
    from optuna import pruners

    if plan.pruner == "wilcoxon":
        return pruners.WilcoxonPruner(p_threshold=0.1, n_startup_steps=20)
    if plan.pruner == "median":
        return pruners.MedianPruner()
    if plan.pruner == "halving":
        return pruners.SuccessiveHalvingPruner()
    return pruners.NopPruner()


@contextmanager
def _quiet() -> Iterator[None]:
    """Optuna's own log and its warnings about experimental parts are not for the user of a sweep."""
    import optuna

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            # A retry reports again what its checkpoint already had.
            warnings.filterwarnings("ignore", message="The reported value is ignored")
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)


# -- who is alive -------------------------------------------------------------------------------


class _Leases:
    """A journal's: a locked file for each RUNNING trial, and one guard around asking for the next.

    The guard is held from the look for dead workers until the next trial has its lease, so a RUNNING trial without a locked lease
    has no worker: it was killed while it ran, or between asking and locking.
    """

    poll = 0.5  # seconds

    def __init__(self, journal: Path) -> None:
        self.folder = journal.with_name(journal.name + ".leases")
        self.folder.mkdir(exist_ok=True)
        self.guard: int | None = None
        self.lease: tuple[Path, int] | None = None

    def enter(self) -> None:
        self.guard = lock(self.folder / "guard", wait=True)

    def leave(self) -> None:
        if self.guard is not None:
            release(self.guard)
            self.guard = None

    def take(self, trial: optuna.Trial) -> None:
        path = self.folder / str(trial._trial_id)
        held = lock(path, wait=True)
        assert held is not None
        self.lease = path, held
        os.write(held, f"{trial.study.study_name}, trial {trial.number}: {_me()}\n".encode())

    def drop(self) -> None:
        if self.lease is not None:
            path, held = self.lease
            path.unlink(missing_ok=True)
            release(held)
            self.lease = None

    def reap(self, study: optuna.Study) -> None:
        """Tell FAIL for the trials of dead workers."""
        for trial in _running(study):
            path = self.folder / str(trial._trial_id)
            held = lock(path, wait=False)
            if held is not None:
                _fail(study, trial)
                path.unlink(missing_ok=True)
                release(held)


class _Heartbeats:
    """A database's: Optuna's heartbeat, by the database's clock."""

    def __init__(self, heartbeat: int) -> None:
        self.grace = 2.0 * heartbeat
        self.poll = min(5.0, heartbeat / 4)
        self.seen: dict[int, float] = {}  # trials without a first heartbeat, and since when

    def enter(self) -> None:
        pass

    def leave(self) -> None:
        pass

    def take(self, trial: optuna.Trial) -> None:
        trial.storage.record_heartbeat(trial._trial_id)  # type: ignore[attr-defined]

    def drop(self) -> None:
        pass

    def reap(self, study: optuna.Study) -> None:
        """Tell FAIL for the trials of dead workers."""
        import optuna

        optuna.storages.fail_stale_trials(study)
        # Optuna passes over a trial whose worker died between asking and the first heartbeat.
        now = time.monotonic()
        for trial in _running(study):
            if not _begun(trial) and now - self.seen.setdefault(trial._trial_id, now) > self.grace:
                _fail(study, trial)


def _me() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _begun(trial: FrozenTrial) -> bool:
    """Whether the worker of a RUNNING trial has settled on it (a retry inherits the mark of the try before)."""
    return trial.user_attrs.get("worker", {}).get("trial") == trial.number


def _running(study: optuna.Study) -> list[FrozenTrial]:
    from optuna.trial import TrialState

    return study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))


def _fail(study: optuna.Study, trial: FrozenTrial, *, surplus: bool = False) -> None:
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import TrialState

    with suppress(UpdateFinishedTrialError):  # it ended meanwhile
        if surplus:
            study._storage.set_trial_user_attr(trial._trial_id, "surplus", True)
        study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)


# -- the first N lines --------------------------------------------------------------------------


def _lines(trials: Sequence[FrozenTrial], count: int) -> list[FrozenTrial]:
    """The latest try of each of the first `count` lines; `trials` are in the order of their numbers."""
    real = _real(trials)
    lines = [trial for (kind, _), trial in real.items() if kind != "retry"][:count]
    for at, trial in enumerate(lines):
        while (retry := real.get(("retry", trial.number))) is not None:
            trial = retry
        lines[at] = trial
    return lines


def lines(study: optuna.Study, plan: Plan) -> list[FrozenTrial]:
    """The trials that count, each at its latest try, in the order in which they were first asked for."""
    return _lines(study.get_trials(deepcopy=False), plan.trials)


def importance(study: optuna.Study) -> dict[str, float] | None:
    """The share of the variance of the values that each parameter explains, by fANOVA; None where that cannot be told.

    Hutter, Hoos and Leyton-Brown 2014, "An Efficient Approach for Assessing Hyperparameter Importance", ICML.
    """
    import optuna

    with _quiet():
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        try:
            found = optuna.importance.get_param_importances(study, evaluator=evaluator)
        except (ValueError, RuntimeError):  # fewer than two trials, or all values are equal
            return None
    return {name: float(share) for name, share in found.items()} or None


def _real(trials: Sequence[FrozenTrial]) -> dict[tuple[str, int], FrozenTrial]:
    """Trials by what they are for: of two for the same (two machines retried at once) the lower number is real, the other void."""
    real: dict[tuple[str, int], FrozenTrial] = {}
    for trial in trials:
        if before := history(trial):
            key = ("retry", before[-1])
        elif "first" in trial.user_attrs:
            key = ("first", trial.user_attrs["first"])
        else:
            key = ("new", trial.number)
        real.setdefault(key, trial)
    return real


def history(trial: FrozenTrial) -> list[int]:
    """The numbers of the tries before this one, the first first."""
    return trial.system_attrs.get("retry_history", [])


def _ended(trial: FrozenTrial) -> bool:
    return trial.state.name in ("COMPLETE", "PRUNED")


def _left(study: optuna.Study, plan: Plan) -> int:
    """How many of the N have not ended."""
    lines = _lines(study.get_trials(deepcopy=False), plan.trials)
    return plan.trials - sum(map(_ended, lines))


def _enqueue_first(study: optuna.Study, plan: Plan) -> None:
    """Put the first settings in the queue that no run has put there yet, as far as there is room."""
    if plan.sampler == "grid":
        return
    trials = study.get_trials(deepcopy=False)
    room = plan.trials - len(_lines(trials, plan.trials))
    there = {trial.user_attrs.get("first") for trial in trials}
    for place, setting in enumerate(plan.first):
        if place not in there and room > 0:
            study.enqueue_trial(setting, user_attrs={"first": place})
            room -= 1


# -- working ------------------------------------------------------------------------------------


class _Worker:
    """Takes trials one after another until all N have ended."""

    def __init__(self, plan: Plan, objective: Objective, study: optuna.Study, send: Send) -> None:
        self.plan, self.objective, self.study, self.send = plan, objective, study, send
        self.claims: _Leases | _Heartbeats = (
            _Heartbeats(plan.heartbeat) if "://" in plan.storage else _Leases(Path(plan.storage))
        )
        self.taken: optuna.Trial | None = None  # the last trial
        self.failure: BaseException | None = None  # what it raised
        self.name = self.note = ""  # for the display

    def work(self) -> None:
        while True:
            try:
                self.claims.enter()
                ready = self._survey()
                if ready:
                    self._attempt()
            finally:
                self.claims.leave()
            if ready is None:
                return
            if not ready:  # others run the rest, and may die
                time.sleep(self.claims.poll)

    def _survey(self) -> bool | None:
        """Retry what failed; then: is there a trial to take (None: all N have ended)?"""
        from optuna.trial import TrialState

        with _quiet():
            self.claims.reap(self.study)
            trials = self.study.get_trials(deepcopy=False)
            real = {trial.number for trial in _real(trials).values()}
            for trial in trials:
                if trial.state == TrialState.WAITING and trial.number not in real:
                    _fail(self.study, trial, surplus=True)
            lines = _lines(trials, self.plan.trials)
            failed = [trial for trial in lines if trial.state == TrialState.FAIL]
            for trial in failed:
                _retry(self.study, trial)
        if failed or len(lines) < self.plan.trials:
            return True
        if any(trial.state == TrialState.WAITING for trial in lines):
            return True
        # One asked for in a race is told FAIL at once, or its worker is dead.
        numbers = {trial.number for trial in lines}
        racing = any(
            trial.state == TrialState.RUNNING and not _begun(trial)
            for trial in trials
            if trial.number not in numbers
        )
        return None if all(map(_ended, lines)) and not racing else False

    def _attempt(self) -> None:
        """Take the next trial and run it."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        self.taken = self.failure = None
        try:
            # Optuna's heartbeat beats inside `optimize` only.
            with _quiet():
                self.study.optimize(self._run, n_trials=1, catch=(_Surplus,))
        except Exception as error:
            lost = self.failure is None or isinstance(self.failure, UpdateFinishedTrialError)
            if lost and self.taken is not None:
                stored = self.study._storage.get_trial(self.taken._trial_id)
                if stored.state == TrialState.FAIL:
                    return  # held for dead (asleep, cut off from the database): it is another's now
            raise self.failure or error from None
        finally:
            self.claims.drop()  # only now: a RUNNING trial without a lease would count as dead
        if self.failure is None:
            self.send("finish", (self.name, self.note))

    def _run(self, trial: optuna.Trial) -> float:
        """Run the objective on the trial that was just asked for."""
        import optuna

        self.taken = trial
        try:
            self._check(trial)
            self.claims.take(trial)
            trial.set_user_attr("worker", {"trial": trial.number, "process": _me()})
            self.study.sampler = _sampler(self.plan, self.place)
            params = self.plan.space.suggest(trial)
            self.claims.leave()
            report = throttled(lambda event: self.send("event", event), self.name)
            value = float(self.objective(params, trial, report))
            if not math.isfinite(value):
                raise Infeasible(f"its value is {value}")
        except (optuna.TrialPruned, Infeasible) as error:
            kind = "infeasible" if isinstance(error, Infeasible) else "pruned"
            self.note = f"{kind}: {error}" if str(error) else kind
            if str(error):
                trial.set_user_attr("reason", str(error))
            raise optuna.TrialPruned(str(error)) from None
        except BaseException as error:
            self.failure = error
            with suppress(Exception):  # its worker did not die of it
                trial.set_user_attr("stopped", trial.number)
            raise
        self.note = f"{value:.4g}"
        return value

    def _check(self, trial: optuna.Trial) -> None:
        """Whether this try counts, and is not one too many."""
        import optuna

        trials = self.study.get_trials(deepcopy=False)
        mine = next(t for t in trials if t.number == trial.number)
        counting = [line.number for line in _lines(trials, self.plan.trials)]
        if mine.number not in counting:
            trial.set_user_attr("surplus", True)
            raise _Surplus
        self.place = counting.index(mine.number)
        before = history(mine)
        self.name = f"{self.plan.name}/{[*before, trial.number][0]}"  # a line's first number
        # An exception or Ctrl-C marks the trial; a worker that was killed cannot.
        deaths = [n for n in before if trials[n].user_attrs.get("stopped") != n]
        if len(deaths) >= TRIES:
            raise optuna.TrialPruned(f"its worker was ended {TRIES} times (out of memory?)")


def _retry(study: optuna.Study, failed: FrozenTrial) -> None:
    """Queue a copy of a failed trial: the same setting and reports."""
    from optuna.storages import RetryHeartbeatStaleTrialCallback

    failed = copy.deepcopy(failed)  # the callback extends its history in place
    for mark in ("surplus", "stopped"):
        failed.user_attrs.pop(mark, None)
    RetryHeartbeatStaleTrialCallback(inherit_intermediate_values=True)(study, failed)


# -- many workers -------------------------------------------------------------------------------


def run(plan: Plan, objective: Objective, workers: int, display: Any) -> optuna.Study:
    """Work on the study, `workers` processes at a time, until exactly `plan.trials` have ended; with that many already, do nothing."""
    if workers < 1:
        raise ValueError(f"workers is at least 1, not {workers}")
    study = open_study(plan)
    with _quiet():
        _enqueue_first(study, plan)
    left = _left(study, plan)
    if not left:
        return study
    if min(workers, left) == 1:

        def show(kind: str, content: tuple[Any, ...]) -> None:
            (display.finish if kind == "finish" else display)(*content)

        _Worker(plan, objective, study, show).work()
        return study
    _supervise(plan, objective, min(workers, left), display)
    left = _left(study, plan)
    if left:
        raise ValueError(
            f"every worker process was ended from outside (out of memory?) with {left} of {plan.trials} trials left; "
            "what is done is kept: run the same command again, with fewer --workers if memory is short"
        )
    return study


def _supervise(plan: Plan, objective: Objective, workers: int, display: Any) -> None:
    """Start the workers, show what they send, and raise what one of them raises.

    Each has a pipe of its own: a queue that they share has a lock, and one killed inside it would silence the others for ever.
    """
    context = multiprocessing.get_context("spawn")
    processes: dict[Connection, Any] = {}
    try:
        for _ in range(workers):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(plan, objective, sender))
            process.start()
            sender.close()
            processes[receiver] = process
        while processes:
            for receiver in cast(list[Connection], wait(list(processes))):
                try:
                    kind, content = receiver.recv()
                except (EOFError, OSError):
                    process = processes.pop(receiver)
                    process.join()
                    if process.exitcode != 0:
                        _say(display, _obituary(process.exitcode))
                    continue
                if kind == "error":
                    of, text = content
                    raise (ValueError if of == "ValueError" else RuntimeError)(text)
                with suppress(Exception):  # a display that fails must not stop the study
                    (display.finish if kind == "finish" else display)(*content)
    except BaseException:
        for process in processes.values():
            process.terminate()
        for receiver, process in processes.items():
            receiver.close()
            process.join(timeout=30)
            process.kill()  # if it still lives: its trial is retried like any other
            process.join()
        raise


def _obituary(exitcode: int) -> str:
    how = signal.Signals(-exitcode).name if exitcode < 0 else f"status {exitcode}"
    return f"a worker process was ended from outside ({how}; out of memory?); the others go on and take up its trial"


def _say(display: Any, line: str) -> None:
    if hasattr(display, "console"):
        display.console.print(line, markup=False, highlight=False, soft_wrap=True)
    else:
        print(line, file=sys.stderr)


def _work(plan: Plan, objective: Objective, sender: Connection) -> None:
    """A worker process."""
    end_with_parent()
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, _stop)

    def send(kind: str, content: tuple[Any, ...]) -> None:
        with suppress(OSError):  # the parent has closed its end
            sender.send((kind, content))

    try:
        _Worker(plan, objective, open_study(plan), send).work()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, ConnectionError) as error:
        send("error", ("ValueError", str(error)))
    except Exception:
        send("error", ("Exception", f"a worker process failed:\n{traceback.format_exc()}"))


def _stop(number: int, frame: object) -> None:
    """Both Ctrl-C and the parent's wish to end: once, so that the trial can still be told FAIL."""
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)
    raise KeyboardInterrupt
