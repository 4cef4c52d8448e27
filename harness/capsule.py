"""The capsule of a cell: `capsule.json` beside its `run.json`, with all that a repetition needs and `run.json` does not say.

Experiment (resolved to this one arm), seeds, digests of the training and the test problems, and the machine, packages and
commit of every process that worked on the cell: a run that was cut may go on elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
from packaging.requirements import Requirement

PACKAGES = ("torch", "transformers", "lm-eval", "math-verify", "datasets", "accelerate", "mlflow")
FILE = "capsule.json"


def environment() -> dict[str, Any]:
    """What differs from machine to machine and run to run."""
    import torch

    return {
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}",
        "host": platform.node(),
        "cpus": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": _commit(),
        "version": metadata.version("retort"),
    }


def conditions() -> dict[str, Any]:
    """What of the environment may decide a result's last bits: code, packages, build, machine, threads and processes."""
    import torch

    here = environment()
    return {
        **{name: here[name] for name in ("commit", "version", "python", "platform", "gpu")},
        "cpu": _cpu(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch build": hashlib.sha256(torch.__config__.show().encode()).hexdigest()[:12],
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "packages": dict(lock()),
    }


@cache
def lock() -> Mapping[str, str]:
    """The installed version of every package that the bench needs, and of all that those need."""
    found: dict[str, str] = {}
    todo = ["retort", *PACKAGES]
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in found:
            continue
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # needed on other systems only
            continue
        found[name] = package.version
        needs = [Requirement(line) for line in package.requires or ()]
        todo += [n.name for n in needs if n.marker is None or n.marker.evaluate({"extra": ""})]
    return dict(sorted(found.items()))


def read(path: Path) -> dict[str, Any] | None:
    """A capsule; None for a run that was made before there were any."""
    if not path.is_file():
        return None
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of weights of a saved student."""
    return {path.name: file_digest(path) for path in sorted(folder.glob("*.safetensors"))}


@cache
def _commit() -> str | None:
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


@cache
def _cpu() -> str:
    """The processor's name."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
