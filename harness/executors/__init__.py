"""Where the cells of a comparison run: processes of this machine, tasks of a Ray cluster, or jobs of SLURM."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Any, Protocol

from harness.cell import Job
from harness.config import Experiment, nearest
from harness.executors.ray import Ray
from harness.executors.slurm import Slurm, parameters

NAMES = ("local", "ray", "slurm")


class Executor(Protocol):
    """Runs cells to their end, in any order."""

    def run(self, jobs: Sequence[Job], experiment: Experiment, display: Any) -> None: ...


def choose(
    name: str,
    *,
    ray_address: str | None = None,
    gpus_per_cell: float | None = None,
    cpus_per_cell: int | None = None,
    slurm: Sequence[str] = (),
) -> Executor | None:
    """The executor of `--executor`; None is this machine's own."""
    if name not in NAMES:
        raise ValueError(f"unknown --executor {name!r}: {nearest(name, NAMES)}")
    given = {
        "--ray-address": ray_address is not None and name != "ray",
        "--slurm": bool(slurm) and name != "slurm",
        "--gpus-per-cell": gpus_per_cell is not None and name == "local",
        "--cpus-per-cell": cpus_per_cell is not None and name == "local",
    }
    for option, stray in given.items():
        if stray:
            needed = {"--ray-address": "ray", "--slurm": "slurm"}.get(option, "ray or slurm")
            raise ValueError(
                f"{option} is for --executor {needed}, and this is --executor {name}: leave it out"
            )
    if name == "local":
        return None
    if "RANK" in os.environ:
        raise ValueError(
            f"--executor {name} under `accelerate launch`: a cell of an executor is one process; leave one of the two out"
        )
    package = {"ray": "ray", "slurm": "submitit"}[name]
    if importlib.util.find_spec(package) is None:
        raise ValueError(
            f"--executor {name} needs {package}, which is not installed: pip install 'retort[{name}]'"
        )
    if name == "ray":
        return Ray(ray_address, gpus_per_cell, cpus_per_cell)
    return Slurm(parameters(slurm), gpus_per_cell, cpus_per_cell)
