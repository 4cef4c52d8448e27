"""One cell of a comparison: one arm, one training seed, one data seed; train, save, evaluate."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from pydantic import ValidationError

from harness import capsule, evaluation, models, problems, ranks, registry, sizes
from harness.config import (
    Budget,
    Checkpoint,
    Experiment,
    ModelSpec,
    Training,
    explain,
    model_spec,
)
from harness.lab import Workbench
from harness.ledger import Ledger
from harness.models.hf import HFModel, replace_folder
from harness.models.reward import RewardHF
from harness.points import Points
from harness.points import read as read_points
from harness.registry import Method
from harness.store import Store, digest, draft, short_digest, writing
from harness.trainer import Trainer
from harness.types import LanguageModel, Problem

Report = Callable[[str, int, int], None]  # phase, done, total
RECORD = "retort.json"  # what run.json says of a student, beside its weights


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


def run(job: Job, report: Report, threads: int | None = None) -> None:
    """Do what is left of a cell, on so many threads if it is said."""
    experiment = Experiment.model_validate(job.experiment)
    torch.set_num_threads(threads or threads_of(experiment))
    store = Store(job.store)
    with ExitStack() as held:
        if ranks.first():
            # Two comparisons of one name: the second waits for a cell, and then finds it done.
            folder = {"folder": str(job.folder.resolve())}
            held.enter_context(store.claim("cells", folder, job.name.replace("/", "-")))
        _run(job, experiment, store, report)


def threads_of(experiment: Experiment) -> int:
    """The threads of one cell: the suite's, or its share of this machine."""
    beside = experiment.workers if ranks.world() == 1 else ranks.on_this_machine()
    return experiment.threads or max(1, (os.cpu_count() or 1) // beside)


def _run(job: Job, experiment: Experiment, store: Store, report: Report) -> None:
    # Before the first rank holds the cell it says nothing, and the others begin nothing.
    pending, trained = ranks.agree(lambda: left(job, experiment))
    if not pending and trained:
        samples = read_points(job.points_file).samples if ranks.first() else []
        if samples and samples[-1]["phase"] != "end":
            # It was killed between its last file and the end of its log, which leaving the block writes.
            with Points(job.points_file, about(job, experiment)) as log:
                log.sample("evaluated")
        return
    if not ranks.first():  # every rank trains, one judges
        if not trained:
            train(job, experiment, student_model(experiment.student, job.seed), store, report)
        return
    keep_capsule(job, experiment)
    if job.label == "base":
        student = student_model(plain(experiment.student))
    else:
        saved = job.model_folder if trained else None
        student = student_model(experiment.student, job.seed, saved)
    with Points(job.points_file, about(job, experiment)) as points:
        report = points.sampling(report)
        if not trained:
            student = train(job, experiment, student, store, report, watch=_log(points))
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
) -> HFModel:
    """Run the method's stages, keep the student and return the one that is kept; a run that was cut goes on from its checkpoint.

    A `ledger` that is given is filled, so that it tells what was paid before an error, too; `watch` is the trainer's.
    """
    method, training, budget = recipe(experiment, job.label)
    stood = _stamp(job.model_folder)
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
            for model in lab.models.loaded.values():
                if rest := getattr(model, "rest", None):
                    rest()  # an engine hands back its memory, for the student to train in
            trainer.run(index, stage, lambda: lab.teacher, lab.notes)
    if not trainer.state.stages:
        raise ValueError(f"{job.label}: the method has no stages, so nothing was trained")
    if not ranks.first():
        return student
    loaded = {name: model.identity for name, model in sorted(lab.models.loaded.items())}
    student.merge()
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
        "models": loaded,
        "stages": trainer.state.stages,
        "notes": lab.notes,
        "curve": trainer.state.curve,
        "ledger": ledger.summary(),
    }
    first = keep(job, student, record, stood)
    write_json(job.run_file, json.loads((job.model_folder / RECORD).read_text(encoding="utf-8")))
    trainer.clear()
    if first and student.kept is None:
        return student
    student.model.to("meta")  # there need not be room for it twice
    # Merged weights lie elsewhere in memory than those of a folder, which changes the last bits of products.
    return student_model(experiment.student, saved=job.model_folder)


def keep(
    job: Job, student: HFModel, record: Mapping[str, Any], stood: tuple[int, int] | None
) -> bool:
    """Put a student and its record in their place; False if another's has come there since `stood`, which stays.

    Two machines may run one cell where locks do not reach from one to the other. Weights and record come by one rename,
    so the first has both, and the second goes on with what it finds.
    """
    folder = job.model_folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        writing(folder),
        tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as made,
    ):
        new = student.save(Path(made) / folder.name)
        write_json(new / RECORD, {**record, "weights": capsule.weights(new)})
        if stood is not None and _stamp(folder) == stood:  # left by a run that was killed
            replace_folder(new, folder)
            return True
        try:
            os.rename(new, folder)
        except OSError:  # a folder that is not empty is not replaced
            if not folder.is_dir():
                raise
            return False
    return True


def _stamp(folder: Path) -> tuple[int, int] | None:
    """Tells a folder from another that takes its place."""
    try:
        status = folder.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


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

    An arm may set keys of `training` for itself, and by `budget: {steps: N}` take fewer steps than the suite has, never more;
    under `budget: paper` an arm whose paper.yaml has no budget states its own.
    """
    given = dict(experiment.methods[label])
    own, less = given.pop("training", {}), given.pop("budget", {})
    training, budget = experiment.training, experiment.budget
    if not isinstance(budget, Budget):
        name = given.get("method", label)
        paper = registry.paper_recipe(registry.get(name))
        if "budget" not in paper and not (paper and less):
            raise ValueError(
                f"methods.{label}: budget 'paper' needs a paper.yaml with a budget beside {name}"
                + (
                    "; this one has none, so give the arm its own, budget: {steps: N}"
                    if paper
                    else ""
                )
            )
        given = {"method": name, **paper.get("fields", {}), **given}
        training = _merged(training, paper.get("training", {}), f"{name}'s paper.yaml: training")
        if "budget" in paper:
            budget = Budget.model_validate(paper["budget"])
        else:
            budget, less = _stated(less, f"{experiment.name}: methods.{label}.budget"), {}
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


def _stated(own: Mapping[str, Any], source: str) -> Budget:
    try:
        return Budget.model_validate(own)
    except ValidationError as error:
        raise ValueError(explain(error, source, Budget)) from None


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
        deciding = model_spec(spec).model_dump(
            include={"api", "tokens", "tokenizer", "body"}, exclude_defaults=True
        )
        return [spec["server"], spec["model"], *([deciding] if deciding else [])]
    name, path = models.find(spec, problems.checkpoints())
    described = model_spec(spec)
    # What says nothing is left out, so that a bare name stands for what it always did.
    told = described.model_dump(mode="json", exclude_defaults=True, exclude={"model", "ask"})
    options = [told] if isinstance(described, Checkpoint) and told else []
    if name in problems.checkpoints():
        return [name, problems.micro_version(), *options]
    if isinstance(spec, Mapping) and "ask" in spec:
        name = f"ask {name}"
    files = sorted(file for file in path.glob("*") if file.is_file())
    return [name, [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files], *options]


def keep_capsule(job: Job, experiment: Experiment) -> None:
    """Write what a repetition needs, before the work; conditions that changed since an earlier process are added.

    A student that was trained before there were capsules was so under conditions that nobody knows: {}.
    """
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


def student_model(spec: Any, seed: int = 0, saved: Path | None = None) -> HFModel:
    """The student of a suite's line, its adapter drawn from the training seed; or one that was trained and saved, merged.

    What writes for it is started from the line, so that all students of a suite share one engine.
    """
    known = problems.checkpoints()
    described = model_spec(spec, "student") if saved is None else plain(spec, saved)
    # fp32 weights: small updates would round away in bf16; Accelerate casts the products where that pays. Under an
    # adapter, which is fp32, they are frozen.
    dtype = None if getattr(described, "adapter", None) else "fp32"
    model = models.load(models.trainable(described), checkpoints=known, dtype=dtype, seed=seed)
    if not isinstance(model, HFModel):
        raise ValueError(f"student: {spec!r} cannot be trained; give a Transformers model")
    return models.written(spec, model, known)


def plain(spec: Any, folder: Path | None = None) -> ModelSpec:
    """A student without its adapter, as it is judged; with a folder, as it was saved there: merged, in fp32."""
    described = model_spec(spec, "student")
    assert isinstance(described, Checkpoint)
    update: dict[str, Any] = {} if folder is None else {"model": str(folder)}
    if described.adapter is not None:
        update["adapter"] = None
        if described.engine == "hf":  # the type is that of the weights under the adapter
            update["dtype"] = None
    return described.model_copy(update=update)


def loaders(experiment: Experiment, student: HFModel) -> dict[str, Callable[[], LanguageModel]]:
    """Every model that a method may ask for, loaded on first use and frozen."""
    views = shared(experiment) if student.adapter is not None else ()

    known = problems.checkpoints()

    def loader(name: str, spec: Any) -> Callable[[], LanguageModel]:
        def load() -> Any:
            if name in views:  # each a model of its own, as the ledger tells base and teacher apart
                return student.base()
            if name == "base":
                model = models.load(models.trainable(spec), checkpoints=known)
                return models.written(spec, model.freeze(), known)
            writes = name == "teacher"
            model = models.load(spec, checkpoints=known, tokenizer_of=student, writes=writes)
            return model.freeze() if isinstance(model, HFModel | RewardHF) else model

        return load

    return {name: loader(name, spec) for name, spec in frozen(experiment).items()}


def frozen(experiment: Experiment) -> dict[str, Any]:
    """The lines of the models that are not trained; the base is the student's without its adapter."""
    base = model_spec(experiment.student).model_copy(update={"adapter": None})
    return {"base": base, "teacher": experiment.teacher, **experiment.models}


def shared(experiment: Experiment) -> frozenset[str]:
    """Which of them are the student's own weights with its adapter off."""
    if getattr(model_spec(experiment.student), "adapter", None) is None:
        return frozenset()
    specs = frozen(experiment)
    return frozenset(name for name in specs if model_spec(specs[name]) == specs["base"])


def memory(
    experiment: Experiment,
    student: sizes.Shape,
    others: Mapping[str, sizes.Shape],
    length: int,
    cuda: bool,
) -> sizes.Memory:
    """What a cell holds; a model that is the student with its adapter off has no weights of its own."""
    views, training = shared(experiment), experiment.training
    others = {k: replace(each, itemsize=0.0) if k in views else each for k, each in others.items()}
    return sizes.memory(
        student,
        others,
        sizes.pass_tokens(training, length),
        length,
        cuda,
        training.gradient_checkpointing,
    )


def training_problems(job: Job) -> list[Problem]:
    """The problems that the comparison prepared: loaded once, decontaminated, the same for every cell."""
    return read_problems(job.folder / "problems.jsonl")


def read_problems(path: Path) -> list[Problem]:
    return [Problem(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


# -- what is done already -----------------------------------------------------------------------


def left(job: Job, experiment: Experiment) -> tuple[list[str], bool]:
    """The benchmarks that a cell still has to be judged on, and whether its student is trained."""
    pending = [name for name in experiment.benchmarks if not evaluated(job, experiment, name)]
    return pending, job.label == "base" or recorded(job, experiment)


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
    return short_digest([student, settings, protocol, evaluation.engine(experiment.student)])


def evaluated(job: Job, experiment: Experiment, name: str) -> bool:
    path = job.samples_file(name)
    if not path.is_file() or (job.label != "base" and not job.run_file.is_file()):
        return False
    metadata = pq.read_schema(path).metadata or {}
    return metadata.get(b"key") == evaluation_key(job, experiment, name).encode()


def finished(job: Job, experiment: Experiment) -> bool:
    """Whether nothing is left of a cell."""
    trained = job.label == "base" or recorded(job, experiment)
    return trained and all(evaluated(job, experiment, name) for name in experiment.benchmarks)


def write_json(path: Path, data: Any) -> None:
    """All or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = draft(path)
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
