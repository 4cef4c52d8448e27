"""Where model-written code runs: bubblewrap, with a warm server of verdicts inside.

In it there is no network, no file of the host but the interpreter, its standard library and the shared libraries that these
load (read-only, without site-packages), no environment, no /proc and no device but null, zero, full and random. Each program
has process, mount and IPC namespaces and a tmpfs of its own, no rights, a filter on system calls, and the limits of
harness/verifiers/code.py; its tests run in another process (harness/verifiers/inside). As root, programs run as another user, for
a limit on processes does not bind root; otherwise as the caller, in a user namespace.

Without bubblewrap RETORT_SANDBOX=fallback runs programs with what the kernel allows this user: namespaces, if it does, and
resource limits. It lacks: programs can read the host's files that their user may read, the benchmarks' own answers among them,
write where it may write (/tmp, for one, where the next program finds it; what the caller may write, if the caller is not root), and
see the host's processes; where the kernel refuses namespaces (and always outside Linux) the network is open too, and what runs as
the caller can kill or debug the caller's processes. Programs of micro_code alone, which our own tiny models write, fall back by
themselves, with one warning, so that the quickstart runs on any machine. The protocol of a benchmark names which it was.
"""

from __future__ import annotations

import functools
import glob
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

from harness import RetortWarning
from harness.verifiers import code

VERSION = "2"  # raised when what a program meets changes
FLAG = "RETORT_SANDBOX"
INSIDE = Path(__file__).with_name("inside")
FIRST_USER, USERS = 20_000, 40_000
MISSING = (
    "bubblewrap, which model-written code runs in, {why}; install it (apt-get install bubblewrap), or "
    f"set {FLAG}=fallback to run programs with namespaces and resource limits only"
)
# Sets are to iterate alike in every run; and functions are bound once, not in each fork.
ENVIRONMENT = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "LD_BIND_NOW": "1"}
_PYTHON = os.path.realpath(sys.executable)
# Where memory runs out, the kernel is to end programs and not their caller.
_FIRST_TO_GO = ["/bin/sh", "-c", 'echo 1000 2>/dev/null >/proc/self/oom_score_adj; exec "$@"', "sh"]
_BOOT = """
import sys
from importlib import util
spec = util.spec_from_file_location("inside", {0!r} + "/__init__.py", submodule_search_locations=[{0!r}])
sys.modules["inside"] = util.module_from_spec(spec)
from inside import nursery
nursery.main()
"""


def kind(source: str = "") -> str:
    """bubblewrap or fallback, for a problem of this source; ValueError where neither is to be had."""
    asked = os.environ.get(FLAG, "")
    if asked not in ("", "bubblewrap", "fallback"):
        raise ValueError(f"{FLAG}={asked}: expected bubblewrap or fallback")
    if asked == "fallback":
        return asked
    why = unusable()
    if why is None:
        return "bubblewrap"
    if asked or source not in ("micro_math", "micro_code"):
        raise ValueError(MISSING.format(why=why))
    _warn(why)
    return "fallback"


@functools.cache
def unusable() -> str | None:
    """Why bubblewrap cannot be used here, or None."""
    if shutil.which("bwrap") is None:
        return "is not installed"
    tried = subprocess.run(
        command("bubblewrap", code.LIMITS), stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    said = tried.stderr.strip().splitlines() or [f"exit status {tried.returncode}"]
    return f"does not work here ({said[-1]})" if tried.returncode else None


def command(kind: str, limits: Mapping[str, float]) -> list[str]:
    """The command line of a server."""
    settings = {
        "folder": "/work" if kind == "bubblewrap" else None,
        "user": FIRST_USER + 2 * secrets.randbelow(USERS // 2),  # and the next for the referee
        "limits": dict(limits),
    }
    boot = _BOOT.format("/inside" if kind == "bubblewrap" else str(INSIDE))
    # As -I, which is -E -P -s, but for -E: the environment is empty, and sets are to iterate alike in every run.
    python = [_PYTHON, "-P", "-s", "-S", "-c", boot, json.dumps(settings)]
    return [*_FIRST_TO_GO, *_bubblewrap(), *python] if kind == "bubblewrap" else python


@functools.cache
def _bubblewrap() -> tuple[str, ...]:
    """bubblewrap and its options."""
    options = [
        shutil.which("bwrap") or "bwrap",
        "--unshare-pid",
        "--unshare-net",
        "--unshare-ipc",
        "--unshare-uts",
    ]
    options += ["--unshare-cgroup-try", "--hostname", "sandbox", "--clearenv", "--cap-drop", "ALL"]
    options += ["--cap-add", "CAP_SYS_ADMIN"]  # for the namespaces of each program
    if os.geteuid() == 0:
        for name in ("SETUID", "SETGID", "KILL"):  # to run programs as another user, and end them
            options += ["--cap-add", f"CAP_{name}"]
    else:
        options += ["--unshare-user"]
    options += [*(word for pair in ENVIRONMENT.items() for word in ("--setenv", *pair))]
    if "LD_LIBRARY_PATH" in os.environ:
        options += ["--setenv", "LD_LIBRARY_PATH", os.environ["LD_LIBRARY_PATH"]]
    paths = _interpreter()
    for folder in sorted({str(above) for path in paths for above in Path(path).parents} - {"/"}):
        options += [
            "--perms",
            "0755",
            "--dir",
            folder,
        ]  # else as on the host, where /root is closed
    for path in paths:
        options += ["--ro-bind", os.path.realpath(path), path]
    packages = os.path.join(os.path.dirname(os.__file__), "site-packages")
    if os.path.isdir(packages):
        options += ["--tmpfs", packages]
    for device in ("null", "zero", "full", "random", "urandom"):
        options += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    options += ["--ro-bind", str(INSIDE), "/inside", "--dir", "/work"]
    if not any(path.startswith("/tmp/") for path in paths):
        options += ["--symlink", "work", "/tmp"]
    return (*options, "--remount-ro", "/", "--chdir", "/work")


def _interpreter() -> list[str]:
    """The interpreter, its library, and the shared libraries that those load."""
    library = os.path.dirname(os.__file__)
    modules = [path for path in sys.path if path.endswith("lib-dynload")]
    names = [
        name for path in modules for name in glob.glob(f"{path}/*.so") if "_tkinter" not in name
    ]
    listed = subprocess.run(["ldd", _PYTHON, *names], capture_output=True, text=True).stdout
    shared = re.findall(r"(?:=>|^)\s+(/\S+) \(0x", listed, re.MULTILINE)
    outside = [path for path in modules if not path.startswith(library)]
    return sorted({_PYTHON, library, *shared, *outside})


@functools.cache
def _warn(why: str) -> None:
    warnings.warn(
        f"bubblewrap {why}: programs of micro tasks run with namespaces and resource limits only",
        RetortWarning,
        stacklevel=2,
    )
