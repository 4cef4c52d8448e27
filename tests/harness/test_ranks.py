"""Two processes train like one: the denominator is that of the whole step, on all ranks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_two_processes_have_the_loss_trace_of_one() -> None:
    one, two = trace(1), trace(2)
    assert len(one) == 52
    assert two == pytest.approx(one, rel=1e-5, abs=1e-5)
