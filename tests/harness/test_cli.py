"""The command line: quick, helpful, and one line for a mistake."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console
from typer.testing import CliRunner

from harness import cli, evaluation, registry
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
        "verify",
        "report",
        "ui",
        "methods",
        "benchmarks",
        "doctor",
        "plan",
        "cache",
        "mechanisms",
        "sweep",
        "reproduce",
        "export",
        "import",
    ):
        assert command in done.stdout


@pytest.mark.parametrize(
    "words, said",
    [
        ((), "say which arm to tune with --method NAME, or tune all with --all"),
        (("--method", "sft", "--all"), "say which arm to tune"),
        (("--method", "sft", "--set", "sweep.objective=micro_math"), "is a test benchmark"),
        (("--method", "sft", "--set", "sweep.samples.high=0.5"), "is out of the field's bounds"),
        (("--method", "paced", "--set", "sweep.share=2"), "less than or equal to 1 (got 2)"),
        (("--method", "paced", "--storage", "postgresq://u:word@h/d"), "cannot use postgresq://"),
    ],
)
def test_a_sweep_that_cannot_be_is_one_line(
    words: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    done = retort("sweep", "quickstart", *words, cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr and "word" not in done.stderr
    assert done.stderr.startswith("retort: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "results" / "mlflow.db").exists()


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
        (["plan", "quickstart", "--gpu", "h10"], "did you mean 'h100'"),
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


# retort eval


def evaluated(folder: Path) -> tuple[Path, list[dict[str, Any]]]:
    """The one file of samples there, and its rows."""
    (path,) = (folder / "eval" / "micro--student").glob("*.parquet")
    return path, evaluation.read_records(path)


EVAL = ("eval", "micro/student", "--tasks", "micro_math")


def test_eval_says_how_it_sampled_and_keeps_every_sample(tmp_path: Path) -> None:
    words = (*EVAL, "--limit", "8", "--results", str(tmp_path))
    done = retort(*words, "--n", "2", "--top-p", "0.9", "--max-new-tokens", "96", COLUMNS="200")
    assert done.returncode == 0, done.stderr
    assert "avg@2, temperature 0.6, top_p 0.9, at most 96 tokens" in done.stdout
    assert "pass@2" in done.stdout and "maj@2" in done.stdout
    path, rows = evaluated(tmp_path)
    assert str(path) in done.stdout
    assert [(r["sample"], r["method"]) for r in rows] == [
        (0, "micro/student"),
        (1, "micro/student"),
    ] * 8
    said = json.loads(pq.read_schema(path).metadata[b"protocol"])
    assert said["benchmarks"]["micro_math"]["sampling"]["top_p"] == 0.9
    assert "greedy" in retort(*words, COLUMNS="200").stdout


def test_an_aa_run_says_what_other_batches_move(tmp_path: Path) -> None:
    words = (*EVAL, "--limit", "9", "--max-new-tokens", "64", "--results", str(tmp_path), "--aa")
    said = retort(*words, COLUMNS="200").stdout
    found = re.search(r"A/A, in other batches (\d+) of 9 texts and (\d+) verdicts differ", said)
    assert found, said
    assert int(found[2]) <= int(found[1]) <= 9


def test_an_aa_run_draws_again_and_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four samples one has another text, and another one another verdict."""
    old = [{"text": text, "correct": text == "a"} for text in "abcd"]
    new = [{"text": text, "correct": text in "ab"} for text in ("a", "b", "c", "e")]
    seen: list[int] = []

    class Model:
        name, rows = "m", 512

    model: Any = Model()

    def again(given: Any, *_: Any, **__: Any) -> Any:
        seen.append(given.rows)
        return {"x": new}

    monkeypatch.setattr(evaluation, "evaluate", again)
    monkeypatch.setattr(evaluation, "read_records", lambda path: old)
    rows = [{"benchmark": "x", "n_problems": 4, "file": "f"}]
    found = evaluation.noise(model, {"x": {}}, rows, seed=0, progress=lambda *_: None)
    assert found == {"x": {"samples": 4, "texts": 1, "verdicts": 1, "delta": 0.25}}
    assert seen == [1] and model.rows == 512
    server: Any = SimpleNamespace(name="server")
    with pytest.raises(ValueError, match="an A/A run changes the batches of a Transformers model"):
        evaluation.noise(server, {}, rows, seed=0, progress=lambda *_: None)


def test_a_larger_n_adds_to_what_is_there(tmp_path: Path) -> None:
    words = (*EVAL, "--limit", "8", "--results", str(tmp_path))
    retort(*words, "--n", "2")
    path, two = evaluated(tmp_path)
    path.unlink()
    before = segments(tmp_path)
    assert retort(*words, "--n", "4").returncode == 0
    _, four = evaluated(tmp_path)
    assert [r for r in four if r["sample"] < 2] == two and len(four) == 32
    assert before.items() < segments(tmp_path).items()


def test_eval_goes_on_after_kill_9(tmp_path: Path) -> None:
    """What was answered before the kill is not asked again, and the samples are those of a run that nobody cut."""
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    command = [sys.executable, "-m", "harness", *EVAL, "--n", "4", "--limit", "400", "--results"]
    process = subprocess.Popen([*command, str(cut)], stderr=subprocess.DEVNULL)
    try:
        while not segments(cut) and process.poll() is None:
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    before = segments(cut)
    assert before and not (cut / "eval").exists()
    assert retort(*command[3:], str(cut)).returncode == 0
    after = segments(cut)
    assert before.items() < after.items()  # the same files, not written again
    assert retort(*command[3:], str(whole)).returncode == 0
    assert segments(whole).keys() == after.keys()
    assert evaluated(cut)[1] == evaluated(whole)[1]


def segments(results: Path) -> dict[str, int]:
    """The finished blocks of answers in the store, each with its inode."""
    return {p.name: p.stat().st_ino for p in (results / "store/responses").rglob("*.arrow")}
