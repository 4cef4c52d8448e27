"""What a run logs while it goes on: lines appended to a file of its own, which one writer at a time mirrors into MLflow.

A line is one write under no lock, so neither a database, nor a server, nor another process can hold up what is measured.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

EVERY = 10.0  # seconds between two samples of what a run uses
BEAT = 60.0  # seconds between two signs of life, for phases that say nothing for long, as one answer of a large model
MB = 2**20

Row = dict[str, Any]
Report = Callable[[str, int, int], None]  # phase, done, total


class Points:
    """Writes one run's file; a run of the same `about["key"]` is continued, any other replaced.

    A step that is logged again, as after a kill, stands for the earlier one. A disk that is full costs lines, never the run.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path, self.about = path, dict(about)
        self._file: int | None = None
        self._torn = False  # the last line has no end
        self._sampled = time.monotonic()
        self._cpu = _cpu_seconds()
        self._over = threading.Event()
        self._beats = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Points:
        self._beats.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._beats.join()
        if self._file is not None:
            self.sample("end")
            if self._file is not None:
                os.close(self._file)
                self._file = None

    def log(self, **row: Any) -> None:
        """Append a row; one with a `step` is a point of the curve."""
        line = json.dumps({"time": int(1000 * time.time()), **row}) + "\n"
        try:
            if self._file is None:
                self._file = self._open()
            self._write(line)
        except OSError:
            pass

    def sample(self, phase: str) -> None:
        """Append what the process used since the last sample, its children that have ended included."""
        now, cpu = time.monotonic(), _cpu_seconds()
        used = {
            "seconds": round(now - self._sampled, 3),
            "cpu_seconds": round(cpu - self._cpu, 3),
            "memory_mb": round(psutil.Process().memory_info().rss / MB, 1),
            **_gpu(),
        }
        self._sampled, self._cpu = now, cpu
        self.log(phase=phase, used=used)

    def sampling(self, report: Report) -> Report:
        """The report, with samples taken on its way: at the first word, then every ten seconds."""

        def heard(phase: str, done: int, total: int) -> None:
            if self._file is None or time.monotonic() - self._sampled >= EVERY:
                self.sample(phase)
            report(phase, done, total)

        return heard

    def _beat(self) -> None:
        """Say by the file's time that the run goes on."""
        while not self._over.wait(BEAT):
            if self._file is not None:
                with suppress(OSError):
                    os.utime(self._file)

    def _open(self) -> int:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        mine = read(self.path).about.get("key") == self.about["key"]
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | (0 if mine else os.O_TRUNC)
        self._file = os.open(self.path, flags, 0o666)
        size = os.fstat(self._file).st_size
        self._torn = size > 0 and os.pread(self._file, 1, size - 1) != b"\n"
        if not size:
            try:
                self._write(json.dumps({"about": self.about}) + "\n")
            except (
                OSError
            ):  # later then: whoever continues a file that does not say whose it is empties it
                os.close(self._file)
                self._file = None
                raise
        return self._file

    def _write(self, line: str) -> None:
        assert self._file is not None
        data = ("\n" * self._torn + line).encode()
        self._torn = True
        self._torn = os.write(self._file, data) < len(data)


@dataclass(frozen=True)
class Logged:
    """What is in a run's file."""

    about: Row = field(default_factory=dict)
    steps: list[Row] = field(default_factory=list)  # by step, each once
    samples: list[Row] = field(default_factory=list)  # phase, used
    times: list[int] = field(default_factory=list)  # first and last, in milliseconds


def read(path: Path) -> Logged:
    """Every row that is whole; nothing where there is no file."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return Logged()
    rows = [row for row in map(_parsed, lines) if row]
    about: Row = next((row["about"] for row in rows if "about" in row), {})
    steps = {row["step"]: row for row in rows if "step" in row}
    times = [row["time"] for row in rows if "time" in row]
    return Logged(
        about,
        [steps[step] for step in sorted(steps)],
        [row for row in rows if "used" in row],
        [min(times), max(times)] if times else [],
    )


def _parsed(line: bytes) -> Row:
    try:
        row = json.loads(line)
    except ValueError:  # cut by a kill or a full disk
        return {}
    return row if isinstance(row, dict) else {}


def _cpu_seconds() -> float:
    return float(
        sum(psutil.Process().cpu_times()[:4])
    )  # user and system, its own and its children's


def _gpu() -> dict[str, float]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return {}
    return {"gpu_memory_mb": round(torch.cuda.memory_allocated() / MB, 1)}
