"""The command line: quick, helpful, and one line for a mistake."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from harness import cli, registry
from harness.registry import Method


def retort(
    *words: str, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "harness", *words],
        cwd=cwd,
        env={**os.environ, "COLUMNS": "120", "NO_COLOR": "1", **environment},
        capture_output=True,
        text=True,
    )


def test_help_lists_the_commands() -> None:
    done = retort("--help")
    assert done.returncode == 0
    for command in (
        "compare",
        "eval",
        "report",
        "ui",
        "methods",
        "benchmarks",
        "doctor",
        "cache",
        "mechanisms",
    ):
        assert command in done.stdout


def test_methods_lists_all_and_shows_one() -> None:
    done = retort("methods")
    assert done.returncode == 0
    for word in ("sft", "limo", "paced", "arXiv:2603.11178"):
        assert word in done.stdout
    one = retort("methods", "paced")
    assert "exponent on p (eq. 3)" in one.stdout and "0 to 3" in one.stdout
    assert "Where we differ and why" in one.stdout and "batch_sum1" in one.stdout


def test_heal_says_what_each_number_rests_on() -> None:
    fields = retort("methods", "heal").stdout.partition("search or choices")[2]
    for tag in ("[paper]", "[secondary]", "[reading]", "[measured]"):
        assert tag in fields


class Tagged(Method):
    alpha: float = 1.0  # weight [paper], found in [secondary] [/]


def test_tags_in_square_brackets_are_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "methods", lambda: {"tagged": Tagged})
    monkeypatch.setattr(registry, "card", lambda cls: "# A card\n\n- tau = 1 [paper] and [bold]")
    monkeypatch.setattr(cli, "out", Console(width=120))
    done = CliRunner().invoke(cli.app, ["methods", "tagged"], catch_exceptions=False)
    assert "weight [paper], found in [secondary] [/]" in done.stdout
    assert "tau = 1 [paper] and [bold]" in done.stdout


def test_benchmarks_lists_the_tasks() -> None:
    done = retort("benchmarks")
    assert done.returncode == 0, done.stderr
    for word in ("micro_math", "micro_code", "gsm8k"):
        assert word in done.stdout


def test_doctor_examines_a_suite() -> None:
    done = retort("doctor", "quickstart")
    assert done.returncode == 0, done.stdout + done.stderr
    for word in ("vocabulary", "end tokens", "thinking tags", "memory", "benchmark micro_math"):
        assert word in done.stdout
    bad = retort("doctor", "quickstart", "--set", "methods.x={}")
    assert bad.returncode == 1 and "unknown method 'x'" in bad.stdout


def test_cache_shows_an_empty_store(tmp_path: Path) -> None:
    done = retort("cache", "show", cwd=tmp_path)
    assert done.returncode == 0 and "kind" in done.stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["compare", "quikstart"], "did you mean 'quickstart'"),
        (["compare", "quickstart", "--methods", "pacd"], "did you mean 'paced'"),
        (["compare", "quickstart", "--set", "budget.stps=3"], "did you mean 'steps'"),
        (["compare", "quickstart", "--set", "budget"], "write key.key=value"),
        (["mechanisms", "quickstart"], "an oracle judges one set and a mixture has none"),
        (["methods", "pacd"], "did you mean 'paced'"),
        (["report", "nothing"], "no finished comparison 'nothing'"),
        (["eval", "micro/studnt", "--tasks", "micro_math"], "micro/student"),
        (["eval", "micro/student", "--tasks", "micro_mth"], "micro_math"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(
    tmp_path: Path, words: list[str], expected: str
) -> None:
    done = retort(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("retort: ") and done.stderr.count("\n") == 1
    assert expected in done.stderr and "Traceback" not in done.stderr
