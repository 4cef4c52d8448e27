"""One YAML is one experiment; every mistake names the file, the key and the nearest valid name."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness import config, registry
from harness.config import Benchmark, Budget, Experiment

SUITE = """
name: try
student: micro/student
teacher: micro/teacher
problems: micro_math
benchmarks: {micro_math: {limit: 7}, micro_code: {}}
budget: {steps: 50}
methods: {sft: {samples: 3}, more: {method: sft, keep: 2}}
"""


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    path = tmp_path / "try.yaml"
    path.write_text(SUITE)
    return path


def test_short_forms_and_overrides(suite: Path) -> None:
    setting = config.load(
        suite, ["budget.steps=60", "methods.sft.samples=5", "problems.micro_math.n=9", "name=other"]
    )
    assert setting.problems == {"micro_math": {"n": 9}}
    assert setting.benchmarks == {"micro_math": Benchmark(limit=7), "micro_code": Benchmark()}
    assert setting.budget == Budget(steps=60) and setting.name == "other"
    assert setting.methods == {"sft": {"samples": 5}, "more": {"method": "sft", "keep": 2}}


def test_an_override_of_a_model_that_has_only_a_name(suite: Path) -> None:
    setting = config.load(suite, ["student.adapter.r=8", "teacher.engine=vllm", "models.judge=x/y"])
    assert setting.student == {"model": "micro/student", "adapter": {"r": 8}}
    assert setting.teacher == {"model": "micro/teacher", "engine": "vllm"}
    more = config.load(suite, ["models.judge=x/y", "models.judge.dtype=bf16"])
    assert more.models == {"judge": {"model": "x/y", "dtype": "bf16"}}
    with pytest.raises(ValueError, match=r"student: unknown key 'adapter.rank'"):
        config.load(suite, ["student.adapter.rank=8"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("budgt.steps=5", ["unknown key 'budgt'", "did you mean 'budget'"]),
        ("budget.stps=5", ["unknown key 'budget.stps'", "did you mean 'steps'"]),
        ("training.batch_siz=5", ["did you mean 'batch_size'"]),
        ("benchmarks.micro_math.limt=5", ["benchmarks.micro_math.limt", "did you mean 'limit'"]),
        ("seeds=none", ["'seeds'", "integer", "'none'"]),
        ("budget.trained_tokens=5", ["exactly one of", "steps"]),
        ("benchmarks.micro_math={n: 4, temperature: 0}", ["greedy", "temperature"]),
        ("benchmarks.micro_math.bands={top: []}", ["bands.top", "some of the levels"]),
        (
            "benchmarks.micro_math={levels: [1, 2], bands: {top: [2, 3]}}",
            ["bands.top", "some of the levels [1, 2], got [2, 3]"],
        ),
        ("reference=stf", ["'stf'", "sft"]),
        ("name=store", ["results/store is not for a suite", "take another name"]),
        ("methods.base={}", ["'base'", "untrained"]),
        ("methods.a/b={}", ["'a/b'", "letters"]),
        ("methods.a.method=5", ["methods.a.method", "got 5"]),
        ("methods=[sft, {paced: {}}]", ["a list holds names only", "paced"]),
        ("problems.micro_math.n=abc", ["problems.micro_math.n", "'abc'"]),
        ("problems.micro_math.levels=3", ["problems.micro_math.levels", "got 3"]),
        ("teacher={modle: x}", ["teacher", "{traces: file.jsonl}"]),
        ("data_seeds=[0, 0]", ["data_seeds", "each once"]),
        ("budget.caps={teacher_scored: -1}", ["teacher_scored", "greater than or equal to 0"]),
    ],
)
def test_a_mistake_is_named(suite: Path, override: str, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        config.load(suite, [override])
    assert str(suite) in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_an_override_that_is_no_yaml_is_named(suite: Path) -> None:
    with pytest.raises(ValueError, match=r"--set 'name=\['.*not valid YAML"):
        config.load(suite, ["name=["])


def test_broken_yaml_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("name: a\nmethods: {sft: [}\n")
    with pytest.raises(ValueError, match=r"broken\.yaml:2"):
        config.load(path)


def test_a_missing_suite_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text("{}")
    with pytest.raises(ValueError, match="did you mean 'quickstart'"):
        config.find_suite("quikstart", [tmp_path])


def test_method_fields_are_checked_with_their_label() -> None:
    with pytest.raises(ValueError, match=r"methods\.paced.*'alpah'.*did you mean 'alpha'"):
        registry.build("paced", {"alpah": 1}, "suite.yaml")
    with pytest.raises(ValueError, match=r"'alpha'.*less than or equal to 20.*got 21"):
        registry.build("paced", {"alpha": 21.0}, "suite.yaml")
    with pytest.raises(ValueError, match=r"unknown method 'pacd'.*did you mean 'paced'"):
        registry.build("x", {"method": "pacd"}, "suite.yaml")
    for part, given in (("training", 5), ("budget", "paper")):
        data = {"name": "s", "student": "a", "teacher": "b", "problems": [], "benchmarks": []}
        data |= {"budget": {"steps": 9}, "reference": "base", "methods": {"paced": {part: given}}}
        with pytest.raises(ValueError, match=rf"methods.paced.{part}: a mapping .*got {given!r}"):
            config.parse(data)


def test_the_hash_is_of_what_decides_results(suite: Path) -> None:
    one = config.load(suite)
    assert config.load(suite, ["name=b", "workers=2"]).hash == one.hash
    assert config.load(suite, ["training.learning_rate=0.5"]).hash != one.hash


def test_search_holds_default_and_range_and_validates() -> None:
    fields = {field.name: field for field in registry.fields(registry.get("paced"))}
    assert fields["alpha"].default == 1.0
    assert fields["alpha"].search == {"low": 0.0, "high": 3.0, "log": False}
    assert "exponent on p" in fields["alpha"].meaning
    keep = {field.name: field for field in registry.fields(registry.get("limo"))}["keep"]
    assert keep.search is not None and keep.search["log"]
    assert (
        registry.build("limo", {"keep": 5000}) is not None
    )  # beyond the searched range, allowed by le


def test_an_experiment_survives_json(suite: Path) -> None:
    one = config.load(suite)
    assert Experiment.model_validate_json(one.model_dump_json()) == one
