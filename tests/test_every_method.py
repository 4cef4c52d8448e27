"""The contract: what holds for every registered method, on the real micro world."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness import problems, registry
from harness.config import Adapter, parse
from harness.store import digest
from harness.types import OnPolicy
from tests.benches import TINY, Cut, Run, model, shared_store

NAMES = sorted(registry.methods())


def test_methods_were_found() -> None:
    assert {"sft", "limo", "paced", "heal", "fkl", "rkl", "hard_filter", "akl", "gkd"} <= set(NAMES)
    assert set(TINY) <= set(NAMES)


@pytest.fixture(scope="module", params=NAMES)
def run(request: pytest.FixtureRequest) -> Run:
    """Trained with a teacher that refuses all that the method did not declare."""
    return Run(request.param)


def test_it_trains_and_moves_only_the_student(run: Run) -> None:
    assert len(run.losses) == 4 and all(map(math.isfinite, run.losses))
    assert run.student.identity != run.lab.base.identity == model("student").identity
    assert run.teacher.identity == model("teacher").identity
    assert all(stage["steps"] > 0 for stage in run.trainer.state.stages)


def test_every_stage_has_examples_with_weight(run: Run) -> None:
    assert run.stages and len({stage.name for stage in run.stages}) == len(run.stages)
    for examples in run.examples:
        assert any(example.weight and example.num_loss_tokens for example in examples)


def test_the_training_prompt_is_the_bare_problem(run: Run) -> None:
    by_id = {problem.id: problem for problem in run.lab.problems}
    for example in (e for examples in run.examples for e in examples if e.response):
        assert example.prompt == run.student.encode(problems.render(by_id[example.problem]))


def test_lengths_match(run: Run) -> None:
    for example in (e for examples in run.examples for e in examples):
        for values in (example.loss, example.token_weights):
            assert values is None or len(values) == len(example.response)


def test_what_it_did_is_noted_and_paid_for(run: Run) -> None:
    sources = [stage.source for stage in run.stages]
    problems = list(run.lab.problems)  # who takes them all has chosen nothing that could be noted
    everything = all(isinstance(s, OnPolicy) and list(s.problems) == problems for s in sources)
    assert run.lab.notes or everything
    charged = run.ledger.charged
    assert charged["trained"] > 0 and charged["steps"] == 4
    for use, column in {"generate": "teacher_generated", "logits": "teacher_scored"}.items():
        assert charged[column] > 0 or f"teacher.{use}" not in run.method.required()
    assert charged["teacher_generated"] + charged["teacher_scored"] > 0


def test_a_second_run_pays_the_same_and_spends_nothing_on_the_teacher(run: Run) -> None:
    again = Run(run.method.name)
    assert again.losses == run.losses and again.student.identity == run.student.identity
    assert again.ledger.spent["teacher_generated"] == 0
    costs = {k: v for k, v in again.ledger.charged.items() if k != "seconds"}
    assert costs == {k: v for k, v in run.ledger.charged.items() if k != "seconds"}


def test_a_training_seed_changes_the_student_and_no_teacher_sample(run: Run) -> None:
    other = Run(run.method.name, seed=1)
    assert other.student.identity != run.student.identity
    assert other.ledger.spent["teacher_generated"] == 0


@pytest.mark.parametrize("steps", [1, 3])
def test_a_run_that_was_cut_ends_in_the_same_student(run: Run, steps: int, tmp_path: Path) -> None:
    """Executed again from its start, a method meets the student as it was between the stages, and the same samples."""
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(Cut):
        Run(run.method.name, checkpoint=path, cut_after=steps)
    again = Run(run.method.name, checkpoint=path)
    assert again.losses == run.losses and again.student.identity == run.student.identity
    for quantity in ("teacher_generated", "teacher_scored", "trained", "steps"):
        assert again.ledger.charged[quantity] == run.ledger.charged[quantity]
    assert again.ledger.purposes == run.ledger.purposes


def test_it_trains_an_adapter_alone(run: Run) -> None:
    """With the student's own weights off the optimizer's hands, and as the base that the method may ask for."""
    other = Run(run.method.name, adapter=Adapter(r=4))
    assert len(other.losses) == 4 and all(map(math.isfinite, other.losses))
    assert other.student.base_identity == model("student").identity != other.student.identity
    assert other.losses[0] == pytest.approx(
        run.losses[0], rel=1e-4
    )  # it begins as the student does


def test_its_config_survives_json_and_says_what_each_field_means(run: Run) -> None:
    cls = type(run.method)
    assert cls.model_validate_json(run.method.model_dump_json()) == run.method
    for field in registry.fields(cls):
        assert field.meaning, f"{cls.name}.{field.name} needs a trailing comment"
    assert cls.paper and registry.summary(cls) and registry.card(cls)


def test_its_paper_recipe_is_valid() -> None:
    for name in NAMES:
        recipe = registry.paper_recipe(registry.get(name))
        registry.build(name, recipe.get("fields", {}))
        if "budget" in recipe:
            suite = {
                "name": "x",
                "student": "s",
                "teacher": "t",
                "problems": "p",
                "benchmarks": "b",
            }
            recipe_parts = {"training": recipe.get("training", {}), "budget": recipe["budget"]}
            parse({**suite, "methods": [name], "reference": name, **recipe_parts})


DIGEST = """
import pathlib, sys
import torch; torch.set_num_threads(1)
from tests.test_every_method import done
for name in sys.argv[2:]:
    print(name, done(name, pathlib.Path(sys.argv[1])))
"""


def done(name: str, store: Path | None = None) -> str:
    """What a method made and learnt."""
    run = Run(name, store=store)
    made = [[[e.problem, e.response, e.weight] for e in examples] for examples in run.examples]
    return digest([*made, run.losses])


@pytest.mark.parametrize("seed", ["1", "2"])
def test_it_is_the_same_under_another_hash_seed(seed: str) -> None:
    """Method code must not depend on the order of sets: a resumed run executes it again."""
    found = subprocess.run(
        [sys.executable, "-c", DIGEST, str(shared_store()), *NAMES],
        env={**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.splitlines() == [f"{name} {done(name)}" for name in NAMES]
