"""Serves an engine to the process that started it: (verb, arguments) in, a reply out, over one socket.

    python serve.py SOCKET LIFELINE    # file descriptors; it ends when the lifeline closes

Standard output is a log like standard error, so whatever vLLM prints cannot reach the channel.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from typing import Any


def end_with(lifeline: int) -> None:
    """End this process and its workers once the parent is gone."""
    os.read(lifeline, 1)
    os.killpg(os.getpgid(0), signal.SIGKILL)


def main() -> None:
    socket, lifeline = map(int, sys.argv[1:])
    for descriptor in (socket, lifeline):
        os.set_inheritable(descriptor, False)  # not to vLLM's own workers
    threading.Thread(target=end_with, args=(lifeline,), daemon=True).start()
    channel = Connection(socket)
    engine: Any = None
    while True:
        try:
            verb, arguments = channel.recv()
        except EOFError:
            return
        try:
            if engine is None:
                from vllm_engine import Engine  # seconds, in which a parent may end

                engine, reply = Engine(**arguments), None
            else:
                reply = getattr(engine, verb)(**arguments)
            channel.send((engine.version, reply, None))
        except Exception as error:
            traceback.print_exc()
            channel.send((None, None, f"{type(error).__name__}: {error}"))


if __name__ == "__main__":
    main()
