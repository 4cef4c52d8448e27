"""Four commands of SLURM as far as submitit uses them; each task of an array is a process group of this machine.

Installed under their four names in a folder of PATH, with a folder `jobs` beside it that holds what SLURM would know.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

NAMES = ("sbatch", "srun", "sacct", "scancel")
HERE = Path(sys.argv[0]).parent / "jobs"


def install(folder: Path) -> None:
    (folder / "jobs").mkdir(parents=True)
    for name in NAMES:
        (folder / name).write_text(f"#!{sys.executable}\n" + Path(__file__).read_text())
        (folder / name).chmod(0o755)


def sbatch(script: str) -> None:
    text = Path(script).read_text()
    (HERE / f"{os.getpid()}.script").write_text(text)
    last = re.search(r"--array=0-(\d+)", text)
    job = str(os.getpid())
    for task in range(int(last[1]) + 1) if last else [None]:
        name = job if task is None else f"{job}_{task}"
        env = {**os.environ, "SLURM_JOB_ID": job, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
        if task is not None:
            env |= {"SLURM_ARRAY_JOB_ID": job, "SLURM_ARRAY_TASK_ID": str(task)}
        run = f"bash {script}; echo $? > {HERE / name}.ended"
        process = subprocess.Popen(
            ["bash", "-c", run], env=env, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        (HERE / f"{name}.group").write_text(str(process.pid))
    print("Submitted batch job", job)


def srun(*words: str) -> None:
    options, command = list(words), []
    while options and options[0].startswith("-"):
        option = options.pop(0)
        if option in ("--output", "--error"):
            path = options.pop(0)
            for mark, name in ("%A", "ARRAY_JOB_ID"), ("%a", "ARRAY_TASK_ID"), ("%j", "JOB_ID"):
                path = path.replace(mark, os.environ.get(f"SLURM_{name}", ""))
            file = os.open(path.replace("%t", "0"), os.O_CREAT | os.O_APPEND | os.O_WRONLY)
            os.dup2(file, 1)
            os.dup2(file, 2)
    command = options
    os.execvp(command[0], command)


def sacct(*words: str) -> None:
    print("JobID|State|NodeList")
    for path in HERE.glob("*.group"):
        ended = path.with_suffix(".ended")
        state = "RUNNING"
        if ended.is_file():
            state = "COMPLETED" if ended.read_text().strip() == "0" else "FAILED"
        print(f"{path.stem}|{state}|here")


def scancel(name: str) -> None:
    with suppress(ProcessLookupError):
        os.killpg(int((HERE / f"{name}.group").read_text()), signal.SIGTERM)


if __name__ == "__main__":
    globals()[Path(sys.argv[0]).name](*sys.argv[1:])
