"""Two processes train like one: the denominator is that of the whole step, on all ranks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from harness import cell
from harness.config import Experiment
from harness.store import Fields, Store

ROOT = Path(__file__).parent.parent.parent


def trace(processes: int) -> list[float]:
    with socket.socket() as probe:  # a port that is free now
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_port", port, "-m", "tests.ranks"]
    done = subprocess.run(
        [sys.executable, *(launch if processes > 1 else ["-m", "tests.ranks"])],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    world, *losses = json.loads(done.stdout.strip().splitlines()[-1])
    assert world == processes
    return losses


def test_a_rank_that_only_trains_does_not_wait_for_the_cell_of_rank_0(
    tmp_path, monkeypatch
) -> None:
    """It would for ever: rank 0 holds the claim, and waits for it to train."""

    def claim(store: Store, kind: str, group: Fields, name: str, wait: bool = True) -> None:
        raise AssertionError(f"{kind} {name} is claimed")

    setting = Experiment.model_validate(
        {
            "name": "ranks",
            "student": "micro/student",
            "teacher": "micro/teacher",
            "problems": {"micro_math": {"n": 4}},
            "benchmarks": {"micro_math": {"limit": 4}},
            "budget": {"steps": 1},
            "methods": {"sft": {}},
            "threads": 1,
        }
    )
    base = cell.jobs(setting, [], tmp_path / "ranks", tmp_path / "store")[0]
    monkeypatch.setattr(Store, "claim", claim)
    with pytest.raises(AssertionError, match="cells base-0 is claimed"):
        cell.run(base, lambda *_: None)
    monkeypatch.setenv("RANK", "1")
    cell.run(base, lambda *_: None)
    assert not (tmp_path / "ranks").exists()  # rank 0 writes


def test_two_processes_have_the_loss_trace_of_one() -> None:
    one, two = trace(1), trace(2)
    assert len(one) == 52
    assert two == pytest.approx(one, rel=1e-5, abs=1e-5)
