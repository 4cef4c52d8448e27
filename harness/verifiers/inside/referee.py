"""Runs a problem's tests and decides; the program is in another process, which is asked and may only answer.

Names that the tests take from the program stand here for proxies. A call sends its arguments and gets the result as plain
data, a copy, and comparing happens here. What is not plain (an instance of the program's own class) stays there, and comes as
a `Thing`: it equals itself alone, has no truth value, and attributes, items and calls are asked of the program.

What this leaves open: a program may say of its own objects what it likes, and helpers that tests take from the program
besides the entry are the program's. Tests that hand the program a function or an object of their own cannot be judged in two
processes: the job is returned as "share" and comes again with that flag; then program and tests run in one process. There a
program that sets out to can claim success: it may change what the tests see, or find the nonce that is to show that they came to
their end and write it at once. Only the outside stays contained. No test of HumanEval, MBPP or LiveCodeBench needs it.
"""

from __future__ import annotations

import builtins
import contextlib
import decimal
import dis
import importlib
import json
import os
import select
import signal
import sys
import time
import types
from collections.abc import Iterator
from typing import Any

from . import wire

PATIENCE = 3.0  # of wall time for each second of computing time: a busy machine changes no verdict
CASES = 20  # computing time of all cases together, in limits of one
TICK = 0.1  # seconds between looks at the computing time
Failure = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    MemoryError,
)
BUILTINS = frozenset(dir(builtins))
LOADS = ("LOAD_NAME", "LOAD_GLOBAL", "LOAD_FROM_DICT_OR_GLOBALS")
STORES = ("STORE_NAME", "STORE_GLOBAL")


class Ended(BaseException):
    """The program is judged; its argument is the verdict. Not an Exception, which tests may catch."""


class Unplain(BaseException):
    """The tests hand the program something that cannot cross."""


def units(tests: str) -> float:
    """How many times the limit of one run the computing time of all is."""
    cases = json.loads(tests)["cases"] if tests.startswith("{") else [None]
    return float(max(1, min(len(cases), CASES)))


def judge(job: dict[str, Any], player: Player) -> str:
    """The verdict on a program."""
    try:
        if job.get("share"):
            return _shared(job, player)
        if not job["tests"].startswith("{"):
            return _asserts(job, player)
        tests = json.loads(job["tests"])
        return {"functional": _functional, "stdin": _stdin}[tests["kind"]](job, tests, player)
    except Ended as end:
        return str(end)
    except Unplain:
        return "share"


class Player:
    """The program's process, as seen from here."""

    def __init__(self, pid: int, orders: int, answers: int) -> None:
        self.pid, self.orders, self.answers = pid, orders, answers
        self.seconds = 0.0
        self.limit = 0
        self.verdict: str | None = None  # stands, whatever the tests do with the exception
        self.things: dict[int, Thing] = {}
        self.handle = os.pidfd_open(pid) if hasattr(os, "pidfd_open") else None
        os.set_blocking(answers, False)

    def limits(self, job: dict[str, Any]) -> None:
        self.seconds, self.limit = job["seconds"], int(job["output"])
        self.restart()

    def restart(self) -> None:
        """A new run of the clocks."""
        self.computed, self.started = self._clock(), time.monotonic()

    def tell(self, message: Any) -> None:
        with self._watched():
            wire.send(self.orders, message)

    def hear(self) -> Any:
        with self._watched():
            return wire.receive(self.answers, self.limit, self._ready)

    def ask(self, operation: str, *arguments: Any) -> Any:
        """The result of an operation there, or its exception, raised here."""
        if self.verdict:
            raise Ended(self.verdict)
        self.tell([operation, *wire.pack(arguments, refer)["tuple"]])
        return self.result()

    def result(self) -> Any:
        reply = self.hear()
        with self._watched():
            if "raised" in reply:
                error = exception([str(n) for n in reply["raised"]], str(reply["text"]))
            else:
                return wire.unpack(reply["value"], self._thing)
        raise error

    def alive(self) -> bool:
        return os.waitpid(self.pid, os.WNOHANG)[0] == 0

    def over(self, verdict: str) -> Ended:
        self.verdict = self.verdict or verdict
        return Ended(self.verdict)

    def _thing(self, number: int) -> Thing:
        return self.things.setdefault(int(number), Thing(self, int(number)))

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Nonsense from there, or silence, is a verdict."""
        try:
            yield
        except (EOFError, BrokenPipeError):
            raise self.over(self._death()) from None
        except (wire.TooLong, *Failure):
            raise self.over("wrong") from None

    def end(self) -> int:
        """The exit status, once it has ended by itself."""
        while True:
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            if pid:
                used = usage.ru_utime + usage.ru_stime - self.computed
                limited = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU
                if limited or (status and used >= self.seconds):
                    raise self.over("timeout")
                return status
            self._wait([])

    def _death(self) -> str:
        """Why it hung up: its computing time was over, or it is no answer."""
        try:
            self.end()
        except Ended as end:
            return str(end)
        return "wrong"

    def _ready(self) -> None:
        """Wait for something to read; Ended when the time is over or the process has."""
        while not self._wait([self.answers]):
            pass

    def _wait(self, watched: list[int]) -> bool:
        """Whether one of these can be read; returns when the process ends, and after a tick."""
        if self.handle is not None:
            watched = [*watched, self.handle]
        ready = select.select(watched, [], [], TICK if self.handle is not None else TICK / 50)[0]
        if ready and self.handle not in ready:
            return True
        if ready and len(watched) > 1:
            raise self.over(self._death())
        late = time.monotonic() - self.started >= PATIENCE * self.seconds
        if not ready and (late or self._clock() - self.computed >= self.seconds):
            raise self.over("timeout")
        return False

    def _clock(self) -> float:
        """Computing time of that process, its threads included."""
        if not sys.platform.startswith("linux"):
            return 0.0
        try:
            return time.clock_gettime((~self.pid << 3) | 2)  # what clock_getcpuclockid returns
        except OSError:
            return 0.0


def refer(value: Any) -> int:
    if type(value) is Thing:
        return int(object.__getattribute__(value, "_number"))
    raise Unplain


class Thing:
    """An object of the program's, there."""

    __slots__ = ("_number", "_player")

    def __init__(self, player: Player, number: int) -> None:
        object.__setattr__(self, "_player", player)
        object.__setattr__(self, "_number", number)

    def __bool__(self) -> bool:
        raise TypeError("an object of the program's has no truth value")

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._player.ask("call", self, arguments, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._player.ask("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._player.ask("set", self, name, value)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._player.ask("list", self))

    def __len__(self) -> int:
        return int(self._player.ask("len", self))

    def __getitem__(self, key: Any) -> Any:
        return self._player.ask("item", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._player.ask("put", self, key, value)

    def __next__(self) -> Any:
        return self._player.ask("next", self)


def exception(names: list[str], text: str) -> BaseException:
    """One of the same name, under the nearest builtin class."""
    for name in names:
        base = getattr(builtins, name, None)
        if isinstance(base, type) and issubclass(base, BaseException):
            kind = base if name == names[0] else type(names[0], (base,), {})
            with contextlib.suppress(TypeError):
                return kind(text)
    return Exception(text)


def wanted(tests: types.CodeType, entry: str | None) -> dict[str, bool]:
    """Names that tests use and do not define; True: a module of the standard library, which is taken from here."""
    used: set[str] = set()
    bound: set[str] = set()
    dotted: set[str] = set()
    codes = [tests]
    while codes:  # the code and not the source: tests are compiled anyway, and parsing twice costs more than running most
        code = codes.pop()
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        last = None
        for step in dis.get_instructions(code):
            if step.opname in LOADS:
                used.add(step.argval)
                last = step.argval
                continue
            if step.opname in STORES:
                bound.add(step.argval)
            elif last and step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                dotted.add(last)
            last = None
    free = used - bound - BUILTINS | ({entry} if entry else set())
    if not free:  # a program may have a builtin's name: MBPP asks for a `sum`
        free = used - bound
    own = (dotted & sys.stdlib_module_names) - {entry}
    return {name: name in own for name in sorted(free)}


def _start(job: dict[str, Any], player: Player, **more: Any) -> None:
    order = {key: job[key] for key in ("program", "seconds")}
    player.tell({**order, "most": units(job["tests"]) * job["seconds"], **more})


def _asserts(job: dict[str, Any], player: Player) -> str:
    """Python tests: right if they end without an exception."""
    tests = compile(job["tests"], "tests", "exec", dont_inherit=True)
    names = wanted(tests, job.get("entry"))
    _start(
        job, player, way="serve", prelude=False, names=[n for n, own in names.items() if not own]
    )
    try:
        found = player.result()  # which may say more than was asked
        space = {"__name__": "tests"} | {name: found[name] for name in names if name in found}
        space |= {name: importlib.import_module(name) for name, own in names.items() if own}
        exec(tests, space)
    except (Ended, Unplain):
        raise
    except BaseException:
        return player.verdict or "wrong"
    return player.verdict or ("ok" if player.alive() else "wrong")


def _functional(job: dict[str, Any], tests: dict[str, Any], player: Player) -> str:
    """Calls of a function or of a method of one instance, as LiveCodeBench makes them."""
    names = [name for name in (tests.get("class"), tests["entry"]) if name]
    _start(job, player, way="serve", prelude=True, names=names)
    try:
        found = player.result()
        if tests.get("class") in found:
            function = getattr(found[tests["class"]](), tests["entry"])
        else:
            function = found[tests["entry"]]
        for arguments, expected in tests["cases"]:
            player.restart()
            if plain(function(*arguments)) != plain(expected):
                return "wrong"
    except (Ended, Unplain):
        raise
    except BaseException:  # SystemExit for one
        return player.verdict or "wrong"
    return "ok" if player.alive() else "wrong"


def plain(value: Any) -> Any:
    """As JSON would have it: no tuples, and keys are strings."""
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {k if isinstance(k, str) else json.dumps(k): plain(v) for k, v in value.items()}
    return value


def _stdin(job: dict[str, Any], tests: dict[str, Any], player: Player) -> str:
    """Runs as a script, each with one input."""
    _start(job, player, way="script")
    for given, expected in tests["cases"]:
        player.restart()
        player.tell(given)
        run = player.hear()
        if run.get("status") == "timeout":
            return "timeout"
        if run.get("status") != "ended" or not printed_alike(str(run.get("output")), expected):
            return "wrong"
    return "ok"


def printed_alike(output: str, expected: str) -> bool:
    """Line by line: the same text, or the same numbers."""
    ours, theirs = (
        [line.strip() for line in text.strip().split("\n")] for text in (output, expected)
    )
    return len(ours) == len(theirs) and all(
        a == b or _same_numbers(a, b) for a, b in zip(ours, theirs, strict=True)
    )


def _same_numbers(ours: str, theirs: str) -> bool:
    try:
        return [*map(decimal.Decimal, ours.split())] == [*map(decimal.Decimal, theirs.split())]
    except ArithmeticError:
        return False


def _shared(job: dict[str, Any], player: Player) -> str:
    """Both in the program's process, which shows by a nonce that it came to the end."""
    nonce = os.urandom(16)  # drawn after the fork: it is nowhere in the program's memory
    _start(job, player, way="share", tests=job["tests"])
    with contextlib.suppress(BrokenPipeError):
        os.write(player.orders, nonce)
    status = player.end()
    with contextlib.suppress(BlockingIOError):
        if status == 0 and os.read(player.answers, 64) == nonce:
            return "ok"
    return "wrong"
