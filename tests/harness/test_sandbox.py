"""Hostile programs are contained, judged on their tests, and leave nothing behind."""

from __future__ import annotations

import ast
import base64
import gzip
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import harness
from harness import verifiers
from harness.types import Problem
from harness.verifiers import code, sandbox, verify, verify_many, versions, workers
from harness.verifiers.inside import referee, wire

DATA = os.environ.get("RETORT_DATA")
ROOT = Path(__file__).parents[2]
TESTS = "assert f(2) == 4\nassert f(3) == 9\n"
IDLE = 5  # bubblewrap twice, the server, and a referee and a player that wait for the next job
needs_bubblewrap = pytest.mark.skipif(
    sandbox.unusable() is not None, reason=f"bubblewrap {sandbox.unusable()}"
)


def status(program: str, tests: str = TESTS, entry: str | None = None, source: str = "") -> str:
    problem = Problem("c", "?", tests=tests, verifier="code", entry=entry, source=source)
    return verify(problem, f"~~~~\n{textwrap.dedent(program)}\n~~~~").status


def cases_of(kind: str, cases: list[Any], **more: Any) -> str:
    return json.dumps({"kind": kind, "cases": cases, **more})


def descendants(pid: int) -> set[int]:
    """Processes that a process started, and what they started."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:
                continue
            if state != "Z":
                parents[int(entry.name)] = int(parent)
    found, new = {pid}, {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - found
        found |= new
    return found


# Attacks. `attack()` is true if it worked, and only then is f right, so that "wrong" means that it did not.

CONTAINED = {
    "network": """
        import socket
        def attack():
            socket.create_connection(("1.1.1.1", 53), timeout=0.2)
            return True
        """,
    "the host's loopback": """
        import socket
        def attack():
            with socket.socket() as s:
                s.settimeout(0.2)
                return s.connect_ex(("127.0.0.1", PORT)) == 0
        """,
    "name resolution": """
        import socket
        def attack(): return socket.gethostbyname("example.org")
        """,
    "interfaces": """
        import socket
        def attack(): return [name for _, name in socket.if_nameindex() if name != "lo"]
        """,
    "raw socket": """
        import socket
        def attack(): return socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        """,
    "reading users": "def attack(): return open('/etc/passwd').read()",
    "reading a secret": "def attack(): return open('SECRET').read()",
    "reading homes": """
        import os
        def attack():
            for top, folders, files in os.walk("/root"):
                if any(name.startswith(".bash") or name in (".ssh", ".cache") for name in files + folders):
                    return True
        """,
    "reading the bench": """
        import glob
        def attack(): return glob.glob("/**/harness/**", recursive=True) or glob.glob("ROOT/*")
        """,
    "site-packages": "def attack():\n    import numpy\n    return True",
    "writing to the host": """
        def attack():
            for path in ("ESCAPED", "/escaped", "/usr/escaped", "/inside/escaped", "/dev/escaped"):
                try:
                    open(path, "w").write("1")
                except OSError:
                    continue
                return not path.startswith("/tmp/")
        """,
    "changing the checker": """
        import glob, os
        def attack():
            for path in glob.glob("/inside/*.py") + [os.__file__]:
                for action in (lambda: open(path, "a"), lambda: os.chmod(path, 0o777), lambda: os.unlink(path), lambda: os.rename(path, path + "x")):
                    try:
                        action()
                        return True
                    except OSError:
                        pass
        """,
    "symbolic links": """
        import os
        def attack():
            os.symlink("/", "up")
            os.symlink("SECRET", "secret")
            return os.path.exists("up/etc/passwd") or os.path.exists("secret")
        """,
    "dot dot": "def attack(): return open('../../../../../../etc/passwd').read()",
    "environment": "import os\ndef attack(): return os.environ",
    "proc of others": """
        import glob
        def attack(): return glob.glob("/proc/*")
        """,
    "sysfs": "import os\ndef attack(): return os.listdir('/sys')",
    "killing the parent": """
        import os, signal
        def attack():
            os.kill(os.getppid(), signal.SIGKILL)
            return os.getppid() != 1
        """,
    "other processes": """
        import os
        def attack():
            for pid in range(1, 5000):
                try:
                    os.kill(pid, 0)
                except ProcessLookupError:
                    continue
                except PermissionError:
                    pass
                if pid not in (1, os.getpid()):
                    return True
        """,
    "ptrace": """
        import ctypes, os
        def attack():
            libc = ctypes.CDLL(None, use_errno=True)
            return libc.ptrace(16, os.getppid(), 0, 0) == 0 or libc.ptrace(0, 0, 0, 0) == 0
        """,
    "memory of the parent": """
        import ctypes, os
        def attack():
            libc = ctypes.CDLL(None, use_errno=True)
            buffer = ctypes.create_string_buffer(8)
            class Part(ctypes.Structure):
                _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
            ours, theirs = Part(ctypes.addressof(buffer), 8), Part(id(os), 8)
            return libc.process_vm_readv(os.getppid(), ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0) > 0
        """,
    "dev mem": "def attack(): return open('/dev/mem', 'rb').read(1)",
    "devices": "import os\ndef attack(): return set(os.listdir('/dev')) - {'null', 'zero', 'full', 'random', 'urandom'}",
    "making a device": "import os\ndef attack():\n    os.mknod('disk', 0o60600, os.makedev(8, 0))\n    return open('disk', 'rb')",
    "becoming root": """
        import os
        def attack():
            for change in (lambda: os.setuid(0), lambda: os.setresuid(0, 0, 0), lambda: os.setgroups([0])):
                try:
                    change()
                except OSError:
                    continue
                return os.geteuid() == 0 and ROOT_OUTSIDE
        """,
    "new user namespace": """
        import ctypes
        def attack(): return ctypes.CDLL(None).unshare(0x10000000) == 0
        """,
    "clone into a namespace": """
        import ctypes, os
        def attack():
            libc = ctypes.CDLL(None)
            number = {"x86_64": 56, "aarch64": 220}[os.uname().machine]
            child = libc.syscall(number, 0x10000000 | 17, 0, 0, 0, 0)
            if child == 0:
                os._exit(0)
            return child > 0
        """,
    "mounting": """
        import ctypes
        def attack(): return ctypes.CDLL(None).mount(b"tmpfs", b"/work", b"tmpfs", 0, None) == 0
        """,
    "leaving the root": "import os\ndef attack():\n    os.chroot('.')\n    return True",
    "raising limits": """
        import resource
        def attack():
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
            return True
        """,
    "keyring": """
        import ctypes, os
        def attack():
            number = {"x86_64": 248, "aarch64": 217}[os.uname().machine]
            return ctypes.CDLL(None).syscall(number, b"user", b"left", b"behind", 6, -3) > 0
        """,
    "filling the disk": """
        def attack():
            for i in range(20):
                open(f"file{i}", "wb").write(bytes(15 << 20))
            return True
        """,
    "a large file": "def attack():\n    open('file', 'wb').write(bytes(100 << 20))\n    return True",
    "many files": "def attack():\n    for i in range(100_000):\n        open(f'file{i}', 'w').close()\n    return True",
    "memory": "def attack(): return bytearray(4 << 30)",
    "memory, bit by bit": "def attack():\n    kept = []\n    while len(kept) < 300: kept.append(bytearray(16 << 20))\n    return True",
    "shared memory": """
        import ctypes
        def attack(): return ctypes.CDLL(None).shmget(0, 400 << 20, 0o1600) >= 0
        """,
    "semaphores": """
        import ctypes
        def attack(): return ctypes.CDLL(None).semget(0, 32000, 0o1600) >= 0
        """,
    "messages": """
        import ctypes
        def attack(): return ctypes.CDLL(None).msgget(0, 0o1600) >= 0
        """,
    "memory as a file": """
        import os
        def attack(): return os.memfd_create("x") >= 0
        """,
    "what others left": """
        import os
        def attack():
            left = os.listdir(".") or os.listdir("/tmp")
            open("left", "w").write("1")
            return left
        """,
    "the tests in memory": """
        import gc, sys
        def attack():
            needle = "assert f(" + "3) == 9"
            frame, seen = sys._getframe(), []
            while frame:
                seen += list(frame.f_locals.values())
                frame = frame.f_back
            seen += [v for thing in gc.get_objects() if isinstance(thing, dict) for v in thing.values()]
            return [v for v in seen if isinstance(v, str) and needle in v and v != needle]
        """,
}
TEMPLATE = """
{attack}
try:
    worked = bool(attack())
except BaseException:
    worked = False
def f(x):
    return x * x if worked else None
"""

# Programs that do not solve the problem, or are not to end well, and what is said of them.
FORGED = {
    "printing a verdict": ("print('ok\\npassed\\n\"ok\"')", "wrong"),
    "exit(0)": ("import sys\nsys.exit(0)", "wrong"),
    "exit in the function": ("def f(x): raise SystemExit(0)", "wrong"),
    "os._exit": ("import os\nos._exit(0)", "wrong"),
    "os._exit in the function": ("import os\ndef f(x): os._exit(0)", "wrong"),
    "SystemExit in a destructor": (
        "class A:\n    def __del__(self): raise SystemExit(0)\na = A()\ndel a\ndef f(x): A()",
        "wrong",
    ),
    "os._exit in a destructor": (
        "import os\nclass A:\n    def __del__(self): os._exit(0)\ndef f(x):\n    A()\n    return 1",
        "wrong",
    ),
    "os._exit at exit": ("import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return 1", "wrong"),
    "always equal": (
        "class A:\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\ndef f(x): return A()",
        "wrong",
    ),
    "an int that is always equal": (
        "class A(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\ndef f(x): return A(1)",
        "wrong",
    ),
    "a class whose instances are equal": (
        "class M(type):\n    def __eq__(self, other): return True\n    __hash__ = type.__hash__\nclass A(metaclass=M): pass\ndef f(x): return A",
        "wrong",
    ),
    "patched builtins": (
        "import builtins\nbuiltins.AssertionError = type('E', (BaseException,), {})\nbuiltins.compile = lambda *a, **k: (lambda: 0).__code__\nbuiltins.exec = lambda *a: None\ndef f(x): return 1",
        "wrong",
    ),
    "patched unittest": (
        "import unittest\nunittest.TestCase.assertEqual = lambda *a: None\nunittest.TestCase.run = lambda *a: None\ndef f(x): return 1",
        "wrong",
    ),
    "sys.modules": (
        "import sys\nfor name in list(sys.modules):\n    if name not in ('sys', 'builtins'): sys.modules[name] = type(sys)(name)\ndef f(x): return 1",
        "wrong",
    ),
    "a patched referee": (
        "import sys\nfor name, module in list(sys.modules.items()):\n    if name.startswith('inside'):\n        for key, value in list(vars(module).items()):\n            if callable(value): setattr(module, key, lambda *a, **k: 'ok')\ndef f(x): return 1",
        "wrong",
    ),
    "settrace": (
        "import sys\ndef trace(frame, event, value):\n    frame.f_trace_opcodes = True\n    return trace\nsys.settrace(trace)\nsys.setprofile(trace)\ndef f(x): return 1",
        "wrong",
    ),
    "bytes into every descriptor": (
        "import os\nfor n in range(1024):\n    for text in (b'\"ok\"\\n', b'ok', b'\\0' * 8 + b'ok'):\n        try: os.write(n, text)\n        except OSError: pass\ndef f(x): return 1",
        "wrong",
    ),
    "a forged answer": (
        "import json, os\nbody = json.dumps({'value': {'dict': [['f', 4], ['__builtins__', {'dict': []}], ['verdict', 'ok']]}}).encode()\nfor n in range(3, 64):\n    try: os.write(n, len(body).to_bytes(8, 'big') + body)\n    except OSError: pass\ndef f(x): return 1",
        "wrong",
    ),
    "an absurd length": (
        "import os\nfor n in range(3, 64):\n    try: os.write(n, b'\\xff' * 8)\n    except OSError: pass\ndef f(x): return 1",
        "wrong",
    ),
    "deep nesting": (
        "import os\nbody = b'[' * 1000000\nfor n in range(3, 64):\n    try: os.write(n, len(body).to_bytes(8, 'big') + body)\n    except OSError: pass\ndef f(x): return 1",
        "wrong timeout",
    ),
    "every descriptor closed": ("import os\nos.closerange(0, 1024)\ndef f(x): return x * x", "wrong"),
    "the parent leaves, a fork goes on": ("import os\nif os.fork(): os._exit(0)\ndef f(x): return x * x", "wrong"),
    "a fork answers too": ("import os\nos.fork()\ndef f(x):\n    os.fork()\n    return 1", "wrong"),
    "__reduce__": (
        "import os\nclass A:\n    def __reduce__(self): return os.system, ('touch /tmp/escaped',)\ndef f(x): return [A(), {A(): 1}]",
        "wrong",
    ),
    "a huge answer": ("def f(x): return 'x' * 100_000_000", "wrong"),
    "a huge answer of small parts": ("def f(x): return [[]] * 20_000_000", "wrong timeout"),
    "a huge number": ("def f(x): return 1 << 400_000_000", "wrong timeout"),
    "an answer that holds itself": ("def f(x):\n    a = []\n    a.append(a)\n    return a", "wrong"),
    "endless items": ("class A(list):\n    def __iter__(self):\n        while True: yield 1\ndef f(x): return A()", "wrong"),
    "a result that sleeps": ("import time\nclass A(int):\n    def __int__(self): time.sleep(1000)\n    __index__ = __int__\ndef f(x): time.sleep(1000)", "timeout"),
    "deep recursion": ("import sys\nsys.setrecursionlimit(10**9)\ndef g(x): return [*map(g, [x])]\ndef f(x): return g(x)", "wrong timeout"),
    "endless recursion": ("def f(x): return f(x)", "wrong"),
    "a broken stack": ("import ctypes\ndef f(x): ctypes.string_at(0)", "wrong"),
    "endless loop": ("while True: pass", "timeout"),
    "endless loop in the function": ("def f(x):\n    while True: pass", "timeout"),
    "endless loop in C": ("def f(x): return sum(range(10**18))", "timeout"),
    "endless sleep": ("import time\ntime.sleep(1000)", "timeout"),
    "endless output": ("while True: print('x' * 100_000)", "timeout"),
    "endless errors": ("import sys\nwhile True: sys.stderr.write('x' * 100_000)", "timeout"),
    "ignored signals": (
        "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass\nwhile True: pass",
        "timeout",
    ),
    "exceptions ignored": ("while True:\n    try:\n        while True: pass\n    except BaseException: pass", "timeout"),
    "a destructor that loops": ("class A:\n    def __del__(self):\n        while True: pass\nA()", "timeout"),
    "fork bomb": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", "timeout wrong"),
    "fork bomb that gives up": ("import os\nwhile True: os.fork()", "wrong timeout"),
    "thread bomb": ("import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(1000,)).start()", "wrong"),
    "forks that hog memory": (
        "import os\nfor _ in range(3): os.fork()\nkept = []\nwhile True: kept.append(bytearray(1 << 24))",
        "wrong timeout",
    ),
    "stopping the parent": ("import os, signal\nos.kill(os.getppid(), signal.SIGSTOP)\ndef f(x): return 1", "wrong"),
    "killing all": ("import os, signal\nos.kill(-1, signal.SIGKILL)\ndef f(x): return 1", "wrong"),
    "killing the group": ("import os, signal\nos.killpg(0, signal.SIGKILL)\ndef f(x): return 1", "wrong"),
    "killing itself": ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "wrong"),
    "stopping itself": ("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", "timeout"),
    "no function": ("g = 1", "wrong"),
    "no program": ("def f(x) return", "wrong"),
}  # fmt: skip

# Programs that do what they should not, and solve the problem all the same.
SOLVED = {
    "threads left": "import threading, time\nfor _ in range(3): threading.Thread(target=time.sleep, args=(1000,)).start()\ndef f(x): return x * x",
    "children left": "import os, time\nfor _ in range(3):\n    if os.fork() == 0:\n        os.setsid()\n        time.sleep(1000)\ndef f(x): return x * x",
    "a daemon": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(1000)\n    os._exit(0)\ndef f(x): return x * x",
    "children that ignore signals": "import os, signal, time\nif os.fork() == 0:\n    for n in range(1, 65):\n        try: signal.signal(n, signal.SIG_IGN)\n        except (OSError, ValueError): pass\n    while True: time.sleep(1)\ndef f(x): return x * x",
    "shared memory left": "import ctypes\nctypes.CDLL(None).shmget(4711, 1 << 20, 0o1777)\nopen('/tmp/left', 'w').write('1')\ndef f(x): return x * x",
    "a listener left": "import socket\ns = socket.socket(socket.AF_UNIX)\ns.bind('\\0left')\ns.listen()\ndef f(x): return x * x",
    "much output": "print('x' * 10_000_000)\ndef f(x): return x * x",
    "an import of the checker": "import inside.referee, inside.nursery\ndef f(x): return x * x",
}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(code.LIMITS, "seconds", 0.4)


@pytest.fixture(scope="module")
def secret() -> Iterator[Path]:
    """A file that anyone on the host may read."""
    with tempfile.NamedTemporaryFile("w", prefix="hostile-", suffix=".txt") as file:
        file.write("secret")
        file.flush()
        os.chmod(file.name, 0o644)
        yield Path(file.name)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def clean() -> Iterator[None]:
    """Nothing is left when a test ends: no process, no file."""
    folders = [Path(tempfile.gettempdir()), Path("/dev/shm"), Path("/"), Path("/var/tmp")]
    mine = re.compile("escaped|left")
    before = {p for f in folders if f.is_dir() for p in f.iterdir() if mine.search(p.name)}
    yield
    after = {p for f in folders if f.is_dir() for p in f.iterdir() if mine.search(p.name)}
    assert after <= before
    idle = workers.POOLS["bubblewrap"]._idle
    deadline = time.monotonic() + 10
    while any(len(descendants(w.process.pid)) > IDLE for w in idle):
        assert time.monotonic() < deadline, "a process is left"
        time.sleep(0.01)


def hostile(name: str, secret: Path, port: int) -> str:
    attack = textwrap.dedent(CONTAINED[name]).replace("SECRET", str(secret))
    attack = attack.replace("ESCAPED", str(secret.parent / "escaped")).replace("PORT", str(port))
    attack = attack.replace("ROOT_OUTSIDE", str(os.geteuid() == 0)).replace("ROOT/", f"{ROOT}/")
    return TEMPLATE.format(attack=attack)


@needs_bubblewrap
@pytest.mark.usefixtures("short", "clean")
@pytest.mark.parametrize("name", CONTAINED)
def test_attacks_do_not_work(name: str, secret: Path, port: int) -> None:
    assert status(hostile(name, secret, port)) in ("wrong", "timeout")


@needs_bubblewrap
@pytest.mark.usefixtures("short", "clean")
@pytest.mark.parametrize("name", FORGED)
def test_programs_that_do_not_solve_the_problem(name: str) -> None:
    program, expected = FORGED[name]
    assert status(program) in expected.split()


@needs_bubblewrap
@pytest.mark.usefixtures("short", "clean")
@pytest.mark.parametrize("name", SOLVED)
def test_programs_that_misbehave_and_solve_the_problem(name: str) -> None:
    assert status(SOLVED[name]) == "ok"
    left = "import ctypes, os\ndef f(x): return (x * x, os.listdir('.'), ctypes.CDLL(None).shmget(4711, 1, 0) < 0)"
    assert status(left, "assert f(2) == (4, [], True)") == "ok"


def test_an_attack_that_works_would_show() -> None:
    assert status(TEMPLATE.format(attack="def attack(): return True")) == "ok"
    assert len(CONTAINED) + len(FORGED) + len(SOLVED) >= 40


@needs_bubblewrap
def test_a_program_gives_no_names_that_were_not_asked_for() -> None:
    program = """
        import json
        old = json.dumps
        def dumps(message):
            if "value" in message and "dict" in (message["value"] or ()):
                message["value"]["dict"] += [["sorted", {"thing": 0}]]
            return old(message)
        json.dumps = dumps
        def f(x): return [1]
        """
    assert status(program, "assert sorted(f(2)) == sorted([4])") == "wrong"
    assert status("def sorted(x): return 0\ndef f(x): return [1]", "assert sorted(f(2)) == sorted([4])") == "wrong"  # fmt: skip


# What tests may do


@pytest.mark.parametrize("kind", ["bubblewrap", "fallback"])
@pytest.mark.parametrize(
    ("program", "tests", "expected"),
    [
        ("def f(*a, k): return a, k", "assert f(1, (2,), k={3: {4}}) == ((1, (2,)), {3: {4}})", "ok"),
        ("def f(x): return x", "for x in (None, True, 1, -2**70, 0.1, 1j, '\\ud800', b'\\xff', [], (1,), {1: (2,)}, {3}, frozenset({4}), range(5), int): assert type(f(x)) is type(x) and f(x) == x", "ok"),
        ("def f(x): return x", "assert f(float('nan')) != f(float('nan')) and f(float('inf')) > 1e308", "ok"),
        ("def f(x): return [x]", "assert f((1,)) == [[1]]", "wrong"),  # a tuple stays one
        ("from collections import Counter, namedtuple\nP = namedtuple('P', 'a b')\ndef f(x): return Counter(x), P(1, 2)", "assert f('aab') == ({'a': 2, 'b': 1}, (1, 2))", "ok"),
        ("def f(x): raise KeyError('no')", "try:\n    f(1)\nexcept LookupError as e:\n    assert type(e) is KeyError\nelse:\n    assert False", "ok"),
        ("class Mine(ValueError): pass\ndef f(x): raise Mine('no')", "try:\n    f(1)\nexcept ValueError as e:\n    assert type(e).__name__ == 'Mine' and str(e) == 'no'\nelse:\n    assert False", "ok"),
        ("def f(x): return 1", "try:\n    f(1)\nexcept ValueError:\n    pass\nelse:\n    assert False", "wrong"),
        ("class Node:\n    def __init__(self, v): self.v, self.left = v, None\ndef f(n): return 1 + f(n.left) if n else 0", "root = Node(1)\nroot.left = Node(2)\nassert f(root) == 2 and root.left.v == 2", "ok"),
        ("def f(n):\n    yield from range(n)", "assert list(f(3)) == [0, 1, 2]", "ok"),
        ("def f(n):\n    yield from range(n)", "assert f(3) == [0, 1, 2]", "wrong"),
        ("def f(n): return object()", "assert f(3)", "wrong"),
        ("LIMIT = 3\ndef f(n): return n", "assert f(LIMIT) == 3", "ok"),
        ("import sys\ndef f(n): return n", "assert f(sys.maxsize) == sys.maxsize", "ok"),
        ("def f(a):\n    a.append(4)", "a = [1]\nf(a)\nassert a == [1]", "ok"),  # arguments are copies
        ("def f(g): return g(3)", "assert f(lambda x: x + 1) == 4", "ok"),  # in one process
        ("def f(g): return g(3)", "assert f(lambda x: x + 1) == 5", "wrong"),
        ("def f(g): raise SystemExit(0)", "assert f(lambda x: x + 1) == 5", "wrong"),
        ("import os\ndef f(g): os._exit(0)", "assert f(lambda x: x + 1) == 5", "wrong"),
        ("while True: pass\ndef f(g): pass", "f(len, print)", "timeout"),
        ("def f(x): return 4", "assert f(2) == 4\nwhile True: pass", "timeout"),
        ("def f(x): return 4", "try:\n    f(len)\nexcept BaseException:\n    pass", "ok"),
        ("import os\ndef f(x): os._exit(0)", "try:\n    f(2)\nexcept BaseException:\n    pass", "wrong"),
    ],
)  # fmt: skip
def test_tests(
    program: str, tests: str, expected: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "bubblewrap" and sandbox.unusable():
        pytest.skip("no bubblewrap")
    monkeypatch.setenv("RETORT_SANDBOX", kind)
    monkeypatch.setitem(code.LIMITS, "seconds", 1.0)
    assert status(program, tests) == expected


def test_a_function_may_have_a_builtin_name() -> None:
    for entry in ("sum", None):
        assert status("def sum(a, b): return 6", "assert sum(10, 15) == 6", entry) == "ok"


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("class Solution:\n    def f(self, xs: List[int]) -> int:\n        return tuple(xs), {1: sum(xs)}", "ok"),
        ("def f(xs): return [xs, {'1': sum(xs)}]", "ok"),
        ("class Solution:\n    def f(self, xs): return [xs, {'1': 3}]", "wrong"),
        ("class Solution:\n    def g(self, xs): return 1", "wrong"),
        ("class Solution:\n    def f(self, xs): exit()", "wrong"),
        ("class Solution:\n    def f(self, xs):\n        while True: pass", "timeout"),
        ("class A:\n    def __eq__(self, other): return True\ndef f(xs): return A()", "wrong"),
        ("f = 1", "wrong"),
    ],
)  # fmt: skip
def test_functional(program: str, expected: str, short: None) -> None:
    cases = [[[[1, 2]], [[1, 2], {"1": 3}]], [[[4]], [[4], {"1": 4}]]]
    tests = cases_of("functional", cases, entry="f", **{"class": "Solution"})
    assert status(program, tests) == expected


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("print(sum(map(int, input().split())))", "ok"),
        ("import sys\nprint(float(sum(map(int, sys.stdin.read().split()))), end=' \\n\\n')\nsys.exit(3)", "ok"),
        ("import os\nos.write(1, str(sum(map(int, os.read(0, 99).split()))).encode())\nos._exit(0)", "ok"),
        ("if __name__ == '__main__':\n    print(sum(map(int, open(0).read().split())))", "ok"),
        ("print(sum(map(int, input().split())))\nquit()", "ok"),
        ("import threading\nthreading.Thread(target=lambda: print(sum(map(int, input().split())))).start()", "ok"),
        ("import atexit, io, sys\nout = io.StringIO()\natexit.register(lambda: sys.stdout.write(out.getvalue()))\nout.write(str(sum(map(int, input().split()))))", "ok"),
        ("print(3)", "wrong"),
        ("print(sum(map(int, input().split())), 0)", "wrong"),
        ("print(sum(map(int, input().split())))\nprint()\nprint(1)", "wrong"),
        ("print(sum(map(int, input().split())))\n1 / 0", "wrong"),
        ("import os\nopen('n', 'a').write('x')\nprint([3, 9][len(open('n').read()) - 1])\nos._exit(1)", "wrong"),
        ("while True: pass", "timeout"),
        ("while True: print('x' * 100_000)", "wrong"),  # a full file is an error
        ("import time\ntime.sleep(1000)", "timeout"),
        ("import os, signal\nos.kill(os.getppid(), signal.SIGKILL)", "wrong"),
        ("import os, time\nprint(sum(map(int, input().split())), flush=True)\nif os.fork(): os._exit(0)\ntime.sleep(1000)", "ok"),
    ],
)  # fmt: skip
def test_stdin(program: str, expected: str, short: None) -> None:
    tests = cases_of("stdin", [["1 2\n", "3\n"], ["4 5", "9.0"]])
    assert status(program, tests) == expected


def test_printed_alike() -> None:
    alike = referee.printed_alike
    assert alike("a b\n1.0  2\n\n", "a b \n1 2.00") and alike("0.10", "1e-1") and alike("", "\n")
    assert not alike("a", "b") and not alike("1 2", "1") and not alike("1\n2", "1 2")
    assert not alike("nan", "1") and not alike("sNaN 1", "1 1") and not alike("0.1", "0.1000000001")


def test_each_case_has_the_whole_time(short: None) -> None:
    program = "import time\ndef f(x):\n    end = time.process_time() + 0.15\n    while time.process_time() < end: pass\n    return x"
    tests = cases_of("functional", [[[i], i] for i in range(5)], entry="f", **{"class": None})
    assert status(program, tests) == "ok"
    assert status(program, "\n".join(f"assert f({i}) == {i}" for i in range(5))) == "timeout"


# Where it runs


def test_without_bubblewrap_a_flag_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RETORT_SANDBOX", raising=False)
    monkeypatch.setattr(sandbox, "unusable", lambda: "is not installed")
    with pytest.raises(ValueError, match=r"apt-get install bubblewrap.*RETORT_SANDBOX=fallback"):
        sandbox.kind("humaneval")
    sandbox._warn.cache_clear()
    with pytest.warns(harness.RetortWarning, match="resource limits only"):
        assert sandbox.kind("micro_code") == "fallback"
    assert (
        sandbox.kind("micro_code") == "fallback"
    )  # and no second warning, which would be an error
    sandbox._warn.cache_clear()
    monkeypatch.setenv("RETORT_SANDBOX", "fallback")
    assert sandbox.kind("humaneval") == "fallback"
    monkeypatch.setenv("RETORT_SANDBOX", "bubblewrap")
    with pytest.raises(ValueError, match="is not installed"):
        sandbox.kind("micro_code")
    monkeypatch.setenv("RETORT_SANDBOX", "none")
    with pytest.raises(ValueError, match="expected bubblewrap or fallback"):
        sandbox.kind("micro_code")


@pytest.mark.parametrize(
    "name", ["always equal", "exit(0)", "endless loop", "bytes into every descriptor", "fork bomb"]
)
def test_the_fallback_judges_alike(name: str, short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETORT_SANDBOX", "fallback")
    program, expected = FORGED[name]
    assert status(program) in expected.split()
    assert status(SOLVED["a daemon"]) == "ok"
    idle = workers.POOLS["fallback"]._idle
    deadline = time.monotonic() + 10
    while any(len(descendants(w.process.pid)) > IDLE for w in idle):
        assert time.monotonic() < deadline, "a process is left"
        time.sleep(0.01)


@pytest.mark.parametrize("kind", ["bubblewrap", "fallback"])
def test_a_server_ends_with_its_caller(kind: str) -> None:
    if kind == "bubblewrap" and sandbox.unusable():
        pytest.skip("no bubblewrap")
    worker = workers.POOLS[kind].start()
    busy = workers.POOLS[kind].start()
    endless = code.job(Problem("c", "?", tests=TESTS), "import time\ntime.sleep(1000)")
    assert worker.ask({**endless, "program": "def f(x): return x * x"}, 30) == "ok"
    busy._in.write(json.dumps(endless).encode() + b"\n")
    busy._in.close()  # as when the caller is killed in the middle of a job
    worker._in.close()
    assert worker.process.wait(10) == 0 and busy.process.wait(10) == 0
    busy.kill()
    worker.kill()


@needs_bubblewrap
def test_a_killed_worker_takes_all_with_it() -> None:
    worker = workers.POOLS["bubblewrap"].start()
    endless = code.job(Problem("c", "?", tests=TESTS), "import os\nos.fork()\nwhile True: pass")
    with pytest.raises(workers.Late):
        worker.ask(endless, 2 - workers.START_SECONDS)
    family = descendants(worker.process.pid)
    assert len(family) >= IDLE
    worker.kill()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in family):
        assert time.monotonic() < deadline
        time.sleep(0.01)


ORDINARY = """
import os, sys
from harness.types import Problem
from harness.verifiers import sandbox, verify
assert os.geteuid() != 0 and sandbox.kind() == os.environ["KIND"], sandbox.unusable()
def status(program):
    return verify(Problem("c", "?", tests="assert f(2) == 4", verifier="code"), f"~~~~\\n{program}\\n~~~~").status
print(status("def f(x): return 4"), status("def f(x): return 5"), status("class A:\\n    def __eq__(s, o): return True\\ndef f(x): return A()"))
print(status("import os, signal\\nos.kill(1, signal.SIGKILL)\\nos.kill(-1, signal.SIGKILL)\\ndef f(x): return 5"))
print(status("import os\\nwhile True: os.fork()"))
print(status("import threading, time\\nfor _ in range(100): threading.Thread(target=time.sleep, args=(99,)).start()\\ndef f(x): return 4"))
print(status("import ctypes, os\\ndef f(x): return 4 if ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) else 5"))
print(status("import os, glob\\ndef f(x): return 4 if not glob.glob('/proc/*') and not os.path.exists('/etc/passwd') else 5"))
"""


@needs_bubblewrap
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="no setpriv")
@pytest.mark.parametrize("kind", ["bubblewrap", "fallback"])
def test_as_an_ordinary_user(kind: str) -> None:
    """As another user than root; root's own interpreter may be closed to it, so that one gets a copy."""
    folder = Path(tempfile.mkdtemp(prefix="ordinary-"))
    python, env = sys.executable, {"PYTHONPATH": str(ROOT)}
    command: list[str] = []
    try:
        if os.geteuid() == 0:
            library, ignored = (
                sysconfig.get_path("stdlib"),
                ("site-packages", "test", "__pycache__"),
            )
            shutil.copytree(library, folder / "lib" / Path(library).name, ignore=shutil.ignore_patterns(*ignored))  # fmt: skip
            (folder / "bin").mkdir()
            python = shutil.copy(os.path.realpath(sys.executable), folder / "bin")
            for shared in Path(library).parent.glob("libpython*.so*"):
                shutil.copy(shared, folder / "lib")
            shutil.copytree(ROOT / "harness", folder / "harness")
            env = {"PYTHONPATH": str(folder), "LD_LIBRARY_PATH": str(folder / "lib"), "PYTHONHOME": str(folder)}  # fmt: skip
            subprocess.run(["chmod", "-R", "a+rX", str(folder)], check=True)
            command = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups"]
        env |= {"PATH": os.environ["PATH"], "RETORT_SANDBOX": kind, "KIND": kind}
        found = subprocess.run(
            [*command, python, "-c", ORDINARY],
            env=env,
            cwd="/",
            capture_output=True,
            text=True,
        )
        said = found.stdout.splitlines()
        assert said[:2] == ["ok wrong wrong", "wrong"], found.stderr
        assert said[2] in ("wrong", "timeout") and said[3] == "wrong"
        if kind == "bubblewrap":
            assert said[4:] == ["ok", "ok"]
    finally:
        shutil.rmtree(folder)


def test_the_protocol_names_version_and_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    before = versions()
    monkeypatch.setitem(code.LIMITS, "memory", 1 << 29)
    assert versions() != before
    monkeypatch.setattr(sandbox, "VERSION", "x")
    assert versions()["sandbox"] == "x" and set(code.LIMITS) <= {
        name.removeprefix("code.") for name in before
    }


def test_exact_numbers_cross() -> None:
    from decimal import Decimal
    from fractions import Fraction

    given = [Fraction(-3, 7), Decimal("1.10"), Fraction(1 << 70, 3), Decimal("NaN")]
    back = wire.unpack(json.loads(json.dumps(wire.pack(given, lambda _: 7))), lambda _: None)
    assert [type(v) for v in back] == [type(v) for v in given]
    assert back[:3] == given[:3] and str(back[1]) == "1.10" and back[3].is_nan()


def test_only_plain_data_crosses() -> None:
    def refuse(value: Any) -> int:
        raise TypeError(value)

    assert wire.pack(object(), lambda _: 7) == {"thing": 7}
    with pytest.raises(TypeError):
        wire.pack([len], refuse)
    for nonsense in (
        {"call": []},
        {"int": "x"},
        {},
        {"a": 1, "b": 2},
        {"set": [[]]},
        {"decimal": "x"},
        {"fraction": [1, 0]},
        {"dict": [1]},
    ):
        with pytest.raises(referee.Failure):
            wire.unpack(nonsense, lambda _: None)


# Real data


def rows(name: str) -> list[dict[str, Any]]:
    with gzip.open(Path(DATA or "", name), "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def statuses(items: list[tuple[str, str | None, str]]) -> list[str]:
    found = [
        (Problem(str(i), "?", tests=tests, verifier="code", entry=entry), f"~~~~\n{program}\n~~~~")
        for i, (tests, entry, program) in enumerate(items)
    ]
    return [verdict.status for verdict in verify_many(found)]


class Strings(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name}")


if DATA:

    def test_real_data_humaneval() -> None:
        found = rows("humaneval/test.jsonl.gz")
        equal = "class Equal:\n    __hash__ = None\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n"
        bodies = {
            "solution": ("", lambda row: row["canonical_solution"]),
            "none": ("", lambda row: "    return None\n"),
            "equal": (equal, lambda row: "    return Equal()\n"),
        }
        passed = {}
        for name, (before, body) in bodies.items():
            items = [
                (
                    f"{row['test']}\ncheck({row['entry_point']})",
                    row["entry_point"],
                    before + row["prompt"] + body(row),
                )
                for row in found
            ]
            passed[name] = statuses(items).count("ok")
        assert passed == {"solution": 164, "none": 0, "equal": 0}

    def test_real_data_mbpp(monkeypatch: pytest.MonkeyPatch) -> None:
        shared = []
        ask = verifiers._status

        def answer(kind: str, job: dict[str, Any], seconds: float) -> Any:
            shared.append(bool(job.get("share")))
            return ask(kind, job, seconds)

        monkeypatch.setattr("harness.verifiers._status", answer)
        items = [
            (
                "\n".join([row["test_setup_code"] or "", *row["test_list"]]),
                None,
                row["code"],
            )
            for row in rows("mbpp/mbpp.jsonl.gz")
        ]
        assert statuses(items) == ["ok"] * 974
        assert not any(shared)  # all of it is judged from outside the program's process

    def test_real_data_livecodebench() -> None:
        items = {"ok": [], "wrong": []}
        for row in rows("livecodebench/v1_leetcode_substitute_hidden_tests.jsonl.gz"):
            packed = zlib.decompress(base64.b64decode(row["private_test_cases"]))
            cases = [
                [
                    [json.loads(line) for line in case["input"].split("\n")],
                    json.loads(case["output"]),
                ]
                for case in json.loads(Strings(io.BytesIO(packed)).load())
            ]
            entry = json.loads(row["metadata"])["func_name"]
            tests = cases_of("functional", cases, entry=entry, **{"class": "Solution"})
            tree = ast.parse(row["reference_solution"])
            last = max(
                (n for n in ast.walk(tree) if isinstance(n, ast.Return) and n.value),
                key=lambda node: node.lineno,
            )
            last.value = ast.List([last.value], ast.Load())
            items["ok"].append((tests, entry, row["reference_solution"]))
            items["wrong"].append((tests, entry, ast.unparse(tree)))
        assert len(items["ok"]) == 28
        for expected, programs in items.items():
            assert statuses(programs) == [expected] * 28
