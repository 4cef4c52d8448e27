"""What the README tells people to type is run here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from harness import config, registry
from harness.space import space

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SWEEPS = (ROOT / "docs/sweeps.md").read_text(encoding="utf-8")


def block(language: str, containing: str, page: str = README) -> str:
    found = [b for b in re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL) if containing in b]
    assert len(found) == 1
    return str(found[0])


@pytest.mark.slow
def test_the_first_suite_runs_as_written_but_for_its_size(tmp_path: Path) -> None:
    (tmp_path / "first.yaml").write_text(block("yaml", "name: first"))
    small = ["--set", "budget.steps=4", "--set", "problems.micro_math.n=60", "--limit", "20"]
    small += ["--set", "threads=1"]  # two that wait for each other crawl on a busy machine
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for words in (["doctor", "first.yaml"], ["compare", "first.yaml", *small], ["report", "first"]):
        done = subprocess.run(
            [sys.executable, "-m", "harness", *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        if words[0] == "compare":
            for word in ("paced-flat", "results/first/report.html", "retort ui"):
                assert word in done.stdout.replace("\n", "")
    assert (tmp_path / "results/first/models/sft/1/model.safetensors").is_file()
    assert (tmp_path / "results/mlflow.db").is_file()


def test_the_python_example_calls_what_there_is() -> None:
    code = block("python", "from harness import compare")
    assert compile(code, "README.md", "exec")
    done = subprocess.run(
        [sys.executable, "-c", "from harness import compare; assert callable(compare)"], cwd=ROOT
    )
    assert done.returncode == 0


def test_the_example_method_is_a_whole_method(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.benches import Run

    prelude = (
        "from collections.abc import Iterator\n"
        "from harness.config import search\n"
        "from harness.objectives import nll\n"
        "from harness.registry import Method, method\n"
        "from harness.types import Lab, OffPolicy, Stage\n"
    )
    names: dict[str, object] = {"__name__": "readme"}
    known = registry.methods()
    registered = dict(registry._METHODS)
    try:
        exec(prelude + block("python", "class SeqKD"), names)
        cls = names["SeqKD"]
        monkeypatch.setattr(registry, "methods", lambda: {**known, "seqkd": cls})
        run = Run("seqkd", {"samples": 2})
    finally:
        registry._METHODS.clear()
        registry._METHODS.update(registered)
    assert len(run.losses) == 4 and run.examples[0]


def test_the_sweep_section_is_valid() -> None:
    suite = config.load(ROOT / "benchmarks/suites/quickstart.yaml")
    section = yaml.safe_load(block("yaml", "sweep:", SWEEPS))
    setting = config.parse({**suite.model_dump(mode="json"), **section})
    found = space(setting, "paced")
    assert list(found.dimensions)[-1] == "switch" and found.dimensions["alpha"].high == 2
    assert found.fixed == {"rollouts": 16}
    assert {"training.learning_rate", "budget.steps"} < set(space(setting, "sft").dimensions)


def test_every_command_of_the_table_exists() -> None:
    from typer.main import get_command

    from harness.cli import app

    commands = set(get_command(app).commands)  # type: ignore[attr-defined]
    told = set(re.findall(r"`retort ([a-z]+)", README))
    assert told <= commands and len(told) >= 7
