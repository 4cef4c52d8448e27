"""A walk through a suite's arms on a sample of its problems: what each would cost, without training anything.

Every arm is walked twice (a first and a second training seed, which shares what a store shares) with a real lab, ledger and trainer,
on a budget cut in proportion to the problems. What an arm does before and between its stages grows with the problems; what it does
inside a stage grows with the budget; what a second seed still spends is paid by every later one. The trainer takes a few real
steps a stage, to be timed, and only counts the others, so the student stays nearly what it was: rollouts are as long as the
untrained student's. Models that are not here, or are too large for a walk, are played by stand-ins.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from harness import cell, evaluation, models, problems, sizes, standin
from harness.config import Budget, Experiment, Training
from harness.lab import Workbench
from harness.ledger import QUANTITIES, Ledger
from harness.progress import throttled
from harness.registry import Method
from harness.standin import Assumed, Judge, StandIn
from harness.store import Store
from harness.trainer import Trainer
from harness.types import Example, OnPolicy, Problem, Request, Sampling, Stage

TIMED = 2  # real optimizer steps of a stage
BLOCKS = 6  # of a stage's on-policy steps that are really sampled; the others cost what these do on average
STEPS = 2000  # optimizer steps of a walk, at most
SMALL = {"cpu": 50e6, "cuda": 1e9}  # parameters of all models that are walked with for real
UNREAD = 1000  # problems assumed of a training set that cannot be read and that has no n
RATES = {"student": 0.3, "teacher": 0.7}  # of right responses, assumed of models that are not here
EVALUATED = 32  # problems of a benchmark that are answered


class Costs(dict[str, float]):
    """Amounts by name: `charged` and `spent` with a quantity of the ledger, `seconds` on this machine, `stored` bytes,
    and `written` with the tokens of `spent` that are sampled in small batches, inside a stage. What is absent is 0."""

    def __missing__(self, name: str) -> float:
        return 0.0

    def __add__(self, other: Costs) -> Costs:
        return Costs({name: self[name] + other[name] for name in {**self, **other}})

    def __sub__(self, other: Costs) -> Costs:
        return self + other * -1

    def __mul__(self, factor: float) -> Costs:
        return Costs({name: amount * factor for name, amount in self.items()})

    def column(self, name: str) -> dict[str, float]:
        return {q: self[f"{name} {q}"] for q in QUANTITIES if q != "seconds"}


def booked(ledger: Ledger) -> Costs:
    """Both columns of a ledger."""
    columns = {"charged": ledger.charged, "spent": ledger.spent}
    return Costs({f"{name} {q}": column[q] for name, column in columns.items() for q in column})


@dataclass
class Cast:
    """The models of a walk: the suite's own, or stand-ins, and what was assumed of them."""

    real: bool
    shapes: dict[str, sizes.Shape]
    length: int  # of a stand-in's response
    notes: list[str]
    prices: dict[str, Mapping[Any, float]] = field(default_factory=dict)  # of servers that write
    loaded: dict[str, Any] = field(default_factory=dict)
    difficulty: dict[str, float] = field(
        default_factory=dict
    )  # of the sample's problems, to stand-ins

    def student(self, setting: Experiment) -> Any:
        if self.real:
            return cell.student_model(setting.student)
        return self._standin("student")

    def loaders(self, setting: Experiment, student: Any) -> dict[str, Callable[[], Any]]:
        if not self.real:
            return {
                name: lambda name=name: self._standin(name)  # type: ignore[misc]
                for name in ("base", "teacher", *setting.models)
            }

        def kept(name: str, load: Callable[[], Any]) -> Callable[[], Any]:
            def get() -> Any:
                if name not in self.loaded:
                    self.loaded[name] = load()
                return self.loaded[name]

            return get

        return {name: kept(name, load) for name, load in cell.loaders(setting, student).items()}

    def _standin(self, name: str) -> Any:
        who = "student" if name == "base" else name
        parameters = self.shapes[who].parameters if who in self.shapes else 0
        if name not in (*RATES, "base"):
            return Judge(name, parameters)
        trained = self.shapes[who].trained if who in self.shapes else None
        price = self.prices.get(who)
        return StandIn(who, parameters, self.length, RATES[who], trained, price, self.difficulty)


class Counting(Trainer):
    """The trainer, but for its updates: the first steps of a stage are done and timed, the others only counted."""

    real = TIMED  # steps of a stage
    updating = 0.0  # seconds of all real steps
    timed_seconds = 0.0  # of those after a stage's first, which also warms up
    timed_tokens = 0

    def _length(self, stage: Stage) -> float:
        length = super()._length(stage)
        return max(length, 1.0) if self.budget.steps else length

    def _update(
        self,
        stage: Stage,
        live: Sequence[Example],
        scale: float,
        default: Callable[[], Any],
        progress: float,
    ) -> tuple[float, float]:
        if self.state.step >= self.real:
            return 0.0, 0.0
        start = time.perf_counter()
        done = super()._update(stage, live, scale, default, progress)
        took = time.perf_counter() - start
        self.updating += took
        if self.state.step:
            self.timed_seconds += took
            self.timed_tokens += sum(len(e.prompt) + len(e.response) for e in live)
        return done


def spread(every: Sequence[Problem], count: int) -> list[Problem]:
    """`count` problems evenly out of all, ordered by set, level and length, so that every kind has its share; in their order."""
    order = sorted(
        range(len(every)),
        key=lambda i: (every[i].source, every[i].level or 0, len(every[i].prompt), every[i].id),
    )
    count = min(count, len(every))
    chosen = {order[int((k + 0.5) * len(every) / count)] for k in range(count)}
    return [every[i] for i in sorted(chosen)]


class Walk:
    """The probe: every arm on the sample, in the suite's order, out of one store."""

    def __init__(
        self,
        setting: Experiment,
        cast: Cast,
        sample: Sequence[Problem],
        total: int,
        folder: Path,
        display: Any,
    ) -> None:
        self.setting, self.cast, self.display = setting, cast, display
        self.sample = list(sample)
        cast.difficulty = standin.spaced(sample)
        self.grow = total / len(sample)  # from the sample to all problems
        self.store = Store(folder / "store")
        self.used: set[str] = set()  # models that some arm loaded
        self.longest = 0  # tokens of a prompt

    def arm(self, label: str) -> dict[str, Any]:
        """The costs of an arm's first cell and of each later seed's."""
        method, training, budget = cell.recipe(self.setting, label)
        try:
            first, trainer = self._cell(label, method, training, budget, 0)
            later = first
            if self.setting.seeds > 1:
                later, _ = self._cell(label, method, training, budget, 1, trainer)
        except ValueError as error:  # a small sample may leave a stage empty
            return {"failed": str(error)}
        return {"first": first, "later": later}

    def _cell(
        self,
        label: str,
        method: Method,
        training: Training,
        budget: Budget,
        seed: int,
        timed: Counting | None = None,
    ) -> tuple[Costs, Counting]:
        torch.manual_seed(seed)
        student = self.cast.student(self.setting)
        cut = self._cut(budget, training, student)
        ledger = Ledger({str(quantity): cap for quantity, cap in cut.caps.items()})
        # At the full rate so few steps would leave the student in the middle of its warm-up.
        pace = training.model_copy(update={"learning_rate": training.learning_rate / self.grow})
        if (
            not self.cast.real
        ):  # nothing is multiplied, and Accelerate knows one precision a process
            pace = pace.model_copy(update={"precision": "auto"})
        trainer = Counting(student, pace, cut, seed, ledger)
        trainer.real = TIMED if self.cast.real else 0
        if timed is not None:
            trainer.real = min(trainer.real, 1)  # enough to be another student
            trainer.timed_seconds, trainer.timed_tokens = timed.timed_seconds, timed.timed_tokens
        lab = (Workbench if self.cast.real else Assumed)(
            student,
            self.cast.loaders(self.setting, student),
            self.sample,
            self.store,
            ledger,
            self.setting.sampling,
            seed=seed,
            data_seed=self.setting.data_seeds[0],
            oracle=problems.oracle(list(self.setting.problems)),
            clock=lambda: trainer.clock,
            consumed=lambda: trainer.consumed,
            report=throttled(lambda event: self.display(*event), f"{label}/{seed}"),
        )
        costs = self._walk(method, lab, trainer, ledger, _whole(budget))
        self.used |= set(lab.models.loaded)
        return costs, trainer

    def _cut(self, budget: Budget, training: Training, student: Any) -> Budget:
        """The budget in the proportion of the problems, or less where that is many steps."""
        self.longest = max(len(student.encode(problems.render(p))) for p in self.sample)
        longest = training.batch_size * (self.longest + self.setting.sampling.max_new_tokens)
        most = STEPS * (longest if budget.trained_tokens else 6 * student.num_parameters * longest)
        most = STEPS if budget.steps else most
        size = min(_whole(budget) / self.grow, most)
        given = {"steps": round(size) or 1} if budget.steps else {"flops": size}
        if budget.trained_tokens:
            given = {"trained_tokens": round(size) or 1}
        caps = {quantity: -(-cap // self.grow) for quantity, cap in budget.caps.items()}
        return Budget.model_validate({**given, "caps": caps})

    def _walk(
        self, method: Method, lab: Workbench, trainer: Counting, ledger: Ledger, whole: float
    ) -> Costs:
        costs = Costs()
        meter = _Meter(ledger, self.store.root)
        stages = method.stages(lab)
        for index, stage in enumerate(stages):
            costs += meter.read() * self.grow  # what was prepared
            updating = trainer.updating
            blocks = None
            if isinstance(stage.source, OnPolicy):
                # A long block would be paid for few of its steps, so that each step draws its own.
                blocks = Blocks(stage.source, ledger, whole=self.grow == 1)
                stage = replace(stage, source=OnPolicy(stage.source.problems, blocks))
            trainer.run(index, stage, lambda: lab.teacher, lab.notes)
            inside = meter.read()
            done = trainer.state.stages[-1]
            consumed = trainer.state.consumed - done["from"]
            length = done["share"] * whole - done["prepared"] * self.grow
            # A cap that ends a stage here ends it there.
            factor = max(0.0, length) / (done["length"] if done["stopped_by"] else consumed)
            inside["seconds"] += (blocks.saved if blocks else 0.0) - (trainer.updating - updating)
            for name in ("student_generated", "teacher_generated"):
                inside[f"written {name}"] = inside[f"spent {name}"]
            full = inside * factor
            if trainer.timed_tokens:
                pace = trainer.timed_seconds / trainer.timed_tokens
                full["seconds"] += full["spent trained"] * pace
            costs += full
        return costs + meter.read() * self.grow

    def evaluation(self) -> dict[str, Any]:
        """Tokens that one cell writes to answer the benchmarks, seconds where they were measured, problems and samples of each."""
        student = self.cast.student(self.setting)
        found: dict[str, Any] = {"tokens": 0.0, "seconds": 0.0, "problems": 0}
        found |= {"asked": {}, "missing": []}
        for name, given in self.setting.benchmarks.items():
            settings = evaluation.Setting.of(name, given)
            items = evaluation.problems_of(
                name, limit=settings.limit, levels=given.levels, options=settings.options
            )
            if not items:  # of another task of lm-eval
                found["missing"].append(name)
                continue
            some = spread(items, EVALUATED)
            sampling = Sampling(
                temperature=settings.temperature,
                top_p=settings.top_p,
                max_new_tokens=settings.max_new_tokens or self.setting.sampling.max_new_tokens,
            )
            start = time.perf_counter()
            drawn = student.generate([Request(problems.render(p), p) for p in some], sampling)
            factor = len(items) * settings.n / len(some)
            found["tokens"] += factor * sum(len(t.tokens) for group in drawn for t in group)
            found["seconds"] += factor * (time.perf_counter() - start)
            found["problems"] += len(items) * settings.n
            found["asked"][name] = {"problems": len(items), "samples": settings.n}
        return found


class _Meter:
    """Reads what was charged, spent, stored, and how long it took, since the last reading."""

    def __init__(self, ledger: Ledger, root: Path) -> None:
        self.ledger, self.root = ledger, root
        self.before = self._now()

    def _now(self) -> Costs:
        files = self.root.rglob("*.arrow") if self.root.is_dir() else ()
        stored = sum(file.stat().st_size for file in files)
        return booked(self.ledger) + Costs(seconds=time.perf_counter(), stored=stored)

    def read(self) -> Costs:
        now, before = self._now(), self.before
        self.before = now
        return now - before


class Blocks:
    """An on-policy source of which the first blocks are made; the later ones are those again, at their mean cost.

    Blocks of a sample often hold a problem twice, which is rare among all problems and may cost samples of every other one: the
    second time is asked for apart.
    """

    def __init__(self, source: OnPolicy, ledger: Ledger, whole: bool) -> None:
        self.source, self.ledger, self.whole = source, ledger, whole
        self.made: list[Sequence[Example]] = []
        self.costs = Costs()
        self.count, self.seconds, self.saved = 0, 0.0, 0.0

    def __call__(self, block: Sequence[Problem]) -> Sequence[Example]:
        self.count += 1
        if self.count <= BLOCKS:
            start = time.perf_counter()
            before = booked(self.ledger)
            self.made.append(self._made(block))
            self.costs += booked(self.ledger) - before
            self.seconds += time.perf_counter() - start
            return self.made[-1]
        for name, amount in self.costs.column("charged").items():
            self.ledger.charge(name, amount / BLOCKS)
        for name, amount in self.costs.column("spent").items():
            self.ledger.spend(name, amount / BLOCKS)
        self.saved += self.seconds / BLOCKS
        return self.made[self.count % BLOCKS]

    def _made(self, block: Sequence[Problem]) -> list[Example]:
        rounds: list[list[Problem]] = [list(block)]
        if not self.whole:
            times = Counter[str]()
            rounds = [[] for _ in block]
            for problem in block:
                rounds[times[problem.id]].append(problem)
                times[problem.id] += 1
        return [example for part in rounds if part for example in self.source.make(part)]


def _whole(budget: Budget) -> float:
    return float(budget.steps or budget.trained_tokens or budget.flops or 0)


# -- what is here ---------------------------------------------------------------------------------


def readable(setting: Experiment) -> tuple[Experiment, dict[str, dict[str, str]]]:
    """The suite with only the training sets and benchmarks whose rows can be read here, and why the others cannot."""
    unread: dict[str, dict[str, str]] = {"problems": {}, "benchmarks": {}}
    for name, options in setting.problems.items():
        try:
            problems.load(name, "train", **options)
        except problems.Absent as error:
            unread["problems"][name] = str(error)
    for name, given in setting.benchmarks.items():
        try:
            evaluation.problems_of(name, levels=given.levels, options=given.options)
        except problems.Absent as error:
            unread["benchmarks"][name] = str(error)
    kept = {
        key: {name: each for name, each in getattr(setting, key).items() if name not in lost}
        for key, lost in unread.items()
    }
    return setting.model_copy(update=kept), unread


# -- who plays --------------------------------------------------------------------------------------


def away(setting: Experiment) -> list[str]:
    """The models of the suite that cannot be loaded here without a network."""
    found = []
    for name, spec in _specs(setting).items():
        called, path = models.find(spec, problems.checkpoints())
        if not weights_here(called, path):
            found.append(f"{name} {called} is not here")
    return found


def _specs(setting: Experiment) -> dict[str, Any]:
    """The models of a suite that have weights."""
    given = {"student": setting.student, "teacher": setting.teacher, **setting.models}
    return {
        name: spec
        for name, spec in given.items()
        if not (isinstance(spec, Mapping) and {"traces", "server"} & set(spec))
    }


def cast_of(setting: Experiment, tokens: int | None, unread: Mapping[str, str]) -> Cast:
    """The suite's own models where all are here and small, with all training problems, else stand-ins of their sizes."""
    notes, absent = list[str](), away(setting)
    absent += [f"training on {name}: {_assumed(setting, name):,} problems assumed, as they could not be read: {why}"
               for name, why in unread.items()]  # fmt: skip
    given = {"teacher": setting.teacher, **setting.models}
    servers = {name: spec for name, spec in given.items() if isinstance(spec, Mapping) and "server" in spec}  # fmt: skip
    absent += [f"{name} is a server, which a plan does not ask" for name in servers]
    prices = {name: servers[name].get("price", {}) for name in servers if name == "teacher"}
    shapes = {
        name: sizes.shape(spec, problems.checkpoints()) for name, spec in _specs(setting).items()
    }
    total = sum(each.parameters for each in shapes.values())
    most = SMALL["cuda" if torch.cuda.is_available() else "cpu"]
    if not absent and total > most:
        absent.append(
            f"the models have {total:.2g} parameters, above the {most:.2g} that a probe walks with"
        )
    length = tokens or max(1, setting.sampling.max_new_tokens // 4)
    if absent:
        notes += absent
        notes.append(
            f"assumed: responses of {length:,} tokens ({'as told' if tokens else 'a quarter of max_new_tokens; --tokens says otherwise'}), "
            f"right at {RATES['teacher']:.0%} (teacher) and {RATES['student']:.0%} (student)"
        )
        for name, each in shapes.items():
            notes.append(f"{name}: {each.parameters / 1e9:.3g}e9 parameters, from {each.source}")
    return Cast(not absent, shapes, length, notes, prices)


def training_problems(setting: Experiment, unread: Mapping[str, str]) -> list[Problem]:
    """What stands for the training sets that cannot be read."""
    every: list[Problem] = []
    for name in unread:
        found = problems.find(name)
        domain = found.domain if isinstance(found, problems.TableSet) else "math"
        every += standin.problems(name, domain, _assumed(setting, name))
    return every


def _assumed(setting: Experiment, name: str) -> int:
    return int(setting.problems[name].get("n", UNREAD))


def weights_here(name: str, path: Path) -> bool:
    if not path.is_dir():
        from huggingface_hub import snapshot_download

        try:
            path = Path(snapshot_download(name, local_files_only=True))
        except (OSError, ValueError):
            return False
    return any(any(path.glob(kind)) for kind in ("*.safetensors", "*.bin"))
