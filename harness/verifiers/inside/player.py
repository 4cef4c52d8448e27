"""The program's process: loads the program, and does what the referee asks with what it defines.

Nothing here is to be trusted once the program runs. It was forked before the referee read its job, so the tests are nowhere
in its memory, and all that it can say is plain data: an answer to the question that was put.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import functools
import math
import operator
import os
import random
import resource
import signal
import sys
import tempfile
import threading
import types
from collections.abc import Callable
from typing import Any

from . import wire

SECONDS_MORE = 1  # between the signal that a program may catch and the one that it may not

# What LiveCodeBench puts before a program: solutions in LeetCode's style take these names for granted.
PRELUDE = """
from string import *
from re import *
from datetime import *
from collections import *
from heapq import *
from bisect import *
from copy import *
from math import *
from random import *
from statistics import *
from itertools import *
from functools import *
from operator import *
from io import *
from sys import *
from json import *
from builtins import *
from typing import *
import string, re, datetime, collections, heapq, bisect, copy, math, random, statistics, itertools, functools, operator
import io, sys, json
sys.setrecursionlimit(50000)
"""


def play(orders: int, answers: int, limit: int) -> int:
    """Serve the referee until it hangs up; the exit status."""
    this, pid, send, receive = os.getpid, os.getpid(), wire.send, wire.receive
    order = receive(orders, limit)
    vars(builtins).update(exit=sys.exit, quit=sys.exit)  # which `site` would have made
    most = (
        math.ceil(order["most"]) + SECONDS_MORE
    )  # the referee's clock comes first, where it has one
    resource.setrlimit(resource.RLIMIT_CPU, (most, most + SECONDS_MORE))
    if order["way"] == "share":
        return share(order, orders, answers)
    program = functools.partial(compile, order["program"], "program", "exec", dont_inherit=True)
    if order["way"] == "script":
        while True:
            send(answers, case(program, receive(orders, limit), order["seconds"]))
    stage = Stage()
    reply = stage.answer(functools.partial(stage.load, program, order["prelude"], order["names"]))
    while this() == pid:  # and not a fork that the program made
        send(answers, reply)
        reply = stage.answer(functools.partial(stage.do, *receive(orders, limit)))
    return 1


class Stage:
    """The program's module, and the objects of it that the referee holds references to."""

    def __init__(self) -> None:
        self.module = module("solution")
        self.things: list[Any] = []
        self.numbers: dict[int, int] = {}  # id → its place in things, which keeps it alive
        self.operations: dict[str, Callable[..., Any]] = {
            "call": lambda thing, arguments, named: thing(*arguments, **named),
            "get": getattr,
            "set": setattr,
            "list": list,
            "len": len,
            "item": operator.getitem,
            "put": operator.setitem,
            "next": next,
        }

    def load(
        self, program: Callable[[], types.CodeType], prelude: bool, names: list[str]
    ) -> dict[str, Any]:
        """Run the program; of these names those that it has."""
        random.seed(0)
        if prelude:
            exec(PRELUDE, self.module.__dict__)
        exec(program(), self.module.__dict__)
        return {name: getattr(self.module, name) for name in names if hasattr(self.module, name)}

    def do(self, operation: str, *arguments: Any) -> Any:
        return self.operations[operation](*wire.unpack([*arguments], self.things.__getitem__))

    def answer(self, action: Callable[[], Any]) -> dict[str, Any]:
        """What an action returns, or what it raises by its class's names."""
        try:
            return {"value": wire.pack(action(), self.refer)}
        except BaseException as error:
            names = [kind.__name__ for kind in type(error).__mro__]
            text = ""
            with contextlib.suppress(BaseException):
                text = str(error)[:1000]
            return {"raised": names, "text": text}

    def refer(self, value: Any) -> int:
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.things)
            self.things.append(value)
        return self.numbers[id(value)]


def module(name: str) -> types.ModuleType:
    made = types.ModuleType(name)
    sys.modules[name] = made
    return made


def share(order: dict[str, Any], orders: int, answers: int) -> int:
    """Program and tests in this one process; what comes back is a nonce that is read after the last test."""
    read, write, this, pid = os.read, os.write, os.getpid, os.getpid()
    solution = module("solution")
    random.seed(0)
    exec(compile(order["program"], "program", "exec", dont_inherit=True), solution.__dict__)
    exec(compile(order["tests"], "tests", "exec", dont_inherit=True), solution.__dict__)
    if this() != pid:
        return 1
    write(answers, read(orders, 16))
    return 0


def case(program: Callable[[], types.CodeType], text: str, seconds: float) -> dict[str, Any]:
    """What a program prints that is run as a script with this input, in a fork of its own."""
    with tempfile.TemporaryFile(dir=".") as given, tempfile.TemporaryFile(dir=".") as printed:
        given.write(text.encode())
        given.seek(0)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                script(program, given.fileno(), printed.fileno(), math.ceil(seconds))
                code = 0
            finally:
                os._exit(code)
        status = os.waitpid(child, 0)[1]
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child, signal.SIGKILL)  # what it started and left
        late = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)
        printed.seek(0)
        return {
            "status": "timeout" if late else "ended" if status == 0 else "failed",
            "output": printed.read().decode(errors="replace"),
        }


def script(program: Callable[[], types.CodeType], given: int, printed: int, seconds: int) -> None:
    os.setpgid(0, 0)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + SECONDS_MORE))
    os.dup2(given, 0)
    os.dup2(printed, 1)
    os.closerange(3, 64)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    main = module("__main__")
    random.seed(0)
    exec(PRELUDE, main.__dict__)
    with contextlib.suppress(SystemExit):
        exec(program(), main.__dict__)
    for (
        thread
    ) in threading.enumerate():  # as an interpreter ends: threads, then what was to be done last
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
