"""Progress of several cells at once: bars with an ETA on a terminal, plain lines elsewhere."""

from __future__ import annotations

import ctypes
import signal
import sys
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Event = tuple[str, str, int, int]  # cell, phase, done, total
INTERVAL = 10.0  # seconds between plain lines of one cell and phase


class Display:
    """Shows events of `(cell, phase, done, total)`; a context manager around the work."""

    def __init__(self, cells: int, *, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.live = self.console.is_terminal
        self.cells, self.finished = cells, 0
        self.started = time.monotonic()
        self.phases: dict[tuple[str, str], tuple[float, int, float]] = {}  # start, first, last line
        self.bars = Progress(
            TextColumn("{task.description:<34}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=self.console,
            disable=not self.live,
            transient=True,
        )
        self.tasks: dict[str, TaskID] = {}
        self.overall = self.bars.add_task("cells", total=cells)

    def __enter__(self) -> Display:
        self.bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bars.stop()

    def __call__(self, cell: str, phase: str, done: int, total: int) -> None:
        if self.live:
            self._bar(cell, phase, done, total)
        else:
            self._line(cell, phase, done, total)

    def finish(self, cell: str, note: str = "done") -> None:
        """A cell has ended."""
        self.finished += 1
        if cell in self.tasks:
            self.bars.remove_task(self.tasks.pop(cell))
        self.bars.update(self.overall, completed=self.finished)
        elapsed = time.monotonic() - self.started
        left = elapsed / self.finished * (self.cells - self.finished)
        tail = f", about {_clock(left)} left" if self.finished < self.cells else ""
        self.console.print(
            f"[{self.finished}/{self.cells}] {cell}: {note} after {_clock(elapsed)}{tail}",
            markup=False,
            highlight=False,
        )

    def _bar(self, cell: str, phase: str, done: int, total: int) -> None:
        name = f"{cell}: {phase}"
        task = self.tasks.get(cell)
        if task is None or self.bars.tasks[self.bars.task_ids.index(task)].description != name:
            if task is not None:
                self.bars.remove_task(task)
            task = self.tasks[cell] = self.bars.add_task(name, total=total)
        self.bars.update(task, completed=done, total=total)

    def _line(self, cell: str, phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        start, first, last = self.phases.get((cell, phase), (now, done, now))
        due = now - last >= INTERVAL
        if due:
            rate = (done - first) / max(now - start, 1e-9)
            eta = f"ETA {_clock((total - done) / rate)}" if rate > 0 else "ETA unknown"
            print(f"  {cell}: {phase} {done}/{total}, {eta}", file=sys.stderr, flush=True)
        self.phases[cell, phase] = (start, first, now if due else last)


def silent(cell: str, phase: str, done: int, total: int) -> None:
    """Shows nothing."""


def throttled(
    send: Callable[[Event], object], cell: str, pause: float = 0.1
) -> Callable[[str, int, int], None]:
    """A reporter for one cell that sends at most one event in so many seconds, and every last one."""
    last = 0.0

    def report(phase: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done >= total or now - last > pause:
            last = now
            send((cell, phase, done, total))

    return report


def end_with_parent() -> None:
    """A worker process does not outlive a parent that was killed (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return (
        f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
        if minutes >= 60
        else f"{minutes}:{rest:02d}"
    )
