"""The suites that are shipped: each is valid, those on real text run, and the full-size ones are planned, and run with
micro models in place."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import SUITES
from harness import compare, config, registry
from harness.compare import check
from harness.config import load, model_spec
from harness.plan import forecast
from harness.space import space
from tests.benches import FULL

NAMES = sorted(path.stem for path in SUITES.glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_every_suite_is_valid(name: str) -> None:
    setting = config.load(SUITES / f"{name}.yaml")
    assert setting.name == name
    if name not in FULL:  # whose models are not here: tests/harness/test_doctor.py
        check(setting, list(setting.methods))
    for label in setting.methods:
        space(setting, label)


def test_the_suites_were_found() -> None:
    assert {"quickstart", "gsm8k-smoke", "heal-ceiling", "heal-ablations", *FULL} <= set(NAMES)


# The full-size ones

STEPS = {"segment": "line", "min_step": "1", "min_new_steps": "1"}  # of a micro trace: one a line
MICRO = {
    "heal": {**STEPS, "samples": "6", "hints": "4", "paths": "2", "candidates": "4", "cap": "4"},
    "limo": {"weak_max": "4", "strong_k": "6", "strong_max": "6"},
    "vcrd": {"steps": "line", "max_step": "48", "positions": "2", "rollouts": "2"},
}


def small(name: str) -> Iterator[str]:
    """Two steps on five micro problems by micro models, every arm of the suite, whatever it says of its own budget; judged on
    five micro problems, and with RETORT_DATA on five of each of its own benchmarks."""
    setting = config.load(SUITES / f"{name}.yaml")
    judged: dict[str, dict[str, Any]] = {
        "micro_code" if "code" in name else "micro_math": {"limit": 5}
    }
    if os.environ.get("RETORT_DATA"):
        judged |= {own: {"limit": 5, "n": 1, "max_new_tokens": 16} for own in setting.benchmarks}
    if "livecodebench" in judged:  # the micro student has 2,048 positions, a token is a character
        judged["livecodebench"]["levels"] = [1]
    yield from ("student=micro/student", "teacher=micro/teacher", "seeds=1", "threads=1")
    yield from ("problems={micro_math: {n: 5, levels: [3, 4]}}", f"benchmarks={judged}")
    yield from ("budget={steps: 2}", "training.batch_size=4", "training.precision=auto")
    yield from ("sampling.max_new_tokens=120", "sampling.temperature=1.0")
    for label, fields in setting.methods.items():
        own = {"budget": "{}", "training": "{}", **MICRO.get(fields.get("method", label), {})}
        yield from (f"methods.{label}.{key}={value}" for key, value in own.items())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder, and one store, for all five: the teacher writes once."""
    return tmp_path_factory.mktemp("suites")


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_a_full_size_suite_runs_with_micro_models(name: str, place: Path) -> None:
    """Of real problems the models know no English: nothing of them is right, nothing breaks, all is counted."""
    summary = compare(name, overrides=[*small(name)], results=place, quiet=True, track=False)
    setting = config.load(SUITES / f"{name}.yaml")
    judged = {*summary["config"]["benchmarks"]}
    assert judged > {*setting.benchmarks} if os.environ.get("RETORT_DATA") else len(judged) == 1
    cells = {(cell["method"], cell["benchmark"]): cell for cell in summary["cells"]}
    assert {*cells} == {(arm, each) for arm in ("base", *setting.methods) for each in judged}
    assert {cell["n_problems"] for cell in cells.values()} == {5}
    assert {cells[of]["accuracy"] for of in cells if not of[1].startswith("micro_")} <= {0}
    for arm in summary["arms"]:
        if arm["method"] != "base":
            charged = arm["ledger"]["charged"]
            assert charged["steps"] == 2 and charged["trained"] > 0, arm["method"]


if os.environ.get("RETORT_DATA"):

    @pytest.mark.slow
    def test_gsm8k_smoke_runs_on_real_data(tmp_path: Path) -> None:
        """Real problems through models that know no English: nothing is right, nothing breaks, all is counted."""
        summary = compare("gsm8k-smoke", limit=10, results=tmp_path, quiet=True, track=False)
        assert [cell["method"] for cell in summary["cells"]] == ["base", "sft", "limo", "paced"]
        for cell in summary["cells"]:
            assert cell["n_problems"] == 10
            assert cell["accuracy"] == 0 and cell["unparsed"] == 10
        assert {pair["verdict"] for pair in summary["pairs"]} == {"cannot tell"}


def test_the_papers_suites_say_what_the_papers_recipes_say() -> None:
    """Where a suite writes a recipe out, because the paper's budget is not known, it is that of paper.yaml."""
    for name, method, label in (("heal-paper", "heal", "heal"), ("vcrd-paper", "vcrd", "vcrd")):
        setting = config.load(SUITES / f"{name}.yaml")
        paper = registry.paper_recipe(registry.get(method))
        assert paper["fields"] and paper["training"] and "budget" not in paper
        told = setting.methods[label]
        assert {key: told[key] for key in paper["fields"]} == paper["fields"]
        training = setting.training.model_dump()
        assert {key: training[key] for key in paper["training"]} == paper["training"]


@pytest.mark.parametrize("name", FULL)
def test_a_full_size_suite_is_planned_without_its_models_and_data(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At short responses, which are quick. Its doctor is asked the same in tests/harness/test_doctor.py."""
    monkeypatch.delenv("RETORT_DATA", raising=False)
    setting = load(SUITES / f"{name}.yaml")
    found = forecast(name, gpu="H100 SXM", price=2.0, num_problems=24, tokens=512, quiet=True)
    assert [*found["arms"]] == [*setting.methods]
    assert not [label for label, arm in found["arms"].items() if "failed" in arm]
    hours = found["hours"]
    assert found["cost"] == pytest.approx(2.0 * hours["whole"]) and hours["training"] > 1
    told = "\n".join(found["assumed"])
    assert f"student {model_spec(setting.student).model} is not here" in told  # type: ignore[union-attr]
    assert all(f"training on {each}: " in told for each in setting.problems)
    assert {*found["evaluation"]["missing"]} == {*setting.benchmarks}
