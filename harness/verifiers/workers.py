"""Worker processes that judge one job at a time and are killed when they are late.

They are reached through pipes, not through multiprocessing: any thread may use them, nothing of the caller's __main__ is
imported again, and a computation that hangs inside C dies like any other. Idle workers are kept for the next call.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from harness.verifiers import code, sandbox

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 60.0  # a worker's imports, on a slow disk
END_SECONDS = 2.0


class Late(Exception):
    """A worker did not answer in time."""


class Worker:
    """One process that reads a line of JSON and writes one."""

    def __init__(self, command: Sequence[str], env: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=env,
            cwd="/",
            start_new_session=True,  # Ctrl-C is the caller's to handle
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self._in, self._out = self.process.stdin, self.process.stdout.fileno()
        self._poll = select.poll()
        self._poll.register(self._out, select.POLLIN)
        self._fresh = True

    def ask(self, job: Any, seconds: float) -> Any:
        """The answer to a job; Late after `seconds`, BrokenPipeError or EOFError if the process died."""
        deadline = time.monotonic() + seconds + (START_SECONDS if self._fresh else 0.0)
        self._in.write(json.dumps(job).encode() + b"\n")
        self._in.flush()
        line = b""
        while not line.endswith(b"\n"):
            if not self._poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise Late
            chunk = os.read(self._out, 1 << 16)
            if not chunk:
                raise EOFError("the worker died")
            line += chunk
        self._fresh = False
        return json.loads(line)

    def end(self) -> None:
        """Let an idle worker clean up after itself."""
        self._in.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(END_SECONDS)
        self.kill()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # with what a sandbox put between
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._in.close()
        assert self.process.stdout is not None
        self.process.stdout.close()


class Pool:
    """Workers of one kind."""

    def __init__(self, start: Callable[[], Worker]) -> None:
        self.start = start
        self._idle: list[Worker] = []
        self._lock = threading.Lock()
        self._pid = os.getpid()

    def ask(self, job: Any, seconds: float) -> Any:
        """The answer of an idle worker, or of a new one; the worker is killed if it is late or broken."""
        worker = self._take()
        try:
            answer = worker.ask(job, seconds)
        except BaseException:
            worker.kill()
            raise
        with self._lock:
            self._idle.append(worker)
        return answer

    def close(self) -> None:
        if os.getpid() == self._pid:  # a fork has only copies of the pipes
            while self._idle:
                self._idle.pop().end()

    def _take(self) -> Worker:
        with self._lock:
            if os.getpid() != self._pid:
                self._idle, self._pid = [], os.getpid()
            if self._idle:
                return self._idle.pop()
        return self.start()


def _math() -> Worker:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = "from harness.verifiers import math; math.serve()"
    worker = Worker([sys.executable, "-P", "-c", command], {**os.environ, "PYTHONPATH": path})
    worker.ask(["1", "1"], 0.0)  # imports end here: no answer is given their time as well
    return worker


def _code(kind: str) -> Worker:
    kept = {key: os.environ[key] for key in ("TMPDIR", "LD_LIBRARY_PATH") if key in os.environ}
    return Worker(sandbox.command(kind, code.LIMITS), {**kept, **sandbox.ENVIRONMENT})


POOLS = {
    "math": Pool(_math),
    "bubblewrap": Pool(lambda: _code("bubblewrap")),
    "fallback": Pool(lambda: _code("fallback")),
}


@atexit.register
def _close() -> None:
    for pool in POOLS.values():
        pool.close()
