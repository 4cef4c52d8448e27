"""Runs programs, each in a fork of this small process; started as a script, without site-packages.

A line of JSON comes in: program, tests and limits. A line goes out: "ok", "wrong", "timeout" or "error". Every program gets a
session, a folder, resource limits and, where this process is root, a user of its own. "ok" takes two things: the process
ended by itself, and it returned a nonce that it could read only through a pipe, after the last test.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import importlib
import json
import math
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import types
import typing
from collections.abc import Callable

PR_SET_PDEATHSIG, PR_SET_KEEPCAPS, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 8, 36, 38
CAP_DAC_READ_SEARCH = 1 << 2
FIRST_USER, USERS = 20_000, 40_000
REAP_SECONDS = 5.0
COMMON = ("bisect", "collections", "heapq", "itertools", "re", "string")

LINUX = sys.platform == "linux"
LIBC = ctypes.CDLL(None, use_errno=True) if LINUX else None


def prctl(option: int, value: int) -> None:
    if LIBC is not None:
        LIBC.prctl(option, ctypes.c_ulong(value), 0, 0, 0)


def become(user: int, reading: bool) -> None:
    """Give up root for an unprivileged user; `reading` keeps the right to read, which the standard library may need."""
    if reading:
        prctl(PR_SET_KEEPCAPS, 1)
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    if reading and LIBC is not None:
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
        sets = (ctypes.c_uint32 * 6)(CAP_DAC_READ_SEARCH, CAP_DAC_READ_SEARCH)
        if LIBC.capset(header, sets):
            raise OSError(ctypes.get_errno(), "capset")


def attempt(action: Callable[[], object]) -> bool:
    """Whether an action works, tried in a fork."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            action()
            os._exit(0)
        os._exit(1)
    return os.waitpid(child, 0)[1] == 0


class User(typing.NamedTuple):
    """Who the programs run as."""

    id: int | None  # None: as this process
    reading: bool  # keep the right to read files
    processes: int  # that this user has already; the limit counts them too


def choose_user() -> User:
    """A user of the programs' own where this process may choose one that can load the standard library."""

    def loads(user: int, reading: bool) -> None:
        become(user, reading)
        with open(os.__file__, "rb"):
            pass

    if os.geteuid() == 0:
        user = FIRST_USER + os.getpid() % USERS
        for reading in (False, True):
            if attempt(functools.partial(loads, user, reading)):
                return User(user, reading, 0)
    return User(None, False, own_threads())


def own_threads() -> int:
    """How many threads this process's user runs."""
    count = 0
    for entry in os.listdir("/proc") if LINUX else ():
        with contextlib.suppress(OSError):
            if entry.isdigit() and os.stat(f"/proc/{entry}").st_uid == os.geteuid():
                count += len(os.listdir(f"/proc/{entry}/task"))
    return count


def empty(folder: str, user: User) -> None:
    """Make a folder, or empty it; making one for each program would cost more than running most."""
    if os.path.isdir(folder) and os.listdir(folder):
        shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder, exist_ok=True)
    if user.id is not None:
        os.chown(folder, user.id, user.id)
    os.chmod(folder, 0o700)


def run(job: dict[str, typing.Any], user: User, folder: str) -> str:
    """The verdict on one program."""
    empty(folder, user)
    asked, ask = os.pipe()
    answer, answered = os.pipe()
    nonce = b""
    child = os.fork()
    if child == 0:
        os.close(ask)
        os.close(answer)
        execute(job, user, folder, asked, answered)
    try:
        os.close(asked)
        os.close(answered)
        nonce = os.urandom(16)  # drawn after the fork: it is nowhere in the program's memory
        with contextlib.suppress(BrokenPipeError):
            os.write(ask, nonce)
        status = wait(child, job["seconds"])
        reap(child)
        if status is None or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU):
            return "timeout"
        os.set_blocking(answer, False)
        with contextlib.suppress(BlockingIOError):
            if status == 0 and os.read(answer, 64) == nonce:
                return "ok"
        return "wrong"
    finally:
        os.close(ask)
        os.close(answer)


def wait(child: int, seconds: float) -> int | None:
    """The exit status of a child, or None when its time is up."""
    if LINUX:
        handle = os.pidfd_open(child)
        ended = select.select([handle], [], [], seconds)[0]
        os.close(handle)
        return os.waitpid(child, 0)[1] if ended else None
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.001)
    return None


def reap(child: int) -> None:
    """Kill the program's group, and then whatever left the group: as a subreaper this process inherits those."""
    deadline = time.monotonic() + REAP_SECONDS
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while time.monotonic() < deadline:
            for orphan in children():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(orphan, signal.SIGKILL)
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.0005)


def children() -> list[int]:
    with contextlib.suppress(OSError), open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [int(child) for child in file.read().split()]
    return []


def execute(job: dict[str, typing.Any], user: User, folder: str, asked: int, answered: int) -> None:
    """In the fork: confine this process, run program and tests, and return the nonce if nothing was raised."""
    code, leave, this = 1, os._exit, os.getpid
    read, write, pid = os.read, os.write, os.getpid()
    try:
        confine(job, user, folder)
        random.seed(0)
        module = types.ModuleType("solution")
        sys.modules["solution"] = module
        exec(compile(job["program"], "program", "exec"), module.__dict__)
        exec(compile(job["tests"], "tests", "exec"), module.__dict__)
        if this() == pid:  # not in a fork that the program made
            write(answered, read(asked, 16))
            code = 0
    finally:
        leave(code)


def confine(job: dict[str, typing.Any], user: User, folder: str) -> None:
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)
    seconds = math.ceil(job["seconds"])
    for limit, value in (
        (resource.RLIMIT_CPU, seconds + 1),
        (resource.RLIMIT_AS, job["memory"]),
        (resource.RLIMIT_FSIZE, job["file_size"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, job["processes"] + user.processes),
    ):
        with contextlib.suppress(ValueError, OSError):  # a hard limit below it stands already
            resource.setrlimit(limit, (value, value))
    if user.id is not None:
        become(user.id, user.reading)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # set last: a change of user clears it


def main() -> None:
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    user = choose_user()
    for name in COMMON:  # what programs often import is loaded once, before the forks
        importlib.import_module(name)
    gc.freeze()
    root = tempfile.mkdtemp(prefix="retort-")
    os.chmod(root, 0o711)  # entered by the programs' user, and not changed
    for line in sys.stdin:
        try:
            status = run(json.loads(line), user, os.path.join(root, "work"))
        except OSError:
            status = "error"
        sys.stdout.write(json.dumps(status) + "\n")
        sys.stdout.flush()
    shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
