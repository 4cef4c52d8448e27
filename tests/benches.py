"""A real lab on the micro world, small enough for a unit test, and a teacher that refuses what was not declared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest

from benchmarks import CHECKPOINTS, PROBLEMS
from harness import registry
from harness.config import Adapter, Budget, SamplingSettings, Training
from harness.lab import Workbench
from harness.ledger import Ledger
from harness.models.hf import HFModel
from harness.models.scripted import Scripted
from harness.registry import Method
from harness.store import Store
from harness.trainer import Trainer
from harness.types import Example, OffPolicy, Problem, Request, Sampling, Stage, Trace

SAMPLING = SamplingSettings(temperature=1.0, max_new_tokens=120)
TRAINING = Training(batch_size=8, learning_rate=1e-3, warmup=0.0, checkpoint_every=2)
# What makes a method's stages non-empty on 24 easy problems and 4 samples; none for a method that needs no help.
TINY: dict[str, dict[str, Any]] = {
    "sft": {"samples": 4},
    "limo": {"weak_k": 2, "weak_max": 2, "strong_k": 4, "strong_max": 4, "keep": 12},
    "paced": {"rollouts": 4, "references": 4},
    "heal": {
        **{
            "samples": 4,
            "hints": 2,
            "paths": 1,
            "candidates": 4,
            "cap": 1,
            "hard": 1.0,
            "extreme": 1.0,
        },
        **{"segment": "line", "min_step": 1, "min_new_steps": 1},
    },
    "vcrd": {"steps": "line", "positions": 2, "refresh": 0, "rollouts": 2},
}
HARD = {"heal"}  # methods that need problems at which the teacher fails


@cache
def problems(n: int = 24, hard: bool = False) -> tuple[Problem, ...]:
    """Easy enough that the student solves some and not all; or hard enough for that to hold of the teacher."""
    levels = (6, 7) if hard else (2, 3)
    return tuple(PROBLEMS["micro_math"].load("train", n, levels=levels, families=("reduce",)))


def model(name: str, adapter: Adapter | None = None, seed: int = 0) -> HFModel:
    path = CHECKPOINTS[f"micro/{name}"]
    return HFModel.load(path, device="cpu", name=f"micro/{name}", adapter=adapter, seed=seed)


@cache
def shared_store() -> Path:
    """One store for a whole session: samples that a test needs again are read, as in a comparison."""
    import atexit
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="store-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


class Refusing:
    """A model that does only what a method declared that it needs of it, and knows its own name."""

    ALWAYS = frozenset({"name", "identity", "encode", "tokenize", "decode", "capabilities"})
    ALWAYS |= {"version", "vocabulary", "vocabulary_digest", "num_parameters", "model"}
    OF: ClassVar = {
        "generate": {"generate", "plan", "generate_block"},
        "score": {"score"},
        "logits": {"hidden", "head", "head_weight", "head_bias"},
    }

    def __init__(self, model: HFModel, allowed: Iterable[str]) -> None:
        self._model = model
        self._allowed = self.ALWAYS.union(*(self.OF[what] for what in allowed))

    def __getattr__(self, name: str) -> Any:
        if name not in self._allowed:
            raise AssertionError(f"{name} was used and not declared in `needs`")
        return getattr(self._model, name)


class Cut(Exception):
    """A run that was ended from outside."""


class Run:
    """One method trained for a few steps, with everything that a test may look at."""

    def __init__(
        self,
        name: str,
        fields: dict[str, Any] | None = None,
        *,
        steps: int = 4,
        budget: Budget | None = None,
        seed: int = 0,
        store: Path | None = None,
        items: Sequence[Problem] | None = None,
        caps: dict[str, int] | None = None,
        train: bool = True,
        teacher: Any = None,
        checkpoint: Path | None = None,
        cut_after: int | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        self.method: Method = registry.build(name, TINY.get(name, {}) if fields is None else fields)
        self.student, self.ledger = model("student", adapter, seed), Ledger(caps)
        needs = [
            need.partition(".")[2] for need in self.method.required() if need.startswith("teacher.")
        ]
        self.teacher = teacher or Refusing(model("teacher").freeze(), needs)
        self.cut_after = cut_after  # optimizer steps
        self.trainer = Trainer(
            self.student,
            TRAINING,
            budget or Budget(steps=steps),
            seed,
            self.ledger,
            checkpoint=checkpoint,
            report=self._report,
        )
        self.lab = Workbench(
            self.student,
            {
                "base": lambda: self.student.base() if adapter else model("student").freeze(),
                "teacher": lambda: self.teacher,
            },
            items or problems(hard=name in HARD),
            Store(store or shared_store()),
            self.ledger,
            SAMPLING,
            seed=seed,
            oracle=PROBLEMS["micro_math"].oracle,
            clock=lambda: self.trainer.clock,
            consumed=lambda: self.trainer.consumed,
        )
        self.lab.notes.update(self.trainer.resume() or {})
        self.stages: list[Stage] = []
        self.examples: list[list[Example]] = []
        for index, stage in enumerate(self.method.stages(self.lab)):
            self.stages.append(stage)
            self.examples.append(self._examples(stage))
            if train:
                self.trainer.run(index, stage, lambda: self.lab.teacher, self.lab.notes)

    def _report(self, phase: str, done: int, total: int) -> None:
        if phase == "train" and done == self.cut_after:
            raise Cut

    def _examples(self, stage: Stage) -> list[Example]:
        if isinstance(stage.source, OffPolicy):
            return list(stage.source.examples)
        before = self.ledger.to_dict()  # a look costs nothing
        made = list(stage.source.make(stage.source.problems[:8]))
        self.ledger.load(before)
        return made

    @property
    def losses(self) -> list[float]:
        return [row["loss"] for row in self.trainer.state.curve]


def scripted(
    teacher: dict[str, list[Any]],
    student: dict[str, list[Any]] | None = None,
    items: Sequence[Problem] = (),
    **settings: Any,
) -> Workbench:
    """A lab whose models say what the tables say; problems are made for the table's ids, their answer is 7."""
    made = items or [Problem(name, f"{name}=?", "7", verifier="exact") for name in teacher]
    author = Scripted(teacher, name="teacher")
    pupil = Scripted(student or {name: [""] for name in teacher}, name="student")
    return Workbench(
        pupil,
        {"base": lambda: pupil, "teacher": lambda: author},
        made,
        Store(shared_store() / "scripted"),
        settings.pop("ledger", Ledger()),
        SAMPLING,
        **settings,
    )


def listen(lab: Workbench, monkeypatch: pytest.MonkeyPatch) -> list[Sampling]:
    """What the student is asked for from now on, in a suite whose own settings are others."""
    asked: list[Sampling] = []
    generate = lab.student.generate

    def heard(requests: Sequence[Request], sampling: Sampling) -> list[list[Trace]]:
        asked.append(sampling)
        return generate(requests, sampling)

    monkeypatch.setattr(lab.student, "generate", heard)
    monkeypatch.setattr(lab, "_sampling", SamplingSettings(temperature=0.6, top_p=0.9, top_k=5))
    return asked


def answer(text: str, think: str = "1") -> str:
    return f"<think>\n{think}\n</think>\n{text}"


FULL = ("qwen3-math", "qwen3-code", "paced-paper", "heal-paper", "vcrd-paper")

# Qwen3-1.7B and Qwen3-8B as published
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128, "num_key_value_heads": 8,
    "max_position_embeddings": 40960, "vocab_size": 151936,
}  # fmt: skip
SMALL = {**QWEN3, "hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 16,
         "intermediate_size": 6144, "tie_word_embeddings": True}  # fmt: skip
LARGE = {**QWEN3, "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32,
         "intermediate_size": 12288, "tie_word_embeddings": False}  # fmt: skip


def without_weights(place: Path, **changes: Any) -> tuple[str, str]:
    """Folders of a student and a teacher of that size that hold their configurations alone; changes are of the teacher's."""
    for name, told in (("student", SMALL), ("teacher", {**LARGE, **changes})):
        (place / name).mkdir()
        (place / name / "config.json").write_text(json.dumps(told), encoding="utf-8")
    return str(place / "student"), str(place / "teacher")
