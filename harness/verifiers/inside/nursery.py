"""A warm server of verdicts on programs: a check costs forks, and no interpreter's start.

A line of JSON comes in: program, tests and limits. A line goes out: "ok", "wrong", "timeout", "error" or "share". Each job has
a referee, forked from here, and a player, forked from the referee before that has read the job. Where the kernel allows it the
referee is the first process of its own process, mount and IPC namespaces: a program sees no other process, works in a tmpfs of
its own, and all that it started or wrote is gone when the referee ends. This process never sees a job, so that nothing
of one is in the memory of the next.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import importlib
import json
import os
import platform
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import typing
from collections.abc import Callable

from . import player, referee, wire

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_KEEPCAPS = 1, 4, 8
PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 22, 36, 38
CAP_DAC_READ_SEARCH, CAP_KILL = 1 << 2, 1 << 5
NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
NEW = 0x7E020080  # every flag of clone that makes a namespace
PRIVATE = ctypes.c_ulong(0x44000)  # of mount: MS_PRIVATE, MS_REC
PLAIN = ctypes.c_ulong(6)  # of mount: MS_NOSUID, MS_NODEV
MODE_FILTER = ctypes.c_ulong(2)  # of prctl
REAP_SECONDS = 5.0
HEAD = 8  # bytes that say how long a job may take
VERDICTS = ("ok", "wrong", "timeout", "share")
REHEARSALS = 20
DYING = 4  # referees whose namespaces the kernel may be taking down while the next job runs
COMMON = ("bisect", "collections", "copy", "datetime", "functools", "heapq", "io", "itertools", "operator", "re", "statistics", "string", "typing")  # fmt: skip

LINUX = sys.platform == "linux"
LIBC = ctypes.CDLL(None, use_errno=True) if LINUX else None

# System calls that programs do not need and kernels have been attacked through; by machine: (architecture, clone, clone3,
# the others: ptrace, process_vm_readv and _writev, unshare, setns, mount, pivot_root, add_key, request_key, keyctl,
# perf_event_open, bpf, userfaultfd, io_uring_setup, _enter and _register, open_tree to mount_setattr). And through which they
# would get memory that no limit of theirs counts: memfd_create, shmget, semget, msgget, mq_open.
_NEWER = (425, 426, 427, *range(428, 434), 438, 442)
SYSTEM_CALLS = {
    "x86_64": (0xC000003E, 56, 435, (101, 310, 311, 272, 308, 165, 155, 248, 249, 250, 298, 321, 323, 319, 29, 64, 68, 240, *_NEWER)),
    "aarch64": (0xC00000B7, 220, 435, (117, 270, 271, 97, 268, 40, 41, 217, 218, 219, 241, 280, 282, 279, 194, 190, 186, 180, *_NEWER)),
}  # fmt: skip


class User(typing.NamedTuple):
    """Who the programs run as."""

    id: int | None = None  # None: as this process; the referee then is the next one
    rights: int = 0  # to keep: reading files, which the standard library may need
    processes: int = 0  # that count against this user's limit already


class Place(typing.NamedTuple):
    """Where programs run, and as whom."""

    folder: str
    namespaces: bool  # a program gets its own
    user: User
    limits: dict[str, float]
    rights: bool  # this process is privileged where it is, and its forks must cease to be
    referee: User
    null: int  # a descriptor of /dev/null


def system(name: str, *arguments: typing.Any) -> None:
    """A call of the C library that returns 0 or fails."""
    if LIBC is None or getattr(LIBC, name)(*arguments):
        raise OSError(ctypes.get_errno(), name)


def prctl(option: int, value: int) -> None:
    if LIBC is not None:
        LIBC.prctl(option, ctypes.c_ulong(value), 0, 0, 0)


def capabilities(kept: int) -> None:
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    system("capset", header, (ctypes.c_uint32 * 6)(kept, kept))


def become(user: int, rights: int) -> None:
    """Give up root for an unprivileged user, and all rights but these."""
    if rights:
        prctl(PR_SET_KEEPCAPS, 1)
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    if rights:
        capabilities(rights)


def attempt(action: Callable[[], object]) -> bool:
    """Whether an action works, tried in a fork."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            action()
            os._exit(0)
        os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def choose_user(preferred: int) -> User:
    """Programs' own user where this process may choose one; and what counts against the limit of that user."""

    def loads(user: int, rights: int) -> None:
        become(user, rights)
        with open(os.__file__, "rb"):
            pass

    def forks(user: User, processes: int) -> None:
        resource.setrlimit(resource.RLIMIT_NPROC, (processes, processes))
        if user.id is not None:
            become(user.id, user.rights)
        for _ in range(2):
            if os.fork() == 0:
                time.sleep(0.05)
                os._exit(0)

    user = User()
    if os.geteuid() == 0:
        for rights in (0, CAP_DAC_READ_SEARCH):
            if attempt(functools.partial(loads, preferred, rights)):
                user = User(preferred, rights)
                break
    for others in (8, 64, 256, 1024, 4096, 16384):  # newer kernels count by user namespace
        if attempt(functools.partial(forks, user, others)):
            return user._replace(processes=others)
    return user


def enter() -> None:
    """Go on in namespaces of this process's own, where nothing gave it some: no network, and rights to make more."""
    if os.geteuid() != 0:
        user, group = os.geteuid(), os.getegid()
        system("unshare", NEWUSER)
        maps = {"setgroups": "deny", "uid_map": f"{user} {user} 1", "gid_map": f"{group} {group} 1"}
        for name, text in maps.items():
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    system("unshare", NEWNET | NEWPID)
    child = os.fork()  # the first process there
    if child:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) and 1)


def furnish(place: Place) -> None:
    """An empty folder to work in."""
    owner = place.user.id or os.geteuid()
    if place.namespaces:
        system("unshare", NEWNS | NEWIPC)
        system("mount", None, b"/", None, PRIVATE, None)
        options = b"size=%d,nr_inodes=4096,mode=0700,uid=%d" % (place.limits["files"], owner)
        system("mount", b"tmpfs", place.folder.encode(), b"tmpfs", PLAIN, options)
        return
    if os.path.isdir(place.folder) and os.listdir(place.folder):
        shutil.rmtree(place.folder, ignore_errors=True)
    os.makedirs(place.folder, exist_ok=True)
    if place.user.id is not None:
        os.chown(place.folder, owner, owner)
    os.chmod(place.folder, 0o700)


def limit(resources: dict[int, float]) -> None:
    for which, value in resources.items():
        with contextlib.suppress(ValueError, OSError):  # a hard limit below it stands already
            resource.setrlimit(which, (int(value), int(value)))


def confine(place: Place, user: User, kept: tuple[int, ...]) -> None:
    """Give up what this process may, but for some descriptors."""
    for descriptor in (0, 1, 2):
        os.dup2(place.null, descriptor)
    previous = 2
    for descriptor in (*sorted(kept), 1024):
        os.closerange(previous + 1, descriptor)
        previous = descriptor
    if user.id is not None:
        become(user.id, user.rights)
    elif place.rights:
        capabilities(0)


def system_call_filter() -> bytes:
    """A program for the kernel that refuses what SYSTEM_CALLS lists, and new namespaces; empty for other machines."""
    if platform.machine() not in SYSTEM_CALLS:
        return b""
    architecture, clone, clone3, others = SYSTEM_CALLS[platform.machine()]
    load, equal, at_least, any_bit, back = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, refuse, unknown = 0x7FFF0000, 0x80000000, 0x50001, 0x50000 + 38  # EPERM, ENOSYS
    # (operation, operand, jump if true, jump if false); jumps are counted from the next line
    program = [(load, 4, 0, 0), (equal, architecture, 1, 0), (back, kill, 0, 0), (load, 0, 0, 0)]
    program += [(at_least, 1 << 30, 0, 1), (back, refuse, 0, 0)]  # another ABI's numbers
    program += [(equal, clone3, 0, 1), (back, unknown, 0, 0)]  # callers fall back on clone
    for number in others:
        program += [(equal, number, 0, 1), (back, refuse, 0, 0)]
    program += [(equal, clone, 0, 3), (load, 16, 0, 0), (any_bit, NEW, 0, 1), (back, refuse, 0, 0)]
    program += [(back, allow, 0, 0)]
    return b"".join(struct.pack("=HBBI", op, yes, no, k) for op, k, yes, no in program)


_CODE = ctypes.create_string_buffer(system_call_filter())
_LENGTH = len(_CODE) // 8
FILTER = ctypes.create_string_buffer(struct.pack("@HP", _LENGTH, ctypes.addressof(_CODE)))


def start_player(place: Place, orders: int, answers: int) -> None:
    """In the player's process: confine it, play, end."""
    code, leave = 1, os._exit
    try:
        os.setsid()
        processes = place.limits["processes"] + place.user.processes
        limit({resource.RLIMIT_AS: place.limits["memory"], resource.RLIMIT_NPROC: processes})
        confine(place, place.user, (orders, answers))
        os.chdir(place.folder)  # this user's
        if not place.namespaces:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # set last: a change of user clears it
        gc.enable()
        code = player.play(orders, answers, 1 << 30)
    finally:
        leave(code)


def start_referee(place: Place, notice: int) -> None:
    """In the referee's process: start the player, then read the job, say how long it may take, judge, say the verdict."""
    try:
        furnish(place)
        prctl(PR_SET_DUMPABLE, 0)  # the program may be this user's too
        if LIBC is not None and _LENGTH:
            LIBC.prctl(PR_SET_SECCOMP, MODE_FILTER, FILTER, 0, 0)  # for the player too
        orders, order = os.pipe()
        answer, answers = os.pipe()
        child = os.fork()
        if child == 0:
            start_player(place, orders, answers)
        os.close(orders)
        os.close(answers)
        line = b""
        while not line.endswith(b"\n"):
            part = os.read(0, 1 << 16)
            if not part:
                os._exit(0)
            line += part
        job = json.loads(line)
        seconds = referee.units(job["tests"]) * job["seconds"] * referee.PATIENCE
        confine(place, place.referee, (notice, order, answer))
        os.write(notice, struct.pack("d", seconds))
        host = referee.Player(child, order, answer)
        host.limits(job)
        verdict = referee.judge(job, host)
        if place.namespaces:
            end_all()
        os.write(notice, verdict.encode())
    finally:
        os._exit(1)


def end_all() -> None:
    """As the first process of a namespace: kill all others there, and see them dead, or they would count in the next job."""
    with contextlib.suppress(ChildProcessError):
        while True:
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)
            os.waitpid(-1, 0)


def serve(place: Place, me: int | None, dying: list[int]) -> bool:
    """One job: True when its verdict is written, False when there is none to come."""
    notice, noticed = os.pipe()
    if place.namespaces:
        system("unshare", NEWPID)
    child = os.fork()
    if child == 0:
        os.close(notice)
        start_referee(place, noticed)
    if place.namespaces:
        system("setns", me, NEWPID)  # or the next unshare would be refused
    os.close(noticed)
    dying.append(child)
    head = os.read(notice, HEAD)
    said = ""
    if len(head) == HEAD:
        said = verdict_of(notice, struct.unpack("d", head)[0])
        os.kill(child, signal.SIGKILL)
    os.close(notice)
    if place.namespaces:
        # Taking empty namespaces down takes the kernel longer than a check.
        while len(dying) > (DYING if said in VERDICTS else 0):
            os.waitpid(dying.pop(0), 0)
    else:
        dying.clear()
        reap()
    if len(head) < HEAD:
        return False
    verdict = {"late": "timeout", "": "error"}.get(said, said)
    os.write(1, json.dumps(verdict).encode() + b"\n")
    return True


def verdict_of(notice: int, seconds: float) -> str:
    """What the referee says, "" if it died; "late" when its time is up or nobody waits for it any more."""
    poll = select.poll()
    poll.register(notice, select.POLLIN)
    poll.register(0, 0)  # the caller's end is closed
    said = any(which == notice for which, _ in poll.poll((seconds + 2.0) * 1000))
    return os.read(notice, 64).decode() if said else "late"


def reap() -> None:
    """Kill what a job left, without a namespace that ends: as a subreaper this process inherits it."""
    deadline = time.monotonic() + REAP_SECONDS
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


def rehearse() -> None:
    """Run once here what each job does, so that its code is ready (and specialised) in memory that forks share."""
    source, tests = "def f(x):\n    return 2 * x\n", "assert f(2) == 4\n"
    heard, said = os.pipe()
    for _ in range(REHEARSALS):
        stage = player.Stage()
        program = functools.partial(compile, source, "program", "exec", dont_inherit=True)
        names = referee.wanted(compile(tests, "tests", "exec", dont_inherit=True), None)
        reply = stage.answer(functools.partial(stage.load, program, False, list(names)))
        wire.send(said, reply)
        wire.unpack(wire.receive(heard, 1 << 20)["value"], stage.things.__getitem__)
        wire.send(said, ["call", *wire.pack((stage.things[0], [2], {}), stage.refer)["tuple"]])
        reply = stage.answer(functools.partial(stage.do, *wire.receive(heard, 1 << 20)))
    os.close(heard)
    os.close(said)
    sys.modules.pop("solution")


def main() -> None:
    """Serve until standard input ends; the argument says how."""
    settings = json.loads(sys.argv[1])
    # The first process of a namespace gets no signal from inside that it does not handle.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    if settings["folder"] is None and LINUX and attempt(enter):
        enter()
    user = choose_user(settings["user"])
    unshares = functools.partial(system, "unshare", NEWPID | NEWNS | NEWIPC)
    namespaces = LINUX and attempt(unshares)
    if settings["folder"] is not None and not (namespaces and (user.id or os.geteuid())):
        raise OSError("no namespaces, or no user, for programs")
    for name in COMMON:  # what programs often import is loaded once, before the forks
        importlib.import_module(name)
    rehearse()
    if LIBC is not None:
        _ = LIBC.mount, LIBC.capset  # looked up here, and not in each fork
    gc.collect()
    gc.freeze()
    gc.disable()  # a referee lives for one job; the player turns it on
    made = None
    if settings["folder"] is None:
        made = tempfile.mkdtemp(prefix="retort-")
        os.chmod(made, 0o711)  # entered by the programs' user, and not changed
        os.mkdir(os.path.join(made, "work"))
    folder = settings["folder"] or os.path.join(made or "", "work")
    os.environ.clear()
    limits = settings["limits"]
    limit(
        {
            resource.RLIMIT_AS: 2 * limits["memory"],  # a player's is half of it
            resource.RLIMIT_FSIZE: limits["file_size"],
            resource.RLIMIT_NOFILE: 64,
            resource.RLIMIT_CORE: 0,
        }
    )
    judge = user if user.id is None else User(user.id + 1, user.rights | CAP_KILL)
    null = os.open(os.devnull, os.O_RDWR)
    place = Place(folder, namespaces, user, limits, LINUX and user.id is None, judge, null)
    me = os.pidfd_open(os.getpid()) if namespaces else None
    dying: list[int] = []
    while serve(place, me, dying):
        pass
    if made is not None:
        shutil.rmtree(made, ignore_errors=True)
