"""Two processes train like one: DDP and FSDP2, as `accelerate launch` starts them with the committed configurations."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import cell, cli
from harness.compare import check, compare
from harness.config import Experiment
from harness.store import Store
from tests import ranks as program

ROOT = Path(__file__).parent.parent.parent
CONFIGS = ROOT / "benchmarks" / "suites" / "accelerate"


def launch(config: str, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A program on two ranks; it ends by itself, or with the error of one of them."""
    options = ["--config_file", str(CONFIGS / f"{config}.yaml"), "--main_process_port", "0"]
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *options, "-m", *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One process, whole, and the checkpoint of one that was cut."""
    folder = tmp_path_factory.mktemp("one")
    found = program.run(folder / "whole.pt", folder / "whole")
    program.cut(folder / "cut.pt", folder / "cut")
    found["lean"] = program.run(folder / "lean.pt", folder / "lean", lean=True)
    program.cut(folder / "thin.pt", folder / "thin", lean=True)
    return folder, found


def copied(source: Path, target: Path) -> Path:
    """What a cut run left, for another to go on from."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for file in source.parent.glob(f"{source.stem}*.pt"):
        shutil.copy(file, target.with_name(file.name.replace(source.stem, target.stem)))
    return target


def same(run: dict[str, Any], reference: dict[str, Any]) -> None:
    """Up to rounding: losses, norms of gradients before they are clipped, weights; and the very same samples and costs."""
    for quantity in ("losses", "norms", "weights"):
        assert run[quantity] == pytest.approx(reference[quantity], rel=1e-5), quantity
    assert run["seen"][-1] == reference["seen"][-1]
    assert counted(run["charged"]) == counted(reference["charged"])


def counted(costs: dict[str, float]) -> dict[str, float]:
    return {quantity: amount for quantity, amount in costs.items() if quantity != "seconds"}


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "fsdp2"])
def test_two_ranks_train_like_one_and_go_on_from_each_others_checkpoints(
    config: str, one: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, reference = one
    assert len(reference["losses"]) == program.STEPS
    copied(folder / "cut.pt", tmp_path / "again.pt")
    copied(folder / "thin.pt", tmp_path / "lean.pt")
    end = (
        "killed"
        if config == "fsdp2"
        else str(suite(tmp_path, methods={"astray": {}}, reference="base"))
    )
    done = launch(config, "tests.ranks", str(tmp_path), end)
    # It ends by a rank that is killed, or goes astray alone, while the other waits for it.
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("retort:")]
    assert said == ([] if end == "killed" else ["retort: this rank went astray"]), done.stderr
    assert ("SIGKILL" in done.stderr) == (end == "killed")
    told, whole, again, lean = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert told["agreed"] == [0, 0] and told["shared"] == [0, 11, 20, 31, 40]
    assert sum(told.get("speaking", [True])) == 1
    assert whole["world"] == again["world"] == 2
    assert bool(whole["sharded"]) == (config == "fsdp2")
    same(whole, reference)
    assert whole["seen"] == reference["seen"]
    assert counted(whole["spent"]) == counted(reference["spent"])
    # Each block is written by one of them, and they share the work.
    assert sum(whole["blocks"]) == reference["blocks"][0]
    assert min(whole["blocks"]) > 0.4 * sum(whole["blocks"])
    # One process was cut, two go on; two were cut, one goes on.
    assert again["resumed"] == program.CUT - 1
    same(again, reference)
    assert lean["resumed"] == program.CUT - 1 and bool(lean["sharded"]) == (config == "fsdp2")
    same(lean, reference["lean"])
    kept, before = (
        torch.load(at / "lean.pt", weights_only=False)["model"] for at in (tmp_path, folder)
    )
    assert all(".lora_" in name for name in kept) and kept.keys() == before.keys()
    last = program.run(tmp_path / "cut.pt", tmp_path / "cut")
    assert last["resumed"] == program.CUT - 1
    same(last, reference)


SUITE = {
    "name": "ranks",
    "student": "micro/student",
    "teacher": "micro/teacher",
    "problems": {"micro_math": {"n": 24, "levels": [1, 2]}},
    "benchmarks": {"micro_math": {"limit": 20, "levels": [1, 2]}},
    "seeds": 1,
    "budget": {"steps": 6},
    "methods": {"sft": {}, "gkd": {}, "rkl": {}},
    "training": {"batch_size": 8, "micro_tokens": 512},
    "sampling": {"max_new_tokens": 64},
    "threads": 1,
}


def suite(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "suite.yaml"
    path.write_text(json.dumps(SUITE | changes), encoding="utf-8")
    return path


@pytest.mark.slow
def test_a_comparison_of_two_ranks_has_the_summary_of_one_and_waits_for_another(
    tmp_path: Path,
) -> None:
    """Another comparison holds a cell, and finishes it: no rank may begin to train it meanwhile."""
    path = str(suite(tmp_path))
    one, two = tmp_path / "one", tmp_path / "two"
    compare(path, results=one, track=False, quiet=True)
    setting = Experiment.model_validate(SUITE)
    jobs = cell.jobs(setting, list(setting.methods), two / "ranks", two / "store")
    base, sft, *_ = jobs
    store = Store(two / "store")
    group = {"folder": str((two / "ranks").resolve())}
    with ThreadPoolExecutor(1) as pool:
        with store.claim("cells", group, sft.name.replace("/", "-")):
            command = ["harness", "compare", path, "--results", str(two)]
            running = pool.submit(launch, "fsdp2", *command)
            while not running.done() and not base.samples_file("micro_math").is_file():
                time.sleep(0.2)
            time.sleep(3)  # for them to come to the claim
            assert not running.done(), running.result().stderr[-3000:]
            assert not sft.run_file.parent.exists()
            cell._run(sft, setting, store, lambda *_: None)
            mine = sft.run_file.read_bytes()
        done = running.result()
    assert done.returncode == 0, done.stderr[-3000:]
    assert sft.run_file.read_bytes() == mine
    assert done.stdout.count("Report:") == 1 and done.stderr.count("[4/4]") == 1
    assert (two / "mlflow.db").is_file()
    expected, found = (
        timeless(json.loads((at / "ranks" / "summary.json").read_text(encoding="utf-8")))
        for at in (one, two)
    )
    assert found == expected
    for job in jobs[1:]:
        curves = [
            json.loads((at / "runs" / job.name / "run.json").read_text(encoding="utf-8"))["curve"]
            for at in (one / "ranks", two / "ranks")
        ]
        losses = [[row["loss"] for row in curve] for curve in curves]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def timeless(value: Any) -> Any:
    """Without what differs from run to run, and rounded."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in ("environment", "seconds")}
    if isinstance(value, list):
        return [timeless(each) for each in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_ranks_do_without_vllm(who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    setting = Experiment.model_validate(SUITE | {who: {"model": SUITE[who], "engine": "vllm"}})
    with pytest.raises(ValueError, match=rf"^{who}: `engine: vllm` .*accelerate launch"):
        check(setting, list(setting.methods))


def test_ranks_train_with_compare_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(sys, "argv", ["retort", "sweep", "quickstart", "--all"])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert "only `compare` runs on several ranks" in capsys.readouterr().err
