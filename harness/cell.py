"""One cell of a comparison: one arm, one training seed, one data seed; train, save, evaluate."""

from __future__ import annotations

import gc
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from pydantic import ValidationError

from harness import capsule, evaluation, models, problems, registry
from harness.config import Budget, Experiment, Training, explain
from harness.lab import Workbench
from harness.ledger import Ledger
from harness.models.hf import HFModel
from harness.models.reward import RewardHF
from harness.points import Points
from harness.points import read as read_points
from harness.registry import Method
from harness.store import Store, digest, short_digest, writing
from harness.trainer import Trainer
from harness.types import LanguageModel, Problem

Report = Callable[[str, int, int], None]  # phase, done, total


@dataclass(frozen=True)
class Job:
    """What a worker needs to know; plain data, so that it travels between processes."""

    experiment: Mapping[str, Any]
    label: str  # "base": the untrained student
    seed: int
    data_seed: int
    folder: Path  # results/NAME
    store: Path

    @property
    def name(self) -> str:
        """`LABEL/SEED`, with the data seed where there are several."""
        several = len(self.experiment["data_seeds"]) > 1 and self.label != "base"
        return f"{self.label}/{self.seed}" + (f"-data{self.data_seed}" if several else "")

    @property
    def run_file(self) -> Path:
        return self.folder / "runs" / self.name / "run.json"

    @property
    def capsule_file(self) -> Path:
        return self.run_file.with_name(capsule.FILE)

    @property
    def points_file(self) -> Path:
        return self.folder / "runs" / self.name / "points.jsonl"

    @property
    def model_folder(self) -> Path:
        return self.folder / "models" / self.name

    def samples_file(self, benchmark: str) -> Path:
        return self.folder / "samples" / f"{benchmark}--{self.name.replace('/', '--')}.parquet"


def run(job: Job, report: Report) -> None:
    """Do what is left of a cell."""
    experiment = Experiment.model_validate(job.experiment)
    torch.set_num_threads(experiment.threads or max(1, (os.cpu_count() or 1) // experiment.workers))
    store = Store(job.store)
    if os.environ.get("RANK", "0") != "0":  # trains beside rank 0, which holds the claim
        _run(job, experiment, store, report)
        return
    # Two comparisons of one name: the second waits for a cell, and then finds it done.
    with store.claim("cells", {"folder": str(job.folder.resolve())}, job.name.replace("/", "-")):
        _run(job, experiment, store, report)


def _run(job: Job, experiment: Experiment, store: Store, report: Report) -> None:
    pending = [name for name in experiment.benchmarks if not evaluated(job, experiment, name)]
    trained = job.label == "base" or recorded(job, experiment)
    if not pending and trained:
        samples = read_points(job.points_file).samples
        if samples and samples[-1]["phase"] != "end" and os.environ.get("RANK", "0") == "0":
            # It was killed between its last file and the end of its log, which leaving the block writes.
            with Points(job.points_file, about(job, experiment)) as log:
                log.sample("evaluated")
        return
    keep_capsule(job, experiment)
    spec = experiment.student if job.label == "base" or not trained else str(job.model_folder)
    student = student_model(spec)
    if (
        os.environ.get("RANK", "0") != "0"
    ):  # under `accelerate launch` every rank trains, one judges
        if not trained:
            train(job, experiment, student, store, report)
        return
    with Points(job.points_file, about(job, experiment)) as points:
        report = points.sampling(report)
        if not trained:
            train(job, experiment, student, store, report, watch=_log(points))
        student.freeze()
        for name in pending:
            evaluate(job, experiment, name, student, store, report)
    del student
    gc.collect()


def _log(points: Points) -> Callable[[Trainer], None]:
    def watch(trainer: Trainer) -> None:
        if trainer.state.step:  # 0: the end of a stage, whose last step is logged
            points.log(**trainer.state.curve[-1])

    return watch


def about(job: Job, experiment: Experiment) -> dict[str, Any]:
    """What a run in progress says of itself."""
    common = {
        "label": job.label,
        "seed": job.seed,
        "data_seed": job.data_seed,
        "student": experiment.student,
        "teacher": experiment.teacher,
        "benchmarks": list(experiment.benchmarks),
        "config_hash": experiment.hash,
    }
    if job.label == "base":
        return {**common, "method": "base", "key": "base"}
    method, training, budget = recipe(experiment, job.label)
    return {
        **common,
        "method": method.name,
        "key": key(job, experiment),
        "config": method.model_dump(mode="json"),
        "training": training.model_dump(mode="json"),
        "budget": budget.model_dump(mode="json"),
    }


def train(
    job: Job,
    experiment: Experiment,
    student: HFModel,
    store: Store,
    report: Report,
    *,
    ledger: Ledger | None = None,
    watch: Callable[[Trainer], None] | None = None,
) -> None:
    """Run the method's stages and keep the student; a run that was cut goes on from its checkpoint.

    A `ledger` that is given is filled, so that it tells what was paid before an error, too; `watch` is the trainer's.
    """
    method, training, budget = recipe(experiment, job.label)
    torch.manual_seed(job.seed)
    ledger = Ledger() if ledger is None else ledger
    ledger.caps = {str(quantity): cap for quantity, cap in budget.caps.items()}
    start = student.identity
    trainer = Trainer(
        student,
        training,
        budget,
        job.seed,
        ledger,
        checkpoint=job.run_file.parent / "checkpoint.pt",
        report=report,
        key=key(job, experiment),
        watch=watch,
    )
    lab = Workbench(
        student,
        loaders(experiment, student),
        training_problems(job),
        store,
        ledger,
        experiment.sampling,
        seed=job.seed,
        data_seed=job.data_seed,
        oracle=problems.oracle(list(experiment.problems)),
        clock=lambda: trainer.clock,
        consumed=lambda: trainer.consumed,
        report=report,
    )
    lab.notes.update(trainer.resume() or {})
    with ledger.timed():
        for index, stage in enumerate(method.stages(lab)):
            if stage.teacher is None and needs_teacher(stage.objective):
                models.check_pair(student, lab.teacher)
            trainer.run(index, stage, lambda: lab.teacher, lab.notes)
    if not trainer.state.stages:
        raise ValueError(f"{job.label}: the method has no stages, so nothing was trained")
    if not trainer.accelerator.is_main_process:
        return
    with writing(job.model_folder):
        student.save(job.model_folder)
    record = {
        "method": method.name,
        "label": job.label,
        "seed": job.seed,
        "data_seed": job.data_seed,
        "key": key(job, experiment),
        "config": method.model_dump(mode="json"),
        "training": training.model_dump(mode="json"),
        "budget": budget.model_dump(mode="json"),
        "start": start,
        "student": student.identity,
        "models": {name: model.identity for name, model in sorted(lab.models.loaded.items())},
        "weights": capsule.weights(job.model_folder),
        "stages": trainer.state.stages,
        "notes": lab.notes,
        "curve": trainer.state.curve,
        "ledger": ledger.summary(),
    }
    write_json(job.run_file, record)
    trainer.clear()


def evaluate(
    job: Job,
    experiment: Experiment,
    name: str,
    student: LanguageModel,
    store: Store,
    report: Report,
) -> None:
    """Score a student on one benchmark and write its samples."""
    settings = experiment.benchmarks[name]
    records = evaluation.evaluate(
        student,
        {name: settings},
        seed=0,  # all arms answer with the same sampling noise
        progress=report,
        cache=store,
    )[name]
    extra = {"method": job.label, "seed": job.seed, "data_seed": job.data_seed}
    with writing(job.samples_file(name)):
        evaluation.write_records(
            job.samples_file(name),
            [{**record, **extra} for record in records],
            {"key": evaluation_key(job, experiment, name)},
        )


def recipe(experiment: Experiment, label: str) -> tuple[Method, Training, Budget]:
    """The arm's method, training and budget: the suite's, or with `budget: paper` its paper's; then what the arm says itself.

    An arm may set keys of `training` for itself, and by `budget: {steps: N}` take fewer steps than the suite has, never more.
    """
    given = dict(experiment.methods[label])
    own, less = given.pop("training", {}), given.pop("budget", {})
    training, budget = experiment.training, experiment.budget
    if not isinstance(budget, Budget):
        name = given.get("method", label)
        paper = registry.paper_recipe(registry.get(name))
        if "budget" not in paper:
            raise ValueError(
                f"methods.{label}: budget 'paper' needs a paper.yaml with a budget beside {name}"
            )
        given = {"method": name, **paper.get("fields", {}), **given}
        training = _merged(training, paper.get("training", {}), f"{name}'s paper.yaml: training")
        budget = Budget.model_validate(paper["budget"])
    training = _merged(training, own, f"{experiment.name}: methods.{label}.training")
    if less:
        most, steps = budget.steps, less.get("steps")
        if set(less) != {"steps"} or not isinstance(steps, int) or not 0 < steps <= (most or 0):
            allowed = "in other units" if most is None else f"{most} steps"
            raise ValueError(
                f"methods.{label}.budget: {{steps: N}}, at most the suite's (which is {allowed}), got {less!r}"
            )
        budget = budget.model_copy(update={"steps": steps})
    return registry.build(label, given, experiment.name), training, budget


def resolved(experiment: Experiment, label: str) -> dict[str, Any]:
    """The experiment with this arm alone, and all that it inherits from the suite, defaults or its paper written out."""
    data = experiment.model_dump(mode="json", exclude={"sweep"})
    if label == "base":
        return data
    method, training, budget = recipe(experiment, label)
    return {
        **data,
        "methods": {label: {"method": method.name, **method.model_dump(mode="json")}},
        "training": training.model_dump(mode="json"),
        "budget": budget.model_dump(mode="json"),
        "reference": "base",
    }


def _merged(training: Training, own: Mapping[str, Any], source: str) -> Training:
    try:
        return Training.model_validate({**training.model_dump(), **own})
    except ValidationError as error:
        raise ValueError(explain(error, source, Training)) from None


def needs_teacher(objective: Any) -> bool:
    parts = objective.values() if isinstance(objective, Mapping) else [objective]
    return any(part.needs_teacher for part in parts)


def fingerprint(spec: Any) -> Any:
    """What a model of the suite stands for: its name, and the files behind it where they are local."""
    if isinstance(spec, Mapping) and "traces" in spec:
        return hashlib.sha256(Path(spec["traces"]).read_bytes()).hexdigest()
    if isinstance(spec, Mapping) and "server" in spec:
        return [spec["server"], spec["model"]]
    name, path = models.find(spec, problems.checkpoints())
    if name in problems.checkpoints():
        return [name, problems.micro_version()]
    if isinstance(spec, Mapping) and "ask" in spec:
        name = f"ask {name}"
    files = sorted(file for file in path.glob("*") if file.is_file())
    return [name, [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]]


def keep_capsule(job: Job, experiment: Experiment) -> None:
    """Write what a repetition needs, before the work; conditions that changed since an earlier process are added.

    A student that was trained before there were capsules was so under conditions that nobody knows: {}.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    before, now = capsule.read(job.capsule_file), capsule.conditions()
    worked = before["conditions"] if before else [{}] if job.run_file.is_file() else []
    worked += [] if worked[-1:] == [now] else [now]
    write_json(job.capsule_file, {**contents(job, experiment), "conditions": worked})


def contents(job: Job, experiment: Experiment) -> dict[str, Any]:
    """What of a cell's capsule does not depend on who runs it."""
    return {
        "experiment": resolved(experiment, job.label),
        "label": job.label,
        "seed": job.seed,
        "data_seed": job.data_seed,
        "problems": capsule.file_digest(job.folder / "problems.jsonl"),
        "benchmarks": {
            name: {
                "problems": problems.contents(
                    evaluation.problems_of(
                        name, limit=given.limit, levels=given.levels, options=given.options
                    )
                ),
                "protocol": short_digest(evaluation.protocol_of(name, given.options)),
            }
            for name, given in experiment.benchmarks.items()
        },
    }


def student_model(spec: Any) -> HFModel:
    # fp32 weights: small updates would round away in bf16; Accelerate casts the products where that pays.
    model = models.load(spec, checkpoints=problems.checkpoints(), dtype="fp32")
    if not isinstance(model, HFModel):
        raise ValueError(f"student: {spec!r} cannot be trained; give a Transformers model")
    return model


def loaders(experiment: Experiment, student: HFModel) -> dict[str, Callable[[], LanguageModel]]:
    """Every model that a method may ask for, loaded on first use and frozen."""

    def loader(spec: Any) -> Callable[[], LanguageModel]:
        def load() -> Any:
            model = models.load(spec, checkpoints=problems.checkpoints(), tokenizer_of=student)
            return model.freeze() if isinstance(model, HFModel | RewardHF) else model

        return load

    specs = {"base": experiment.student, "teacher": experiment.teacher, **experiment.models}
    return {name: loader(spec) for name, spec in specs.items()}


def training_problems(job: Job) -> list[Problem]:
    """The problems that the comparison prepared: loaded once, decontaminated, the same for every cell."""
    return read_problems(job.folder / "problems.jsonl")


def read_problems(path: Path) -> list[Problem]:
    return [Problem(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


# -- what is done already -----------------------------------------------------------------------


def key(job: Job, experiment: Experiment) -> str:
    """Digest of all that decides a trained student, but for the code."""
    method, training, budget = recipe(experiment, job.label)
    return short_digest(
        {
            "method": [method.name, method.model_dump(mode="json")],
            "seeds": [job.seed, job.data_seed],
            "training": training.model_dump(mode="json"),
            "budget": budget.model_dump(mode="json"),
            "sampling": experiment.sampling.model_dump(mode="json"),
            "models": [
                fingerprint(spec)
                for spec in (experiment.student, experiment.teacher, *experiment.models.values())
            ],
            "problems": digest((job.folder / "problems.jsonl").read_text(encoding="utf-8")),
        }
    )


def recorded(job: Job, experiment: Experiment) -> bool:
    """Whether the student of this cell is trained; refuses to mix two configurations in one folder."""
    if not job.run_file.is_file():
        return False
    record = json.loads(job.run_file.read_text(encoding="utf-8"))
    if record["key"] != key(job, experiment):
        raise ValueError(
            f"{job.run_file.parent} holds a student trained with another configuration: give this one a "
            f"name of its own (--set name=…), or remove {job.folder}"
        )
    return job.model_folder.is_dir()


def evaluation_key(job: Job, experiment: Experiment, name: str) -> str:
    student = key(job, experiment) if job.label != "base" else fingerprint(experiment.student)
    settings = experiment.benchmarks[name].model_dump(mode="json", exclude={"bands"})
    if not settings["options"]:  # none say nothing: what was answered before there were any stays
        del settings["options"]
    options = experiment.benchmarks[name].options
    protocol = evaluation.protocol_of(name, options)
    return short_digest([student, settings, protocol, evaluation.engine(None)])


def evaluated(job: Job, experiment: Experiment, name: str) -> bool:
    path = job.samples_file(name)
    if not path.is_file() or (job.label != "base" and not job.run_file.is_file()):
        return False
    metadata = pq.read_schema(path).metadata or {}
    return metadata.get(b"key") == evaluation_key(job, experiment, name).encode()


def write_json(path: Path, data: Any) -> None:
    """All or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(data, indent=1, default=_plain) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _plain(value: Any) -> Any:
    """NumPy's numbers and arrays in a method's notes; anything else as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def jobs(experiment: Experiment, labels: Sequence[str], folder: Path, store: Path) -> list[Job]:
    """All cells, base first, then arm by arm."""
    data = experiment.model_dump(mode="json")
    cells = [("base", 0, experiment.data_seeds[0])]
    cells += [
        (label, seed, data_seed)
        for label in labels
        for data_seed in experiment.data_seeds
        for seed in range(experiment.seeds)
    ]
    return [Job(data, *cell, folder, store) for cell in cells]
